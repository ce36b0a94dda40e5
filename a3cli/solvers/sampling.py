"""The number of attention samples of a calibration (`samples.py`). No torch, which planning does not import."""

SAMPLED_TOKENS = 1 << 15
QUERY_STEP = 8
MOST_QUERIES = 512  # per block: with all queries, work would grow with the square of the block's length


def sampled_blocks(blocks: int, length: int) -> list[int]:
    """Return evenly spaced blocks of at most `SAMPLED_TOKENS` tokens in total, at least one."""
    count = min(blocks, max(1, SAMPLED_TOKENS // length))
    return [(2 * i + 1) * blocks // (2 * count) for i in range(count)]


def sampled_queries(length: int) -> range:
    """Return the positions of a block's sampled queries: every eighth or fewer, always with the last one."""
    return range(length - 1, -1, -max(QUERY_STEP, -(-length // MOST_QUERIES)))[::-1]
