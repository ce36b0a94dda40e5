"""The supported families: one file of data for each `model_type`."""

from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from a3cli.errors import A3Error
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
    "usual_entries",
]

# Of every module here that has a definition.
_MODULES = (import_module(f"{__name__}.{found.name}") for found in iter_modules(__path__))
FAMILIES: dict[str, Family] = {each.FAMILY.model_type: each.FAMILY for each in _MODULES if hasattr(each, "FAMILY")}


def family_of(model_type: Any) -> Family:
    """Return the family of a `config.model_type`. Raises A3Error listing the supported ones."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise A3Error(
            f"model_type {model_type!r} is not supported; supported are {', '.join(sorted(FAMILIES))} "
            "(docs/add-a-family.md says how to add one)"
        )
    return FAMILIES[model_type]


def family_for(raw: dict[str, Any]) -> Family:
    """Return the family of the decoder that config.json describes, with what that says of it. Raises A3Error."""
    own = decoder_config(raw)
    family = family_of(own.get("model_type"))
    return as_held(replace(family, scaled_part=True) if scales_part(own, family) else family, wrapper_of(raw))


def scales_part(config: dict[str, Any], family: Family) -> bool:
    """Return whether longrope scales cos and sin, and with them the rotated part of a head, but not the rest."""
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    if family.rotary_factor is None or not isinstance(rope, dict):
        return False
    rotated = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", family.rotary_factor))
    if rope.get("rope_type", rope.get("type")) not in ("longrope", "su") or rotated in (None, 1):
        return False
    if (said := rope.get("attention_factor")) is not None:
        return bool(said != 1)
    if (factor := rope.get("factor")) is not None:
        return bool(factor != 1)
    context = config.get("max_position_embeddings")
    original = config.get("original_max_position_embeddings", rope.get("original_max_position_embeddings"))
    return isinstance(context, int) and isinstance(original, int) and context > original


def usual_entries(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what config.json says of the decoder, also under Llama's names; unchanged for an unknown model type."""
    own = decoder_config(dict(config))
    family = FAMILIES.get(str(own.get("model_type")))
    return own if family is None else family.usual(own)
