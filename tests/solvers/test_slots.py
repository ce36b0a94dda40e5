"""Slots that mix every pair: the loss is the literal one, each half-step is its minimum, and bands give the start."""

import pytest
import torch

from a3cli.solvers.rope import Band, Distances, as_pairs, band_maps, pair_grams, real_map
from a3cli.solvers.slots import SlotProblem, head_statistics, score_error
from tests.helpers.literal import random_attention

FLOOR = 1e-13
PAIRS = torch.tensor([1.0, 0.4, 0.1, 0.02], dtype=torch.float64)
SLOTS = torch.tensor([0.9, 0.06], dtype=torch.float64)
DISTANCES = Distances(torch.arange(12, dtype=torch.float64), torch.linspace(1, 0.1, 12, dtype=torch.float64) / 6.6)
KINDS = [(4, 4, False), (6, 2, True)]
kinds = pytest.mark.parametrize(("heads", "kv_heads", "bias"), KINDS)


def statistics(a):
    return head_statistics(a.gram(a.w_q), a.gram(a.w_k), (a.x @ a.w_k).mean(1))


def problem(a, *, slots=SLOTS, centring=0.0, pairs=PAIRS, distances=DISTANCES):
    return SlotProblem(statistics(a), pairs, slots, distances, centring=centring, floor=FLOOR)


def start(a):
    """Return the query and key maps of two bands of two pairs, with one slot each."""
    flat = torch.ones(4, 4, dtype=torch.float64)
    grams = pair_grams(a.gram(a.w_q), a.gram(a.w_k), (a.x @ a.w_k).mean(1), flat, centring=0.0)
    return band_maps(grams, [Band(0, 2, 1, 0.5), Band(2, 4, 1, 2.5)], floor=FLOOR)


def literal_loss(a, query, key, *, centring=0.0, slots=SLOTS):
    """Return the squared error of complex scores `[K]` over all tokens and distances, less the part common to keys."""
    losses = []
    for k in range(len(a.w_k)):
        keys, loss = as_pairs(a.x @ a.w_k[k]), 0.0
        for i in range(k * a.group, (k + 1) * a.group):
            queries = as_pairs(a.x @ a.w_q[i])
            mean_error = 0.0
            for delta, weight in zip(DISTANCES.delta, DISTANCES.weight, strict=True):
                full = (queries * torch.exp(1j * PAIRS * delta)) @ keys.mH
                small = (queries @ query[k].conj() * torch.exp(1j * slots * delta)) @ (keys @ key[k].conj()).mH
                error = full - small
                loss = loss + weight * error.abs().square().mean()
                mean_error = mean_error + weight * error.mean(1)
            loss = loss - centring * mean_error.abs().square().mean()
        losses.append(loss)
    return torch.stack(losses)


@kinds
@pytest.mark.parametrize("centring", [0.0, 0.95])
def test_loss_is_the_literal_one(heads, kv_heads, bias, centring):
    a = random_attention(heads, kv_heads, bias=bias)
    maps = problem(a, centring=centring).solve(start(a)[1])
    torch.testing.assert_close(
        maps.loss, literal_loss(a, maps.query, maps.key, centring=centring), rtol=1e-7, atol=1e-9
    )


@kinds
@pytest.mark.parametrize("centring", [0.0, 0.95])
def test_each_half_step_is_a_minimum(heads, kv_heads, bias, centring):
    """The gradient of the literal loss vanishes for queries given the keys, and for keys given the queries."""
    a = random_attention(heads, kv_heads, bias=bias)
    steps = problem(a, centring=centring)
    query = steps._best_query(start(a)[1])
    key = steps._best_key(query)
    for at, (first, second) in {"query": (query, start(a)[1]), "key": (query, key)}.items():
        moved = (first if at == "query" else second).clone().requires_grad_()
        pair = (moved, second) if at == "query" else (first, moved)
        literal_loss(a, *pair, centring=centring).sum().backward()
        scale = literal_loss(a, torch.zeros_like(first), torch.zeros_like(second)).sum() / moved.detach().abs().mean()
        assert moved.grad.abs().max() < 1e-7 * scale, at


@kinds
def test_slots_are_never_worse_than_bands(heads, kv_heads, bias):
    a = random_attention(heads, kv_heads, bias=bias)
    query, key = start(a)
    maps = problem(a).solve(key)
    assert (maps.loss.sum() < literal_loss(a, query, key).sum()).all()


@pytest.mark.slow
def test_no_optimiser_finds_better_maps():
    """Run Adam on the literal loss, from the alternation's result and from random maps."""
    a = random_attention(2, 1, bias=False)
    maps = problem(a).solve(start(a)[1])
    best = float("inf")
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(2, 1, 4, 2, dtype=torch.complex128, generator=generator)
        places = [part.clone() + (0.3 if seed else 0.0) * noise[i] for i, part in enumerate((maps.query, maps.key))]
        places = [place.requires_grad_() for place in places]
        optimiser = torch.optim.LBFGS(places, max_iter=400, line_search_fn="strong_wolfe")

        def closure(places=places, optimiser=optimiser):
            optimiser.zero_grad()
            loss = literal_loss(a, *places).sum()
            loss.backward()
            return loss

        optimiser.step(closure)
        best = min(best, literal_loss(a, *places).sum().item())
    assert maps.loss.sum().item() <= 1.02 * best


@kinds
def test_without_rotation_it_is_the_theorem(heads, kv_heads, bias):
    """With one frequency, the loss is the tail of the joint decomposition."""
    a = random_attention(heads, kv_heads, bias=bias)
    still = torch.zeros(4, dtype=torch.float64)
    flat = torch.ones(4, 4, dtype=torch.float64)
    grams = pair_grams(a.gram(a.w_q), a.gram(a.w_k), (a.x @ a.w_k).mean(1), flat, centring=0.0)
    _, key = band_maps(grams, [Band(0, 4, 2, 0.0)], floor=FLOOR)
    maps = problem(a, slots=still[:2], pairs=still).solve(key)
    root = torch.linalg.cholesky(grams.keys)
    tail = torch.linalg.eigvalsh(root.mH @ grams.queries @ root)[:, :2].sum(1)
    torch.testing.assert_close(maps.loss, tail, rtol=1e-6, atol=1e-9)


def test_all_pairs_kept_lose_nothing():
    a = random_attention(4, 2, bias=True)
    maps = problem(a, slots=PAIRS).solve(torch.eye(4, dtype=torch.complex128).expand(2, -1, -1))
    assert maps.loss.max() < 1e-8 * literal_loss(a, *torch.zeros(2, 2, 4, 2, dtype=torch.complex128)).max()


def test_dead_heads_stay_finite():
    a = random_attention(4, 2, bias=False)
    a.w_k[0] = 0
    a.w_q[2:] = 0
    maps = problem(a, centring=0.95).solve(start(random_attention(4, 2, bias=False))[1])
    assert torch.isfinite(maps.query.abs()).all()
    assert torch.isfinite(maps.key.abs()).all()
    assert maps.loss.max() < 1e-9


@kinds
@pytest.mark.parametrize("distance", [0, 3, 11])
def test_predicted_score_error_is_the_measured_one(heads, kv_heads, bias, distance):
    """Apply stock RoPE to real vectors, for every query and key at one distance."""
    a = random_attention(heads, kv_heads, bias=bias)
    maps = problem(a).solve(start(a)[1])
    query_map, key_map = real_map(maps.query), real_map(maps.key)
    lost = total = 0.0
    for i in range(heads):
        k = i // a.group
        q, key = a.x @ a.w_q[i], a.x @ a.w_k[k]
        full = rotate(q, PAIRS * distance) @ key.T
        small = rotate(q @ query_map[k], SLOTS * distance) @ (key @ key_map[k]).T
        lost, total = lost + (full - small).square().sum().item(), total + full.square().sum().item()
    predicted = score_error((a.gram(a.w_q), a.gram(a.w_k)), (query_map, key_map), PAIRS, SLOTS, distance)
    assert predicted == pytest.approx((lost / total) ** 0.5, rel=1e-9)


def rotate(x, angle):
    first, second = x.chunk(2, -1)
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1)
