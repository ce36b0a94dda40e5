"""`--method best`: RoPE slots, attention-weighted OV with a joint refit, MLP selection with a refit.

- QK: bands of neighbouring pairs choose the slots (`solvers/rope.py`), then every slot mixes every pair, by alternating
  least squares on the scores (`solvers/slots.py`), and last the maps are refined for attention's output on sampled
  queries (`solvers/attention.py`). Each layer and KV head has its own maps; the table of slots is shared by all layers
  in the stock shape, and each layer's own in the per-layer shape.
- OV: the mean attention-weighted Gram matrix of the group; then value maps and the output projection are fitted over
  all heads at once, by alternating least squares.
- MLP: forward greedy selection that accounts for the refit, then the refit of the down projection.
"""

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy
import torch

from a3cli.errors import A3Error
from a3cli.methods.attention import AttentionError, Effort, RefinedMaps, refine_maps, score_penalty
from a3cli.methods.base import Curves, LayerInputs, Method, describe_ranks
from a3cli.methods.heads import Heads, Problem, heads_of
from a3cli.models.families import LayerSizes
from a3cli.models.model import Model
from a3cli.models.rope import evenly_spaced
from a3cli.settings import COMPONENTS, Component, SolveSettings
from a3cli.solvers.attention import Penalty
from a3cli.solvers.linalg import JointDecomposition, effective_rank, tail_sums
from a3cli.solvers.mlp import ChannelOrder, order_channels, refit_down
from a3cli.solvers.moments import Tensors
from a3cli.solvers.ov import refine_values, refit_output, solve_ov
from a3cli.solvers.rope import (
    Band,
    Distances,
    PairGrams,
    band_costs,
    best_bands,
    distances_beyond,
    spread_distances,
)
from a3cli.solvers.slots import HeadStatistics, SlotMaps
from a3cli.work.files import Json
from a3cli.work.sealed import read_if_request_matches, versions, write_manifest

log = logging.getLogger(__name__)

ATTAINED = 1 / 3  # of the bound on the effect of score errors
LONGEST_BAND = 16  # pairs; longer bands were never chosen, and cost grows with the square
FAR_WEIGHT = 0.05  # weight of all distances up to the context, beside those that calibration measured
AFFINE_COST = 0.01  # evenly spaced slots are preferred if they add at most this share of the total predicted loss
VALUE_ROUNDS = 3  # of refinement of the value maps over all heads
THOROUGH = Effort(iterations=20)  # of refinement of query and key maps
QUICK = Effort(iterations=10, few=True)  # if only the loss is needed
UNREFINED = Effort(iterations=0, few=True)
PROMISING = 1.2  # slots within this factor of the allowed loss, assuming the usual gain of refinement, are refined
REFINED_AT = (1 / 4, 1 / 2, 3 / 4)  # of a head: sizes measured on sampled attention; others are interpolated
BLOCKS = 256  # number of blocks in which greedy selection takes the MLP's channels


def fitted_gram(inputs: LayerInputs) -> torch.Tensor:
    """Return the Gram matrix `[I, I]` for the fit of the down projection: about the mean if a bias can absorb it."""
    gram = inputs.mlp_gram()
    if not inputs.shape.mlp_bias:
        return gram
    mean = inputs.mlp_mean.double()
    return gram.addr_(mean, mean, alpha=-1)


def with_larger_diagonal(gram: torch.Tensor, damping: float) -> torch.Tensor:
    """Return a copy with `damping` times the mean of its diagonal added to the diagonal."""
    damped = gram.clone()
    damped.diagonal().add_(damping * gram.diagonal().mean())
    return damped


def read_order(path: Path, request: Json) -> ChannelOrder | None:
    """Read the channel order of an earlier solution: selection takes long and does not depend on the budget."""
    found = read_if_request_matches(path, request)
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
    inputs: Callable[[], LayerInputs]
    score_unit: torch.Tensor
    ov: JointDecomposition
    channels: ChannelOrder
    attention_unit: float
    mlp_unit: float
    key_ranks: list[float]
    channel_rank: float
    form: Heads

    @cached_property
    def heads(self) -> HeadStatistics:
        return self.form.statistics(self.q_gram, self.k_gram, self.k_mean)


@dataclass(frozen=True)
class Table:
    """Bands for every number of slots, the layers that share them, and the Gram matrices they were computed from."""

    bands: list[list[Band]]
    grams: dict[int, PairGrams]


def interpolate(measured: dict[int, float], rank: int) -> float:
    """Interpolate a factor geometrically between measured ranks; beyond them the nearest one, 1 if there is none."""
    if not measured:
        return 1.0
    ranks, logs = list(measured), [math.log(max(value, 1e-30)) for value in measured.values()]
    return math.exp(numpy.interp(rank, ranks, logs))


class Best(Method):
    def __init__(self, model: Model, settings: SolveSettings) -> None:
        super().__init__(model, settings)
        self.form = heads_of(model.rope, floor=settings.eigenvalue_floor)
        self.layers: list[BestLayer] = []
        self.tables: list[Table] = []  # per layer
        self.affine: dict[int, list[float]] = {}  # evenly spaced slots that replace a shared table's, by rank
        self.score_losses: dict[tuple[int, int], float] = {}  # by layer and rank
        self.gains: dict[int, dict[int, float]] = {}  # measured loss over the scores' loss, by layer and rank
        self.quick: dict[tuple[int, int], AttentionError] = {}  # errors with a table's own slots, by layer and rank
        self.errors: dict[int, AttentionError] = {}  # errors of the maps in the solution
        self.damping: defaultdict[int, dict[Component, float]] = defaultdict(dict)  # of the refits, by layer

    def add_layer(self, inputs: LayerInputs) -> None:
        shape = inputs.shape
        group_outputs = inputs.head_outputs.view(shape.kv_heads, shape.group, shape.head_dim, shape.head_dim).mean(1)
        self.layers.append(
            BestLayer(
                q_gram=inputs.mean("q_gram"),
                k_gram=inputs.mean("k_gram"),
                k_mean=inputs.mean("k_sum"),
                attention_mass=inputs.mean("distance"),
                inputs=inputs.opened_again(),
                score_unit=inputs.score_unit(ATTAINED) / 2,  # a real score has half the energy of its complex form
                ov=solve_ov(group_outputs, inputs.output_gram, floor=self.settings.eigenvalue_floor),
                channels=self._order_channels(inputs),
                attention_unit=inputs.attention_unit,
                mlp_unit=inputs.mlp_unit,
                key_ranks=inputs.key_ranks(),
                channel_rank=effective_rank(inputs.mean("mlp_energy")).item(),
                form=self.form,
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
        found = order_channels(gram, down, block=block, overwrite_gram=True)  # it is not used again
        return ChannelOrder(found.order.cpu(), found.curve.cpu())

    def build_slot_tables(self) -> None:
        if "qk" not in self.settings.components:
            return
        layers = list(range(len(self.layers)))
        if self.per_layer:
            self.tables = [self._table([layer]) for layer in layers]
        else:
            self.tables = [self._table(layers)] * len(layers)
            if self._spacing_is_forced:
                smaller = (rank for rank in self.sizes("qk") if rank < self.model.shape.head_dim)
                self.affine = {rank: self._best_spacing(rank) for rank in smaller}

    @property
    def _spacing_is_forced(self) -> bool:
        return self.settings.rope_form in ("theta", "linear")

    def _best_spacing(self, rank: int) -> list[float]:
        """Return the evenly spaced slots with the least score error in closed form, summed over layers."""
        layers = range(len(self.layers))
        return min(
            self._spacings(rank) or [self._band_slots(0, rank)],  # there may be no rotated slot
            key=lambda slots: sum(self._loss_of(layer, self._slot_maps(layer, rank, slots)) for layer in layers),
        )

    def _spacings(self, rank: int) -> list[list[float]]:
        linear_factor = self.settings.rope_form == "linear"
        return evenly_spaced(self.model.rope, self._band_slots(0, rank), linear_factor=linear_factor)

    def _table(self, layers: list[int]) -> Table:
        """Return the bands shared by these layers, by dynamic programming over their summed costs."""
        rope, floor = self.model.rope, self.settings.eigenvalue_floor
        distances, pairs = self._distances(layers), len(rope.short)
        chosen = [self.layers[layer] for layer in layers]
        grams = [self.form.grams(x.q_gram, x.k_gram, x.k_mean, distances) for x in chosen]
        units = [layer.score_unit for layer in chosen]
        turning = rope.short[: rope.turning]
        costs = band_costs(grams, units, turning, distances, longest=LONGEST_BAND, floor=floor)
        bands = [bands for _, bands in best_bands(costs, pairs, pairs)]
        return Table(bands, dict(zip(layers, grams, strict=True)))

    def _distances(self, layers: list[int]) -> Distances:
        mass = torch.stack([self.layers[layer].attention_mass for layer in layers]).sum(0)
        return spread_distances(mass, self._context, far_weight=FAR_WEIGHT)

    def finalize_slots(self, sizes: Sequence[LayerSizes]) -> None:
        """In the stock shape, use evenly spaced slots if they cost next to nothing: most runtimes load them."""
        self.damping.clear()  # drop the damping and errors of projections that are not part of the solution
        self.errors.clear()
        rank = sizes[0].qk
        if self.per_layer or rank == self.model.shape.head_dim or self.settings.rope_form != "auto":
            return
        self.affine.clear()
        layers = range(len(self.layers))
        own = [self._quickly(layer, rank) for layer in layers]
        others = sum(
            self._output_curve(layer)[size.ov].item() + self._channel_curve(layer)[size.mlp].item()
            for layer, size in enumerate(sizes)
        )
        loss, before = sum(each.refined for each in own), sum(each.closed_form for each in own)
        allowed, gain = loss + AFFINE_COST * (loss + others), loss / before if before else 1.0
        chosen: list[float] = []
        for slots in self._spacings(rank):
            closed = [self._slot_maps(layer, rank, slots) for layer in layers]
            before = sum(self._refine(layer, slots, closed[layer], UNREFINED).error.closed_form for layer in layers)
            if before * gain <= PROMISING * allowed:
                loss = sum(self._refine(layer, slots, closed[layer], QUICK).error.refined for layer in layers)
                if loss <= allowed:
                    chosen, allowed = slots, loss
        if chosen:
            self.affine[rank] = chosen

    def _quickly(self, layer: int, rank: int) -> AttentionError:
        """Return the error of quickly refined maps with the slots of the bands."""
        if (layer, rank) not in self.quick:
            closed = self._slot_maps(layer, rank)
            self.score_losses[layer, rank] = self._loss_of(layer, closed)
            self.quick[layer, rank] = self._refine(layer, self.rope_slots(layer, rank), closed, QUICK).error
        return self.quick[layer, rank]

    def _slot_maps(self, layer: int, rank: int, slots: list[float] | None = None) -> SlotMaps:
        """Solve for maps, starting from bands, which also give the slots by default; use the layer's own distances."""
        table = self.tables[layer]
        start = self.form.start(table.grams[layer], table.bands[rank // 2])
        return self._problem(layer, slots or self.rope_slots(layer, rank)).solve(start)

    def _problem(self, layer: int, slots: list[float]) -> Problem:
        return self.form.problem(self.layers[layer].heads, slots, self._distances([layer]))

    @torch.inference_mode(False)  # inference mode has no gradients, and probing calls this in it
    def _refine(self, layer: int, slots: list[float], closed: SlotMaps, effort: Effort) -> RefinedMaps:
        """Refine the closed form's maps on sampled attention, and on scores beyond the samples' length."""
        inputs, far = self.layers[layer].inputs(), self._far_penalties(layer, slots, effort)
        return refine_maps(inputs, self.model.rope, slots, closed, far, effort, self.device)

    def _far_penalties(self, layer: int, slots: list[float], effort: Effort) -> list[Penalty | None]:
        """Return the cost of score errors beyond the samples' length for each KV head, if maps are fitted."""
        solved = self.layers[layer]
        beyond = distances_beyond(len(solved.attention_mass), self._context)
        if beyond is None or effort.iterations == 0:
            return [None] * self.model.shape.kv_heads
        weights = FAR_WEIGHT * solved.score_unit / solved.attention_unit
        return [
            score_penalty(self.form.problem(solved.heads.of(kv_head), slots, beyond), weight)
            for kv_head, weight in enumerate(weights.tolist())
        ]

    @property
    def _context(self) -> int:
        return self.settings.context or self.model.rope.context

    def curves(self, layer: int) -> Curves:
        outputs, channels = self._output_curve(layer), self._channel_curve(layer)
        return {
            "qk": {rank: self._attention_loss(layer, rank) for rank in self.sizes("qk")},
            "ov": {rank: outputs[rank].item() for rank in self.sizes("ov")},
            "mlp": {width: channels[width].item() for width in self.sizes("mlp")},
        }

    def _output_curve(self, layer: int) -> torch.Tensor:
        return tail_sums(self.layers[layer].ov.values).sum(0) * self.layers[layer].attention_unit

    def _channel_curve(self, layer: int) -> torch.Tensor:
        return self.layers[layer].channels.curve * self.layers[layer].mlp_unit

    def _attention_loss(self, layer: int, rank: int) -> float:
        """Return the stream error caused by score errors: measured on samples at some sizes, interpolated between."""
        if layer not in self.gains:
            self.gains[layer] = {at: self._gain(layer, at) for at in self._measured_ranks()}
        return self._score_loss(layer, rank) * interpolate(self.gains[layer], rank)

    def _measured_ranks(self) -> list[int]:
        below = [rank for rank in self.sizes("qk") if rank < self.model.shape.head_dim]
        wanted = [share * self.model.shape.head_dim for share in REFINED_AT]
        return sorted({min(below, key=lambda rank: abs(rank - each)) for each in wanted}) if below else []

    def _gain(self, layer: int, rank: int) -> float:
        reached, predicted = self._quickly(layer, rank).refined, self._score_loss(layer, rank)
        return reached / predicted if predicted > 0 else 1.0

    def _score_loss(self, layer: int, rank: int) -> float:
        if rank == self.model.shape.head_dim:
            return 0.0
        if (layer, rank) not in self.score_losses:
            self.score_losses[layer, rank] = self._loss_of(layer, self._slot_maps(layer, rank))
        return self.score_losses[layer, rank]

    def _loss_of_nothing(self, layer: int) -> float:
        """Return the loss of attention that weighs all keys alike."""
        nothing = torch.zeros(self.model.shape.kv_heads, self.form.coordinates, 1, dtype=torch.complex128)
        maps = SlotMaps(nothing, nothing, nothing.real[:, 0, 0])
        return self._refine(layer, [0.0], maps, UNREFINED).error.closed_form

    def _loss_of(self, layer: int, maps: SlotMaps) -> float:
        return float(self.layers[layer].score_unit @ maps.loss)

    def rope_slots(self, layer: int, rank: int) -> list[float]:
        if rank in self.affine:
            return self.affine[rank]
        return self._band_slots(layer, rank)

    def _band_slots(self, layer: int, rank: int) -> list[float]:
        return [band.slot for band in self.tables[layer].bands[rank // 2] for _ in range(band.rank)]

    def project_qk(self, inputs: LayerInputs, rank: int) -> Tensors:
        slots = self.rope_slots(inputs.layer, rank)
        found = self._refine(inputs.layer, slots, self._slot_maps(inputs.layer, rank, slots), THOROUGH)
        self.errors[inputs.layer] = found.error
        return {"query_map": self.form.real_map(found.query, slots), "key_map": self.form.real_map(found.key, slots)}

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
        """Refit from `gram` or, if rounding left it indefinite, from one with a larger diagonal.

        `describe` reports the damping. Raises A3Error if a hundredth of the mean diagonal is too little.
        """
        for damping in (0.0, *(10.0**-power for power in range(7, 1, -1))):
            try:
                result = refit(with_larger_diagonal(gram, damping) if damping else gram)
            except ValueError as error:
                failure = str(error)  # keeping the error would keep its frames' matrices
                continue
            if damping:
                log.warning("layer %d, %s: singular statistics, damped by %g", inputs.layer, component.upper(), damping)
            self.damping[inputs.layer][component] = max(damping, self.settings.ridge)
            return result
        raise A3Error(
            f"layer {inputs.layer}, {component.upper()}: the refit fails even when damped ({failure}); "
            "calibrate on more tokens or raise --ridge"
        )

    def describe(self, layer: int) -> Json:
        solved = self.layers[layer]
        energy = {
            "qk": self._loss_of_nothing(layer),
            "ov": float(solved.ov.values.sum()) * solved.attention_unit,
            "mlp": float(solved.channels.curve[0]) * solved.mlp_unit,
        }
        error = self.errors.get(layer)
        ranks, damping = describe_ranks(solved.ov, solved.key_ranks, solved.channel_rank), self.damping[layer]
        return {
            **ranks,
            "energy": energy,
            "attention_error": asdict(error) if error else None,
            "damping": {c: damping[c] for c in COMPONENTS if c in damping},
        }
