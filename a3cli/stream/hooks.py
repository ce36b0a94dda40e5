"""What a sweep adds to a layer's forward: the sums of its statistics, and an MLP that runs in pieces."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from a3cli.models.costs import MLP_TOKENS
from a3cli.models.families import Family, Role
from a3cli.models.families.base import LinearShapes
from a3cli.solvers.moments import LayerMoments, Tensors
from a3cli.stream.decoder import Arguments, hidden_states_of


@contextmanager
def moments_of(
    layer: nn.Module, family: Family, shapes: LinearShapes, moments: LayerMoments, *, rotates: bool = True
) -> Iterator[None]:
    """Hook the roles of one layer so that every forward adds to its moments.

    `shapes` are those of its linear weights; `rotates` says whether it has RoPE.
    """
    listener = _Listener(moments, rotates=rotates)

    def submodule(role: Role) -> nn.Module:
        return layer.get_submodule(family.module(role))

    handles = [
        layer.register_forward_pre_hook(listener.begin, with_kwargs=True),
        *(
            layer.get_submodule(family.heads(role)).register_forward_hook(
                partial(listener.add_heads, role, family.head_rows(role, shapes))
            )
            for role in listener.HEADS
        ),
        submodule("o").register_forward_pre_hook(listener.add_attention),
        # The MLP's norm reads the stream after attention; the layer returns the stream after the MLP.
        submodule("mlp_norm").register_forward_pre_hook(listener.add_stream_after_attention),
        submodule("down").register_forward_pre_hook(listener.add_mlp),
        layer.register_forward_hook(listener.add_stream_after_mlp),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Listener:
    """Hooks that add activations to one layer's moments."""

    HEADS: tuple[Role, ...] = ("q", "k", "v")

    def __init__(self, moments: LayerMoments, *, rotates: bool) -> None:
        self._moments, self._rotates = moments, rotates
        self._heads: Tensors = {}
        self._called_with: Arguments = {}

    def begin(self, _layer: nn.Module, _args: Any, kwargs: Arguments) -> None:
        self._called_with.update(kwargs)

    def add_heads(self, role: Role, rows: slice, _module: nn.Module, _args: Any, output: torch.Tensor) -> None:
        self._heads[role] = heads = output.flatten(2)[..., rows]  # a norm returns each head by itself
        self._moments.add_heads(role, heads)

    def add_attention(self, _output_projection: nn.Module, args: tuple[torch.Tensor]) -> None:
        self._moments.add_attention_output(args[0])
        rotation = self._called_with.get("position_embeddings")  # None without RoPE
        if rotation is not None and not self._rotates:  # models give every layer the rotation
            rotation = torch.ones_like(rotation[0]), torch.zeros_like(rotation[1])
        self._moments.add_attention(self._heads, rotation, self._called_with.get("attention_mask"))
        self._heads.clear()  # before the MLP, which needs the memory

    def add_stream_after_attention(self, _norm: nn.Module, args: tuple[torch.Tensor]) -> None:
        self._moments.add_residual("attention_residual", args[0])

    def add_mlp(self, _down: nn.Module, args: tuple[torch.Tensor]) -> None:
        self._moments.add_mlp(args[0])

    def add_stream_after_mlp(self, _layer: nn.Module, _args: Any, output: Any) -> None:
        self._moments.add_residual("mlp_residual", hidden_states_of(output))


@contextmanager
def mlp_in_pieces(layer: nn.Module, family: Family) -> Iterator[None]:
    """Run a layer's MLP, which treats each token separately, on a few tokens at a time.

    On a CPU the activations then stay in the cache, and the layer's largest ones take little memory. An MLP that is no
    module of its own runs whole.
    """
    if not family.mlp:
        yield
        return
    mlp = layer.get_submodule(family.mlp)
    whole = mlp.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([whole(piece) for piece in x.flatten(0, -2).split(MLP_TOKENS)]).view(x.shape)

    mlp.forward = forward
    try:
        yield
    finally:
        del mlp.forward  # the instance's; the class has the original one
