"""The full-size reference of an export: the source with the same solution applied, streamed layer by layer.

It uses the source's stock class and sizes. Weights that a solution drops are zero; those that it mixes are in the first
dims of the full head:

    pairs                  rows of the other pairs are zero, RoPE as in the source               (paper), or
    query_map, key_map     slot j is in pair j with the frequency that `rope_slots[j]` says, unrotated slots are among
                           the unrotated dims, the rest is zero   (best)
    query_norm, key_norm   the norm's weights times (r/h)^½ at the dims of the slots, the heads before it times (h/r)^½,
                           so that their mean square over all h dims is that over the r dims of the smaller head
    value_map              the mixed value in the first dims of each head, the rest zero, and so the columns of
                           `output_weight` or `output_map`
    channels               columns of the down projection of the other channels are zero; `gate_weight` and `up_weight`
                           are the rows of the kept ones

None of the export's arithmetic is used: no smaller class, no projected shapes, no scale folded into queries, no RoPE
written to a configuration. Both share only the solution's files and the code that reads the source.
"""

from collections.abc import Callable, Sequence

import torch

from a3cli.errors import A3Error
from a3cli.models.experts import of_expert
from a3cli.models.families import Role
from a3cli.models.families.base import HEAD_NORM_ROLES, pair_dims
from a3cli.models.fused import change_roles
from a3cli.models.model import Model
from a3cli.solvers.moments import Tensors
from a3cli.stream.batches import embed_in_memory, run_in_turn
from a3cli.stream.decoder import Arguments, Decoder
from a3cli.work.machine import Machine
from a3cli.work.progress import Progress, reporting

ATTENTION = {"pairs", "query_map", "key_map", "query_norm", "key_norm", "value_map", "output_map", "output_weight"}
KNOWN = ATTENTION | {"channels", "gate_weight", "up_weight", "down_weight", "down_bias"}


class FullSizeReference(Decoder):
    """The source with a solution applied in place; with `rounded`, each weight is rounded to that dtype.

    `slots` has the RoPE slots of each layer with smaller heads.
    """

    def __init__(
        self,
        model: Model,
        machine: Machine,
        solution: Callable[[int], Tensors],
        slots: Sequence[Sequence[float]],
        *,
        rounded: Callable[[torch.dtype], torch.dtype] | None = None,
    ) -> None:
        self._solution, self._slots, self._rounded = solution, slots, rounded
        super().__init__(model, machine)

    def read(self, tensor: str, shape: torch.Size) -> torch.Tensor:
        value = super().read(tensor, shape)
        stored = value.dtype
        if found := self.family.find_roles(tensor):
            layer, roles, kind = found
            shapes, solution = self.shape.linear_shapes(), of_expert(self._layer_solution(layer), tensor, self.family)
            value = change_roles(
                value, self.family, roles, shapes, lambda role, own: self._change(own, layer, role, kind, solution)
            )
        return value if self._rounded is None else value.to(self._rounded(stored))

    def _layer_solution(self, layer: int) -> Tensors:
        solution = self._solution(layer)
        if unknown := solution.keys() - KNOWN - {"unchanged"}:
            raise A3Error(f"layer {layer}: the reference does not know what {', '.join(sorted(unknown))} does")
        return solution

    def _change(self, value: torch.Tensor, layer: int, role: Role, kind: str, solution: Tensors) -> torch.Tensor:
        if role in HEAD_NORM_ROLES:
            return self._place_norm(value, layer, "query_norm" if role == "q_norm" else "key_norm")
        return self._apply(value, layer, role, kind, solution)

    def _apply(self, value: torch.Tensor, layer: int, role: Role, kind: str, solution: Tensors) -> torch.Tensor:
        if role in ("q", "k"):
            return self._place_slots(value, layer, role, solution)
        if role == "v" and "value_map" in solution:
            mapped = mixed(self._heads(value), solution["value_map"])
            return self._placed(mapped, range(mapped.shape[1]))
        if role == "o" and kind == "weight":
            return self._place_outputs(value, solution)
        if role == "down" and kind == "bias":
            return solution.get("down_bias", value)
        if role in ("gate", "up", "down") and kind == "weight":
            return self._place_channels(value, role, solution)
        return value

    def _place_channels(self, value: torch.Tensor, role: Role, solution: Tensors) -> torch.Tensor:
        """Return gate, up `[I, d]` or down `[d, I]` with kept channels in place, refit or not, others zero."""
        if "channels" not in solution and f"{role}_weight" not in solution:
            return value
        rows = value.mT if role == "down" else value
        channels = solution.get("channels", torch.arange(len(rows)))
        refit = solution.get(f"{role}_weight")
        kept = torch.zeros(rows.shape, dtype=torch.float64)
        kept[channels] = (rows[channels] if refit is None else refit.mT if role == "down" else refit).double()
        return kept.mT if role == "down" else kept

    def _place_slots(self, value: torch.Tensor, layer: int, role: Role, solution: Tensors) -> torch.Tensor:
        """Return rows of q or k, `[n·h, …]`: kept pairs in place, or slot j in pair j."""
        half = self.shape.head_dim // 2
        if "pairs" in solution:
            every = pair_dims(half, self.shape.turning_pairs)
            dims = [every[pair + second] for second in (0, half) for pair in solution["pairs"].tolist()]
            return self._placed(self._heads(value)[:, dims].double(), dims)
        if "query_map" not in solution:
            return value
        mapped = mixed(self._heads(value), solution["query_map" if role == "q" else "key_map"])
        if "query_norm" in solution:
            mapped *= (self.shape.head_dim / mapped.shape[1]) ** 0.5
        return self._placed(mapped, self._dims_of_slots(layer, mapped.shape[1]))

    def _place_norm(self, value: torch.Tensor, layer: int, name: str) -> torch.Tensor:
        """Return the weights `[h]` of a norm: those of smaller heads in the dims of their slots, the rest zero."""
        if (smaller := self._layer_solution(layer).get(name)) is None:
            return value
        scaled = smaller.double() * (len(smaller) / self.shape.head_dim) ** 0.5
        return self._placed(scaled[None, :, None], self._dims_of_slots(layer, len(smaller))) - self.shape.norm_offset

    def _dims_of_slots(self, layer: int, rank: int) -> list[int]:
        """Return the dims of the full head that hold a smaller head: slot j in pair j, then the unrotated dims."""
        turning = self.shape.turning_pairs
        slots = sum(slot < turning for slot in self._slots[layer])
        still = range(2 * turning, 2 * turning + rank - 2 * slots)
        return [*range(slots), *range(turning, turning + slots), *still]

    def _place_outputs(self, value: torch.Tensor, solution: Tensors) -> torch.Tensor:
        """Return the output projection `[d, H·h]` for values in the first dims of each head."""
        heads = value.view(len(value), self.shape.heads, self.shape.head_dim)
        if "output_weight" in solution:
            wanted = solution["output_weight"].view(len(value), self.shape.heads, -1).double()
        elif "output_map" in solution:
            maps = solution["output_map"][[i // self.shape.group for i in range(self.shape.heads)]]
            wanted = torch.einsum("dih,ish->dis", heads.double(), maps)
        else:
            return value
        placed = torch.zeros(heads.shape, dtype=torch.float64)
        placed[:, :, : wanted.shape[2]] = wanted
        return placed.flatten(1)

    def _heads(self, value: torch.Tensor) -> torch.Tensor:
        """Reshape `[n·h, …]` to `[n, h, d]`, with d = 1 for a bias."""
        return value.reshape(-1, self.shape.head_dim, value.shape[1] if value.ndim == 2 else 1)

    def _placed(self, heads: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
        """Put rows `[n, r, d]` at `dims` of zero full heads: `[n·h, d]`, or `[n·h]` for a bias."""
        full = torch.zeros(len(heads), self.shape.head_dim, heads.shape[2], dtype=torch.float64)
        full[:, list(dims)] = heads
        return full.flatten(0, 1).squeeze(-1) if heads.shape[2] == 1 else full.flatten(0, 1)

    def mixes_slots(self, layer: int) -> bool:
        """Return whether a layer's slots have other frequencies than the source's pairs."""
        return self.family.rotates and "query_map" in self._solution(layer)


def mixed(heads: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """Apply the maps `[K, h, r]` of their groups to heads `[n, h, d]`; return `[n, r, d]` float64."""
    own = maps.double().repeat_interleave(len(heads) // len(maps), 0)
    return torch.einsum("nhd,nhr->nrd", heads.double(), own)


def turn_slots(arguments: Arguments, slots: Sequence[float]) -> Arguments:
    """Return a layer's arguments with `position_embeddings` of slot j in pair j and no rotation of other pairs.

    The frequencies are read from the source's cos and sin `[1, T, h]` at the first two positions. Slots beyond the
    rotated pairs are not rotated.
    """
    cos, sin = (table.double() for table in arguments["position_embeddings"])
    half = cos.shape[-1] // 2
    factor, frequency = cos[0, 0, :1], torch.atan2(sin[0, 1, :half], cos[0, 1, :half])
    place = torch.tensor([slot for slot in slots if slot < half], dtype=torch.float64, device=cos.device)
    low = place.floor().long().clamp(max=half - 1)
    share, high = place - low, (low + 1).clamp(max=half - 1)
    turned = frequency[low] ** (1 - share) * frequency[high] ** share
    angle = torch.zeros(cos.shape[1], half, dtype=torch.float64, device=cos.device)
    angle[:, : len(place)] = torch.arange(cos.shape[1], device=cos.device)[:, None] * turned
    table = torch.cat([angle, angle], -1)[None]
    return {**arguments, "position_embeddings": (table.cos() * factor, table.sin() * factor)}


@torch.inference_mode()
def reference_logits(
    exact: FullSizeReference,
    rounded: FullSizeReference,
    slots: Sequence[Sequence[float]],
    tokens: torch.Tensor,
    progress: Progress,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits of both for tokens `[B, T]`, float32 `[B, T, V]` on the CPU; one layer at a time is in memory.

    `exact` should compute in float64: the frequencies of mixed slots are read from its rotations.
    """
    pair = (exact, rounded)
    streams = [(each, *embed_in_memory(each, tokens, len(tokens), each.machine.device)) for each in pair]
    ours, theirs = (calls[len(tokens)] for _, _, calls, _ in streams)
    layers = exact.shape.layers
    with reporting(progress, "computing the reference", len(pair) * layers, "layers") as finished:
        for index in range(layers):  # both models in turn: a layer's solution is read once, and its weights are cached
            if exact.mixes_slots(index):
                ours[index] = turn_slots(ours[index], slots[index])
                turned = tuple(table.to(rounded.machine.dtype) for table in ours[index]["position_embeddings"])
                theirs[index] = {**theirs[index], "position_embeddings": turned}
            run_in_turn(streams, index, finished)
        answers = []
        for each, states, _, _ in streams:
            with each.head() as head:
                answers.append(head(states.values).float().cpu())
    return answers[0], answers[1]
