"""A stage's worker: a Celery process whose pool children each run a StageRunner.

celery and billiard are imported inside ``serve``: billiard reads REMAP_SIGTERM when it is
imported, and SIGTERM must mean "hand back and leave", not "finish first", for a training that
takes hours.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import structlog

from llamahome.config import Settings
from llamahome.config.logs import configure_logging
from llamahome.errors import Unavailable
from llamahome.ledger import Ledger
from llamahome.metrics import MetricsServer, process_registry
from llamahome.queueing.names import ring_task, stage_queues
from llamahome.queueing.presence import Presence, ProcessInfo
from llamahome.queueing.scratch import UNUSABLE, Scratch
from llamahome.schemas import Doorbell, Stage, StageFunction, StageKey

if TYPE_CHECKING:
    from celery import Celery

TASKS_PER_CHILD = 100
SOFT_SHUTDOWN_SECONDS = 5.0
# Meanwhile another worker hears the next doorbell; this one looks whether it can work again.
PASS_ON_SECONDS = 5.0
_LOG = structlog.get_logger(__name__)


class _Child:
    """What a pool child holds from its start to its end."""

    def __init__(self) -> None:
        self.work: Callable[[], int] | None = None
        self.ring: Callable[[], None] | None = None
        self.close: Callable[[], None] | None = None
        self.set_state: Callable[[str], None] | None = None

    def pass_on(self) -> None:
        """Give a doorbell that cannot be answered here to whoever listens next, in a while."""
        assert self.ring is not None, "the pool child was not started"
        time.sleep(PASS_ON_SECONDS)
        self.ring()


def serve(
    stage: Stage,
    function: StageFunction,
    key: StageKey,
    settings: Settings,
    *,
    concurrency: int = 1,
    slots: int = 1,
    on_exit: Callable[[], None] | None = None,
) -> int:
    """Run the stage's worker in the foreground until SIGTERM or SIGINT; returns the exit code.

    Each of ``concurrency`` pool children works on ``slots`` runs at once. ``on_exit`` is called in
    the pool child when it ends. Raises Unavailable when the ledger does
    not answer at the start, InvalidState when its schema is of another version.
    """
    configure_logging(settings, role=str(stage))
    check = Ledger(settings.ledger)
    check.check_revision()
    check.close()
    remap_sigterm()
    from llamahome.queueing.app import make_app

    app = make_app(settings)
    training = stage is Stage.training
    app.conf.worker_soft_shutdown_timeout = 0.0 if training else SOFT_SHUTDOWN_SECONDS
    child = _Child()
    _register_ring(app, stage, child)
    with _main_metrics(stage, settings) as server:
        start = partial(_start_child, stage, function, key, settings, child, server.port, slots)
        _connect_signals(start, child, on_exit)
        # The training child owns the warm engine, so it is never recycled.
        recycle = [] if training else [f"--max-tasks-per-child={TASKS_PER_CHILD}"]
        return run_worker(app, stage_queues(stage), concurrency, *recycle)


def _main_metrics(stage: Stage, settings: Settings) -> MetricsServer:
    """The main process's own page. It keeps no ledger connection: its children are forks."""
    registry = process_registry()
    name = f"{stage}-{settings.host}-{os.getpid()}-main"
    registry.register(ProcessInfo(name, str(stage), version("llamahome")))
    return MetricsServer(registry, host=settings.metrics_host, port=0)


def remap_sigterm() -> None:
    """Make SIGTERM a cold shutdown: running tasks get SystemExit. Before celery is imported."""
    os.environ["REMAP_SIGTERM"] = "SIGQUIT"
    from billiard import common

    assert common.REMAP_SIGTERM == "SIGQUIT", "celery was imported before remap_sigterm()"


def run_worker(app: Celery, queues: tuple[str, ...], concurrency: int, *options: str) -> int:
    """``celery worker`` on these queues, with everything off that the ledger does better.

    Returns the exit code: 0 only where somebody asked the worker to end.
    """
    argv = [
        "--quiet", "worker", "--pool=prefork", f"--concurrency={concurrency}",
        f"--queues={','.join(queues)}", "--without-gossip", "--without-mingle",
        "--without-heartbeat", "--loglevel=WARNING", *options,
    ]  # fmt: skip
    try:
        app.worker_main(argv)
    except SystemExit as ended:
        return _exit_code(ended.code)
    return _exit_code(0)


def _exit_code(code: object) -> int:
    from celery.worker import state

    # The signal handlers set one of them; celery itself ends a cold shutdown, which is our orderly
    # one, and a crash of its loop with the same EX_FAILURE.
    asked = any(flag not in (None, False) for flag in (state.should_stop, state.should_terminate))
    if asked and code in (None, 0, 1):
        return 0
    _LOG.error("the worker's loop ended by itself; its reason stands above", code=str(code))
    return 1


def _register_ring(app: Celery, stage: Stage, child: _Child) -> None:
    # shared=False: otherwise a second app in this process would run the first one's function.
    @app.task(name=ring_task(stage), shared=False, ignore_result=True)  # type: ignore[untyped-decorator]
    def ring(v: int = 1, queue: str = "") -> None:
        Doorbell.model_validate({"v": v, "queue": queue})
        assert child.work is not None, "the pool child was not started"
        assert child.set_state is not None
        child.set_state("busy")
        try:
            child.work()
        except Unavailable as error:
            # Losing this doorbell is harmless: the sweeper rings again once the ledger answers.
            _LOG.warning("cannot claim", error=str(error))
            if error.code == UNUSABLE:
                child.pass_on()
        finally:
            child.set_state("up")


def _connect_signals(
    start_child: Callable[[], None], child: _Child, on_exit: Callable[[], None] | None
) -> None:
    from celery import signals

    @signals.setup_logging.connect(weak=False)  # type: ignore[untyped-decorator]
    def keep_our_logging(**_: Any) -> None:
        """Connected at all, celery leaves logging as it is."""

    @signals.worker_process_init.connect(weak=False)  # type: ignore[untyped-decorator]
    def start(**_: Any) -> None:
        start_child()

    @signals.worker_process_shutdown.connect(weak=False)  # type: ignore[untyped-decorator]
    def stop(**_: Any) -> None:
        if on_exit is not None:
            on_exit()
        if child.close is not None:
            child.close()


def _start_child(
    stage: Stage,
    function: StageFunction,
    key: StageKey,
    settings: Settings,
    child: _Child,
    main_metrics_port: int,
    slots: int,
) -> None:
    """Connections are opened after the fork: none survives one."""
    from contextlib import ExitStack

    from llamahome.queueing.crowd import Crowd
    from llamahome.queueing.doorbell import CeleryBell
    from llamahome.queueing.runner import StageRunner
    from llamahome.storage import open_storage

    stack = ExitStack()
    ledger = Ledger(settings.ledger)
    stack.callback(ledger.close)
    info = {"main_pid": os.getppid(), "main_metrics_port": main_metrics_port}
    presence = stack.enter_context(
        Presence(
            ledger, role=str(stage), settings=settings, slots=slots, info=info,
            check=Scratch(settings.scratch_root).check,
        )
    )  # fmt: skip
    bell = CeleryBell(settings)
    runner = StageRunner(
        stage,
        function,
        key,
        ledger=ledger,
        storage=open_storage(settings.storage),
        bell=bell,
        settings=settings,
        worker=presence.id,
    )
    child.work = runner.work
    if slots > 1:
        crowd = Crowd(
            runner, slots, settings,
            lambda base, free: presence.inform(base=base, free_slots=free),
        )  # fmt: skip
        child.work = crowd.work
    child.ring = partial(bell.ring, stage)
    child.set_state = presence.state
    child.close = stack.close
    # A doorbell rung while nobody was there may be gone; a worker that begins looks for itself.
    bell.ring(stage)
