"""Local files checked without a fleet, and the page about them."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from llamahome.conversations import Limits, read_conversations
from llamahome.errors import InvalidConfig, InvalidData, NotFound
from llamahome.schemas import FileCounts, Rejected, ValidationReport
from llamahome.validation import report_page, validate_files
from support.data import row

BAD = b'{"messages": [{"role": "narrator", "content": "x"}]}'


def write(path: Path, *rows: bytes) -> Path:
    path.write_bytes(b"".join(one + b"\n" for one in rows))
    return path


def test_every_row_of_every_file_is_in_the_report(tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", row(1), b"", row(2), BAD, row(1))
    two = tmp_path / "two.json.gz"
    alpaca = [{"instruction": "What is 2 and 2?", "output": "It is 4."}, {"instruction": "x"}]
    two.write_bytes(gzip.compress(json.dumps(alpaca).encode()))
    held = write(tmp_path / "held.jsonl", row(2), row(3))
    rejected: list[tuple[Rejected, str]] = []
    told: list[tuple[str, int, int]] = []
    report = validate_files(
        [one, two], validation_files=[held],
        on_rejected=lambda found, raw: rejected.append((found, raw)),
        on_progress=lambda path, done, total: told.append((path.name, done, total)),
    )  # fmt: skip
    assert report.files == (
        FileCounts(file="one.jsonl", total=4, valid=3, blank=1, invalid={"invalid_role": 1},
                   format="messages", container="jsonl"),
        FileCounts(file="two.json.gz", total=2, valid=1, invalid={"missing_column": 1},
                   format="alpaca", container="json.gz"),
        FileCounts(file="held.jsonl", total=2, valid=2, format="messages", container="jsonl"),
    )  # fmt: skip
    assert (report.total, report.valid) == (8, 6)
    assert report.invalid == {"invalid_role": 1, "missing_column": 1}
    # Row 2 in another format is row 2.
    assert (report.duplicates, report.leaked) == (2, 1)
    assert [(found.file, found.line, found.code) for found, _ in rejected] == [
        ("one.jsonl", 4, "invalid_role"), ("two.json.gz", 1, "missing_column"),
    ]  # fmt: skip
    assert rejected[0][1] == BAD.decode()
    assert list(report.examples) == [found for found, _ in rejected]
    assert [(name, total) for name, _, total in told] == [
        (path.name, path.stat().st_size) for path in (one, two, held)
    ]
    assert all(done == total for _, done, total in told)


def test_limits_and_a_named_format_are_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", row(1), row(2, "x" * 50))
    report = validate_files([path], limits=Limits(max_chars_per_message=40))
    assert report.invalid == {"message_too_long": 1}
    assert validate_files([path], format="alpaca").invalid == {"mixed_format": 2}
    with pytest.raises(InvalidConfig, match="unknown format"):
        validate_files([path], format="nothing")


def test_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    paths = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        paths.append(write(tmp_path / name / "rows.jsonl", BAD))
    report = validate_files(paths)
    assert [counts.file for counts in report.files] == [str(path) for path in paths]
    assert [example.file for example in report.examples] == [str(path) for path in paths]


def test_a_file_that_is_not_there_or_broken_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"nothing\.jsonl"):
        validate_files([tmp_path / "nothing.jsonl"])
    broken = tmp_path / "broken.jsonl.gz"
    broken.write_bytes(gzip.compress(row(1))[:-4])
    with pytest.raises(InvalidData, match=r"broken\.jsonl\.gz"):
        validate_files([broken])


def test_a_name_that_is_not_utf_8_is_refused_for_no_report_could_hold_it(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/bad\xff.jsonl"))
    write(path, BAD)
    with pytest.raises(InvalidData, match="not UTF-8") as caught:
        validate_files([path])
    assert caught.value.place.file == r"bad\xff.jsonl"
    with pytest.raises(InvalidData, match="not UTF-8"):
        list(read_conversations(path))


def test_no_files_and_empty_files_are_a_report_of_nothing(tmp_path: Path) -> None:
    assert validate_files([]).total == 0
    report = validate_files([write(tmp_path / "empty.jsonl")])
    assert (report.total, report.valid, report.duplicates) == (0, 0, 0)


def test_zstandard_that_starts_with_a_frame_to_pass_over_is_read(tmp_path: Path) -> None:
    zstd = pytest.importorskip("backports.zstd", reason="the extra fleet brings backports.zstd")
    frame = b"\x5a\x2a\x4d\x18\x03\x00\x00\x00abc"
    path = tmp_path / "rows.jsonl.zst"
    path.write_bytes(frame + zstd.compress(row(1) + b"\n"))
    [counts] = validate_files([path]).files
    assert (counts.valid, counts.total, counts.container) == (1, 1, "jsonl.zst")
    path.write_bytes(frame)
    [counts] = validate_files([path]).files
    assert (counts.total, counts.blank, counts.container) == (0, 0, "jsonl.zst")


def test_the_page_has_every_number_and_shows_foreign_text_as_text() -> None:
    report = ValidationReport(
        files=(
            FileCounts(file="a`|b.jsonl", total=5, valid=2, blank=1,
                       invalid={"invalid_json": 2, "invalid_role": 1},
                       format="messages", container="jsonl"),
        ),
        total=5, valid=2, invalid={"invalid_json": 2, "invalid_role": 1}, duplicates=1, leaked=0,
        examples=(Rejected(file="a`|b.jsonl", line=3, code="invalid_json",
                           reason="<script>\n# x | `y`" + "z" * 500),),
    )  # fmt: skip
    page = report_page(report)
    assert "5 rows = 2 valid + 3 invalid. 1 of the valid rows have an equal one" in page
    assert "| `` a`\\|b.jsonl `` | messages | jsonl | 5 | 2 | 3 | 1 |" in page
    assert "| all |  |  | 5 | 2 | 3 | 1 |" in page
    assert "| `invalid_json` | 2 |\n| `invalid_role` | 1 |\n| all | 3 |" in page
    assert "## The first 1 of them" in page
    example = page.splitlines()[-1]
    assert example.startswith("| `` a`\\|b.jsonl `` | 3 | `invalid_json` | `` <script>")
    assert len(example) < 300
    assert "\N{REPLACEMENT CHARACTER}# x \\|" in example


DATA = os.environ.get("LLAMAHOME_TEST_DATA")


@pytest.mark.skipif(not DATA, reason="LLAMAHOME_TEST_DATA names no folder of public sample files")
def test_the_public_files_are_accounted_for_row_by_row() -> None:
    names = {"alpaca_en_demo.json": 999, "glaive_toolcall_en_demo.json": 300, "identity.json": 91}
    report = validate_files([Path(str(DATA)) / name for name in names])
    assert {counts.file: counts.total for counts in report.files} == names
    assert report.valid == report.total == 1390
    assert report.invalid == {}
    assert {counts.container for counts in report.files} == {"json"}


def test_raw_text_is_a_format_of_its_own_and_equal_texts_are_duplicates(tmp_path: Path) -> None:
    one = write(
        tmp_path / "one.jsonl", b'{"text": "Once"}', b'{"n": 1, "text": "\\u004fnce"}',
        b'{"text": "Once", "weight": 0}', b'{"text": null}', row(1), b'{"text": "half \\ud800"}',
    )  # fmt: skip
    held = write(tmp_path / "held.jsonl", b'{"text": "Once"}', b'{"text": "Twice"}')
    report = validate_files([one], validation_files=[held])
    assert [(file.format, file.valid) for file in report.files] == [("text", 3), ("text", 2)]
    assert report.invalid == {"lone_surrogate": 1, "missing_column": 1, "mixed_format": 1}
    # Once untrained is another row, as with the weights of answers.
    assert (report.duplicates, report.leaked) == (1, 1)
