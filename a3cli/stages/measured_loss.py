"""Measure a solution right after solving, on text that its calibration held out: what it costs, in short.

The figures are those of `a3 eval`. Source and smaller model run layer by layer, each with one layer in memory at a
time, and their logits are computed a few tokens at a time. What the source's layers give is kept for later solutions.
If the calibration used all of its text, it is measured on some of that, where it loses less than elsewhere.
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
from a3cli.stream.smaller import Cut, SmallerDecoder
from a3cli.work.files import Json, read_tensors
from a3cli.work.kept import Kept
from a3cli.work.progress import reporting
from a3cli.work.sealed import versions

log = logging.getLogger(__name__)

SUMMED_TOKENS = 16  # whose logits are compared at once


@torch.inference_mode()
def measure_loss(run: Run, cuts: Sequence[Cut]) -> Json | None:
    """Return perplexity before and after, KL and top-1 agreement; None, with a warning, if logits are not finite."""
    tokens = read_tensors(run.work.tokens, "run a3 calibrate --overwrite")
    blocks = choose_blocks(tokens.get("held_out", tokens["tokens"]))
    source, smaller = Decoder(run.model, run.machine), SmallerDecoder(run.model, run.machine, cuts)
    states = run_layers(run, source, smaller, blocks)
    try:
        sums = compare_logits(run, source, blocks, states)
        return {"held_out": "held_out" in tokens, **describe(sums)}
    except A3Error as error:
        log.warning("the solution was not measured: %s", error)
        return None


def run_layers(run: Run, source: Decoder, smaller: Decoder, blocks: torch.Tensor) -> list[torch.Tensor]:
    """Return what the layers of source and smaller model make of these blocks, `[N, T, d]` each.

    Those of the source are the same for all solutions, and are kept for them in the work folder.
    """
    kept = Kept(run.work.kept, "source", {"calibration": run.calibration.sha256, "versions": versions()})
    made_from = {"result": "hidden states", "blocks": [*blocks.shape], **run.machine.describe()}
    known = kept.find_tensors(made_from)
    decoders = [smaller] if known else [smaller, source]  # in turn, so that weights are read from the disk once
    batch = costs.cpu_batch(blocks.shape[1])
    streams = [(each, *embed_in_memory(each, blocks, batch, run.machine.device)) for each in decoders]
    with reporting(run.progress, "measuring the solution", len(decoders) * run.layers, "layers") as finished:
        for index in range(run.layers):
            run.stop.before(f"measuring layer {index + 1} of {run.layers}", AGAIN)
            run_in_turn(streams, index, finished)
    found = [states.values for _, states, _, _ in streams]
    if known:
        return [known[0]["states"].to(run.machine.device), *found]
    kept.keep_tensors(made_from, {"states": found[1].cpu()}, {})
    return found[::-1]


def choose_blocks(blocks: torch.Tensor) -> torch.Tensor:
    """Return evenly spread ones of the blocks `[N, T]`, of `MEASURED_TOKENS` in all; a longer block is cut."""
    count = min(len(blocks), max(1, costs.MEASURED_TOKENS // blocks.shape[1]))
    return blocks[[index * len(blocks) // count for index in range(count)], : costs.MEASURED_TOKENS]


def compare_logits(run: Run, source: Decoder, blocks: torch.Tensor, states: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the sums of `evaluate.sum_blocks` over all blocks; norm and head are the same in both models."""
    rows, name, predictions = [], run.model.source.name, len(blocks) * (blocks.shape[1] - 1)
    with source.head() as head, reporting(run.progress, "comparing logits", predictions, "tokens") as finished:
        for chosen, places in pieces(*blocks.shape):
            of_source, of_smaller = (
                head(each[chosen.start : chosen.stop, places.start : places.stop]) for each in states
            )
            predicted = blocks[chosen.start : chosen.stop, places.start : places.stop + 1]
            for tokens, source_logits, logits in zip(predicted, of_source, of_smaller, strict=True):
                for few in range(0, len(logits), SUMMED_TOKENS):  # their logits stay in the cache
                    own = slice(few, few + SUMMED_TOKENS)
                    of_both = tokens[few : few + SUMMED_TOKENS + 1], logits[own], name, source_logits[own], name
                    rows.append(sum_tokens(*of_both))
                finished(len(logits))
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
