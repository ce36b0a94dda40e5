"""A³-MLP: fewer intermediate channels."""

import torch


def score_channels(energy: torch.Tensor, down_weight: torch.Tensor) -> torch.Tensor:
    """The paper's score `[I]` of each channel, `R_jj ‖w_j‖²` (Section A³-MLP, the CUR form).

    energy `[I]` = `E[x_j²]` of what feeds the down projection; down_weight `[d, I]`, column j is `w_j`. The
    paper's `‖r_j‖²‖w_j‖²`, with `r_j` a column of `R^½`, is the same number: `‖R^½ e_j‖² = R_jj`. Kept
    channels stay as they are.
    """
    norms = torch.cat([part.double().square().sum(0) for part in down_weight.split(4096, dim=1)])
    return energy.double() * norms


def keep_channels(scores: torch.Tensor, kept: int) -> torch.Tensor:
    """Indices `[kept]` of the highest scores `[I]`, ascending; among equals the first channel wins."""
    return scores.argsort(descending=True, stable=True)[:kept].sort().values
