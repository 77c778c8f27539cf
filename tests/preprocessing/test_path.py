"""The fast path inside the stage: proven on the job's own rows, dropped everywhere at one doubt."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from llamahome.conversations import Conversation
from llamahome.conversations.fastpath import FastChat, FastRow
from llamahome.conversations.proof import sampled
from llamahome.conversations.tokens import read_token_rows
from llamahome.local import run_job
from llamahome.preprocessing import stage
from llamahome.schemas import (
    ArtifactRef,
    JobSpec,
    NewEvent,
    PreparationReport,
    Stage,
    StageResult,
    StageTask,
    Step,
)
from llamahome.storage import LocalStorage
from llamahome.validation import stage as validation_stage
from support.bases import CHATML, write_base
from support.data import job_spec, row, upload_rows

STAGES = {
    Stage.validation: (validation_stage.run, validation_stage.key),
    Stage.preprocessing: (stage.run, stage.key),
}


def prepare(
    spec: JobSpec, storage: LocalStorage, scratch: Path, events: list[NewEvent] | None = None
) -> tuple[PreparationReport, Path]:
    outputs = run_job(
        spec, storage, scratch / "work", stages=STAGES,
        on_event=lambda _, event: None if events is None else events.append(event),
    )  # fmt: skip
    artifact: ArtifactRef | None = outputs[Stage.preprocessing, Step.close, 0].artifact
    assert artifact is not None
    folder = storage.fetch(artifact, scratch / "fetched")
    return PreparationReport.model_validate_json((folder / "preparation.json").read_bytes()), folder


def same_tokens(one: Path, two: Path) -> bool:
    names = ("training.safetensors", "validation.safetensors")
    return all((one / name).read_bytes() == (two / name).read_bytes() for name in names)


def test_fast_and_slow_give_the_same_bytes_and_the_report_says_which(tmp_path: Path) -> None:
    rows = [row(n, "</s>" if n == 4 else None) for n in range(40)]
    found = []
    for name in ("fast", "slow"):
        base = write_base(tmp_path / name, "chatml")
        if name == "slow":  # the same in effect, but not known to the fast core
            document = json.loads((base / "tokenizer.json").read_text())
            document["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFC"}]}
            (base / "tokenizer.json").write_text(json.dumps(document))
        storage = LocalStorage(tmp_path / f"storage-{name}")
        spec = job_spec([upload_rows(storage, rows)], base=base)
        found.append(prepare(spec, storage, tmp_path / f"s-{name}"))
    (fast, fast_folder), (slow, slow_folder) = found
    assert same_tokens(fast_folder, slow_folder)
    assert (fast.path, fast.slow_rows) == ("fast", 1)
    assert slow.path == "shapes (its normalizer is Sequence)"
    assert slow.slow_rows == 1
    assert fast.masks_agreed == slow.masks_agreed == 40


class WrongFor(FastChat):
    """A fast path that is wrong about some texts."""

    wrong = "What is 1"

    def tokenise_all(
        self, conversations: Sequence[Conversation], *, loss_scope: str
    ) -> list[FastRow | None]:
        rows = super().tokenise_all(conversations, loss_scope=loss_scope)
        for conversation, found in zip(conversations, rows, strict=True):
            first = conversation.messages[0]["content"] if conversation.messages else ""
            if found and first.startswith(self.wrong):
                found.ids[0] += 1
        return rows


def test_one_wrong_row_takes_the_fast_path_from_every_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_base(tmp_path / "base", "chatml")
    rows = [row(n + 200) for n in range(30)] + [row(1), row(2)]
    storage = LocalStorage(tmp_path / "one")
    right, right_folder = prepare(
        job_spec([upload_rows(storage, rows)], base=base), storage, tmp_path / "a"
    )
    assert right.path == "fast"
    monkeypatch.setattr("llamahome.preprocessing.base.FastChat", WrongFor)
    stage_base = write_base(tmp_path / "again", "chatml")
    events: list[NewEvent] = []
    storage = LocalStorage(tmp_path / "two")
    files = [upload_rows(storage, rows[:30], "a.jsonl"), upload_rows(storage, rows[30:], "b.jsonl")]
    found, folder = prepare(job_spec(files, base=stage_base), storage, tmp_path / "b", events)
    assert found.path.startswith("template (token 0 is ")
    assert found.slow_rows == 32
    assert any("fast path is not used" in event.message for event in events)
    ids = [read_token_rows(at / "training.safetensors").ids for at in (folder, right_folder)]
    assert np.array_equal(ids[0], ids[1])


def test_a_sampled_row_is_compared_wherever_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hit = next(n for n in range(300, 3000)
               if sampled(Conversation.from_json(json.loads(row(n))).digest()))  # fmt: skip
    monkeypatch.setattr("llamahome.preprocessing.base.FastChat", WrongFor)
    monkeypatch.setattr(WrongFor, "wrong", f"What is {hit}")
    rows = [row(n + 5000) for n in range(60)] + [row(hit)]
    base = write_base(tmp_path / "base", "chatml")
    storage = LocalStorage(tmp_path / "storage")
    found, _ = prepare(job_spec([upload_rows(storage, rows)], base=base), storage, tmp_path / "a")
    assert found.path.startswith("template (token 0 is ")


def test_rows_whose_masks_disagree_are_dropped_counted_and_kept_aside(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "chatml")
    (base / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'user' %}<s>{{ m.content }}"
        "{% if 'trap' in m.content %}{% generation %}{{ m.content }}{% endgeneration %}{% endif %}"
        "{% else %}{% generation %}{{ m.content }}</s>{% endgeneration %}{% endif %}{% endfor %}"
    )
    trap = {"messages": [{"role": "user", "content": "a trap"},
                         {"role": "assistant", "content": "fine"}]}  # fmt: skip
    storage = LocalStorage(tmp_path / "storage")
    rows = [row(1), json.dumps(trap).encode(), row(2), row(3)]
    found, folder = prepare(
        job_spec([upload_rows(storage, rows)], base=base), storage, tmp_path / "a"
    )
    assert found.dropped == {"mask_disagreement": 1}
    assert found.path == "fast"
    [line] = (folder / "dropped.jsonl").read_bytes().splitlines()
    assert (json.loads(line)["line"], json.loads(line)["code"]) == (2, "mask_disagreement")


def test_the_packing_plan_covers_the_training_rows(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "chatml")
    storage = LocalStorage(tmp_path / "storage")
    file = upload_rows(storage, [row(n, "so " * (n % 7 + 1)) for n in range(50)])
    found, folder = prepare(job_spec([file], base=base, max_length=128), storage, tmp_path / "a")
    plan = safetensors.numpy.load_file(folder / "packs.safetensors")
    lengths = read_token_rows(folder / "training.safetensors").lengths
    assert sorted(plan["pack_rows"].tolist()) == list(range(found.training.rows))
    sums = np.add.reduceat(lengths[plan["pack_rows"]], plan["pack_offsets"][:-1])
    assert sums.max() <= 128
    assert found.packing is not None
    assert found.packing.packs == len(sums)
    assert found.packing.fill == pytest.approx(lengths.sum() / (128 * len(sums)))
    none, folder = prepare(
        job_spec([file], base=base, max_length=128, packing=False), storage, tmp_path / "b"
    )
    assert none.packing is None
    assert not (folder / "packs.safetensors").exists()


def test_rows_that_were_cut_are_shown_by_place(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "chatml")
    storage = LocalStorage(tmp_path / "storage")
    file = upload_rows(storage, [row(1), row(2, "so " * 90), row(3)])
    found, _ = prepare(job_spec([file], base=base, max_length=64), storage, tmp_path / "a")
    [cut] = found.truncated_examples
    assert (cut.file, cut.line, cut.kept) == ("rows.jsonl", 2, 64)
    assert cut.tokens == 64 + found.truncated_tokens


Change = dict[str, Any]


def test_every_input_is_in_the_key_and_equal_inputs_run_once(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "storage")
    ran: list[tuple[Stage, Step]] = []

    def job(change: Change) -> list[str]:
        rows = [row(n) for n in range(6)]
        if "row" in change:
            rows[3] = change["row"]
        base = write_base(tmp_path / f"base-{len(ran)}", "chatml")
        for name in ("chat_template.jinja", "tokenizer.json", "config.json"):
            if name in change:
                old = (base / name).read_text() if (base / name).exists() else CHATML
                (base / name).write_text(change[name](old))
        config = {key: change[key] for key in ("max_length", "loss_scope") if key in change}
        spec = job_spec([upload_rows(storage, rows)], base=base, **config)
        return keys_of(spec, storage, tmp_path / f"work-{len(ran)}", ran)

    weighted = json.loads(row(3))
    weighted["messages"][1]["weight"] = 0
    changes: list[Change] = [
        {},
        {"row": row(3) + b" "},
        {"row": row(3).replace(b"It", b"Is")},
        {"row": json.dumps(weighted).encode()},
        {"chat_template.jinja": lambda old: "{# note #}" + old},
        {"tokenizer.json": lambda old: old.replace('"special":true', '"special":false', 1)},
        {"max_length": 64},
        {"loss_scope": "last"},
    ]
    keys = [job(change)[-1] for change in changes]
    assert len(set(keys)) == len(changes)
    before = len(ran)
    assert job({})[-1] == keys[0]
    assert len(ran) == before


def keys_of(
    spec: JobSpec, storage: LocalStorage, scratch: Path, ran: list[tuple[Stage, Step]]
) -> list[str]:
    """Run the job as the fleet does: a run whose key was seen is not run again."""
    keys: list[str] = []

    def once(name: Stage) -> tuple[Any, Any]:
        run, key = STAGES[name]

        def look(task: StageTask, ports: Any) -> Any:
            found = key(task)
            assert found is not None
            keys.append(found)
            if found not in DONE:
                ran.append((task.stage, task.step))
                DONE[found] = run(task, ports)
            return DONE[found]

        return look, key

    run_job(spec, storage, scratch, stages={name: once(name) for name in STAGES})
    return keys


DONE: dict[str, StageResult] = {}
