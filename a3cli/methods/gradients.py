"""What the sweep of gradients left of one layer: what an error of its stream costs, and in which directions."""

from dataclasses import dataclass
from pathlib import Path

import torch

from a3cli.solvers.metric import metric_root
from a3cli.solvers.moments import unpack_upper
from a3cli.work.files import read_tensors

REMEDY = "remove it and rerun the same command, which computes the gradients again"


@dataclass(frozen=True)
class LayerGradients:
    """`½ E‖g‖² / d` of the stream after attention and after the MLP: KL, nats a token, for a squared error of one.

    A file in the folder has `E[g gᵀ]` after the MLP, as a packed triangle, and the number of tokens; `hash` is of it.
    """

    folder: Path
    attention: float
    mlp: float
    file: str
    hash: str

    def root(self, width: int) -> torch.Tensor:
        """Return the `metric_root` `[width, width]` of the stream after the MLP."""
        found = read_tensors(self.folder / self.file, REMEDY)
        return metric_root(unpack_upper(found["moments"].double(), width), int(found["tokens"]))
