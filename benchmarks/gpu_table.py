"""What gpu.py found, as a table for people."""

from __future__ import annotations

from typing import Any


def show(found: dict[str, Any]) -> None:
    print(f"{found['device']}, torch {found['torch']}\n")
    for name, one in found["exact"].items():
        figures = ", ".join(f"{key} {value}" for key, value in one.items() if key != "passed")
        print(f"{'ok  ' if one['passed'] else 'NOT '}{name} ({figures})")
    print(f"\n{'jobs x (rows x tokens)':36}{'tok/s':>10}{'MFU':>7}{'peak GB':>9}"
          f"{'peer tok/s':>12}{'peer GB':>9}{'ours is':>9}")  # fmt: skip
    for title, cell in found["cells"].items():
        mine, theirs = cell["ours"], cell["peer"]
        ratio = (
            f"{mine['tokens_per_second'] / theirs['tokens_per_second']:.2f}x"
            if mine and theirs else "-"
        )  # fmt: skip
        print(f"{title:36}{_speeds(mine)}{_number(theirs, 'tokens_per_second', 12, '.0f')}"
              f"{_number(theirs, 'peak_gb', 9, '.1f')}{ratio:>9}")  # fmt: skip
    extras = dict(found.get("tiers", {}))
    extras["exact mode"] = found.get("exact_mode")
    extras["many jobs"] = found.get("many")
    for title, one in extras.items():
        if one and "not_here" in one:
            print(f"{title:36}not here: {one['not_here']}")
        else:
            print(f"{title:36}{_speeds(one)}")
    _times(found)


def _times(found: dict[str, Any]) -> None:
    if first := found.get("first_steps"):
        print(f"\nadmission to first step: p50 {first['p50_seconds']:.2f} s, "
              f"p95 {first['p95_seconds']:.2f} s of {first['times']}")  # fmt: skip
    if last := found.get("last_steps"):
        print(f"last step to adapter: {last['seconds']:.2f} s, in which nobody else moves")
    if minutes := found.get("many_minutes"):
        print("the many jobs, to their ends (extrapolated): "
              + ", ".join(f"{key} {value:.1f} min" for key, value in minutes.items()))  # fmt: skip
    for title in found["left_out"]:
        print(f"left out, no time: {title}")


def _speeds(one: dict[str, Any] | None) -> str:
    return (
        _number(one, "tokens_per_second", 10, ".0f") + _number(one, "mfu", 7, ".1%")
        + _number(one, "peak_gb", 9, ".1f")
    )  # fmt: skip


def _number(one: dict[str, Any] | None, key: str, width: int, style: str) -> str:
    value = one.get(key) if one else None
    return f"{'-' if value is None else format(value, style):>{width}}"
