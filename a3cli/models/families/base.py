"""The dataclasses that describe a family and a decoder: the place of each role, and the sizes that the solvers need.

The rest of the package uses roles (`q`, `down`, …), never names of modules or tensors.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from a3cli.models.families.carried import AttentionCosts, CarriedAttention
from a3cli.models.families.expert_names import EXPERT_BLOCK, Experts, place_of
from a3cli.settings import COMPONENTS, Component

Role = Literal["q", "k", "v", "o", "q_norm", "k_norm", "mlp_norm", "gate", "up", "down"]
Kind = Literal["weight", "bias"]
Positions = Literal["rope", "learned", "alibi"]
LinearShapes = Mapping[Role, tuple[int, int]]


@dataclass(frozen=True)
class Place:
    """The place of one role's weight in a decoder layer.

    `module` is a path inside the layer, with `{expert}` for the index of an expert. If the module's weight is fused,
    `after` names the roles whose rows come before this role's, in order; None means that the whole weight belongs to
    this role. `transposed` weights are stored as `[in, out]`.
    """

    module: str
    after: tuple[Role, ...] | None = None
    transposed: bool = False


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
# The roles of a type whose attention is carried.
MLP_PLACES: dict[Role, Place] = {role: LLAMA_PLACES[role] for role in ("mlp_norm", "gate", "up", "down")}
# Where a type with Llama's names has a norm on each query and key head.
HEAD_NORMS: dict[Role, str] = {"q": "self_attn.q_norm", "k": "self_attn.k_norm"}
# The roles of these norms' weights, where a smaller head may have a norm of its own size.
HEAD_NORM_ROLES: tuple[Role, ...] = ("q_norm", "k_norm")
NORMED_PLACES: dict[Role, Place] = {
    **LLAMA_PLACES,
    **{role: Place(module) for role, module in zip(HEAD_NORM_ROLES, HEAD_NORMS.values(), strict=True)},
}
# Where a type with Llama's names has a norm between a projection and the residual sum.
POST_NORMS: dict[Role, str] = {"o": "post_attention_layernorm", "down": "post_feedforward_layernorm"}
UNGATED_PLACES: dict[Role, Place] = {role: place for role, place in LLAMA_PLACES.items() if role != "gate"}


@dataclass(frozen=True)
class Family:
    """The names and properties of a model type's modules.

    Linear weights are `[out, in]`, or `[in, out]` where their place says so. RoPE rotates the first r dims of a head as
    pairs `(p, p + r/2)`. The roles q, k, v, o, gate, up and down are the linear weights that a budget counts;
    `mlp_norm` is the module that reads the residual stream for the MLP; without that role the MLP reads it. Without a
    gate the MLP is `down(act(up(x)))`.
    """

    model_type: str  # as in config.json
    places: dict[Role, Place]
    per_layer_class: str  # in models/shipped/modeling_a3_<model_type>.py
    qkv_bias: bool = False  # q, k and v always have biases, o never, and config.json does not say so
    use_bias: bool = False  # config.json's use_bias (default true) gives biases to all linear layers
    rotary_factor: float | None = None  # partial_rotary_factor if config.json omits it; None: RoPE rotates all dims
    softmax_scale: str | None = None  # the config entry of the softmax scale; None: head_dim ** -0.5
    scale_power: float = 1.0  # the softmax scale is that entry to this power
    score_cap: str | None = None  # the config entry of the cap of attention scores, of which null is none
    query_growth: str | None = None  # the entry of rope_parameters by which queries grow with their position
    residual_multiplier: str | None = None  # the config entry of the factor on each block's output
    like_llama: bool = False  # without windows, the stock class computes what Llama's does, but for biases
    head_norms: Mapping[Role, str] = field(default_factory=dict)  # modules of a norm on each query and key head
    carried_attention: CarriedAttention | None = None  # attention that has no places and stays as it is
    heads_first: bool = False  # these norms get heads before tokens, [B, H, T, h]
    joint_norms: bool = False  # these norms are over all heads of a token together
    post_norms: Mapping[Role, str] = field(default_factory=dict)  # modules of an RMS norm on the output of o and down
    norm_offset: float = 0.0  # what these norms, and those of heads, add to their weight
    local_rope: bool = False  # rope_parameters has a table for each type of attention, as Gemma 3
    strict_longrope: bool = False  # transformers 4 refuses other entries of rope_scaling than type and factors
    rotating_layers: str | None = None  # the config entry that is 0 for each layer without RoPE; None: all have it
    positions: Positions = "rope"  # how the model knows a token's place
    position_embedding: str | None = None  # the module of learned positions
    names: Mapping[str, str] = field(default_factory=dict)  # entries of config.json: Llama's name → its own
    mlp_ratio: int | None = None  # the MLP's width in hidden sizes if config.json omits it
    activation: str | None = None  # the module between up and down in a layer whose MLP is no module of its own
    refusal: Callable[[Any], str | None] = lambda _config: None  # what of a configuration a3 does not support
    stock_heads: str | None = None  # why no head can be smaller in the stock shape; None: they can
    experts: Experts | None = None  # many MLPs in each layer; None: one
    stock_components: tuple[Component, ...] = COMPONENTS  # what can be made smaller in the stock shape
    per_layer_components: tuple[Component, ...] = COMPONENTS  # what can be made smaller in the per-layer shape
    scaled_part: bool = False  # RoPE scales the part of a head that it rotates, and only that: config.json says so
    held_by: str | None = None  # the model type around the decoder (`wrappers.py`), which only the stock shape can keep
    carried: tuple[str, ...] = ()  # prefixes of tensors that the stock class does not know, copied as they are
    decoder: str = "model"
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    kernel: str = "sdpa"  # transformers' implementation of attention that computes what the model defines

    @property
    def fitted_norms(self) -> bool:
        """Return whether a smaller query or key head may have a norm of its own size."""
        return "q_norm" in self.places

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
    def stream_reader(self) -> str:
        """Return the path of the module that reads the residual stream after attention."""
        return self.module("mlp_norm") if "mlp_norm" in self.places else self.mlp

    @property
    def whole_heads(self) -> str | None:
        """Return why query and key heads must keep their size; None if they may be smaller."""
        if self.carried_attention:
            return self.carried_attention.reason
        if self.joint_norms:
            return "a norm follows all query heads together, and all key heads, so these keep their size"
        if self.head_norms:
            return "a norm follows each query and key head, so these keep their size"
        if self.scaled_part:
            return "RoPE scales only the rotated part of query and key heads, so these keep their size"
        return "some layers have no RoPE, so query and key heads keep their size" if self.rotating_layers else None

    def compressible(self, shape: str) -> tuple[Component, ...]:
        """Return the components that can be made smaller in an export of this shape, "stock" or "per-layer".

        The stock shape has one size for all heads: where QK keeps its own, so does OV.
        """
        kept: tuple[Component, ...] = ()
        if self.why_whole(shape) is not None:
            kept = ("qk", "ov") if shape == "stock" else ("qk",)
        return tuple(component for component in self._allowed(shape) if component not in kept)

    def possible(self, shape: str, method: str) -> tuple[Component, ...]:
        """Return the components that can be made smaller if asked for, with norms of their own that `best` fits."""
        fits = self.fitted_norms and method == "best"
        return self._allowed(shape) if fits else self.compressible(shape)

    def _allowed(self, shape: str) -> tuple[Component, ...]:
        if shape == "stock":
            return self.stock_components
        return () if self.held_by else self.per_layer_components

    def why_whole(self, shape: str) -> str | None:
        """Return why this shape keeps query and key heads whole, and with them others; None if it does not."""
        if shape != "stock" or self.carried_attention:
            return self.whole_heads
        if self.whole_heads is None:
            return self.stock_heads
        return f"{self.whole_heads}, and the stock shape has one size for all heads"

    @property
    def rotates(self) -> bool:
        """Return whether the model has RoPE."""
        return self.positions == "rope"

    def usual(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return a configuration's entries also under the names that Llama's has for them."""
        found = {**config, **{usual: config[own] for usual, own in self.names.items() if config.get(own) is not None}}
        hidden = found.get("hidden_size")
        if self.mlp_ratio and found.get("intermediate_size") is None and isinstance(hidden, int):
            found["intermediate_size"] = self.mlp_ratio * hidden
        return found

    @property
    def mlp(self) -> str:
        """Return the path of the MLP or of the block with experts in a layer; "" where it is no module of its own."""
        return EXPERT_BLOCK if self.experts else self.module("down").rpartition(".")[0]

    def tensor(self, layer: int, role: Role, kind: Kind = "weight", expert: int | None = None) -> str:
        """Return the checkpoint's name of the tensor that holds a role, of one expert if there are experts."""
        return f"{self.layer_prefix(layer)}{self.module(role).format(expert=expert)}.{kind}"

    def rows(self, role: Role, shapes: LinearShapes) -> slice:
        """Return the rows of its tensor that belong to a role, for linear weights of these shapes."""
        after = self.places[role].after
        if after is None:
            return slice(None)
        start = sum(shapes[before][0] for before in after)
        return slice(start, start + shapes[role][0])

    def head_rows(self, role: Role, shapes: LinearShapes) -> slice:
        """Return the part of the output of `heads(role)` that belongs to the role."""
        return slice(None) if role in self.head_norms else self.rows(role, shapes)

    def roles_of(self, module: str) -> tuple[Role, ...]:
        """Return the roles of a module, given by its path inside a layer, in the order of their rows."""
        roles = [role for role, place in self.places.items() if place.module == module]
        return tuple(sorted(roles, key=lambda role: len(self.places[role].after or ())))

    def layer_prefix(self, layer: int) -> str:
        return f"{self.layers}.{layer}."

    def find_roles(self, tensor: str) -> tuple[int, tuple[Role, ...], str] | None:
        """Return the layer, the roles in the order of their rows, and "weight" or "bias"; or None without a role."""
        prefix = self.layers + "."
        number, _, rest = tensor.removeprefix(prefix).partition(".")
        if not tensor.startswith(prefix) or not number.isdigit():
            return None
        module, _, kind = rest.rpartition(".")
        roles = self.roles_of(place_of(module) if self.experts else module)
        return (int(number), roles, kind) if roles else None


def sees_later_tokens(config: Any) -> str | None:
    """Return that attention is not causal, as in embedding models that a configuration class describes too."""
    return "attention to later tokens" if getattr(config, "use_bidirectional_attention", False) else None


@dataclass(frozen=True)
class LayerSizes:
    """The sizes of a layer in a solution: dims of a query or key head and of a value head, MLP or expert channels."""

    qk: int
    ov: int
    mlp: int


def per_layer_config(sizes: Sequence[LayerSizes], slots: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Return config.json's entry that gives each layer its sizes and RoPE slots, as transformers 5 reads it.

    Layers of a model without RoPE have no slots, and no entry for them.
    """
    digits = len(str(len(sizes) - 1))  # so that the keys of the file are in order
    return {
        str(layer).zfill(digits): {
            "qk_head_dim": size.qk,
            "v_head_dim": size.ov,
            "intermediate_size": size.mlp,
            **({"rope_slots": list(own)} if own else {}),
        }
        for layer, (size, own) in enumerate(zip(sizes, slots, strict=True))
    }


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder: d, L, H, K, h and I of the method; which linear layers it has, and which have biases.

    H and K are 0 where attention is carried, so that there are no heads to read.
    """

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
    score_cap: float | None = None  # attention scores s become cap · tanh(s / cap)
    residual_multiplier: float = 1.0  # factor on what attention and the MLP add to the residual stream
    windows: tuple[int | None, ...] = ()  # of each layer's sliding attention, None for full; empty if all are full
    still_layers: tuple[int, ...] = ()  # layers without RoPE, where others have it
    fitted_norms: bool = False  # query and key heads have norms, which get smaller with them
    norm_offset: float = 0.0  # what these norms add to their weight
    query_growth: tuple[float, int] | None = None  # β, n: queries at position p times 1 + β log(1 + floor(p / n))
    alibi: bool = False  # scores have a bias by distance, the same for all layers
    mlp_in_layer: bool = False  # the MLP is no module of its own, which could run in pieces
    carried_attention: AttentionCosts | None = None
    experts: int = 0  # MLPs in each layer among which a router chooses; 0: one MLP, without a router
    active_experts: int = 0  # those that a token goes through

    @property
    def mlps(self) -> int:
        """Return the number of MLPs in a layer."""
        return self.experts or 1

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
        return self.heads // max(1, self.kv_heads)

    @property
    def sizes(self) -> list[LayerSizes]:
        """Return the full sizes of every layer."""
        return [self.full_sizes] * self.layers

    @property
    def full_sizes(self) -> LayerSizes:
        return LayerSizes(self.head_dim, self.head_dim, self.intermediate_size)

    def linear_shapes(self, sizes: LayerSizes | None = None) -> dict[Role, tuple[int, int]]:
        """Return `[out, in]` of each linear weight of a layer with these sizes; by default the full ones.

        Those of the MLP are of one expert if there are experts.
        """
        d, size = self.hidden_size, sizes or self.full_sizes
        mlp: dict[Role, tuple[int, int]] = {**dict.fromkeys(self.mlp_inputs, (size.mlp, d)), "down": (d, size.mlp)}
        if self.carried_attention:
            return mlp
        return {
            "q": (self.heads * size.qk, d),
            "k": (self.kv_heads * size.qk, d),
            "v": (self.kv_heads * size.ov, d),
            "o": (d, self.heads * size.ov),
            **mlp,
        }


def pair_dims(pairs: int, turning: int) -> list[int]:
    """Return the dims of a head of `pairs` pairs: the first of every pair, then the second of every pair.

    With partial RoPE, the `turning` rotated pairs have the first dims; the unrotated dims are paired likewise.
    """
    still, behind = pairs - turning, 2 * turning
    first = [*range(turning), *range(behind, behind + still)]
    return [*first, *range(turning, behind), *range(behind + still, 2 * pairs)]
