"""A³-MLP: select intermediate channels."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from a3cli.solvers.linalg import solve_ridge


def score_channels(energy: torch.Tensor, down_weight: torch.Tensor) -> torch.Tensor:
    """Return the paper's score `[I]` of each channel, `R_jj ‖w_j‖²` (Section A³-MLP, the CUR form).

    energy `[I]` = `E[x_j²]` of the down projection's input; down_weight `[d, I]`, column j is `w_j`. The
    paper's `‖r_j‖²‖w_j‖²`, with `r_j` a column of `R^½`, is the same number: `‖R^½ e_j‖² = R_jj`. Kept
    channels stay as they are.
    """
    norms = torch.zeros_like(energy, dtype=torch.float64)
    for rows in down_weight.split(max(1, (1 << 18) // down_weight.shape[1])):  # fits a core's cache
        norms += rows.double().square().sum(0)
    return energy.double() * norms


def keep_channels(scores: torch.Tensor, kept: int) -> torch.Tensor:
    """Return the indices `[kept]` of the highest scores `[I]`, ascending; among equals the first channel wins."""
    return scores.argsort(descending=True, stable=True)[:kept].sort().values


# A channel whose unexplained share is smaller counts as explained: statistics are accumulated in float32, and with
# fewer tokens than channels the remainder of the last ones is rounding.
EXPLAINED = 1e-5


@dataclass(frozen=True)
class ChannelOrder:
    """Channels in the order of selection, and the loss at each number of kept channels.

    `order` `[I]`; `curve` `[I + 1]` is the squared error of the MLP's output with the first m channels and a refit down
    projection.
    """

    order: torch.Tensor
    curve: torch.Tensor


def order_channels(
    gram: torch.Tensor,
    down_weight: torch.Tensor,
    *,
    block: int,
    metric_root: torch.Tensor | None = None,
    candidates: int = 4,
    overwrite_gram: bool = False,
    advance: Callable[[float], object] = lambda _share: None,
) -> ChannelOrder:
    """Select channels greedily, accounting for the refit: one pass gives every width and its exact error.

    gram `[I, I]` = `E[x xᵀ]`, down_weight `[d, I]`. The channel taken next is the one that most reduces the residual of
    the refit, `‖(R W)_j‖² / R_jj` on the deflated `R`. With `metric_root` S `[d, d]` it is the one that most reduces
    `‖S e‖²` of the refit's error e, `‖(R W Sᵀ)_j‖² / R_jj`; the curve counts `‖e‖²` all the same. Block-wise: `block`
    channels are taken among the `candidates · block` of largest gain, exactly greedily among those, before the rest of
    `R` is deflated by them. About `I³/3 + 3/2 I² d` multiply-adds in matrix products, with a metric `I² d` more;
    `block=1` is exact greedy. Beside `R` in float64 it holds two matrices `[I, d]`, with a metric three; with
    `overwrite_gram` a float64 `gram` is overwritten. `advance` is called with shares of the work.
    """
    residual = gram.to(torch.float64, copy=not overwrite_gram)
    weight = down_weight.mT.double()
    target = residual @ weight
    total = torch.stack([(t * w).sum() for t, w in zip(target.split(1024), weight.split(1024), strict=True)]).sum()
    del weight
    left = _Left(
        residual,
        target,
        target if metric_root is None else target @ metric_root.mT.double(),
        least=(EXPLAINED * residual.diagonal()).clamp_min(torch.finfo(torch.float64).tiny),
        channels=torch.arange(len(gram), device=gram.device),
    )
    order: list[torch.Tensor] = []
    gains: list[torch.Tensor] = []
    while before := left.count:
        gain = _gains(left.residual.diagonal(), torch.linalg.vector_norm(left.wanted, dim=1).square(), left.least)
        pool = gain.argsort(descending=True, stable=True)[: candidates * block]
        rows = left.wanted[pool]
        taken, taken_gains = _take_greedily(
            left.residual[pool[:, None], pool], rows @ rows.mT, left.least[pool], min(block, len(pool))
        )
        order.append(left.channels[pool[taken]])
        useful = taken_gains > 0
        gains.append(torch.zeros_like(taken_gains).masked_scatter_(useful, left.take(pool[taken], pool[taken[useful]])))
        advance((before**3 - left.count**3) / len(gram) ** 3)
    curve = torch.cat([total[None], total - torch.cat(gains).cumsum(0)]).clamp_min(0)
    return ChannelOrder(torch.cat(order), curve)


def plain_losses(gram: torch.Tensor, down_weight: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Return the squared error `[I + 1]` of keeping the first m channels of `order` as they are, without a refit.

    gram `[I, I]` = `E[x xᵀ]`, down_weight `[d, I]`. The dropped channels D lose `Σ_{i,j in D} R_ij w_iᵀ w_j`.
    """
    weight = down_weight[:, order].double()
    effects = gram[order[:, None], order].double() * (weight.mT @ weight)
    of_channel = effects.triu(1).sum(1) * 2 + effects.diagonal()  # with the channels behind it
    tail = of_channel.flip(0).cumsum(0).flip(0)
    return torch.cat([tail, tail.new_zeros(1)]).clamp_min(0)


class _Left:
    """The remaining channels in the leading rows (and columns) of `R` and of `T = R W`, updated in place.

    `wanted` is `T Sᵀ`, or T itself without a metric. The last rows move into the gaps of the selected ones, so that
    products are as small as possible and no matrix is copied.
    """

    def __init__(
        self,
        residual: torch.Tensor,
        target: torch.Tensor,
        wanted: torch.Tensor,
        *,
        least: torch.Tensor,
        channels: torch.Tensor,
    ) -> None:
        self.residual, self.least, self.channels = residual, least, channels
        self.target, self.wanted = target, wanted

    @property
    def count(self) -> int:
        return len(self.channels)

    def take(self, taken: torch.Tensor, useful: torch.Tensor) -> torch.Tensor:
        """Drop the rows `taken`, and deflate the others by the `useful` ones among them.

        Return how much of `‖e‖²` each useful one explains beside those before it.
        """
        columns = self.residual[:, useful]
        factor = torch.linalg.cholesky(columns[useful])
        half = torch.linalg.solve_triangular(factor, columns.mT, upper=False)
        targets = [self.target] if self.wanted is self.target else [self.target, self.wanted]
        reduced = [torch.linalg.solve_triangular(factor, each[useful], upper=False) for each in targets]
        gaps, movers = self._moves(taken)
        self.residual[gaps] = self.residual[movers]
        self.residual[:, gaps] = self.residual[:, movers]
        for rows in (*targets, self.least, self.channels, half.mT):
            rows[gaps] = rows[movers]
        n = self.count - len(taken)
        self.residual, self.least, self.channels, half = (
            self.residual[:n, :n],
            self.least[:n],
            self.channels[:n],
            half[:, :n],
        )
        targets = [each[:n].addmm_(half.mT, part, alpha=-1) for each, part in zip(targets, reduced, strict=True)]
        self.target, self.wanted = targets[0], targets[-1]
        self.residual.addmm_(half.mT, half, alpha=-1)
        explained: torch.Tensor = reduced[0].square().sum(1)
        return explained

    def _moves(self, taken: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gaps of `taken` in the leading rows, and the rows at the end that fill them."""
        n = self.count - len(taken)
        last = torch.ones(len(taken), dtype=torch.bool, device=taken.device)
        last[taken[taken >= n] - n] = False
        return taken[taken < n], n + last.nonzero().squeeze(1)


def _gains(energy: torch.Tensor, met: torch.Tensor, least: torch.Tensor) -> torch.Tensor:
    """Return `‖T_j‖² / R_jj`, or 0 for channels that the selected ones explain, whose remainder is rounding."""
    return torch.where(energy > least, met.clamp_min(0) / energy.clamp_min(least), 0.0)


def _take_greedily(
    residual: torch.Tensor, met: torch.Tensor, least: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Select exactly greedily from a pool; return indices `[count]` into it and the gain of each.

    Works on `R` and on `met = T Tᵀ`, both of the pool's size, in place: `T_j − c_j T_b` changes `T Tᵀ` by rank two. The
    index stays a tensor `[1]`, so that nothing waits for the device.
    """
    left = torch.ones(len(residual), dtype=torch.bool, device=residual.device)
    taken, gains = [], []
    for _ in range(count):
        gain = torch.where(left, _gains(residual.diagonal(), met.diagonal(), least), -1.0)
        best = gain.argmax()[None]
        worth, row = gain[best], residual[best][0]
        share = torch.where(worth > 0, row / row[best], 0.0)
        half = met[best][0] - met[best, best] / 2 * share
        residual.addr_(share, row, alpha=-1)
        met.addr_(share, half, alpha=-1).addr_(half, share, alpha=-1)
        left[best] = False
        taken.append(best)
        gains.append(worth)
    return torch.cat(taken), torch.cat(gains)


def refit_down(gram: torch.Tensor, down_weight: torch.Tensor, kept: torch.Tensor, *, ridge: float) -> torch.Tensor:
    """Return the down projection `[d, m]` of the kept channels that fits the output of all channels by least squares.

    `W̃ = (R_SS + εI)⁻¹ R_S: W`, ε = `ridge` times the mean of the diagonal. Never worse on the calibration set than
    keeping the columns as they are. About `m I d + m³/6 + m² d` multiply-adds; beside its arguments it holds one matrix
    `[m, m]` and two of `W`'s size, float64.
    """
    weight = down_weight.mT.double()
    target = torch.cat([gram[rows].double() @ weight for rows in kept.split(1024)])
    del weight
    return solve_ridge(gram[kept[:, None], kept].double(), target, ridge=ridge, overwrite_gram=True).mT
