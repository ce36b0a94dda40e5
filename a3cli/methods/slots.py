"""Choose the RoPE slots of `best`: bands of neighbouring pairs, or evenly spaced slots, which most runtimes load."""

from collections.abc import Sequence
from dataclasses import replace

from a3cli.methods.analysis import BestLayer
from a3cli.methods.base import AttentionError, Slots, Start, Table
from a3cli.methods.maps import MapSolver
from a3cli.methods.trials import Trial
from a3cli.models.rope import evenly_spaced
from a3cli.solvers.rope import band_costs, best_bands

LONGEST_BAND = 16  # pairs; longer bands were never chosen, and cost grows with the square
AFFINE_COST = 0.01  # evenly spaced slots are preferred if they add at most this share of the total predicted loss
PROMISING = 1.2  # slots within this factor of the allowed loss, assuming the usual gain of refinement, are refined


def band_tables(solver: MapSolver, layers: Sequence[BestLayer], ranks: Sequence[int]) -> list[Table]:
    """Return the tables of layers that share bands, found by dynamic programming over their summed costs."""
    rope, form, distances = solver.rope, solver.form, solver.distances(layers)
    grams = [form.grams(layer.q_gram, layer.k_gram, layer.k_mean, distances) for layer in layers]
    units, turning = [layer.score_unit for layer in layers], rope.short[: rope.turning]
    costs = band_costs(grams, units, turning, distances, longest=LONGEST_BAND, floor=form.floor)
    pairs = len(rope.short)
    bands = {2 * slots: found for slots, (_, found) in enumerate(best_bands(costs, pairs, pairs))}
    chosen = {rank: [band.slot for band in bands[rank] for _ in range(band.rank)] for rank in ranks}
    among = [layer.inputs().layer for layer in layers]
    return [{rank: Slots(chosen[rank], Start(own, bands[rank], among)) for rank in ranks} for own in grams]


def best_spacing(
    solver: MapSolver, layers: Sequence[BestLayer], slots: Sequence[Slots], *, linear_factor: bool
) -> list[Slots]:
    """Return each layer's slots if they must be evenly spaced: those with the least score error in closed form."""

    def loss(pairs: list[float]) -> float:
        tried = zip(layers, with_pairs(slots, pairs), strict=True)
        return sum(Trial(solver, layer, own).score_loss() for layer, own in tried)

    spacings = evenly_spaced(solver.rope, slots[0].pairs, linear_factor=linear_factor)
    return with_pairs(slots, min(spacings or [slots[0].pairs], key=loss))  # there may be no rotated slot


def cheap_spacing(
    solver: MapSolver,
    layers: Sequence[BestLayer],
    slots: Sequence[Slots],
    errors: Sequence[AttentionError],
    other_losses: float,
) -> list[Slots]:
    """Return each layer's slots, evenly spaced if that costs next to nothing: most runtimes load them.

    `errors` are those of the given slots after a quick refinement, `other_losses` those of values and the MLP.
    """
    loss, before = sum(error.refined for error in errors), sum(error.closed_form for error in errors)
    allowed, gain = loss + AFFINE_COST * (loss + other_losses), loss / before if before else 1.0
    chosen = list(slots)
    for pairs in evenly_spaced(solver.rope, slots[0].pairs):
        spaced = with_pairs(slots, pairs)
        tried = [Trial(solver, layer, own) for layer, own in zip(layers, spaced, strict=True)]
        before = sum(each.closed_error() for each in tried)
        if before * gain <= PROMISING * allowed:
            loss = sum(each.quick_error().refined for each in tried)
            if loss <= allowed:
                chosen, allowed = spaced, loss
    return chosen


def with_pairs(slots: Sequence[Slots], pairs: list[float]) -> list[Slots]:
    """Return the slots with other source pairs."""
    return [replace(each, pairs=pairs) for each in slots]
