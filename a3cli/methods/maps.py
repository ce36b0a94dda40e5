"""Query and key maps of one layer's smaller heads for given RoPE slots: in closed form, then refined."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from a3cli.methods.analysis import BestLayer
from a3cli.methods.attention import Effort, Refined, refine_maps, score_penalty
from a3cli.methods.base import Slots
from a3cli.methods.heads import Heads
from a3cli.models.rope import Rope
from a3cli.solvers.attention import Penalty
from a3cli.solvers.rope import Distances, distances_beyond, spread_distances
from a3cli.solvers.slots import HeadStatistics, SlotMaps

FAR_WEIGHT = 0.05  # weight of all distances up to the context, beside those that calibration measured
THOROUGH = Effort(iterations=10)  # of refinement of query and key maps in the per-layer shape, which cuts these further
QUICK = Effort(iterations=5, few=True)  # for curves, and in the stock shape also for the solution
UNREFINED = Effort(iterations=0, few=True)


@dataclass(frozen=True)
class MapSolver:
    """The problem of fitting maps: how heads are represented, and the context that they must serve, in tokens."""

    rope: Rope
    form: Heads
    context: int
    device: torch.device

    def distances(self, layers: Sequence[BestLayer]) -> Distances:
        """Return the distances between query and key that count in these layers, with their weights."""
        mass = torch.stack([layer.attention_mass for layer in layers]).sum(0)
        return spread_distances(mass, self.context, far_weight=FAR_WEIGHT)

    @torch.inference_mode(False)  # what is refined later has gradients, and probing calls this in it
    def closed_form(self, layer: BestLayer, slots: Slots) -> SlotMaps:
        """Solve for maps by alternating least squares on scores, starting from the bands of the slots."""
        assert slots.start is not None  # only heads that keep their size have none
        start = self.form.start(slots.start.grams, slots.start.bands)
        return self.form.problem(layer.heads, slots.pairs, self.distances([layer])).solve(start)

    def predicted_loss(self, layer: BestLayer, _slots: Slots, closed: SlotMaps) -> float:
        """Return the loss of the closed form's maps, to which refinement is compared."""
        return self.score_loss(layer, closed)

    def score_loss(self, layer: BestLayer, maps: SlotMaps) -> float:
        return float(layer.score_unit @ maps.loss)

    def closed_error(self, layer: BestLayer, slots: Slots, closed: SlotMaps) -> float:
        """Return the error of attention with the closed form's maps."""
        return self.refine(layer, slots, closed, UNREFINED).error.closed_form

    def loss_of_nothing(self, layer: BestLayer) -> float:
        """Return the loss of attention that weighs all keys alike."""
        nothing = torch.zeros(len(layer.k_gram), self.form.coordinates, 1, dtype=torch.complex128)
        unneeded = SlotMaps(nothing, nothing, nothing.real[:, 0, 0])
        return self._refine_maps(layer, Slots([0.0]), unneeded, UNREFINED).error.closed_form

    @torch.inference_mode(False)  # inference mode has no gradients, and probing calls this in it
    def refine(self, layer: BestLayer, slots: Slots, closed: SlotMaps, effort: Effort) -> Refined:
        """Refine the closed form's maps on sampled attention, and on scores beyond the samples' length."""
        return self._refine_maps(layer, slots, closed, effort)

    def _refine_maps(self, layer: BestLayer, slots: Slots, closed: SlotMaps, effort: Effort) -> Refined:
        far = self._far_penalties(layer, slots, effort, self.form, layer.heads)
        inputs = layer.inputs()
        return refine_maps(inputs, self.form, inputs.rope, slots.pairs, closed, far, effort, self.device)

    def _far_penalties(
        self, layer: BestLayer, slots: Slots, effort: Effort, form: Heads, heads: HeadStatistics
    ) -> list[Penalty | None]:
        """Return the cost of score errors beyond the samples' length for each KV head, if maps are fitted."""
        beyond = distances_beyond(len(layer.attention_mass), self.context)
        if beyond is None or effort.iterations == 0:
            return [None] * len(layer.k_gram)
        weights = FAR_WEIGHT * layer.score_unit / layer.attention_unit
        return [
            score_penalty(form.problem(heads.of(kv_head), slots.pairs, beyond), weight)
            for kv_head, weight in enumerate(weights.tolist())
        ]
