"""Query and key maps of one layer's smaller heads behind a norm, and the weights of that norm."""

from dataclasses import dataclass

import torch
from typing_extensions import override

from a3cli.methods.analysis import BestLayer
from a3cli.methods.attention import Effort, Refined, sampled_head, split
from a3cli.methods.base import AttentionError, Slots
from a3cli.methods.heads import PartialHeads
from a3cli.methods.inputs import LayerInputs
from a3cli.methods.maps import MapSolver
from a3cli.solvers.moments import Tensors
from a3cli.solvers.normed import NormedAttention, NormedHeads, Penalty, with_norms, without_norms
from a3cli.solvers.partial import complex_columns
from a3cli.solvers.rope import frequency_at
from a3cli.solvers.slots import SlotMaps
from a3cli.work.progress import advance


@dataclass(frozen=True)
class RefinedNorms(Refined):
    """Smaller heads with their norms; `gains` are the weights `[h]` of the source's norms of queries and keys."""

    heads: NormedHeads
    gains: tuple[torch.Tensor, torch.Tensor]

    @override
    def tensors(self) -> Tensors:
        """Return maps of the projections' outputs, which the source's norms have not multiplied by their weights.

        A map's length is free. It is that of orthonormal columns, with which a mean square stays about what it was, and
        so does the effect of the norm's epsilon.
        """
        found = self.heads
        maps = [gain.double()[:, None] * each for gain, each in zip(self.gains, (found.query, found.key), strict=True)]
        sizes = [each.square().sum((-1, -2), keepdim=True) / each.shape[-1] for each in maps]
        query, key = (each * size.rsqrt() for each, size in zip(maps, sizes, strict=True))
        return {"query_map": query, "key_map": key, "query_norm": found.query_norm, "key_norm": found.key_norm}


def maps_at_mean_length(inputs: LayerInputs, solution: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """Return maps `[K, h, r]` that do what a solution's maps and norms do to queries and keys of mean length."""
    gains = [gain.double()[:, None] for gain in inputs.head_gains]
    maps = [solution[name] for name in ("query_map", "key_map")]
    query, key = (torch.where(gain == 0, 0, each / gain) for gain, each in zip(gains, maps, strict=True))
    heads = NormedHeads(query, key, solution["query_norm"], solution["key_norm"])
    return without_norms(heads, inputs.mean("q_gram"), inputs.mean("k_gram"))


class NormedSolver(MapSolver):
    """A solver for families with a norm on each head: closed-form maps ignore it, refined ones do not."""

    @override
    def predicted_loss(self, layer: BestLayer, _slots: Slots, closed: SlotMaps) -> float:
        """Return the error of attention behind a norm: the lengths that it removes are most of it for large heads."""
        return self.closed_error(layer, _slots, closed)

    @override
    @torch.inference_mode(False)
    def refine(self, layer: BestLayer, slots: Slots, closed: SlotMaps, effort: Effort) -> Refined:
        inputs = layer.inputs()
        query, key = (self.form.real_map(maps, slots.pairs) for maps in (closed.query, closed.key))
        start = with_norms(query, key, layer.q_gram, layer.k_gram)
        fitting, judging = split(inputs.samples(), few=effort.few)
        judge = self._attention(inputs, judging)
        frequencies = frequency_at(judge.heads[0].head.pairs, torch.tensor(slots.pairs, dtype=torch.float64))
        if effort.iterations == 0:
            loss = judge.loss(start, frequencies) * inputs.attention_unit
            return RefinedNorms(AttentionError(loss, loss), start, inputs.head_gains)
        penalty = self._penalty(layer, slots, effort)
        found = self._attention(inputs, fitting).refine(
            start, frequencies, judge=judge, iterations=effort.iterations, penalty=penalty, advance=advance
        )
        error = AttentionError(found.before * inputs.attention_unit, found.after * inputs.attention_unit)
        return RefinedNorms(error, found.heads, inputs.head_gains)

    def _attention(self, inputs: LayerInputs, samples: Tensors) -> NormedAttention:
        kv_heads = range(inputs.shape.kv_heads)
        return NormedAttention([sampled_head(inputs, inputs.rope, samples, each, self.device) for each in kv_heads])

    def _penalty(self, layer: BestLayer, slots: Slots, effort: Effort) -> Penalty | None:
        """Return the cost of score errors beyond the samples' length, at the mean lengths of queries and keys."""
        form = PartialHeads(self.rope, self.form.floor)  # behind a norm, maps mix all dims
        heads = form.statistics(layer.q_gram, layer.k_gram, layer.k_mean)
        found = self._far_penalties(layer, slots, effort, form, heads)
        far = [each for each in found if each is not None]
        if not far:
            return None

        def cost(smaller: NormedHeads) -> torch.Tensor:
            query, key = (complex_columns(each) for each in without_norms(smaller, layer.q_gram, layer.k_gram))
            return torch.stack([each(*maps) for each, *maps in zip(far, query, key, strict=True)]).sum()

        return cost
