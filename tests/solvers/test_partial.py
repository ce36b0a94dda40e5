"""Heads with partial RoPE: real scores, and the theorem without RoPE for the unrotated dims."""

import pytest
import torch

from a3cli.models.config import rotary_factor
from a3cli.models.families import ModelShape
from a3cli.models.families.base import pair_dims
from a3cli.report.card import describe_rope
from a3cli.solvers.attention import AttentionProblem, SampledHead
from a3cli.solvers.linalg import tail_sums
from a3cli.solvers.partial import (
    PartialProblem,
    coordinates,
    key_start,
    partial_grams,
    partial_statistics,
    real_columns,
)
from a3cli.solvers.qk import solve_qk
from a3cli.solvers.rope import Band, Distances, as_pairs, band_costs, best_bands, frequency_at, real_map
from a3cli.solvers.slots import SlotProblem, head_statistics, score_error
from a3cli.work.manifests import Sizes, Solution
from tests.helpers.literal import random_attention

FLOOR = 1e-13
H, TURNING = 8, 2  # dims 0 to 3 are rotated, 4 to 7 are not
PAIRS = torch.tensor([1.0, 0.1], dtype=torch.float64)
WHOLE = torch.tensor([1.0, 0.1, 0.0, 0.0], dtype=torch.float64)
SLOTS = torch.tensor([0.6, 0.0], dtype=torch.float64)  # one rotated slot, one unrotated
DISTANCES = Distances(torch.arange(12, dtype=torch.float64), torch.linspace(1, 0.1, 12, dtype=torch.float64) / 6.6)
BANDS = [Band(0, 2, 1, 0.22), Band(2, 4, 1, 2.0)]
KINDS = [(4, 4, False), (6, 2, True)]
kinds = pytest.mark.parametrize(("heads", "kv_heads", "bias"), KINDS)


def sums(a):
    return a.gram(a.w_q), a.gram(a.w_k), (a.x @ a.w_k).mean(1)


def problem(a, *, turning=PAIRS, slots=SLOTS, centring=0.0):
    heads = partial_statistics(*sums(a), len(turning))
    return PartialProblem(heads, turning, slots, DISTANCES, centring=centring, floor=FLOOR)


def start(a, bands=BANDS, *, turning=PAIRS):
    grams = partial_grams(*sums(a), DISTANCES.constancy(turning), centring=0.0, floor=FLOOR)
    return key_start(grams, bands, floor=FLOOR)


def turned(x, frequencies, places):
    """Apply stock partial RoPE: `[..., h]`, pairs `(p, p + r/2)` of the first r dims."""
    n = len(frequencies)
    first, second, still = x[..., :n], x[..., n : 2 * n], x[..., 2 * n :]
    cos, sin = (places * frequencies).cos(), (places * frequencies).sin()
    moved = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    return torch.cat([moved, still.expand(*moved.shape[:-1], -1)], -1)


def small(x, maps):
    """Return the slots `[..., S]` of heads, as complex numbers."""
    return x.to(maps) @ maps.conj()


def literal_loss(a, query, key, *, slots=SLOTS, turning=PAIRS, centring=0.0):
    """Return the squared error of real scores `[K]` over all tokens and distances, minus what is constant over keys."""
    losses = []
    for k in range(len(a.w_k)):
        keys, loss = a.x @ a.w_k[k], 0.0
        delta = DISTANCES.delta[:, None, None]
        for i in range(k * a.group, (k + 1) * a.group):
            queries = a.x @ a.w_q[i]
            full = turned(queries, turning, delta) @ keys.T
            mixed = (small(queries, query[k]) * torch.exp(1j * slots * delta)) @ small(keys, key[k]).mH
            error = full - mixed.real  # [D, n, n]
            loss = loss + DISTANCES.weight @ error.square().mean((1, 2))
            loss = loss - centring * (DISTANCES.weight @ error.mean(2)).square().mean()
        losses.append(loss)
    return torch.stack(losses)


@pytest.mark.parametrize("turning", [0, 1, 3, 4])
def test_pairs_are_where_stock_rotation_has_them(turning):
    """Rotated complex pairs and unrotated pairs together give the scores of stock partial RoPE."""
    frequencies = torch.rand(turning, dtype=torch.float64)
    still = torch.zeros(4 - turning, dtype=torch.float64)
    q, k = torch.randn(2, 5, 8, dtype=torch.float64)
    dims = pair_dims(4, turning)
    assert sorted(dims) == list(range(8))
    for x in (q, k):
        assert torch.equal(as_pairs(x, turning), as_pairs(x[..., dims]))
    for distance in (0, 1, 7, 1000):
        turn = torch.exp(1j * torch.cat([frequencies, still]) * distance)
        scores = ((as_pairs(q, turning) * turn) @ as_pairs(k, turning).mH).real
        torch.testing.assert_close(scores, turned(q, frequencies, distance) @ k.T)


def test_rotation_is_diagonal_in_the_coordinates():
    change = coordinates(H, TURNING)
    torch.testing.assert_close(change @ change.mH, torch.eye(H).to(change))
    x = torch.randn(3, H, dtype=torch.float64)
    turn = torch.exp(1j * torch.cat([PAIRS, -PAIRS, torch.zeros(4)]) * 5)
    torch.testing.assert_close(turned(x, PAIRS, 5).to(change) @ change.mT, x.to(change) @ change.mT * turn)


def test_frequencies_between_pairs_and_of_what_stands_still():
    slots = torch.tensor([0.0, 0.5, 1.0, 2.0, 3.0], dtype=torch.float64)
    expected = torch.tensor([1.0, 10**-0.5, 0.1, 0.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(frequency_at(WHOLE, slots), expected)


@kinds
@pytest.mark.parametrize("centring", [0.0, 0.95])
def test_loss_is_twice_the_literal_one(heads, kv_heads, bias, centring):
    a = random_attention(heads, kv_heads, bias=bias)
    steps = problem(a, centring=centring)
    maps = steps.solve(start(a))
    literal = literal_loss(a, maps.query, maps.key, centring=centring)
    torch.testing.assert_close(maps.loss, 2 * literal, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(steps.loss(maps.query, maps.key), maps.loss, rtol=1e-7, atol=1e-9)


@kinds
def test_it_is_never_worse_than_bands(heads, kv_heads, bias):
    a = random_attention(heads, kv_heads, bias=bias, d=H)
    key = start(a)
    query = torch.zeros_like(key).requires_grad_()  # the best queries for these keys: the loss is quadratic
    step = torch.optim.LBFGS([query], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        step.zero_grad()
        loss = literal_loss(a, query, key).sum()
        loss.backward()
        return loss

    step.step(closure)
    maps = problem(a).solve(key)
    assert (maps.loss < 2 * literal_loss(a, query.detach(), key) * (1 + 1e-9)).all()


def lowest(a, places, **options):
    """Return the lowest literal loss that L-BFGS reaches from these maps."""
    best = float("inf")
    for place in places:
        maps = [part.clone().requires_grad_() for part in place]
        optimiser = torch.optim.LBFGS(maps, max_iter=120, line_search_fn="strong_wolfe")

        def closure(maps=maps, optimiser=optimiser):
            optimiser.zero_grad()
            loss = literal_loss(a, *maps, **options).sum()
            loss.backward()
            return loss

        optimiser.step(closure)
        best = min(best, literal_loss(a, *maps, **options).sum().item())
    return best


def around(maps):
    """Return the maps themselves, and random ones near them."""
    yield maps.query, maps.key
    noise = torch.randn(2, *maps.key.shape, dtype=torch.complex128, generator=torch.Generator().manual_seed(1))
    yield maps.query + 0.3 * noise[0], maps.key + 0.3 * noise[1]


def test_no_optimiser_finds_better_maps():
    a = random_attention(2, 1, bias=False, d=H)
    maps = problem(a).solve(start(a))
    assert maps.loss.sum().item() / 2 <= 1.02 * lowest(a, around(maps))


@kinds
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_without_rotation_it_is_the_theorem(heads, kv_heads, bias, rank):
    """With two real dims per slot, the loss is the tail of the real decomposition, which complex maps do not reach."""
    a = random_attention(heads, kv_heads, bias=bias)
    still = torch.zeros(0, dtype=torch.float64)
    key = start(a, [Band(0, 4, rank, 0.0)], turning=still)
    maps = problem(a, turning=still, slots=torch.zeros(rank, dtype=torch.float64)).solve(key)
    tail = tail_sums(solve_qk(a.gram(a.w_q), a.gram(a.w_k), floor=FLOOR).values)[:, 2 * rank]
    torch.testing.assert_close(maps.loss / 2, tail, rtol=1e-6, atol=1e-9)
    as_if_pairs = torch.zeros(4, dtype=torch.float64)
    rough = SlotProblem(
        head_statistics(*sums(a)), as_if_pairs, as_if_pairs[:rank], DISTANCES, centring=0.0, floor=FLOOR
    ).solve(torch.eye(4, dtype=torch.complex128)[:, :rank].expand(kv_heads, -1, -1))
    real = torch.stack([real_loss(a, k, real_map(rough.query[k]), real_map(rough.key[k])) for k in range(kv_heads)])
    assert (real > 1.01 * tail).all()


def real_loss(a, k, query_map, key_map):
    """Return the squared score error of one KV head's group without RoPE, for real maps `[h, r]`."""
    keys, loss = a.x @ a.w_k[k], 0.0
    for i in range(k * a.group, (k + 1) * a.group):
        queries = a.x @ a.w_q[i]
        loss = loss + (queries @ keys.T - (queries @ query_map) @ (keys @ key_map).T).square().mean()
    return loss


def test_no_optimiser_beats_the_theorem():
    a = random_attention(2, 1, bias=False, d=H)
    still, options = torch.zeros(0, dtype=torch.float64), {"slots": SLOTS[1:], "turning": torch.zeros(0)}
    maps = problem(a, turning=still, slots=SLOTS[1:]).solve(start(a, [Band(0, 4, 1, 0.0)], turning=still))
    assert maps.loss.sum().item() / 2 <= (1 + 1e-6) * lowest(a, around(maps), **options)


@kinds
def test_bands_never_hold_both(heads, kv_heads, bias):
    """All unrotated dims form one band, whose cost is the theorem's, in the unit of complex scores."""
    a = random_attention(heads, kv_heads, bias=bias)
    grams = partial_grams(*sums(a), DISTANCES.constancy(PAIRS), centring=0.0, floor=FLOOR)
    units = torch.rand(kv_heads, dtype=torch.float64)
    costs = band_costs([grams], [units], PAIRS, DISTANCES, longest=16, floor=FLOOR)
    assert set(costs) == {(0, 1), (1, 2), (0, 2), (2, 4)}
    q_gram, k_gram, _ = sums(a)
    tails = tail_sums(solve_qk(q_gram[:, 4:, 4:], k_gram[:, 4:, 4:], floor=FLOOR).values)
    torch.testing.assert_close(costs[2, 4].losses[0], 2 * (units @ tails[:, ::2]))
    assert costs[2, 4].slot == TURNING
    for slots, (_, bands) in enumerate(best_bands(costs, 4, 4)):
        assert sum(band.rank for band in bands) == slots
        assert (bands[-1].start, bands[-1].stop) == (2, 4)
        assert key_start(grams, bands, floor=FLOOR).shape == (kv_heads, H, slots)


def test_all_slots_lose_nothing():
    a = random_attention(4, 2, bias=True)
    bands = [Band(0, 1, 1, 0.0), Band(1, 2, 1, 1.0), Band(2, 4, 2, 2.0)]
    maps = problem(a, slots=WHOLE).solve(start(a, bands))
    nothing = torch.zeros(2, H, 4, dtype=torch.complex128)
    assert maps.loss.max() < 1e-8 * literal_loss(a, nothing, nothing, slots=WHOLE).max()


@kinds
@pytest.mark.parametrize("distance", [0, 3, 11])
def test_predicted_score_error_is_the_measured_one(heads, kv_heads, bias, distance):
    """Apply stock partial RoPE to real vectors of the smaller head, for every query and key at one distance."""
    a = random_attention(heads, kv_heads, bias=bias)
    maps = problem(a).solve(start(a))
    columns = [real_columns(part) for part in (maps.query, maps.key)]
    dims, small_dims = pair_dims(4, TURNING), pair_dims(2, 1)
    stock = [torch.empty_like(part) for part in columns]
    for ours, part in zip(stock, columns, strict=True):
        ours[..., small_dims] = part
    lost = total = 0.0
    for i in range(heads):
        q, key = a.x @ a.w_q[i], a.x @ a.w_k[i // a.group]
        full = turned(q, PAIRS, distance) @ key.T
        mixed = turned(q @ stock[0][i // a.group], SLOTS[:1], distance) @ (key @ stock[1][i // a.group]).T
        lost, total = lost + (full - mixed).square().sum().item(), total + full.square().sum().item()
    grams = [gram[:, dims][..., dims] for gram in sums(a)[:2]]
    predicted = score_error(grams, [part[:, dims] for part in columns], WHOLE, SLOTS, distance)
    assert predicted == pytest.approx((lost / total) ** 0.5, rel=1e-9)


def test_attention_is_the_literal_one():
    """Compute it for one query and key at a time, with real vectors and stock partial RoPE."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    queries, keys, values, output = normal(2, 3, 2, H), normal(2, 6, H), normal(2, 6, H), normal(2, H, 10)
    rows = [1, 3, 5]
    seen = torch.tensor([[0, row] for row in rows]).expand(2, -1, -1).float()
    head = SampledHead(
        queries.float(), keys.float(), values.float(), seen, WHOLE, H**-0.5, (output @ output.mT).float(), TURNING
    )
    maps = [normal(H, 2) + 1j * normal(H, 2) for _ in range(2)]
    loss = 0.0
    for block in range(2):
        for index, row in enumerate(rows):
            for i in range(2):
                places = torch.arange(row + 1, dtype=torch.float64)[:, None]
                full = turned(queries[block, index, i], PAIRS, row) @ turned(keys[block, : row + 1], PAIRS, places).T
                q = small(queries[block, index, i], maps[0]) * torch.exp(1j * SLOTS * row)
                mixed = ((small(keys[block, : row + 1], maps[1]) * torch.exp(1j * SLOTS * places)).conj() @ q).real
                weights = (full / H**0.5).softmax(-1) - (mixed / H**0.5).softmax(-1)
                loss += (weights @ values[block, : row + 1] @ output[i]).square().sum().item() / 6
    assert AttentionProblem(head).loss(*maps, SLOTS) == pytest.approx(loss, rel=1e-4)


def test_the_card_counts_what_turns():
    shape = ModelShape(64, 2, 4, 2, 16, 96, passed_dims=12)
    sizes = [Sizes(qk=8, ov=8, mlp=96)] * 2
    solution = Solution.model_construct(sizes=sizes, shape="stock", rope_slots=[0.0, 2.0, 2.0, 2.0])
    said = "RoPE has 1 rotated pairs of 2, and passes the dims of 3 of 6 others through."
    assert describe_rope(shape, solution) == said


@pytest.mark.parametrize("head_dim", range(2, 258, 2))
def test_the_written_factor_is_read_back_as_it_was_meant(head_dim):
    """Loaders round down."""
    for turned_dims in range(0, head_dim + 1, 2):
        factor = rotary_factor(turned_dims, head_dim)
        assert int(head_dim * factor) == turned_dims
        assert 0 <= factor <= 1
