"""A stage that does next to nothing, so that what happens around a stage can be watched."""

from __future__ import annotations

import hashlib
import threading
from collections import Counter

from llamahome.schemas import Ports, Stage, StageResult, StageTask, Step


class CountingStage:
    """Publishes one small file per run and counts how often each run was executed."""

    def __init__(self) -> None:
        self.executed: Counter[str] = Counter()
        self._lock = threading.Lock()

    def key(self, task: StageTask) -> str | None:
        """Equal files give equal keys, whatever the job, as a real stage's would."""
        if task.stage is Stage.training:
            return None
        files = ",".join(file.sha256 for file in task.spec.training_files)
        text = f"{files}/{task.stage}/{task.step}/{task.shard}"
        return hashlib.sha256(text.encode()).hexdigest()

    def run(self, task: StageTask, ports: Ports) -> StageResult:
        with self._lock:
            self.executed[f"{task.stage}/{task.step}/{task.shard}"] += 1
        folder = ports.scratch / "out"
        folder.mkdir()
        (folder / "shard.txt").write_text(f"{task.stage} {task.step} {task.shard}")
        ports.progress(1, 1)
        ports.event(f"{task.stage} {task.step} {task.shard} worked")
        kind = "adapter" if task.stage is Stage.training else "rows"
        plans = task.stage is Stage.validation and task.step is Step.close
        return StageResult(
            artifact=ports.publish(folder, kind),
            next_plans=({"rows": 0}, {"rows": 1}) if plans else (),
        )
