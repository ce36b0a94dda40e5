"""Layers that differ in size: QK and OV ranks, MLP width, RoPE slots. A family's own file subclasses these.

`per_layer_config` in config.json gives each layer `qk_head_dim`, `v_head_dim`, `intermediate_size` and `rope_slots`.
Slot j of a layer, dims `(j, j + qk_head_dim/2)`, turns like pair `rope_slots[j]` of the full head; a fraction turns
between two pairs, by geometric interpolation of their frequencies. With partial RoPE (Nemotron), slots beyond the
pairs that turn are passed through: they are the last dims, and slot j of these s slots has dims `(j, j + s)`.
`head_dim` stays that of the full head: it defines the pairs and the softmax scale. Models without RoPE have neither
`head_dim` nor `rope_slots`. Everything else is stock transformers, 4.57 or 5.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import transformers
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_rope_utils import dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.llama.modeling_llama import (
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

SIZES = ("qk_head_dim", "v_head_dim", "intermediate_size")


def layer_config(config: Any, layer_idx: int, *, rotates: bool = True) -> Any:
    """The config of one layer, with RoPE or without. Raises ValueError if config.json does not describe it."""
    found = getattr(config, "per_layer_config", None)
    if found is None or isinstance(found, dict):  # a transformers that does not know per_layer_config keeps the dict
        own = copy.copy(config)
        for layer, values in (found or {}).items():
            if int(layer) == layer_idx:
                vars(own).update(values)
    else:
        own = found[layer_idx]
    missing = [name for name in (*SIZES, *["rope_slots"] * rotates) if getattr(own, name, None) is None]
    if missing:
        raise ValueError(f"config.json: per_layer_config gives layer {layer_idx} no {', '.join(missing)}")
    if not rotates:
        return own
    slots, last = own.rope_slots, config.head_dim // 2 - 1
    if 2 * len(slots) != own.qk_head_dim or not all(0 <= slot <= last for slot in slots):
        raise ValueError(
            f"config.json: layer {layer_idx} needs {own.qk_head_dim // 2} rope_slots between 0 and {last}, has {slots}"
        )
    return own


@contextmanager
def without_layers(config: Any) -> Iterator[int]:
    """Let a stock class build its model without layers, from a config that says so meanwhile; yields their number."""
    layers, config.num_hidden_layers = config.num_hidden_layers, 0
    try:
        yield layers
    finally:
        config.num_hidden_layers = layers


class A3RotaryEmbedding(LlamaRotaryEmbedding):
    """cos and sin `[B, T, S]` of every slot that turns in some layer; each picks its own (see `PerLayerAttention`).

    Frequencies come from the stock module, so every RoPE type works. A whole slot turns exactly like its pair.
    """

    keeps_float32 = False  # some types rotate in float32

    def __init__(self, config: Any, slots: list[float]) -> None:
        super().__init__(config)
        self.slots = slots = [slot for slot in slots if slot < len(self.inv_freq)]
        self.register_buffer("pair", torch.zeros(len(slots), dtype=torch.long), persistent=False)
        self.register_buffer("fraction", torch.zeros(len(slots), dtype=torch.float32), persistent=False)
        self.fill_buffers()

    def fill_buffers(self) -> None:
        self.pair.copy_(torch.tensor([int(slot) for slot in self.slots], dtype=torch.long))
        self.fraction.copy_(torch.tensor([slot % 1 for slot in self.slots], dtype=torch.float32))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moves with the model but stays float32: a frequency in bfloat16 is wrong by whole turns far away."""

        def without_cast(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(without_cast, recurse)

    @torch.no_grad()
    @dynamic_rope_update  # longrope chooses its table
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        frequencies = self.inv_freq.float()
        low, high = frequencies[self.pair], frequencies[(self.pair + 1).clamp_max(len(frequencies) - 1)]
        turned = low * (high / low) ** self.fraction
        angles = position_ids[..., None].float() * turned.to(x.device)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return (cos, sin) if self.keeps_float32 else (cos.to(x.dtype), sin.to(x.dtype))


class PerLayerAttention:
    """Goes before a stock attention class: queries and keys of one size, values of another, both as small in the cache.

    Fused kernels want one size, so for them the smaller is padded with zeros at the time of the call.
    """

    rotates = True
    rotate = staticmethod(apply_rotary_pos_emb)
    eager = staticmethod(eager_attention_forward)
    kernel_options: Any = MappingProxyType({})  # what attention kernels of the type take beside the usual
    output = "o_proj"

    def __init__(self, config: Any, layer_idx: int, slots: Sequence[float] = ()) -> None:
        super().__init__(config, layer_idx)
        own = layer_config(config, layer_idx, rotates=self.rotates)
        self.qk_head_dim, self.v_head_dim = own.qk_head_dim, own.v_head_dim
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", heads)
        self.build_inputs(config, heads * self.qk_head_dim, kv_heads * self.qk_head_dim, kv_heads * self.v_head_dim)
        self.build_output(config, heads * self.v_head_dim)
        # Types whose layers differ in their window keep it in the layer.
        self.window = getattr(self, "sliding_window", getattr(config, "sliding_window", None))
        rotated = [slots.index(slot) for slot in getattr(own, "rope_slots", ()) if slot in slots]
        self.places = rotated * 2  # both halves of what turns
        self.register_buffer("slot_index", torch.zeros(len(self.places), dtype=torch.long), persistent=False)
        self.fill_buffers()

    def build_inputs(self, config: Any, query: int, key: int, value: int) -> None:
        """Replace the stock projections by ones of these widths."""
        bias = self.q_proj.bias is not None
        self.q_proj = nn.Linear(config.hidden_size, query, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, key, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, value, bias=bias)

    def build_output(self, config: Any, width: int) -> None:
        """Replace the stock output projection by one that reads this width."""
        bias = getattr(self, self.output).bias is not None
        setattr(self, self.output, nn.Linear(width, config.hidden_size, bias=bias))

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values `[B, T, n·h]`."""
        return self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)

    def grow(self, query: torch.Tensor, _position_ids: torch.Tensor | None) -> torch.Tensor:
        """Rotated queries as attention takes them; some types scale them by their positions."""
        return query

    def fill_buffers(self) -> None:
        self.slot_index.copy_(torch.tensor(self.places, dtype=torch.long))

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        shape = hidden_states.shape[:-1]
        cache = take_cache(kwargs, attention_mask, shape[1])
        cache_position = kwargs.pop("cache_position", None)  # read by the static cache of transformers 4
        query, key, value = self.project(hidden_states)
        query = query.view(*shape, -1, self.qk_head_dim).transpose(1, 2)
        key = key.view(*shape, -1, self.qk_head_dim).transpose(1, 2)
        value = value.view(*shape, -1, self.v_head_dim).transpose(1, 2)
        query, key = self.turn(query, key, position_embeddings)
        query = self.grow(query, kwargs.get("position_ids"))
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx, {"cache_position": cache_position})

        attention, kernel = self.eager, self.config._attn_implementation
        if kernel not in (None, "eager"):
            attention = ALL_ATTENTION_FUNCTIONS[kernel]
            # vLLM allots its cache by config.head_dim, the same for all layers.
            width = self.config.head_dim if kernel == "vllm" else max(self.qk_head_dim, self.v_head_dim)
            query, key, value = pad(query, width), pad(key, width), pad(value, width)
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.window,
            **self.kernel_options,
            **kwargs,
        )
        # vLLM returns the heads of a token in one dimension.
        heads = output.reshape(*shape, self.config.num_attention_heads, -1)
        return getattr(self, self.output)(heads[..., : self.v_head_dim].flatten(-2)), weights

    def turn(self, query: torch.Tensor, key: torch.Tensor, positions: tuple[torch.Tensor, torch.Tensor] | None) -> Any:
        """Rotate queries and keys `[B, heads, T, qk]` by this layer's slots; without RoPE nothing is rotated."""
        if positions is None:
            return query, key
        cos, sin = (table[..., self.slot_index] for table in positions)
        return self.rotate(query, key, cos, sin)


def take_cache(kwargs: dict[str, Any], attention_mask: Any, query_length: int) -> Cache | None:
    """Remove the KV cache from an attention call's arguments and return it, whatever its name is.

    transformers renames this argument from time to time (`past_key_values` before 5.24, `cache` since), so it is found
    by its type. Raises RuntimeError if a cache is in use and none arrived: without one, all tokens after the prompt
    would be computed as if nothing came before them.
    """
    name = next((name for name, value in kwargs.items() if isinstance(value, Cache)), None)
    if name is not None:
        return kwargs.pop(name)
    longer = attention_mask is not None and attention_mask.shape[-1] > query_length
    if kwargs.get("use_cache") or longer:
        raise RuntimeError(
            f"{Path(__file__).name}: attention received no KV cache although one is in use; transformers "
            f"{transformers.__version__} passes it in a way that this file does not know. Use another version of "
            "transformers, or generate with use_cache=False"
        )
    return None


def pad(heads: torch.Tensor, width: int) -> torch.Tensor:
    """`[..., n]` → `[..., width]` with zeros."""
    missing = width - heads.shape[-1]
    return nn.functional.pad(heads, (0, missing)) if missing else heads


class PerLayerWeights:
    """Goes before a stock model class: buffers that no checkpoint holds are filled when weights are initialised."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (A3RotaryEmbedding, PerLayerAttention)):
            module.fill_buffers()


class PerLayerDecoderLayer:
    """Goes before a stock decoder layer class: its MLP is of the layer's own width."""

    attention_class: Any

    def __init__(self, config: Any, layer_idx: int, slots: list[float]) -> None:
        super().__init__(layer_config(config, layer_idx), layer_idx)
        # The model's own config, so that set_attn_implementation reaches it.
        self.self_attn = self.attention_class(config, layer_idx, slots)


class PerLayerModel(PerLayerWeights):
    """Goes before a stock decoder class: `layer_class` builds each layer from its own config."""

    _auto_class = "AutoModel"  # how vLLM's Transformers backend builds it
    layer_class: Any
    norm_class: Any
    norm_epsilon = "rms_norm_eps"  # in the config
    rotary_class: Any = A3RotaryEmbedding

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls._no_split_modules = [cls.layer_class.__name__]

    def __init__(self, config: Any) -> None:
        PreTrainedModel.__init__(self, config)
        layers = range(config.num_hidden_layers)
        slots = sorted({float(slot) for layer in layers for slot in layer_config(config, layer).rope_slots})
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = self.build_embedding(config)
        self.rotary_emb = self.rotary_class(config, slots)
        self.layers = nn.ModuleList(self.layer_class(config, layer, self.rotary_emb.slots) for layer in layers)
        self.norm = self.norm_class(config.hidden_size, eps=getattr(config, self.norm_epsilon))
        self.gradient_checkpointing = False
        self.has_sliding_layers = "sliding_attention" in (getattr(config, "layer_types", None) or ())
        self.post_init()

    def build_embedding(self, config: Any) -> nn.Embedding:
        return nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)


class PerLayerCausalLM(PerLayerWeights):
    """Goes before a stock causal language model class."""

    model_class: Any
    _auto_class = "AutoModelForCausalLM"  # save_pretrained copies the code beside the weights

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls._no_split_modules = cls.model_class._no_split_modules

    def __init__(self, config: Any) -> None:
        PreTrainedModel.__init__(self, config)
        self.model = self.model_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


def convert_names_as(model_type: str, *classes: type[PreTrainedModel]) -> None:
    """Make transformers convert checkpoints for these classes as it does for its own classes of a model type.

    Since transformers 5, a layer's experts are one module with 3-D tensors, while checkpoints have tensors for each
    expert. For classes outside of transformers it converts them only if they are registered. transformers 4 holds
    experts as checkpoints do.
    """
    try:
        conversion = import_module("transformers.conversion_mapping")
    except ImportError:
        return
    for each in classes:
        mapping = conversion.get_checkpoint_conversion_mapping(model_type)
        conversion.register_checkpoint_conversion_mapping(each.__name__, mapping, overwrite=True)
