"""Train the small models that benchmarks compare methods on."""

import math
import sys
from collections.abc import Iterator
from typing import Any

import torch

BATCH = 8


def random_batches(stream: torch.Tensor, length: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield batches `[BATCH, length]` of blocks that begin anywhere in a stream of tokens."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(stream) - length, (BATCH,), generator=generator)
        yield torch.stack([stream[start : start + length] for start in starts])


def fit(
    model: Any,
    batches: Iterator[torch.Tensor],
    steps: int,
    *,
    peak_rate: float,
    warm_up: int,
    weight_decay: float,
    name: str,
) -> None:
    """Train a model in bfloat16: the rate rises for `warm_up` steps, and falls to a tenth of its peak."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=weight_decay, fused=True)
    for step in range(steps):
        for group in optimizer.param_groups:
            decay = 0.55 + 0.45 * math.cos(math.pi * step / steps)
            group["lr"] = peak_rate * min(1.0, (step + 1) / warm_up) * decay
        batch = next(batches)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"{name}, step {step} of {steps}: loss {loss.item():.3f}", file=sys.stderr, flush=True)
