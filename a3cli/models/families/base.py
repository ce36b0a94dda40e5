"""The dataclasses that describe a family and a decoder: the place of each role, and the sizes that the solvers need.

The rest of the package uses roles (`q`, `down`, …), never names of modules or tensors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from a3cli.settings import COMPONENTS, Component

Role = Literal["q", "k", "v", "o", "q_norm", "k_norm", "mlp_norm", "gate", "up", "down"]
Kind = Literal["weight", "bias"]
LinearShapes = Mapping[Role, tuple[int, int]]


@dataclass(frozen=True)
class Place:
    """The place of one role's weight in a decoder layer.

    `module` is a path inside the layer. If the module's weight is fused, `after` names the roles whose rows come
    before this role's, in order; None means that the whole weight belongs to this role.
    """

    module: str
    after: tuple[Role, ...] | None = None


# The module names of Llama and of most later families.
LLAMA_PLACES: dict[Role, Place] = {
    "q": Place("self_attn.q_proj"),
    "k": Place("self_attn.k_proj"),
    "v": Place("self_attn.v_proj"),
    "o": Place("self_attn.o_proj"),
    "mlp_norm": Place("post_attention_layernorm"),
    "gate": Place("mlp.gate_proj"),
    "up": Place("mlp.up_proj"),
    "down": Place("mlp.down_proj"),
}
# Where a type with Llama's names has a norm on each query and key head.
HEAD_NORMS: dict[Role, str] = {"q": "self_attn.q_norm", "k": "self_attn.k_norm"}
NORM_OF: dict[Role, Role] = {"q": "q_norm", "k": "k_norm"}
UNGATED_PLACES: dict[Role, Place] = {role: place for role, place in LLAMA_PLACES.items() if role != "gate"}


@dataclass(frozen=True)
class Family:
    """The names and properties of a model type's modules.

    Linear weights are `[out, in]`. RoPE rotates the first r dims of a head as pairs `(p, p + r/2)`. The roles q, k, v,
    o, gate, up and down are the linear weights that a budget counts; `mlp_norm` is the module that reads the residual
    stream for the MLP. Without a gate the MLP is `down(act(up(x)))`.
    """

    model_type: str  # as in config.json
    places: dict[Role, Place]
    per_layer_class: str  # in models/shipped/modeling_a3_<model_type>.py
    qkv_bias: bool = False  # q, k and v always have biases, o never, and config.json does not say so
    use_bias: bool = False  # config.json's use_bias (default true) gives biases to all linear layers
    rotary_factor: float | None = None  # partial_rotary_factor if config.json omits it; None: RoPE rotates all dims
    softmax_scale: str | None = None  # the config entry of the softmax scale; None: head_dim ** -0.5
    residual_multiplier: str | None = None  # the config entry of the factor on each block's output
    head_norms: Mapping[Role, str] = field(default_factory=dict)  # modules of a norm on each query and key head
    fitted_norms: bool = False  # a smaller query or key head may have a norm of its own size
    rotating_layers: str | None = None  # the config entry that is 0 for each layer without RoPE; None: all have it
    stock_components: tuple[Component, ...] = COMPONENTS  # what can be made smaller in the stock shape
    per_layer_components: tuple[Component, ...] = COMPONENTS  # what can be made smaller in the per-layer shape
    carried: tuple[str, ...] = ()  # prefixes of tensors that the stock class does not know, copied as they are
    decoder: str = "model"
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"

    @property
    def gated(self) -> bool:
        return "gate" in self.places

    def module(self, role: Role) -> str:
        """Return the path, inside a decoder layer, of the module that holds a role."""
        return self.places[role].module

    def heads(self, role: Role) -> str:
        """Return the path of the module whose output is the heads of q, k or v as attention takes them, before RoPE."""
        return self.head_norms.get(role, self.module(role))

    @property
    def whole_heads(self) -> str | None:
        """Return why query and key heads must keep their size; None if they may be smaller."""
        if self.head_norms:
            return "a norm follows each query and key head, so these keep their size"
        return "some layers have no RoPE, so query and key heads keep their size" if self.rotating_layers else None

    def compressible(self, shape: str) -> tuple[Component, ...]:
        """Return the components that can be made smaller in an export of this shape, "stock" or "per-layer".

        The stock shape has one size for all heads: where QK keeps its own, so does OV.
        """
        kept = () if self.whole_heads is None else ("qk", "ov") if shape == "stock" else ("qk",)
        return tuple(component for component in self._allowed(shape) if component not in kept)

    def possible(self, shape: str, method: str) -> tuple[Component, ...]:
        """Return the components that can be made smaller if asked for, with norms of their own that `best` fits."""
        fits = self.fitted_norms and method == "best"
        return self._allowed(shape) if fits else self.compressible(shape)

    def _allowed(self, shape: str) -> tuple[Component, ...]:
        return self.stock_components if shape == "stock" else self.per_layer_components

    def why_whole(self, shape: str) -> str | None:
        """Return why this shape keeps query and key heads whole, and with them others; None if it does not."""
        if self.whole_heads is None or shape != "stock":
            return self.whole_heads
        return f"{self.whole_heads}, and the stock shape has one size for all heads"

    @property
    def mlp(self) -> str:
        """Return the path of the MLP inside a decoder layer."""
        return self.module("down").rpartition(".")[0]

    def tensor(self, layer: int, role: Role, kind: Kind = "weight") -> str:
        """Return the checkpoint's name of the tensor that holds a role."""
        return f"{self.layer_prefix(layer)}{self.module(role)}.{kind}"

    def rows(self, role: Role, shapes: LinearShapes) -> slice:
        """Return the rows of its tensor that belong to a role, for linear weights of these shapes."""
        after = self.places[role].after
        if after is None:
            return slice(None)
        start = sum(shapes[before][0] for before in after)
        return slice(start, start + shapes[role][0])

    def layer_prefix(self, layer: int) -> str:
        return f"{self.layers}.{layer}."

    def find_roles(self, tensor: str) -> tuple[int, tuple[Role, ...], str] | None:
        """Return the layer, the roles in the order of their rows, and "weight" or "bias"; or None without a role."""
        prefix = self.layers + "."
        number, _, rest = tensor.removeprefix(prefix).partition(".")
        if not tensor.startswith(prefix) or not number.isdigit():
            return None
        path, _, kind = rest.rpartition(".")
        roles = [role for role, place in self.places.items() if place.module == path]
        roles.sort(key=lambda role: len(self.places[role].after or ()))
        if self.fitted_norms:
            roles += [NORM_OF[role] for role, module in self.head_norms.items() if module == path]
        return (int(number), tuple(roles), kind) if roles else None

    def find_role(self, tensor: str) -> tuple[int, Role, str] | None:
        """Return `find_roles` of a tensor that belongs to one role.

        Raises ValueError for a fused tensor, whose roles must be compressed one by one.
        """
        found = self.find_roles(tensor)
        if found is None:
            return None
        layer, (role, *others), kind = found
        if others:
            raise ValueError(f"{tensor} is fused of {', '.join(found[1])}")
        return layer, role, kind


@dataclass(frozen=True)
class LayerSizes:
    """The sizes that a solution chooses for a layer: dims of a query or key head and of a value head, MLP channels."""

    qk: int
    ov: int
    mlp: int


def per_layer_config(sizes: Sequence[LayerSizes], slots: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Return config.json's entry that gives each layer its sizes and RoPE slots, as transformers 5 reads it."""
    digits = len(str(len(sizes) - 1))  # so that the keys of the file are in order
    return {
        str(layer).zfill(digits): {
            "qk_head_dim": size.qk,
            "v_head_dim": size.ov,
            "intermediate_size": size.mlp,
            "rope_slots": list(own),
        }
        for layer, (size, own) in enumerate(zip(sizes, slots, strict=True))
    }


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder: d, L, H, K, h and I of the method; which linear layers it has, and which have biases."""

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    attention_bias: bool = False
    mlp_bias: bool = False
    gated: bool = True
    passed_dims: int = 0  # dims of a query or key head that RoPE does not rotate
    fixed_scale: float | None = None  # softmax scale that does not depend on the head size
    residual_multiplier: float = 1.0  # factor on what attention and the MLP add to the residual stream
    windows: tuple[int | None, ...] = ()  # of each layer's sliding attention, None for full; empty if all are full
    still_layers: tuple[int, ...] = ()  # layers without RoPE
    fitted_norms: bool = False  # query and key heads have norms, which get smaller with them

    @property
    def mlp_inputs(self) -> tuple[Role, ...]:
        """Return the linear layers that read the MLP's input."""
        return ("gate", "up") if self.gated else ("up",)

    @property
    def mlp_roles(self) -> tuple[Role, ...]:
        return (*self.mlp_inputs, "down")

    @property
    def softmax_scale(self) -> float:
        return self.head_dim**-0.5 if self.fixed_scale is None else self.fixed_scale

    @property
    def turning_pairs(self) -> int:
        """Return the number of pairs that RoPE rotates."""
        return (self.head_dim - self.passed_dims) // 2

    @property
    def group(self) -> int:
        """Return the number of query heads per KV head, g = H / K."""
        return self.heads // self.kv_heads

    @property
    def sizes(self) -> list[LayerSizes]:
        """Return the full sizes of every layer."""
        return [self.full_sizes] * self.layers

    @property
    def full_sizes(self) -> LayerSizes:
        return LayerSizes(self.head_dim, self.head_dim, self.intermediate_size)

    def linear_shapes(self, sizes: LayerSizes | None = None) -> dict[Role, tuple[int, int]]:
        """Return `[out, in]` of each linear weight of a layer with these sizes; by default the full ones."""
        d, size = self.hidden_size, sizes or self.full_sizes
        return {
            "q": (self.heads * size.qk, d),
            "k": (self.kv_heads * size.qk, d),
            "v": (self.kv_heads * size.ov, d),
            "o": (d, self.heads * size.ov),
            **dict.fromkeys(self.mlp_inputs, (size.mlp, d)),
            "down": (d, size.mlp),
        }

    def tensor_shape(self, role: Role, kind: str, sizes: LayerSizes | None = None) -> tuple[int, ...] | None:
        """Return the shape of a role's weight or bias in a layer with these sizes; None for one that never shrinks."""
        if role in NORM_OF.values():
            return ((sizes or self.full_sizes).qk,)
        found = self.linear_shapes(sizes).get(role)
        return found if found is None or kind == "weight" else found[:1]


def pair_dims(pairs: int, turning: int) -> list[int]:
    """Return the dims of a head of `pairs` pairs: the first of every pair, then the second of every pair.

    With partial RoPE, the `turning` rotated pairs have the first dims; the unrotated dims are paired likewise.
    """
    still, behind = pairs - turning, 2 * turning
    first = [*range(turning), *range(behind, behind + still)]
    return [*first, *range(turning, behind), *range(behind + still, 2 * pairs)]
