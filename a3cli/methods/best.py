"""Beyond the paper, in the stock shape: RoPE by bands, attention-weighted OV with a joint refit, MLP that is refit.

- QK: bands of neighbouring pairs share a frequency and are solved in closed form (`solvers/rope.py`); all layers
  share one table of slots, each layer and KV head has its own maps.
- OV: the mean attention-weighted Gram matrix of the group, then the output projection refit over all heads at once.
- MLP: forward greedy selection that knows about the refit, then the refit of the down projection.
"""

from dataclasses import dataclass

import torch

from a3cli.errors import A3Error
from a3cli.methods.base import LayerInputs, Method, describe_ranks
from a3cli.model import Model
from a3cli.moments import Tensors
from a3cli.settings import SolveSettings
from a3cli.solvers.linalg import JointDecomposition, effective_rank, tail_sums
from a3cli.solvers.mlp import ChannelOrder, order_channels, refit_down
from a3cli.solvers.ov import refit_output, solve_ov
from a3cli.solvers.rope import (
    Band,
    BandCost,
    Distances,
    PairGrams,
    band_costs,
    best_bands,
    pair_grams,
    solve_bands,
    spread_distances,
)
from a3cli.work import Json

CENTRING = 0.95  # share of the constant part of a key that the softmax is trusted to ignore
LONGEST_BAND = 16  # pairs; longer bands never won, and cost grows with the square
FAR_WEIGHT = 0.05  # weight of distances up to the whole context beside those that calibration saw
BLOCKS = 256  # greedy selection takes the MLP's channels in so many blocks


@dataclass(frozen=True)
class BestLayer:
    q_gram: torch.Tensor
    k_gram: torch.Tensor
    k_mean: torch.Tensor
    attention_mass: torch.Tensor
    score_unit: torch.Tensor
    ov: JointDecomposition
    channels: ChannelOrder
    attention_unit: float
    mlp_unit: float
    key_ranks: list[float]
    channel_rank: float


class Best(Method):
    def __init__(self, model: Model, settings: SolveSettings) -> None:
        super().__init__(model, settings)
        self.layers: list[BestLayer] = []
        self.grams: list[PairGrams] = []
        self.costs: dict[tuple[int, int], BandCost] = {}
        self.bands: list[list[Band]] = []

    def add_layer(self, inputs: LayerInputs) -> None:
        shape = inputs.shape
        group_outputs = inputs.head_outputs.view(shape.kv_heads, shape.group, shape.head_dim, shape.head_dim).mean(1)
        self.layers.append(
            BestLayer(
                q_gram=inputs.mean("q_gram"),
                k_gram=inputs.mean("k_gram"),
                k_mean=inputs.mean("k_sum"),
                attention_mass=inputs.mean("distance"),
                score_unit=inputs.score_unit / 2,  # a real score has half the energy of its complex form
                ov=solve_ov(group_outputs, inputs.output_gram, floor=self.settings.eigenvalue_floor),
                channels=self._order_channels(inputs),
                attention_unit=inputs.attention_unit,
                mlp_unit=inputs.mlp_unit,
                key_ranks=inputs.key_ranks(),
                channel_rank=effective_rank(inputs.mean("mlp_energy")).item(),
            )
        )

    def _order_channels(self, inputs: LayerInputs) -> ChannelOrder:
        width = inputs.shape.intermediate_size
        if "mlp" not in self.settings.components:
            return ChannelOrder(torch.arange(width), torch.zeros(width + 1, dtype=torch.float64))
        return order_channels(inputs.mlp_gram, inputs.down, block=max(1, width // BLOCKS))

    def share(self) -> None:
        """One table of slots for all layers: bands by dynamic programming over the summed costs."""
        rope, floor = self.model.rope, self.settings.eigenvalue_floor
        mass = torch.stack([layer.attention_mass for layer in self.layers]).sum(0)
        distances: Distances = spread_distances(mass, rope.context, far_weight=FAR_WEIGHT)
        constancy = distances.constancy(rope.short)
        self.grams = [pair_grams(x.q_gram, x.k_gram, x.k_mean, constancy, centring=CENTRING) for x in self.layers]
        if "qk" not in self.settings.components:
            return
        units = [layer.score_unit for layer in self.layers]
        self.costs = band_costs(self.grams, units, rope.short, distances, longest=LONGEST_BAND, floor=floor)
        pairs = len(rope.short)
        self.bands = [bands for _, bands in best_bands(self.costs, pairs, pairs)]

    def curves(self, layer: int) -> Tensors:
        solved = self.layers[layer]
        qk = [sum(self._band_loss(layer, band) for band in bands) for bands in self.bands]
        return {
            "qk": torch.tensor(qk or [0.0] * (len(self.model.rope.short) + 1), dtype=torch.float64),
            "ov": tail_sums(solved.ov.values).sum(0) * solved.attention_unit,
            "mlp": solved.channels.curve * solved.mlp_unit,
        }

    def _band_loss(self, layer: int, band: Band) -> float:
        return self.costs[band.start, band.stop].losses[layer, band.rank].item()

    def rope_slots(self, head_dim: int) -> list[float]:
        return [band.slot for band in self.bands[head_dim // 2] for _ in range(band.rank)]

    def project_attention(self, inputs: LayerInputs, head_dim: int) -> Tensors:
        query_map, key_map = solve_bands(
            self.grams[inputs.layer], self.bands[head_dim // 2], floor=self.settings.eigenvalue_floor
        )
        value_map = self.layers[inputs.layer].ov.shared_map[..., :head_dim].contiguous()
        weight = inputs.output_weight.flatten(0, 1)
        try:
            refit = refit_output(inputs.o_gram, weight, value_map, ridge=self.settings.ridge)
        except ValueError as error:
            raise self._singular(inputs, "OV", error) from error
        return {
            "query_map": query_map,
            "key_map": key_map,
            "value_map": value_map,
            "output_weight": refit.mT.float().contiguous(),
        }

    def project_mlp(self, inputs: LayerInputs, width: int) -> Tensors:
        kept = self.layers[inputs.layer].channels.order[:width].sort().values
        try:
            refit = refit_down(inputs.mlp_gram, inputs.down, kept, ridge=self.settings.ridge)
        except ValueError as error:
            raise self._singular(inputs, "MLP", error) from error
        return {"channels": kept, "down_weight": refit.float().contiguous()}

    def _singular(self, inputs: LayerInputs, component: str, error: Exception) -> A3Error:
        return A3Error(
            f"layer {inputs.layer}, {component}: the refit's Gram matrix is singular at ridge {self.settings.ridge:g} "
            f"({error}); calibrate on more tokens or raise --ridge"
        )

    def describe(self, layer: int) -> Json:
        solved = self.layers[layer]
        return describe_ranks(solved.ov, solved.key_ranks, solved.channel_rank)
