"""What a decoder costs whose layers have given sizes: weights, KV cache, FLOPs. Pure arithmetic.

`sizes` has an entry for each layer; `shape.sizes` are those of the source.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

from a3cli.models.families import LayerSizes, ModelShape, Role
from a3cli.solvers.sampling import sampled_blocks, sampled_queries

ATTENTION: tuple[Role, ...] = ("q", "k", "v", "o")


def attention_weights(shape: ModelShape, sizes: Sequence[LayerSizes]) -> int:
    """Weights of q, k, v and o over all layers, biases not counted."""
    return _weights(shape, sizes, ATTENTION)


def mlp_weights(shape: ModelShape, sizes: Sequence[LayerSizes]) -> int:
    """Weights of gate, up and down over all layers, biases not counted."""
    return _weights(shape, sizes, shape.mlp_roles)


def _weights(shape: ModelShape, sizes: Sequence[LayerSizes], roles: Sequence[Role]) -> int:
    layers = [shape.linear_shapes(size) for size in sizes]
    return sum(layer[role][0] * layer[role][1] for layer in layers for role in roles)


def linear_weights(shape: ModelShape, sizes: Sequence[LayerSizes]) -> int:
    """What a budget is a fraction of: all linear weights of the decoder layers."""
    return attention_weights(shape, sizes) + mlp_weights(shape, sizes)


def bias_parameters(shape: ModelShape, sizes: Sequence[LayerSizes]) -> int:
    """Biases that shrink with the head or MLP width, over all layers."""
    roles: list[Role] = [
        *(("q", "k", "v") if shape.attention_bias else ()),
        *(shape.mlp_inputs if shape.mlp_bias else ()),
    ]
    return sum(shape.linear_shapes(size)[role][0] for size in sizes for role in roles)


def removed_parameters(shape: ModelShape, sizes: Sequence[LayerSizes]) -> int:
    """Parameters that leave the checkpoint, biases included."""
    before, after = (linear_weights(shape, s) + bias_parameters(shape, s) for s in (shape.sizes, sizes))
    return before - after


def kv_bytes_per_token(shape: ModelShape, sizes: Sequence[LayerSizes], bytes_per_value: int) -> int:
    return sum(shape.kv_heads * (size.qk + size.ov) for size in sizes) * bytes_per_value


def prefill_flops_per_token(shape: ModelShape, sizes: Sequence[LayerSizes], seq_len: int) -> int:
    """FLOPs of the decoder layers for one token of a prompt of `seq_len` tokens.

    Two a weight for the matrix products, `2·T·H·qk` for `QKᵀ` and `2·T·H·ov` for the product with V, counted
    without the causal half, as dense kernels compute them. Embedding, norms and output head, which a3 does
    not change, are left out.
    """
    attention = sum(2 * seq_len * shape.heads * (size.qk + size.ov) for size in sizes)
    return 2 * linear_weights(shape, sizes) + attention


def statistics_bytes(shape: ModelShape, samples: int, seq_len: int, *, full_mlp: bool) -> int:
    """One layer's statistics on disk (see `moments.py`), of `samples` blocks, headers not counted."""
    query, kv, h, width = (
        shape.heads * shape.head_dim,
        shape.kv_heads * shape.head_dim,
        shape.head_dim,
        shape.intermediate_size,
    )
    heads = (query + 2 * kv) * (h + 1) * 8
    outputs = triangle(query) * 4 + query * 8
    mlp = (triangle(width) * 4 if full_mlp else 0) + 2 * width * 8
    return heads + outputs + mlp + (seq_len + 3) * 8 + sample_bytes(shape, samples, seq_len)


def sample_bytes(shape: ModelShape, samples: int, seq_len: int) -> int:
    """One layer's attention that is kept whole (see `samples.py`)."""
    queries = len(sampled_queries(seq_len))
    of_block = (queries * shape.heads + 2 * seq_len * shape.kv_heads) * shape.head_dim * 2 + queries * 8
    return len(sampled_blocks(samples, seq_len)) * of_block


def hidden_state_bytes(shape: ModelShape, samples: int, seq_len: int, itemsize: int) -> int:
    """One of the two files between layers."""
    return samples * seq_len * shape.hidden_size * itemsize


def calibration_flops_per_token(shape: ModelShape, seq_len: int, *, full_mlp: bool) -> int:
    """One layer's forward and moments, for one token of blocks of `seq_len`."""
    query, kv, width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.intermediate_size
    forward = prefill_flops_per_token(shape, shape.sizes[:1], seq_len)
    large = (query**2 + (width**2 if full_mlp else 2 * width)) // 2  # upper triangles
    return forward + 2 * ((query + 2 * kv) * shape.head_dim + large)


def layer_bytes(shape: ModelShape, itemsize: int) -> int:
    """One layer's weights in the compute dtype; norms and biases are small beside them."""
    return linear_weights(shape, shape.sizes[:1]) * itemsize


def gathered_bytes(shape: ModelShape, samples: int, seq_len: int, *, full_mlp: bool) -> int:
    """All that one layer's sweep gathers on the device: running sums, and attention kept whole."""
    return moment_bytes(shape, full_mlp=full_mlp) + sample_bytes(shape, samples, seq_len)


def moment_bytes(shape: ModelShape, *, full_mlp: bool) -> int:
    """One layer's running sums, and the packed copy in which the largest leaves the device."""
    query, width = shape.heads * shape.head_dim, shape.intermediate_size
    large = [query**2, width**2 if full_mlp else 0]
    heads = (shape.heads + 2 * shape.kv_heads) * shape.head_dim**2 * 8
    return 4 * sum(large) + 2 * max(large) + heads + 16 * (query + width)


MLP_TOKENS = 512  # that the MLP takes at a time on a CPU: what it computes stays in the cache


def block_bytes(shape: ModelShape, itemsize: int, seq_len: int, *, on_cpu: bool = False) -> int:
    """Activations of one block at their peak in a layer's forward with its hooks.

    The stream four times (input, residual, norm, output), and the larger of attention (q, k, v before and after RoPE,
    their float32 copies, the heads' output, a mask) and of the MLP (gate, up, what feeds down).
    """
    mlp_tokens = min(seq_len, MLP_TOKENS) if on_cpu else seq_len
    heads, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = (4 * heads + 6 * keys) * itemsize + 4 * (heads + 2 * keys) + 4 * seq_len
    mlp = shape.intermediate_size * len(shape.mlp_roles) * itemsize
    return seq_len * 4 * shape.hidden_size * itemsize + max(seq_len * attention, mlp_tokens * mlp)


def cpu_batch(seq_len: int) -> int:
    """Blocks that fill a CPU's cores: about 2048 tokens, more only take memory."""
    return max(1, 2048 // seq_len)


EIGH = 9  # FLOPs of a symmetric eigenvalue problem with vectors, of n³
ROUNDS = 40  # of the alternation that refines RoPE slots, at most
VALUE_ROUNDS, VALUE_STEPS = 3, 30  # of the alternation that refines value maps, and of conjugate gradients in each
SMALL = 4  # matrices of head size run at a fraction of the speed of large ones


def paper_flops(shape: ModelShape) -> int:
    """`--method paper` for one layer, float64: two eigenvalue problems a KV head, `W_o,i W_o,iᵀ`, channel scores."""
    h, d = shape.head_dim, shape.hidden_size
    heads = 2 * shape.heads * h**2 * d + SMALL * shape.kv_heads * 2 * EIGH * h**3
    return heads + 2 * shape.intermediate_size * d


def best_flops(shape: ModelShape, size: LayerSizes, head_multiple: int) -> int:
    """`--method best` for one layer that ends with these sizes, float64: mostly the MLP's selection and its refit."""
    d, width, query, kept = (
        shape.hidden_size,
        shape.intermediate_size,
        shape.heads * shape.head_dim,
        shape.heads * size.ov,
    )
    select = width**3 // 3 + 3 * width**2 * d // 2
    refit_mlp = size.mlp * width * d + size.mlp**2 * d + size.mlp**3 // 6
    refit_output = kept * query * (query + d) + kept**2 * (query + d) + kept**3 // 6
    step = query**2 * size.ov + kept**2 * shape.head_dim
    values = query**2 * d + VALUE_ROUNDS * (refit_output + kept**2 * d + (VALUE_STEPS + 1) * step)
    ranks, coordinates = shape.head_dim // head_multiple, shape.head_dim // (1 if shape.passed_dims else 2)
    slots = ranks * ROUNDS * shape.kv_heads * 10 * coordinates**3 // 2 * 4  # ten complex products a round
    return paper_flops(shape) + 2 * (select + refit_mlp + refit_output + values + SMALL * slots)


REFINEMENTS = 32  # of the loss and its gradient on all samples: those of the projections, and of the curves on a part
CAUSAL = 0.63  # of the scores that are computed, a quarter of a block's queries at a time


def refine_flops(shape: ModelShape, size: LayerSizes, samples: int, seq_len: int) -> int:
    """What refining one layer's query and key maps on sampled attention takes, float32."""
    queries = len(sampled_blocks(samples, seq_len)) * len(sampled_queries(seq_len)) * shape.heads
    return int(REFINEMENTS * 3 * 2 * CAUSAL * queries * seq_len * (size.qk + shape.head_dim))


def refine_memory(shape: ModelShape, samples: int, seq_len: int) -> int:
    """Samples of one layer as stored, and of one KV head in float32, as complex numbers and with their gradients."""
    stored = sample_bytes(shape, samples, seq_len)
    return stored + 6 * stored // shape.kv_heads


GAUSS_NEWTON_STEPS = 8  # of conjugate gradients in one round of the sequential correction


def sequential_flops_per_token(shape: ModelShape, size: LayerSizes, rounds: int, seq_len: int) -> int:
    """The sequential correction of one layer: forwards of both models, two regressions, rounds of Gauss-Newton."""
    d, query, width, inputs = shape.hidden_size, shape.heads * size.ov, size.mlp, len(shape.mlp_inputs)
    passed = [*shape.sizes[:1], size, size, LayerSizes(size.qk, size.ov, 0)]  # the last one ends with attention
    forwards = prefill_flops_per_token(shape, passed, seq_len)
    regression = 2 * width * (width + d)
    step = (6 * inputs + 4) * width * d  # before, moved and as weights, each of gate and up; through V twice
    fitted = (GAUSS_NEWTON_STEPS + 1) * step + 2 * inputs * width * d + 2 * d**2 + regression
    return forwards + 2 * query * (query + d) + regression + rounds * fitted


def sequential_memory(shape: ModelShape, size: LayerSizes, itemsize: int) -> int:
    """A layer of both models, and the down projection's regression or the matrices of a Gauss-Newton step."""
    d, width = shape.hidden_size, size.mlp
    layers = linear_weights(shape, [*shape.sizes[:1], size]) * itemsize
    regression = width**2 * (4 + 8 + 8) + width * d * (4 + 3 * 8)
    return layers + max(regression, 9 * len(shape.mlp_inputs) * width * d * 4)


def stream_bytes(shape: ModelShape, samples: int, seq_len: int, itemsize: int, rounds: int) -> int:
    """Hidden states of the sequential correction: of both models two files, what is after attention, and with rounds
    what gate and up are fitted on.
    """
    return (7 if rounds else 5) * hidden_state_bytes(shape, samples, seq_len, itemsize)


SMALL_LAYER = 4096  # MLP channels; statistics of some layers so wide fit in any memory at once


def side_by_side(shape: ModelShape) -> bool:
    """Whether `a3 solve` looks at several layers at once, a core each; a large one's products fill all cores.

    A matter of the model alone, so that the bytes don't depend on the number of processes.
    """
    return shape.intermediate_size <= SMALL_LAYER


def held_bytes(shape: ModelShape) -> int:
    """What `a3 solve` keeps of every layer until the sizes are chosen: Gram matrices and maps of head size."""
    return shape.layers * (shape.heads + 5 * shape.kv_heads) * shape.head_dim**2 * 8


def solve_memory(shape: ModelShape, size: LayerSizes, method: str) -> int:
    """Bytes that one layer takes at its peak: `o_gram` in float64, and for `best` the MLP's refit beside its Gram."""
    query, width, d = shape.heads * shape.head_dim, shape.intermediate_size, shape.hidden_size
    outputs = query**2 * (8 + 4 + 4) + query * d * 2
    if method == "paper":
        return outputs + width * d * 2
    kept = shape.heads * size.ov
    refit_output = query**2 * 8 + 3 * query * kept * 8 + (query + 2 * kept) * d * 8 + query * d * 2
    unpack = (width**2 + triangle(width)) * 8
    select = (width**2 + 2 * width * d) * 8
    refit = (width**2 + size.mlp**2 + 2 * size.mlp * d) * 8
    return max(outputs, refit_output, max(unpack, select, refit) + width * d * 2)


def triangle(n: int) -> int:
    """Numbers in the upper triangle of a symmetric `[n, n]` matrix."""
    return n * (n + 1) // 2


def solution_bytes(shape: ModelShape, size: LayerSizes, method: str) -> int:
    """One layer's projections on disk; a component that keeps its size has none."""
    maps, d, refit = shape.kv_heads * shape.head_dim * 8, shape.hidden_size, method == "best"
    qk = 2 * maps * size.qk if refit else size.qk // 2 * 8
    ov = maps * size.ov + (d * shape.heads * size.ov * 4 if refit else maps * size.ov)
    mlp = size.mlp * (8 + (4 * d if refit else 0))
    kept = ((size.qk, shape.head_dim, qk), (size.ov, shape.head_dim, ov), (size.mlp, shape.intermediate_size, mlp))
    return sum(needed for now, before, needed in kept if now < before)


def refit_bytes(shape: ModelShape, size: LayerSizes, rounds: int) -> int:
    """What the sequential correction writes of one layer: output and down projection, with `rounds` gate and up too."""
    return shape.hidden_size * (shape.heads * size.ov + (len(shape.mlp_roles) if rounds else 1) * size.mlp) * 4


def corrected_bytes(shape: ModelShape, size: LayerSizes, method: str, rounds: int) -> int:
    """One layer of a sequential solution at the peak: as solved in one shot, the refits, and both put together."""
    return 2 * (solution_bytes(shape, size, method) + refit_bytes(shape, size, rounds))


def uniform_sizes(shape: ModelShape, budget: float, *, head_multiple: int, mlp_multiple: int) -> LayerSizes | None:
    """Sizes of all layers that remove at least `budget` of the linear weights, attention and MLP cut as alike as
    rounding allows; None if none do.
    """
    total = linear_weights(shape, shape.sizes[:1])
    needed = math.ceil(Fraction(str(budget)) * total)
    channel = len(shape.mlp_roles) * shape.hidden_size
    found = []
    for head in (*range(head_multiple, shape.head_dim, head_multiple), shape.head_dim):
        of_heads = total - linear_weights(shape, [LayerSizes(head, head, shape.intermediate_size)])
        most = shape.intermediate_size - max(0, math.ceil((needed - of_heads) / channel))
        width = most if most == shape.intermediate_size else most // mlp_multiple * mlp_multiple
        if width > 0:
            unlike = abs(head / shape.head_dim - width / shape.intermediate_size)
            found.append((unlike, -width, LayerSizes(head, head, width)))
    return min(found, key=lambda each: each[:2])[2] if found else None
