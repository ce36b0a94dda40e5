"""Divide a number of things by weight: blocks among the parts of a mixture, tokens among the files of a folder."""

from collections.abc import Sequence
from fractions import Fraction


def divide(weights: Sequence[float | Fraction], total: int, *, least: int = 0) -> list[int]:
    """Return whole numbers in proportion to weights that are not negative: largest remainders, at least `least` each.

    They add up to `total`, which must suffice for that. Of equal remainders, the first is rounded up.
    """
    exact = [Fraction(weight) for weight in weights]
    if not any(exact):
        exact = [Fraction(1)] * len(exact)
    rest = list(range(len(exact)))  # those that are not lifted to `least`
    while True:
        left, sum_of_rest = total - least * (len(exact) - len(rest)), sum(exact[i] for i in rest)
        lower = [i for i in rest if left * exact[i] < least * sum_of_rest]
        if not lower:
            break
        rest = [i for i in rest if i not in lower]
    ideal = {i: left * exact[i] / sum_of_rest for i in rest}
    shares = [int(ideal[i]) if i in ideal else least for i in range(len(exact))]
    largest = sorted(rest, key=lambda i: shares[i] - ideal[i])
    for i in largest[: total - sum(shares)]:
        shares[i] += 1
    return shares
