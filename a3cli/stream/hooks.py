"""What a sweep adds to a layer's forward: the sums of its statistics, and an MLP that runs in pieces."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from a3cli.models.costs import MLP_TOKENS
from a3cli.models.families import Family, Role
from a3cli.solvers.moments import LayerMoments, Tensors
from a3cli.stream.decoder import Arguments, hidden_states_of


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
