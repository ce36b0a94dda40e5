"""The texts of benchmarks/real.py: each one is calibrated and measured on in parts that do not overlap."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from demo_text import NOT_TRAINED_ON

from benchmarks.results import split_lines


@dataclass(frozen=True)
class RealText:
    """A text's name, and the files to calibrate and to measure on."""

    name: str
    calibration: Path
    evaluation: Path


def read_texts(given: Sequence[str], folder: Path) -> tuple[RealText, ...]:
    """Return the texts of `NAME=CALIBRATION:EVALUATION` and `NAME=PATH`; halves are written to the folder."""
    return tuple(read_text(one, folder) for one in given)


def read_text(given: str, folder: Path) -> RealText:
    name, named, paths = given.partition("=")
    calibration, separate, evaluation = paths.partition(":")
    if not named or not name or not calibration:
        sys.exit(f"--texts {given}: write NAME=CALIBRATION:EVALUATION, or NAME=PATH to have it split")
    if missing := [path for path in (calibration, evaluation) if path and not Path(path).exists()]:
        sys.exit(f"--texts {given}: there is no {' and no '.join(missing)}")
    if separate:
        return RealText(name, Path(calibration), Path(evaluation))
    place = folder / f"text-{name}"
    place.mkdir(parents=True, exist_ok=True)
    whole = Path(calibration)
    return RealText(name, *(split_sources(whole, place) if whole.is_dir() else split_lines(whole, place)))


def split_sources(source: Path, folder: Path) -> tuple[Path, Path]:
    """Join every second Python file below a folder to calibrate on, and the others to measure on."""
    files = [
        path for path in sorted(source.rglob("*.py")) if not set(path.relative_to(source).parts) & set(NOT_TRAINED_ON)
    ]
    if len(files) < 2:
        sys.exit(f"--texts: {source} has {len(files)} Python files; two are needed")
    halves = folder / "first-half.txt", folder / "second-half.txt"
    for path, half in zip(halves, (files[::2], files[1::2]), strict=True):
        path.write_text("\n".join(each.read_text("utf-8", "replace") for each in half), "utf-8")
    return halves
