"""Estimate the sizes, disk, memory and time of a run, and list the runtimes that load the result.

The figures follow from config.json. The weights' headers are checked as in `a3 calibrate` if they can be read without a
download; torch is imported only for that and to measure speeds.
"""

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from a3cli.errors import A3Error
from a3cli.models import costs
from a3cli.models.config import check_bounds, check_rope, check_rope_spellings, read_shape
from a3cli.models.families import Family, LayerSizes, ModelShape, family_of
from a3cli.models.hub import (
    ADAPTER,
    INDEX,
    SINGLE,
    find_folder,
    has_weights,
    read_config,
    read_index,
    read_remote_tensors,
    refuse_adapter,
    refuse_per_layer,
)
from a3cli.runtimes import Verdict, judge, tokenizer_class_of
from a3cli.settings import PlanSettings
from a3cli.work.files import Json

METHODS = ("paper", "best")
ITEMSIZES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
# Defaults for an unknown machine: a solid-state disk, a desktop's cores, one data-centre GPU.
DISK_GBPS = 2.0
TFLOPS = {"cpu": 0.3, "cuda": 200.0}
SOLVE_TFLOPS = {"cpu": 0.15, "cuda": 10.0}  # float64
HASH_GBPS = 2.5  # BLAKE3 on one core
# Resident bytes of a process with torch, transformers and datasets; far more for a torch build with GPU support:
# from 0.85 to 1.19 GB, since the system maps more or less of its libraries' files.
IMPORTS = {"cpu": 410_000_000, "cuda": 1_020_000_000}
WORKSPACE = {"paper": 0, "best": 40_000_000}  # bytes of linear algebra's workspace in each thread
REFIT_ROUNDS = 2  # of the sequential correction: the default of `a3 solve`
CORRECTING = 1.3  # time of the sequential correction relative to its FLOPs: activations, and files between its passes
REFINING = 2.0  # time of sampled attention relative to its FLOPs: softmax and other steps
NEEDED = "import a3cli.stages.calibrate; from transformers import AutoTokenizer, LlamaConfig; LlamaConfig()"
STARTUP = 4.2  # seconds until a stage starts to work
# Seconds of a layer beside its arithmetic, for this start time: files, and steps too small to fill a core.
LAYER_SECONDS = {"calibrate": 0.2, "solve --method best": 1.9, "solve --method best --sequential": 1.9}
# Seconds per channel of greedy selection on a GPU: sequential steps, each with some launches of tiny kernels.
# An upper bound, measured on an H200 when each step still waited for the device: `benchmarks/solve_layer.py --device
# cuda` took 10.5 s for Llama-3.1-70B's 28672 channels, 0.9 s of it arithmetic.
GREEDY_STEP = 3e-4


class DecoderConfig(BaseModel):
    """The entries of config.json that a plan needs, with the defaults of transformers' classes."""

    # Strict: a3cli/runtimes reads the same entries from the file.
    # Protected namespaces: older pydantic does not allow field names that start with model_.
    model_config = ConfigDict(strict=True, protected_namespaces=())

    model_type: str
    vocab_size: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt | None = None
    head_dim: PositiveInt | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    use_bias: bool = True
    tie_word_embeddings: bool | None = None
    max_position_embeddings: PositiveInt | None = None
    rope_parameters: Json | None = None
    rope_scaling: Json | None = None
    partial_rotary_factor: float | None = None
    dtype: str | None = None
    torch_dtype: str | None = None


@dataclass(frozen=True)
class Rates:
    """Seconds to start a stage, disk bytes per second, FLOPs per second in the calibration's dtype and in float64.

    `origin` says where each comes from.
    """

    start: float
    disk: float
    compute: float
    solve: float
    origin: Json


@dataclass(frozen=True)
class Run:
    """The inputs of the estimates."""

    settings: PlanSettings
    shape: ModelShape
    size: LayerSizes
    source_item: int
    item: int  # bytes per number of the calibration's dtype
    parameters: int  # of the source

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
        return self.settings.samples * self.settings.seq_len

    @property
    def batch(self) -> int:
        """Return the batch size: that of `auto` on a CPU; on a GPU the minimum, one: it depends on free memory."""
        automatic = 1 if self.on_gpu else min(self.settings.samples, costs.cpu_batch(self.settings.seq_len))
        return self.settings.batch_size or automatic


def plan(settings: PlanSettings) -> Json:
    """Return the figures of one run.

    Raises A3Error for a model that does not exist or is not supported, for weights that a3 calibrate would refuse, and
    for a budget that rounding does not allow.
    """
    folder = find_folder(settings.model, settings.revision, files=("config.json", INDEX, ADAPTER))
    config = read_config(folder, settings.model)
    refuse_per_layer(config, settings.model)
    refuse_adapter(folder)
    family = family_of(config.get("model_type"))
    decoder = read_decoder(config, folder)
    shape = read_shape(decoder)
    check_bounds(shape, decoder.vocab_size)
    check_rope(decoder.rope_parameters or decoder.rope_scaling or {}, partial=family.rotary_factor is not None)
    check_rope_spellings(config, folder / "config.json")
    if decoder.max_position_embeddings and settings.seq_len > decoder.max_position_embeddings:
        raise A3Error(
            f"--seq-len {settings.seq_len} is longer than the context of {settings.model} "
            f"({decoder.max_position_embeddings}); lower it"
        )
    dtype = decoder.dtype or decoder.torch_dtype or "float32"
    if dtype not in ITEMSIZES:
        raise A3Error(f"{folder / 'config.json'}: dtype {dtype!r} is not one of {', '.join(ITEMSIZES)}")
    weights = check_weights(settings, folder, config)
    compute = settings.dtype if settings.dtype != "auto" else "float32" if settings.devices == "cpu" else dtype
    run = Run(
        settings,
        shape,
        choose_sizes(settings, shape),
        ITEMSIZES[dtype],
        ITEMSIZES[compute],
        count_parameters(decoder, shape, family),
    )
    rates = find_rates(settings, compute)
    return {
        "model": settings.model,
        "model_type": decoder.model_type,
        "weights": weights,
        "dtype": dtype,
        "layers": shape.layers,
        **describe_model(run),
        "disk_bytes": disk(run),
        "device_memory_bytes": device_memory(run),
        "peak_ram_bytes": peak_ram(run),
        "seconds": seconds(run, rates),
        "machine": {
            "devices": settings.devices,
            "num_processes": settings.num_processes,
            "batch_size": run.batch,
            "batch_size_is": "the least" if run.on_gpu and not settings.batch_size else "taken",
            "calibration_dtype": compute,
            "start_seconds": rates.start,
            "disk_gbps": rates.disk / 1e9,
            "tflops": rates.compute / 1e12,
            "solve_tflops": rates.solve / 1e12,
            "rates_are": rates.origin,
        },
        "runtimes": [asdict(verdict) for verdict in judge_plan(config, folder, run)],
    }


def read_decoder(config: Json, folder: Path) -> DecoderConfig:
    """Return the entries of config.json. Raises A3Error naming all that are missing or impossible."""
    try:
        return DecoderConfig.model_validate(config)
    except ValidationError as error:
        problems = sorted(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise A3Error(f"{folder / 'config.json'} is not a valid configuration: {'; '.join(problems)}") from None


def check_weights(settings: PlanSettings, folder: Path, config: Json) -> Json:
    """Check the weights as a3 calibrate does, as far as possible without a download; return how far that was.

    `checked` is `tensors` (names, shapes and dtypes), `names` or `nothing`, and `reason` says why it is not more.
    """
    local = Path(settings.model).is_dir()
    if has_weights(folder) or (local and any(folder.glob("*.safetensors"))):
        from a3cli.models.checkpoint import Checkpoint
        from a3cli.models.model import describe

        describe(Checkpoint(folder, name=settings.model, follow_symlinks=settings.follow_symlinks))
        return {"checked": "tensors", "reason": None}
    names = dict.fromkeys(read_index(folder)) if (folder / INDEX).is_file() else {}
    reason = f"no safetensors weights in {folder}"
    if not local:
        try:
            found = read_remote_tensors(settings.model, folder.name)
        except A3Error as error:
            reason = str(error)
        else:
            check_remote(settings.model, folder, config, found, names)
            return {"checked": "tensors", "reason": None}
    if not names:
        return {"checked": "nothing", "reason": reason}
    from a3cli.models.model import check_tensors

    check_tensors(folder, config, settings.model, names)
    return {"checked": "names", "reason": reason}


def check_remote(
    model: str, folder: Path, config: Json, found: dict[str, tuple[str, tuple[int, ...]]], indexed: Json
) -> None:
    """Check weights on the Hub as a3 calibrate does, and that the index names them. Raises A3Error."""
    from a3cli.models.checkpoint import find_dtype
    from a3cli.models.model import check_tensors

    if indexed and (differing := sorted(found.keys() ^ indexed.keys())):
        raise A3Error(
            f"{model}: {SINGLE} and {INDEX} hold different tensors (only one has {differing[0]}), and loaders "
            "differ in which they read; use another revision, or a local copy without the wrong one"
        )
    for name, (dtype, _) in found.items():
        find_dtype(dtype, name, model)
    check_tensors(folder, config, model, {name: shape for name, (_, shape) in found.items()})


def choose_sizes(settings: PlanSettings, shape: ModelShape) -> LayerSizes:
    found = costs.uniform_sizes(
        shape, settings.budget, head_multiple=settings.head_multiple, mlp_multiple=settings.mlp_multiple
    )
    if found is None:
        raise A3Error(
            f"budget {settings.budget} cannot be reached with head multiple {settings.head_multiple} and MLP multiple "
            f"{settings.mlp_multiple}; lower the budget or the multiples"
        )
    return found


def count_parameters(decoder: DecoderConfig, shape: ModelShape, family: Family) -> int:
    """Count all parameters: linear weights and biases, norms, embedding, and output layer unless tied."""
    biases = costs.bias_parameters(shape, shape.sizes)
    output_bias = shape.attention_bias and not family.qkv_bias
    fixed_biases = (int(output_bias) + int(shape.mlp_bias)) * shape.hidden_size * shape.layers
    norms = (2 * shape.layers + 1) * shape.hidden_size * (2 if family.norm_bias else 1)
    tied = family.tied if decoder.tie_word_embeddings is None else decoder.tie_word_embeddings
    tables = (1 if tied else 2) * decoder.vocab_size * shape.hidden_size
    return costs.linear_weights(shape, shape.sizes) + biases + fixed_biases + norms + tables


def judge_plan(config: Json, folder: Path, run: Run) -> list[Verdict]:
    """Return which runtimes will load the export; of a stock one with smaller heads, if its RoPE has to be longrope."""
    smaller_heads = run.size.qk < run.shape.head_dim
    planned = planned_config(config, run)
    return judge(planned, smaller_heads=smaller_heads, tokenizer_class=tokenizer_class_of(folder))


def planned_config(config: Json, run: Run) -> Json:
    """Return the entries of the export's config.json that decide which runtimes load it."""
    if run.settings.shape == "per-layer":
        return {**config, "head_dim": run.shape.head_dim, "per_layer_config": {}}
    if run.size.qk == run.shape.head_dim:
        return config
    return {**config, "head_dim": run.size.qk, "rope_parameters": {"rope_type": "longrope"}}


def describe_model(run: Run) -> Json:
    shape, before, after, item = run.shape, run.shape.sizes, run.sizes, run.source_item
    total, seq_len = costs.linear_weights(shape, before), run.settings.seq_len

    def pair(old: int, new: int) -> Json:
        return {"before": old, "after": new}

    return {
        "shape": run.settings.shape,
        "budget_asked": run.settings.budget,
        "budget_reached": (total - costs.linear_weights(shape, after)) / total,
        "head_size": pair(shape.head_dim, run.size.qk),
        "mlp_width": pair(shape.intermediate_size, run.size.mlp),
        "parameters": pair(run.parameters, run.kept_parameters),
        "bytes": pair(run.parameters * item, run.kept_parameters * item),
        "kv_bytes_per_token": pair(*(costs.kv_bytes_per_token(shape, each, item) for each in (before, after))),
        "prefill_flops_per_token": {
            "seq_len": seq_len,
            **pair(*(costs.prefill_flops_per_token(shape, each, seq_len) for each in (before, after))),
        },
    }


def disk(run: Run) -> Json:
    """Return the bytes in the work folder and of the export.

    `solution` is that of `best` if the statistics allow it; `solution_sequential` is the peak with `--sequential`.
    """
    settings, shape = run.settings, run.shape
    solution = {method: costs.solution_bytes(shape, run.size, method) * shape.layers for method in METHODS}
    layer = costs.statistics_bytes(shape, settings.samples, settings.seq_len, full_mlp=run.full_mlp)
    return {
        "statistics_per_layer": layer,
        "statistics": layer * shape.layers,
        "hidden_states": 2 * costs.hidden_state_bytes(shape, settings.samples, settings.seq_len, run.item),
        "solution": solution["best" if run.solves("best") else "paper"],
        "solution_paper": solution["paper"],
        "solution_sequential": costs.corrected_bytes(shape, run.size, "best", REFIT_ROUNDS) * shape.layers
        + costs.stream_bytes(shape, settings.samples, settings.seq_len, run.item, REFIT_ROUNDS),
        "export": run.kept_parameters * run.source_item,
    }


def device_memory(run: Run) -> Json:
    """Return the peak during calibration, per process and, with several devices, per device."""
    shape, settings = run.shape, run.settings
    parts = {
        "layer": costs.layer_bytes(shape, run.item),
        "batch": run.batch * costs.block_bytes(shape, run.item, settings.seq_len, on_cpu=not run.on_gpu),
        "moments": costs.gathered_bytes(shape, settings.samples, settings.seq_len, full_mlp=run.full_mlp),
    }
    return {**parts, "total": sum(parts.values())}


def peak_ram(run: Run) -> Json:
    """Return the peak resident set of each stage's process, including mapped pages of the source."""
    shape, item = run.shape, run.source_item
    mapped = costs.layer_bytes(shape, item)
    batch = run.batch * run.settings.seq_len * shape.hidden_size * run.item
    packed = costs.triangle(shape.intermediate_size) * 4 if run.full_mlp else 0
    calibrate = mapped + 2 * packed + 2 * batch if run.on_gpu else mapped + device_memory(run)["total"]
    at_once = min(os.cpu_count() or 1, shape.layers) if costs.side_by_side(shape) else 1
    solve = {
        method: costs.held_bytes(shape) + at_once * (WORKSPACE[method] + costs.solve_memory(shape, run.size, method))
        for method in METHODS
    }
    solve["best"] += at_once * costs.refine_memory(shape, run.settings.samples, run.settings.seq_len)
    corrected = costs.sequential_memory(shape, run.size, run.item) + device_memory(run)["batch"]
    solve["best --sequential"] = max(solve["best"], costs.held_bytes(shape) + corrected)
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


def seconds(run: Run, rates: Rates) -> Json:
    """Return the seconds of each stage for computing, reading, writing and hashing; prefetched reads cost nothing."""
    settings, shape = run.settings, run.shape
    flops = costs.calibration_flops_per_token(shape, settings.seq_len, full_mlp=run.full_mlp)
    share = settings.num_processes if run.on_gpu else 1  # on a CPU, processes share its cores
    compute = run.tokens * shape.layers * flops / (rates.compute * share)
    read = costs.layer_bytes(shape, run.source_item) * shape.layers / rates.disk
    places = disk(run)
    statistics, hidden = places["statistics"], places["hidden_states"] * shape.layers
    kept = (statistics + hidden) / rates.disk + statistics / (HASH_GBPS * 1e9)
    checked = statistics / rates.disk + statistics / (HASH_GBPS * 1e9)
    moved = run.parameters * run.source_item + places["export"]
    spent = {
        "calibrate": max(compute, read) + kept,
        **{
            f"solve --method {method}": checked + shape.layers * of_layer
            for method, of_layer in solving(run, rates).items()
            if run.solves(method)
        },
        "export": max(moved / rates.disk, places["export"] / (HASH_GBPS * 1e9)),
    }
    beside = {stage: shape.layers * needed * rates.start / STARTUP for stage, needed in LAYER_SECONDS.items()}
    return {stage: rates.start + beside.get(stage, 0.0) + found for stage, found in spent.items()}


def solving(run: Run, rates: Rates) -> dict[str, float]:
    """Return the seconds of one layer's arithmetic for each method.

    Matrices of head size stay on the CPU. A GPU gets the channel selection and the refits of `best`, and sampled
    attention, whose products are so small that they run at a fraction of its speed.
    """
    shape, settings, head_multiple = run.shape, run.settings, run.settings.head_multiple
    paper, best = costs.paper_flops(shape), costs.best_flops(shape, run.size, head_multiple)
    refine = REFINING * costs.refine_flops(shape, run.size, settings.samples, settings.seq_len)
    # In float32: twice as fast as float64 on a CPU, about as fast on a GPU without tensor cores.
    correct = (
        CORRECTING * run.tokens * costs.sequential_flops_per_token(shape, run.size, REFIT_ROUNDS, settings.seq_len)
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


def find_rates(settings: PlanSettings, dtype: str) -> Rates:
    """Return the given rates; others are measured with `--measure`, or assumed."""
    kind = settings.devices.partition(":")[0].partition(",")[0]
    stated = {
        "start": settings.start_seconds,
        "disk": settings.disk_gbps,
        "compute": settings.tflops,
        "solve": settings.solve_tflops,
    }
    assumed = {"start": STARTUP, "disk": DISK_GBPS, "compute": TFLOPS[kind], "solve": SOLVE_TFLOPS[kind]}
    found, origin = {}, {}
    for name, value in stated.items():
        if value is not None:
            found[name], origin[name] = value, "stated"
        elif settings.measure:
            found[name], origin[name] = measure(name, kind, dtype), "measured"
        else:
            found[name], origin[name] = assumed[name], "assumed"
    return Rates(found["start"], found["disk"] * 1e9, found["compute"] * 1e12, found["solve"] * 1e12, origin)


def measure(what: str, kind: str, dtype: str) -> float:
    """Measure the seconds to start a stage, GB/s of the current folder's disk, or TFLOP/s of matrix products."""
    if what == "start":
        return min(start_time() for _ in range(2))  # the first one may read everything from the disk
    if what == "disk":
        return disk_speed(Path.cwd()) / 1e9
    return product_speed(kind, dtype if what == "compute" else "float64") / 1e12


def start_time() -> float:
    """Return the seconds in which a process imports the libraries that every stage needs."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", NEEDED], check=True, capture_output=True)  # noqa: S603, our own line
    return time.perf_counter() - started


def disk_speed(folder: Path, size: int = 1 << 28) -> float:
    """Return bytes per second of writing as an export does and reading back, the slower of the two."""
    from a3cli.work.writer import HashingWriter

    part = os.urandom(1 << 20)
    with tempfile.TemporaryDirectory(prefix=".a3-plan-", dir=folder) as own:
        path = Path(own) / "file"
        started = time.perf_counter()
        with HashingWriter(path) as written:
            for _ in range(size // len(part)):
                written.write(part)
        wrote = time.perf_counter() - started
        with path.open("rb", buffering=0) as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            started = time.perf_counter()
            while file.read(len(part)):
                pass
            return size / max(wrote, time.perf_counter() - started)


def product_speed(kind: str, dtype: str) -> float:
    """Return FLOPs per second of products of square matrices. Raises A3Error for a missing device."""
    import torch

    if kind == "cuda" and not torch.cuda.is_available():
        raise A3Error("--measure: this machine has no CUDA device; give --tflops and --solve-tflops, or --devices cpu")
    size = 8192 if kind == "cuda" else 2048  # fills the device
    matrix = torch.randn(size, size, dtype=torch.float32, device=kind).to(getattr(torch, dtype))
    done, elapsed = 0, 0.0
    (matrix @ matrix)[0, 0].item()  # warm up
    started = time.perf_counter()
    while elapsed < 0.5:
        product = matrix @ matrix
        product[0, 0].item()  # waits for a GPU
        done, elapsed = done + 1, time.perf_counter() - started
    return 2 * size**3 * done / elapsed
