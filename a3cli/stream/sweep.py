"""Run token blocks through one decoder layer after another: load weights, forward, free weights.

The model is built on meta and never has to fit in memory: each layer's weights are read once per calibration. The
model's own `forward` determines the arguments of each layer (masks, position embeddings), so no family's
`forward` is repeated here. Memory holds one layer and one batch; between layers, hidden states are in files
of the work folder or in CPU memory (`hidden.py`). Several processes take a share of the blocks each.
"""

import gc
import inspect
import logging
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from accelerate import init_empty_weights
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from accelerate.utils import set_module_tensor_to_device
from torch import nn
from torch.func import functional_call

from a3cli.errors import A3Error, first_line
from a3cli.models.costs import MLP_TOKENS
from a3cli.models.families import Family, Role
from a3cli.models.model import Model
from a3cli.solvers.moments import LayerMoments, Tensors
from a3cli.solvers.samples import AttentionSamples
from a3cli.stream.hidden import Blocks, States
from a3cli.stream.offload import Weights
from a3cli.work.machine import Machine, out_of_memory
from a3cli.work.processes import Processes

log = logging.getLogger(__name__)

Arguments = dict[str, Any]


class Progress(Protocol):
    """Called after each batch with the progress of a sweep, in tokens through layers."""

    def __call__(self, *, layer: int, layers: int, tokens: int, total_tokens: int) -> None: ...


class StopForward(Exception):
    """Ends a forward pass early, once the needed values have been recorded."""


class _Recorder(nn.Module):
    """Replaces a decoder layer: records its call and returns the hidden states unchanged.

    The layer's attributes (for example its attention type) stay readable, since some models read them before the call.
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


class _Result(_Recorder):
    """Stands in for all layers: returns hidden states that were computed before, whatever it is given.

    Some models scale their embeddings before the first layer.
    """

    def forward(self, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        assert self.hidden is not None
        return self.hidden


class Decoder:
    """A model on meta whose layers are filled, run and emptied one at a time."""

    def __init__(self, model: Model, machine: Machine, *, config: Any = None) -> None:
        self.source, self.family, self.shape, self.machine = model.source, model.family, model.shape, machine
        self.weights = Weights(model.source, machine)
        with init_empty_weights(include_buffers=False):
            self.model = self.build(config or model.config, machine.dtype).eval()
        layers = self.model.get_submodule(self.family.layers)
        assert isinstance(layers, nn.ModuleList)
        self.layers = layers
        self.base = self.model.get_submodule(self.family.decoder)
        for name, _ in self.model.named_buffers():  # for example rotary tables
            set_module_tensor_to_device(self.model, name, machine.device)

    def build(self, config: Any, dtype: torch.dtype) -> nn.Module:
        from transformers import AutoModelForCausalLM

        network: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
        return network

    def load(self, prefix: str, module: nn.Module, device: torch.device) -> None:
        """Fill a meta module with the checkpoint's tensors. Raises A3Error for missing, misshaped or NaN ones."""
        for name, parameter in module.named_parameters():
            value = self.read(prefix + name, parameter.shape).to(device, non_blocking=True)
            # The next parameter or layer allocates freed memory again at once: the allocator may keep it.
            set_module_tensor_to_device(module, name, device, value=value, dtype=self.machine.dtype, clear_cache=False)

    def read(self, tensor: str, shape: torch.Size) -> torch.Tensor:
        """Return a weight in its stored dtype, mapped. Raises A3Error if it is missing, misshaped or has a NaN."""
        value = self.weights.read(tensor)
        if value.shape != shape:
            raise A3Error(f"{self.source.name}: tensor {tensor} is {list(value.shape)}, config.json says {list(shape)}")
        return value

    def embedding_table(self) -> torch.Tensor:
        """Return the embedding `[V, d]`, mapped: in the compute dtype it could be larger than everything else."""
        module = self.model.get_submodule(self.family.embedding)
        assert isinstance(module, nn.Embedding)
        return self.read(self.family.embedding + ".weight", module.weight.shape)

    def look_up(self, blocks: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """Return embeddings `[B, T, d]` of blocks `[B, T]` from the model's own module, with only the rows it needs."""
        module = self.model.get_submodule(self.family.embedding)
        assert isinstance(module, nn.Embedding)
        module.padding_idx = None  # an index into the whole table; it only affects gradients
        tokens, rows = blocks.unique(return_inverse=True)
        weight = table[tokens].to(self.machine.device, self.machine.dtype)
        embeddings: torch.Tensor = functional_call(module, {"weight": weight}, rows.to(self.machine.device))
        return embeddings

    def embed(self, blocks: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, list[Arguments]]:
        """Return the first layer's input `[B, T, d]` for token blocks `[B, T]`, and each layer's arguments."""
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
    def layer(self, index: int, device: torch.device | None = None) -> Iterator[nn.Module]:
        """Hold one layer's weights and prefetch the next layer's."""
        module = self.layers[index]
        try:
            self.load(self.source_prefix(index), module, device or self.machine.device)
            if index + 1 < len(self.layers):
                following = self.source_prefix(index + 1)
                self.weights.prefetch(following + name for name, _ in module.named_parameters())
            yield module
        finally:
            module.to("meta")

    def source_prefix(self, index: int) -> str:
        """Return the prefix of this layer's tensor names in the checkpoint."""
        return self.family.layer_prefix(index)

    @contextmanager
    def head(self) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        """Hold final norm and output layer; yield a function from hidden states `[B, T, d]` to logits `[B, T, V]`."""
        embedding = self.family.embedding + ".weight"
        every = [name for name, _ in self.model.named_parameters(remove_duplicate=False)]
        names = [name for name in every if name != embedding and not name.startswith(self.family.layers + ".")]
        for name in names:
            stored = name if name in self.source.tensors else embedding  # tied
            value = self.read(stored, self.model.get_parameter(name).shape)
            set_module_tensor_to_device(self.model, name, self.machine.device, value=value, dtype=self.machine.dtype)
        parent, _, attribute = self.family.layers.rpartition(".")
        result = _Result(self.layers[0], last=False)
        setattr(self.model.get_submodule(parent), attribute, nn.ModuleList([result]))

        def answer(hidden: torch.Tensor) -> torch.Tensor:
            result.hidden = hidden.to(self.machine.device)
            logits: torch.Tensor = self.model(inputs_embeds=result.hidden, use_cache=False).logits
            return logits

        try:
            yield answer
        finally:
            setattr(self.model.get_submodule(parent), attribute, self.layers)
            for name in names:
                set_module_tensor_to_device(self.model, name, "meta")

    @contextmanager
    def stage(self, layers: range) -> Iterator[list[nn.Module]]:
        """Hold consecutive layers' weights, each on the next of the devices; a batch goes from one to the next."""
        devices = self.machine.devices or (self.machine.device,)
        with ExitStack() as stack:
            modules = []
            for index, device in zip(layers, devices, strict=False):
                module = stack.enter_context(self.layer(index, device))
                if len(devices) > 1:
                    add_hook_to_module(module, AlignDevicesHook(execution_device=device))
                    stack.callback(remove_hook_from_module, module)
                modules.append(module)
            yield modules


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
            moments.add_attention(seen, rotation, called_with.get("attention_mask"))
        seen.clear()  # before the MLP, which needs the memory

    def finish(_module: nn.Module, _args: Any, output: Any) -> None:
        moments.add_residual("mlp_residual", hidden_states_of(output))

    def inputs(add: Callable[[torch.Tensor], None]) -> Callable[..., None]:
        return lambda module, args: add(args[0])

    def submodule(role: Role) -> nn.Module:
        return layer.get_submodule(family.module(role))

    handles = [
        layer.register_forward_pre_hook(begin, with_kwargs=True),
        submodule("q").register_forward_hook(outputs("q")),
        submodule("k").register_forward_hook(outputs("k")),
        submodule("v").register_forward_hook(outputs("v")),
        submodule("o").register_forward_pre_hook(attended),
        submodule("down").register_forward_pre_hook(inputs(moments.add_mlp)),
        # The MLP's norm reads the stream after attention; the layer returns the stream after the MLP.
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


@contextmanager
def mlp_in_pieces(layer: nn.Module, family: Family) -> Iterator[None]:
    """Run a layer's MLP, which treats each token separately, on a few tokens at a time.

    On a CPU the activations then stay in the cache, and the layer's largest ones take little memory.
    """
    mlp = layer.get_submodule(family.mlp)
    whole = mlp.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([whole(piece) for piece in x.flatten(0, -2).split(MLP_TOKENS)]).view(x.shape)

    mlp.forward = forward
    try:
        yield
    finally:
        del mlp.forward  # the instance's; the class has the original one


def hidden_states_of(output: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Return a layer's output `[B, T, d]`, which some families return in a tuple."""
    return output[0] if isinstance(output, tuple) else output


@dataclass
class Sweep:
    """One sweep over `blocks` `[N, T]`, of which this process takes its share.

    With `adapt`, `batch_size` is halved if a device runs out of memory. `finished(i, sums)` is called in the
    main process, in the order of the layers; the input of layer i is kept until it returns, so a sweep that died in
    layer i resumes there.
    """

    decoder: Decoder
    blocks: torch.Tensor
    states: States
    processes: Processes
    batch_size: int
    adapt: bool
    full_mlp: bool
    finished: Callable[[int, Tensors], None]
    progress: Progress

    def __post_init__(self) -> None:
        share = self.processes.share(len(self.blocks))
        self.own, self.first = self.blocks[share.start : share.stop], share.start

    @torch.inference_mode()
    def run(self, first_layer: int) -> None:
        """Compute the sums of all layers from `first_layer` on. If its input is missing, rerun the layers before it.

        Raises A3Error for non-finite activations, for damaged weights or files, and if memory is insufficient.
        """
        layers, width = self.decoder.shape.layers, max(1, len(self.decoder.machine.devices))
        if first_layer == layers:  # only the manifest is still missing
            return
        index, arguments = self._start_fitting(first_layer)
        while index < layers:
            stage = range(index, min(index + width, layers))
            moments = None
            try:
                with self.processes.together():
                    moments = self._run_stage(stage, first_layer, arguments)
            except torch.OutOfMemoryError as error:
                moments = None  # also if only another process ran out of memory
                self._halve(error)
            if moments is None:  # outside the handler, which holds the error
                collect_garbage()
                index, arguments = self._start_fitting(first_layer)
            else:
                self._finish(stage, moments)
                index = stage.stop
                first_layer = max(first_layer, index)

    def _start_fitting(self, layer: int) -> tuple[int, dict[int, list[Arguments]]]:
        """Call `_start` with a batch size that fits in memory."""
        while True:
            try:
                return self._start(layer)
            except torch.OutOfMemoryError as error:
                self._halve(error)
            collect_garbage()

    def _start(self, layer: int) -> tuple[int, dict[int, list[Arguments]]]:
        """Return the last layer up to `layer` whose input exists, computed if needed, and arguments by batch size."""
        there = next((each for each in range(layer, -1, -1) if self.states.has(each)), -1)
        there = min(self.processes.gather(there))
        if there < layer and layer:
            layers = self.decoder.shape.layers
            log.info("the input of layer %d of %d is missing; rerunning the layers before it", layer + 1, layers)
        with self.processes.together():
            target = self.states.begin() if there < 0 else self.states.input_of(there)
            with as_out_of_memory():
                arguments = embed_all(self.decoder, self.own, self.batch_size, target if there < 0 else None)
        if there < 0:
            self._keep(0)
        return max(there, 0), arguments

    def _keep(self, layer: int) -> None:
        """Commit the input of `layer`, which all processes have written."""
        checks = [check for share in self.processes.gather(self.states.end(layer)) for check in share]
        self.processes.from_main(lambda: self.states.keep(layer, checks))

    def _run_stage(
        self, stage: range, first_layer: int, arguments: dict[int, list[Arguments]]
    ) -> dict[int, LayerMoments]:
        """Run this process's batches through consecutive layers; return the moments of each from `first_layer` on."""
        decoder, moments = self.decoder, {}
        in_background = decoder.machine.copies  # files are read and written in threads while the device computes
        source, target = self.states.input_of(stage.start), self.states.begin()
        with as_out_of_memory(), ExitStack() as stack:
            modules = stack.enter_context(decoder.stage(stage))
            for index, module in zip(stage, modules, strict=True):
                if not in_background:
                    stack.enter_context(mlp_in_pieces(module, decoder.family))
                if index >= first_layer:
                    device = next(module.parameters()).device
                    samples = AttentionSamples(len(self.blocks), self.blocks.shape[1], device)
                    shape = decoder.shape
                    moments[index] = LayerMoments(
                        shape.head_dim, self.full_mlp, device, samples, scale=shape.softmax_scale
                    )
                    stack.enter_context(moments_of(module, decoder.family, moments[index]))
            write = stack.enter_context(writer(target, in_background=in_background))
            for start, batch in read_batches(source, len(self.own), self.batch_size, in_background=in_background):
                hidden = batch
                for index, module in zip(stage, modules, strict=True):
                    if index in moments:
                        moments[index].first_block = self.first + start
                    hidden = run_layer(module, hidden, arguments[len(batch)][index])
                write(start, hidden)
                self._report(stage, start + len(batch))
        return moments

    def _report(self, stage: range, blocks: int) -> None:
        """Report progress from the main process, whose share is like the others'."""
        share = blocks / len(self.own)
        for layer in stage if blocks == len(self.own) else stage[:1]:
            total = self.blocks.numel()
            self.progress(
                layer=layer, layers=self.decoder.shape.layers, tokens=round(share * total), total_tokens=total
            )

    def _finish(self, stage: range, moments: dict[int, LayerMoments]) -> None:
        """Reduce the sums to the main process, and only then release the stage's input."""
        self._keep(stage.stop)
        for layer in list(moments):
            own = moments.pop(layer)
            sums = self.processes.add_up(own.finished(), own.device)
            self.processes.from_main(partial(self._hand_on, layer, sums))
        self.processes.from_main(lambda: self.states.retire(stage.start))

    def _hand_on(self, layer: int, sums: Tensors) -> None:
        self.finished(layer, finite({name: value.cpu() for name, value in sums.items()}, layer))

    def _halve(self, error: Exception) -> None:
        """Halve the batch size. Raises A3Error if it may not be smaller."""
        if not self.adapt or self.batch_size == 1:
            remedy = "use --batch-size auto" if self.batch_size > 1 else "use a shorter --seq-len"
            raise A3Error(
                f"out of memory at {self.batch_size} blocks per batch ({first_line(error)}); {remedy}"
            ) from error
        self.batch_size //= 2
        log.info("out of memory: continuing with %d blocks per batch", self.batch_size)


def collect_garbage() -> None:
    """Free memory after an out-of-memory error: it and its frames reference each other and hold tensors."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def as_out_of_memory() -> Iterator[None]:
    """Convert any error of a device that runs out of memory to OutOfMemoryError."""
    try:
        yield
    except RuntimeError as error:
        if out_of_memory(error):
            raise torch.OutOfMemoryError(str(error)) from error
        raise


def read_batches(
    source: Blocks, blocks: int, batch_size: int, *, in_background: bool
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield each batch `[B, T, d]` with the index of its first block.

    With `in_background` a thread prefetches the next batch and pins it, unless it is on a device already.
    """
    starts = range(0, blocks, batch_size)

    def read(start: int) -> torch.Tensor:
        batch = source.read(start, min(batch_size, blocks - start))
        pinned = in_background and batch.device.type == "cpu" and torch.cuda.is_available()
        return batch.pin_memory() if pinned else batch

    if not in_background:
        yield from ((start, read(start)) for start in starts)
        return
    with ThreadPoolExecutor(1) as thread:
        coming = deque(thread.submit(read, start) for start in starts[:1])
        for start in starts:
            batch = coming.popleft().result()
            if start + batch_size < blocks:
                coming.append(thread.submit(read, start + batch_size))
            yield start, batch


@contextmanager
def writer(target: Blocks, *, in_background: bool) -> Iterator[Callable[[int, torch.Tensor], None]]:
    """Yield a function that writes batches to `target`; with `in_background` in a thread, one batch behind."""
    if not in_background:
        yield target.write
        return
    pending: list[Future[None]] = []
    with ThreadPoolExecutor(1) as thread:

        def write(start: int, batch: torch.Tensor) -> None:
            if pending:
                pending.pop().result()
            pending.append(thread.submit(target.write, start, batch))

        yield write
        if pending:
            pending.pop().result()


def run_layer(layer: nn.Module, batch: torch.Tensor, arguments: Arguments) -> torch.Tensor:
    """Return a layer's output for a batch, which may be on the CPU."""
    device = next(layer.parameters()).device
    return hidden_states_of(layer(batch.to(device, non_blocking=True), **arguments))


def embed_all(
    decoder: Decoder, blocks: torch.Tensor, batch_size: int, target: Blocks | None
) -> dict[int, list[Arguments]]:
    """Write the first layer's input to `target`; return each layer's arguments by batch size.

    A resumed sweep has its hidden states and needs only the arguments.
    """
    arguments: dict[int, list[Arguments]] = {}
    table = decoder.embedding_table() if len(blocks) else torch.empty(0)
    for start in range(0, len(blocks), batch_size):
        batch = blocks[start : start + batch_size]
        if target is not None or len(batch) not in arguments:
            hidden, arguments[len(batch)] = decoder.embed(batch, table)
            if target is not None:
                target.write(start, hidden)
    return arguments


def finite(sums: Tensors, layer: int) -> Tensors:
    """Return the sums. Raises A3Error if one has a NaN or Inf."""
    for name, value in sorted(sums.items()):
        if not torch.isfinite(value).all():
            raise A3Error(
                f"layer {layer}: statistics {name} have NaN or Inf values; compute in a wider type (--dtype float32)"
            )
    return sums
