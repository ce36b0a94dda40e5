"""The metric of errors in the residual stream: which directions the model's output depends on."""

import torch


def metric_root(moments: torch.Tensor, tokens: int) -> torch.Tensor:
    """Return `S` `[d, d]` with `Sᵀ S = (1 − ρ) M / m + ρ I`, `m` the mean of M's diagonal, ρ = d / (d + tokens).

    `M` `[d, d]` = `E[g gᵀ]` of so many tokens, with g the gradient of the log-likelihood by the stream: to second order
    an error e of the stream costs `½ eᵀ M e` of KL, so `‖S e‖²` is its cost relative to that of an error of the same
    length in no particular direction. From few tokens M is noisy, and singular from less than d: ρ is the weight of the
    identity, as in ridge regression with one prior observation per dimension. All zero gradients give the identity.
    Float64, upper triangular.
    """
    width, mean = len(moments), moments.diagonal().double().mean()
    prior = width / (width + tokens) if mean > 0 else 1.0
    metric = moments.double() * ((1 - prior) / mean.clamp_min(torch.finfo(torch.float64).tiny))
    metric.diagonal().add_(prior)
    root: torch.Tensor = torch.linalg.cholesky(metric, upper=True)
    return root
