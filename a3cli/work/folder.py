"""The work folder's contract: file names, manifests, fingerprints, atomic writes, the lock.

Stages meet only through these files. Every file is written beside its place and renamed, and a stage's
manifest is written last, so a folder with a manifest is a finished stage. Only this module builds these paths.

    source.json                      which checkpoint: folder or hub id, revision, fingerprint, small files' hashes
    calibration/progress.json        request and finished layers of an unfinished calibration
    calibration/hidden-000.bin …     the input of one layer during calibration; hidden-next.bin becomes the next one
    calibration/tokens.safetensors   the blocks [N, T]
    calibration/layer-000.safetensors …   statistics
    calibration/manifest.json        written last
    solution/layer-000.safetensors … projections and kept indices
    solution/manifest.json           written last
    .solution.a3-partial/            an unfinished solution; .solution.a3-progress.json lists its finished files
    channels/layer-000.json …        the order of greedy channel selection, reused by every later solution
    probes/best-stock.json …         measured sensitivities of a method and shape
    probes/progress.json, streams-{0,1}.bin   during the measurement
    pareto.json                      finished points of `a3 pareto`
    evaluation.json                  the figures that a recipe measured, and the export's hash
    .lock, .scratch/                 the lock of a writing stage; its temporary files
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from a3cli.errors import A3Error
from a3cli.work.files import making, writing


class InUse(A3Error):
    """Another process holds a lock."""


class Work:
    """One work folder: its paths and its lock."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.source = folder / "source.json"
        self.calibration = folder / "calibration"
        self.solution = folder / "solution"
        self.calibration_manifest = self.calibration / "manifest.json"
        self.calibration_progress = self.calibration / "progress.json"
        self.solution_manifest = self.solution / "manifest.json"
        self.tokens = self.calibration / "tokens.safetensors"
        self.probes = folder / "probes"
        self.channels = folder / "channels"
        self.points = folder / "pareto.json"
        self.coming_hidden_states = self.calibration / "hidden-next.bin"
        self.evaluation = folder / "evaluation.json"
        self.verification = folder / "verification.json"
        self.scratch = folder / ".scratch"  # removed when the command ends, at the latest when the next one starts

    def borrowed_by(self, folder: Path) -> "Work":
        """Return a work folder with its own lock and solution that reads this one's calibration."""
        other = Work(folder)
        other.source, other.calibration, other.tokens = self.source, self.calibration, self.tokens
        other.calibration_manifest, other.calibration_progress = self.calibration_manifest, self.calibration_progress
        other.probes, other.channels = self.probes, self.channels
        return other

    def statistics(self, layer: int) -> Path:
        return self.calibration / layer_file(layer)

    def channel_order(self, layer: int) -> Path:
        return self.channels / f"layer-{layer:03d}.json"

    def layer_solution(self, layer: int) -> Path:
        return self.solution / layer_file(layer)

    def hidden_states(self, layer: int) -> Path:
        """Return the path of the file that holds the input of `layer` for all blocks."""
        return self.calibration / f"hidden-{layer:03d}.bin"

    def in_use(self) -> bool:
        """Return whether another process works in this folder."""
        if not self.folder.is_dir():
            return False
        try:
            with self.locked():
                return False
        except InUse:
            return True

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder for this process."""
        lock_file = self.folder / ".lock"
        with making(self.folder), holding(lock_file, f"work folder {self.folder}", "use another --work"):
            try:
                yield
            finally:
                if list(self.folder.iterdir()) == [lock_file]:
                    lock_file.unlink()


@contextmanager
def holding(lock_file: Path, what: str, otherwise: str) -> Iterator[None]:
    """Hold a lock. Raises A3Error if another process holds it. The lock ends with its process, so it is never stale."""
    lock = FileLock(lock_file)
    with writing(lock_file):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise InUse(f"{what} is in use by another a3 process; wait for it, or {otherwise}") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def holding_target(target: Path) -> Iterator[None]:
    """Lock an output folder and its draft against commands that use other work folders."""
    lock_file = target.with_name(f".{target.name}.a3-lock")
    with making(target.parent), holding(lock_file, str(target), "choose another folder"):
        try:
            yield
        finally:
            lock_file.unlink(missing_ok=True)


def layer_file(layer: int) -> str:
    return f"layer-{layer:03d}.safetensors"
