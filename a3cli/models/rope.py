"""Read the frequencies of RoPE from a configuration, and write the configuration of a kept subset of pairs.

A kept subset of pairs is written as a changed theta where the pairs are evenly spaced from pair 0 (the form that most
runtimes load), as a changed theta with a linear factor where they are evenly spaced from another pair and that form was
asked for (some runtimes ignore the factor), and as longrope factors otherwise. Both spellings are written,
`rope_theta` + `rope_scaling` (transformers 4) and `rope_parameters` (5): 4.57 silently falls back to default RoPE when
it finds only the second.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from a3cli.errors import A3Error
from a3cli.models.config import FULL, LOCAL_THETA, SLIDING, check_rope, rope_parameters_of, rotary_dims, rotary_factor
from a3cli.models.families import FAMILIES, family_of
from a3cli.solvers.rope import frequency_at
from a3cli.work.files import Json

QUERY_GROWTH = {each.query_growth for each in FAMILIES.values() if each.query_growth}
ROUNDING = 1e-9  # pairs; a frequency in float32 is further off
ROPE_KEYS = {"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", LOCAL_THETA}


@dataclass(frozen=True)
class Rope:
    """The rotation of a source model.

    `short` and `long` `[h/2]` float64 are the frequencies (radians per position) of each pair up to `original_context`
    positions and beyond; they differ for longrope only. Dims that RoPE does not rotate are the last pairs, with
    frequency 0. `attention_factor` scales cos and sin. `parameters` is the configuration they were read from.
    """

    parameters: Json
    short: torch.Tensor
    long: torch.Tensor
    attention_factor: float
    context: int
    original_context: int

    @property
    def turning(self) -> int:
        """Return how many pairs are rotated."""
        return int(self.short.count_nonzero())

    @property
    def partial(self) -> bool:
        return self.turning < len(self.short)

    @property
    def absent(self) -> bool:
        """Return whether there is no RoPE to change: the model has none, or its attention is carried."""
        return self.kind == "none"

    @property
    def still(self) -> "Rope":
        """Return RoPE that rotates nothing and scales nothing, that of layers without it."""
        none = torch.zeros_like(self.short)
        return replace(self, short=none, long=none, attention_factor=1.0)

    @property
    def kind(self) -> str:
        return str(self.parameters["rope_type"])

    @property
    def growth(self) -> Json:
        """Return the entries by which queries grow with their position, from multiples of the original context on."""
        return {key: value for key, value in self.parameters.items() if key in QUERY_GROWTH}

    @property
    def theta(self) -> float:
        return float(self.parameters["rope_theta"])


def read_rope(config: Any, attention: str = FULL) -> Rope:
    """Read the RoPE of the layers with a type of attention from a transformers (5.x) config.

    Raises A3Error for a RoPE type that a subset of pairs cannot express.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    family, parameters = family_of(config.model_type), rope_parameters_of(config, attention)
    if not family.rotates or family.carried_attention:
        return no_rope(config)
    kind = check_rope(parameters, partial=family.rotary_factor is not None)
    own = {"layer_type": attention} if family.local_rope else {}
    turned = rotary_dims(config, config.head_dim)
    original = int(parameters.get("original_max_position_embeddings", config.max_position_embeddings))
    if kind == "default":
        pairs = torch.arange(turned // 2, dtype=torch.float64)
        short = long = parameters["rope_theta"] ** (-2 * pairs / turned)
        factor = 1.0
    else:
        frequencies = ROPE_INIT_FUNCTIONS[kind]
        short, factor = frequencies(config, torch.device("cpu"), seq_len=1, **own)
        long, _ = frequencies(config, torch.device("cpu"), seq_len=original + 1, **own)
    if factor != 1 and turned < config.head_dim and kind != "longrope":  # then query and key heads keep their size
        raise A3Error(
            f"config.json: RoPE type {kind!r} scales attention by {factor:g}, which is not supported "
            "with partial_rotary_factor; remove rope_scaling from config.json"
        )
    still = torch.zeros((config.head_dim - turned) // 2, dtype=torch.float64)
    return Rope(
        parameters={**parameters, "rope_type": kind},
        short=torch.cat([short.double(), still]),
        long=torch.cat([long.double(), still]),
        attention_factor=float(factor),
        context=int(config.max_position_embeddings),
        original_context=original,
    )


def no_rope(config: Any) -> Rope:
    """Return the rotation of a model without RoPE, or whose attention is carried: none of any pair."""
    still, context = torch.zeros(config.head_dim // 2, dtype=torch.float64), int(config.max_position_embeddings)
    return Rope({"rope_type": "none"}, still, still, 1.0, context, context)


def kept_rope_config(rope: Rope, slots: Sequence[float], *, linear_factor: bool = False) -> Json:
    """Return the config entries for `kept_parameters`."""
    return both_spellings(kept_parameters(rope, slots, linear_factor=linear_factor))


def kept_parameters(rope: Rope, slots: Sequence[float], *, linear_factor: bool = False) -> Json:
    """Return RoPE parameters that give slot `j` of a smaller head the rotation of source pair `slots[j]`.

    The frequency of a fractional pair is interpolated geometrically between its neighbours. Slots that are not rotated
    come last, as a `partial_rotary_factor`. `linear_factor` allows that form where pairs are evenly spaced.
    """
    turning = turning_slots(rope, slots)
    parameters = affine_parameters(rope, turning, linear_factor=linear_factor) or longrope_parameters(rope, turning)
    if not turning:
        parameters = {"rope_type": "default", "rope_theta": rope.theta}
    if "partial_rotary_factor" in rope.parameters:
        parameters = {**parameters, "partial_rotary_factor": rotary_factor(len(turning), len(slots))}
    return parameters


def turning_slots(rope: Rope, slots: Sequence[float]) -> list[float]:
    """Return the slots that are rotated: the first ones."""
    return [slot for slot in slots if slot < rope.turning]


def affine_parameters(rope: Rope, pairs: Sequence[float], *, linear_factor: bool = False) -> Json | None:
    """Return evenly spaced pairs `a + s·j` as a changed theta, or None where that is not exact.

    `theta^(-2(a+sj)/h) = theta^(-2a/h) · (theta^(s·r/h))^(-2j/r)`, r = 2·len(pairs): a new theta, and a
    linear factor `theta^(2a/h)`, which is written only if `linear_factor` allows it: some runtimes silently ignore it
    (`a3cli/runtimes`). llama3 scaling depends on each frequency, so it composes only when a = 0 and s is whole.
    yarn and longrope depend on the index of a pair and never compose.
    """
    if rope.kind not in ("default", "linear", "llama3") or not pairs:
        return None
    start = pairs[0]
    step = pairs[1] - start if len(pairs) > 1 else 1
    if any(abs(pair - start - step * j) > ROUNDING for j, pair in enumerate(pairs)):
        return None
    if start > 0 and not linear_factor:
        return None
    if rope.kind == "llama3" and (start > 0 or step != int(step)):
        return None
    h, r = 2 * rope.turning, 2 * len(pairs)
    parameters = {**rope.parameters, "rope_theta": rope.theta ** (step * r / h)}
    factor = float(parameters.get("factor", 1.0)) * rope.theta ** (2 * start / h)
    if rope.kind != "llama3" and factor != 1.0:
        parameters.update(rope_type="linear", factor=factor)
    return parameters


def evenly_spaced(rope: Rope, slots: Sequence[float], *, linear_factor: bool = False) -> list[list[float]]:
    """Return candidates of evenly spaced slots near the given ones that `affine_parameters` can write, best first.

    These are the line from pair 0 that is nearest to the slots, and the line over all pairs; with `linear_factor` also
    the nearest line from any pair, if the source's scaling composes with it. Slots that are not rotated stay the same.
    """
    turning = turning_slots(rope, slots)
    if not turning:
        return []
    last, count = rope.turning - 1, len(turning)
    places = torch.arange(count, dtype=torch.float64)
    wanted = torch.tensor(sorted(turning), dtype=torch.float64)
    longest = last / max(count - 1, 1)
    nearest = float((places * wanted).sum() / places.square().sum().clamp_min(1))
    lines = [(0.0, nearest), (0.0, longest)]
    if rope.kind == "llama3":
        lines = [(0.0, float(step)) for step in (round(nearest), int(longest)) if 1 <= step <= longest]
    # The Nemotron of transformers 4.57, the one family with partial RoPE, ignores linear factors.
    elif linear_factor and not rope.partial:
        lines.insert(0, nearest_line(wanted, last))
    spaced = [[min(max(a + s * j, 0.0), float(last)) for j in range(count)] for a, s in lines]
    written = [line for line in spaced if affine_parameters(rope, line, linear_factor=linear_factor) is not None]
    return [[*line, *slots[count:]] for line in _distinct(written)]


def _distinct(lines: list[list[float]]) -> list[list[float]]:
    return [line for i, line in enumerate(lines) if line not in lines[:i]]


def nearest_line(slots: torch.Tensor, last: int) -> tuple[float, float]:
    """Return start and step of the evenly spaced slots nearest to `slots` `[S]`, moved to lie between 0 and `last`."""
    places = torch.arange(len(slots), dtype=torch.float64)
    centred = places - places.mean()
    step = float((centred * slots).sum() / centred.square().sum().clamp_min(1e-12))
    start = min(max(float(slots.mean() - step * places.mean()), 0.0), last - step * (len(slots) - 1))
    return start, step


def longrope_parameters(rope: Rope, slots: Sequence[float]) -> Json:
    """Return any slots as longrope: `F_j = 1 / (frequency_j · theta^(2j/r))`, r = 2·len(slots)."""
    place = torch.tensor(slots, dtype=torch.float64)
    spacing = rope.theta ** (torch.arange(len(slots), dtype=torch.float64) / len(slots))
    # Only a longrope source switches tables, at its original context; elsewhere both are the same.
    original = rope.original_context if rope.kind == "longrope" or rope.growth else rope.context
    # vLLM and SGLang read these in place of attention_factor; transformers warns of them as unrecognised. Without
    # them, both take 1.0 where the context is not extended.
    scales = {"short_mscale": rope.attention_factor, "long_mscale": rope.attention_factor}
    if rope.attention_factor == 1.0 and original == rope.context:
        scales = {}
    return {
        "rope_type": "longrope",
        "rope_theta": rope.theta,
        "short_factor": (1 / (frequency_at(rope.short, place) * spacing)).tolist(),
        "long_factor": (1 / (frequency_at(rope.long, place) * spacing)).tolist(),
        "factor": max(1.0, rope.context / original),
        "attention_factor": rope.attention_factor,
        **scales,
        "original_max_position_embeddings": original,
        **rope.growth,
    }


def both_spellings(parameters: Json) -> Json:
    """Return `rope_parameters` for transformers 5, and `rope_theta` + `rope_scaling` for version 4."""
    beside: Json = {key: parameters[key] for key in ("rope_theta", "partial_rotary_factor") if key in parameters}
    scaling = {key: value for key, value in parameters.items() if key not in beside}
    config: Json = {
        **beside,
        "rope_scaling": None if scaling == {"rope_type": "default"} else scaling,
        "rope_parameters": parameters,
    }
    if parameters["rope_type"] == "longrope":  # where 4.57 looks for the context at which longrope switches
        config["original_max_position_embeddings"] = parameters["original_max_position_embeddings"]
    return config


def spellings_of_two(full: Json, sliding: Json) -> Json:
    """Return `both_spellings` of a model with one RoPE for full and another for sliding attention.

    The second is unscaled in transformers 4. For another one theta is null, and that version stops with an error
    instead of rotating otherwise.
    """
    return {
        **both_spellings(full),
        LOCAL_THETA: sliding["rope_theta"] if sliding["rope_type"] == "default" else None,
        "rope_parameters": {FULL: full, SLIDING: sliding},
    }


def strict_longrope(config: Json) -> Json:
    """Return config entries whose `rope_scaling` has only type and factors, which transformers 4 demands of Phi-3.

    RoPE that has more to say keeps it: that version then refuses the configuration instead of taking another RoPE.
    """
    scaling = config.get("rope_scaling") or {}
    if scaling.keys() - {"type", "original_max_position_embeddings"} != {"rope_type", "short_factor", "long_factor"}:
        return config
    plain = {"type": scaling["rope_type"], **{key: scaling[key] for key in ("short_factor", "long_factor")}}
    return {**config, "rope_scaling": plain}
