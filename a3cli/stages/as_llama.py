"""Write an export as a Llama, `a3 export --as llama`, where Llama's class computes the same as the source's.

Such a class differs from Llama's by biases alone: Qwen2 has them on queries, keys and values. Llama's `attention_bias`
puts one on the output projection too, which is exact as zeros. Runtimes read the head size of a Llama that they ignore
in other types (`a3cli/runtimes`).
"""

import copy
from collections.abc import Sequence

from a3cli.errors import A3Error
from a3cli.models.families import FAMILIES, Family, Role
from a3cli.models.families.base import Kind
from a3cli.models.model import Model
from a3cli.models.rope import ROPE_KEYS
from a3cli.settings import ExportSettings
from a3cli.work.files import Json

NOT_OF_LAYERS = {"_name_or_path", "transformers_version", "architectures", "model_type", "dtype", "torch_dtype"}
KINDS: tuple[Kind, Kind] = ("weight", "bias")


def check_as_type(settings: ExportSettings, family: Family | None, shape: str) -> None:
    """Raise A3Error if the settings ask for a model type that cannot hold this family or shape of export."""
    if settings.as_type is None:
        return
    if family is not None and not family.like_llama:
        exact = ", ".join(sorted(name for name, each in FAMILIES.items() if each.like_llama))
        raise A3Error(
            f"--as llama: a model of type {family.model_type!r} differs from a Llama in more than biases, so no Llama "
            f"computes the same; leave out --as, which writes {exact}"
        )
    if shape == "per-layer":
        raise A3Error(
            "--as llama: the solution has --shape per-layer, whose exports need the code in their folder under any "
            "model type; leave out --as, or solve with --shape stock"
        )


def check_windows(model: Model, context: int) -> None:
    """Raise A3Error if a layer attends through a window that is shorter than the context: Llama has none."""
    shorter = [window for window in model.shape.windows if window is not None and window < context]
    if shorter:
        raise A3Error(
            f"--as llama: {model.source.name} attends through a sliding window of {min(shorter)} tokens, less than its "
            f"context of {context}, and Llama has no windows; leave out --as, or solve with --context {min(shorter)}"
        )


def could_be_llama(family: Family, windows: Sequence[int | None], context: int) -> bool:
    """Return whether `--as llama` would write a stock export of such a source."""
    return family.like_llama and not any(window is not None and window < context for window in windows)


def as_llama(model: Model, config: Json) -> Json:
    """Return an export's config.json as one of a Llama. Raises A3Error if Llama's class refuses it.

    What only the source's class knows is left out. Entries that config.json omits are added where the default of the
    source's class is not Llama's.
    """
    from transformers import LlamaConfig

    default, own = LlamaConfig().to_dict(), type(model.config)().to_dict()
    found = {key: value for key, value in config.items() if key in default or key not in own or key in ROPE_KEYS}
    for key in sorted(default.keys() & own.keys() - config.keys() - ROPE_KEYS - NOT_OF_LAYERS):
        if (value := getattr(model.config, key)) != default[key]:
            found[key] = value
    found |= {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": has_bias(model, "q"),
        "mlp_bias": has_bias(model, "down"),
    }
    try:
        LlamaConfig(**copy.deepcopy(found))
    except Exception as error:  # these classes validate in many ways
        reason = " ".join(str(error).split())
        raise A3Error(f"--as llama: Llama's class refuses this configuration ({reason}); leave out --as") from error
    return found


def has_bias(model: Model, role: Role) -> bool:
    return model.family.tensor(0, role, "bias") in model.stock.shapes


def zero_biases(model: Model) -> dict[str, tuple[str, int]]:
    """Return the biases that Llama has and the source does not, by the weights that they follow: name and size."""
    if not has_bias(model, "q") or has_bias(model, "o"):
        return {}
    names = ((model.family.tensor(layer, "o", kind) for kind in KINDS) for layer in range(model.shape.layers))
    return {weight: (bias, model.shape.hidden_size) for weight, bias in names}
