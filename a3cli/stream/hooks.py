"""What sweeps add to a forward: sums of statistics, an MLP in pieces, inputs that are collected, given outputs."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from a3cli.models.costs import MLP_TOKENS
from a3cli.models.families import Family, ModelShape, Role
from a3cli.models.families.expert_names import EXPERT_BLOCK
from a3cli.models.fused import RoleLinear
from a3cli.solvers.moments import LayerMoments, Tensors
from a3cli.stream.decoder import Arguments, StopForward, hidden_states_of
from a3cli.stream.post_norm import post_norm_of


@contextmanager
def moments_of(
    layer: nn.Module, family: Family, shape: ModelShape, moments: LayerMoments, *, rotates: bool = True
) -> Iterator[None]:
    """Hook the roles of one layer so that every forward adds to its moments; `rotates` says whether it has RoPE."""
    listener, shapes = _Listener(layer, family, shape, moments, rotates=rotates), shape.linear_shapes()

    def submodule(role: Role) -> nn.Module:
        return layer.get_submodule(family.module(role))

    heads: tuple[Role, ...] = () if family.carried_attention else listener.HEADS
    handles = [
        layer.register_forward_pre_hook(listener.begin, with_kwargs=True),
        *(
            layer.get_submodule(family.heads(role)).register_forward_hook(
                partial(listener.add_heads, role, family.head_rows(role, shapes))
            )
            for role in heads
        ),
        *([submodule("o").register_forward_hook(listener.add_attention)] if heads else []),
        # What reads the stream for the MLP has the one after attention; the layer returns the stream after the MLP.
        layer.get_submodule(family.stream_reader).register_forward_pre_hook(listener.add_stream_after_attention),
        *hook_mlp(layer, family, listener),
        layer.register_forward_hook(listener.add_stream_after_mlp),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def hook_mlp(layer: nn.Module, family: Family, listener: "_Listener") -> list[RemovableHandle]:
    """Hook the inputs of the MLP's down projection, or of every expert's."""
    if family.experts is None:
        return [layer.get_submodule(family.module("down")).register_forward_hook(listener.add_mlp)]
    experts = layer.get_submodule(f"{EXPERT_BLOCK}.experts")
    name = family.module("down").rpartition(".")[2]
    downs = [expert.get_submodule(name) for expert in experts.children()]
    width = downs[0].get_parameter("weight").shape[1]
    return [
        experts.register_forward_pre_hook(partial(listener.begin_experts, len(downs), width)),
        *(expert.register_forward_pre_hook(listener.begin_expert) for expert in experts.children()),
        *(down.register_forward_pre_hook(partial(listener.add_expert, index)) for index, down in enumerate(downs)),
    ]


class _Listener:
    """Hooks that add activations to one layer's moments."""

    HEADS: tuple[Role, ...] = ("q", "k", "v")

    def __init__(
        self, layer: nn.Module, family: Family, shape: ModelShape, moments: LayerMoments, *, rotates: bool
    ) -> None:
        self._moments, self._rotates, self._growth = moments, rotates, shape.query_growth
        self._post_norms = {role: post_norm_of(layer, family, role) for role in family.post_norms}
        self._heads_first = family.heads_first
        self._heads: Tensors = {}
        self._called_with: Arguments = {}
        self._routing = torch.empty(0)  # weights of the current expert's tokens

    def begin(self, _layer: nn.Module, _args: Any, kwargs: Arguments) -> None:
        self._called_with.update(kwargs)

    def add_heads(self, role: Role, rows: slice, _module: nn.Module, _args: Any, output: torch.Tensor) -> None:
        by_token = output.transpose(1, 2) if self._heads_first and output.ndim == 4 else output
        self._heads[role] = heads = by_token.flatten(2)[..., rows]  # a norm returns each head by itself
        self._moments.add_heads(role, heads)

    def add_attention(self, _module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        weights = self._weights("o", output)
        self._moments.add_attention_output(args[0], weights)
        rotation = self._called_with.get("position_embeddings")  # None without RoPE
        if rotation is not None and not self._rotates:  # models give every layer the rotation
            rotation = torch.ones_like(rotation[0]), torch.zeros_like(rotation[1])
        if self._growth is not None:
            self._heads["q"] = grown(self._heads["q"], self._called_with["position_ids"], *self._growth)
        mask, bias = self._called_with.get("attention_mask"), self._called_with.get("position_bias")
        if bias is not None:  # MPT's, whose mask is true where a key is hidden
            mask = None if mask is None else ~mask
        self._moments.add_attention(self._heads, rotation, mask, weights, bias)
        self._heads.clear()  # before the MLP, which needs the memory

    def add_stream_after_attention(self, _norm: nn.Module, args: tuple[torch.Tensor]) -> None:
        self._moments.add_residual("attention_inverse", args[0])

    def add_mlp(self, _down: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        self._moments.add_mlp(args[0], self._weights("down", output))

    def _weights(self, role: Role, output: torch.Tensor) -> torch.Tensor | None:
        """Return the weights `[...]` of a projection's tokens `[..., d]` in the stream; None if no norm follows it."""
        norm = self._post_norms.get(role)
        return None if norm is None else norm.weights(output)

    def begin_experts(self, count: int, width: int, _experts: nn.Module, _args: Any) -> None:
        self._moments.begin_experts(count, width)

    def begin_expert(self, _expert: nn.Module, args: tuple[torch.Tensor, torch.Tensor]) -> None:
        self._routing = args[1]

    def add_expert(self, index: int, _down: nn.Module, args: tuple[torch.Tensor]) -> None:
        self._moments.add_expert(index, args[0], self._routing)

    def add_stream_after_mlp(self, _layer: nn.Module, _args: Any, output: Any) -> None:
        self._moments.add_residual("mlp_inverse", hidden_states_of(output))


def grown(queries: torch.Tensor, positions: torch.Tensor, growth: float, context: int) -> torch.Tensor:
    """Return queries `[B, T, H·h]` at `positions` `[B or 1, T]` as attention takes them, growing with the position."""
    scale = 1 + growth * torch.log1p((positions.to(queries.device) / context).floor())
    return queries * scale[..., None].to(queries.dtype)


@contextmanager
def mlp_in_pieces(layer: nn.Module, family: Family) -> Iterator[None]:
    """Run a layer's MLP, which treats each token separately, on a few tokens at a time.

    On a CPU the activations then stay in the cache, and the layer's largest ones take little memory. An MLP that is no
    module of its own runs whole, and so do experts, among which the tokens are divided anyway.
    """
    if not family.mlp or family.experts:
        yield
        return
    mlp = layer.get_submodule(family.mlp)
    whole = mlp.forward

    def forward(x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        pieces = zip(*(each.flatten(0, -2).split(MLP_TOKENS) for each in (x, *others)), strict=True)
        return torch.cat([whole(*piece) for piece in pieces]).view(x.shape)

    mlp.forward = forward
    try:
        yield
    finally:
        del mlp.forward  # the instance's; the class has the original one


@contextmanager
def outputs_given(linears: Sequence[RoleLinear], outputs: Sequence[torch.Tensor]) -> Iterator[None]:
    """Make linear layers return these tensors, whatever their input; a fused module returns those of all its roles."""
    given: dict[nn.Module, list[tuple[int, torch.Tensor]]] = {}
    for linear, output in zip(linears, outputs, strict=True):
        given.setdefault(linear.module, []).append((linear.rows.start or 0, output))
    try:
        for module, parts in given.items():
            ordered = [output for _, output in sorted(parts, key=lambda part: part[0])]
            whole = ordered[0] if len(ordered) == 1 else torch.cat(ordered, -1)
            module.forward = partial(_given, whole)
        yield
    finally:
        for module in given:
            del module.forward


def _given(output: torch.Tensor, _x: torch.Tensor) -> torch.Tensor:
    return output


@contextmanager
def inputs_of(module: nn.Module, *, stop: bool = False) -> Iterator[list[torch.Tensor]]:
    """Collect a module's inputs; with `stop`, end the forward pass, and with it the block, there."""
    seen: list[torch.Tensor] = []

    def keep(_module: nn.Module, args: tuple[torch.Tensor]) -> None:
        seen.append(args[0])
        if stop:
            raise StopForward

    handle = module.register_forward_pre_hook(keep)
    try:
        with suppress(StopForward):
            yield seen
    finally:
        handle.remove()
