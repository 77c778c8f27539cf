"""Commands that look at data without a fleet: is it usable, and what would be trained on."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from llamahome.cli.bases import base_name
from llamahome.cli.context import Json, State, direct_settings, open_ledger
from llamahome.cli.exits import require
from llamahome.cli.output import put, put_json, say
from llamahome.errors import InvalidConfig, NotFound

if TYPE_CHECKING:
    from llamahome.config import TrainingConfig
    from llamahome.conversations import Limits
    from llamahome.preprocessing.inspection import InspectedRow
    from llamahome.schemas import Rejected, ValidationReport

Assignments = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="A training setting, as max_length=1024; repeatable."
    ),
]
Format = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="The rows' format; found out where it is not given."),
]
_TRAINED, _CONTROL = "green", "yellow"
_DEVICES = Path("/dev")


def validate(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Training files.")],
    validation: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="A validation file, checked for leaks; repeatable."),
    ] = None,
    format: Format = None,
    quarantine: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the rows that cannot be used here.")
    ] = None,
    assignments: Assignments = None,
    state: State = None,
    as_json: Json = False,
) -> None:
    """Check files as a job would, without a fleet and without a model.

    Exit code 0 if a job would go on with them: some row is valid, and the share of rows that cannot
    be used is at most max_invalid_share.
    """
    del state  # taken everywhere, so that scripts can pass it everywhere; there is no fleet here
    require("fleet")
    from llamahome.validation import report_page, validate_files

    config = _config(None, None, assignments)
    _check_elsewhere(quarantine, [*files, *(validation or ())])
    with _Quarantine(quarantine) as sink:
        report = validate_files(
            files,
            validation_files=validation or (),
            format=format or config.validation.format,
            limits=_limits(config),
            on_rejected=sink.take,
        )
    if as_json:
        put_json(report)
    else:
        put(report_page(report).rstrip())
    if quarantine is not None:
        say(f"{sink.rows} rows written to {quarantine}")
    raise typer.Exit(0 if _usable(report, config) else 1)


def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Training data.")],
    base: Annotated[
        str, typer.Option(metavar="NAME", help="A registered base, or a folder with a tokenizer.")
    ],
    line: Annotated[
        list[int] | None, typer.Option("--line", min=1, metavar="N", help="This line; repeatable.")
    ] = None,
    count: Annotated[
        int | None, typer.Option("-n", min=1, metavar="N", help="The first N rows (default 1).")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Every row.")] = False,
    format: Format = None,
    recipe: Annotated[str | None, typer.Option(metavar="NAME", help="A recipe.")] = None,
    assignments: Assignments = None,
    state: State = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a row, a line each.")] = (
        False
    ),
) -> None:
    """Show rows as the trainer will see them, token by token.

    On a terminal what is trained is green and control tokens are yellow; off one, trained tokens
    stand in [brackets].
    """
    require("fleet")
    from llamahome.preprocessing.inspection import inspect_rows

    if sum((line is not None, count is not None, every)) > 1:
        raise InvalidConfig("--line, -n and --all exclude each other", code="usage")
    config = _config(base_name(base), recipe, assignments).model_dump(mode="json")
    if format is not None:
        config["validation"]["format"] = format
    limit = None if every or line is not None else (count or 1)
    found = 0
    for row in inspect_rows(file, _folder_of(base, state), config=config, lines=line, limit=limit):
        found += 1
        if as_json:
            put_json(row.to_json())
        else:
            _show(row, sys.stdout)
    if line is not None and found < len(set(line)):
        raise NotFound(
            f"{len(set(line)) - found} of the lines asked for hold no row", file=str(file),
            remedy="Lines are counted from 1; blank lines hold no row",
        )  # fmt: skip


def _check_elsewhere(quarantine: Path | None, files: Sequence[Path]) -> None:
    """Raises InvalidConfig where the rejected rows would be written over what is read."""
    for written in (quarantine, _partial(quarantine)) if quarantine is not None else ():
        if written is None or not written.exists():
            continue
        if any(file.exists() and file.samefile(written) for file in files):
            raise InvalidConfig(
                f"{written} is one of the files to check", field="--quarantine",
                remedy="Name another file for the rejected rows",
            )  # fmt: skip


class _Quarantine:
    """Rejected rows as JSON lines, where a file for them was named.

    An earlier file is replaced once all is written, by a rename.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._partial = _partial(path) if path is not None else None
        self._stream: TextIO | None = None
        self.rows = 0

    def __enter__(self) -> _Quarantine:
        place = self._partial or self._path
        if place is not None:
            self._stream = place.open("w", encoding="utf-8")
        return self

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        if self._stream is None or self._path is None:
            return
        try:
            self._stream.close()
            if self._partial is not None and failed is None:
                self._partial.replace(self._path.resolve())
        finally:
            if self._partial is not None:
                self._partial.unlink(missing_ok=True)

    def take(self, rejected: Rejected, raw: str) -> None:
        if self._stream is not None:
            body = {**rejected.model_dump(mode="json"), "raw": raw}
            self._stream.write(json.dumps(body, ensure_ascii=False) + "\n")
            self.rows += 1


def _partial(path: Path) -> Path | None:
    """Where it is written first; None for a device, a pipe and /dev/stdout, whatever that is."""
    place = path.resolve()
    if _DEVICES in path.absolute().parents or (place.exists() and not place.is_file()):
        return None
    return place.with_name(f"{place.name}.partial")


def _config(
    model_name: str | None, recipe: str | None, assignments: list[str] | None
) -> TrainingConfig:
    from llamahome.config import parse_assignments, resolve_training_config

    layers = [("--set", parse_assignments(assignments or []))]
    return resolve_training_config(model_name=model_name, recipe=recipe, layers=layers)


def _limits(config: TrainingConfig) -> Limits:
    from llamahome.conversations import Limits

    return Limits(**config.validation.model_dump(exclude={"format"}))


def _usable(report: ValidationReport, config: TrainingConfig) -> bool:
    if report.valid == 0:
        return False
    return sum(report.invalid.values()) <= config.max_invalid_share * report.total


def _folder_of(base: str, state: Path | None) -> Path:
    """A folder as it is named; else the registered base's. Raises NotFound naming the nearest."""
    folder = Path(base)
    if folder.is_dir():
        return folder
    if "/" in base:
        raise NotFound("no such folder", file=base, code="model_not_found")
    ledger = open_ledger(direct_settings(state))
    try:
        return Path(ledger.base(base).path)
    finally:
        ledger.close()


def _show(row: InspectedRow, stream: TextIO) -> None:
    where = f"{row.file}:{row.line}"
    if row.dropped is not None:
        put(f"{where}  dropped: {row.dropped}")
        return
    trained = sum(row.trained)
    cut = f", {row.cut} more cut off" if row.cut else ""
    put(f"{where}  {len(row.ids)} tokens, {trained} trained{cut}")
    if stream.isatty():
        from rich.console import Console
        from rich.text import Text

        text = Text()
        for piece, is_trained, is_control in row.pieces:
            style = " ".join(
                name for name, on in ((_TRAINED, is_trained), (_CONTROL, is_control)) if on
            )
            text.append(piece, style=_CONTROL if is_control and not is_trained else style)
        Console(file=stream).print(text)
    else:
        put("".join(f"[{piece}]" if is_trained else piece for piece, is_trained, _ in row.pieces))
