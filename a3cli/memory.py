"""What a sweep takes of a device's memory, from the configuration alone, and the batch that fits."""

import logging

import torch

from a3cli.errors import A3Error
from a3cli.families import ModelShape
from a3cli.machine import Machine

log = logging.getLogger(__name__)

MARGIN = 0.9  # share of the free memory that is planned for; allocators round up, kernels have workspaces
CPU_TOKENS = 2048  # a batch: enough to fill the cores, more only takes memory


def layer_bytes(shape: ModelShape, dtype: torch.dtype) -> int:
    """One decoder layer's weights in the compute dtype (norms and biases are small change)."""
    return sum(rows * columns for rows, columns in shape.linear_shapes().values()) * dtype.itemsize


def moment_bytes(shape: ModelShape, *, full_mlp: bool) -> int:
    """The running sums of one layer, and the packed copy in which the largest leaves the device."""
    query, width = shape.heads * shape.head_dim, shape.intermediate_size
    large = [query * query, width * width if full_mlp else 0]
    heads = (shape.heads + 2 * shape.kv_heads) * shape.head_dim * shape.head_dim * 8
    return 4 * sum(large) + 2 * max(large) + heads + 16 * (query + width)


def block_bytes(shape: ModelShape, dtype: torch.dtype, seq_len: int) -> int:
    """Activations of one block at their peak in a layer's forward with its hooks.

    The stream four times (input, residual, norm, output), and the larger of attention (q, k, v before and after RoPE,
    their float32 copies, the heads' output, a mask) and of the MLP (gate, up, their product, its float32 copy).
    """
    heads = shape.heads * shape.head_dim
    keys = shape.kv_heads * shape.head_dim
    attention = (4 * heads + 6 * keys) * dtype.itemsize + 4 * (heads + 2 * keys) + 4 * seq_len
    mlp = shape.intermediate_size * (3 * dtype.itemsize + 4)
    return seq_len * (4 * shape.hidden_size * dtype.itemsize + max(attention, mlp))


def choose_batch_size(shape: ModelShape, machine: Machine, seq_len: int, blocks: int, *, full_mlp: bool) -> int:
    """The largest batch that fits beside one layer and its sums; on the CPU no more than speeds it up.

    Raises A3Error with the figures if not even one block does.
    """
    free = int(MARGIN * machine.free_memory())
    layer, sums = layer_bytes(shape, machine.dtype), moment_bytes(shape, full_mlp=full_mlp)
    block = block_bytes(shape, machine.dtype, seq_len)
    if layer + sums + block > free:
        figures = f"one layer {layer / 1e9:.2f} GB, its statistics {sums / 1e9:.2f} GB, one block {block / 1e9:.2f} GB"
        remedy = "--mlp-stats diagonal or a shorter --seq-len" if full_mlp else "a shorter --seq-len"
        raise A3Error(
            f"not enough memory on {machine.device}: {figures}, {free / 1e9:.2f} GB can be had; use {remedy}, "
            "or free some"
        )
    fitting = (free - layer - sums) // block
    if machine.device.type == "cpu":
        fitting = min(fitting, max(1, CPU_TOKENS // seq_len))
    return max(1, min(fitting, blocks))
