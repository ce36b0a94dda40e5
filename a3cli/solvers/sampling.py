"""How much of attention a calibration keeps whole (`samples.py`). Arithmetic alone, so that planning needs no torch."""

SAMPLED_TOKENS = 1 << 15
QUERY_STEP = 8
MOST_QUERIES = 512  # of a block: with all its keys as well, work would grow with the square of its length


def sampled_blocks(blocks: int, length: int) -> list[int]:
    """Evenly spaced blocks of at most `SAMPLED_TOKENS` tokens in all, at least one."""
    count = min(blocks, max(1, SAMPLED_TOKENS // length))
    return [(2 * i + 1) * blocks // (2 * count) for i in range(count)]


def sampled_queries(length: int) -> range:
    """Places of the queries that are kept of a block: every eighth or less often, the last of a block among them."""
    return range(length - 1, -1, -max(QUERY_STEP, -(-length // MOST_QUERIES)))[::-1]
