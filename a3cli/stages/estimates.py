"""Estimate the disk, memory and seconds of a run from the model's shape, the settings and the machine's speeds."""

import os
import sys
from dataclasses import dataclass
from importlib.metadata import version

from a3cli.models import correction_costs, costs
from a3cli.models.families import LayerSizes, ModelShape
from a3cli.settings import COMPONENTS, Component, PlanSettings
from a3cli.settings.seq_len import known_seq_len
from a3cli.stages.rates import SOLVE_TFLOPS, STARTUP, Rates

METHODS = ("paper", "best")
HASH_GBPS = 2.5  # BLAKE3 on one core
# Resident bytes of a process with torch, transformers and datasets; far more for a torch build with GPU support:
# from 0.85 to 1.19 GB, since the system maps more or less of its libraries' files.
IMPORTS = {"cpu": 410_000_000, "cuda": 1_020_000_000}
WORKSPACE = {"paper": 0, "best": 40_000_000}  # bytes of linear algebra's workspace in each thread
REFIT_ROUNDS = 2  # of the sequential correction: the default of `a3 solve`
CORRECTING = 1.3  # time of the sequential correction relative to its FLOPs: activations, and files between its passes
REFINING = 2.0  # time of sampled attention relative to its FLOPs: softmax and other steps
# Seconds of a layer beside its arithmetic, for this start time: files, and steps too small to fill a core.
LAYER_SECONDS = {"calibrate": 0.2, "solve --method best": 1.9, "solve --method best --sequential": 1.9}
# Seconds per channel of greedy selection on a GPU: sequential steps, each with some launches of tiny kernels.
# An upper bound, measured on an H200 when each step still waited for the device: `benchmarks/solve_layer.py --device
# cuda` took 10.5 s for Llama-3.1-70B's 28672 channels, 0.9 s of it arithmetic.
GREEDY_STEP = 3e-4


@dataclass(frozen=True)
class Run:
    """The inputs of the estimates."""

    settings: PlanSettings
    shape: ModelShape
    size: LayerSizes
    source_item: int
    item: int  # bytes per number of the calibration's dtype
    parameters: int  # of the source
    vocabulary: int
    context: int
    components: tuple[Component, ...] = COMPONENTS  # that may be cut

    @property
    def seq_len(self) -> int:
        return known_seq_len(self.settings.seq_len)

    @property
    def on_gpu(self) -> bool:
        return self.settings.devices != "cpu"

    @property
    def sizes(self) -> list[LayerSizes]:
        return [self.size] * self.shape.layers

    @property
    def kept_parameters(self) -> int:
        return self.parameters - costs.removed_parameters(self.shape, self.sizes)

    @property
    def full_mlp(self) -> bool:
        return self.settings.mlp_stats == "full"

    def solves(self, method: str) -> bool:
        """Return whether the statistics suffice for `method`: diagonal ones suffice only for the paper's."""
        return self.full_mlp or method == "paper"

    @property
    def tokens(self) -> int:
        return self.settings.samples * self.seq_len

    @property
    def batch(self) -> int:
        """Return the batch size: that of `auto` on a CPU; on a GPU the minimum, one: it depends on free memory."""
        automatic = 1 if self.on_gpu else min(self.settings.samples, costs.cpu_batch(self.seq_len))
        return self.settings.batch_size or automatic


@dataclass(frozen=True)
class DiskBytes:
    """Bytes in the work folder, and of the export.

    `solution` is that of `best` if the statistics allow it; `solution_sequential` is the peak with `--sequential`.
    `gradients` are files that `a3 solve` has before it writes a solution.
    """

    statistics_per_layer: int
    statistics: int
    hidden_states: int
    gradients: int
    solution: int
    solution_paper: int
    solution_sequential: int
    export: int


@dataclass(frozen=True)
class DeviceBytes:
    """Peak bytes on a device during calibration."""

    layer: int
    batch: int
    moments: int
    total: int


def estimate_disk(run: Run) -> DiskBytes:
    """Return the bytes in the work folder and of the export."""
    settings, shape = run.settings, run.shape
    solution = {method: costs.solution_bytes(shape, run.size, method) * shape.layers for method in METHODS}
    layer = costs.statistics_bytes(shape, settings.samples, run.seq_len, full_mlp=run.full_mlp)
    return DiskBytes(
        statistics_per_layer=layer,
        statistics=layer * shape.layers,
        hidden_states=2 * costs.hidden_state_bytes(shape, settings.samples, run.seq_len, run.item),
        gradients=costs.gradient_bytes(shape, settings.samples, run.seq_len, run.item),
        solution=solution["best" if run.solves("best") else "paper"],
        solution_paper=solution["paper"],
        solution_sequential=costs.corrected_bytes(shape, run.size, "best", REFIT_ROUNDS) * shape.layers
        + correction_costs.stream_bytes(shape, settings.samples, run.seq_len, run.item),
        export=run.kept_parameters * run.source_item,
    )


def estimate_device_memory(run: Run) -> DeviceBytes:
    """Return the peak during calibration, per process and, with several devices, per device."""
    shape, settings = run.shape, run.settings
    layer = costs.layer_bytes(shape, run.item)
    batch = run.batch * costs.block_bytes(shape, run.item, run.seq_len, on_cpu=not run.on_gpu)
    moments = costs.gathered_bytes(shape, settings.samples, run.seq_len, full_mlp=run.full_mlp)
    return DeviceBytes(layer, batch, moments, total=layer + batch + moments)


def estimate_ram(run: Run) -> dict[str, int]:
    """Return the peak resident set of each stage's process, including mapped pages of the source."""
    shape, item, device = run.shape, run.source_item, estimate_device_memory(run)
    mapped = costs.layer_bytes(shape, item)
    batch = run.batch * run.seq_len * shape.hidden_size * run.item
    packed = shape.mlps * costs.triangle(shape.intermediate_size) * 4 if run.full_mlp else 0
    calibrate = mapped + 2 * packed + 2 * batch if run.on_gpu else mapped + device.total
    at_once = min(os.cpu_count() or 1, shape.layers) if costs.side_by_side(shape) else 1
    solve = {
        method: costs.held_bytes(shape) + at_once * (WORKSPACE[method] + costs.solve_memory(shape, run.size, method))
        for method in METHODS
    }
    solve["best"] += at_once * costs.refine_memory(shape, run.settings.samples, run.seq_len)
    corrected = (
        correction_costs.sequential_memory(shape, run.size, run.item, run.settings.samples, run.seq_len) + device.batch
    )
    solve["best --sequential"] = max(solve["best"], costs.held_bytes(shape) + corrected)
    measuring = 0 if run.on_gpu else costs.measuring_memory(shape, run.vocabulary, run.item)
    measured = costs.held_bytes(shape) + measuring
    solve = {method: max(needed, measured) for method, needed in solve.items()}
    largest = shape.hidden_size * shape.intermediate_size * item
    imports = IMPORTS[torch_build()]
    return {
        "calibrate": imports + calibrate,
        **{f"solve --method {method}": imports + needed for method, needed in solve.items() if run.solves(method)},
        "export": imports + costs.solution_bytes(shape, run.size, "best") + largest,
    }


def torch_build() -> str:
    """Return which torch build is installed, without importing it: on Linux the default build supports GPUs."""
    return "cuda" if sys.platform == "linux" and not version("torch").endswith("+cpu") else "cpu"


def estimate_seconds(run: Run, rates: Rates) -> dict[str, float]:
    """Return the seconds of each stage for computing, reading, writing and hashing; prefetched reads cost nothing."""
    settings, shape = run.settings, run.shape
    flops = costs.calibration_flops_per_token(shape, run.seq_len, full_mlp=run.full_mlp)
    share = settings.num_processes if run.on_gpu else 1  # on a CPU, processes share its cores
    compute = run.tokens * shape.layers * flops / (rates.compute * share)
    read = costs.layer_bytes(shape, run.source_item) * shape.layers / rates.disk
    disk = estimate_disk(run)
    statistics, hidden = disk.statistics, disk.hidden_states * shape.layers
    kept = (statistics + hidden) / rates.disk + statistics / (HASH_GBPS * 1e9)
    checked = statistics / rates.disk + statistics / (HASH_GBPS * 1e9)
    moved = run.parameters * run.source_item + disk.export
    measured = costs.measuring_flops(shape, run.sizes, run.vocabulary, run.seq_len) / rates.compute
    swept = costs.gradient_flops(shape, run.vocabulary, settings.samples, run.seq_len) / rates.compute
    both = max(swept, 2 * read) + max(measured, 2 * read)
    spent = {
        "calibrate": max(compute, read) + kept,
        **{
            f"solve --method {method}": checked + shape.layers * of_layer + both
            for method, of_layer in layer_seconds(run, rates).items()
            if run.solves(method)
        },
        "export": max(moved / rates.disk, disk.export / (HASH_GBPS * 1e9)),
    }
    beside = {stage: shape.layers * needed * rates.start / STARTUP for stage, needed in LAYER_SECONDS.items()}
    return {stage: rates.start + beside.get(stage, 0.0) + found for stage, found in spent.items()}


def layer_seconds(run: Run, rates: Rates) -> dict[str, float]:
    """Return the seconds of one layer's arithmetic for each method.

    Matrices of head size stay on the CPU. A GPU gets the channel selection and the refits of `best`, and sampled
    attention, whose products are so small that they run at a fraction of its speed.
    """
    shape, settings, cut = run.shape, run.settings, "qk" in run.components
    head_multiple = settings.head_multiple if cut else shape.head_dim + 1  # without a rank for RoPE slots
    paper, best = costs.paper_flops(shape), costs.best_flops(shape, run.size, head_multiple)
    refine = REFINING * costs.refine_flops(shape, run.size, settings.samples, run.seq_len) * cut
    # In float32: twice as fast as float64 on a CPU, about as fast on a GPU without tensor cores.
    correct = CORRECTING * correction_costs.sequential_flops(
        shape, run.size, REFIT_ROUNDS, settings.samples, run.seq_len
    )
    if not run.on_gpu:
        refined = (best + refine) / rates.solve
        return {
            "paper": paper / rates.solve,
            "best": refined,
            "best --sequential": refined + correct / (2 * rates.solve),
        }
    large = costs.best_flops(shape, run.size, shape.head_dim + 1) - paper  # without a rank for RoPE slots
    on_cpu = SOLVE_TFLOPS["cpu"] * 1e12
    on_gpu = (large + refine) / rates.solve + shape.intermediate_size * GREEDY_STEP
    refined = (best - large) / on_cpu + on_gpu
    return {"paper": paper / on_cpu, "best": refined, "best --sequential": refined + correct / rates.solve}
