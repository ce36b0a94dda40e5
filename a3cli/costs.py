"""What a decoder costs whose layers have given sizes: weights, KV cache, FLOPs. Pure arithmetic.

`sizes` has an entry for each layer; `shape.sizes` are those of the source.
"""

from collections.abc import Sequence

from a3cli.families import LayerSizes, ModelShape, Role

ATTENTION: tuple[Role, ...] = ("q", "k", "v", "o")
MLP: tuple[Role, ...] = ("gate", "up", "down")


def attention_weights(shape: ModelShape, sizes: Sequence[LayerSizes]) -> int:
    """Weights of q, k, v and o over all layers, biases not counted."""
    return _weights(shape, sizes, ATTENTION)


def mlp_weights(shape: ModelShape, sizes: Sequence[LayerSizes]) -> int:
    """Weights of gate, up and down over all layers, biases not counted."""
    return _weights(shape, sizes, MLP)


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
        *(("gate", "up") if shape.mlp_bias else ()),
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
