"""Print the command that usually comes next, as one line that can be copied as it stands."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from a3cli.cli.console import print_line
from a3cli.settings import DEFAULT_WORK

if TYPE_CHECKING:
    from a3cli.report.manifest import Manifest
    from a3cli.work.folder import Work

BUDGET = 0.25  # of the suggested first solution


def print_next(name: str, argument: str | Path | None, options: dict[str, Any]) -> None:
    from a3cli.report.commands import command

    print_line(f"next: {command(name, None if argument is None else str(argument), options)}")


def after_calibration(work: Path) -> None:
    print_next("solve", None, {"budget": BUDGET, "work": if_given(work)})


def after_solution(work: Path, name: str | None) -> None:
    """A solution with a name is exported to a folder of its own, beside those of others."""
    print_next("export", f"OUT-{name}" if name else "OUT", {"name": name, "work": if_given(work)})


def after_export(out: Path, manifest: "Manifest", work: Path) -> None:
    print_next("verify", out, {"work": if_given(work), "trust_remote_code": needs_code(manifest)})


def after_verification(out: Path, work: "Work") -> None:
    """Print nothing if the work folder does not name the source: `verify` works without it."""
    from a3cli.report.manifest import MANIFEST, read_export_manifest
    from a3cli.work.manifests import SOURCE_REMEDY, SourceRecord

    if not work.source.is_file():
        return
    source = SourceRecord.read(work.source, SOURCE_REMEDY)
    on_hub = source.revision is not None and source.folder is None
    options = {
        "against": source.model if on_hub else nearby(source.place),
        "against_revision": source.revision if on_hub else None,
        "follow_symlinks": source.follow_symlinks,
        "trust_remote_code": needs_code(read_export_manifest(out / MANIFEST)),
    }
    print_next("eval", out, options)


def needs_code(manifest: "Manifest") -> bool:
    return manifest.solution.shape == "per-layer"


def after_evaluation(model: str) -> None:
    """Print nothing if the model that was measured is not an export of a3."""
    from a3cli.report.manifest import MANIFEST

    if (Path(model) / MANIFEST).is_file():
        print_next("report", model, {"html": "report.html"})


def if_given(work: Path) -> Path | None:
    """Return the work folder for `--work`; None if it is the default."""
    return None if work == DEFAULT_WORK else work


def nearby(folder: str) -> str:
    """Return the path of a folder relative to the current one if it is inside, otherwise as it is."""
    here = Path.cwd()
    return os.path.relpath(folder, here) if here in Path(folder).parents else folder
