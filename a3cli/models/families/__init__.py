"""Everything that depends on `model_type`, as data."""

from a3cli.models.families.base import Family, LayerSizes, ModelShape, Role, family_of, per_layer_config, read_shape

__all__ = ["Family", "LayerSizes", "ModelShape", "Role", "family_of", "per_layer_config", "read_shape"]
