"""The names of experts: in config.json, in checkpoints, and in the stock classes of transformers 5.

Checkpoints hold each expert's weights by themselves; stock classes hold those of a layer in one module of 3-D tensors.
"""

import re
from dataclasses import dataclass

EXPERT_BLOCK = "mlp"  # what stock classes call the block that holds a layer's router and experts


@dataclass(frozen=True)
class Experts:
    """How a family has experts: each token goes through a few of many MLPs, weighted by a router.

    `block` is the checkpoint's name for `EXPERT_BLOCK`; `count` and `active` are the entries of config.json for the
    number of experts, under each name that it has, and for how many of them a token goes through.
    """

    block: str
    count: tuple[str, ...] = ("num_local_experts",)
    active: str = "num_experts_per_tok"

    def stored(self, tensor: str, layers: str) -> str:
        """Return the checkpoint's name of a tensor from that in the class, whose layers are the module `layers`."""
        return re.sub(rf"^({re.escape(layers)}\.\d+)\.{EXPERT_BLOCK}\.", rf"\1.{self.block}.", tensor)


def place_of(module: str) -> str:
    """Return a module of one expert as the place of a role has it, any other module as it is."""
    return re.sub(r"\.experts\.\d+\.", ".experts.{expert}.", module)


def index_of(tensor: str) -> int | None:
    """Return the index of the expert that a tensor belongs to, None if it belongs to none."""
    found = re.search(r"\.experts\.(\d+)\.", tensor)
    return int(found[1]) if found else None
