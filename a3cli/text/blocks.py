"""Cut the tokens of a text into blocks `[N, T]`.

docs/text.md describes how: rows are joined by a blank line and tokenised as one stream, the stream is read until it
holds `POOL` times the tokens asked for (or ends), and N blocks that do not overlap are placed in it at seeded random
offsets, uniformly among all such placements. Of a folder that has more, each file gives a part of these tokens.
"""

import itertools
import logging
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from a3cli.errors import A3Error
from a3cli.settings import TextSettings
from a3cli.text.documents import TextRead
from a3cli.text.pool import read_pool
from a3cli.text.stream import token_stream
from a3cli.work.files import Json

log = logging.getLogger(__name__)

POOL = 8
CONTEXT = "max_position_embeddings"  # the entry of config.json


def log_skipped(settings: TextSettings, read: TextRead) -> None:
    if read.skipping:
        log.info("dataset %s: %s", settings.dataset, read.skipping)


class Sampled(NamedTuple):
    """Blocks `[N, T]` int64 to calibrate on, and blocks `[M, T]` of the text between them; M is 0 if there is none."""

    blocks: torch.Tensor
    held_out: torch.Tensor


def sample_blocks(
    tokenizer: Any, settings: TextSettings, read: TextRead | None = None, *, held_out: int = 0
) -> Sampled:
    """Return `samples` blocks for calibration, and others of `held_out` tokens or more; `read` records their source.

    Raises A3Error if there is too little text.
    """
    assert settings.samples is not None
    read = read or TextRead()
    length = settings.block_tokens
    wanted = settings.samples * length
    stream = torch.tensor(read_pool(tokenizer, settings, POOL * wanted, read), dtype=torch.int64)
    slack = len(stream) - wanted
    if slack < 0:
        raise A3Error(
            f"dataset {settings.dataset}: too little text, {len(stream)} tokens give {len(stream) // length} "
            f"blocks of {length}, {settings.samples} were asked for; lower --samples or --seq-len"
            + (f" ({read.skipping})" if read.skipping else "")
        )
    log_skipped(settings, read)
    # Sorted draws from [0, slack], one per block, plus the length of the blocks before it: every placement of N
    # non-overlapping blocks is possible.
    generator = torch.Generator().manual_seed(settings.seed)
    offsets = torch.randint(slack + 1, (settings.samples,), generator=generator).sort().values
    starts = (offsets + length * torch.arange(settings.samples)).tolist()
    others = places_between(starts, length, len(stream), most=-(-held_out // length))
    return Sampled(cut(stream, starts, length), cut(stream, others, length))


def places_between(starts: list[int], length: int, end: int, *, most: int) -> list[int]:
    """Return at most `most` places of blocks in the text between others, evenly spread over all such places."""
    gaps = zip([0, *(start + length for start in starts)], [*starts, end], strict=True)
    places = [place for first, last in gaps for place in range(first, last - length + 1, length)]
    count = min(most, len(places))
    return [places[index * len(places) // count] for index in range(count)]


def cut(stream: torch.Tensor, starts: list[int], length: int) -> torch.Tensor:
    """Return the blocks `[N, T]` that begin at these places."""
    return torch.stack([stream[start : start + length] for start in starts]) if starts else stream.new_empty(0, length)


def evaluation_blocks(tokenizer: Any, settings: TextSettings, read: TextRead | None = None) -> list[torch.Tensor]:
    """Return the stream as consecutive blocks of `seq_len`, the last one shorter; `samples` limits their number.

    Every token is in exactly one block; `read` records their source. Raises A3Error if there are fewer than two
    tokens.
    """
    read = read or TextRead()
    stream = token_stream(tokenizer, settings, purpose="evaluate", read=read)
    limit = None if settings.samples is None else settings.samples * settings.block_tokens
    tokens = torch.tensor(list(itertools.islice(stream, limit)))
    if len(tokens) < 2:
        raise A3Error(f"dataset {settings.dataset}: too little text, {len(tokens)} tokens; two are needed")
    log_skipped(settings, read)
    return list(tokens.split(settings.block_tokens))


def check_fit(blocks: Iterable[torch.Tensor], config: Json, model: str) -> None:
    """Check that blocks fit the model's context and have only tokens with an embedding. Raises A3Error."""
    context, vocabulary = config.get(CONTEXT), config.get("vocab_size")
    for block in blocks:
        if isinstance(context, int) and len(block) > context:
            raise A3Error(f"--seq-len {len(block)} is longer than the context of {model} ({context}); lower it")
        if isinstance(vocabulary, int) and int(block.max()) >= vocabulary:
            raise A3Error(
                f"the tokenizer of {model} gives token {int(block.max())}, its vocabulary has {vocabulary}; "
                "use the tokenizer files of this model"
            )
