"""The supported families: one file of data for each `model_type`."""

from collections.abc import Mapping
from typing import Any

from a3cli.errors import A3Error
from a3cli.models.families import granite, llama, mistral, nemotron, opt, phi3, qwen2, qwen3, smollm3, starcoder2
from a3cli.models.families.base import Family, LayerSizes, ModelShape, Place, Role, per_layer_config

__all__ = [
    "FAMILIES",
    "Family",
    "LayerSizes",
    "ModelShape",
    "Place",
    "Role",
    "family_of",
    "per_layer_config",
    "usual_entries",
]

FAMILIES: dict[str, Family] = {
    module.FAMILY.model_type: module.FAMILY
    for module in (granite, llama, mistral, nemotron, opt, phi3, qwen2, qwen3, smollm3, starcoder2)
}


def family_of(model_type: Any) -> Family:
    """Return the family of a `config.model_type`. Raises A3Error listing the supported ones."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise A3Error(
            f"model_type {model_type!r} is not supported; supported are {', '.join(sorted(FAMILIES))} "
            "(docs/add-a-family.md says how to add one)"
        )
    return FAMILIES[model_type]


def usual_entries(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a config.json also under Llama's names; unchanged for an unknown model type."""
    family = FAMILIES.get(str(config.get("model_type")))
    return dict(config) if family is None else family.usual(config)
