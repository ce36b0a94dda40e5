"""The solvers equal the paper's literal formulas, are optimal, and have exactly the predicted error."""

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from a3cli.solvers.allocate import Choice, allocate, sizes
from a3cli.solvers.linalg import decompose_jointly, effective_rank, root_and_inverse, tail_sums
from a3cli.solvers.mlp import keep_channels, score_channels
from a3cli.solvers.ov import output_gram_of, solve_ov
from a3cli.solvers.qk import keep_pairs, score_pairs, solve_qk
from tests.helpers.literal import Attention, random_attention, square_root, truncate

FLOOR = 1e-14
KINDS = [(heads, kv, bias) for heads, kv in ((4, 4), (6, 2), (4, 1)) for bias in (False, True)]
kinds = pytest.mark.parametrize(("heads", "kv_heads", "bias"), KINDS)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def solved_qk(a: Attention):
    return solve_qk(a.gram(a.w_q), a.gram(a.w_k), floor=FLOOR)


@kinds
def test_qk_equals_the_literal_formula(heads, kv_heads, bias):
    a, rank = random_attention(heads, kv_heads, bias=bias), 5
    root = square_root(a.autocorrelation())
    ours = solved_qk(a)
    for k in range(kv_heads):
        group = range(k * a.group, (k + 1) * a.group)
        stacked = torch.cat([root @ a.w_q[i] @ a.w_k[k].T @ root for i in group])
        w_k = a.w_k[k] @ ours.shared_map[k, :, :rank]
        small = torch.cat([root @ (a.w_q[i] @ ours.other_map[k, :, :rank]) @ w_k.T @ root for i in group])
        assert relative(small, truncate(stacked, rank)) < 1e-10
        singular = torch.linalg.svdvals(stacked)[: ours.values.shape[1]]
        torch.testing.assert_close(ours.values[k], singular**2, rtol=1e-10, atol=1e-10 * singular[0].item() ** 2)


@kinds
def test_ov_equals_the_literal_formula(heads, kv_heads, bias):
    """For MHA each head has its own attention-weighted autocorrelation; for GQA it is unweighted, as in the paper."""
    a, rank = random_attention(heads, kv_heads, bias=bias), 5
    ours = solve_ov(a.output_gram() if a.group == 1 else a.gram(a.w_v), output_gram_of(a.w_o), floor=FLOOR)
    for k in range(kv_heads):
        group = range(k * a.group, (k + 1) * a.group)
        seen = a.mixed[k] if a.group == 1 else a.x
        root = square_root(seen.T @ seen / len(seen))
        side_by_side = torch.cat([root @ a.w_v[k] @ a.w_o[i] for i in group], 1)
        w_v = a.w_v[k] @ ours.shared_map[k, :, :rank]
        small = torch.cat([root @ w_v @ (ours.other_map[k, :, :rank].T @ a.w_o[i]) for i in group], 1)
        assert relative(small, truncate(side_by_side, rank)) < 1e-10


@kinds
def test_pair_selection_equals_the_literal_formula(heads, kv_heads, bias):
    """The paper's CUR score is the product of column norms of R^½W, for both dims of a pair, summed over the group."""
    a = random_attention(heads, kv_heads, bias=bias)
    root = square_root(a.autocorrelation())
    scores = score_pairs(a.gram(a.w_q), a.gram(a.w_k))
    for k in range(kv_heads):
        keys = (root @ a.w_k[k]).square().sum(0)
        queries = sum((root @ a.w_q[i]).square().sum(0) for i in range(k * a.group, (k + 1) * a.group))
        literal = (queries * keys)[:4] + (queries * keys)[4:]
        torch.testing.assert_close(scores[k], literal, rtol=1e-10, atol=0)
        assert keep_pairs(scores[k], 2).tolist() == sorted(literal.topk(2).indices.tolist())


def test_channel_selection_equals_the_literal_formula():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 20, generator=generator, dtype=torch.float64) * torch.rand(20, generator=generator)
    down = torch.randn(12, 20, generator=generator, dtype=torch.float64)
    root = square_root(x.T @ x / 64)
    literal = root.square().sum(0) * down.square().sum(0)
    scores = score_channels(x.square().mean(0), down)
    torch.testing.assert_close(scores, literal, rtol=1e-10, atol=0)
    assert keep_channels(scores, 7).tolist() == sorted(literal.topk(7).indices.tolist())


@kinds
def test_qk_error_is_the_predicted_tail(heads, kv_heads, bias):
    """Compare with Σ_i E|q_iᵀk − q̃_iᵀk̃|² over all pairs of query and key tokens, summed token by token."""
    a = random_attention(heads, kv_heads, bias=bias)
    ours = solved_qk(a)
    curves = tail_sums(ours.values)
    for rank, k in itertools.product((0, 1, 5, 8), range(kv_heads)):
        error = 0.0
        for i in range(k * a.group, (k + 1) * a.group):
            q, key = a.x @ a.w_q[i], a.x @ a.w_k[k]
            small = (q @ ours.other_map[k, :, :rank]) @ (key @ ours.shared_map[k, :, :rank]).T
            error += (q @ key.T - small).square().mean().item()
        assert error == pytest.approx(curves[k, rank].item(), rel=1e-9, abs=1e-9 * curves[k, 0].item())


@pytest.mark.parametrize("bias", [False, True])
def test_ov_error_is_the_predicted_tail(bias):
    a = random_attention(4, 4, bias=bias)
    ours = solve_ov(a.output_gram(), output_gram_of(a.w_o), floor=FLOOR)
    curves = tail_sums(ours.values)
    for rank, i in itertools.product((0, 3, 8), range(4)):
        o = a.mixed[i] @ a.w_v[i]
        small = o @ ours.shared_map[i, :, :rank] @ (ours.other_map[i, :, :rank].T @ a.w_o[i])
        error = (o @ a.w_o[i] - small).square().sum(1).mean().item()
        assert error == pytest.approx(curves[i, rank].item(), rel=1e-9, abs=1e-9 * curves[i, 0].item())


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (3, 1)])
def test_no_optimiser_beats_the_qk_solution(heads, kv_heads):
    """L-BFGS over free rank-r maps, from random starts and from our solution, ends no lower, and close to it."""
    a, rank = random_attention(heads, kv_heads, bias=True, d=10, h=6), 3
    ours = solved_qk(a)
    q_gram, k_gram = a.gram(a.w_q)[: a.group], a.gram(a.w_k)[0]

    def loss(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        difference = torch.eye(6, dtype=torch.float64) - left @ right.T  # q̃ᵀk̃ = qᵀ (left rightᵀ) k
        return sum(torch.trace(difference.T @ gram @ difference @ k_gram) for gram in q_gram)

    optimum = tail_sums(ours.values)[0, rank].item()
    at_solution = loss(ours.other_map[0, :, :rank], ours.shared_map[0, :, :rank]).item()
    assert at_solution == pytest.approx(optimum, rel=1e-9)
    found = []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        maps = [torch.randn(6, rank, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        optimizer = torch.optim.LBFGS(maps, max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-12)

        def closure(maps=maps, optimizer=optimizer):
            optimizer.zero_grad()
            value = loss(*maps)
            value.backward()
            return value

        optimizer.step(closure)
        found.append(loss(*maps).item())
    assert min(found) >= optimum * (1 - 1e-9)
    assert min(found) == pytest.approx(optimum, rel=1e-3)


def test_best_channels_without_cross_terms_are_kept():
    """For uncorrelated channels the score is the exact loss, so no other choice of channels is better."""
    generator = torch.Generator().manual_seed(1)
    energy = torch.rand(8, generator=generator, dtype=torch.float64)
    down = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    kept = keep_channels(score_channels(energy, down), 5).tolist()

    def loss(channels) -> float:
        return sum((energy[j] * down[:, j].square().sum()).item() for j in set(range(8)) - set(channels))

    assert loss(kept) == pytest.approx(min(loss(c) for c in itertools.combinations(range(8), 5)))


@kinds
def test_full_rank_is_exact(heads, kv_heads, bias):
    ours = solved_qk(random_attention(heads, kv_heads, bias=bias))
    product = ours.other_map @ ours.shared_map.mT
    torch.testing.assert_close(product, torch.eye(8, dtype=torch.float64).expand_as(product), rtol=0, atol=1e-9)


def test_rescaling_between_q_and_k_changes_nothing():
    a = random_attention(4, 2, bias=False)
    q_gram, k_gram = a.gram(a.w_q), a.gram(a.w_k)
    plain = solve_qk(q_gram, k_gram, floor=FLOOR)
    scaled = solve_qk(q_gram / 49, k_gram * 49, floor=FLOOR)
    torch.testing.assert_close(plain.values, scaled.values, rtol=1e-9, atol=0)
    torch.testing.assert_close(score_pairs(q_gram, k_gram), score_pairs(q_gram / 49, k_gram * 49))


def test_singular_gram_is_floored_and_counted():
    generator = torch.Generator().manual_seed(0)
    thin = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    gram = thin @ thin.T  # rank 3 of 8
    other = torch.eye(8, dtype=torch.float64)
    ours = decompose_jointly(gram, other, floor=1e-10)
    assert ours.floored.item() == 5
    assert torch.isfinite(ours.shared_map).all()
    assert torch.isfinite(ours.other_map).all()
    projector = ours.shared_map[:, :3] @ ours.other_map[:, :3].T
    torch.testing.assert_close(thin.T @ projector, thin.T, rtol=0, atol=1e-5)


def test_zero_gram_gives_the_identity():
    root = root_and_inverse(torch.zeros(2, 4, 4), floor=1e-10)
    torch.testing.assert_close(root.root, torch.eye(4, dtype=torch.float64).expand(2, 4, 4))
    torch.testing.assert_close(root.inverse, torch.eye(4, dtype=torch.float64).expand(2, 4, 4))


def test_nan_gram_is_refused():
    with pytest.raises(ValueError, match="NaN"):
        root_and_inverse(torch.full((3, 3), float("nan")), floor=0)


@pytest.mark.parametrize(("spectrum", "expected"), [([1.0, 1, 1, 1], 4), ([5.0, 0, 0, 0], 1), ([2.0, 2, 0, 0], 2)])
def test_effective_rank(spectrum, expected):
    assert effective_rank(torch.tensor(spectrum)).item() == pytest.approx(expected)


@st.composite
def items(draw):
    """Draw up to four components whose full size may itself remove weights; removals may share a divisor."""
    unit = draw(st.sampled_from([1, 6, 64]))
    steps, losses = st.integers(1, 40), st.floats(0, 9)
    made = []
    for _ in range(draw(st.integers(1, 4))):
        least = draw(st.sampled_from([0, 0, 7, 90]))
        smaller = st.builds(lambda n, loss, low=least: Choice(1, (low + n) * unit, loss), steps, losses)
        made.append([Choice(51, least * unit, 0.0), *draw(st.lists(smaller, max_size=4))])
    return made


@given(items=items(), share=st.floats(0, 1.1))
@settings(max_examples=200, deadline=None)
def test_allocation_equals_brute_force(items, share):
    needed = int(share * sum(max(choice.removed for choice in item) for item in items))
    combinations = [c for c in itertools.product(*items) if sum(choice.removed for choice in c) >= needed]
    if not combinations:
        with pytest.raises(ValueError, match="removes enough"):
            allocate(items, needed)
        return
    chosen = allocate(items, needed)
    assert all(choice in item for choice, item in zip(chosen, items, strict=True))
    assert sum(choice.removed for choice in chosen) >= needed
    best = min(sum(choice.loss for choice in c) for c in combinations)
    assert sum(choice.loss for choice in chosen) == pytest.approx(best, abs=1e-12)


def test_allocation_of_equal_losses_removes_least():
    free = [[Choice(3, 0, 0.0), Choice(2, 5, 0.0), Choice(1, 9, 0.0)]] * 3
    assert sum(choice.removed for choice in allocate(free, 10)) == 10


def test_allocation_in_coarse_steps_never_removes_too_little():
    rng = random.Random(0)
    items = [[Choice(i, i * rng.randrange(10**9, 10**10), rng.random() * i) for i in range(9)] for _ in range(20)]
    needed = sum(item[-1].removed for item in items) // 3
    removed = sum(choice.removed for choice in allocate(items, needed))
    assert needed <= removed <= 1.02 * needed


def test_allocation_in_coarse_steps_finds_the_only_choice():
    """Rounded down, all removals together are less than the needed amount."""
    items = [[Choice(1, 0, 0.0), Choice(0, 10**7 + i, 1.0)] for i in range(40)]
    assert allocate(items, sum(item[1].removed for item in items)) == [item[1] for item in items]


def test_sizes_end_with_the_full_size():
    assert sizes(20, 8) == [8, 16, 20]
    assert sizes(16, 8) == [8, 16]
    assert sizes(6, 8) == [6]
    assert sizes(20, 4, least=9) == [12, 16, 20]
    assert sizes(20, 4, least=30) == [20]
