"""The logits of a checkpoint: from the whole model in memory or, where it does not fit, layer by layer."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from a3cli.errors import A3Error
from a3cli.models.checkpoint import Checkpoint
from a3cli.models.config import read_shape
from a3cli.models.families import Family, ModelShape, family_for, family_of, usual_entries
from a3cli.models.families.wrappers import wrapper_of
from a3cli.models.model import describe
from a3cli.settings import EvalSettings
from a3cli.stream.batches import embed_in_memory, run_through
from a3cli.stream.decoder import Decoder
from a3cli.work.machine import Machine, free_memory
from a3cli.work.progress import Progress, reporting

log = logging.getLogger(__name__)


class HowToLoad(Protocol):
    """The settings that decide how a model is loaded."""

    @property
    def device(self) -> str: ...

    @property
    def trust_remote_code(self) -> bool: ...


class Answers(Protocol):
    """Whatever gives logits."""

    name: str
    vocabulary: int

    def logits(self, blocks: Sequence[torch.Tensor], batch_size: int) -> Iterator[torch.Tensor]:
        """Yield the logits `[B, T, V]` of each of the `batches` of these blocks."""


def batches(blocks: Sequence[torch.Tensor], size: int) -> Iterator[torch.Tensor]:
    """Yield batches `[B, T]` of consecutive blocks of the same length."""
    full = [block for block in blocks if len(block) == len(blocks[0])]
    for start in range(0, len(full), size):
        yield torch.stack(full[start : start + size])
    for block in blocks[len(full) :]:
        if len(block) > 1:  # a single token predicts nothing
            yield block[None]


def open_models(
    checkpoints: Sequence[Checkpoint], machine: Machine, settings: EvalSettings, progress: Progress
) -> list[Answers]:
    """Open each checkpoint: in memory if it fits beside those before it, otherwise streamed.

    Raises A3Error for a model that does not load completely, and for tasks with a model that does not fit.
    """
    free, opened = available_memory(machine, settings), list[Answers]()
    for checkpoint in checkpoints:
        needed = checkpoint.parameters() * machine.dtype.itemsize
        if needed <= free or not can_stream(checkpoint):
            free -= needed
            with reporting(progress, f"loading {short_name(checkpoint.name)}"):
                model = load_model(checkpoint, machine, settings)
            opened.append(LoadedModel(model, checkpoint.name, machine.device))
            continue
        figures = f"{checkpoint.name} needs {needed / 1e9:.2f} GB, {max(0, free) / 1e9:.2f} GB are free"
        if settings.tasks:
            raise A3Error(f"--tasks needs the whole model in memory, and {figures}; free some, or leave out --tasks")
        log.info("%s: it is evaluated layer by layer", figures)
        opened.append(StreamedModel(checkpoint, machine, settings, progress))
    return opened


def short_name(name: str) -> str:
    """Return a model's or a data set's name without the folders or the owner before it."""
    return Path(name).name


def available_memory(machine: Machine, settings: HowToLoad) -> int:
    """Return the bytes for weights; on GPUs that were not named, transformers also uses the CPU's memory."""
    free = free_memory(machine.device)
    if machine.device.type == "cuda" and settings.device == "auto":
        free += free_memory(torch.device("cpu"))
    return free


def can_stream(checkpoint: Checkpoint) -> bool:
    """Return whether a3 knows the layers of this model type."""
    try:
        family_for(checkpoint.raw_config)
    except A3Error:
        return False
    return True


class LoadedModel:
    """A model of transformers in memory."""

    def __init__(self, model: Any, name: str, device: torch.device) -> None:
        self.model, self.name, self._device = model, name, device
        self.vocabulary: int = model.config.get_text_config().vocab_size

    def logits(self, blocks: Sequence[torch.Tensor], batch_size: int) -> Iterator[torch.Tensor]:
        for batch in batches(blocks, batch_size):
            yield self.model(batch.to(self._device), use_cache=False).logits


def load_model(checkpoint: Checkpoint, machine: Machine, settings: HowToLoad) -> Any:
    """Return the model as transformers loads it. Raises A3Error if any weight is missing or does not fit."""
    import transformers

    wrapper = wrapper_of(checkpoint.raw_config)
    auto_class = getattr(transformers, wrapper.auto_class if wrapper else "AutoModelForCausalLM")
    try:
        model, info = auto_class.from_pretrained(
            checkpoint.folder,
            dtype=machine.dtype,
            device_map="auto" if machine.device.type == "cuda" and settings.device == "auto" else str(machine.device),
            use_safetensors=True,
            trust_remote_code=settings.trust_remote_code,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below; transformers' own error names no tensor
        )
    except (ValueError, RuntimeError, KeyError, OSError, ImportError) as error:
        raise A3Error(f"{checkpoint.name} does not load: {' '.join(str(error).split())[:500]}") from error
    problems = [f"{name} is missing" for name in info["missing_keys"]]
    problems += [f"{name} is {list(found)}, not {list(wanted)}" for name, found, wanted in info["mismatched_keys"]]
    if problems:
        raise A3Error(f"{checkpoint.name} does not load completely: {'; '.join(sorted(problems)[:5])}")
    return model.eval()


class StreamedModel:
    """A model of which one layer at a time is in memory, beside the hidden states of all blocks."""

    def __init__(self, checkpoint: Checkpoint, machine: Machine, settings: EvalSettings, progress: Progress) -> None:
        self.name, self._machine, self._progress = checkpoint.name, machine, progress
        if "per_layer_config" in checkpoint.config:
            self._decoder: Decoder = ExportDecoder(checkpoint, machine)
        else:
            self._decoder = Decoder(describe(checkpoint, trust_remote_code=settings.trust_remote_code), machine)
        self.vocabulary: int = checkpoint.config["vocab_size"]

    def logits(self, blocks: Sequence[torch.Tensor], batch_size: int) -> Iterator[torch.Tensor]:
        chosen = list(batches(blocks, batch_size))
        self._check_memory(sum(batch.numel() for batch in chosen))
        full = [batch for batch in chosen if batch.shape[1] == len(blocks[0])]
        groups = [
            embed_in_memory(self._decoder, each, batch_size, torch.device("cpu"))
            for each in (torch.cat(full), *chosen[len(full) :])
        ]
        layers = len(self._decoder.layers)
        with reporting(self._progress, f"running {short_name(self.name)}", layers, "layers") as finished:
            run_through(self._decoder, groups, finished)
        with self._decoder.head() as head:
            for states, _, batching in groups:
                for start in range(0, batching.blocks, batching.size):
                    yield head(states.read(start, min(batching.size, batching.blocks - start)))

    def _check_memory(self, tokens: int) -> None:
        needed = tokens * self._decoder.shape.hidden_size * self._machine.dtype.itemsize
        free = free_memory(torch.device("cpu"))
        if needed > free:
            raise A3Error(
                f"{self.name}: the hidden states of {tokens:,} tokens need {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB "
                "are free; evaluate fewer blocks (--samples)"
            )


class _Export(NamedTuple):
    """What a decoder must know of an export whose layers differ in size."""

    source: Checkpoint
    family: Family
    config: Any
    shape: ModelShape


class ExportDecoder(Decoder):
    """The decoder of a per-layer export, built by the code in its folder: the user has allowed it to run."""

    def __init__(self, checkpoint: Checkpoint, machine: Machine) -> None:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=True, local_files_only=True)
        entries = usual_entries(checkpoint.config)
        shape = read_shape(SimpleNamespace(**entries))  # transformers' object refuses sizes that differ
        super().__init__(_Export(checkpoint, family_of(config.model_type), config, shape), machine)

    def build(self, config: Any, dtype: torch.dtype) -> nn.Module:
        from transformers import AutoModelForCausalLM

        network: nn.Module = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=self.family.kernel, trust_remote_code=True
        )
        return network
