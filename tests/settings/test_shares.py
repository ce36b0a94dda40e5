"""Whole numbers in proportion to weights, by largest remainder."""

from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from a3cli.settings.shares import divide

WEIGHTS = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=12)


@given(weights=WEIGHTS, extra=st.integers(0, 200), least=st.integers(0, 2))
def test_shares_add_up_and_are_within_one_of_the_ideal(weights, extra, least):
    """Where some are lifted to the least, the others divide what is left."""
    total = least * len(weights) + extra
    shares = divide(weights, total, least=least)
    assert sum(shares) == total
    assert min(shares) >= least
    exact = [Fraction(weight) for weight in weights]
    rest = [i for i, share in enumerate(shares) if share > least]
    left = total - least * (len(weights) - len(rest))
    for i in rest:
        assert shares[i] <= total * exact[i] / sum(exact) + 1
        assert abs(shares[i] - left * exact[i] / sum(exact[j] for j in rest)) < 1 + len(weights) - len(rest)
    if all(total * weight >= least * sum(exact) for weight in exact):  # nothing is lifted
        assert all(abs(share - total * weight / sum(exact)) < 1 for share, weight in zip(shares, exact, strict=True))


def test_known_shares():
    assert divide([0.5, 0.3, 0.2], 128) == [64, 38, 26]
    assert divide([1, 1, 1], 128) == [43, 43, 42]  # of equal remainders the first
    assert divide([1000, 1, 1], 10, least=1) == [8, 1, 1]
    assert divide([0, 0], 3) == [2, 1]
    assert divide([5, 0], 3, least=1) == [2, 1]
