"""Estimate the sizes, disk, memory and time of a run, and list the runtimes that load the result.

The figures follow from config.json. The weights' headers are checked as in `a3 calibrate` if they can be read without a
download.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from a3cli.errors import A3Error
from a3cli.models import costs
from a3cli.models.checkpoint import Checkpoint, find_dtype
from a3cli.models.config import check_sizes, read_shape
from a3cli.models.families import Family, LayerSizes, ModelShape, decoder_config, family_for, usual_entries
from a3cli.models.families.wrappers import wrapper_of
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
from a3cli.models.model import describe, own_names, read_stock
from a3cli.models.stock import Shape, StockClass, match_tensors
from a3cli.report.figures import describe_budgets
from a3cli.report.serving import ITEMSIZES, Serving
from a3cli.runtimes import Verdict, judge, tokenizer_class_of
from a3cli.settings import Component, PlanSettings
from a3cli.settings.budgets import DEFAULT_BUDGET, budget_problems, given_budgets
from a3cli.settings.seq_len import resolved_seq_len
from a3cli.solvers.allocate import sizes
from a3cli.stages.allowed import check_heads, check_shape
from a3cli.stages.as_llama import could_be_llama
from a3cli.stages.context import width_problem
from a3cli.stages.estimates import Run, estimate_device_memory, estimate_disk, estimate_ram, estimate_seconds
from a3cli.stages.rates import Rates, find_rates
from a3cli.stages.rounding import planned_warnings
from a3cli.stages.sizes import Stored, check_budgets, default_components, planned_size, why_whole
from a3cli.work.files import Json


@dataclass(frozen=True)
class Weights:
    """The tensors that were found without a download; only their names where the headers could not be read.

    `checked` is `tensors` (names, shapes and dtypes), `names` or `nothing`; `reason` says why it is not more.
    """

    checked: Literal["tensors", "names", "nothing"]
    reason: str | None
    tensors: Mapping[str, Shape | None]


def plan(settings: PlanSettings) -> Json:
    """Return the figures of one run.

    Raises A3Error for a model that does not exist or is not supported, for weights that a3 calibrate would refuse, and
    for a budget that rounding does not allow.
    """
    settings = with_budget(settings)
    folder = find_folder(settings.model, settings.revision, files=("config.json", INDEX, ADAPTER))
    raw = read_config(folder, settings.model)
    check_config(raw, folder, settings)
    config, stock, weights = open_model(settings, folder, raw)
    family, raw = family_for(raw), decoder_config(raw)
    settings = for_model(settings, config)
    dtype = read_dtype(raw, folder)
    compute = settings.dtype if settings.dtype != "auto" else "float32" if settings.devices == "cpu" else dtype
    shape = read_shape(config)
    parameters, item = count_parameters(stock), ITEMSIZES[dtype]
    stored = Stored(parameters, parameters * item, item)
    size, components = choose_sizes(settings, shape, stored, family), default_components(settings, family)
    context = config.max_position_embeddings
    run = Run(settings, shape, size, item, ITEMSIZES[compute], parameters, config.vocab_size, context, components)
    rates = find_rates(settings, compute)
    return {
        "model": settings.model,
        "model_type": config.model_type,
        "weights": {"checked": weights.checked, "reason": weights.reason},
        "dtype": dtype,
        "layers": shape.layers,
        "components": list(components),
        "whole_heads": why_whole(settings, components, family),
        **describe_model(run),
        "disk_bytes": asdict(estimate_disk(run)),
        "device_memory_bytes": asdict(estimate_device_memory(run)),
        "peak_ram_bytes": estimate_ram(run),
        "seconds": estimate_seconds(run, rates),
        "machine": describe_machine(run, rates, compute),
        "runtimes": [asdict(verdict) for verdict in judge_plan(raw, folder, run, family)],
        "warnings": planned_warnings(settings, shape, size, stored, family),
    }


def with_budget(settings: PlanSettings) -> PlanSettings:
    """Return settings that have a budget. Raises A3Error for budgets that contradict each other."""
    if not given_budgets(settings):
        return settings.model_copy(update={"budget": DEFAULT_BUDGET})
    if problems := budget_problems(settings):
        raise A3Error("bad settings: " + "; ".join(problems))
    return settings


def check_config(raw: Json, folder: Path, settings: PlanSettings) -> None:
    """Raise A3Error for a model that a3 does not compress, and for sizes that no model has."""
    refuse_per_layer(raw, settings.model)
    refuse_adapter(folder)
    check_shape(settings, family_for(raw))
    if wrapper_of(raw) is None:  # the class of a wrapper may have defaults of its own for sizes
        check_sizes(usual_entries(raw))


def open_model(settings: PlanSettings, folder: Path, raw: Json) -> tuple[Any, StockClass, Weights]:
    """Return transformers' configuration and class, and the weights that were checked against them as far as possible.

    Raises A3Error if a3 calibrate would refuse them.
    """
    if has_weights(folder) or (Path(settings.model).is_dir() and any(folder.glob("*.safetensors"))):
        model = describe(Checkpoint(folder, name=settings.model, follow_symlinks=settings.follow_symlinks))
        return model.config, model.stock, Weights("tensors", None, model.stock.shapes)
    weights = find_weights(settings.model, folder)
    config, stock = read_stock(folder, raw, settings.model, tensors=len(weights.tensors) or None)
    if weights.tensors:
        match_tensors(stock, own_names(weights.tensors, wrapper_of(raw), settings.model), settings.model)
    return config, stock, weights


def find_weights(model: str, folder: Path) -> Weights:
    """Return the tensors that headers on the Hub describe, or else those that the index names."""
    indexed: dict[str, None] = dict.fromkeys(read_index(folder)) if (folder / INDEX).is_file() else {}
    reason = f"no safetensors weights in {folder}"
    if not Path(model).is_dir():
        try:
            found = read_remote_tensors(model, folder.name)
        except A3Error as error:
            reason = str(error)
        else:
            check_remote(model, {name: dtype for name, (dtype, _) in found.items()}, indexed)
            return Weights("tensors", None, {name: shape for name, (_, shape) in found.items()})
    return Weights("names" if indexed else "nothing", reason, indexed)


def check_remote(model: str, dtypes: Mapping[str, str], indexed: Mapping[str, None]) -> None:
    """Raise A3Error for tensors on the Hub whose dtype a3 does not read, or that the index does not name."""
    if indexed and (differing := sorted(dtypes.keys() ^ indexed.keys())):
        raise A3Error(
            f"{model}: {SINGLE} and {INDEX} hold different tensors (only one has {differing[0]}), and loaders "
            "differ in which they read; use another revision, or a local copy without the wrong one"
        )
    for name, dtype in dtypes.items():
        find_dtype(dtype, name, model)


def for_model(settings: PlanSettings, config: Any) -> PlanSettings:
    """Return settings with the tokens per block. Raises A3Error if these are more than the model's context."""
    context = config.max_position_embeddings
    seq_len = resolved_seq_len(settings.seq_len, context)
    if seq_len > context:
        raise A3Error(f"--seq-len {seq_len} is longer than the context of {settings.model} ({context}); lower it")
    return settings.model_copy(update={"seq_len": seq_len})


def read_dtype(raw: Json, folder: Path) -> str:
    """Return the dtype that config.json states. Raises A3Error for one that a3 does not read."""
    dtype = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    if not isinstance(dtype, str) or dtype not in ITEMSIZES:
        raise A3Error(f"{folder / 'config.json'}: dtype {dtype!r} is not one of {', '.join(ITEMSIZES)}")
    return dtype


def choose_sizes(settings: PlanSettings, shape: ModelShape, stored: Stored, family: Family) -> LayerSizes:
    """Return the sizes of every layer. Raises A3Error for a budget that rounding or the family does not allow."""
    check_heads(settings, family)
    if family.experts and (problem := width_problem(settings.mlp_multiple)):
        raise A3Error(problem)
    head, mlp = settings.head_multiple, settings.mlp_multiple
    heads, widths = sizes(shape.head_dim, head), sizes(shape.intermediate_size, mlp)
    rounded: dict[Component, list[int]] = {"qk": heads, "ov": heads, "mlp": widths}
    cut = default_components(settings, family)
    allowed = {component: every if component in cut else every[-1:] for component, every in rounded.items()}
    check_budgets(settings, shape, allowed, stored, family)
    found = planned_size(settings, shape, stored, family, head, mlp)
    assert found is not None, "the budgets are within reach"
    return found


def count_parameters(stock: StockClass) -> int:
    """Count all parameters; tied ones once."""
    return sum(torch.Size(shape).numel() for name, shape in stock.shapes.items() if name not in stock.tied)


def describe_model(run: Run) -> Json:
    """Return budget, sizes, parameters and costs of the model, before and after."""
    shape, before, after, item = run.shape, run.shape.sizes, run.sizes, run.source_item
    total, seq_len = costs.linear_weights(shape, before), run.seq_len

    def pair(old: int, new: int) -> Json:
        return {"before": old, "after": new}

    served = serving(run)
    return {
        "shape": run.settings.shape,
        "budget_asked": run.settings.budget,
        "asked": describe_budgets(run.settings),
        "budget_reached": (total - costs.linear_weights(shape, after)) / total,
        "head_size": pair(shape.head_dim, run.size.qk),
        "value_head_size": pair(shape.head_dim, run.size.ov),
        "mlp_width": pair(shape.intermediate_size, run.size.mlp),
        "parameters": pair(run.parameters, run.kept_parameters),
        "bytes": pair(run.parameters * item, run.kept_parameters * item),
        "kv_bytes_per_token": pair(*(costs.kv_bytes_per_token(shape, each, item) for each in (before, after))),
        "kv_cache": {"tokens": served.tokens, **pair(*served.cache)},
        **served.plain(),
        "prefill_flops_per_token": {
            "seq_len": seq_len,
            **pair(*(costs.prefill_flops_per_token(shape, each, seq_len) for each in (before, after))),
        },
    }


def serving(run: Run) -> Serving:
    """Return what serving the model takes at its full context."""
    cache = (
        costs.kv_cache_bytes(run.shape, sizes, run.source_item, run.context) for sizes in (run.shape.sizes, run.sizes)
    )
    weights = run.parameters * run.source_item, run.kept_parameters * run.source_item
    return Serving(run.context, (next(cache), next(cache)), weights, run.settings.memory)


def describe_machine(run: Run, rates: Rates, compute: str) -> Json:
    """Return the devices, the batch size and the speeds that the estimates assume."""
    return {
        "devices": run.settings.devices,
        "num_processes": run.settings.num_processes,
        "batch_size": run.batch,
        "batch_size_is": "the least" if run.on_gpu and not run.settings.batch_size else "taken",
        "calibration_dtype": compute,
        "start_seconds": rates.start,
        "disk_gbps": rates.disk / 1e9,
        "tflops": rates.compute / 1e12,
        "solve_tflops": rates.solve / 1e12,
        "rates_are": rates.origin,
    }


def judge_plan(config: Json, folder: Path, run: Run, family: Family) -> list[Verdict]:
    """Return which runtimes will load the export; of a stock one with smaller heads, if its RoPE has to be longrope."""
    smaller_heads = run.size.qk < run.shape.head_dim
    planned = planned_config(config, run)
    return judge(
        usual_entries(planned),
        smaller_heads=smaller_heads,
        tokenizer_class=tokenizer_class_of(folder),
        could_be_llama=could_be_llama(family, run.shape.windows, run.context),
        held_by=family.held_by,
    )


def planned_config(config: Json, run: Run) -> Json:
    """Return the entries of the export's config.json that decide which runtimes load it."""
    if run.settings.shape == "per-layer":
        return {**config, "head_dim": run.shape.head_dim, "per_layer_config": {}}
    if run.size.qk == run.shape.head_dim:
        return config
    return {**config, "head_dim": run.size.qk, "rope_parameters": {"rope_type": "longrope"}}
