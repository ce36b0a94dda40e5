"""A³-MLP: fewer intermediate channels."""

from dataclasses import dataclass

import torch

from a3cli.solvers.linalg import solve_ridge


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


# A channel of which less than this share is unexplained counts as explained: statistics are accumulated in float32, and
# with fewer tokens than channels what is left of the last ones is rounding.
EXPLAINED = 1e-5


@dataclass(frozen=True)
class ChannelOrder:
    """Channels in the order in which they are worth keeping, and what is lost at each number kept.

    `order` `[I]`; `curve` `[I + 1]` is the squared error of the MLP's output with the first m channels and a refit down
    projection.
    """

    order: torch.Tensor
    curve: torch.Tensor


def order_channels(gram: torch.Tensor, down_weight: torch.Tensor, *, block: int, candidates: int = 4) -> ChannelOrder:
    """Forward greedy selection that knows about the refit: one pass gives every width and its exact error.

    gram `[I, I]` = `E[x xᵀ]`, down_weight `[d, I]`. The channel taken next is the one that most reduces the residual of
    the refit, `‖(R W)_j‖² / R_jj` on the deflated `R`. Block-wise: `block` channels are taken among the `candidates ·
    block` of largest gain, exactly greedily among those, before the whole `R` is deflated by them. About `I³ + I² d`
    multiply-adds in matrix products of inner size `block`; `block=1` is exact greedy.
    """
    residual = gram.double().clone()
    target = residual @ down_weight.double().mT
    total = (target * down_weight.double().mT).sum()
    least = (EXPLAINED * residual.diagonal()).clamp_min(torch.finfo(torch.float64).tiny)
    left = torch.ones(len(gram), dtype=torch.bool, device=gram.device)
    order: list[torch.Tensor] = []
    gains: list[torch.Tensor] = []
    while left.any():
        gain = torch.where(left, _gains(residual, target, least), -1.0)
        pool = gain.argsort(descending=True, stable=True)[: min(candidates * block, int(left.sum()))]
        taken, taken_gains = _take_greedily(residual[pool][:, pool], target[pool], least[pool], min(block, len(pool)))
        chosen = pool[taken]
        _deflate(residual, target, chosen[taken_gains > 0])
        left[chosen] = False
        order.append(chosen)
        gains.append(taken_gains)
    curve = torch.cat([total[None], total - torch.cat(gains).cumsum(0)]).clamp_min(0)
    return ChannelOrder(torch.cat(order), curve)


def _gains(residual: torch.Tensor, target: torch.Tensor, least: torch.Tensor) -> torch.Tensor:
    """`‖T_j‖² / R_jj`, and 0 for channels that the chosen ones explain: what is left of those is rounding."""
    energy = residual.diagonal()
    return torch.where(energy > least, target.square().sum(1) / energy.clamp_min(least), 0.0)


def _take_greedily(
    residual: torch.Tensor, target: torch.Tensor, least: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact greedy among a pool: indices `[count]` into it, and what each one gained."""
    residual, target = residual.clone(), target.clone()
    left = torch.ones(len(residual), dtype=torch.bool, device=residual.device)
    taken, gains = [], []
    for _ in range(count):
        gain = torch.where(left, _gains(residual, target, least), -1.0)
        best = gain.argmax()
        taken.append(best)
        gains.append(gain[best])
        if gain[best] > 0:
            _deflate(residual, target, best[None])
        left[best] = False
    return torch.stack(taken), torch.stack(gains)


def _deflate(residual: torch.Tensor, target: torch.Tensor, chosen: torch.Tensor) -> None:
    """Take out of `residual` and `target`, in place, what the chosen channels explain."""
    columns = residual[:, chosen]
    factor = torch.linalg.cholesky(columns[chosen])
    half = torch.linalg.solve_triangular(factor, columns.mT, upper=False)
    target.addmm_(half.mT, torch.linalg.solve_triangular(factor, target[chosen], upper=False), alpha=-1)
    residual.addmm_(half.mT, half, alpha=-1)


def refit_down(gram: torch.Tensor, down_weight: torch.Tensor, kept: torch.Tensor, *, ridge: float) -> torch.Tensor:
    """The down projection `[d, m]` of the kept channels that fits best what all of them put out, by least squares.

    `W̃ = (R_SS + εI)⁻¹ R_S: W`, ε = `ridge` times the mean of the diagonal. Never worse on the calibration set than
    keeping the columns as they are.
    """
    rows = gram[kept].double()
    return solve_ridge(rows[:, kept], rows @ down_weight.double().mT, ridge=ridge).mT
