"""What solve, probe and pareto share: the context of a run, and the checks before any work."""

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from a3cli.errors import A3Error
from a3cli.methods import METHODS, LayerGradients, LayerInputs, Method
from a3cli.models import costs
from a3cli.models.families import Family, usual_entries
from a3cli.models.model import Model, open_calibrated_source
from a3cli.models.source import recorded_source
from a3cli.settings import COMPONENTS, SolveSettings
from a3cli.settings.budgets import budget_problems
from a3cli.stages.sizes import Stored
from a3cli.work.files import check_hashes
from a3cli.work.folder import Work
from a3cli.work.interrupt import Stop
from a3cli.work.machine import Machine, choose_machine, load_linear_algebra
from a3cli.work.manifests import CalibrationManifest
from a3cli.work.processes import in_thread, spread
from a3cli.work.progress import Progress, portion, reporting
from a3cli.work.record import Record

T = TypeVar("T")

AGAIN = "rerun the same command to resume"
WIDTH_OF_EXPERTS = 8  # values of 16 bits in 16 bytes


@dataclass(frozen=True)
class Run:
    """One run of a command on a finished calibration."""

    settings: SolveSettings
    model: Model
    work: Work
    calibration: CalibrationManifest
    machine: Machine
    progress: Progress
    stop: Stop
    gradients: Sequence[LayerGradients] | None = None

    @property
    def layers(self) -> int:
        return self.model.shape.layers

    @property
    def context(self) -> int:
        """Return the length of the longest text to serve, in tokens."""
        return self.settings.context or self.model.rope.context

    @property
    def stored(self) -> Stored:
        source = self.model.source
        return Stored(source.parameters(), source.bytes(), source.dtype.itemsize)

    def method(self) -> Method[Any]:
        return METHODS[self.settings.method](self.model, self.settings, self.machine)

    def inputs(self, layer: int) -> LayerInputs:
        """Return what a method reads of a layer; only `best` weighs directions of errors by gradients."""
        directed = self.gradients if self.settings.method == "best" else None
        return LayerInputs(self.model, self.work, self.calibration, layer, directed[layer] if directed else None)

    def for_each_layer(self, step: str, compute: Callable[[int], T], layers: Sequence[int] | None = None) -> list[T]:
        """Return the result of `compute` for every layer, or for some; small layers are computed in parallel.

        What `compute` reports with `portion` and `advance` counts as that share of its layer.
        """
        layers = range(self.layers) if layers is None else layers
        with reporting(self.progress, step, len(layers), "layers") as finished:

            def reported(layer: int) -> T:
                with portion(of=finished):
                    return compute(layer)

            if not costs.side_by_side(self.model.shape):
                return [in_thread(partial(reported, layer)) for layer in layers]
            load_linear_algebra(self.machine.device)
            return list(spread(reported, layers, self.settings.num_processes or os.cpu_count() or 1))


def open_run(
    settings: SolveSettings, work: Work, calibration: CalibrationManifest, progress: Progress, stop: Stop
) -> Run:
    """Open the calibration's source. Raises A3Error if it or the statistics have changed."""
    with reporting(progress, "checking the source"):
        model = open_calibrated_source(work, calibration)
    check_statistics(work, calibration, progress)
    machine = choose_machine(settings.device, settings.dtype, model.source.dtype)
    return Run(settings, model, work, calibration, machine, progress, stop)


def read_calibration(work: Work) -> CalibrationManifest:
    if not work.calibration_manifest.is_file():
        raise A3Error(describe_unfinished(work))
    return CalibrationManifest.read(work.calibration_manifest, "run a3 calibrate --overwrite")


def describe_unfinished(work: Work) -> str:
    """Return how far a work folder's calibration is, and what to do until it is finished."""
    running = work.in_use()
    if not work.calibration_progress.is_file():
        if running:
            return f"{work.folder} has no finished calibration, and another a3 process works in it; wait for it"
        return f"{work.folder} has no finished calibration; run a3 calibrate first (--work names the folder)"
    record = Record(work.calibration_progress, {})
    record.resume_checked("run a3 calibrate --overwrite")
    layer, of_layers = len(record.steps), ""  # one of the finished steps is the text
    with suppress(A3Error):  # the source is not on this machine
        _, config, _ = recorded_source(work)
        layers = int(usual_entries(config)["num_hidden_layers"])
        layer, of_layers = min(layer, layers), f" of {layers}"
    state, advice = (
        ("still running", "wait for it") if running else ("unfinished", "rerun the same a3 calibrate command")
    )
    return f"the calibration in {work.folder} is {state}: layer {layer}{of_layers}; {advice}"


def check_statistics(work: Work, calibration: CalibrationManifest, progress: Progress) -> None:
    """Check the hashes of the calibration's files. Raises A3Error."""
    files = {work.statistics(layer): expected for layer, expected in enumerate(calibration.layers)}
    files[work.tokens] = calibration.tokens_hash
    with reporting(progress, "checking the statistics", len(files), "files") as finished:
        check_hashes(files, "run a3 calibrate --overwrite", finished)


def check_settings_of_model(settings: SolveSettings, model: Model) -> None:
    """Raise A3Error for settings that this model does not allow."""
    if settings.context is not None and model.rope.absent:
        why = "keeps its attention as it is" if model.family.carried_attention else "has no RoPE to fit to a context"
        raise A3Error(f"--context {settings.context}: {model.source.name} {why}; leave it out")
    if settings.context is not None and settings.context > model.rope.context:
        raise A3Error(
            f"--context {settings.context} is longer than the context of {model.source.name} ({model.rope.context})"
        )
    cut = "qk" in settings.cut
    if cut and settings.rope_form in ("theta", "linear") and model.rope.kind in ("yarn", "longrope"):
        raise A3Error(
            f"--rope-form {settings.rope_form}: {model.source.name} has RoPE type {model.rope.kind}, which a changed "
            "theta cannot express for smaller heads; use --rope-form auto, or --components mlp to keep heads whole"
        )


def check_settings(settings: SolveSettings, family: Family | None = None) -> None:
    """Check that settings do not contradict each other. Raises A3Error naming all problems.

    A message names the components that the family, if it is known, allows.
    """
    problems = budget_problems(settings)
    attention = {"qk", "ov"} & set(settings.cut)
    allowed = family.possible(settings.shape, settings.method) if family else COMPONENTS
    heads = " and ".join(component for component in allowed if component != "mlp")
    if len(attention) == 1 and settings.shape == "stock":
        problems.append(
            f"--components {','.join(settings.cut)}: the stock shape has one head size for QK and OV, "
            "so both are cut or neither: name both, or mlp alone, or use --shape per-layer"
        )
    if settings.attention_budget and not attention:
        problems.append(f"--attention-budget needs {heads} among --components")
    if settings.kv_budget and not attention:
        problems.append(f"--kv-budget needs {heads} among --components, since the MLP has no KV cache")
    if settings.mlp_budget and "mlp" not in settings.cut:
        problems.append("--mlp-budget needs mlp among --components")
    problems += expert_problems(settings, family)
    if settings.rope_form != "auto" and (settings.method, settings.shape) != ("best", "stock"):
        problems.append(
            f"--rope-form {settings.rope_form} needs --method best and --shape stock: the paper's method keeps the "
            "pairs that it selects, and a per-layer export holds its slots itself"
        )
    if settings.head_multiple % 2 and attention:
        problems.append(f"--head-multiple {settings.head_multiple}: RoPE rotates pairs of dims, so it must be even")
    if problems:
        raise A3Error("bad settings: " + "; ".join(problems))


def expert_problems(settings: SolveSettings, family: Family | None) -> list[str]:
    """Return what of the settings a family with experts does not allow."""
    if family is None or family.experts is None:
        return []
    found = []
    if settings.sequential:
        found.append(f"--sequential: a3 cannot refit the experts of model_type {family.model_type!r} in a second sweep")
    if "mlp" in settings.cut and (problem := width_problem(settings.mlp_multiple)):
        found.append(problem)
    return found


def width_problem(multiple: int) -> str | None:
    """Return why widths of experts cannot be rounded to this multiple; None if they can."""
    if multiple % WIDTH_OF_EXPERTS == 0:
        return None
    return (
        f"--mlp-multiple {multiple}: transformers multiplies experts in a kernel that needs rows of whole 16 bytes; "
        f"use a multiple of {WIDTH_OF_EXPERTS}"
    )
