"""Everything that depends on `model_type`, as data."""

from a3cli.families.base import Family, ModelShape, Role, family_of, read_shape

__all__ = ["Family", "ModelShape", "Role", "family_of", "read_shape"]
