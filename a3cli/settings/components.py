"""What of a layer can be cut: query and key heads, value heads, the MLP."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from a3cli.settings.options import CUT

Component = Literal["qk", "ov", "mlp"]
COMPONENTS: tuple[Component, ...] = ("qk", "ov", "mlp")


def in_order(components: tuple[Component, ...] | None) -> tuple[Component, ...] | None:
    """Return the components in their usual order. Raises ValueError if there are none."""
    if components is None:
        return None
    if not components:
        raise ValueError("name at least one of qk, ov, mlp")
    return tuple(c for c in COMPONENTS if c in components)


Components = Annotated[
    tuple[Component, ...] | None,
    CUT,
    AfterValidator(in_order),
    Field(description="Comma list of what may be cut (default: all that can)."),
]
