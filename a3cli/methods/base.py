"""The interface of a method: from statistics to error curves, RoPE slots and projections.

A method analyses each layer alone, then makes each layer's table of RoPE slots from all analyses (in the stock shape
all layers share them), and measures error curves. Once the sizes are known it chooses the slots and projects each
layer. Each step returns a value that later steps take: a method holds only the model, the settings and the machine.
Losses are relative squared errors of the residual stream.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Generic, Protocol, TypeVar

import torch

from a3cli.methods.inputs import LayerInputs
from a3cli.models.families import LayerSizes
from a3cli.models.model import Model
from a3cli.settings import Component, SolveSettings
from a3cli.solvers.allocate import sizes
from a3cli.solvers.linalg import JointDecomposition, tail_sums
from a3cli.solvers.moments import Tensors
from a3cli.solvers.rope import Band, PairGrams
from a3cli.work.files import Json
from a3cli.work.machine import Machine
from a3cli.work.progress import portion

T = TypeVar("T")

Curves = dict[Component, dict[int, float]]  # loss of each component at each of its sizes


@dataclass(frozen=True)
class LayerAnalysis:
    """What a method keeps of one layer; the units turn squared errors into losses."""

    ov: JointDecomposition
    score_unit: torch.Tensor
    attention_unit: float
    mlp_unit: float
    key_ranks: list[float]
    experts: Json | None = field(default=None, kw_only=True)  # their tokens, for the manifest

    def output_losses(self) -> torch.Tensor:
        """Return the loss `[h + 1]` at each size of a value head."""
        return tail_sums(self.ov.values).sum(0) * self.attention_unit


@dataclass(frozen=True)
class Start:
    """The bands that query and key maps are first built from, and the Gram matrices in which they were found.

    The Gram matrices are of one layer, centred for the attention distances of `layers`.
    """

    grams: PairGrams
    bands: list[Band]
    layers: list[int]


@dataclass(frozen=True)
class Slots:
    """The RoPE slots of one layer's heads: the source pair of each slot's frequency, fractional between two pairs."""

    pairs: list[float]
    start: Start | None = None


Table = dict[int, Slots]  # of one layer, by head size


class ForEachLayer(Protocol):
    """A function that computes a step for these layers, side by side if they are small, and shows its progress."""

    def __call__(self, step: str, compute: Callable[[int], T], layers: Sequence[int], /) -> list[T]: ...


@dataclass(frozen=True)
class AttentionError:
    """Relative squared error of the stream on validation samples, with the closed form's maps and with refined ones."""

    closed_form: float
    refined: float


@dataclass(frozen=True)
class Prediction:
    """One layer's losses, and at the head sizes where attention was measured, its error."""

    losses: Curves
    measured: dict[int, AttentionError] = field(default_factory=dict)


L = TypeVar("L", bound=LayerAnalysis)


@dataclass(frozen=True)
class Analysis(Generic[L]):
    """What does not depend on the budget: an entry per layer in each list."""

    layers: list[L]
    tables: list[Table]
    predictions: list[Prediction]


@dataclass(frozen=True)
class Projection:
    """One layer's tensors (see `projections.py`), the error of its attention, and the damping of its refits."""

    tensors: Tensors
    attention_error: AttentionError | None = None
    damping: dict[Component, float] = field(default_factory=dict)

    def describe(self) -> Json:
        """Return error and damping, for the manifest."""
        error = self.attention_error
        return {"attention_error": asdict(error) if error else None, "damping": dict(self.damping)}


@dataclass(frozen=True)
class Method(ABC, Generic[L]):
    """A way to shrink the components.

    In the stock shape all layers share the RoPE slots of a head size; in the per-layer shape each has its own.
    """

    model: Model
    settings: SolveSettings
    machine: Machine  # its device is for heavy arithmetic

    @property
    def per_layer(self) -> bool:
        return self.settings.shape == "per-layer"

    def sizes(self, component: Component) -> list[int]:
        """Return the sizes that a component may take, ascending; only the full one if it is not cut."""
        shape, settings = self.model.shape, self.settings
        full = shape.intermediate_size if component == "mlp" else shape.head_dim
        if component not in settings.cut:
            return [full]
        if component == "mlp":
            return sizes(full, settings.mlp_multiple, least=settings.min_mlp)
        return sizes(full, settings.head_multiple, least=settings.min_head)

    def smaller_ranks(self) -> list[int]:
        """Return the sizes of `sizes("qk")` below the full one."""
        return [rank for rank in self.sizes("qk") if rank < self.model.shape.head_dim]

    @abstractmethod
    def analyse(self, inputs: LayerInputs) -> L:
        """Return the analysis of one layer."""

    def tables(self, layers: Sequence[L]) -> list[Table]:
        """Return each layer's slots at every size that its query and key heads may take."""
        full = self.model.shape.head_dim
        whole = Slots([float(pair) for pair in range(full // 2)])
        smaller = self.smaller_tables(layers) if self.smaller_ranks() else [{} for _ in layers]
        return [{**table, full: whole} for table in smaller]

    @abstractmethod
    def smaller_tables(self, layers: Sequence[L]) -> list[Table]:
        """Return each layer's slots at every size below the full one."""

    @abstractmethod
    def predict(self, layers: Sequence[L], tables: Sequence[Table], layer: int) -> Prediction:
        """Return the loss of each component of one layer at each of its `sizes`, from all analyses and tables."""

    def choose_slots(
        self, analysis: Analysis[L], sizes: Sequence[LayerSizes], _for_each_layer: ForEachLayer
    ) -> list[Slots]:
        """Return each layer's slots at its chosen sizes."""
        return [table[size.qk] for table, size in zip(analysis.tables, sizes, strict=True)]

    def project(self, inputs: LayerInputs, layer: L, slots: Slots, sizes: LayerSizes) -> Projection:
        """Return the projection of one layer; it has no tensors of a component that keeps its size."""
        ways: list[Callable[[], Projection]] = []
        if sizes.qk < inputs.shape.head_dim:
            ways.append(lambda: self.project_qk(layer, slots))
        if sizes.ov < inputs.shape.head_dim:
            ways.append(lambda: self.project_ov(inputs, layer, sizes.ov))
        if sizes.mlp < inputs.shape.intermediate_size:
            ways.append(lambda: self.project_mlp(inputs, layer, sizes.mlp))
        parts = []
        for way in ways:
            with portion(1 / len(ways)):
                parts.append(way())
        tensors = {name: tensor for each in parts for name, tensor in each.tensors.items()}
        return Projection(
            tensors or {"unchanged": torch.zeros(0)},
            next((each.attention_error for each in parts if each.attention_error), None),
            {component: damping for each in parts for component, damping in each.damping.items()},
        )

    @abstractmethod
    def project_qk(self, layer: L, slots: Slots) -> Projection:
        """Return the projections of q and k of one layer."""

    @abstractmethod
    def project_ov(self, inputs: LayerInputs, layer: L, rank: int) -> Projection:
        """Return the projections of v and o of one layer."""

    @abstractmethod
    def project_mlp(self, inputs: LayerInputs, layer: L, width: int) -> Projection:
        """Return the projections of gate, up and down of one layer."""

    @abstractmethod
    def describe(self, layer: L) -> Json:
        """Return effective ranks and energy (the loss of keeping nothing) of one layer, for the manifest."""


def describe_layer(layer: LayerAnalysis, channel_rank: float, qk_energy: float, mlp_energy: float) -> Json:
    """Return `Method.describe` of one layer."""
    return {
        **({"experts": layer.experts} if layer.experts else {}),
        "effective_rank": {"qk": layer.key_ranks, "ov": layer.ov.effective_rank.tolist(), "mlp": channel_rank},
        "floored_eigenvalues": {"ov": layer.ov.floored.tolist()},
        "energy": {
            "qk": qk_energy,
            "ov": float(layer.ov.values.sum()) * layer.attention_unit,
            "mlp": mlp_energy,
        },
    }
