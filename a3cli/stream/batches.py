"""The loop of every sweep: read a batch of blocks, compute, write the result, with prefetching and writes behind."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from a3cli.stream.decoder import Arguments, Decoder, run_layer
from a3cli.stream.hidden import Blocks, Readable, StatesInMemory

Calls = dict[int, list[Arguments]]  # each layer's arguments, by batch size
Step = Callable[..., Sequence[torch.Tensor]]  # start and a batch of each input → a batch of each output


@dataclass(frozen=True)
class Batching:
    """The division of `blocks` blocks into batches; with `in_background`, threads read and write them meanwhile."""

    blocks: int
    size: int
    in_background: bool = False


def stream(step: Step, inputs: Sequence[Readable], outputs: Sequence[Blocks], batching: Batching) -> None:
    """Run `step` on one batch after another and write what it returns.

    `step(start, *batches)` gets the index of the first block and a batch `[B, T, d]` of each input. An output may be
    one of the inputs: a batch is read before it is written.
    """
    with writer(outputs, in_background=batching.in_background) as write:
        for start, batches in read_batches(inputs, batching):
            write(start, step(start, *batches))


def run_through(
    decoder: Decoder, groups: Sequence[tuple[Blocks, Calls, Batching]], finished: Callable[[], object]
) -> None:
    """Run blocks through all layers in place; each layer's weights are read once for all groups.

    `finished` is called after each layer.
    """
    for index in range(len(decoder.layers)):
        with decoder.layer(index) as layer:
            for states, calls, batching in groups:
                stream(layer_step(layer, calls, index), [states], [states], batching)
        finished()


def run_in_turn(
    streams: Sequence[tuple[Decoder, StatesInMemory, Calls, Batching]], index: int, finished: Callable[[], object]
) -> None:
    """Run one layer of several models, each on its own blocks in place; `finished` is called after each.

    Models that are made of the same weights then read them from the disk once.
    """
    for decoder, states, calls, batching in streams:
        with decoder.layer(index) as layer:
            stream(layer_step(layer, calls, index), [states], [states], batching)
        finished()


def layer_step(layer: nn.Module, calls: Calls, index: int) -> Step:
    """Return the step that runs one layer."""
    return lambda _start, batch: [run_layer(layer, batch, calls[len(batch)][index])]


def read_batches(inputs: Sequence[Readable], batching: Batching) -> Iterator[tuple[int, list[torch.Tensor]]]:
    """Yield the index of each batch's first block, and the batch `[B, T, d]` of each input.

    In the background a thread prefetches the next batches and pins them, unless they are on a device already.
    """
    starts = range(0, batching.blocks, batching.size)

    def read(start: int) -> list[torch.Tensor]:
        count = min(batching.size, batching.blocks - start)
        batches = [each.read(start, count) for each in inputs]
        return [pinned(batch) for batch in batches] if batching.in_background else batches

    if not batching.in_background:
        yield from ((start, read(start)) for start in starts)
        return
    with ThreadPoolExecutor(1) as thread:
        coming = deque(thread.submit(read, start) for start in starts[:1])
        for start in starts:
            batches = coming.popleft().result()
            if start + batching.size < batching.blocks:
                coming.append(thread.submit(read, start + batching.size))
            yield start, batches


def pinned(batch: torch.Tensor) -> torch.Tensor:
    """Return a batch in pinned memory, from which a GPU copies without waiting; a batch on a device stays there."""
    return batch.pin_memory() if batch.device.type == "cpu" and torch.cuda.is_available() else batch


@contextmanager
def writer(
    outputs: Sequence[Blocks], *, in_background: bool
) -> Iterator[Callable[[int, Sequence[torch.Tensor]], None]]:
    """Yield a function that writes a batch to each output; in the background in a thread, one batch behind."""

    def write(start: int, batches: Sequence[torch.Tensor]) -> None:
        for output, batch in zip(outputs, batches, strict=True):
            output.write(start, batch)

    if not in_background:
        yield write
        return
    pending: list[Future[None]] = []
    with ThreadPoolExecutor(1) as thread:

        def write_behind(start: int, batches: Sequence[torch.Tensor]) -> None:
            if pending:
                pending.pop().result()
            pending.append(thread.submit(write, start, batches))

        yield write_behind
        if pending:
            pending.pop().result()


def embed_all(decoder: Decoder, blocks: torch.Tensor, batch_size: int, target: Blocks | None) -> Calls:
    """Write the first layer's input to `target`; return each layer's arguments by batch size.

    A resumed sweep has its hidden states and needs only the arguments.
    """
    arguments: Calls = {}
    table = decoder.embedding_table() if len(blocks) else torch.empty(0)
    for start in range(0, len(blocks), batch_size):
        batch = blocks[start : start + batch_size]
        if target is not None or len(batch) not in arguments:
            hidden, arguments[len(batch)] = decoder.embed(batch, table)
            if target is not None:
                target.write(start, hidden)
    return arguments


def embed_in_memory(
    decoder: Decoder, blocks: torch.Tensor, batch_size: int, device: torch.device
) -> tuple[StatesInMemory, Calls, Batching]:
    """Return the first layer's input of blocks `[N, T]`, held on a device, and each layer's arguments."""
    states = StatesInMemory((*blocks.shape, decoder.shape.hidden_size), decoder.machine.dtype, device)
    calls = embed_all(decoder, blocks, batch_size, states)
    return states, calls, Batching(len(blocks), batch_size, decoder.machine.copies)
