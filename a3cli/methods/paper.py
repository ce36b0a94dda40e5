"""`--method paper`, as published: pair selection (the same pairs in all heads), joint OV, channel selection.

Without RoPE, QK is the paper's exact theorem in place of pair selection.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from typing_extensions import override

from a3cli.methods.base import LayerAnalysis, Method, Prediction, Projection, Slots, Table, describe_layer
from a3cli.methods.experts import describe_experts, keep_by_score, score_experts
from a3cli.methods.inputs import LayerInputs
from a3cli.models.families.base import pair_dims
from a3cli.solvers.linalg import JointDecomposition, effective_rank, tail_sums
from a3cli.solvers.mlp import keep_channels, score_channels
from a3cli.solvers.ov import solve_ov
from a3cli.solvers.qk import keep_pairs, score_pairs, solve_qk
from a3cli.work.files import Json

# Share of the bound on the effect of score errors. Pair scores include what is constant over keys, which the softmax
# ignores, so the share is smaller than for centred keys.
ATTAINED = 1 / 4


@dataclass(frozen=True)
class PaperLayer(LayerAnalysis):
    """`pair_scores` `[K, h/2]` in squared scores, `channel_scores` `[1, I]`, with experts `[E, I]`; `theorem` solves QK
    without RoPE.
    """

    pair_scores: torch.Tensor
    channel_scores: torch.Tensor
    theorem: JointDecomposition | None = None


class Paper(Method[PaperLayer]):
    @override
    def analyse(self, inputs: LayerInputs) -> PaperLayer:
        dims = pair_dims(inputs.shape.head_dim // 2, inputs.shape.turning_pairs)
        # The paper weighs values by attention for MHA, and not for GQA.
        value_gram = inputs.head_outputs if inputs.shape.group == 1 else inputs.value_gram
        grams, floor = [inputs.mean(name) for name in ("q_gram", "k_gram")], self.settings.eigenvalue_floor
        return PaperLayer(
            pair_scores=score_pairs(*(gram[:, dims][..., dims] for gram in grams)),
            theorem=solve_qk(*grams, floor=floor) if self.model.rope.absent else None,
            ov=solve_ov(value_gram, inputs.output_gram, floor=floor),
            channel_scores=self._score_channels(inputs),
            score_unit=inputs.score_unit(ATTAINED),
            attention_unit=inputs.attention_unit,
            mlp_unit=inputs.mlp_unit,
            key_ranks=inputs.key_ranks(),
            experts=describe_experts(inputs) if inputs.shape.experts else None,
        )

    def _score_channels(self, inputs: LayerInputs) -> torch.Tensor:
        """Return the scores of channels `[1, I]`, with experts of each one's `[E, I]`."""
        if inputs.shape.experts:
            return score_experts(inputs)
        return score_channels(inputs.mean("mlp_energy"), inputs.down_in_stream)[None]

    @override
    def smaller_tables(self, layers: Sequence[PaperLayer]) -> list[Table]:
        """Choose the pairs by score; without RoPE there is nothing to choose."""
        if self.model.rope.absent:
            return [{rank: Slots([0.0] * (rank // 2)) for rank in self.smaller_ranks()} for _ in layers]
        scores = [self._scores(layers, layer) for layer in range(len(layers))]
        return [{rank: Slots(keep_pairs(each, rank // 2).tolist()) for rank in self.smaller_ranks()} for each in scores]

    def _scores(self, layers: Sequence[PaperLayer], layer: int) -> torch.Tensor:
        """Return the scores of pairs `[h/2]`, summed over the layer's heads, in the stock shape over all layers'."""
        if self.per_layer:
            return layers[layer].pair_scores.sum(0)
        return torch.stack([each.pair_scores.sum(0) for each in layers]).sum(0)

    @override
    def predict(self, layers: Sequence[PaperLayer], tables: Sequence[Table], layer: int) -> Prediction:
        found = layers[layer]
        ov = found.output_losses()
        mlp = tail_sums(found.channel_scores.sort(descending=True).values).sum(0) * found.mlp_unit
        return Prediction(
            {
                "qk": self._score_losses(layers, layer),
                "ov": {rank: ov[rank].item() for rank in self.sizes("ov")},
                "mlp": {width: mlp[width].item() for width in self.sizes("mlp")},
            }
        )

    def _score_losses(self, layers: Sequence[PaperLayer], layer: int) -> dict[int, float]:
        """Return the loss at each size of a query or key head."""
        found = layers[layer]
        if found.theorem is not None:
            losses = found.score_unit @ tail_sums(found.theorem.values)
            return {rank: losses[rank].item() for rank in self.sizes("qk")}
        order = self._scores(layers, layer).argsort(descending=True, stable=True)
        losses = tail_sums((found.score_unit @ found.pair_scores)[order])
        return {rank: losses[rank // 2].item() for rank in self.sizes("qk")}

    @override
    def project_qk(self, layer: PaperLayer, slots: Slots) -> Projection:
        if layer.theorem is not None:
            query, key = (
                maps[..., : 2 * len(slots.pairs)].contiguous()
                for maps in (layer.theorem.other_map, layer.theorem.shared_map)
            )
            return Projection({"query_map": query, "key_map": key})
        return Projection({"pairs": torch.tensor(slots.pairs, dtype=torch.int64)})

    @override
    def project_ov(self, inputs: LayerInputs, layer: PaperLayer, rank: int) -> Projection:
        ov = layer.ov
        return Projection(
            {
                "value_map": ov.shared_map[..., :rank].contiguous(),
                "output_map": ov.other_map[..., :rank].mT.contiguous(),
            }
        )

    @override
    def project_mlp(self, inputs: LayerInputs, layer: PaperLayer, width: int) -> Projection:
        if inputs.shape.experts:
            return Projection({"channels": keep_by_score(inputs, layer.channel_scores, width)})
        return Projection({"channels": keep_channels(layer.channel_scores[0], width)})

    @override
    def describe(self, layer: PaperLayer) -> Json:
        energies = layer.pair_scores if layer.theorem is None else layer.theorem.values
        return describe_layer(
            layer,
            channel_rank=effective_rank(layer.channel_scores).mean().item(),
            qk_energy=float((layer.score_unit @ energies).sum()),
            mlp_energy=float(layer.channel_scores.sum()) * layer.mlp_unit,
        )
