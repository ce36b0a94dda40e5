"""Choose the RoPE slots of `best`: bands of neighbouring pairs, or evenly spaced slots, which most runtimes load."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from a3cli.methods.analysis import BestLayer
from a3cli.methods.base import AttentionError, ForEachLayer, Slots, Start, Table
from a3cli.methods.maps import MapSolver
from a3cli.methods.trials import Trial
from a3cli.models.rope import evenly_spaced
from a3cli.solvers.rope import band_costs, best_bands
from a3cli.work.progress import advance, portion

LONGEST_BAND = 16  # pairs; longer bands were never chosen, and cost grows with the square
AFFINE_COST = 0.01  # evenly spaced slots are preferred if they add at most this share of the total predicted loss
REFINING = "refining query and key maps"  # name of the step
PROMISING = 1.2  # slots within this factor of the allowed loss, assuming the usual gain of refinement, are refined


def band_tables(solver: MapSolver, layers: Sequence[BestLayer], ranks: Sequence[int]) -> list[Table]:
    """Return the tables of layers that share bands, found by dynamic programming over their summed costs."""
    rope, form, distances = solver.rope, solver.form, solver.distances(layers)
    grams = [form.grams(layer.q_gram, layer.k_gram, layer.k_mean, distances) for layer in layers]
    units, turning = [layer.score_unit for layer in layers], rope.short[: rope.turning]
    longest, floor = LONGEST_BAND, form.floor
    costs = band_costs(grams, units, turning, distances, longest=longest, floor=floor, advance=advance)
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
    for_each_layer: ForEachLayer,
) -> list[Slots]:
    """Return each layer's slots, evenly spaced if that costs next to nothing: most runtimes load them.

    `errors` are those of the given slots after a quick refinement, `other_losses` those of values and the MLP.
    """
    loss, before = sum(error.refined for error in errors), sum(error.closed_form for error in errors)
    allowed, gain = loss + AFFINE_COST * (loss + other_losses), loss / before if before else 1.0
    spacings, places = evenly_spaced(solver.rope, slots[0].pairs), range(len(layers))

    def trial(place: int, pairs: list[float]) -> Trial:
        return Trial(solver, layers[place], replace(slots[place], pairs=pairs))

    def closed_errors(place: int) -> list[float]:
        found = []
        for pairs in spacings:
            with portion(1 / len(spacings)):
                found.append(trial(place, pairs).closed_error())
        return found

    def quick_error(pairs: list[float], place: int) -> AttentionError:
        return trial(place, pairs).quick_error()

    chosen = list(slots)
    closed = for_each_layer("comparing RoPE slots", closed_errors, places) if spacings else []
    for pairs, before in zip(spacings, map(sum, zip(*closed, strict=True)), strict=True):
        if before * gain <= PROMISING * allowed:
            refine = partial(quick_error, pairs)
            loss = sum(error.refined for error in for_each_layer(REFINING, refine, places))
            if loss <= allowed:
                chosen, allowed = with_pairs(slots, pairs), loss
    return chosen


def with_pairs(slots: Sequence[Slots], pairs: list[float]) -> list[Slots]:
    """Return the slots with other source pairs."""
    return [replace(each, pairs=pairs) for each in slots]
