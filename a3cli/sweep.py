"""Token blocks → activations of one decoder layer after another: weights in, forward, weights out.

The model is built on meta and never has to fit: each layer's weights are read once per calibration. The
model's own `forward` says what each layer is called with (masks, position embeddings), so no family's
`forward` is written down here. Hidden states live in two files of the work folder, read from one and
written to the other, so memory holds one layer and one batch, and a killed sweep goes on at its layer.
"""

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from torch import nn
from torch.func import functional_call

from a3cli.checkpoint import check_finite, tensor_bytes
from a3cli.errors import A3Error
from a3cli.families import Family, Role
from a3cli.machine import Machine
from a3cli.model import Model
from a3cli.moments import LayerMoments, Tensors
from a3cli.work import writing

Arguments = dict[str, Any]


class Progress(Protocol):
    """Told after each batch how far a sweep is, in tokens through layers."""

    def __call__(self, *, layer: int, layers: int, tokens: int, total_tokens: int) -> None: ...


@dataclass(frozen=True)
class HiddenStates:
    """Blocks of hidden states `[N, T, d]` in a raw file; batches are read and written in place."""

    path: Path
    shape: tuple[int, int, int]
    dtype: torch.dtype

    @property
    def block_bytes(self) -> int:
        return self.shape[1] * self.shape[2] * self.dtype.itemsize

    @property
    def bytes(self) -> int:
        return self.shape[0] * self.block_bytes

    def create(self) -> None:
        with writing(self.path), self.path.open("wb") as file:
            file.truncate(self.bytes)

    def read(self, start: int, count: int) -> torch.Tensor:
        """Blocks `[count, T, d]` on the CPU. Raises A3Error if the file is shorter than it must be."""
        buffer = bytearray(count * self.block_bytes)
        with self.path.open("rb") as file:
            file.seek(start * self.block_bytes)
            if file.readinto(buffer) != len(buffer):
                raise A3Error(f"{self.path} is truncated; start the calibration again with --overwrite")
        return torch.frombuffer(buffer, dtype=self.dtype).view(count, *self.shape[1:])

    def sync(self) -> None:
        """Onto the disk, so that a power failure cannot leave a layer that looks done without its output."""
        with writing(self.path), self.path.open("rb") as file:
            os.fsync(file.fileno())

    def write(self, start: int, blocks: torch.Tensor) -> None:
        with writing(self.path), self.path.open("r+b") as file:
            file.seek(start * self.block_bytes)
            file.write(tensor_bytes(blocks))


class StopForward(Exception):
    """Ends a forward once what is wanted has been seen."""


class _Recorder(nn.Module):
    """Stands in for a decoder layer: records its call and returns the hidden states unchanged.

    The layer's own attributes (an attention type, say) stay readable, since some families' models look at
    them before they call it.
    """

    def __init__(self, layer: nn.Module, *, last: bool) -> None:
        super().__init__()
        self._replaced = [layer]  # in a list: not a submodule
        self._last = last
        self.hidden: torch.Tensor | None = None
        self.arguments: Arguments = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_replaced"][0], name)

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        names = list(inspect.signature(self._replaced[0].forward).parameters)[1:]
        self.hidden = hidden
        self.arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        if self._last:
            raise StopForward
        return hidden


class Decoder:
    """A model on meta whose layers are filled, run and emptied one at a time."""

    def __init__(self, model: Model, machine: Machine, *, config: Any = None) -> None:
        self.source, self.family, self.shape, self.machine = model.source, model.family, model.shape, machine
        with init_empty_weights(include_buffers=False):
            self.model = self.build(config or model.config, machine.dtype).eval()
        layers = self.model.get_submodule(self.family.layers)
        assert isinstance(layers, nn.ModuleList)
        self.layers = layers
        self.base = self.model.get_submodule(self.family.decoder)
        for name, _ in self.model.named_buffers():  # rotary tables and the like
            set_module_tensor_to_device(self.model, name, machine.device)

    def build(self, config: Any, dtype: torch.dtype) -> nn.Module:
        from transformers import AutoModelForCausalLM

        network: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
        return network

    def load(self, prefix: str, module: nn.Module) -> None:
        """Fill a meta module with the checkpoint's tensors. Raises A3Error for missing, misshaped or NaN ones."""
        for name, parameter in module.named_parameters():
            value = self.read(prefix + name, parameter.shape)
            set_module_tensor_to_device(module, name, self.machine.device, value=value, dtype=self.machine.dtype)

    def read(self, tensor: str, shape: torch.Size) -> torch.Tensor:
        """A weight in its stored dtype, mapped. Raises A3Error if it is missing, misshaped or has a NaN."""
        value = self.source.read(tensor)
        if value.shape != shape:
            raise A3Error(f"{self.source.name}: tensor {tensor} is {list(value.shape)}, config.json says {list(shape)}")
        check_finite(value, tensor, self.source.name)
        return value

    def embedding_table(self) -> torch.Tensor:
        """The whole vocabulary's rows `[V, d]`, mapped: in the compute dtype they could outweigh all else."""
        module = self.model.get_submodule(self.family.embedding)
        assert isinstance(module, nn.Embedding)
        return self.read(self.family.embedding + ".weight", module.weight.shape)

    def look_up(self, blocks: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """Embeddings `[B, T, d]` of blocks `[B, T]` by the model's own module, given only the rows it needs."""
        module = self.model.get_submodule(self.family.embedding)
        assert isinstance(module, nn.Embedding)
        module.padding_idx = None  # a row of the whole table; only gradients heed it
        tokens, rows = blocks.unique(return_inverse=True)
        weight = table[tokens].to(self.machine.device, self.machine.dtype)
        embeddings: torch.Tensor = functional_call(module, {"weight": weight}, rows.to(self.machine.device))
        return embeddings

    def embed(self, blocks: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, list[Arguments]]:
        """The first layer's input `[B, T, d]` for token blocks `[B, T]`, and each layer's arguments."""
        recorders = [_Recorder(layer, last=layer is self.layers[-1]) for layer in self.layers]
        originals = list(self.layers)
        try:
            for i, recorder in enumerate(recorders):
                self.layers[i] = recorder
            self.base(inputs_embeds=self.look_up(blocks, table), use_cache=False)
        except StopForward:
            pass
        finally:
            for i, layer in enumerate(originals):
                self.layers[i] = layer
        assert recorders[0].hidden is not None
        return recorders[0].hidden, [recorder.arguments for recorder in recorders]

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Hold one layer's weights."""
        module = self.layers[index]
        self.load(self.source_prefix(index), module)
        try:
            yield module
        finally:
            module.to("meta")

    def source_prefix(self, index: int) -> str:
        """What the checkpoint's names of this layer's tensors begin with."""
        return self.family.layer_prefix(index)

    @contextmanager
    def head(self) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        """Hold what comes after the layers; yields hidden states `[B, T, d]` → logits `[B, T, V]`."""
        embedding = self.family.embedding + ".weight"
        every = [name for name, _ in self.model.named_parameters(remove_duplicate=False)]
        names = [name for name in every if name != embedding and not name.startswith(self.family.layers + ".")]
        for name in names:
            stored = name if name in self.source.tensors else embedding  # tied
            value = self.read(stored, self.model.get_parameter(name).shape)
            set_module_tensor_to_device(self.model, name, self.machine.device, value=value, dtype=self.machine.dtype)
        parent, _, attribute = self.family.layers.rpartition(".")
        setattr(self.model.get_submodule(parent), attribute, nn.ModuleList())
        try:
            yield lambda hidden: self.model(inputs_embeds=hidden.to(self.machine.device), use_cache=False).logits
        finally:
            setattr(self.model.get_submodule(parent), attribute, self.layers)
            for name in names:
                set_module_tensor_to_device(self.model, name, "meta")


@contextmanager
def moments_of(layer: nn.Module, family: Family, moments: LayerMoments) -> Iterator[None]:
    """Hook the roles of one layer so that every forward adds to its moments."""

    seen: Tensors = {}
    called_with: Arguments = {}

    def begin(_module: nn.Module, _args: Any, kwargs: Arguments) -> None:
        called_with.update(kwargs)

    def outputs(name: str) -> Callable[..., None]:
        def add(_module: nn.Module, _args: Any, output: torch.Tensor) -> None:
            seen[name] = output
            moments.add_heads(name, output)

        return add

    def attended(_module: nn.Module, args: tuple[torch.Tensor]) -> None:
        moments.add_attention_output(args[0])
        if (rotation := called_with.get("position_embeddings")) is not None:
            moments.add_distances(seen["q"], seen["k"], rotation, called_with.get("attention_mask"))
        seen.clear()  # before the MLP, which needs the room

    def finish(_module: nn.Module, _args: Any, output: Any) -> None:
        moments.add_residual("mlp_residual", hidden_states_of(output))

    def inputs(add: Callable[[torch.Tensor], None]) -> Callable[..., None]:
        return lambda module, args: add(args[0])

    def submodule(role: Role) -> nn.Module:
        return layer.get_submodule(family.modules[role])

    handles = [
        layer.register_forward_pre_hook(begin, with_kwargs=True),
        submodule("q").register_forward_hook(outputs("q")),
        submodule("k").register_forward_hook(outputs("k")),
        submodule("v").register_forward_hook(outputs("v")),
        submodule("o").register_forward_pre_hook(attended),
        submodule("down").register_forward_pre_hook(inputs(moments.add_mlp)),
        # What the MLP's norm reads is the stream with attention's output added; the layer returns the MLP's too.
        submodule("mlp_norm").register_forward_pre_hook(
            inputs(lambda x: moments.add_residual("attention_residual", x))
        ),
        layer.register_forward_hook(finish),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def hidden_states_of(output: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    """A layer's output `[B, T, d]`; some families return it in a tuple."""
    return output[0] if isinstance(output, tuple) else output


@torch.inference_mode()
def sweep(
    decoder: Decoder,
    blocks: torch.Tensor,
    *,
    files: Callable[[int], Path],
    first_layer: int,
    batch_size: int,
    full_mlp: bool,
    finished: Callable[[int, Tensors], None],
    progress: Progress,
) -> None:
    """Run all layers from `first_layer` on over `blocks` `[N, T]`, handing each layer's sums to `finished`.

    `files(i)` is the hidden-state file with the input of layer i; it is intact until `finished(i)` returned,
    so a sweep that died in layer i starts again with `first_layer=i`. Raises A3Error for non-finite
    activations and for damaged weights or files.
    """
    starts = range(0, len(blocks), batch_size)
    arguments = embed_all(decoder, blocks, starts, batch_size, _hidden_states(decoder, blocks, files(0)), first_layer)
    for index in range(first_layer, decoder.shape.layers):
        source = _hidden_states(decoder, blocks, files(index))
        target = _hidden_states(decoder, blocks, files(index + 1))
        target.create()
        moments = LayerMoments(decoder.shape.head_dim, full_mlp, decoder.machine.device)
        with decoder.layer(index) as layer, moments_of(layer, decoder.family, moments):
            for start in starts:
                count = min(batch_size, len(blocks) - start)
                target.write(start, run_layer(layer, source.read(start, count), arguments[count][index], decoder))
                done = (start + count) * blocks.shape[1]
                progress(layer=index, layers=decoder.shape.layers, tokens=done, total_tokens=blocks.numel())
        target.sync()
        finished(index, _finite(moments.finished(), index))  # bound to no name: gone before the next layer comes


def run_layer(layer: nn.Module, batch: torch.Tensor, arguments: Arguments, decoder: Decoder) -> torch.Tensor:
    return hidden_states_of(layer(batch.to(decoder.machine.device), **arguments))


def _hidden_states(decoder: Decoder, blocks: torch.Tensor, path: Path) -> HiddenStates:
    return HiddenStates(path, (*blocks.shape, decoder.shape.hidden_size), decoder.machine.dtype)


def embed_all(
    decoder: Decoder, blocks: torch.Tensor, starts: range, batch_size: int, target: HiddenStates, first_layer: int
) -> dict[int, list[Arguments]]:
    """Write the first layer's input; returns each layer's arguments by batch size.

    A resumed sweep has its hidden states already and only needs the arguments.
    """
    arguments: dict[int, list[Arguments]] = {}
    if first_layer == 0:
        target.create()
    table = decoder.embedding_table()
    for start in starts:
        batch = blocks[start : start + batch_size]
        if first_layer == 0 or len(batch) not in arguments:
            hidden, arguments[len(batch)] = decoder.embed(batch, table)
            if first_layer == 0:
                target.write(start, hidden)
    return arguments


def _finite(sums: Tensors, layer: int) -> Tensors:
    """The sums themselves. Raises A3Error if one has a NaN or Inf."""
    for name, value in sorted(sums.items()):
        if not torch.isfinite(value).all():
            raise A3Error(
                f"layer {layer}: statistics {name} have NaN or Inf values; compute in a wider type (--dtype float32)"
            )
    return sums
