"""Token blocks → activations of one decoder layer after another: weights in, forward, weights out.

The model is built on meta and never has to fit: each layer's weights are read once per calibration. The
model's own `forward` says what each layer is called with (masks, position embeddings), so no family's
`forward` is written down here. Memory holds one layer and one batch; hidden states lie between layers in files
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
    """Told after each batch how far a sweep is, in tokens through layers."""

    def __call__(self, *, layer: int, layers: int, tokens: int, total_tokens: int) -> None: ...


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
        for name, _ in self.model.named_buffers():  # rotary tables and the like
            set_module_tensor_to_device(self.model, name, machine.device)

    def build(self, config: Any, dtype: torch.dtype) -> nn.Module:
        from transformers import AutoModelForCausalLM

        network: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
        return network

    def load(self, prefix: str, module: nn.Module, device: torch.device) -> None:
        """Fill a meta module with the checkpoint's tensors. Raises A3Error for missing, misshaped or NaN ones."""
        for name, parameter in module.named_parameters():
            value = self.read(prefix + name, parameter.shape).to(device, non_blocking=True)
            # What is freed is taken again at once, by the next parameter or layer: the allocator may keep it.
            set_module_tensor_to_device(module, name, device, value=value, dtype=self.machine.dtype, clear_cache=False)

    def read(self, tensor: str, shape: torch.Size) -> torch.Tensor:
        """A weight in its stored dtype, mapped. Raises A3Error if it is missing, misshaped or has a NaN."""
        value = self.weights.read(tensor)
        if value.shape != shape:
            raise A3Error(f"{self.source.name}: tensor {tensor} is {list(value.shape)}, config.json says {list(shape)}")
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
    def layer(self, index: int, device: torch.device | None = None) -> Iterator[nn.Module]:
        """Hold one layer's weights; those of the next one are on their way meanwhile."""
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
        seen.clear()  # before the MLP, which needs the room

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


@contextmanager
def mlp_in_pieces(layer: nn.Module, family: Family) -> Iterator[None]:
    """Have a layer's MLP, which knows nothing of other tokens, take a few of them at a time.

    On a CPU its activations then stay in the cache, and the largest of a layer's take little memory.
    """
    mlp = layer.get_submodule(family.mlp)
    whole = mlp.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([whole(piece) for piece in x.flatten(0, -2).split(MLP_TOKENS)]).view(x.shape)

    mlp.forward = forward
    try:
        yield
    finally:
        del mlp.forward  # the instance's own; the class has the model's


def hidden_states_of(output: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    """A layer's output `[B, T, d]`; some families return it in a tuple."""
    return output[0] if isinstance(output, tuple) else output


@dataclass
class Sweep:
    """One sweep over `blocks` `[N, T]`, of which this process takes its share.

    `batch_size` is halved when a device runs out of memory if it may be (`adapt`). `finished(i, sums)` is called in the
    main process, in the order of the layers; the input of layer i is kept until it returned, so a sweep that died in
    layer i starts again there.
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
        """Sums of all layers from `first_layer` on. Those before are passed through again if its input is not there.

        Raises A3Error for non-finite activations, for damaged weights or files, and if memory does not suffice.
        """
        layers, width = self.decoder.shape.layers, max(1, len(self.decoder.machine.devices))
        if first_layer == layers:  # only the manifest is missing
            return
        index, arguments = self._start_fitting(first_layer)
        while index < layers:
            stage = range(index, min(index + width, layers))
            moments = None
            try:
                with self.processes.together():
                    moments = self._run_stage(stage, first_layer, arguments)
            except torch.OutOfMemoryError as error:
                moments = None  # also where another process ran out, and this one did not
                self._halve(error)
            if moments is None:  # out of the handler, which holds the error
                collect_garbage()
                index, arguments = self._start_fitting(first_layer)
            else:
                self._finish(stage, moments)
                index = stage.stop
                first_layer = max(first_layer, index)

    def _start_fitting(self, layer: int) -> tuple[int, dict[int, list[Arguments]]]:
        """`_start` with a batch for which there is memory."""
        while True:
            try:
                return self._start(layer)
            except torch.OutOfMemoryError as error:
                self._halve(error)
            collect_garbage()

    def _start(self, layer: int) -> tuple[int, dict[int, list[Arguments]]]:
        """The last layer up to `layer` whose input is there, made if need be, and all arguments by batch size."""
        there = next((each for each in range(layer, -1, -1) if self.states.has(each)), -1)
        there = min(self.processes.gather(there))
        if there < layer and layer:
            layers = self.decoder.shape.layers
            log.info("the input of layer %d of %d is missing; running the layers before it again", layer + 1, layers)
        with self.processes.together():
            target = self.states.begin() if there < 0 else self.states.input_of(there)
            with running_out_is_told():
                arguments = embed_all(self.decoder, self.own, self.batch_size, target if there < 0 else None)
        if there < 0:
            self._keep(0)
        return max(there, 0), arguments

    def _keep(self, layer: int) -> None:
        """The input of `layer` has been written, by all processes."""
        checks = [check for share in self.processes.gather(self.states.end(layer)) for check in share]
        self.processes.from_main(lambda: self.states.keep(layer, checks))

    def _run_stage(
        self, stage: range, first_layer: int, arguments: dict[int, list[Arguments]]
    ) -> dict[int, LayerMoments]:
        """This process's batches through consecutive layers: moments of each from `first_layer` on."""
        decoder, moments = self.decoder, {}
        aside = decoder.machine.copies  # files are read and written in threads while the device computes
        source, target = self.states.input_of(stage.start), self.states.begin()
        with running_out_is_told(), ExitStack() as stack:
            modules = stack.enter_context(decoder.stage(stage))
            for index, module in zip(stage, modules, strict=True):
                if not aside:
                    stack.enter_context(mlp_in_pieces(module, decoder.family))
                if index >= first_layer:
                    device = next(module.parameters()).device
                    samples = AttentionSamples(len(self.blocks), self.blocks.shape[1], device)
                    shape = decoder.shape
                    moments[index] = LayerMoments(
                        shape.head_dim, self.full_mlp, device, samples, scale=shape.softmax_scale
                    )
                    stack.enter_context(moments_of(module, decoder.family, moments[index]))
            write = stack.enter_context(writer(target, aside=aside))
            for start, batch in read_batches(source, len(self.own), self.batch_size, aside=aside):
                hidden = batch
                for index, module in zip(stage, modules, strict=True):
                    if index in moments:
                        moments[index].first_block = self.first + start
                    hidden = run_layer(module, hidden, arguments[len(batch)][index])
                write(start, hidden)
                self._report(stage, start + len(batch))
        return moments

    def _report(self, stage: range, blocks: int) -> None:
        """The main process speaks for all: their shares are alike."""
        share = blocks / len(self.own)
        for layer in stage if blocks == len(self.own) else stage[:1]:
            total = self.blocks.numel()
            self.progress(
                layer=layer, layers=self.decoder.shape.layers, tokens=round(share * total), total_tokens=total
            )

    def _finish(self, stage: range, moments: dict[int, LayerMoments]) -> None:
        """Sums of all processes go to the main one; only then is the stage's input given up."""
        self._keep(stage.stop)
        for layer in list(moments):
            own = moments.pop(layer)
            sums = self.processes.add_up(own.finished(), own.device)
            self.processes.from_main(partial(self._hand_on, layer, sums))
        self.processes.from_main(lambda: self.states.retire(stage.start))

    def _hand_on(self, layer: int, sums: Tensors) -> None:
        self.finished(layer, finite({name: value.cpu() for name, value in sums.items()}, layer))

    def _halve(self, error: Exception) -> None:
        """Raises A3Error if the batch may not be smaller."""
        if not self.adapt or self.batch_size == 1:
            remedy = "use --batch-size auto" if self.batch_size > 1 else "use a shorter --seq-len"
            raise A3Error(
                f"out of memory at {self.batch_size} blocks a batch ({first_line(error)}); {remedy}"
            ) from error
        self.batch_size //= 2
        log.info("out of memory: going on with %d blocks a batch", self.batch_size)


def collect_garbage() -> None:
    """After an error for want of memory: it and the frames that it came through hold one another, and their tensors."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def running_out_is_told() -> Iterator[None]:
    """Make whatever is raised when memory runs out, on any device, an OutOfMemoryError."""
    try:
        yield
    except RuntimeError as error:
        if out_of_memory(error):
            raise torch.OutOfMemoryError(str(error)) from error
        raise


def read_batches(source: Blocks, blocks: int, batch_size: int, *, aside: bool) -> Iterator[tuple[int, torch.Tensor]]:
    """Each batch `[B, T, d]` with its first block. `aside`: the next one is read in a thread meanwhile, and pinned.

    What lies on a device already is not.
    """
    starts = range(0, blocks, batch_size)

    def read(start: int) -> torch.Tensor:
        batch = source.read(start, min(batch_size, blocks - start))
        return batch.pin_memory() if aside and batch.device.type == "cpu" and torch.cuda.is_available() else batch

    if not aside:
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
def writer(target: Blocks, *, aside: bool) -> Iterator[Callable[[int, torch.Tensor], None]]:
    """Writes batches to where they belong. `aside`: in a thread, which may be one batch behind."""
    if not aside:
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
    """A layer's output for a batch that may come from the CPU."""
    device = next(layer.parameters()).device
    return hidden_states_of(layer(batch.to(device, non_blocking=True), **arguments))


def embed_all(
    decoder: Decoder, blocks: torch.Tensor, batch_size: int, target: Blocks | None
) -> dict[int, list[Arguments]]:
    """Write the first layer's input to `target`; returns each layer's arguments by batch size.

    A resumed sweep has its hidden states already and only needs the arguments.
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
    """The sums themselves. Raises A3Error if one has a NaN or Inf."""
    for name, value in sorted(sums.items()):
        if not torch.isfinite(value).all():
            raise A3Error(
                f"layer {layer}: statistics {name} have NaN or Inf values; compute in a wider type (--dtype float32)"
            )
    return sums
