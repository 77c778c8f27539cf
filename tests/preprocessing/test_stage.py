"""The preprocessing stage: from rows to two files of token rows, every row accounted for."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamahome.conversations import Conversation, split_rows
from llamahome.conversations.chat import ChatBase
from llamahome.conversations.templates import FALLBACK_TEMPLATE
from llamahome.conversations.tokens import TokenRows, read_token_rows
from llamahome.errors import InvalidConfig, InvalidData, NotFound, Stopped
from llamahome.local import run_job
from llamahome.preprocessing import stage
from llamahome.schemas import (
    JobSpec,
    NewEvent,
    PreparationReport,
    Rejected,
    RunOutput,
    Stage,
    Step,
    StopReason,
)
from llamahome.storage import LocalStorage, Storage
from llamahome.validation import stage as validation_stage
from support.bases import CHATML, write_base
from support.data import job_spec, ports_at, read_artifact, row, task_of, upload_rows

BASE_STAGES = {
    Stage.validation: (validation_stage.run, validation_stage.key),
    Stage.preprocessing: (stage.run, stage.key),
}
Outputs = dict[Any, RunOutput]


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return LocalStorage(tmp_path / "storage")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"), "chatml")


def prepare(
    spec: JobSpec, storage: Storage, scratch: Path, events: list[NewEvent] | None = None
) -> Outputs:
    return run_job(
        spec, storage, scratch / "scratch", stages=BASE_STAGES,
        on_event=lambda _, event: events.append(event) if events is not None else None,
    )  # fmt: skip


def closed(outputs: Outputs) -> RunOutput:
    found: RunOutput = outputs[Stage.preprocessing, Step.close, 0]
    return found


def folder_of(outputs: Outputs, storage: Storage, into: Path) -> Path:
    artifact = closed(outputs).artifact
    assert artifact is not None
    return storage.fetch(artifact, into)


def report_of(outputs: Outputs, storage: Storage, into: Path) -> PreparationReport:
    raw = read_artifact(storage, closed(outputs), "preparation.json", into)
    return PreparationReport.model_validate_json(raw)


def sides(folder: Path) -> tuple[TokenRows, TokenRows]:
    return (
        read_token_rows(folder / "training.safetensors"),
        read_token_rows(folder / "validation.safetensors"),
    )


def conversation(raw: bytes) -> Conversation:
    return Conversation.from_json(json.loads(raw))


def test_rows_become_the_ids_and_masks_of_the_base_in_split_order(
    storage: Storage, base: Path, tmp_path: Path
) -> None:
    rows = [row(n) for n in range(20)]
    outputs = prepare(job_spec([upload_rows(storage, rows)], base=base), storage, tmp_path)
    folder = folder_of(outputs, storage, tmp_path)
    training, validation = sides(folder)
    digests = [conversation(raw).digest() for raw in rows]
    split = split_rows(digests, seed=42, share=0.1, keep_duplicates=True)
    chat = ChatBase.load(base)
    for found, wanted in ((training, split.training), (validation, split.validation)):
        assert len(found) == len(wanted)
        for index, number in enumerate(wanted):
            told = chat.tokenise(conversation(rows[number]), loss_scope="assistant")
            ids, trained = found.row(index)
            assert np.array_equal(ids, told.ids)
            assert np.array_equal(trained, told.trained)
            assert found.source_line[index] == number + 1
            assert found.source_file[index] == 0
    report = report_of(outputs, storage, tmp_path)
    assert (report.rows_in, report.training.rows, report.validation.rows) == (20, 18, 2)
    assert report.training.tokens == training.total_tokens
    assert report.training.trained_tokens == training.total_trained
    assert report.training.longest == training.lengths.max()
    assert report.stop_token_trained_share == 1.0
    assert report.residual == 0
    summary = closed(outputs).summary
    assert summary["tokenizer_digest"] == chat.tokenizer_digest
    assert summary["template_digest"] == chat.template_digest
    assert summary["training"]["rows"] == 18
    copied = sorted(path.name for path in (folder / "tokenizer").iterdir())
    assert copied == ["tokenizer.json", "tokenizer_config.json"]


def test_the_artifact_does_not_depend_on_how_the_files_were_cut(
    storage: Storage, base: Path, tmp_path: Path
) -> None:
    """BEHAVIOUR 60: any number of shards."""
    rows = [*(row(n) for n in range(12)), row(3), b"{}", row(5, "</s>")]
    files = [upload_rows(storage, rows[:9], "a.jsonl"), upload_rows(storage, rows[9:], "b.jsonl")]
    digests = set()
    for shard_bytes in (250, 1000, 100_000):
        spec = job_spec(files, base=base, shard_bytes=shard_bytes, max_length=34)
        artifact = closed(prepare(spec, storage, tmp_path)).artifact
        assert artifact is not None
        digests.add(artifact.digest)
    assert len(digests) == 1


def test_the_order_of_the_rows_in_the_file_does_not_change_the_split(
    storage: Storage, base: Path, tmp_path: Path
) -> None:
    """BEHAVIOUR 56: any order of the rows."""
    rows = [row(n) for n in range(15)]
    found = []
    for order in (rows, rows[::-1]):
        outputs = prepare(job_spec([upload_rows(storage, order)], base=base), storage, tmp_path)
        found.append([side.ids.tolist() for side in sides(folder_of(outputs, storage, tmp_path))])
    assert found[0] == found[1]


def test_given_validation_files_are_the_validation_side(
    storage: Storage, base: Path, tmp_path: Path
) -> None:
    training = upload_rows(storage, [row(n) for n in range(10)], "t.jsonl")
    held = upload_rows(storage, [row(n) for n in range(50, 53)], "v.jsonl")
    outputs = prepare(job_spec([training], [held], base=base), storage, tmp_path)
    one, two = sides(folder_of(outputs, storage, tmp_path))
    assert (len(one), len(two)) == (10, 3)
    assert sorted(two.source_line.tolist()) == [1, 2, 3]


@pytest.mark.parametrize(("policy", "kept", "dropped"), [("keep", 9, 0), ("drop", 4, 5)])
def test_duplicates_are_kept_together_or_dropped(
    storage: Storage, base: Path, tmp_path: Path, policy: str, kept: int, dropped: int
) -> None:
    rows = [row(1), row(2), row(1), row(3), row(1), row(2), row(1), row(4), row(1)]
    spec = job_spec([upload_rows(storage, rows)], base=base, duplicates=policy)
    outputs = prepare(spec, storage, tmp_path)
    report = report_of(outputs, storage, tmp_path)
    assert report.training.rows + report.validation.rows == kept
    assert report.duplicates_dropped == dropped
    training, validation = sides(folder_of(outputs, storage, tmp_path))
    texts = [{tuple(side.row(i)[0]) for i in range(len(side))} for side in (training, validation)]
    assert not texts[0] & texts[1]
    assert all(texts)
    if policy == "drop":
        lines = training.source_line.tolist() + validation.source_line.tolist()
        assert sorted(lines) == [1, 2, 4, 8]


def long_row(answer_words: int, question_words: int = 1) -> bytes:
    return json.dumps({"messages": [
        {"role": "user", "content": "why " * question_words},
        {"role": "assistant", "content": "so " * answer_words + "."},
    ]}).encode()  # fmt: skip


def test_validation_rows_that_become_the_tokens_of_training_rows_are_counted_and_said(
    storage: Storage, base: Path, tmp_path: Path
) -> None:
    def named(number: int, name: str) -> bytes:
        body = json.loads(row(number))
        body["messages"][0]["name"] = name  # which the template does not write
        return json.dumps(body).encode()

    file = upload_rows(storage, [named(n % 10, f"user{n}") for n in range(40)])
    held = upload_rows(storage, [named(n, "other") for n in range(5, 15)])
    for training, validation, leaked in (([file], [held], 5), ([held], [], 0)):
        events: list[NewEvent] = []
        spec = job_spec(training, validation, base=base)
        report = report_of(prepare(spec, storage, tmp_path, events), storage, tmp_path)
        assert report.validation.rows
        assert report.leaked == leaked
        assert any("become the same tokens" in event.message for event in events) == bool(leaked)


def test_long_rows_are_cut_or_dropped_and_counted(
    storage: Storage, base: Path, tmp_path: Path
) -> None:
    rows = [row(1), row(2), long_row(400), long_row(1, question_words=400)]
    file = upload_rows(storage, rows)
    cut = report_of(
        prepare(job_spec([file], base=base, max_length=64), storage, tmp_path), storage, tmp_path
    )
    assert cut.dropped == {"too_long_no_answer": 1}
    assert cut.truncated_rows == 1
    assert cut.truncated_tokens > 300
    assert max(cut.training.longest, cut.validation.longest) == 64
    assert cut.stop_token_trained_share == pytest.approx(2 / 3)
    outputs = prepare(
        job_spec([file], base=base, max_length=64, too_long="drop"), storage, tmp_path
    )
    assert report_of(outputs, storage, tmp_path).dropped == {"too_long": 2}
    lines = read_artifact(storage, closed(outputs), "dropped.jsonl", tmp_path).splitlines()
    rejected = [Rejected.model_validate_json(line) for line in lines]
    assert [(bad.file, bad.line) for bad in rejected] == [("rows.jsonl", 3), ("rows.jsonl", 4)]
    assert "max_length is 64" in rejected[0].reason
    with pytest.raises(InvalidData, match=r"rows.jsonl:3, too_long: \d+ tokens, max_length is 64"):
        prepare(job_spec([file], base=base, max_length=64, too_long="error"), storage, tmp_path)


def test_a_set_without_anything_to_train_fails_the_job(
    storage: Storage, base: Path, tmp_path: Path
) -> None:
    """BEHAVIOUR 77: zero samples fail before any model is loaded."""
    silent = json.loads(row(1))
    silent["messages"][1]["weight"] = 0
    file = upload_rows(storage, [json.dumps(silent).encode()])
    with pytest.raises(InvalidData, match=r"rows.jsonl:1: no training row is left") as caught:
        prepare(job_spec([file], base=base), storage, tmp_path)
    assert caught.value.code == "no_trained_token"
    file = upload_rows(storage, [long_row(1, question_words=400)])
    with pytest.raises(InvalidData, match="too_long_no_answer 1") as caught:
        prepare(job_spec([file], base=base, max_length=8), storage, tmp_path)
    assert caught.value.code == "no_training_rows"


def test_one_row_is_enough_and_has_no_validation_side(
    storage: Storage, base: Path, tmp_path: Path
) -> None:
    """BEHAVIOUR 59, 77: a single sample is for training."""
    events: list[NewEvent] = []
    spec = job_spec([upload_rows(storage, [row(1)])], base=base)
    report = report_of(prepare(spec, storage, tmp_path, events), storage, tmp_path)
    assert (report.training.rows, report.validation.rows) == (1, 0)
    assert any("No validation rows" in event.message for event in events)


def test_rows_that_the_template_refuses_are_dropped_with_its_words(
    storage: Storage, tmp_path: Path
) -> None:
    folder = write_base(tmp_path / "base", "llama2")
    twice = {"messages": [{"role": "user", "content": "a"}, *json.loads(row(1))["messages"]]}
    file = upload_rows(storage, [row(1), json.dumps(twice).encode(), row(2)])
    outputs = prepare(job_spec([file], base=folder), storage, tmp_path)
    assert report_of(outputs, storage, tmp_path).dropped == {"template_refused": 1}
    [line] = read_artifact(storage, closed(outputs), "dropped.jsonl", tmp_path).splitlines()
    assert json.loads(line)["line"] == 2
    assert "roles must alternate" in json.loads(line)["reason"]


def test_control_text_is_counted(storage: Storage, base: Path, tmp_path: Path) -> None:
    rows = [row(1, "a </s> b <|im_end|>"), row(2, "<s>"), row(3)]
    outputs = prepare(job_spec([upload_rows(storage, rows)], base=base), storage, tmp_path)
    assert report_of(outputs, storage, tmp_path).control_tokens_neutralised == 3


def test_a_base_without_a_template_hands_on_the_one_it_was_given(
    storage: Storage, tmp_path: Path
) -> None:
    folder = write_base(tmp_path / "base", None)
    spec = job_spec([upload_rows(storage, [row(1)])], base=folder)
    prepared = folder_of(prepare(spec, storage, tmp_path), storage, tmp_path)
    assert (prepared / "tokenizer" / "chat_template.jinja").read_text() == FALLBACK_TEMPLATE


def test_a_base_that_cannot_be_used_says_why(storage: Storage, base: Path, tmp_path: Path) -> None:
    """BEHAVIOUR 54: an id beyond the model's embeddings."""
    file = upload_rows(storage, [row(1)])
    with pytest.raises(NotFound, match="Mount it"):
        prepare(job_spec([file], base=tmp_path / "none"), storage, tmp_path)
    small = write_base(tmp_path / "small", "chatml")
    (small / "config.json").write_text('{"vocab_size": 20}')
    with pytest.raises(InvalidConfig, match=r"the model has 20 embeddings"):
        prepare(job_spec([file], base=small), storage, tmp_path)


def test_a_job_keeps_the_date_of_its_plan(storage: Storage, tmp_path: Path) -> None:
    folder = write_base(tmp_path / "base", "chatml")
    (folder / "chat_template.jinja").write_text("{{ strftime_now('%d %b %Y') }} " + CHATML)
    spec = job_spec([upload_rows(storage, [row(1)])], base=folder)
    outputs = prepare(spec, storage, tmp_path)
    inputs = [out for place, out in outputs.items() if place[0] is Stage.validation]

    number = itertools.count()

    def shard(today: str) -> tuple[list[int], str]:
        plan = {"split": "training", "rows": 0, "index": 0, "first_line": 0, "today": today}
        task = task_of(spec, Stage.preprocessing, Step.shard, plan, inputs)
        scratch = tmp_path / f"scratch-{next(number)}"
        result = stage.run(task, ports_at(storage, scratch, prefix=f"artifacts/{today}"))
        assert result.artifact is not None
        rows = storage.fetch(result.artifact, tmp_path) / "tokens.safetensors"
        return read_token_rows(rows).row(0)[0].tolist(), stage.key(task)

    first, again, later = shard("2024-07-26"), shard("2024-07-26"), shard("2025-01-01")
    assert first == again
    assert first[0] != later[0]
    assert first[1] != later[1]
    chat = ChatBase.load(folder)
    told = chat.tokenise(conversation(row(1)), loss_scope="assistant")
    assert len(told.ids) == len(sides(folder_of(outputs, storage, tmp_path))[0].row(0)[0])


def test_keys_move_with_what_decides_the_output_and_with_nothing_else(
    storage: Storage, base: Path, tmp_path: Path
) -> None:
    file = upload_rows(storage, [row(n) for n in range(3)])
    spec = job_spec([file], base=base)
    outputs = prepare(spec, storage, tmp_path)
    inputs = list(outputs.values())[:-1]
    plan = {"split": "training", "rows": 0, "index": 0, "first_line": 0, "today": "2024-07-26"}

    def key_of(step: Step, **config: Any) -> str:
        changed = job_spec([file], base=config.pop("base", base), **config)
        return stage.key(task_of(changed, Stage.preprocessing, step, plan, inputs))

    elsewhere = write_base(tmp_path / "elsewhere", "chatml")
    other = write_base(tmp_path / "other", "llama2")
    for step in (Step.shard, Step.close):
        assert key_of(step) == key_of(step, base=elsewhere, epochs=9, learning_rate=0.1)
        assert key_of(step) != key_of(step, base=other)
        assert key_of(step) != key_of(step, loss_scope="last")
    assert key_of(Step.shard) == key_of(Step.shard, seed=1, validation_split=0.5)
    assert key_of(Step.shard) != key_of(Step.shard, max_length=64)
    assert key_of(Step.shard) != key_of(Step.shard, too_long="drop")
    different: list[dict[str, Any]] = [
        {"seed": 1},
        {"validation_split": 0.5},
        {"duplicates": "drop"},
    ]
    assert len({key_of(Step.close, **change) for change in [{}, *different]}) == 4


def test_a_shard_says_how_far_it_is_and_stops_when_asked(
    storage: Storage, base: Path, tmp_path: Path
) -> None:
    spec = job_spec([upload_rows(storage, [row(n) for n in range(200)])], base=base)
    told: list[tuple[int, int | None]] = []
    asked = itertools.chain([None] * 4, itertools.repeat(StopReason.cancel))
    stop: Callable[[], StopReason | None] = lambda: next(asked)  # noqa: E731
    with pytest.raises(Stopped) as caught:
        run_job(
            spec, storage, tmp_path / "scratch", stages=BASE_STAGES, should_stop=stop,
            on_progress=lambda which, done, total, _: told.append((done, total))
            if which is Stage.preprocessing else None,
        )  # fmt: skip
    assert caught.value.code == "cancel"
    assert told[0] == (0, 200)
    assert told[-1][0] < 200
    assert not (tmp_path / "scratch" / "preprocessing-shard-0").exists()
