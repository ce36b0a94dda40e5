"""The config.json of an export: that of the source, with the changes that the solution makes."""

from dataclasses import replace

from a3cli.models.config import BOUNDS
from a3cli.models.families import Family, per_layer_config
from a3cli.models.model import Model
from a3cli.models.rope import (
    ROPE_KEYS,
    both_spellings,
    kept_parameters,
    kept_rope_config,
    spellings_of_two,
    strict_longrope,
)
from a3cli.models.shipped import module_name
from a3cli.settings import ExportSettings
from a3cli.stages.as_llama import as_llama
from a3cli.stages.solution import Solution
from a3cli.work.files import Json

STATED = (*BOUNDS, "max_position_embeddings")


def compressed_config(model: Model, solution: Solution, settings: ExportSettings) -> Json:
    """Return the source's config.json with the changes of the solution."""
    changes = per_layer_changes(model, solution) if solution.per_layer else stock_changes(model, solution)
    if settings.as_type:  # whose class may have another default
        changes = both_spellings(model.rope.parameters) | changes
    if solution.manifest.context != model.rope.context:  # lowered by --context
        changes["max_position_embeddings"] = solution.manifest.context
    if model.family.strict_longrope:
        changes = strict_longrope(changes)
    gone = ROPE_KEYS if ROPE_KEYS & changes.keys() else set()
    if model.wrapper is not None:  # its configuration may leave to the class what runtimes and a3 read
        changes = {key: getattr(model.config, key) for key in STATED if key not in model.source.config} | changes
    config = {key: value for key, value in model.source.config.items() if key not in gone} | changes
    if experts := model.family.experts:  # transformers 4.57 knows only the first name
        config[experts.count[0]] = model.shape.experts
    if settings.dtype != "source":
        config.pop("torch_dtype", None)
        config["dtype"] = settings.dtype
    if model.wrapper is not None:
        return model.wrapper.with_decoder(model.source.raw_config, config)
    return as_llama(model, config) if settings.as_type else config


def stock_changes(model: Model, solution: Solution) -> Json:
    """Return one head size and MLP width for all layers and, if heads are smaller, the new RoPE."""
    sizes = solution.sizes[0]
    changes: Json = {model.family.names.get("intermediate_size", "intermediate_size"): sizes.mlp}
    if model.source.stored_otherwise and model.wrapper is None:  # config.json names only the decoder's class
        changes["architectures"] = [model.stock.name]
    if sizes.qk < model.shape.head_dim:
        return changes | {"head_dim": sizes.qk, **smaller_rope(model, solution)}
    return changes | lowered_rope(model, solution)


def smaller_rope(model: Model, solution: Solution) -> Json:
    """Return the RoPE of smaller heads, in both spellings, of each type of attention that has its own."""
    linear_factor = solution.manifest.request.settings.rope_form == "linear"
    kept = [
        kept_parameters(
            replace(model.table_of(group[0]), context=solution.manifest.context),
            solution.slots(group[0]),
            linear_factor=linear_factor,
        )
        for group in model.layers_by_table()
    ]
    if model.local_rope is None:
        return both_spellings(kept[0])
    # A type of attention that no layer has is not read.
    return spellings_of_two(kept[0], kept[-1])


def per_layer_changes(model: Model, solution: Solution) -> Json:
    """Return `per_layer_config` for transformers 5, and the `auto_map` of the code that builds the layers.

    `head_dim` stays the source's: it defines the pairs that `rope_slots` refers to, and the softmax scale. Without RoPE
    the class computes it.
    """
    rope = {} if model.rope.absent else whole_rope(model) | lowered_rope(model, solution)
    return {
        "architectures": [model.family.per_layer_class],
        "auto_map": auto_map(model.family),
        **({} if model.rope.absent else {"head_dim": model.shape.head_dim}),
        **logit_scale(model),
        "per_layer_config": per_layer_config(solution.sizes, [solution.slots(i) for i in range(model.shape.layers)]),
        **rope,
    }


def logit_scale(model: Model) -> Json:
    """Return the factor on logits if config.json has a divisor: vLLM's Transformers backend reads only the factor."""
    scaling = model.source.config.get("logits_scaling")
    return {} if scaling is None else {"logit_scale": 1 / scaling}


def auto_map(family: Family) -> Json:
    """Return the classes in the exported code by auto class; vLLM's Transformers backend needs the second one."""
    causal = f"{module_name(family.model_type)}.{family.per_layer_class}"
    return {"AutoModelForCausalLM": causal, "AutoModel": causal.replace("ForCausalLM", "Model")}


def whole_rope(model: Model) -> Json:
    """Return the source's RoPE in both spellings."""
    if model.local_rope is None:
        return both_spellings(model.rope.parameters)
    return spellings_of_two(model.rope.parameters, model.local_rope.parameters)


def lowered_rope(model: Model, solution: Solution) -> Json:
    """Return RoPE of all pairs if `--context` lowered `max_position_embeddings`, on which some RoPE types depend."""
    if model.local_rope is not None:  # none of the types that `check_local_rope` allows
        return {}
    context, pairs = solution.manifest.context, range(len(model.rope.short))
    return {} if context == model.rope.context else kept_rope_config(replace(model.rope, context=context), pairs)
