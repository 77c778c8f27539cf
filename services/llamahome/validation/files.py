"""Local files checked as the stage checks them: no fleet, no storage, nothing written."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from llamahome.conversations import Limits, Record, batches, examine, records, shown_raw
from llamahome.conversations.checker import Checked, RowChecker
from llamahome.conversations.read import checked_name, unreadable
from llamahome.schemas import FileCounts, Rejected, ValidationReport
from llamahome.validation.duplicates import Rows, compare

EXAMPLES = 20
# The file, and how far in it the reading is: bytes done, bytes in all.
OnProgress = Callable[[Path, int, int], None]
# A row that cannot be used, and its text (2,000 characters at most).
OnRejected = Callable[[Rejected, str], None]


def validate_files(
    files: Sequence[Path],
    *,
    limits: Limits | None = None,
    format: str | None = None,
    validation_files: Sequence[Path] = (),
    on_progress: OnProgress | None = None,
    on_rejected: OnRejected | None = None,
) -> ValidationReport:
    """The report of the files, as the validation stage would make it; thresholds are not applied.

    Rows of ``validation_files`` that also stand in ``files`` are counted as leaked. Memory: 40
    bytes a row. Raises NotFound, InvalidData (a file that cannot be read, a name that is not
    UTF-8), InvalidConfig (an unknown format, a missing extra).
    """
    paths = [*files, *validation_files]
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    names = [checked_name(name) for name in names]
    examples: list[Rejected] = []

    def rejected(found: Rejected, raw: str) -> None:
        if len(examples) < EXAMPLES:
            examples.append(found)
        if on_rejected is not None:
            on_rejected(found, raw)

    checked = []
    for path, name in zip(paths, names, strict=True):
        file = _File(path, name, limits or Limits(), format)
        file.read(rejected, on_progress)
        checked.append(file)
    sides = checked[: len(files)], checked[len(files) :]
    duplicates = compare(*(_rows(side) for side in sides))
    invalid: Counter[str] = Counter()
    for file in checked:
        invalid.update(file.invalid)
    counts = tuple(file.counts() for file in checked)
    return ValidationReport(
        files=counts,
        total=sum(file.total for file in counts),
        valid=sum(file.valid for file in counts),
        invalid=dict(sorted(invalid.items())),
        duplicates=duplicates.rows,
        leaked=duplicates.leaked,
        examples=tuple(examples),
    )


def _rows(files: Sequence[_File]) -> Rows:
    parts = (
        (index, bytes(file.digests), file.lines.tobytes(), 0) for index, file in enumerate(files)
    )
    return Rows.of([file.name for file in files], parts)


class _File:
    """One file's counts, and its rows' digests (32 bytes each) and lines."""

    def __init__(self, path: Path, name: str, limits: Limits, format: str | None) -> None:
        self.path, self.name = path, name
        self._limits, self._format = limits, format
        self.digests, self.lines = bytearray(), array("q")
        self.invalid: Counter[str] = Counter()
        self._blank = 0

    def read(
        self, rejected: Callable[[Rejected, str], None], on_progress: OnProgress | None
    ) -> None:
        try:
            size = self.path.stat().st_size
            with self.path.open("rb") as stream:
                self._source = examine(
                    stream, filename=self.name, limits=self._limits, format=self._format
                )
                checker = RowChecker(self._source, self._limits)
                for batch in batches(records(stream, self._source, self._limits)):
                    self._take(batch, checker.check(batch, first=True), rejected)
                    if on_progress is not None:
                        on_progress(self.path, batch[-1][2], size)
        except OSError as error:
            raise unreadable(self.path, error) from error

    def _take(
        self,
        batch: Sequence[Record],
        found: Sequence[Checked],
        rejected: Callable[[Rejected, str], None],
    ) -> None:
        for (line, record, _), checked in zip(batch, found, strict=True):
            if isinstance(checked, tuple):
                self.digests += checked[1]
                self.lines.append(line)
            elif checked is None:
                self._blank += 1
            else:
                self.invalid[checked.code] += 1
                rejected(checked, shown_raw(record if isinstance(record, bytes) else None))

    def counts(self) -> FileCounts:
        return FileCounts(
            file=self.name, total=len(self.lines) + self.invalid.total(), valid=len(self.lines),
            blank=self._blank, invalid=dict(sorted(self.invalid.items())),
            format=self._source.format, container=self._source.container,
        )  # fmt: skip
