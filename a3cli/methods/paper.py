"""`--method paper`, as published: pair selection (the same pairs in all heads), joint OV, channel selection."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from typing_extensions import override

from a3cli.methods.base import LayerAnalysis, Method, Prediction, Projection, Slots, Table, describe_layer
from a3cli.methods.inputs import LayerInputs
from a3cli.models.families.base import pair_dims
from a3cli.solvers.linalg import effective_rank, tail_sums
from a3cli.solvers.mlp import keep_channels, score_channels
from a3cli.solvers.ov import solve_ov
from a3cli.solvers.qk import keep_pairs, score_pairs
from a3cli.work.files import Json

# Share of the bound on the effect of score errors. Pair scores include what is constant over keys, which the softmax
# ignores, so the share is smaller than for centred keys.
ATTAINED = 1 / 4


@dataclass(frozen=True)
class PaperLayer(LayerAnalysis):
    """`pair_scores` `[K, h/2]` in squared scores, `channel_scores` `[I]`."""

    pair_scores: torch.Tensor
    channel_scores: torch.Tensor


class Paper(Method[PaperLayer]):
    @override
    def analyse(self, inputs: LayerInputs) -> PaperLayer:
        dims = pair_dims(inputs.shape.head_dim // 2, inputs.shape.turning_pairs)
        # The paper weighs values by attention for MHA, and not for GQA.
        value_gram = inputs.head_outputs if inputs.shape.group == 1 else inputs.mean("v_gram")
        return PaperLayer(
            pair_scores=score_pairs(*(inputs.mean(name)[:, dims][..., dims] for name in ("q_gram", "k_gram"))),
            ov=solve_ov(value_gram, inputs.output_gram, floor=self.settings.eigenvalue_floor),
            channel_scores=score_channels(inputs.mean("mlp_energy"), inputs.down),
            score_unit=inputs.score_unit(ATTAINED),
            attention_unit=inputs.attention_unit,
            mlp_unit=inputs.mlp_unit,
            key_ranks=inputs.key_ranks(),
        )

    @override
    def smaller_tables(self, layers: Sequence[PaperLayer]) -> list[Table]:
        """Choose the pairs by score."""
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
        order = self._scores(layers, layer).argsort(descending=True, stable=True)
        qk = tail_sums((found.score_unit @ found.pair_scores)[order])
        ov = found.output_losses()
        mlp = tail_sums(found.channel_scores.sort(descending=True).values) * found.mlp_unit
        return Prediction(
            {
                "qk": {rank: qk[rank // 2].item() for rank in self.sizes("qk")},
                "ov": {rank: ov[rank].item() for rank in self.sizes("ov")},
                "mlp": {width: mlp[width].item() for width in self.sizes("mlp")},
            }
        )

    @override
    def project_qk(self, layer: PaperLayer, slots: Slots) -> Projection:
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
        return Projection({"channels": keep_channels(layer.channel_scores, width)})

    @override
    def describe(self, layer: PaperLayer) -> Json:
        return describe_layer(
            layer,
            channel_rank=effective_rank(layer.channel_scores).item(),
            qk_energy=float((layer.score_unit @ layer.pair_scores).sum()),
            mlp_energy=float(layer.channel_scores.sum()) * layer.mlp_unit,
        )
