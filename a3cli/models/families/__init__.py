"""The supported families: one file of data for each `model_type`."""

from typing import Any

from a3cli.errors import A3Error
from a3cli.models.families import granite, llama, ministral3, mistral, nemotron, phi3, qwen2, qwen3, smollm3, starcoder2
from a3cli.models.families.base import Family, LayerSizes, ModelShape, Place, Role, per_layer_config
from a3cli.models.families.wrappers import as_held, decoder_config, wrapper_of

__all__ = [
    "FAMILIES",
    "Family",
    "LayerSizes",
    "ModelShape",
    "Place",
    "Role",
    "decoder_config",
    "family_for",
    "family_of",
    "per_layer_config",
]

FAMILIES: dict[str, Family] = {
    module.FAMILY.model_type: module.FAMILY
    for module in (granite, llama, ministral3, mistral, nemotron, phi3, qwen2, qwen3, smollm3, starcoder2)
}


def family_of(model_type: Any) -> Family:
    """Return the family of a `config.model_type`. Raises A3Error listing the supported ones."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise A3Error(
            f"model_type {model_type!r} is not supported; supported are {', '.join(sorted(FAMILIES))} "
            "(docs/add-a-family.md says how to add one)"
        )
    return FAMILIES[model_type]


def family_for(raw: dict[str, Any]) -> Family:
    """Return the family of the decoder that config.json describes, as its wrapper holds it. Raises A3Error."""
    return as_held(family_of(decoder_config(raw).get("model_type")), wrapper_of(raw))
