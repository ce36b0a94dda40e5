"""Beyond the paper: bands, refits and greedy selection are exact where expected, optimal, never worse than plain."""

import itertools

import pytest
import torch

from a3cli.solvers.linalg import tail_sums
from a3cli.solvers.mlp import keep_channels, order_channels, refit_down, score_channels
from a3cli.solvers.ov import output_gram_of, refine_values, refit_output, solve_ov
from a3cli.solvers.qk import solve_qk
from a3cli.solvers.rope import (
    Band,
    Distances,
    as_pairs,
    band_costs,
    band_maps,
    best_bands,
    complex_gram,
    pair_grams,
    real_map,
    sharing_cost,
)
from tests.helpers.literal import random_attention

FLOOR = 1e-14


def grams_of(a, *, centring=0.0, constancy=None):
    constancy = torch.ones(4, 4, dtype=torch.float64) if constancy is None else constancy
    return pair_grams(a.gram(a.w_q), a.gram(a.w_k), (a.x @ a.w_k).mean(1), constancy, centring=centring)


def solve_bands(grams, bands, *, floor):
    return tuple(real_map(part) for part in band_maps(grams, bands, floor=floor))


def uniform(length):
    delta = torch.arange(length, dtype=torch.float64)
    return Distances(delta, torch.full_like(delta, 1 / length))


def rotate(x, positions, frequencies):
    """Apply stock RoPE to `[n, h]` at positions `[n]`, written out."""
    angle = positions[:, None] * frequencies
    first, second = x.chunk(2, -1)
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1)


def test_complex_gram_is_that_of_the_pairs():
    x = torch.randn(50, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z = as_pairs(x)
    torch.testing.assert_close(complex_gram(x.T @ x), z.T @ z.conj())


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
def test_full_rank_bands_leave_every_rotated_score_unchanged(heads, kv_heads):
    a = random_attention(heads, kv_heads, bias=True)
    shared = torch.tensor([0.9, 0.9, 0.2, 0.2], dtype=torch.float64)  # two bands whose pairs really share a frequency
    bands = [Band(0, 2, 2, 0), Band(2, 4, 2, 2)]
    query_map, key_map = solve_bands(grams_of(a), bands, floor=FLOOR)
    positions = torch.arange(len(a.x), dtype=torch.float64)
    for i in range(heads):
        k = i // a.group
        q, key = a.x @ a.w_q[i], a.x @ a.w_k[k]
        before = rotate(q, positions, shared) @ rotate(key, positions, shared).T
        after = rotate(q @ query_map[k], positions, shared) @ rotate(key @ key_map[k], positions, shared).T
        torch.testing.assert_close(after, before, rtol=1e-8, atol=1e-8)


def test_truncation_loss_is_the_predicted_tail():
    """Compare with the squared error of complex scores over all pairs of query and key tokens."""
    a = random_attention(3, 1, bias=False)
    grams = grams_of(a)
    bands = [Band(0, 4, 2, 0)]
    query_map, key_map = solve_bands(grams, bands, floor=FLOOR)
    error = 0.0
    for i in range(3):
        q, key = as_pairs(a.x @ a.w_q[i]), as_pairs(a.x @ a.w_k[0])
        small_q, small_k = as_pairs(a.x @ a.w_q[i] @ query_map[0]), as_pairs(a.x @ a.w_k[0] @ key_map[0])
        error += (q @ key.mH - small_q @ small_k.mH).abs().square().mean().item()
    same = torch.full((4,), 0.7, dtype=torch.float64)
    cost = band_costs([grams], [torch.ones(1, dtype=torch.float64)], same, uniform(1), longest=4, floor=FLOOR)
    assert error == pytest.approx(cost[0, 4].losses[0, 2].item(), rel=1e-9)


def test_one_pair_a_band_is_the_papers_selection():
    a = random_attention(4, 2, bias=False)
    frequencies = torch.tensor([1.0, 0.5, 0.1, 0.01], dtype=torch.float64)
    grams = grams_of(a)
    distances = uniform(64)
    cost = band_costs([grams], [torch.ones(2, dtype=torch.float64)], frequencies, distances, longest=1, floor=FLOOR)
    score = grams.energy.sum(0)
    for slots, (loss, bands) in enumerate(best_bands(cost, 4, 4)):
        kept = {band.start for band in bands if band.rank}
        assert kept == set(score.topk(slots).indices.tolist())
        assert loss == pytest.approx(score.sort().values[: 4 - slots].sum().item(), rel=1e-9, abs=1e-9)


def test_equal_frequencies_give_the_theorem_without_rope():
    """With one band of everything, complex rank r loses no more than real rank 2r of shared structure."""
    a = random_attention(4, 2, bias=False)
    same = torch.full((4,), 0.3, dtype=torch.float64)
    distances = uniform(16)
    cost = band_costs([grams_of(a)], [torch.ones(2, dtype=torch.float64)], same, distances, longest=4, floor=FLOOR)
    for slots, (loss, _) in enumerate(best_bands(cost, 4, 4)):
        assert loss <= cost[0, 4].losses[0, slots].item() * (1 + 1e-12) + 1e-12


def test_bands_are_the_best_partition():
    """Compare with every partition of the pairs into consecutive bands and every choice of ranks."""
    a = random_attention(4, 2, bias=False)
    frequencies = torch.tensor([1.0, 0.6, 0.3, 0.1], dtype=torch.float64)
    delta = torch.arange(12, dtype=torch.float64)
    distances = Distances(delta, torch.softmax(-delta / 4, 0))
    weights = torch.tensor([1.0, 3.0], dtype=torch.float64)
    cost = band_costs([grams_of(a)], [weights], frequencies, distances, longest=4, floor=FLOOR)
    best = {}
    for cuts in itertools.chain.from_iterable(itertools.combinations((1, 2, 3), n) for n in range(4)):
        edges = [0, *cuts, 4]
        spans = list(itertools.pairwise(edges))
        for ranks in itertools.product(*(range(stop - start + 1) for start, stop in spans)):
            total = sum(cost[span].losses[0, rank].item() for span, rank in zip(spans, ranks, strict=True))
            best[sum(ranks)] = min(best.get(sum(ranks), float("inf")), total)
    for slots, (loss, bands) in enumerate(best_bands(cost, 4, 4)):
        assert loss == pytest.approx(best[slots], rel=1e-12)
        assert sum(band.rank for band in bands) == slots
        assert [band.start for band in bands][1:] == [band.stop for band in bands][:-1]


def test_sharing_cost_is_the_measured_error():
    frequencies = torch.tensor([0.5, 0.4], dtype=torch.float64)
    weight = torch.softmax(torch.randn(20, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), 0)
    delta = torch.arange(20, dtype=torch.float64)
    measured = (torch.exp(1j * frequencies * delta[:, None]) - torch.exp(1j * 0.45 * delta)[:, None]).abs().square()
    ours = sharing_cost(frequencies, torch.tensor([0.45], dtype=torch.float64), Distances(delta, weight))[0]
    torch.testing.assert_close(ours, weight @ measured)


def test_centring_never_raises_the_loss_of_a_constant_key():
    """A key that never changes has no effect on the softmax: with full centring, dropping it costs nothing."""
    a = random_attention(2, 1, bias=True)
    a.w_k[:, :-1] = 0  # only the bias remains: a constant key
    grams = grams_of(a, centring=1.0)
    assert grams.keys.abs().max() < 1e-12
    assert grams.energy.max() > 0


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
def test_output_refit_is_least_squares_over_all_heads(heads, kv_heads):
    a = random_attention(heads, kv_heads, bias=False)
    o = torch.cat(list(a.mixed @ a.w_v.repeat_interleave(a.group, 0)), 1)
    weight = a.w_o.flatten(0, 1)
    gram = o.T @ o / len(o)
    value_gram = a.output_gram().unflatten(0, (kv_heads, -1)).mean(1)
    solved = solve_ov(value_gram, output_gram_of(a.w_o), floor=FLOOR)
    value_map, rank = solved.shared_map[..., :5], 5
    refit = refit_output(gram, weight, value_map, ridge=0)
    small = torch.cat([o[:, i * 8 : i * 8 + 8] @ value_map[i // a.group] for i in range(heads)], 1)
    expected = torch.linalg.lstsq(small, o @ weight).solution
    torch.testing.assert_close(refit, expected, rtol=1e-7, atol=1e-7)
    plain = torch.cat([solved.other_map[i // a.group, :, :rank].T @ a.w_o[i] for i in range(heads)])
    target = o @ weight
    assert (target - small @ refit).square().sum() <= (target - small @ plain).square().sum()


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
def test_refined_value_maps_only_improve_and_end_at_a_minimum(heads, kv_heads):
    a = random_attention(heads, kv_heads, bias=False)
    o = torch.cat(list(a.mixed @ a.w_v.repeat_interleave(a.group, 0)), 1)
    weight, gram = a.w_o.flatten(0, 1), o.T @ o / len(o)
    solved = solve_ov(a.output_gram().unflatten(0, (kv_heads, -1)).mean(1), output_gram_of(a.w_o), floor=FLOOR)
    start = solved.shared_map[..., :5]

    def error(maps):
        small = torch.cat([o[:, i * 8 : i * 8 + 8] @ maps[i // a.group] for i in range(heads)], 1)
        target = o @ weight
        return (target - small @ torch.linalg.lstsq(small, target).solution).square().sum() / len(o)

    errors = [error(refine_values(gram, weight, start, ridge=0, rounds=rounds)) for rounds in (0, 1, 2, 3)]
    assert errors[0] == pytest.approx(error(start))
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < errors[0]
    best = refine_values(gram, weight, start, ridge=0, rounds=300).requires_grad_()
    (gradient,) = torch.autograd.grad(error(best), best)
    start = start.clone().requires_grad_()
    (at_start,) = torch.autograd.grad(error(start), start)
    assert gradient.norm() < 0.05 * at_start.norm()


def correlated(channels: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(80, channels, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(channels, channels, generator=generator, dtype=torch.float64)
    return x, torch.randn(6, channels, generator=generator, dtype=torch.float64)


def refit_error(x, down, kept) -> float:
    refit = refit_down(x.T @ x / len(x), down, kept, ridge=0)
    return ((x @ down.T - x[:, kept] @ refit.T).square().sum() / len(x)).item()


def test_down_refit_is_least_squares():
    x, down = correlated(12)
    kept = torch.tensor([0, 2, 3, 7, 11])
    refit = refit_down(x.T @ x / len(x), down, kept, ridge=0)
    torch.testing.assert_close(refit.T, torch.linalg.lstsq(x[:, kept], x @ down.T).solution, rtol=1e-7, atol=1e-9)
    assert refit_error(x, down, kept) <= (x @ down.T - x[:, kept] @ down[:, kept].T).square().sum().item() / len(x)


@pytest.mark.parametrize("block", [1, 3])
def test_greedy_curve_is_the_measured_error_at_every_width(block):
    x, down = correlated(12)
    found = order_channels(x.T @ x / len(x), down, block=block)
    assert sorted(found.order.tolist()) == list(range(12))
    for kept in range(1, 13):
        error = refit_error(x, down, found.order[:kept])
        assert error == pytest.approx(found.curve[kept].item(), rel=1e-5, abs=1e-7 * found.curve[0].item())


@pytest.mark.parametrize("block", [1, 3])
def test_a_metric_chooses_the_order_and_the_curve_stays_the_plain_error(block):
    """The order is that of the down projection S W; the error at every width is that of W."""
    x, down = correlated(12)
    gram, root = x.T @ x / len(x), torch.diag(torch.linspace(0.01, 10, len(down), dtype=torch.float64)).roll(1, 0)
    found = order_channels(gram, down, metric_root=root, block=block)
    assert found.order.tolist() == order_channels(gram, root @ down, block=block).order.tolist()
    assert found.order.tolist() != order_channels(gram, down, block=block).order.tolist()
    for kept in range(1, 13):
        error = refit_error(x, down, found.order[:kept])
        assert error == pytest.approx(found.curve[kept].item(), rel=1e-5, abs=1e-7 * found.curve[0].item())


def test_each_greedy_step_is_the_best_single_step():
    x, down = correlated(9)
    order = order_channels(x.T @ x / len(x), down, block=1).order.tolist()
    for step in range(1, 8):
        others = [refit_error(x, down, torch.tensor([*order[:step], j])) for j in order[step:]]
        assert others[0] == pytest.approx(min(others), rel=1e-9)


@pytest.mark.parametrize("block", [1, 2, 5])
def test_working_in_the_gram_matrix_itself_changes_nothing(block):
    x, down = correlated(12)
    gram = x.T @ x / len(x)
    kept = gram.clone()
    found = order_channels(gram, down, block=block)
    assert torch.equal(gram, kept)
    again = order_channels(gram, down, block=block, overwrite_gram=True)
    assert torch.equal(again.order, found.order)
    assert torch.equal(again.curve, found.curve)
    assert not torch.equal(gram, kept)


def test_greedy_is_near_the_best_subset_and_better_than_the_score():
    x, down = correlated(9, seed=3)
    gram = x.T @ x / len(x)
    greedy = refit_error(x, down, order_channels(gram, down, block=1).order[:4])
    score = refit_error(x, down, keep_channels(score_channels(gram.diagonal(), down), 4))
    best = min(refit_error(x, down, torch.tensor(c)) for c in itertools.combinations(range(9), 4))
    assert best <= greedy <= min(score, 1.5 * best)


def test_dead_and_duplicate_channels_are_taken_last_and_stay_finite():
    x, down = correlated(8)
    x = torch.cat([x, x[:, :2], torch.zeros(80, 2, dtype=torch.float64)], 1)
    down = torch.cat([down, down[:, :4]], 1)
    found = order_channels(x.T @ x / len(x), down, block=2)
    assert torch.isfinite(found.curve).all()
    assert found.curve[8] < 1e-8 * found.curve[0]
    assert set(found.order[-2:].tolist()) <= {0, 1, 8, 9, 10, 11}


@pytest.mark.parametrize("block", [1, 4, 16])
def test_fewer_tokens_than_channels(block):
    """Use statistics of 40 tokens for 200 channels, accumulated in float32, with one dominating channel."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 200, generator=generator) * torch.linspace(0.01, 1, 200)
    x[:, 7] *= 1e3
    found = order_channels(x.T @ x / 40, torch.randn(6, 200, generator=generator), block=block)
    assert sorted(found.order.tolist()) == list(range(200))
    assert torch.isfinite(found.curve).all()
    assert (found.curve.diff() <= 0).all()
    assert found.curve[45] < 1e-3 * found.curve[1]


def test_bands_of_one_frequency_never_beat_the_real_theorem_by_mistake():
    """Complex maps are a subset of real ones: at equal head size their loss cannot be below the real optimum."""
    a = random_attention(2, 1, bias=False)
    real = tail_sums(solve_qk(a.gram(a.w_q), a.gram(a.w_k), floor=FLOOR).values)[0]
    query_map, key_map = solve_bands(grams_of(a), [Band(0, 4, 2, 0.0)], floor=FLOOR)
    error = 0.0
    for i in range(2):
        q, key = a.x @ a.w_q[i], a.x @ a.w_k[0]
        error += (q @ key.T - (q @ query_map[0]) @ (key @ key_map[0]).T).square().mean().item()
    assert error >= real[4].item() * (1 - 1e-9)
