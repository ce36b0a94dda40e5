"""Compute what the sequential correction costs: blocks, FLOPs, memory, disk. Pure arithmetic, like `costs.py`."""

from a3cli.models.costs import linear_weights, prefill_flops_per_token
from a3cli.models.families import LayerSizes, ModelShape

GAUSS_NEWTON_STEPS = 3  # steps of conjugate gradients in one round of the sequential correction
GRAM_ROWS = 256  # of the upper triangle of a regression's Gram matrix are computed at a time
# The sequential correction uses every second block, and each of its rounds every eighth, or more of them if there would
# be fewer tokens than so many times the MLP's width (docs/experiments.md).
CORRECTED_EVERY, LEAST_CORRECTED = 2, 16
FITTED_EVERY, LEAST_FITTED = 8, 10


def corrected_every(shape: ModelShape, samples: int, seq_len: int) -> int:
    """Return n: the sequential correction runs on every n-th block of the calibration."""
    return max(1, min(CORRECTED_EVERY, samples * seq_len // (LEAST_CORRECTED * shape.intermediate_size)))


def corrected_blocks(shape: ModelShape, samples: int, seq_len: int) -> int:
    """Return how many blocks of the calibration the sequential correction runs on."""
    return len(range(0, samples, corrected_every(shape, samples, seq_len)))


def fitted_every(shape: ModelShape, samples: int, seq_len: int) -> int:
    """Return n: each round of Gauss-Newton runs on every n-th block of those of the sequential correction."""
    of_all = min(FITTED_EVERY, samples * seq_len // (LEAST_FITTED * shape.intermediate_size))
    return max(1, of_all // corrected_every(shape, samples, seq_len))


def sequential_flops(shape: ModelShape, size: LayerSizes, rounds: int, samples: int, seq_len: int) -> int:
    """Return the FLOPs of the sequential correction of one layer, for a calibration of so many blocks.

    They are those of both models' forwards, a second pass of the smaller MLP, two regressions, and the rounds of
    Gauss-Newton: data for them, two regressions, and a pass before and in each step.
    """
    d, query, width, inputs = shape.hidden_size, shape.heads * size.ov, size.mlp, len(shape.mlp_inputs)
    forwards = prefill_flops_per_token(shape, [*shape.sizes[:1], size], seq_len)
    refit_o = shape.carried_attention is None
    output, mlp_inputs, down = 2 * query * d * refit_o, 2 * inputs * width * d, 2 * width * d
    regression = gram_flops(width) + down
    passed = forwards + gram_flops(query) * refit_o + output + mlp_inputs + regression
    step = 2 * mlp_inputs + 2 * down
    fitted = output + 2 * (mlp_inputs + regression) + 2 * mlp_inputs + 2 * down + 2 * d**2 + GAUSS_NEWTON_STEPS * step
    blocks = corrected_blocks(shape, samples, seq_len)
    fitted_blocks = len(range(0, blocks, fitted_every(shape, samples, seq_len)))
    return seq_len * (blocks * passed + fitted_blocks * rounds * fitted)


def gram_flops(width: int) -> int:
    """Return the FLOPs of one token's share of a Gram matrix: its upper triangle, some rows at a time."""
    return 2 * sum(min(GRAM_ROWS, width - row) * (width - row) for row in range(0, width, GRAM_ROWS))


def sequential_memory(shape: ModelShape, size: LayerSizes, itemsize: int, samples: int, seq_len: int) -> int:
    """Return the bytes of a layer of both models, of a round's tokens, and of its regression or Gauss-Newton step."""
    d, width, inputs = shape.hidden_size, size.mlp, len(shape.mlp_inputs)
    layers = linear_weights(shape, [*shape.sizes[:1], size]) * itemsize
    blocks = corrected_blocks(shape, samples, seq_len)
    tokens = len(range(0, blocks, fitted_every(shape, samples, seq_len))) * seq_len
    regression = width**2 * (4 + 8 + 8) + width * d * (4 + 3 * 8)
    step = (9 * d + tokens) * inputs * width * 4
    return layers + 2 * tokens * d * 4 + max(regression, step)


def stream_bytes(shape: ModelShape, samples: int, seq_len: int, itemsize: int) -> int:
    """Return the bytes of the hidden states of the sequential correction.

    Each model has two files, another holds the states after attention, and one what the output projection reads.
    """
    attended = shape.hidden_size if shape.carried_attention else shape.heads * shape.head_dim
    return corrected_blocks(shape, samples, seq_len) * seq_len * (5 * shape.hidden_size + attended) * itemsize
