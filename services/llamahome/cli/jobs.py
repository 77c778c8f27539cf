"""Commands about jobs. They talk to the gateway; see ``context.endpoint`` for which one."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llamahome.cli.context import JobId, Json, State, connect
from llamahome.cli.output import duration, facts, put, put_json, put_table, say, size

if TYPE_CHECKING:
    from llamahome.client import Client, JobInfo


def submit(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="Conversations, JSONL (or a file id).")
    ],
    base: Annotated[
        str, typer.Option(metavar="NAME", help="A base or fine-tuned model (see `models`).")
    ],
    validation: Annotated[
        str | None, typer.Option(metavar="FILE", help="Validation conversations, JSONL.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(metavar="NAME", help="A recipe (see `recipes`).")
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="A training setting, as lora.r=16; repeatable."
        ),
    ] = None,
    suffix: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Part of the new model's name.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Watch until it ends; 0 if succeeded.")] = (
        False
    ),
    state: State = None,
    as_json: Json = False,
) -> None:
    """Hand over a job and print its id.

    Once the id is printed the job is durable.
    """
    from llamahome.cli.watch import watch
    from llamahome.config import parse_assignments, parse_training_config

    config = parse_assignments(assignments or [])
    parse_training_config(config, source="--set")  # before a large file is uploaded for nothing
    with connect(state) as client:
        job = client.submit(
            file, base=base, validation_file=validation, recipe=recipe, config=config or None,
            suffix=suffix,
        )  # fmt: skip
        if not as_json:
            put(job.id)
        elif not wait:
            put_json(job)
        if not wait:
            raise typer.Exit(0)
        code = watch(client, job.id, state=state, stream=sys.stderr)
        if as_json:
            put_json(client.job(job.id))
    raise typer.Exit(code)


def list_jobs(
    limit: Annotated[int, typer.Option(min=1, max=100, help="How many, newest first.")] = 20,
    after: Annotated[str | None, typer.Option(metavar="JOB", help="Go on after this job.")] = None,
    state: State = None,
    as_json: Json = False,
) -> None:
    """List jobs, newest first."""
    from llamahome.cli.progress import percent

    with connect(state) as client:
        found = client.jobs(limit=limit, after=after)
    if as_json:
        put_json(found)
        return
    now = time.time()
    put_table(
        ("JOB", "STATE", "PROGRESS", "AGE", "BASE", "MODEL"),
        [
            [
                job.id, job.state.value, percent(job), duration(max(0.0, now - job.created_at)),
                job.model, job.fine_tuned_model or "-",
            ]
            for job in found
        ],
    )  # fmt: skip


def show(job: JobId, state: State = None, as_json: Json = False) -> None:
    """Show one job: its runs and attempts, numbers, error."""
    from llamahome.cli.show import show as show_job
    from llamahome.schemas import JobState

    with connect(state) as client:
        found = client.job(job)
        runs = client.runs(job)
        report = client.report(job) if found.state is JobState.succeeded else None
    if as_json:
        put_json({"job": found, "runs": runs, "report": report})
    else:
        show_job(found, runs, report, state=state)


def watch(job: JobId, state: State = None, as_json: Json = False) -> None:
    """Follow a job until it ends.

    Exit 0 if it succeeded. Ctrl-C ends the watching, never the job.
    """
    from llamahome.cli.watch import watch as watch_job

    with connect(state) as client:
        raise typer.Exit(watch_job(client, job, state=state, as_json=as_json))


def cancel(job: JobId, state: State = None, as_json: Json = False) -> None:
    """End a job. Cancelling it again changes nothing."""
    _act(lambda client: client.cancel(job), state, as_json)


def pause(job: JobId, state: State = None, as_json: Json = False) -> None:
    """Hold a job at its next checkpoint and free its worker."""
    _act(lambda client: client.pause(job), state, as_json)


def resume(job: JobId, state: State = None, as_json: Json = False) -> None:
    """Let a paused job go on where it was."""
    _act(lambda client: client.resume(job), state, as_json)


def retry(job: JobId, state: State = None, as_json: Json = False) -> None:
    """Try an ended job again, as a new job.

    It reuses what was finished; prints the new id.
    """
    with connect(state) as client:
        made = client.retry(job)
    put_json(made) if as_json else put(made.id)


def fetch(
    job: JobId,
    into: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.")],
    state: State = None,
    as_json: Json = False,
) -> None:
    """Download a succeeded job's adapter.

    Every file is checked against its sha256; DIR appears whole or not at all.
    """
    with connect(state) as client:
        folder = client.fetch(job, into)
        files = client.artifacts(job)
    if as_json:
        put_json({"folder": str(folder.resolve()), "files": files})
        return
    facts((file.name, size(file.bytes)) for file in files)
    say(f"adapter of {job} in {folder}")


def _act(act: Callable[[Client], JobInfo], state: Path | None, as_json: bool) -> None:
    with connect(state) as client:
        changed = act(client)
    put_json(changed) if as_json else put(f"{changed.id} {changed.state.value}")
