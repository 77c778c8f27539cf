"""`llamahome doctor`: what would go wrong, said before it does."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import unquote, urlsplit, urlunsplit

from llamahome.cli import bases, redis
from llamahome.cli.context import open_ledger
from llamahome.cli.exits import missing_modules, require
from llamahome.cli.lock import holder
from llamahome.cli.output import duration, size
from llamahome.config import Settings
from llamahome.errors import InvalidData, LlamaHomeError, NotFound
from llamahome.ledger import Ledger

ROLES = ("coordinator", "gateway", "validation", "preprocessing", "training", "submissions")
MAX_SKEW_SECONDS = 1.0
LOW_SPACE_BYTES = 5 * 1024**3
NO_SPACE_BYTES = 512 * 1024**2
DEVICE_SECONDS = 60.0


class Check(NamedTuple):
    """One finding; ``remedy`` is empty where nothing is to be done."""

    name: str
    state: Literal["ok", "warn", "fail"]
    found: str
    remedy: str = ""


def failed(checks: list[Check]) -> bool:
    return any(check.state == "fail" for check in checks)


def check_all(settings: Settings) -> list[Check]:
    """Every check, in the order in which they depend on each other. Raises nothing of the fleet."""
    checks = [python(), *map(extra, ("fleet", "gateway", "training")), *where(settings)]
    checks += _guarded("redis", lambda: [redis_server(settings)])
    checks += _guarded("storage", lambda: storage(settings))
    checks += _guarded("ledger", lambda: list(ledger_and_fleet(settings)))
    checks.append(devices())
    return checks


def _guarded(name: str, check: Callable[[], list[Check]]) -> list[Check]:
    try:
        return check()
    except LlamaHomeError as error:
        return [
            Check(name, "fail", f"{error.place}: {error.message}".lstrip(": "), error.remedy or "")
        ]
    except OSError as error:
        return [Check(name, "fail", str(error), "See the message; `--debug` shows the traceback")]


def python() -> Check:
    return Check("python", "ok", f"{platform.python_version()} at {sys.executable}")


def extra(name: str) -> Check:
    """Whether an extra is installed whole, and the versions that matter most in it."""
    missing = missing_modules(name)
    if missing:
        return Check(
            f"extra {name}", "warn", f"{', '.join(missing)} not installed",
            f"pip install 'llamahome[{name}]', unless this machine does without",
        )  # fmt: skip
    shown = {
        "fleet": ("llamahome", "celery", "sqlalchemy"),
        "gateway": ("fastapi", "uvicorn"),
        "training": ("torch", "transformers", "peft"),
    }[name]
    versions = " ".join(f"{package} {importlib.metadata.version(package)}" for package in shown)
    return Check(f"extra {name}", "ok", versions)


def where(settings: Settings) -> Iterator[Check]:
    """What the settings say; passwords left out."""
    if settings.state is None and settings.ledger_url is None:
        yield Check(
            "settings", "fail", "no state folder and no LLAMAHOME_LEDGER_URL",
            "Run `llamahome up`, or name a fleet with --state or LLAMAHOME_STATE",
        )  # fmt: skip
        return
    yield Check("settings", "ok", f"ledger {_public(settings.ledger)}, host {settings.host}")
    if settings.state is not None and settings.state.is_dir():
        mode = stat.S_IMODE(settings.state.stat().st_mode)
        if mode & 0o077:
            yield Check(
                "state folder", "warn", f"{settings.state} has mode {mode:04o}",
                f"chmod 700 {settings.state}: keys and data are in it",
            )  # fmt: skip


def redis_server(settings: Settings) -> Check:
    """Reachable, append-only, and never evicting. A private one need not run without its fleet."""
    from redis.exceptions import RedisError

    require("fleet")
    if settings.redis_url is None and settings.state is not None and not holder(settings.state):
        server = redis.find_server()
        found = f"not running; {server.path} {server.origin} will be used"
        return Check("redis", "warn", found, "`llamahome up` starts it")
    from llamahome.queueing.app import redis_client

    try:
        with redis_client(settings, timeout_seconds=5.0) as client:
            info = client.info()
    except (RedisError, OSError) as error:
        remedy = "Start it, or set LLAMAHOME_REDIS_URL; jobs are accepted without it, but wait"
        return Check("redis", "fail", f"{_public(settings.redis)}: {error}", remedy)
    policy, persistent = info.get("maxmemory_policy"), bool(info.get("aof_enabled"))
    found = (
        f"{info.get('redis_version')} at {_public(settings.redis)}, {policy}, append-only file "
        f"{'on' if persistent else 'off'}, {size(info.get('used_memory', 0))} used"
    )
    if policy != "noeviction":
        return Check(
            "redis", "fail", found, "Set maxmemory-policy noeviction: others lose messages"
        )
    if not persistent:
        return Check(
            "redis", "warn", found, "Set appendonly yes, or submissions by Celery can be lost"
        )
    return Check("redis", "ok", found)


def storage(settings: Settings) -> list[Check]:
    """Write a file, read it back, delete it; and the free space of a local one."""
    require("fleet")
    from llamahome.storage import open_storage

    opened = open_storage(settings.storage)
    path, content = f"doctor/{uuid.uuid4().hex}", os.urandom(4096)
    opened.put(path, io.BytesIO(content))
    try:
        with opened.open(path) as stream:
            if stream.read() != content:
                raise InvalidData("gave back other bytes than were written", file=path)
    finally:
        opened.delete(path)
    checks = [Check("storage", "ok", f"{_public(settings.storage)}: written, read back, deleted")]
    if settings.storage.startswith("file://"):
        checks.append(free_space(Path(unquote(urlsplit(settings.storage).path))))
    return checks


def free_space(folder: Path) -> Check:
    usage = shutil.disk_usage(folder)
    found = f"{size(usage.free)} of {size(usage.total)} free at {folder}"
    if usage.free < NO_SPACE_BYTES:
        return Check("free space", "fail", found, "Make room: checkpoints and adapters need it")
    if usage.free < LOW_SPACE_BYTES:
        return Check("free space", "warn", found, f"Less than {size(LOW_SPACE_BYTES)} is left")
    return Check("free space", "ok", found)


def ledger_and_fleet(settings: Settings) -> Iterator[Check]:
    """The schema, and what is registered in it."""
    with contextlib.closing(open_ledger(settings)) as ledger:
        yield Check("ledger", "ok", f"{ledger.describe()}, revision {ledger.revision()}, current")
        yield clock(ledger)
        yield from registered_bases(ledger)
        yield workers(ledger)


def clock(ledger: Ledger) -> Check:
    """This host's clock against the ledger's, whose time every lease is by."""
    before = time.time()
    theirs = ledger.clock()
    skew = theirs - (before + time.time()) / 2
    found = f"this host is {abs(skew):.2f} s {'behind' if skew > 0 else 'ahead of'} the ledger"
    if abs(skew) > MAX_SKEW_SECONDS:
        return Check("clock", "warn", found, "Set the clock by NTP; logs will not line up")
    return Check("clock", "ok", found)


def registered_bases(ledger: Ledger) -> Iterator[Check]:
    """Each base's folder is here and is still what was registered."""
    registered = ledger.bases()
    if not registered:
        yield Check(
            "bases", "warn", "none registered",
            "llamahome models add NAME DIR, or models make-tiny DIR to try things out",
        )  # fmt: skip
    for base in registered:
        name, folder = f"base {base.name}", Path(base.path)
        try:
            bases.check_base(folder)
        except NotFound as error:
            # A machine that trains nothing need not have it.
            state: Literal["warn", "fail"] = "warn" if missing_modules("training") else "fail"
            yield Check(name, state, str(error), "Put it there, or register it anew: models add")
            continue
        digest = bases.base_digest(folder)
        if digest == base.digest:
            yield Check(name, "ok", f"{folder}, sha256 {digest[:12]}")
        else:
            yield Check(
                name, "fail", f"{folder} has sha256 {digest[:12]}, not {base.digest[:12]}",
                "Restore its files, or register it anew: "
                f"models add {base.name} {shlex.quote(str(folder))}",
            )  # fmt: skip


def workers(ledger: Ledger) -> Check:
    """Which roles are alive."""
    alive = ledger.workers(alive_only=True)
    counts = {role: sum(worker.role == role for worker in alive) for role in ROLES}
    found = ", ".join(f"{count} {role}" for role, count in counts.items() if count) or "none alive"
    absent = [role for role, count in counts.items() if not count]
    if not absent:
        return Check("workers", "ok", found)
    remedy = "`llamahome up` starts them all" if not alive else f"Start: {', '.join(absent)}"
    return Check("workers", "warn", found, remedy)


_DEVICES = """
import json, torch
names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
print(json.dumps({"cuda": names, "threads": torch.get_num_threads()}))
"""


def devices() -> Check:
    """What torch would train on; asked in a process of its own, for a broken driver can hang it."""
    if missing_modules("training"):
        return Check("devices", "warn", "the training extra is not installed here")
    started = time.monotonic()
    try:
        asked = subprocess.run(
            [sys.executable, "-P", "-c", _DEVICES],
            capture_output=True, text=True, timeout=DEVICE_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        found = f"torch says nothing for {duration(time.monotonic() - started)}"
        return Check("devices", "fail", found, "Does nvidia-smi answer?")
    if asked.returncode != 0:
        last = (asked.stderr.strip().splitlines() or [f"exit code {asked.returncode}"])[-1]
        return Check("devices", "fail", f"torch cannot be used: {last}", "Install it anew")
    answer = json.loads(asked.stdout.splitlines()[-1])
    found = ", ".join(answer["cuda"]) or f"CPU, {answer['threads']} threads"
    return Check("devices", "ok", found)


def _public(url: str) -> str:
    """``url`` without the password."""
    parts = urlsplit(url)
    if parts.password is None:
        return url
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{parts.username or ''}:***@{host}"))
