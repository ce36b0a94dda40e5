"""`--method paper`, as published: pair selection (the same pairs in all heads), joint OV, channel selection."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from a3cli.methods.base import Curves, LayerInputs, Method, describe_ranks
from a3cli.models.families import LayerSizes
from a3cli.models.families.base import pair_dims
from a3cli.models.model import Model
from a3cli.settings import SolveSettings
from a3cli.solvers.linalg import JointDecomposition, effective_rank, tail_sums
from a3cli.solvers.mlp import keep_channels, score_channels
from a3cli.solvers.moments import Tensors
from a3cli.solvers.ov import solve_ov
from a3cli.solvers.qk import keep_pairs, score_pairs
from a3cli.work.files import Json

# Share of the bound on the effect of score errors. Pair scores include what is constant over keys, which the softmax
# ignores, so the share is smaller than for centred keys.
ATTAINED = 1 / 4


@dataclass(frozen=True)
class PaperLayer:
    """`pair_scores` `[K, h/2]` in squared scores, `channel_scores` `[I]`; the units make losses comparable."""

    pair_scores: torch.Tensor
    ov: JointDecomposition
    channel_scores: torch.Tensor
    score_unit: torch.Tensor
    attention_unit: float
    mlp_unit: float
    key_ranks: list[float]


class Paper(Method):
    def __init__(self, model: Model, settings: SolveSettings) -> None:
        super().__init__(model, settings)
        self.layers: list[PaperLayer] = []
        self.scores: list[torch.Tensor] = []  # of pairs, for each layer: its own or shared ones

    def add_layer(self, inputs: LayerInputs) -> None:
        dims = pair_dims(inputs.shape.head_dim // 2, inputs.shape.turning_pairs)
        # The paper weighs values by attention for MHA, and not for GQA.
        value_gram = inputs.head_outputs if inputs.shape.group == 1 else inputs.mean("v_gram")
        self.layers.append(
            PaperLayer(
                pair_scores=score_pairs(*(inputs.mean(name)[:, dims][..., dims] for name in ("q_gram", "k_gram"))),
                ov=solve_ov(value_gram, inputs.output_gram, floor=self.settings.eigenvalue_floor),
                channel_scores=score_channels(inputs.mean("mlp_energy"), inputs.down),
                score_unit=inputs.score_unit(ATTAINED),
                attention_unit=inputs.attention_unit,
                mlp_unit=inputs.mlp_unit,
                key_ranks=inputs.key_ranks(),
            )
        )

    def build_slot_tables(self) -> None:
        """Choose the pairs by total score: the same in all heads of a layer, in the stock shape in all layers."""
        own = [layer.pair_scores.sum(0) for layer in self.layers]
        self.scores = own if self.per_layer else [torch.stack(own).sum(0)] * len(own)

    def finalize_slots(self, sizes: Sequence[LayerSizes]) -> None:
        """Do nothing: kept pairs are final."""

    def curves(self, layer: int) -> Curves:
        solved = self.layers[layer]
        order = self.scores[layer].argsort(descending=True, stable=True)
        qk = tail_sums((solved.score_unit @ solved.pair_scores)[order])
        ov = tail_sums(solved.ov.values).sum(0) * solved.attention_unit
        mlp = tail_sums(solved.channel_scores.sort(descending=True).values) * solved.mlp_unit
        return {
            "qk": {rank: qk[rank // 2].item() for rank in self.sizes("qk")},
            "ov": {rank: ov[rank].item() for rank in self.sizes("ov")},
            "mlp": {width: mlp[width].item() for width in self.sizes("mlp")},
        }

    def rope_slots(self, layer: int, rank: int) -> list[float]:
        slots: list[float] = keep_pairs(self.scores[layer], rank // 2).tolist()
        return slots

    def project_qk(self, inputs: LayerInputs, rank: int) -> Tensors:
        return {"pairs": keep_pairs(self.scores[inputs.layer], rank // 2)}

    def project_ov(self, inputs: LayerInputs, rank: int) -> Tensors:
        ov = self.layers[inputs.layer].ov
        return {
            "value_map": ov.shared_map[..., :rank].contiguous(),
            "output_map": ov.other_map[..., :rank].mT.contiguous(),
        }

    def project_mlp(self, inputs: LayerInputs, width: int) -> Tensors:
        return {"channels": keep_channels(self.layers[inputs.layer].channel_scores, width)}

    def describe(self, layer: int) -> Json:
        solved = self.layers[layer]
        energy = {
            "qk": float((solved.score_unit @ solved.pair_scores).sum()),
            "ov": float(solved.ov.values.sum()) * solved.attention_unit,
            "mlp": float(solved.channel_scores.sum()) * solved.mlp_unit,
        }
        ranks = describe_ranks(solved.ov, solved.key_ranks, effective_rank(solved.channel_scores).item())
        return {**ranks, "energy": energy, "attention_error": None, "damping": {}}
