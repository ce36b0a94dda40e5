"""Refine the query and key maps of one layer on its attention samples."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from a3cli.methods.base import AttentionError
from a3cli.methods.heads import Heads, Problem
from a3cli.methods.inputs import LayerInputs
from a3cli.models.rope import Rope
from a3cli.solvers.attention import AttentionProblem, Penalty, SampledHead, alibi_slopes
from a3cli.solvers.attention import Refined as Found
from a3cli.solvers.moments import Tensors
from a3cli.solvers.rope import frequency_at
from a3cli.solvers.samples import WEIGHT
from a3cli.solvers.slots import SlotMaps
from a3cli.work.progress import advance, portion

VALIDATION_EVERY = 4  # every fourth block validates instead of being fitted


@dataclass(frozen=True)
class Effort:
    """Iterations of refinement, on all fitted blocks, or on as many as validate (`few`)."""

    iterations: int
    few: bool = False


@dataclass(frozen=True)
class Refined(ABC):
    """Smaller query and key heads, with their remaining error."""

    error: AttentionError

    @abstractmethod
    def tensors(self) -> Tensors:
        """Return what a solution holds of them (see `projections.py`)."""


@dataclass(frozen=True)
class RefinedMaps(Refined):
    """Complex maps `[K, P, S]` (`[K, h, S]` with partial RoPE) for these slots."""

    query: torch.Tensor
    key: torch.Tensor
    form: Heads
    slots: Sequence[float]

    def tensors(self) -> Tensors:
        return {
            "query_map": self.form.real_map(self.query, self.slots),
            "key_map": self.form.real_map(self.key, self.slots),
        }


def refine_maps(
    inputs: LayerInputs,
    form: Heads,
    rope: Rope,
    slots: list[float],
    closed: SlotMaps,
    far: list[Penalty | None],
    effort: Effort,
    device: torch.device,
) -> RefinedMaps:
    """Refine the closed form's maps for these slots; `far` is the cost of score errors beyond the samples' length."""
    query, key = closed.query.clone(), closed.key.clone()
    before = after = 0.0
    fitting, judging = split(inputs.samples(), few=effort.few)
    for kv_head, penalty in enumerate(far):
        judge = AttentionProblem(sampled_head(inputs, rope, judging, kv_head, device))
        frequencies = frequency_at(judge.head.pairs, torch.tensor(slots, dtype=torch.float64))
        own = query[kv_head], key[kv_head]
        with portion(1 / len(far)):
            if effort.iterations == 0:
                loss = judge.loss(*own, frequencies)
                found = Found(*own, loss, loss)
            else:
                fitted = AttentionProblem(sampled_head(inputs, rope, fitting, kv_head, device))
                found = fitted.refine(
                    *own, frequencies, judge=judge, iterations=effort.iterations, penalty=penalty, advance=advance
                )
        query[kv_head], key[kv_head] = found.query, found.key
        before, after = before + found.before, after + found.after
    error = AttentionError(before * inputs.attention_unit, after * inputs.attention_unit)
    return RefinedMaps(error, query, key, form, slots)


def split(samples: Tensors, *, few: bool) -> tuple[Tensors, Tensors]:
    """Split samples into fitted ones, all or few, and validation ones; a single block is split by queries."""
    alone = len(samples["sample_k"]) == 1
    divided = [name for name in samples if not alone or name in ("sample_q", "sample_seen", WEIGHT)]
    place = torch.arange(samples["sample_q"].shape[1 if alone else 0]) % VALIDATION_EVERY
    fitted, judging = place == 0 if few else place != 1, place == 1
    if not judging.any():  # a single query
        judging = fitted

    def part(chosen: torch.Tensor) -> Tensors:
        return {
            name: (value[:, chosen] if alone else value[chosen]) if name in divided else value
            for name, value in samples.items()
        }

    return part(fitted), part(judging)


def sampled_head(inputs: LayerInputs, rope: Rope, samples: Tensors, kv_head: int, device: torch.device) -> SampledHead:
    """Return one KV head's sampled attention."""
    length = samples["sample_k"].shape[1]
    group = slice(kv_head * inputs.shape.group, (kv_head + 1) * inputs.shape.group)
    own = slice(kv_head, kv_head + 1)
    return SampledHead(
        queries=_heads(samples, "sample_q", group, inputs.shape.head_dim, device),
        keys=_heads(samples, "sample_k", own, inputs.shape.head_dim, device)[:, :, 0],
        values=_heads(samples, "sample_v", own, inputs.shape.head_dim, device)[:, :, 0],
        seen=samples["sample_seen"].to(device),
        pairs=rope.short if length <= rope.original_context else rope.long,
        scale=rope.attention_factor**2 * inputs.shape.softmax_scale,
        output_gram=inputs.output_gram[group].to(device, torch.float32),
        turning=inputs.shape.turning_pairs if inputs.shape.passed_dims else None,
        weights=samples[WEIGHT].to(device) if WEIGHT in samples else None,
        cap=inputs.shape.score_cap,
        slopes=alibi_slopes(inputs.shape.heads)[group].to(device) if inputs.shape.alibi else None,
    )


def _heads(samples: Tensors, name: str, heads: slice, head_dim: int, device: torch.device) -> torch.Tensor:
    """Return some heads `[N, T, n, h]` of a sampled tensor."""
    own: torch.Tensor = samples[name].unflatten(-1, (-1, head_dim))[:, :, heads]
    return own.to(device).float()


def score_penalty(problem: Problem, weight: float) -> Penalty:
    """Return a function for the cost of one KV head's score errors, times a weight."""
    return lambda query, key: weight * problem.loss(query[None].cpu(), key[None].cpu())[0]
