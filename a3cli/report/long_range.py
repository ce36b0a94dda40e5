"""Warn about distances beyond the calibrated length, from a solution's manifest."""

from typing import TYPE_CHECKING

from a3cli.report.figures import percent

if TYPE_CHECKING:
    from a3cli.work.manifests import ByDistance, Solution

# Relative error of attention scores. Where a model was calibrated it is mostly below 15 %: the demo model, calibrated
# on 256 tokens and cut by 25 %, has 5 % at distance 1, 14 % at 128, 30 % at 256 and 94 % at 511.
LARGE_SCORE_ERROR = 0.25


def solution_warnings(solution: "Solution") -> list[str]:
    """Return a warning if attention scores are predicted to be far off beyond the calibrated length."""
    length = solution.prefill_flops_per_token.seq_len
    mean = by_distance(solution.predicted_score_error)
    beyond = {distance: error for distance, error in mean.items() if distance >= length}
    same = len(set(mean.values())) == 1  # without RoPE
    if same or not beyond or max(beyond.values()) <= LARGE_SCORE_ERROR:
        return []
    distance = max(beyond, key=lambda each: beyond[each])
    of_layers = [by_distance(layer.score_error)[distance] for layer in solution.per_layer]
    worst = max(range(len(of_layers)), key=lambda layer: of_layers[layer])
    smaller = "--budget or --attention-budget" if solution.request.settings.kv_budget is None else "--kv-budget"
    within = max(error for each, error in mean.items() if each < length)
    return [
        f"QK: the predicted error of attention scores is {percent(beyond[distance])} at distance {distance:,} "
        f"({percent(of_layers[worst])} in layer {worst}), beyond the {length:,} tokens of a calibration block, within "
        f"which it is at most {percent(within)}: calibrate with a longer --seq-len, lower the served context "
        f"(a3 solve --context {length}), or keep more of the heads (a smaller {smaller})"
    ]


def by_distance(error: "ByDistance") -> dict[int, float]:
    return dict(zip(error.distance, error.relative, strict=True))
