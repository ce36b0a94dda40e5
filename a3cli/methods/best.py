"""`--method best`: RoPE slots, attention-weighted OV with a joint refit, MLP selection with a refit.

- QK: bands of neighbouring pairs choose the slots (`solvers/rope.py`), then every slot mixes every pair, by alternating
  least squares on the scores (`solvers/slots.py`), and last the maps are refined for attention's output on sampled
  queries (`solvers/attention.py`). Each layer and KV head has its own maps; the table of slots is shared by all layers
  in the stock shape, and each layer's own in the per-layer shape.
- OV: the mean attention-weighted Gram matrix of the group; then value maps and the output projection are fitted over
  all heads at once, by alternating least squares.
- MLP: forward greedy selection that accounts for the refit, then the refit of the down projection.
"""

import math
from collections.abc import Sequence

import numpy
from typing_extensions import override

from a3cli.methods import maps
from a3cli.methods.analysis import BestLayer, analyse_layer
from a3cli.methods.base import (
    Analysis,
    AttentionError,
    Curves,
    ForEachLayer,
    Method,
    Prediction,
    Projection,
    Slots,
    Table,
    describe_layer,
)
from a3cli.methods.heads import heads_of
from a3cli.methods.inputs import LayerInputs
from a3cli.methods.maps import MapSolver
from a3cli.methods.normed import NormedSolver
from a3cli.methods.refits import refit_channels, refit_experts, refit_values
from a3cli.methods.slots import REFINING, band_tables, best_spacing, cheap_spacing
from a3cli.methods.trials import Trial, loss_of_nothing
from a3cli.models.families import LayerSizes
from a3cli.work.files import Json
from a3cli.work.progress import portion

REFINED_AT = (1 / 4, 1 / 2, 3 / 4, 7 / 8)  # of a head: sizes measured on sampled attention; others are interpolated


class Best(Method[BestLayer]):
    def solver_of(self, layer: int) -> MapSolver:
        """Return the solver for one layer and all that have the same RoPE."""
        rope, context = self.model.table_of(layer), self.settings.context or self.model.rope.context
        form = heads_of(rope, floor=self.settings.eigenvalue_floor)
        kind = NormedSolver if self.model.shape.fitted_norms else MapSolver
        if rope is self.model.local_rope:  # which serves no distance beyond the window
            context = min(context, self.model.shape.windows[layer] or context)
        return kind(rope, form, context, self.machine.device)

    def _solver_for(self, layer: BestLayer) -> MapSolver:
        return self.solver_of(layer.inputs().layer)

    @override
    def analyse(self, inputs: LayerInputs) -> BestLayer:
        return analyse_layer(inputs, self.solver_of(inputs.layer).form, self.settings, self.machine.device)

    @override
    def smaller_tables(self, layers: Sequence[BestLayer]) -> list[Table]:
        """Choose bands, or evenly spaced slots if the settings force them."""
        ranks, found = self.smaller_ranks(), [Table() for _ in layers]
        groups = [[i] for i in range(len(layers))] if self.per_layer else self.model.layers_by_table()
        for group in groups:
            with portion(len(group) / len(layers)):
                shared = self._shared_tables(self.solver_of(group[0]), [layers[i] for i in group], ranks)
            for i, table in zip(group, shared, strict=True):
                found[i] = table
        return found

    def _shared_tables(self, solver: MapSolver, layers: Sequence[BestLayer], ranks: Sequence[int]) -> list[Table]:
        """Return the tables of layers that share their slots."""
        tables = band_tables(solver, layers, ranks)
        if self.settings.rope_form not in ("theta", "linear"):
            return tables
        linear_factor = self.settings.rope_form == "linear" and solver.rope is self.model.rope
        spaced = {
            rank: best_spacing(solver, layers, [table[rank] for table in tables], linear_factor=linear_factor)
            for rank in ranks
        }
        return [{rank: spaced[rank][layer] for rank in ranks} for layer in range(len(layers))]

    @override
    def predict(self, layers: Sequence[BestLayer], tables: Sequence[Table], layer: int) -> Prediction:
        outputs, channels = layers[layer].output_losses(), layers[layer].channel_losses()
        attention, measured = self._predict_attention(layers[layer], tables[layer])
        losses: Curves = {
            "qk": attention,
            "ov": {rank: outputs[rank].item() for rank in self.sizes("ov")},
            "mlp": {width: channels[width].item() for width in self.sizes("mlp")},
        }
        return Prediction(losses, measured)

    def _predict_attention(self, layer: BestLayer, table: Table) -> tuple[dict[int, float], dict[int, AttentionError]]:
        """Return the loss at each head size, and the measured errors of attention.

        Score errors predict the loss up to a factor that is measured on samples at some sizes, interpolated between.
        """
        predicted: dict[int, float] = {}
        measured: dict[int, AttentionError] = {}
        for rank in self.smaller_ranks():
            trial = self._trial(layer, table[rank])
            predicted[rank] = trial.predicted_loss()
            if rank in self._measured_ranks():
                with portion(1 / len(self._measured_ranks())):  # nearly all of the time
                    measured[rank] = trial.quick_error()
        gains = {
            rank: error.refined / predicted[rank] if predicted[rank] > 0 else 1.0 for rank, error in measured.items()
        }
        losses = {rank: loss * interpolate(gains, rank) for rank, loss in predicted.items()}
        return losses | {self.model.shape.head_dim: 0.0}, measured

    def _measured_ranks(self) -> list[int]:
        below = self.smaller_ranks()
        wanted = [share * self.model.shape.head_dim for share in REFINED_AT]
        return sorted({min(below, key=lambda rank: abs(rank - each)) for each in wanted}) if below else []

    @override
    def choose_slots(
        self, analysis: Analysis[BestLayer], sizes: Sequence[LayerSizes], for_each_layer: ForEachLayer
    ) -> list[Slots]:
        """In the stock shape, use evenly spaced slots if they cost next to nothing: most runtimes load them."""
        slots, rank = super().choose_slots(analysis, sizes, for_each_layer), sizes[0].qk
        if self.per_layer or rank == self.model.shape.head_dim or self.settings.rope_form != "auto":
            return slots
        losses = [prediction.losses for prediction in analysis.predictions]
        others = sum(each["ov"][size.ov] + each["mlp"][size.mlp] for each, size in zip(losses, sizes, strict=True))

        def error(layer: int) -> AttentionError:
            measured = analysis.predictions[layer].measured.get(rank)
            return measured or self._trial(analysis.layers[layer], slots[layer]).quick_error()

        errors = for_each_layer(REFINING, error, range(len(slots)))
        chosen = list(slots)
        for group in self.model.layers_by_table():
            elsewhere = sum(error.refined for i, error in enumerate(errors) if i not in group)
            found = cheap_spacing(
                self.solver_of(group[0]),
                [analysis.layers[i] for i in group],
                [slots[i] for i in group],
                [errors[i] for i in group],
                others + elsewhere,
                for_each_layer,
            )
            for i, spaced in zip(group, found, strict=True):
                chosen[i] = spaced
        return chosen

    def _trial(self, layer: BestLayer, slots: Slots) -> Trial:
        return Trial(self._solver_for(layer), layer, slots)

    @override
    def project_qk(self, layer: BestLayer, slots: Slots) -> Projection:
        return self._trial(layer, slots).refined(maps.THOROUGH if self.per_layer else maps.QUICK)

    @override
    def project_ov(self, inputs: LayerInputs, layer: BestLayer, rank: int) -> Projection:
        return refit_values(inputs, layer, rank, ridge=self.settings.ridge, device=self.machine.device)

    @override
    def project_mlp(self, inputs: LayerInputs, layer: BestLayer, width: int) -> Projection:
        refit = refit_experts if inputs.shape.experts else refit_channels
        return refit(inputs, layer, width, ridge=self.settings.ridge, device=self.machine.device)

    @override
    def describe(self, layer: BestLayer) -> Json:
        return describe_layer(
            layer,
            channel_rank=layer.channel_rank,
            qk_energy=loss_of_nothing(self._solver_for(layer), layer) if self.model.shape.heads else 0.0,
            mlp_energy=float(layer.channels.curve[0]) * layer.mlp_unit,
        )


def interpolate(measured: dict[int, float], rank: int) -> float:
    """Interpolate a factor geometrically between measured ranks; beyond them the nearest one, 1 if there is none."""
    if not measured:
        return 1.0
    ranks, logs = list(measured), [math.log(max(value, 1e-30)) for value in measured.values()]
    return math.exp(numpy.interp(rank, ranks, logs))
