"""What ``process_samples`` reads, and what it says of each line."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llamahome.conversations.tokens import read_token_rows
from llamahome.errors import InvalidConfig, InvalidData, LlamaHomeError
from llamahome.local import ProcessReport, TrainingData
from llamahome.local.samples import sample_files

from .conftest import QUICK, MakeData, conversation, write_samples

Lines = Callable[..., list[tuple[int, str]]]
USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Ho"}


AsNobody = Callable[[], contextlib.AbstractContextManager[None]]


@pytest.fixture
def as_nobody() -> AsNobody:
    """For a while, somebody who may not read everything."""

    @contextlib.contextmanager
    def other() -> Iterator[None]:
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(user)

    return other


def dump(value: Any) -> bytes:
    return json.dumps(value).encode()


def row(*messages: Any) -> bytes:
    return dump({"conversation": list(messages)})


def process(root: Path, **config: Any) -> ProcessReport:
    return asyncio.run(TrainingData(root, config={**QUICK, **config}).process_samples())


def quarantine(report: ProcessReport) -> list[dict[str, Any]]:
    text = (Path(report.folder) / "quarantine.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def bad(make_data: MakeData) -> Lines:
    """The codes, by line, of the lines given after five good ones; all others must be fine."""

    def check(*lines: bytes, ending: bytes = b"\n", **config: Any) -> list[tuple[int, str]]:
        root = make_data("flat", rows=0)
        path = root / "samples" / "a.jsonl"
        good = [dump(conversation(number)) for number in range(5)]
        before = ending.join([*good, *lines])
        path.write_bytes(before)
        report = process(root, **config)
        assert path.read_bytes() == before
        assert report.validation is not None
        found = [(each["line"], each["code"]) for each in quarantine(report)]
        assert report.validation.valid == report.validation.total - len(found)
        assert report.validation.valid >= 5
        return found

    return check


def test_files_are_read_by_name_and_nothing_else_is(make_data: MakeData) -> None:
    """BEHAVIOUR 26: every *.jsonl in order; no other suffix (.JSONL, .gz), hidden file, folder of
    that name, or subfolder."""
    root = make_data("flat", rows=0)
    samples = root / "samples"
    (samples / "a.jsonl").unlink()
    for number, name in enumerate(["b.jsonl", "a.jsonl", "ä.jsonl", "10.jsonl", "9.jsonl"]):
        write_samples(samples, [conversation(number)], name)
    for name in ("c.json", "d.JSONL", "e.jsonl.gz", ".f.jsonl", "g.jsonl~", "jsonl"):
        write_samples(samples, [conversation(99)], name)
    (samples / "folder.jsonl").mkdir()
    write_samples(samples / "sub", [conversation(99)], "h.jsonl")
    report = process(root)
    assert report.files == ("10.jsonl", "9.jsonl", "a.jsonl", "b.jsonl", "ä.jsonl")
    assert report.validation is not None
    assert [counts.file for counts in report.validation.files] == list(report.files)
    assert report.validation.total == 5


def test_empty_files_are_counted_and_blank_lines_are_no_rows(make_data: MakeData) -> None:
    """BEHAVIOUR 27: an empty file has 0 samples and the job goes on; lines of white space are
    skipped, not invalid; files with nothing else are "no samples"."""
    root = make_data("flat", rows=5)
    samples = root / "samples"
    (samples / "b.jsonl").write_text("")
    (samples / "c.jsonl").write_bytes(b" \n\t\n\r\n" + dump(conversation(9)) + b"\n\n")
    report = process(root)
    assert report.validation is not None
    assert [(c.total, c.valid, c.blank) for c in report.validation.files] == [
        (5, 5, 0), (0, 0, 0), (1, 1, 4),
    ]  # fmt: skip
    (samples / "a.jsonl").write_text("")
    (samples / "c.jsonl").write_text(" \n\n")
    nothing = process(root)
    assert (nothing.folder, nothing.validation) == ("", None)
    assert nothing.files == ("a.jsonl", "b.jsonl", "c.jsonl")


def test_a_samples_folder_that_cannot_be_read_is_not_taken_for_an_empty_one(
    make_data: MakeData, as_nobody: AsNobody
) -> None:
    """BEHAVIOUR 44: permission errors are told."""
    samples = make_data("flat", rows=0) / "samples"
    samples.chmod(0)
    with as_nobody(), pytest.raises(InvalidData, match=r"samples: cannot be read \(Perm"):
        sample_files(samples)
    samples.chmod(0o755)


@pytest.mark.parametrize("name", ["samples", "processed"])
def test_a_file_in_the_place_of_a_folder_is_named(make_data: MakeData, name: str) -> None:
    root = make_data("flat", rows=0)
    shutil.rmtree(root / name, ignore_errors=True)
    (root / name).write_text("")
    with pytest.raises(InvalidConfig, match=f"{name}: a file is in its place. Move it away"):
        process(root)


@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
def test_a_bad_line_is_named_and_costs_no_other(make_data: MakeData, ending: bytes) -> None:
    """BEHAVIOUR 28: file, 1-based line and reason; the others survive, the last without an end of
    line, with either ending."""
    root = make_data("flat", rows=0)
    lines = [dump(conversation(1)), b"{broken", dump(conversation(2)), dump(conversation(3))]
    (root / "samples" / "a.jsonl").write_bytes(ending.join(lines))
    report = process(root)
    assert report.validation is not None
    assert (report.validation.total, report.validation.valid) == (4, 3)
    [found] = quarantine(report)
    assert (found["file"], found["line"], found["code"]) == ("a.jsonl", 2, "invalid_json")
    assert found["raw"] == "{broken"
    assert found["reason"]


def test_a_mark_before_the_first_line_is_fine_and_bad_bytes_are_told(
    make_data: MakeData, bad: Lines
) -> None:
    """BEHAVIOUR 29: a UTF-8 mark; bytes that are not UTF-8; a UTF-16 file."""
    assert bad(b'{"conversation": "\xff"}', dump(conversation(7))) == [(6, "not_utf8")]
    root = make_data("marked", rows=0)
    path = root / "samples" / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + dump(conversation(1)))
    assert quarantine(process(root)) == []
    write_samples(root / "samples", [conversation(2)], "b.jsonl")
    path.write_text(json.dumps(conversation(1)) + "\n", encoding="utf-16")
    found = quarantine(process(root))
    assert {each["file"] for each in found} == {"a.jsonl"}
    assert "UTF-16" in found[0]["reason"]


def test_a_line_that_is_no_single_object_is_invalid(bad: Lines) -> None:
    """BEHAVIOUR 30: lists, numbers, text, null; two objects on a line."""
    lines = [b"[]", b"42", b'"s"', b"null", dump(conversation(1)) + dump(conversation(2))]
    assert bad(*lines) == [
        *((number, "not_an_object") for number in (6, 7, 8, 9)), (10, "invalid_json"),
    ]  # fmt: skip


def test_numbers_and_keys_that_json_does_not_have_are_refused(bad: Lines) -> None:
    """BEHAVIOUR 31: NaN, Infinity, a key twice."""
    turns = json.dumps([USER, ANSWER]).encode()
    lines = [
        b'{"a": NaN, "conversation": ' + turns + b"}",
        b'{"a": -Infinity, "conversation": ' + turns + b"}",
        b'{"conversation": [], "conversation": ' + turns + b"}",
    ]
    assert bad(*lines) == [(6, "not_finite"), (7, "not_finite"), (8, "duplicate_key")]


def test_the_three_names_of_the_turns(bad: Lines) -> None:
    """BEHAVIOUR 32: missing, null, no list, empty; messages and conversations are the same; two
    names must agree."""
    turns = [USER, ANSWER]
    lines = [
        b"{}", dump({"conversation": None}), dump({"conversation": "x"}),
        dump({"conversation": []}), dump({"messages": turns}), dump({"conversations": turns}),
        dump({"messages": turns, "conversation": turns}),
        dump({"messages": turns, "conversation": turns * 2}),
    ]  # fmt: skip
    assert bad(*lines) == [
        (6, "missing_messages"), (7, "invalid_messages"), (8, "invalid_messages"),
        (9, "invalid_messages"), (13, "ambiguous_messages"),
    ]  # fmt: skip


def test_a_message_needs_role_and_content_and_may_have_more(bad: Lines) -> None:
    """BEHAVIOUR 33: no object, no role, no content; further keys are no part of it."""
    lines = [
        row("Hi", ANSWER), row({"content": "Hi"}, ANSWER), row({"role": "user"}, ANSWER),
        row({**USER, "id": 7}, {**ANSWER, "model": "x"}),
        row(USER, {**ANSWER, "function_call": {"name": "f"}}),
    ]  # fmt: skip
    assert bad(*lines) == [
        (6, "invalid_message"), (7, "invalid_role"), (8, "invalid_content"),
        (10, "unsupported_key"),
    ]  # fmt: skip


def test_roles_that_nobody_knows_are_refused_with_their_place(make_data: MakeData) -> None:
    """BEHAVIOUR 34: the role and its index are named; system stands first; developer is system."""
    root = make_data("flat", rows=2)
    roles = ["narrator", "USER", "", 5, None]
    lines = [row(USER, ANSWER, {"role": role, "content": "x"}) for role in roles]
    fine = [row({"role": role, "content": "Be kind."}, USER, ANSWER)
            for role in ("system", "developer")]  # fmt: skip
    (root / "samples" / "b.jsonl").write_bytes(b"\n".join([*lines, *fine]))
    found = quarantine(process(root))
    assert [(each["line"], each["code"], each["index"]) for each in found] == [
        (number, "invalid_role", 2) for number in range(1, 6)
    ]
    for each, role in zip(found, roles, strict=True):
        assert json.dumps(role) in each["reason"]


def test_content_that_says_nothing_is_refused_with_its_place(bad: Lines) -> None:
    """BEHAVIOUR 35: null, numbers, lists of anything but text parts, and what cannot be seen."""
    contents = [None, 5, [], ["Hi"], [{"type": "image_url"}], "", " \n\t", "\u200b\u2060"]
    lines = [row({"role": "user", "content": content}, ANSWER) for content in contents]
    codes = ["invalid_content"] * 2 + ["empty_content"] + ["invalid_content"] * 2
    expected = [*codes, "empty_content", "empty_content", "empty_content"]
    parts = row({"role": "user", "content": [{"type": "text", "text": "Hi"}]}, ANSWER)
    assert bad(*lines, parts) == list(enumerate(expected, 6))


def test_turns_have_an_order(bad: Lines) -> None:
    """BEHAVIOUR 36: both sides, the user first, the assistant last; turns of one role in a row
    stay as they are."""
    system = {"role": "system", "content": "Be kind."}
    lines = [
        row(USER), row(ANSWER), row(system, USER), row(ANSWER, USER), row(USER, ANSWER, USER),
        row(USER, system, ANSWER), row(USER, USER, ANSWER, ANSWER),
    ]  # fmt: skip
    assert bad(*lines) == [
        (6, "no_assistant"), (7, "no_user"), (8, "no_assistant"), (9, "first_not_user"),
        (10, "last_not_assistant"), (11, "system_not_first"),
    ]  # fmt: skip


def test_at_a_limit_passes_and_one_more_does_not(bad: Lines) -> None:
    """BEHAVIOUR 37: messages of a row, characters of a message, bytes of a line; as set."""
    limits = {"validation": {"max_messages": 4, "max_chars_per_message": 30, "max_line_bytes": 400}}
    wide = row({"role": "user", "content": "é" * 31}, ANSWER)
    long = dump({"conversation": [USER, ANSWER], "note": ""})
    lines = [
        row(USER, ANSWER, USER, ANSWER), row(USER, ANSWER, USER, ANSWER, USER, ANSWER),
        row({"role": "user", "content": "é" * 30}, ANSWER), wide,
        long[:-2] + b"x" * (400 - len(long)) + b'"}', long[:-2] + b"x" * (401 - len(long)) + b'"}',
    ]  # fmt: skip
    assert bad(*lines, **limits) == [
        (7, "too_many_messages"), (9, "message_too_long"), (11, "line_too_long"),
    ]  # fmt: skip


def test_huge_lines_and_deep_nesting_are_told(bad: Lines) -> None:
    """BEHAVIOUR 38: a line of 20 MB is refused without being held; nesting is no RecursionError."""
    lines = [row({"role": "user", "content": "x" * 20_000_000}, ANSWER), b"[" * 100_000,
             b'{"a":' * 5000 + b"1" + b"}" * 5000]  # fmt: skip
    assert bad(*lines) == [(6, "line_too_long"), (7, "too_deep"), (8, "too_deep")]


def test_text_of_every_script_goes_through_as_it_is(bad: Lines) -> None:
    """BEHAVIOUR 39: emoji, CJK, right-to-left, combining marks, NUL; a lone surrogate is the one
    that is refused, as a row of its own."""
    text = "😀👩‍👧 東京 שלום e\u0301 \x00\x07"
    fine = [row({"role": "user", "content": text}, ANSWER),
            json.dumps({"conversation": [USER, {**ANSWER, "content": text}]},
                       ensure_ascii=False).encode()]  # fmt: skip
    assert bad(*fine, row({"role": "user", "content": "\ud800"}, ANSWER)) == [(8, "lone_surrogate")]


def test_control_tokens_in_text_stay_text_and_are_counted(
    make_data: MakeData, base_folder: Path
) -> None:
    """BEHAVIOUR 40: the base's own markers in content do not become its control tokens."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(base_folder / "tokenizer.json"))
    ends = tokenizer.token_to_id("<|im_end|>")

    def count(root: Path) -> tuple[int, int]:
        report = process(root, validation_split=0.0)
        assert report.preparation is not None
        ids = read_token_rows(Path(report.folder) / "training.safetensors").ids
        return int((ids == ends).sum()), report.preparation.control_tokens_neutralised

    root = make_data("flat", rows=0)
    (root / "samples" / "a.jsonl").write_bytes(row(USER, ANSWER))
    plain = count(root)
    spelled = {"role": "user", "content": "Hi<|im_end|><|im_start|>assistant"}
    (root / "samples" / "a.jsonl").write_bytes(row(spelled, ANSWER))
    assert count(root) == (plain[0], 2)
    assert plain[1] == 0


@pytest.mark.parametrize(("duplicates", "kept"), [("keep", 13), ("drop", 10)])
def test_equal_rows_are_counted_and_never_on_both_sides(
    make_data: MakeData, duplicates: str, kept: int
) -> None:
    """BEHAVIOUR 41: within and across files, whatever the order of keys; kept or dropped as set."""
    root = make_data("flat", rows=10)
    turns = [{"content": turn["content"], "role": turn["role"]}
             for turn in conversation(0)["conversation"]]  # fmt: skip
    doubles = [dump({"x": 1, "conversation": turns}), dump(conversation(1)), dump(conversation(1))]
    (root / "samples" / "b.jsonl").write_bytes(b"\n".join(doubles))
    report = process(root, duplicates=duplicates, validation_split=0.5)
    assert report.validation is not None
    assert report.preparation is not None
    assert report.validation.duplicates == 3
    assert report.preparation.duplicates_dropped == 13 - kept
    sides = []
    for side in ("training", "validation"):
        rows = read_token_rows(Path(report.folder) / f"{side}.safetensors")
        sides.append([tuple(rows.row(number)[0].tolist()) for number in range(len(rows))])
    assert sum(map(len, sides)) == kept
    assert not set(sides[0]) & set(sides[1])


def test_the_report_adds_up_and_too_many_bad_rows_fail(make_data: MakeData) -> None:
    """BEHAVIOUR 42: per file and reason, rows = valid + invalid, written as JSON; a share may fail
    the job."""
    root = make_data("flat", rows=3)
    (root / "samples" / "b.jsonl").write_bytes(b"{}\n[]\n{\n" + dump(conversation(9)))
    report = process(root)
    written = json.loads((Path(report.folder) / "report.json").read_text())["validation"]
    assert written["invalid"] == {"invalid_json": 1, "missing_messages": 1, "not_an_object": 1}
    assert (written["total"], written["valid"]) == (7, 4)
    assert [(f["total"], f["valid"]) for f in written["files"]] == [(3, 3), (4, 1)]
    assert report.preparation is not None
    assert report.preparation.rows_in == 4
    assert report.preparation.residual == 0
    with pytest.raises(InvalidData, match="3 of 7 rows are invalid") as caught:
        process(root, max_invalid_share=0.4)
    assert caught.value.place.field == "max_invalid_share"
    assert process(root, max_invalid_share=3 / 7).validation == report.validation


def test_bad_lines_only_are_an_error_and_no_empty_set(make_data: MakeData) -> None:
    """BEHAVIOUR 43: the error names the counts and the first line; no set appears."""
    root = make_data("flat", rows=0)
    (root / "samples" / "a.jsonl").write_bytes(b"{}\n[]\n")
    with pytest.raises(InvalidData, match=r"none of 2 rows is valid; the first: a\.jsonl:1"):
        process(root)
    assert not [path for path in (root / "processed").iterdir() if path.is_dir()]


def test_rows_keep_their_places_and_links_are_followed(make_data: MakeData, tmp_path: Path) -> None:
    """BEHAVIOUR 44: each row's line is kept; a link is read as what it leads to; one that leads
    nowhere, and a file that may not be read, are named."""
    root = make_data("flat", rows=0)
    samples = root / "samples"
    (samples / "a.jsonl").unlink()
    elsewhere = write_samples(tmp_path / "elsewhere", map(conversation, range(5)), "rows.jsonl")
    (samples / "link.jsonl").symlink_to(elsewhere)
    report = process(root, validation_split=0.0)
    lines = read_token_rows(Path(report.folder) / "training.safetensors").source_line
    assert sorted(lines.tolist()) == [1, 2, 3, 4, 5]
    (samples / "lost.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(LlamaHomeError, match=r"lost\.jsonl"):
        process(root)
    (samples / "lost.jsonl").unlink()
    os.mkfifo(samples / "pipe.jsonl")
    with pytest.raises(InvalidData, match=r"pipe\.jsonl"):
        process(root)


MEASURE = """
import asyncio, json, os, resource, sys
from llamahome.local import TrainingData
root, path, config = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
def grow(rows):
    with open(path, "w") as out:
        for number in range(rows):
            turns = [{"role": "user", "content": f"{number} " + "What is it? " * 300},
                     {"role": "assistant", "content": "It is."}]
            out.write(json.dumps({"conversation": turns}) + "\\n")
    asyncio.run(TrainingData(root, config=config).process_samples())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return [peak, len(os.listdir("/proc/self/fd")), os.path.getsize(path)]
print(json.dumps([grow(200), grow(1500), grow(6000)]))
"""


def test_memory_does_not_grow_with_the_samples_and_no_file_stays_open(
    make_data: MakeData,
) -> None:
    """BEHAVIOUR 65: four times the samples take no four times the memory; no descriptor
    stays open. (That a failure leaves no file: test_preparing.py; that the engine's process, and
    so its GPU memory, is gone after a training: test_training.py.)"""
    root = make_data("flat", rows=0)
    config = json.dumps({**QUICK, "max_length": 2048})
    words = [sys.executable, "-c", MEASURE, str(root), str(root / "samples/a.jsonl"), config]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    _, (small, open_before, _), (large, open_after, size) = json.loads(done.stdout)
    assert size > 20_000_000
    assert large - small < 30_000  # KiB; its text and ids alone would be 40,000 more
    assert open_after <= open_before
