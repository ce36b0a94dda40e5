"""Beyond the paper: RoPE by slots, attention-weighted OV with a joint refit, MLP that is refit.

- QK: bands of neighbouring pairs choose the slots (`solvers/rope.py`), then every slot mixes every pair, refined by
  alternating least squares (`solvers/slots.py`). Each layer and KV head has its own maps; the table of slots is shared
  by all layers in the stock shape, and each layer's own in the per-layer shape.
- OV: the mean attention-weighted Gram matrix of the group; then value maps and the output projection are fitted over
  all heads at once, by alternating least squares.
- MLP: forward greedy selection that knows about the refit, then the refit of the down projection.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from a3cli.errors import A3Error
from a3cli.families import LayerSizes
from a3cli.families.rope import evenly_spaced
from a3cli.methods.base import Curves, LayerInputs, Method, describe_ranks
from a3cli.model import Model
from a3cli.moments import Tensors
from a3cli.settings import COMPONENTS, Component, SolveSettings
from a3cli.solvers.linalg import JointDecomposition, effective_rank, tail_sums
from a3cli.solvers.mlp import ChannelOrder, order_channels, refit_down
from a3cli.solvers.ov import refine_values, refit_output, solve_ov
from a3cli.solvers.rope import (
    Band,
    Distances,
    PairGrams,
    band_costs,
    band_maps,
    best_bands,
    frequency_at,
    pair_grams,
    spread_distances,
)
from a3cli.solvers.slots import HeadStatistics, SlotMaps, SlotProblem, head_statistics
from a3cli.work import Json, read_if_of, versions, write_manifest

log = logging.getLogger(__name__)

ATTAINED = 1 / 3  # of the bound on what score errors do
CENTRING = 0.95  # share of the constant part of a key that the softmax is trusted to ignore
LONGEST_BAND = 16  # pairs; longer bands never won, and cost grows with the square
FAR_WEIGHT = 0.05  # weight of distances up to the whole context beside those that calibration saw
AFFINE_COST = 0.01  # how much more predicted loss evenly spaced slots may have and still be preferred
VALUE_ROUNDS = 3  # of refining the value maps over all heads
BLOCKS = 256  # greedy selection takes the MLP's channels in so many blocks


def fitted_gram(inputs: LayerInputs) -> torch.Tensor:
    """What the down projection is fitted by, `[I, I]`: about the mean where a bias can absorb that."""
    gram = inputs.mlp_gram()
    if not inputs.shape.mlp_bias:
        return gram
    mean = inputs.mlp_mean.double()
    return gram.addr_(mean, mean, alpha=-1)


def with_larger_diagonal(gram: torch.Tensor, damping: float) -> torch.Tensor:
    """A copy with `damping` times the mean of its diagonal added to it."""
    damped = gram.clone()
    damped.diagonal().add_(damping * gram.diagonal().mean())
    return damped


def read_order(path: Path, request: Json) -> ChannelOrder | None:
    """What an earlier solution found: selection takes by far the longest, and no budget changes it."""
    found = read_if_of(path, request)
    if found is None:
        return None
    return ChannelOrder(torch.tensor(found["order"]), torch.tensor(found["curve"], dtype=torch.float64))


def write_order(path: Path, request: Json, found: ChannelOrder) -> None:
    path.parent.mkdir(exist_ok=True)
    write_manifest(path, {"request": request, "order": found.order.tolist(), "curve": found.curve.tolist()})


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

    @cached_property
    def heads(self) -> HeadStatistics:
        return head_statistics(self.q_gram, self.k_gram, self.k_mean)


@dataclass(frozen=True)
class Table:
    """Bands for every number of slots, and the layers that share them, with the Gram matrices they were made from."""

    bands: list[list[Band]]
    grams: dict[int, PairGrams]


class Best(Method):
    def __init__(self, model: Model, settings: SolveSettings) -> None:
        super().__init__(model, settings)
        self.layers: list[BestLayer] = []
        self.tables: list[Table] = []  # of each layer
        self.affine: dict[int, list[float]] = {}  # slots that took the place of a shared table's, by rank
        self.score_losses: dict[tuple[int, int], float] = {}  # by layer and rank
        self.damping: defaultdict[int, dict[Component, float]] = defaultdict(dict)  # that refits used, by layer

    def add_layer(self, inputs: LayerInputs) -> None:
        shape = inputs.shape
        group_outputs = inputs.head_outputs.view(shape.kv_heads, shape.group, shape.head_dim, shape.head_dim).mean(1)
        self.layers.append(
            BestLayer(
                q_gram=inputs.mean("q_gram"),
                k_gram=inputs.mean("k_gram"),
                k_mean=inputs.mean("k_sum"),
                attention_mass=inputs.mean("distance"),
                score_unit=inputs.score_unit(ATTAINED) / 2,  # a real score has half the energy of its complex form
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
        request = {**inputs.origin, "blocks": BLOCKS, "versions": versions()}
        known = read_order(inputs.channels_file, request)
        if known is None:
            known = self._find_order(inputs)
            write_order(inputs.channels_file, request, known)
        return known

    def _find_order(self, inputs: LayerInputs) -> ChannelOrder:
        gram, down = fitted_gram(inputs).to(self.device), inputs.down.to(self.device)
        block = max(1, len(gram) // BLOCKS)
        found = order_channels(gram, down, block=block, overwrite_gram=True)  # nobody reads it again
        return ChannelOrder(found.order.cpu(), found.curve.cpu())

    def share(self) -> None:
        if "qk" not in self.settings.components:
            return
        layers = list(range(len(self.layers)))
        if self.per_layer:
            self.tables = [self._table([layer]) for layer in layers]
        else:
            self.tables = [self._table(layers)] * len(layers)

    def _table(self, layers: list[int]) -> Table:
        """Bands that these layers share, by dynamic programming over their summed costs."""
        pairs, floor = self.model.rope.short, self.settings.eigenvalue_floor
        distances = self._distances(layers)
        constancy = distances.constancy(pairs)
        chosen = [self.layers[layer] for layer in layers]
        grams = [pair_grams(x.q_gram, x.k_gram, x.k_mean, constancy, centring=CENTRING) for x in chosen]
        units = [layer.score_unit for layer in chosen]
        costs = band_costs(grams, units, pairs, distances, longest=LONGEST_BAND, floor=floor)
        bands = [bands for _, bands in best_bands(costs, len(pairs), len(pairs))]
        return Table(bands, dict(zip(layers, grams, strict=True)))

    def _distances(self, layers: list[int]) -> Distances:
        mass = torch.stack([self.layers[layer].attention_mass for layer in layers]).sum(0)
        return spread_distances(mass, self.settings.context or self.model.rope.context, far_weight=FAR_WEIGHT)

    def settle(self, sizes: Sequence[LayerSizes]) -> None:
        """In the stock shape, evenly spaced slots if they cost next to nothing: every runtime reads them."""
        self.damping.clear()  # what projections that are not part of the solution took
        rank = sizes[0].qk
        if self.per_layer or rank == self.model.shape.head_dim or rank in self.affine:
            return
        layers = range(len(self.layers))
        allowed = (1 + AFFINE_COST) * sum(self._score_loss(layer, rank) for layer in layers)
        for slots in evenly_spaced(self.model.rope, self.rope_slots(0, rank)):
            loss = 0.0
            for layer in layers:
                loss += self._loss_of(layer, self._slot_maps(layer, rank, slots))
                if loss > allowed:
                    break
            else:
                self.affine[rank] = slots
                return

    def _slot_maps(self, layer: int, rank: int, slots: list[float] | None = None) -> SlotMaps:
        """Bands give the maps to start from, and the slots unless others are given; the layer's own distances count."""
        table = self.tables[layer]
        _, start = band_maps(table.grams[layer], table.bands[rank // 2], floor=self.settings.eigenvalue_floor)
        return self._problem(layer, slots or self.rope_slots(layer, rank)).solve(start)

    def _problem(self, layer: int, slots: list[float]) -> SlotProblem:
        pairs = self.model.rope.short
        return SlotProblem(
            self.layers[layer].heads,
            pairs,
            frequency_at(pairs, torch.tensor(slots, dtype=torch.float64)),
            self._distances([layer]),
            centring=CENTRING,
            floor=self.settings.eigenvalue_floor,
        )

    def curves(self, layer: int) -> Curves:
        solved = self.layers[layer]
        ov = tail_sums(solved.ov.values).sum(0) * solved.attention_unit
        mlp = solved.channels.curve * solved.mlp_unit
        return {
            "qk": {rank: self._score_loss(layer, rank) for rank in self.sizes("qk")},
            "ov": {rank: ov[rank].item() for rank in self.sizes("ov")},
            "mlp": {width: mlp[width].item() for width in self.sizes("mlp")},
        }

    def _score_loss(self, layer: int, rank: int) -> float:
        if rank == self.model.shape.head_dim:
            return 0.0
        if (layer, rank) not in self.score_losses:
            self.score_losses[layer, rank] = self._loss_of(layer, self._slot_maps(layer, rank))
        return self.score_losses[layer, rank]

    def _loss_of(self, layer: int, maps: SlotMaps) -> float:
        return float(self.layers[layer].score_unit @ maps.loss)

    def rope_slots(self, layer: int, rank: int) -> list[float]:
        if rank in self.affine:
            return self.affine[rank]
        return [band.slot for band in self.tables[layer].bands[rank // 2] for _ in range(band.rank)]

    def project_qk(self, inputs: LayerInputs, rank: int) -> Tensors:
        query_map, key_map = self._slot_maps(inputs.layer, rank).real()
        return {"query_map": query_map, "key_map": key_map}

    def project_ov(self, inputs: LayerInputs, rank: int) -> Tensors:
        value_map = self.layers[inputs.layer].ov.shared_map[..., :rank].contiguous().to(self.device)
        weight, ridge = inputs.output_weight.flatten(0, 1).to(self.device), self.settings.ridge
        refined = [value_map]

        def fit(gram: torch.Tensor) -> torch.Tensor:
            refined[0] = refine_values(gram, weight, value_map, ridge=ridge, rounds=VALUE_ROUNDS)
            return refit_output(gram, weight, refined[0], ridge=ridge)

        refit = self._damped(inputs, "ov", inputs.o_gram.to(self.device), fit)
        return {"value_map": refined[0].cpu(), "output_weight": refit.mT.float().contiguous().cpu()}

    def project_mlp(self, inputs: LayerInputs, width: int) -> Tensors:
        kept = self.layers[inputs.layer].channels.order[:width].sort().values
        down, chosen = inputs.down.to(self.device), kept.to(self.device)
        refit = self._damped(
            inputs,
            "mlp",
            fitted_gram(inputs).to(self.device),
            lambda gram: refit_down(gram, down, chosen, ridge=self.settings.ridge),
        ).cpu()
        tensors = {"channels": kept, "down_weight": refit.float().contiguous()}
        if inputs.shape.mlp_bias:
            mean = inputs.mlp_mean.double()
            bias = inputs.down_bias.double() + inputs.down.double() @ mean - refit @ mean[kept]
            tensors["down_bias"] = bias.float()
        return tensors

    def _damped(
        self,
        inputs: LayerInputs,
        component: Component,
        gram: torch.Tensor,
        refit: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """A refit from `gram` or, where rounding left that indefinite, from one with a larger diagonal.

        What it took is in `describe`. Raises A3Error if a hundredth of the mean diagonal is too little.
        """
        for damping in (0.0, *(10.0**-power for power in range(7, 1, -1))):
            try:
                result = refit(with_larger_diagonal(gram, damping) if damping else gram)
            except ValueError as error:
                failure = error
                continue
            if damping:
                log.warning("layer %d, %s: singular statistics, damped by %g", inputs.layer, component.upper(), damping)
            self.damping[inputs.layer][component] = max(damping, self.settings.ridge)
            return result
        raise A3Error(
            f"layer {inputs.layer}, {component.upper()}: the refit fails even when damped ({failure}); "
            "calibrate on more tokens or raise --ridge"
        ) from failure

    def describe(self, layer: int) -> Json:
        solved = self.layers[layer]
        energy = {
            "qk": float(solved.score_unit @ self._problem(layer, [0.0]).energy),
            "ov": float(solved.ov.values.sum()) * solved.attention_unit,
            "mlp": float(solved.channels.curve[0]) * solved.mlp_unit,
        }
        ranks, damping = describe_ranks(solved.ov, solved.key_ranks, solved.channel_rank), self.damping[layer]
        return {**ranks, "energy": energy, "damping": {c: damping[c] for c in COMPONENTS if c in damping}}
