"""A model on meta whose layers are filled with weights, run and emptied one at a time.

The model never has to fit in memory: each layer's weights are read once per sweep, and the next layer's are read while
one computes. The model's own `forward` determines the arguments of each layer (masks, position embeddings), so no
family's `forward` is repeated here.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Protocol

import torch
from accelerate import init_empty_weights
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from accelerate.utils import set_module_tensor_to_device
from torch import nn
from torch.func import functional_call

from a3cli.errors import A3Error
from a3cli.models.checkpoint import Checkpoint
from a3cli.models.experts import hold_apart, stored_name
from a3cli.models.families import Family, ModelShape
from a3cli.stream.offload import Weights
from a3cli.work.machine import Machine

Arguments = dict[str, Any]


class StopForward(Exception):
    """Ends a forward pass early, once the needed values have been recorded."""


class LayerOutput(torch.Tensor):
    """Hidden states as a layer returns them: alone or first in a tuple, which differs by family and transformers."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __getitem__(self, index: Any) -> torch.Tensor:
        whole = self.as_subclass(torch.Tensor)
        return whole if index == 0 else whole[index]


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
        self.hidden = hidden.as_subclass(torch.Tensor)
        self.arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        if self._last:
            raise StopForward
        return hidden.as_subclass(LayerOutput)


class _Result(_Recorder):
    """Stands in for all layers: returns hidden states that were computed before, whatever it is given.

    Some models scale their embeddings before the first layer.
    """

    def forward(self, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        assert self.hidden is not None
        return self.hidden.as_subclass(LayerOutput)


class Described(Protocol):
    """What a decoder must know of a model: `models.model.Model` has it."""

    @property
    def source(self) -> Checkpoint: ...
    @property
    def family(self) -> Family: ...
    @property
    def config(self) -> Any: ...
    @property
    def shape(self) -> ModelShape: ...


class Decoder:
    """A model on meta whose layers are filled, run and emptied one at a time."""

    def __init__(self, model: Described, machine: Machine, *, config: Any = None) -> None:
        self.source, self.family, self.shape, self.machine = model.source, model.family, model.shape, machine
        self.weights = Weights(model.source, machine)
        with init_empty_weights(include_buffers=False):
            self.model = self.build(config or model.config, machine.dtype).eval()
            hold_apart(self.model, self.family)
        layers = self.model.get_submodule(self.family.layers)
        assert isinstance(layers, nn.ModuleList)
        self.layers = layers
        self.base = self.model.get_submodule(self.family.decoder)
        for name, _ in self.model.named_buffers():  # for example rotary tables
            set_module_tensor_to_device(self.model, name, machine.device)

    def build(self, config: Any, dtype: torch.dtype) -> nn.Module:
        from transformers import AutoModelForCausalLM

        network: nn.Module = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=self.family.kernel
        )
        return network

    def load(self, prefix: str, module: nn.Module, device: torch.device) -> None:
        """Fill a meta module with the checkpoint's tensors. Raises A3Error for missing, misshaped or NaN ones."""
        for name, parameter in module.named_parameters():
            value = self.read(stored_name(self.family, prefix + name), parameter.shape).to(device, non_blocking=True)
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
        with self._learned_positions(), suppress(StopForward):
            try:
                for i, recorder in enumerate(recorders):
                    self.layers[i] = recorder
                self.base(inputs_embeds=self.look_up(blocks, table), use_cache=False)
            finally:
                for i, layer in enumerate(originals):
                    self.layers[i] = layer
        assert recorders[0].hidden is not None
        return recorders[0].hidden, [recorder.arguments for recorder in recorders]

    @contextmanager
    def _learned_positions(self) -> Iterator[None]:
        """Hold the embedding of positions, where the model has one."""
        if self.family.position_embedding is None:
            yield
            return
        module = self.model.get_submodule(self.family.position_embedding)
        try:
            self.load(self.family.position_embedding + ".", module, self.machine.device)
            yield
        finally:
            module.to("meta")

    @contextmanager
    def layer(self, index: int, device: torch.device | None = None) -> Iterator[nn.Module]:
        """Hold one layer's weights and prefetch the next layer's."""
        module = self.layers[index]
        try:
            self.load(self.source_prefix(index), module, device or self.machine.device)
            if index + 1 < len(self.layers):
                following = self.source_prefix(index + 1)
                self.weights.prefetch(
                    stored_name(self.family, following + name) for name, _ in module.named_parameters()
                )
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


def run_layer(layer: nn.Module, batch: torch.Tensor, arguments: Arguments) -> torch.Tensor:
    """Return a layer's output for a batch, which may be on the CPU."""
    device = next(layer.parameters()).device
    return hidden_states_of(layer(batch.to(device, non_blocking=True), **arguments))


def hidden_states_of(output: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Return a layer's output `[B, T, d]`, which some families return in a tuple."""
    return output[0] if isinstance(output, tuple) else output
