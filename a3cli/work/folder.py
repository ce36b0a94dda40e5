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
    solutions/NAME/                  a solution with a name: the same files; unfinished ones lie beside it
    solutions/.NAME.evaluation.json, .NAME.verification.json   what a recipe with that name measured and checked
    solutions/.NAME.publication.json   where it uploaded the export
    channels/layer-000-directed.json …   the order of greedy channel selection, reused by every later solution
    channels/layer-000.json …        the same without gradients
    kept/layer-000.json …            errors of smaller query and key heads, reused by every later solution
    kept/layer-000-….safetensors …   refined query and key maps, reused likewise
    kept/source.json, source-….safetensors   what the source's layers make of the tokens on which solutions are measured
    probes/best-stock.json …         measured sensitivities of a method and shape
    probes/progress.json, streams-{0,1}.bin   during the measurement
    gradients/energies.json          what errors of each layer's stream cost, reused by every later solution
    gradients/layer-000.safetensors …   and in which directions
    gradients/progress.json, states-000.bin …, gradients-000.bin …   while it is computed
    pareto.json                      finished points of `a3 pareto`
    evaluation.json                  the figures that a recipe measured, and the export's hash
    publication.json                 where a recipe uploaded the export, and the export's hash
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
    """One work folder: its paths and its lock. `name` selects one of its solutions; None is the one without a name."""

    def __init__(self, folder: Path, name: str | None = None) -> None:
        self.folder, self.name = folder, name
        self.source = folder / "source.json"
        self.calibration = folder / "calibration"
        self.named_solutions = folder / "solutions"
        self.solution = self.named_solutions / name if name else folder / "solution"
        self.calibration_manifest = self.calibration / "manifest.json"
        self.calibration_progress = self.calibration / "progress.json"
        self.solution_manifest = self.solution / "manifest.json"
        self.tokens = self.calibration / "tokens.safetensors"
        self.probes = folder / "probes"
        self.gradients = folder / "gradients"
        self.channels = folder / "channels"
        self.kept = folder / "kept"
        self.points = folder / "pareto.json"
        self.coming_hidden_states = self.calibration / "hidden-next.bin"
        self.evaluation = self._of_solution("evaluation.json")
        self.verification = self._of_solution("verification.json")
        self.publication = self._of_solution("publication.json")
        self.scratch = folder / ".scratch"  # removed when the command ends, at the latest when the next one starts

    def _of_solution(self, file: str) -> Path:
        return self.named_solutions / f".{self.name}.{file}" if self.name else self.folder / file

    def named(self, name: str | None) -> "Work":
        """Return this folder with another of its solutions, existing or not."""
        return self if name == self.name else Work(self.folder, name)

    def solution_folders(self) -> list[Path]:
        """Return the folders of all solutions: first the one without a name, then by name."""
        found = sorted(self.named_solutions.iterdir()) if self.named_solutions.is_dir() else []
        return [self.folder / "solution", *(path for path in found if path.is_dir() and path.name[0] != ".")]

    def solutions(self) -> "list[Work]":
        """Return this folder with each of its finished solutions, in the order of `solution_folders`."""
        names = [None, *(path.name for path in self.solution_folders()[1:])]
        every = [self.named(name) for name in names]
        return [work for work in every if work.solution_manifest.is_file()]

    def beside_named(self) -> list[Path]:
        """Return the drafts, records and results that lie beside the solutions with a name."""
        results = ("evaluation.json", "verification.json", "publication.json")
        kinds = ("a3-partial", "a3-replaced", "a3-progress.json", *results)
        return [path for kind in kinds for path in self.named_solutions.glob(f".*.{kind}")]

    @property
    def solve_again(self) -> str:
        """Return what to do about a solution that is damaged or of another calibration."""
        return "run a3 solve --overwrite" + (f" --name {self.name}" if self.name else "")

    def borrowed_by(self, folder: Path) -> "Work":
        """Return a work folder with its own lock and solution that reads this one's calibration."""
        other = Work(folder)
        other.source, other.calibration, other.tokens = self.source, self.calibration, self.tokens
        other.calibration_manifest, other.calibration_progress = self.calibration_manifest, self.calibration_progress
        other.probes, other.gradients = self.probes, self.gradients
        other.channels, other.kept = self.channels, self.kept
        return other

    def statistics(self, layer: int) -> Path:
        return self.calibration / layer_file(layer)

    def channel_order(self, layer: int, *, directed: bool) -> Path:
        """Return the path of a layer's order of channels; `directed` if gradients weigh the directions of errors."""
        return self.channels / f"layer-{layer:03d}{'-directed' if directed else ''}.json"

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
