"""Where a work folder's source lies: read the record, open what it names, and follow a checkpoint that was moved."""

from pathlib import Path

from a3cli.errors import A3Error
from a3cli.models.checkpoint import Checkpoint, resolve_model
from a3cli.models.hub import find_folder, read_config
from a3cli.work.files import Json
from a3cli.work.folder import Work
from a3cli.work.manifests import SOURCE_REMEDY, SourceRecord
from a3cli.work.sealed import name_differences


def recorded_source(work: Work) -> tuple[Path, Json, str]:
    """Return folder, config.json and name of a work folder's source. Raises A3Error if it is not on this machine."""
    recorded = SourceRecord.read(work.source, SOURCE_REMEDY)
    revision = None if recorded.folder else recorded.revision
    folder = find_folder(recorded.place, revision, files=("config.json",), cached_only=True)
    return folder, read_config(folder, recorded.model), recorded.model


def open_recorded(recorded: SourceRecord, *, cached_only: bool = False) -> Checkpoint:
    """Open the checkpoint that a record names; a Hub id keeps its name wherever its files lie. Raises A3Error."""
    links = recorded.follow_symlinks
    if recorded.folder is None:
        return resolve_model(recorded.model, recorded.revision, follow_symlinks=links, cached_only=cached_only)
    if not Path(recorded.folder).is_dir():
        raise A3Error(f"model {recorded.model!r} was in {recorded.folder}, which is no folder")
    return Checkpoint(Path(recorded.folder), name=recorded.model, revision=recorded.revision, follow_symlinks=links)


def opened_work(folder: Path, source: str | None) -> Work:
    """Return a work folder; with `source`, after recording that its source lies there now."""
    work = Work(folder)
    if source is not None:
        move_source(work, source)
    return work


def move_source(work: Work, place: str) -> None:
    """Record that a work folder's source is now at `place`, a folder or a Hub id, for this and all later commands.

    Raises A3Error, and changes nothing, unless that is the checkpoint that was calibrated.
    """
    if not work.source.is_file():
        raise A3Error(f"--source {place}: {work.folder} has no calibration whose source could have been moved")
    with work.locked():
        recorded = SourceRecord.read(work.source, SOURCE_REMEDY)
        again = recorded.revision if place == recorded.model and not Path(place).is_dir() else None
        try:
            source = resolve_model(place, again, follow_symlinks=recorded.follow_symlinks)
        except A3Error as error:
            raise A3Error(f"--source {place}: {error}") from error
        expected, found = recorded.fingerprint.plain(), source.fingerprint()
        if differs := name_differences({key: expected.get(key) for key in found}, found):
            raise A3Error(
                f"--source {place}: it is not the checkpoint of {work.calibration} (differs in {differs}); "
                "give the place to which that one was moved"
            )
        content = recorded.plain(exclude={"sha256", "folder"})
        moved = {**content, **describe_place(place, source, recorded), "follow_symlinks": source.links_out}
        if moved != recorded.plain(exclude={"sha256"}):
            SourceRecord.write(work.source, moved)


def describe_place(place: str, source: Checkpoint, recorded: SourceRecord) -> Json:
    """Return what a record says of the place. An export of a Hub id names that id, also if its files were moved."""
    if not Path(place).is_dir():
        return {"model": place, "revision": source.revision}
    folder = str(Path(place).resolve())
    return {"folder": folder} if recorded.revision else {"model": folder}
