"""Compute what a decoder of given sizes costs: weights, KV cache, FLOPs, memory. Pure arithmetic.

`sizes` has an entry for each layer; `shape.sizes` are those of the source.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

from a3cli.models.families import LayerSizes, ModelShape, Role
from a3cli.solvers.sampling import sampled_blocks, sampled_queries

ATTENTION: tuple[Role, ...] = ("q", "k", "v", "o")


def attention_weights(shape: ModelShape, sizes: Sequence[LayerSizes]) -> int:
    """Return the number of weights of attention's linear layers over all layers, without biases."""
    if carried := shape.carried_attention:
        return _part_of(carried.weights, shape, sizes)
    return _weights(shape, sizes, ATTENTION)


def mlp_weights(shape: ModelShape, sizes: Sequence[LayerSizes]) -> int:
    """Return the number of weights of gate, up and down over all layers, without biases; of all experts."""
    return shape.mlps * _weights(shape, sizes, shape.mlp_roles)


def _part_of(total: int, shape: ModelShape, sizes: Sequence[LayerSizes]) -> int:
    """Return the part of a sum over all layers that so many of them have on average."""
    return total * len(sizes) // shape.layers


def _weights(shape: ModelShape, sizes: Sequence[LayerSizes], roles: Sequence[Role]) -> int:
    layers = [shape.linear_shapes(size) for size in sizes]
    return sum(layer[role][0] * layer[role][1] for layer in layers for role in roles)


def linear_weights(shape: ModelShape, sizes: Sequence[LayerSizes]) -> int:
    """Return the number of linear weights of all decoder layers, of which a budget is a fraction."""
    return attention_weights(shape, sizes) + mlp_weights(shape, sizes)


def active_weights(shape: ModelShape, sizes: Sequence[LayerSizes]) -> int:
    """Return the number of linear weights that a token is multiplied with: of experts, those that it goes through."""
    active = (shape.active_experts or 1) * _weights(shape, sizes, shape.mlp_roles)
    return attention_weights(shape, sizes) + active


def small_parameters(shape: ModelShape, sizes: Sequence[LayerSizes]) -> int:
    """Return the number of biases and of heads' norm weights that shrink with the sizes, over all layers."""
    roles: list[Role] = [
        *(("q", "k", "v") if shape.attention_bias else ()),
        *(shape.mlp_inputs if shape.mlp_bias else ()),
    ]
    biases = sum(shape.linear_shapes(size)[role][0] for size in sizes for role in roles)
    return biases + (sum(2 * size.qk for size in sizes) if shape.fitted_norms else 0)


def shrinking_parameters(shape: ModelShape, sizes: Sequence[LayerSizes]) -> int:
    """Return the number of linear weights, and of biases and norms of heads that shrink with them."""
    return linear_weights(shape, sizes) + small_parameters(shape, sizes)


def removed_parameters(shape: ModelShape, sizes: Sequence[LayerSizes]) -> int:
    """Return the number of parameters that are removed, with biases and norms of heads."""
    return shrinking_parameters(shape, shape.sizes) - shrinking_parameters(shape, sizes)


def kv_bytes_per_token(shape: ModelShape, sizes: Sequence[LayerSizes], bytes_per_value: int) -> int:
    """Return the bytes of the KV cache for one token, without the states of linear attention."""
    if carried := shape.carried_attention:
        return _part_of(carried.cached, shape, sizes) * bytes_per_value
    return sum(shape.kv_heads * (size.qk + size.ov) for size in sizes) * bytes_per_value


def kv_cache_bytes(shape: ModelShape, sizes: Sequence[LayerSizes], bytes_per_value: int, tokens: int) -> int:
    """Return the bytes of one sequence's KV cache of so many tokens; a sliding window keeps all but one of its own."""
    if shape.carried_attention:
        return tokens * kv_bytes_per_token(shape, sizes, bytes_per_value)
    windows = shape.windows or (None,) * len(sizes)
    kept = (tokens if window is None else min(tokens, max(0, window - 1)) for window in windows)
    return sum(
        held * kv_bytes_per_token(shape, [size], bytes_per_value) for held, size in zip(kept, sizes, strict=True)
    )


def prefill_flops_per_token(shape: ModelShape, sizes: Sequence[LayerSizes], seq_len: int) -> int:
    """Return the FLOPs of the decoder layers for one token of a prompt of `seq_len` tokens.

    Matrix products take two per weight, `QKᵀ` takes `2·T·H·qk` and the product with V `2·T·H·ov`; both are counted
    in full, as dense kernels compute them, without halving for the causal mask. Linear attention takes three products
    with its state. Of experts, those that a token goes through are counted. Embedding, norms and output head, which a3
    does not change, are left out.
    """
    if carried := shape.carried_attention:
        attention = _part_of(2 * seq_len * carried.products + 6 * carried.state, shape, sizes)
        return 2 * linear_weights(shape, sizes) + attention
    attention = sum(2 * seq_len * shape.heads * (size.qk + size.ov) for size in sizes)
    return 2 * active_weights(shape, sizes) + attention


def statistics_bytes(shape: ModelShape, samples: int, seq_len: int, *, full_mlp: bool) -> int:
    """Return the bytes on disk of one layer's statistics (see `moments.py`) of `samples` blocks, without headers."""
    query, kv, h, width = (
        shape.heads * shape.head_dim,
        shape.kv_heads * shape.head_dim,
        shape.head_dim,
        shape.intermediate_size,
    )
    heads = (query + 2 * kv) * (h + 1) * 8
    outputs = triangle(query) * 4 + query * 8
    beside = width + 1 if shape.experts else 2 * width  # energy and tokens of each expert, or energy and sum
    mlp = (triangle(width) * 4 if full_mlp else 0) + beside * 8
    distance = 0 if shape.carried_attention else seq_len * 8
    return heads + outputs + shape.mlps * mlp + distance + 3 * 8 + sample_bytes(shape, samples, seq_len)


def sample_bytes(shape: ModelShape, samples: int, seq_len: int) -> int:
    """Return the bytes of one layer's sampled attention (see `samples.py`)."""
    if shape.carried_attention:
        return 0
    queries = len(sampled_queries(seq_len))
    of_block = (queries * shape.heads + 2 * seq_len * shape.kv_heads) * shape.head_dim * 2 + queries * 8
    return len(sampled_blocks(samples, seq_len)) * of_block


def hidden_state_bytes(shape: ModelShape, samples: int, seq_len: int, itemsize: int) -> int:
    """Return the bytes of one of the two files of hidden states between layers."""
    return samples * seq_len * shape.hidden_size * itemsize


def calibration_flops_per_token(shape: ModelShape, seq_len: int, *, full_mlp: bool) -> int:
    """Return the FLOPs of one layer's forward and moments, for one token of blocks of `seq_len`."""
    query, kv, width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.intermediate_size
    forward = prefill_flops_per_token(shape, shape.sizes[:1], seq_len)
    active = shape.active_experts or 1
    large = (query**2 + active * (width**2 if full_mlp else 2 * width)) // 2  # upper triangles
    return forward + 2 * ((query + 2 * kv) * shape.head_dim + large)


def layer_bytes(shape: ModelShape, itemsize: int) -> int:
    """Return the bytes of one layer's weights in the compute dtype, without norms and biases, which are small."""
    return linear_weights(shape, shape.sizes[:1]) * itemsize


def gathered_bytes(shape: ModelShape, samples: int, seq_len: int, *, full_mlp: bool) -> int:
    """Return the bytes that one layer's sweep gathers on the device: running sums and sampled attention."""
    return moment_bytes(shape, full_mlp=full_mlp) + sample_bytes(shape, samples, seq_len)


def moment_bytes(shape: ModelShape, *, full_mlp: bool) -> int:
    """Return the bytes of one layer's running sums, and of the packed copy in which the largest leaves the device."""
    query, width = shape.heads * shape.head_dim, shape.intermediate_size
    large = [query**2, shape.mlps * width**2 if full_mlp else 0]
    heads = (shape.heads + 2 * shape.kv_heads) * shape.head_dim**2 * 8
    return 4 * sum(large) + 2 * max(large) + heads + 16 * (query + shape.mlps * width)


MLP_TOKENS = 512  # tokens in one step of the MLP on a CPU, so that activations stay in the cache


def block_bytes(shape: ModelShape, itemsize: int, seq_len: int, *, on_cpu: bool = False) -> int:
    """Return the peak bytes of one block's activations in a layer's forward with its hooks.

    The stream is held four times (input, residual, norm, output), beside the larger of attention (q, k, v before and
    after RoPE, their float32 copies, the heads' output, a mask) and the MLP (gate, up, the input of down).
    """
    whole = shape.mlp_in_layer or shape.experts  # one expert may take all tokens
    mlp_tokens = min(seq_len, MLP_TOKENS) if on_cpu and not whole else seq_len
    heads, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = (4 * heads + 6 * keys) * itemsize + 4 * (heads + 2 * keys) + 4 * seq_len
    if shape.alibi:  # no fused kernel: scores, with bias, masked, and weights
        attention += shape.heads * seq_len * (3 * itemsize + 4)
    if carried := shape.carried_attention:  # outputs of its projections, and float32 copies
        attention = 4 * (itemsize + 4) * carried.weights // (shape.layers * shape.hidden_size)
    mlp = shape.intermediate_size * len(shape.mlp_roles) * itemsize
    return seq_len * 4 * shape.hidden_size * itemsize + max(seq_len * attention, mlp_tokens * mlp)


def cpu_batch(seq_len: int) -> int:
    """Return the batch size that fills a CPU's cores: about 2048 tokens; more only take memory."""
    return max(1, 2048 // seq_len)


EIGH = 9  # FLOPs of a symmetric eigenvalue problem with vectors, in units of n³
ROUNDS = 40  # the most rounds of the alternation that refines RoPE slots
VALUE_ROUNDS, VALUE_STEPS = 3, 10  # rounds that refine value maps, and steps of conjugate gradients in each
SMALL = 4  # matrices of head size run at a fraction of the speed of large ones


def paper_flops(shape: ModelShape) -> int:
    """Return the FLOPs of `--method paper` for one layer, in float64.

    These are two eigenvalue problems per KV head, `W_o,i W_o,iᵀ` and the channel scores.
    """
    h, d = shape.head_dim, shape.hidden_size
    heads = 2 * shape.heads * h**2 * d + SMALL * shape.kv_heads * 2 * EIGH * h**3
    return heads + shape.mlps * 2 * shape.intermediate_size * d


def best_flops(shape: ModelShape, size: LayerSizes, head_multiple: int) -> int:
    """Return the FLOPs of `--method best` for one layer of the given final sizes, in float64.

    Most are those of the MLP's selection and refit.
    """
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
    slots = ranks * ROUNDS * shape.kv_heads * 10 * coordinates**3 // 2 * 4  # ten complex products per round
    return paper_flops(shape) + 2 * (
        shape.mlps * (select + refit_mlp) + (refit_output + values) * (size.ov < shape.head_dim) + SMALL * slots
    )


REFINEMENTS = 16  # evaluations of the loss and its gradient on all samples, for the projections and for the curves
CAUSAL = 0.63  # fraction of the scores that is computed: a quarter of a block's queries at a time


def refine_flops(shape: ModelShape, size: LayerSizes, samples: int, seq_len: int) -> int:
    """Return the FLOPs of refining one layer's query and key maps on sampled attention, in float32."""
    queries = len(sampled_blocks(samples, seq_len)) * len(sampled_queries(seq_len)) * shape.heads
    return int(REFINEMENTS * 3 * 2 * CAUSAL * queries * seq_len * (size.qk + shape.head_dim))


def refine_memory(shape: ModelShape, samples: int, seq_len: int) -> int:
    """Return the bytes of one layer's stored samples, and of one KV head's in float32, complex and with gradients."""
    stored = sample_bytes(shape, samples, seq_len)
    return stored + 6 * stored // max(1, shape.kv_heads)


MEASURED_TOKENS = 4096  # on which a solution is measured
HELD_OUT_TOKENS = MEASURED_TOKENS  # that a calibration keeps for it
HEAD_TOKENS = 256  # whose logits are in memory at once


def measuring_flops(shape: ModelShape, sizes: Sequence[LayerSizes], vocabulary: int, seq_len: int) -> int:
    """Return the FLOPs of measuring a solution: forwards of both models, and logits."""
    forwards = sum(prefill_flops_per_token(shape, each, seq_len) for each in (shape.sizes, sizes))
    return MEASURED_TOKENS * (forwards + 4 * vocabulary * shape.hidden_size)


def measuring_memory(shape: ModelShape, vocabulary: int, itemsize: int) -> int:
    """Return the bytes of measuring a solution: hidden states of both models, and a layer or the head with logits."""
    states = 2 * MEASURED_TOKENS * shape.hidden_size * itemsize
    head = vocabulary * (shape.hidden_size * itemsize + 4 * HEAD_TOKENS * 4)  # logits, and probabilities of both
    return states + max(layer_bytes(shape, itemsize), head)


GRADIENT_TOKENS = 8192  # of the calibration, through which gradients are swept back


def gradient_blocks(samples: int, seq_len: int) -> int:
    """Return how many blocks of the calibration that is."""
    return min(samples, -(-GRADIENT_TOKENS // seq_len))


def gradient_flops(shape: ModelShape, vocabulary: int, samples: int, seq_len: int) -> int:
    """Return the FLOPs of the sweep for gradients: two forwards and a backward, logits once, and second moments."""
    d = shape.hidden_size
    sweep = 3 * prefill_flops_per_token(shape, shape.sizes, seq_len) + 4 * vocabulary * d + 2 * shape.layers * d**2
    return gradient_blocks(samples, seq_len) * seq_len * sweep


def gradient_bytes(shape: ModelShape, samples: int, seq_len: int, itemsize: int) -> int:
    """Return the bytes of the sweep's files: hidden states and gradients before every layer and after the last.

    Beside them the second moments of the gradients, which are kept.
    """
    states = hidden_state_bytes(shape, gradient_blocks(samples, seq_len), seq_len, itemsize)
    return 2 * (shape.layers + 1) * states + shape.layers * triangle(shape.hidden_size) * 4


SMALL_LAYER = 4096  # MLP channels; the statistics of several layers of this width fit in any memory


def side_by_side(shape: ModelShape) -> bool:
    """Return whether `a3 solve` solves several layers at once, one core each; products of a large layer fill all cores.

    This depends on the model alone, so that the bytes don't depend on the number of processes.
    """
    return shape.intermediate_size <= SMALL_LAYER


def held_bytes(shape: ModelShape) -> int:
    """Return the bytes that `a3 solve` keeps until the sizes are chosen: Gram matrices and maps of head size."""
    return shape.layers * (shape.heads + 5 * shape.kv_heads) * shape.head_dim**2 * 8


def solve_memory(shape: ModelShape, size: LayerSizes, method: str) -> int:
    """Return the peak bytes of one layer: `o_gram` in float64; for `best` also the MLP's refit and Gram matrix."""
    query, width, d = shape.heads * shape.head_dim, shape.intermediate_size, shape.hidden_size
    outputs = query**2 * (8 + 4 + 4) + query * d * 2
    if method == "paper":
        return outputs + width * d * 2
    kept = shape.heads * size.ov
    refit_output = query**2 * 8 + 3 * query * kept * 8 + (query + 2 * kept) * d * 8 + query * d * 2
    unpack = (width**2 + triangle(width)) * 8
    select = (width**2 + 3 * width * d) * 8
    refit = (width**2 + size.mlp**2 + 2 * size.mlp * d) * 8
    others = (shape.mlps - 1) * size.mlp * d * 4  # refit projections of a layer's other experts
    return max(outputs, refit_output, max(unpack, select, refit) + width * d * 2 + others)


def triangle(n: int) -> int:
    """Return how many numbers the upper triangle of a symmetric `[n, n]` matrix has."""
    return n * (n + 1) // 2


def solution_bytes(shape: ModelShape, size: LayerSizes, method: str) -> int:
    """Return the bytes on disk of one layer's projections; a component that keeps its size has none."""
    maps, d, refit = shape.kv_heads * shape.head_dim * 8, shape.hidden_size, method == "best"
    qk = 2 * (maps + 8 * shape.fitted_norms) * size.qk if refit else size.qk // 2 * 8
    ov = maps * size.ov + (d * shape.heads * size.ov * 4 if refit else maps * size.ov)
    mlp = shape.mlps * size.mlp * (8 + (4 * d if refit else 0))
    kept = ((size.qk, shape.head_dim, qk), (size.ov, shape.head_dim, ov), (size.mlp, shape.intermediate_size, mlp))
    return sum(needed for now, before, needed in kept if now < before)


def refit_bytes(shape: ModelShape, size: LayerSizes, rounds: int) -> int:
    """Return the bytes of one layer's sequential refit: output and down projection, with `rounds` also gate and up."""
    return shape.hidden_size * (shape.heads * size.ov + (len(shape.mlp_roles) if rounds else 1) * size.mlp) * 4


def corrected_bytes(shape: ModelShape, size: LayerSizes, method: str, rounds: int) -> int:
    """Return the peak bytes on disk of one layer of a sequential solution: one-shot, refit, and both joined."""
    return 2 * (solution_bytes(shape, size, method) + refit_bytes(shape, size, rounds))


def share_of(budget: float, total: int) -> int:
    """Return a budget's share of a count, rounded up; exact for the decimal number as typed."""
    return math.ceil(Fraction(str(budget)) * total)
