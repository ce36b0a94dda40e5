"""What a decoder of a given shape costs: weights, KV cache, FLOPs. Pure arithmetic."""

from dataclasses import replace

from a3cli.families import ModelShape


def attention_weights(shape: ModelShape) -> int:
    """Weights of q, k, v and o over all layers, biases not counted."""
    return shape.layers * 2 * (shape.heads + shape.kv_heads) * shape.head_dim * shape.hidden_size


def mlp_weights(shape: ModelShape) -> int:
    """Weights of gate, up and down over all layers, biases not counted."""
    return shape.layers * 3 * shape.intermediate_size * shape.hidden_size


def linear_weights(shape: ModelShape) -> int:
    """What a budget is a fraction of: all linear weights of the decoder layers."""
    return attention_weights(shape) + mlp_weights(shape)


def bias_parameters(shape: ModelShape) -> int:
    """Biases that shrink with the head or MLP width, over all layers."""
    attention = (shape.heads + 2 * shape.kv_heads) * shape.head_dim if shape.attention_bias else 0
    mlp = 2 * shape.intermediate_size if shape.mlp_bias else 0
    return shape.layers * (attention + mlp)


def removed_parameters(before: ModelShape, after: ModelShape) -> int:
    """Parameters that leave the checkpoint, biases included."""
    return linear_weights(before) + bias_parameters(before) - linear_weights(after) - bias_parameters(after)


def kv_bytes_per_token(shape: ModelShape, bytes_per_value: int) -> int:
    return shape.layers * 2 * shape.kv_heads * shape.head_dim * bytes_per_value


def prefill_flops_per_token(shape: ModelShape, seq_len: int) -> int:
    """FLOPs of the decoder layers for one token of a prompt of `seq_len` tokens.

    Two a weight for the matrix products, and `2·T·H·h` each for `QKᵀ` and for the product with V, counted
    without the causal half, as dense kernels compute them. Embedding, norms and output head, which a3 does
    not change, are left out.
    """
    return 2 * linear_weights(shape) + shape.layers * 4 * seq_len * shape.heads * shape.head_dim


def resized(shape: ModelShape, *, head_dim: int, intermediate_size: int) -> ModelShape:
    return replace(shape, head_dim=head_dim, intermediate_size=intermediate_size)
