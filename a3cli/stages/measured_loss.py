"""Measure a solution right after solving, on text that its calibration held out: what it costs, in short.

The figures are those of `a3 eval`. Source and smaller model run layer by layer, each with one layer in memory at a
time, and their logits are computed a few tokens at a time. If the calibration used all of its text, it is measured on
some of that, where it loses less than elsewhere.
"""

import logging
import math
from collections.abc import Iterator, Sequence

import torch

from a3cli.errors import A3Error
from a3cli.models import costs
from a3cli.stages.context import AGAIN, Run
from a3cli.stages.evaluate import describe_sums, sum_tokens
from a3cli.stream.batches import embed_in_memory, run_in_turn
from a3cli.stream.decoder import Decoder
from a3cli.stream.hidden import StatesInMemory
from a3cli.stream.smaller import Cut, SmallerDecoder
from a3cli.work.files import Json, read_tensors
from a3cli.work.progress import reporting

log = logging.getLogger(__name__)


@torch.inference_mode()
def measure_loss(run: Run, cuts: Sequence[Cut]) -> Json | None:
    """Return perplexity before and after, KL and top-1 agreement; None, with a warning, if logits are not finite."""
    kept = read_tensors(run.work.tokens, "run a3 calibrate --overwrite")
    blocks = choose_blocks(kept.get("held_out", kept["tokens"]))
    source = Decoder(run.model, run.machine)
    decoders = (source, SmallerDecoder(run.model, run.machine, cuts))
    batch = costs.cpu_batch(blocks.shape[1])
    streams = [(each, *embed_in_memory(each, blocks, batch, run.machine.device)) for each in decoders]
    with reporting(run.progress, "measuring the solution", len(decoders) * run.layers, "layers") as finished:
        for index in range(run.layers):
            run.stop.before(f"measuring layer {index + 1} of {run.layers}", AGAIN)
            run_in_turn(streams, index, finished)
    try:
        sums = compare_logits(source, blocks, [states for _, states, _, _ in streams], run.model.source.name)
        return {"held_out": "held_out" in kept, **describe(sums)}
    except A3Error as error:
        log.warning("the solution was not measured: %s", error)
        return None


def choose_blocks(blocks: torch.Tensor) -> torch.Tensor:
    """Return evenly spread ones of the blocks `[N, T]`, of `MEASURED_TOKENS` in all; a longer block is cut."""
    count = min(len(blocks), max(1, costs.MEASURED_TOKENS // blocks.shape[1]))
    return blocks[[index * len(blocks) // count for index in range(count)], : costs.MEASURED_TOKENS]


def compare_logits(source: Decoder, blocks: torch.Tensor, states: Sequence[StatesInMemory], name: str) -> torch.Tensor:
    """Return the sums of `evaluate.sum_blocks` over all blocks; norm and head are the same in both models."""
    rows = []
    with source.head() as head:
        for chosen, places in pieces(*blocks.shape):
            of_source, of_smaller = (
                head(each.read(chosen.start, len(chosen))[:, places.start : places.stop]) for each in states
            )
            predicted = blocks[chosen.start : chosen.stop, places.start : places.stop + 1]
            for tokens, source_logits, logits in zip(predicted, of_source, of_smaller, strict=True):
                rows.append(sum_tokens(tokens, logits, name, source_logits, name))
    return torch.tensor(rows, dtype=torch.float64)


def pieces(blocks: int, length: int) -> Iterator[tuple[range, range]]:
    """Yield blocks, and places in them whose next token is predicted, of at most `HEAD_TOKENS` tokens together."""
    together = max(1, costs.HEAD_TOKENS // length)
    for first in range(0, blocks, together):
        for start in range(0, length - 1, costs.HEAD_TOKENS):
            yield range(first, min(first + together, blocks)), range(start, min(start + costs.HEAD_TOKENS, length - 1))


def describe(sums: torch.Tensor) -> Json:
    """Return the figures with four significant digits: more would be noise. Raises A3Error for an infinite one."""
    figures = describe_sums(sums)
    if not all(map(math.isfinite, figures.values())):
        raise A3Error("its perplexity is infinite; use a smaller budget, or compute in a wider type (--dtype float32)")
    short = {key: float(f"{value:.4g}") for key, value in figures.items()}
    return {
        "tokens": figures["predicted_tokens"],
        "perplexity": {"before": short["source_perplexity"], "after": short["perplexity"]},
        "kl": max(0.0, short["kl"]),
        "top1_agreement": short["top1_agreement"],
    }
