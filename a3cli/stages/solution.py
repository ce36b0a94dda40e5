"""The solution that export and verify apply: its manifest, and the projections of its layers, read when needed."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from a3cli.errors import A3Error
from a3cli.models.families import LayerSizes
from a3cli.solvers.moments import Tensors
from a3cli.work.files import check_hashes, read_tensors
from a3cli.work.folder import Work
from a3cli.work.manifests import CalibrationManifest, SolutionManifest
from a3cli.work.progress import Progress, reporting
from a3cli.work.sealed import read_manifest


class Solution:
    """The manifest, and the projections of each layer; those of the last `held` layers are kept in memory."""

    def __init__(self, manifest: SolutionManifest, work: Work, *, held: int = 1) -> None:
        self.manifest = manifest
        self.layer: Callable[[int], Tensors] = lru_cache(maxsize=held)(
            lambda i: read_tensors(work.layer_solution(i), work.solve_again)
        )
        self.sizes = [LayerSizes(size.qk, size.ov, size.mlp) for size in manifest.sizes]

    @property
    def per_layer(self) -> bool:
        return self.manifest.shape == "per-layer"

    def slots(self, layer: int) -> list[float]:
        """Return the RoPE slots of a layer; none without RoPE, or where heads keep their size in the stock shape."""
        own: Any = self.manifest.rope_slots or []
        chosen: list[float] = own[layer] if own and isinstance(own[0], list) else own
        return chosen


def read_solution(work: Work, progress: Progress, *, held: int = 1) -> tuple[CalibrationManifest, Solution]:
    """Return calibration manifest and solution, checked against each other and against their files."""
    if not work.solution_manifest.is_file():
        raise A3Error(describe_missing(work))
    calibration = CalibrationManifest.read(work.calibration_manifest, "run a3 calibrate --overwrite")
    manifest = SolutionManifest.read(work.solution_manifest, work.solve_again)
    if manifest.request.calibration != calibration.sha256:
        raise A3Error(
            f"{work.solution_manifest} was solved from another calibration than {work.calibration_manifest}; "
            f"{work.solve_again}"
        )
    files = {work.layer_solution(layer): expected for layer, expected in enumerate(manifest.layers)}
    with reporting(progress, "checking the solution", len(files), "files") as finished:
        check_hashes(files, work.solve_again, finished)
    return calibration, Solution(manifest, work, held=held)


def describe_missing(work: Work) -> str:
    """Return the error for a solution that is not there, with the names of those that are."""
    which, option = (f"solution named {work.name}", f" --name {work.name}") if work.name else ("solution", "")
    others = [other.name for other in work.solutions()]
    if not others:
        return f"{work.folder} has no finished {which}; run a3 solve{option} first (--work names the folder)"
    named = [f"--name {name}" if name else "leave out --name" for name in others]
    unnamed = "" if work.name else " without a name"
    return f"{work.folder} has no finished {which}{unnamed}; choose one ({', '.join(named)}), or run a3 solve{option}"


def find_solution(work: Work, sha256: str) -> Work | None:
    """Return the work folder with the solution of this hash, whatever its name; None if it has only others.

    Raises A3Error for a damaged manifest, which could be that solution's, if no other one is.
    """
    damage = None
    for each in work.solutions():
        try:
            if read_manifest(each.solution_manifest, each.solve_again)["sha256"] == sha256:
                return each
        except A3Error as error:
            damage = damage or error
    if damage:
        raise damage
    return None
