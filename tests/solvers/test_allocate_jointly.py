"""Sizes for two minima at once, weights and KV cache, at the least total loss."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from a3cli.solvers.allocate import Choice, allocate, allocate_jointly

LOSSES = st.floats(0, 9)


@st.composite
def part(draw, *, cached: bool, most: int):
    """Draw the items of a part: each step of a choice removes the same weights and the same of the cache."""
    weights, cache = draw(st.integers(1, 40)), draw(st.integers(1, 9)) if cached else 0
    made = []
    for _ in range(draw(st.integers(1, most))):
        least = draw(st.sampled_from([0, 0, 2]))  # what even the full size removes
        smaller = draw(st.lists(st.tuples(st.integers(1, 12), LOSSES), max_size=3))
        steps = [(least, 0.0), *((least + step, loss) for step, loss in smaller)]
        made.append([Choice(50 - step, step * weights, loss, step * cache) for step, loss in steps])
    return made


def totals(chosen) -> tuple[int, int, float]:
    chosen = list(chosen)
    return sum(c.removed for c in chosen), sum(c.cached for c in chosen), sum(c.loss for c in chosen)


@given(
    heads=st.lists(part(cached=True, most=2), min_size=1, max_size=2),
    mlp=part(cached=False, most=2),
    shares=st.tuples(st.floats(0, 1.05), st.floats(0, 1.05)),
)
@settings(max_examples=300, deadline=None)
def test_two_minima_equal_brute_force(heads, mlp, shares):
    """QK and OV may shrink weights and cache in different proportions, as biases make them."""
    every = [*itertools.chain(*heads), *mlp]
    needed = int(shares[0] * sum(max(choice.removed for choice in item) for item in every))
    cached = int(shares[1] * sum(max(choice.cached for choice in item) for item in every))
    found = [totals(combination) for combination in itertools.product(*every)]
    enough = [loss for removed, emptied, loss in found if removed >= needed and emptied >= cached]
    if not enough:
        with pytest.raises(ValueError, match="removes enough"):
            allocate_jointly(heads, mlp, needed, cached)
        return
    parts = allocate_jointly(heads, mlp, needed, cached)
    assert [len(chosen) for chosen in parts] == [*map(len, heads), len(mlp)]
    chosen = list(itertools.chain(*parts))
    assert all(choice in item for choice, item in zip(chosen, every, strict=True))
    removed, emptied, loss = totals(chosen)
    assert removed >= needed
    assert emptied >= cached
    assert loss == pytest.approx(min(enough), abs=1e-12)


@given(heads=part(cached=True, most=3), mlp=part(cached=False, most=3), share=st.floats(0, 1))
@settings(max_examples=50, deadline=None)
def test_without_a_minimum_of_the_cache_it_is_the_knapsack(heads, mlp, share):
    needed = int(share * sum(max(choice.removed for choice in item) for item in [*heads, *mlp]))
    jointly = totals(itertools.chain(*allocate_jointly([heads], mlp, needed, 0)))
    assert jointly[2] == pytest.approx(totals(allocate([*heads, *mlp], needed))[2], abs=1e-12)


def test_equal_losses_remove_least():
    heads = [[Choice(4 - n, 6 * n, 0.0, n) for n in range(5)]] * 2
    mlp = [[Choice(4 - n, 10 * n, 0.0) for n in range(5)]]
    *of_heads, widths = allocate_jointly([heads, heads], mlp, 30, 3)
    removed, cached, loss = totals([*itertools.chain(*of_heads), *widths])
    assert (cached, loss) == (3, 0.0)
    assert removed == 3 * 6 + 20


def test_a_cache_out_of_proportion_is_no_part():
    with pytest.raises(AssertionError, match="proportion"):
        allocate_jointly([[[Choice(3, 0, 0.0, 0), Choice(2, 5, 1.0, 2), Choice(1, 10, 2.0, 3)]]], [], 1, 1)


def test_coarse_steps_of_the_mlp_never_remove_too_little():
    rng = random.Random(0)
    heads = [[Choice(8 - i, 1000 * i, rng.random() * i, i) for i in range(9)] for _ in range(6)]
    mlp = [[Choice(i, i * rng.randrange(10**9, 10**10), rng.random() * i) for i in range(9)] for _ in range(20)]
    needed = sum(item[-1].removed for item in mlp) // 3
    for share in (1 / 3, 1.0):
        wanted = int(share * 48)
        removed, cached, _ = totals(itertools.chain(*allocate_jointly([heads], mlp, needed, wanted)))
        assert wanted <= cached
        assert needed <= removed <= 1.02 * needed


def test_coarse_steps_find_the_only_choice():
    """Rounded down, all removals of the MLP together are less than the needed amount."""
    heads = [[Choice(2, 0, 0.0, 0), Choice(1, 7, 1.0, 1)]]
    mlp = [[Choice(1, 0, 0.0), Choice(0, 10**7 + i, 1.0)] for i in range(40)]
    needed = 7 + sum(item[1].removed for item in mlp)
    assert allocate_jointly([heads], mlp, needed, 0) == [[heads[0][1]], [item[1] for item in mlp]]
