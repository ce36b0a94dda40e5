"""Build the class of transformers that a configuration names, and match a checkpoint's tensors with it.

Configuration in, names and shapes out. The class is built on the meta device, so it takes no memory.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from a3cli.errors import A3Error
from a3cli.models.experts import hold_apart, stored_name
from a3cli.models.families import family_of
from a3cli.models.families.wrappers import Wrapper

Shape = tuple[int, ...]
SHOWN = 4  # names in an error
# Buffers that transformers no longer stores and ignores in checkpoints that do; classes don't list them.
STORED_BUFFERS = r"rotary_emb\.inv_freq|attn\.masked_bias"


@dataclass(frozen=True)
class StockClass:
    """The tensors that a stock class loads.

    `shapes` are those of its whole state dict; `tied` maps names that need not be stored to those that they are tied
    to. Names that match `ignored` are ignored on loading. Names that begin with one of `carried` are unknown
    to the class, and exports keep them. `prefix` is that of the decoder, which base-model checkpoints leave out.
    """

    name: str
    layers: int
    shapes: dict[str, Shape]
    tied: dict[str, str]
    ignored: re.Pattern[str]
    carried: tuple[str, ...]
    prefix: str

    def exports(self, name: str) -> bool:
        """Return whether an export of the checkpoint has the tensor."""
        return name in self.shapes or name.startswith(self.carried)


def read_stock_class(config: Any) -> StockClass:
    """Build the class of a transformers configuration on meta. Raises any error of that class."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        kernel = family_of(config.model_type).kernel
        network = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=kernel)
    return describe_class(network, config)


def read_wrapper_class(whole: Any, config: Any, wrapper: Wrapper) -> StockClass:
    """Build a wrapper's class on meta; the tensors of its decoder have the names of the decoder's own class."""
    import transformers

    with torch.device("meta"):
        auto_class = getattr(transformers, wrapper.auto_class)
        network = auto_class.from_config(whole, dtype=torch.float32, attn_implementation="sdpa")
    found = describe_class(network, config)
    return replace(
        found,
        shapes={wrapper.own_name(name): shape for name, shape in found.shapes.items()},
        tied={wrapper.own_name(name): wrapper.own_name(original) for name, original in found.tied.items()},
    )


def describe_class(network: Any, config: Any) -> StockClass:
    """Return the tensors of a class that was built on meta for a decoder's configuration."""
    network.tie_weights()
    family = family_of(config.model_type)
    hold_apart(network, family)
    # Each parameter once; experts have the checkpoint's names.
    names = {id(parameter): stored_name(family, name) for name, parameter in network.named_parameters()}
    state = {stored_name(family, name): tensor for name, tensor in network.state_dict(keep_vars=True).items()}
    return StockClass(
        name=type(network).__name__,
        layers=config.num_hidden_layers,
        shapes={name: tuple(tensor.shape) for name, tensor in state.items()},
        tied={name: names[id(tensor)] for name, tensor in state.items() if names.get(id(tensor), name) != name},
        ignored=re.compile("|".join((STORED_BUFFERS, *(network._keys_to_ignore_on_load_unexpected or ())))),
        carried=family.carried,
        prefix=network.base_model_prefix + ".",
    )


def match_tensors(stock: StockClass, stored: Mapping[str, Shape | None], where: str) -> dict[str, str]:
    """Return the class's name, which has the decoder's prefix, for each stored name.

    `stored` holds shapes, or None where only the name is known. Raises A3Error naming the tensors that are missing,
    unknown to the class or of another shape.
    """
    names = {
        name: stock.prefix + name if name not in stock.shapes and stock.prefix + name in stock.shapes else name
        for name in stored
    }
    found = {own: stored[name] for name, own in names.items()}
    missing = stock.shapes.keys() - stock.tied.keys() - found.keys()
    unknown = [name for name in found if not stock.exports(name) and not stock.ignored.search(name)]
    twice = [name for name, own in names.items() if own != name and own in stored]
    misshapen = [
        f"tensor {name} is {list(shape)}, config.json says {list(stock.shapes[name])}"
        for name, shape in found.items()
        if shape is not None and shape != stock.shapes.get(name, shape)
    ]
    problems = [
        *describe_names(missing, "missing", stock.shapes),
        *describe_names(unknown, "not known to this class", unknown),
        *describe_names(twice, f"stored with and without {stock.prefix}", twice),
        *misshapen[:SHOWN],
    ]
    if problems:
        raise A3Error(
            f"{where}: config.json says {stock.layers} layers of {stock.name} with {'' if stock.tied else 'un'}tied "
            f"embeddings, but {'; '.join(problems)}; correct config.json or get the whole checkpoint"
        )
    return names


def describe_names(names: Iterable[str], what: str, order: Iterable[str]) -> list[str]:
    """Return a clause with the count and the first names, or nothing where there are none."""
    chosen = set(names)
    ordered = [name for name in order if name in chosen]
    if not ordered:
        return []
    shown = ", ".join(ordered[:SHOWN]) + (", …" if len(ordered) > SHOWN else "")
    return [f"{len(ordered)} tensor{'s are' if len(ordered) > 1 else ' is'} {what} ({shown})"]
