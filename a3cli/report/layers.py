"""Describe each layer's components: size, loss, energy, ranks, tokens, damping and bytes."""

from pydantic import Field

from a3cli.report.health import Dimensions, Health, LayerHealth
from a3cli.settings import Component
from a3cli.work.manifests import Curve, Solution
from a3cli.work.schema import Part


class Bytes(Part):
    """Bytes of a component's weights in one layer; None if the source was not found or there is no solution."""

    before: int | None
    after: int | None = None

    @property
    def now(self) -> int | None:
        return self.after or self.before


class ComponentState(Health):
    """One component of one layer; None for what is unknown."""

    full_size: int
    size: int | None = None
    predicted_loss: float | None = None
    energy_kept: float | None = None
    dimension: int
    share_of_tokens: float = Field(default=1.0, exclude=True)  # that the statistics see
    tokens_per_dimension: float | None  # None where there are no statistics: attention is carried
    damping: float | None = None
    floored: int | None = None
    bytes: Bytes

    @property
    def is_singular(self) -> bool:
        return bool(self.singular or self.floored)


class LayerState(Part):
    """All components of one layer."""

    layer: int
    qk: ComponentState
    ov: ComponentState
    mlp: ComponentState

    def part(self, component: Component) -> ComponentState:
        found: ComponentState = getattr(self, component)
        return found


def describe_layers(
    dimensions: Dimensions, tokens: int, solution: Solution | None, health: list[LayerHealth]
) -> list[LayerState]:
    """Return the state of each layer, from the solution, the health of the statistics, or both."""

    def describe(layer: int, component: Component) -> ComponentState:
        state = describe_component(component, dimensions, tokens, health[layer][component] if health else Health())
        return add_solution(state, component, dimensions, solution, layer) if solution else state

    count = len(solution.sizes) if solution else len(health)
    return [
        LayerState(layer=layer, qk=describe(layer, "qk"), ov=describe(layer, "ov"), mlp=describe(layer, "mlp"))
        for layer in range(count)
    ]


def describe_component(component: Component, dimensions: Dimensions, tokens: int, health: Health) -> ComponentState:
    """Return the state of a component without a solution."""
    full, dimension = dimensions.full_size(component), dimensions.of_gram(component)
    share = dimensions.share_of_tokens(component)
    return ComponentState(
        **dict(health),
        full_size=full,
        dimension=dimension,
        share_of_tokens=share,
        tokens_per_dimension=share * tokens / dimension if component == "mlp" or dimensions.heads else None,
        bytes=Bytes(before=dimensions.bytes(component, full)),
    )


def add_solution(
    state: ComponentState, component: Component, dimensions: Dimensions, solution: Solution, layer: int
) -> ComponentState:
    """Return the state of a component with its solution."""
    found, settings = solution.per_layer[layer], solution.request.settings
    size: int = getattr(solution.sizes[layer], component)
    loss = loss_at(getattr(found.curves, component), size)
    # Probed losses have another unit.
    energy = None if settings.sensitivity == "probe" else getattr(found.energy, component)
    ranks = getattr(found.effective_rank, component)
    floored = getattr(found.floored_eigenvalues, component, None)
    damping = getattr(found.damping, component, None)
    if damping is None:
        damping = 0.0 if component == "mlp" else settings.eigenvalue_floor
    full = getattr(solution.full_size, component)
    return state.model_copy(
        update={
            "size": size,
            "predicted_loss": loss,
            "energy_kept": max(0.0, 1 - loss / energy) if energy and loss is not None else None,
            "effective_rank": mean_of(ranks) if isinstance(ranks, list) else ranks,
            "damping": damping,
            "floored": None if floored is None else sum(floored),
            "bytes": Bytes(before=dimensions.bytes(component, full), after=dimensions.bytes(component, size)),
        }
    )


def mean_of(values: list[float]) -> float | None:
    """Return the mean; None without values, as of the heads of carried attention."""
    return sum(values) / len(values) if values else None


def loss_at(curve: Curve, size: int) -> float | None:
    """Return the loss of an error curve at a size, None if the curve has no such size."""
    return curve.loss[curve.size.index(size)] if size in curve.size else None


def name_layers(layers: list[int]) -> str:
    """Format layer indices as `layer 3` or `layers 0–4, 7`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    names = [str(first) if first == last else f"{first}–{last}" for first, last in runs]
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(names)}"
