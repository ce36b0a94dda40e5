"""The sequential correction: refit the one-shot layers of a draft in a second sweep over the calibration's blocks."""

import logging
import shutil
from collections.abc import Callable, Iterable
from functools import partial

from a3cli.methods import Slots
from a3cli.models import correction_costs
from a3cli.models.families import LayerSizes
from a3cli.stages.context import AGAIN, Run
from a3cli.stream.decoder import Decoder
from a3cli.stream.sequential import refit_sequentially
from a3cli.stream.smaller import Cut, SmallerDecoder
from a3cli.work.draft import Draft
from a3cli.work.files import Json, bytes_on_disk, check_space, hash_file, read_tensors, write_tensors, writing
from a3cli.work.folder import layer_file

log = logging.getLogger(__name__)

REMOVE = "remove it and rerun the same command, which computes it again"
STREAMS = "streams"  # folder of the hidden states, in the draft


def correct(run: Run, draft: Draft, sizes: list[LayerSizes], slots: list[Slots]) -> list[str]:
    """Refit the one-shot layers of a draft, write the refit layers, and return the hashes of their files."""
    layers = range(run.layers)
    corrected = [known for layer in layers if (known := draft.finished_info(layer_file(layer)))]
    if len(corrected) < len(layers):
        refit_layers(run, draft, cuts_of(draft, sizes, slots, one_shot_file))
        corrected = [write_corrected(draft, layer) for layer in layers]
    return [each["hash"] for each in corrected]


def cuts_of(draft: Draft, sizes: list[LayerSizes], slots: list[Slots], file: Callable[[int], str]) -> list[Cut]:
    """Return the layers of the smaller model, whose projections are in these files of the draft."""
    return [
        Cut(layer, size, own.pairs, partial(read_tensors, draft.folder / file(layer), REMOVE))
        for layer, (size, own) in enumerate(zip(sizes, slots, strict=True))
    ]


def drop_steps(draft: Draft, layers: Iterable[int]) -> None:
    """Remove the inputs of the corrected layers. Call this last: a resumed command needs them."""
    shutil.rmtree(draft.folder / STREAMS, ignore_errors=True)
    for layer in layers:
        for name in (one_shot_file, refit_file):
            (draft.folder / name(layer)).unlink(missing_ok=True)


def write_corrected(draft: Draft, layer: int) -> Json:
    one_shot, refit = (read_tensors(draft.folder / name(layer), REMOVE) for name in (one_shot_file, refit_file))
    write_tensors(draft.folder / layer_file(layer), one_shot | refit)
    return draft.finish(layer_file(layer))


def refit_layers(run: Run, draft: Draft, cuts: list[Cut]) -> None:
    """Run the second sweep, from the first unfinished layer on."""
    model, machine, settings = run.model, run.machine, run.settings
    blocks = read_tensors(run.work.tokens, "run a3 calibrate --overwrite")["tokens"]
    streams = draft.folder / STREAMS
    with writing(streams):
        streams.mkdir(exist_ok=True)
    samples, seq_len = blocks.shape
    needed = correction_costs.stream_bytes(model.shape, samples, seq_len, machine.dtype.itemsize)
    check_space(streams, needed - bytes_on_disk(streams.iterdir()), "the sequential correction")
    first = count_refits(draft, run.layers)
    run.stop.step = correcting(first, run.layers)
    if 0 < first < run.layers:
        log.info("resuming at layer %d of %d", first + 1, run.layers)
    swept = refit_sequentially(
        Decoder(model, machine),
        SmallerDecoder(model, machine, cuts),
        blocks[:: correction_costs.corrected_every(model.shape, samples, seq_len)],
        folder=streams,
        batch_size=settings.batch_size,
        rounds=settings.refit_rounds,
        fitted_every=correction_costs.fitted_every(model.shape, samples, seq_len),
        first=first,
        progress=run.progress,
    )
    for layer, refit, following in swept:
        write_tensors(draft.folder / refit_file(layer), refit)
        draft.finish(refit_file(layer), following={file.name: hash_file(file) for file in following})
        if layer + 1 < len(cuts):
            run.stop.before(correcting(layer + 1, len(cuts)), AGAIN)


def correcting(layer: int, layers: int) -> str:
    return f"correcting layer {layer + 1} of {layers}"


def count_refits(draft: Draft, layers: int) -> int:
    """Return how many layers an earlier sweep has corrected; 0 if the next layer's inputs are damaged."""
    done, last = 0, None
    while done < layers and (found := draft.finished_info(refit_file(done))):
        done, last = done + 1, found
    for name, expected in (last or {}).get("following", {}).items():
        file = draft.folder / STREAMS / name
        if done < layers and not (file.is_file() and hash_file(file) == expected):
            log.warning("%s has changed since it was written; the sequential correction starts again", file)
            return 0
    return done


def one_shot_file(layer: int) -> str:
    return f"one-shot-{layer:03d}.safetensors"


def refit_file(layer: int) -> str:
    return f"refit-{layer:03d}.safetensors"
