"""Query and key maps of one layer, refined on the attention that its statistics keep whole."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from a3cli.families.rope import Rope
from a3cli.methods.base import LayerInputs
from a3cli.moments import Tensors
from a3cli.solvers.attention import AttentionProblem, Penalty, SampledHead
from a3cli.solvers.rope import frequency_at
from a3cli.solvers.slots import SlotMaps, SlotProblem


@dataclass(frozen=True)
class Effort:
    """Iterations of refining, on one in `share` of the sampled blocks."""

    iterations: int
    share: int = 1


@dataclass(frozen=True)
class AttentionError:
    """Relative squared error of the stream on sampled attention, by the closed form's maps and by refined ones."""

    closed_form: float
    refined: float


@dataclass(frozen=True)
class RefinedMaps:
    """Complex maps `[K, P, S]`, and what error they leave."""

    query: torch.Tensor
    key: torch.Tensor
    error: AttentionError


def refine_maps(
    inputs: LayerInputs,
    rope: Rope,
    slots: list[float],
    closed: SlotMaps,
    far: list[Penalty | None],
    effort: Effort,
    device: torch.device,
) -> RefinedMaps:
    """From the closed form's maps for these slots; `far` is what score errors beyond the samples' length cost."""
    query, key = closed.query.clone(), closed.key.clone()
    before = after = 0.0
    for kv_head, (head, penalty) in enumerate(zip(sampled_heads(inputs, rope, effort.share, device), far, strict=True)):
        problem = AttentionProblem(head)
        frequencies = frequency_at(head.pairs, torch.tensor(slots, dtype=torch.float64))
        found = problem.refine(query[kv_head], key[kv_head], frequencies, iterations=effort.iterations, penalty=penalty)
        query[kv_head], key[kv_head] = found.query, found.key
        before, after = before + found.before, after + found.after
    return RefinedMaps(query, key, AttentionError(before * inputs.attention_unit, after * inputs.attention_unit))


def sampled_heads(inputs: LayerInputs, rope: Rope, share: int, device: torch.device) -> Iterator[SampledHead]:
    """Each KV head's sampled attention, of every `share`-th block that was kept."""
    samples = {name: value[:: min(share, len(value))] for name, value in inputs.samples().items()}
    length = samples["sample_k"].shape[1]
    pairs = rope.short if length <= rope.original_context else rope.long
    for kv_head in range(inputs.shape.kv_heads):
        group = slice(kv_head * inputs.shape.group, (kv_head + 1) * inputs.shape.group)
        own = slice(kv_head, kv_head + 1)
        yield SampledHead(
            queries=_heads(samples, "sample_q", group, inputs.shape.head_dim, device),
            keys=_heads(samples, "sample_k", own, inputs.shape.head_dim, device)[:, :, 0],
            values=_heads(samples, "sample_v", own, inputs.shape.head_dim, device)[:, :, 0],
            seen=samples["sample_seen"].to(device),
            pairs=pairs,
            scale=rope.attention_factor**2 * inputs.shape.head_dim**-0.5,
            output_gram=inputs.output_gram[group].to(device, torch.float32),
        )


def _heads(samples: Tensors, name: str, heads: slice, head_dim: int, device: torch.device) -> torch.Tensor:
    """Some heads `[N, T, n, h]` of what was sampled."""
    own: torch.Tensor = samples[name].unflatten(-1, (-1, head_dim))[:, :, heads]
    return own.to(device).float()


def score_penalty(problem: SlotProblem, weight: float) -> Penalty:
    """What one KV head's score errors cost, times a weight."""
    return lambda query, key: weight * problem.loss(query[None].cpu(), key[None].cpu())[0]
