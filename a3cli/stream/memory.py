"""Choose the batch size that fits a device's memory, from the configuration alone."""

import logging

from a3cli.errors import A3Error
from a3cli.models import costs
from a3cli.models.families import ModelShape
from a3cli.work.machine import Machine

log = logging.getLogger(__name__)

MARGIN = 0.9  # share of the free memory to plan with; allocators round up, kernels need workspaces


def choose_batch_size(
    shape: ModelShape, machine: Machine, seq_len: int, blocks: int, *, full_mlp: bool, held: int = 0
) -> int:
    """Return the largest batch that fits beside one layer, its sums and `held` bytes; on the CPU the fastest one.

    Raises A3Error with the figures if not even one block fits.
    """
    free = int(MARGIN * machine.free_memory()) - held
    item = machine.dtype.itemsize
    layer = costs.layer_bytes(shape, item)
    sums = costs.gathered_bytes(shape, blocks, seq_len, full_mlp=full_mlp)
    on_cpu = machine.device.type == "cpu"
    block = costs.block_bytes(shape, item, seq_len, on_cpu=on_cpu)
    if layer + sums + block > free:
        figures = f"one layer {layer / 1e9:.2f} GB, its statistics {sums / 1e9:.2f} GB, one block {block / 1e9:.2f} GB"
        beside = f" beside {held / 1e9:.2f} GB of hidden states" if held else ""
        remedy = "--mlp-stats diagonal or a shorter --seq-len" if full_mlp else "a shorter --seq-len"
        raise A3Error(
            f"not enough memory on {machine.device}: {figures}, {free / 1e9:.2f} GB are free{beside}; use {remedy}, "
            "or free some"
        )
    fitting = (free - layer - sums) // block
    if on_cpu:
        fitting = min(fitting, costs.cpu_batch(seq_len))
    return max(1, min(fitting, blocks))
