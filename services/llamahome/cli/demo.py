"""`llamahome demo`: the bundled sample, from file to adapter, on a fleet of its own if need be."""

from __future__ import annotations

import contextlib
import importlib.resources
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import typer

from llamahome.cli import bases
from llamahome.cli.children import end_with_parent
from llamahome.cli.context import Endpoint, command_line, open_ledger, read_endpoint
from llamahome.cli.exits import INTERRUPTED, USER
from llamahome.cli.lock import holder
from llamahome.cli.output import duration, facts, number, put, put_json, say
from llamahome.cli.progress import elapsed
from llamahome.cli.watch import display_for, follow
from llamahome.client import Client, JobInfo
from llamahome.config import load_settings
from llamahome.errors import Unavailable
from llamahome.schemas import JobReport, JobState

BASE = "tiny"
RECIPE = "quick"
# Small, so that the sample becomes several shards and several workers share it.
SHARD_BYTES = 32768
STOP_SECONDS = 35.0


def demo(state: Path, *, named: Path | None, as_json: bool) -> int:
    """Train the sample, fetch the adapter, print what came out. Returns the exit code.

    ``named`` is the folder as it was given, if it was, for the commands that are suggested.
    """
    state = state.resolve()
    sample = importlib.resources.files("llamahome.conversations") / "samples" / "support.jsonl"
    with _fleet(state) as fleet, Client(fleet.where.url, fleet.where.key) as client:
        base_folder = _base_folder(state)
        with importlib.resources.as_file(sample) as file:
            job = client.submit(file, base=BASE, recipe=RECIPE)
        say(f"job {job.id}: {file.name} on base {BASE}, recipe {RECIPE}")
        try:
            with display_for(sys.stderr if as_json else sys.stdout) as display:
                job = follow(client, job.id, display)
        except KeyboardInterrupt:
            say(f"job {job.id} is kept; {command_line('up', named)} goes on with it")
            return INTERRUPTED
        if job.state is not JobState.succeeded:
            say(f"look further: {command_line(f'show {job.id}', named)}, logs in {state / 'logs'}")
            return USER
        adapter = client.fetch(job.id, state / "demo" / job.id / "adapter")
        report = client.report(job.id)
    if as_json:
        put_json({"job": job, "report": report, "adapter": str(adapter)})
        return 0
    put("")
    facts(_conclusion(job, report, adapter, base_folder))
    first = f"{command_line('up', named)} in another terminal, then " if fleet.own else ""
    put(
        f"\nlook further: {first}{command_line(f'show {job.id}', named)}, "
        f"{command_line('ps', named)}"
    )
    return 0


def _conclusion(
    job: JobInfo, report: JobReport, adapter: Path, base_folder: str
) -> list[tuple[str, str]]:
    training = report.training
    losses = f"{number(training.eval_loss_before)} -> {number(training.eval_loss_after)}"
    return [
        ("adapter", str(adapter)),
        ("validation loss", losses),
        ("duration", duration(elapsed(job))),
        ("report", str(adapter / "report.json")),
        ("use it", "from transformers import AutoModelForCausalLM; from peft import PeftModel"),
        ("", f'base = AutoModelForCausalLM.from_pretrained("{base_folder}")'),
        ("", f'model = PeftModel.from_pretrained(base, "{adapter}")'),
    ]


class _Fleet(NamedTuple):
    """A fleet that serves; ``own`` when it ends with the demo."""

    where: Endpoint
    own: bool


@contextlib.contextmanager
def _fleet(state: Path) -> Iterator[_Fleet]:
    """The fleet that runs on ``state``, or one of our own that ends with us."""
    if running := holder(state):
        where = read_endpoint(state / "endpoint.json")
        if where is None:
            raise Unavailable(
                f"a fleet is starting or stopping here ({running})", file=str(state),
                remedy="Try again in a moment",
            )  # fmt: skip
        say(f"using the fleet that runs at {where.url}")
        yield _Fleet(where, own=False)
        return
    with _own_fleet(state) as where:
        yield _Fleet(where, own=True)


@contextlib.contextmanager
def _own_fleet(state: Path) -> Iterator[Endpoint]:
    command = [sys.executable, "-P", "-m", "llamahome.cli", "up", "--state", str(state)]
    # A session of its own: at Ctrl-C it is we who end it, once the display is closed.
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "LLAMAHOME_SHARD_BYTES": str(SHARD_BYTES)},
        start_new_session=True, preexec_fn=end_with_parent(signal.SIGTERM),
    )  # fmt: skip
    try:
        assert process.stdout is not None
        if not any(line.startswith("ready ") for line in process.stdout):
            raise typer.Exit(process.wait())  # it has said why
        where = read_endpoint(state / "endpoint.json")
        assert where is not None, "`up` writes it before it says ready"
        yield where
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _base_folder(state: Path) -> str:
    """The folder of the base; it is made and registered where the registry has others only."""
    settings = load_settings(state=state)
    with contextlib.closing(open_ledger(settings)) as ledger:
        registered = {base.name: base.path for base in ledger.bases()}
        if BASE in registered:
            return registered[BASE]
        folder = state / "bases" / BASE
        if not folder.is_dir():
            make = [sys.executable, "-P", "-m", "llamahome.cli", "models", "make-tiny", str(folder)]
            made = subprocess.run(make, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
            if made.returncode != 0:
                raise typer.Exit(made.returncode)  # it has said why
        bases.check_base(folder)
        return ledger.add_base(BASE, str(folder), bases.base_digest(folder)).path
