"""Apply a solution to a layer's weights: tensors in, tensors out.

Products are computed in float64, those of half-precision weights in float32: the rounding of such weights is thousands
of times as coarse, and these products are most of an export's time.

A layer's solution has, for a QK rank r < h, an OV rank s < h (the same in the stock shape) and an MLP width m < I:

    pairs [r/2]               kept RoPE pairs: dims are copied          (paper), or
    query_map, key_map [K, h, r]   W_q ← W_q · map, W_k ← W_k · map     (best)
    query_norm, key_norm [r]  what the smaller heads' norms multiply by, where the family has these  (best)
    value_map [K, h, s]       W_v ← W_v · map
    output_map [K, s, h]      W_o,i ← map · W_o,i                       (paper), or
    output_weight [d, H·s]    the refit output projection itself        (best)
    channels [m]              kept MLP channels, ascending
    down_weight [d, m]        the refit down projection itself          (best; else columns are copied)
    down_bias [d]             its bias plus the mean output of the dropped channels, where the MLP has biases   (best)

With experts, `channels` `[E, m]` and `down_weight` `[E, d, m]` have an entry for each (`experts.of_expert`); that of an
expert that is not refit has the source's columns.

Each of the three groups, QK, OV and MLP, is absent where the layer keeps that component; a sequential solution has the
refit `output_weight` and `down_weight` of every layer, and `gate_weight` and `up_weight` `[m, d]`.
"""

from collections.abc import Iterator

import torch

from a3cli.models.families import ModelShape, Role
from a3cli.models.families.base import HEAD_NORM_ROLES, pair_dims
from a3cli.solvers.moments import Tensors

# What a solution calls the weights of norms; it has none of the MLP's.
NORMS: dict[Role, str] = {"q_norm": "query_norm", "k_norm": "key_norm", "mlp_norm": ""}
PIECE = 1 << 22  # bytes of a weight that are projected at a time


def apply_projection(
    tensor: torch.Tensor, role: Role, solution: Tensors, shape: ModelShape, *, fold_scale: bool
) -> torch.Tensor:
    """Return a smaller weight `[out, in]` or bias `[out]` of one role; the tensor itself if nothing changes it.

    With `fold_scale` queries are multiplied by `(r/h)^½`, so that the source's softmax scale `h^-½` survives a loader
    that computes `r^-½` from the smaller head; behind a norm the norm's weights are.
    """
    if role in NORMS or (tensor.ndim == 1 and role in ("o", "down")):
        return _norm_or_bias(tensor, role, solution, shape, fold_scale=fold_scale)
    if role in ("gate", "up", "down"):
        return _keep_channels(tensor, role, solution)
    if role in ("q", "k"):
        kept = _keep_queries_or_keys(tensor, role, solution, shape)
        factor = 1.0 if "query_norm" in solution else (kept.shape[0] / tensor.shape[0]) ** 0.5
        return kept.to(_exact(kept)) * factor if fold_scale and role == "q" and factor != 1 else kept
    if role == "o" and "output_weight" in solution:
        return solution["output_weight"]
    if "value_map" not in solution:
        return tensor
    return _map_heads(tensor, solution["value_map"]) if role == "v" else _map_outputs(tensor, solution, shape)


def pieces(
    tensor: torch.Tensor, role: Role, solution: Tensors, shape: ModelShape
) -> Iterator[tuple[torch.Tensor, Tensors]]:
    """Yield groups of rows of a weight, each with its part of the solution, for `apply_projection`.

    Groups are small enough to stay in the processor's cache until they are written.
    """
    rows = _rows_at_once(tensor, role, shape)
    for start in range(0, len(tensor), rows):
        part = tensor[start : start + rows]
        yield part, _solution_of_rows(solution, role, start, start + len(part), shape)


def _rows_at_once(tensor: torch.Tensor, role: Role, shape: ModelShape) -> int:
    """Return how many rows a group has: whole KV heads or query groups, any number of other rows, all of a bias."""
    if tensor.ndim == 1:
        return len(tensor)
    together = {"q": shape.group * shape.head_dim, "k": shape.head_dim, "v": shape.head_dim}.get(role, 1)
    return together * max(1, PIECE // (together * tensor.shape[1] * tensor.itemsize))


def _solution_of_rows(solution: Tensors, role: Role, start: int, stop: int, shape: ModelShape) -> Tensors:
    """Return the part of a solution for rows `start` to `stop` of a weight of this role."""
    if role in ("q", "k", "v"):
        rows = shape.head_dim * (shape.group if role == "q" else 1)
        heads = slice(start // rows, stop // rows)
        return {name: value[heads] if name.endswith("_map") else value for name, value in solution.items()}
    if role in ("gate", "up") and "channels" in solution:
        channels = solution["channels"]
        first, last = torch.searchsorted(channels, torch.tensor([start, stop])).tolist()
        kept, refit = slice(first, last), f"{role}_weight"
        return {"channels": channels[kept] - start, **({refit: solution[refit][kept]} if refit in solution else {})}
    own = slice(start, stop)  # heads and channels are in the columns of these rows
    return {name: value[own] if name.endswith("_weight") else value for name, value in solution.items()}


def _keep_channels(tensor: torch.Tensor, role: Role, solution: Tensors) -> torch.Tensor:
    """Return an MLP weight or bias with the kept channels, or the refit weight."""
    if tensor.ndim == 2 and f"{role}_weight" in solution:
        return solution[f"{role}_weight"]
    if "channels" not in solution:
        return tensor
    channels = solution["channels"]
    return _take_columns(tensor, channels) if role == "down" else tensor.index_select(0, channels.to(tensor.device))


def _norm_or_bias(
    tensor: torch.Tensor, role: Role, solution: Tensors, shape: ModelShape, *, fold_scale: bool
) -> torch.Tensor:
    """Return the weight of a norm, `[r]` behind smaller queries or keys, or a bias of the width of the model."""
    smaller = solution.get(NORMS.get(role, f"{role}_bias"), tensor)
    factor = (len(smaller) / len(tensor)) ** 0.5 if fold_scale and role == "q_norm" else 1.0
    scaled = smaller if factor == 1 else smaller * factor
    return scaled - shape.norm_offset if smaller is not tensor and role in HEAD_NORM_ROLES else scaled


def _take_columns(tensor: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Return `tensor[:, columns]`; on the CPU with numpy, which takes a third of the time."""
    if tensor.device.type != "cpu" or tensor.requires_grad:
        return tensor[:, columns]
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize]
    taken = tensor.view(integers).numpy().take(columns.numpy(), axis=1)
    return torch.from_numpy(taken).view(tensor.dtype)


def _keep_queries_or_keys(tensor: torch.Tensor, role: Role, solution: Tensors, shape: ModelShape) -> torch.Tensor:
    """Return a query or key weight or bias with the kept pairs, or mapped to the smaller heads."""
    if "pairs" in solution:
        dims = kept_dims(solution["pairs"], shape)
        return tensor.view(-1, shape.head_dim, *tensor.shape[1:]).index_select(1, dims.to(tensor.device)).flatten(0, 1)
    if "query_map" not in solution:
        return tensor
    return _map_heads(
        tensor, solution["key_map"] if role == "k" else solution["query_map"].repeat_interleave(shape.group, 0)
    )


def kept_dims(pairs: torch.Tensor, shape: ModelShape) -> torch.Tensor:
    """Return the source's dims `[r]`, in its own order, of a head that keeps these pairs `[r/2]`, ascending."""
    full, turning = shape.head_dim // 2, shape.turning_pairs
    sources = torch.tensor(pair_dims(full, turning))[torch.cat([pairs, pairs + full])]
    kept = torch.empty_like(sources)
    kept[pair_dims(len(pairs), int((pairs < turning).sum()))] = sources
    return kept


def head_maps(solution: Tensors, shape: ModelShape) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the query and key maps `[K, h, r]` of a layer whose QK is cut, kept pairs as maps too."""
    if "query_map" in solution:
        return solution["query_map"], solution["key_map"]
    dims = kept_dims(solution["pairs"], shape)
    chosen = torch.eye(shape.head_dim, dtype=torch.float64)[:, dims].expand(shape.kv_heads, -1, -1)
    return chosen, chosen


def _map_heads(tensor: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """Map a weight `[n·h, d]` or bias `[n·h]` with `[n, h, r]` to `[n·r, …]`."""
    heads, exact = tensor.view(*maps.shape[:2], *tensor.shape[1:]), _exact(tensor)
    return torch.cat([each.mT @ head.to(exact) for each, head in zip(maps.to(exact), heads, strict=True)])


def _map_outputs(tensor: torch.Tensor, solution: Tensors, shape: ModelShape) -> torch.Tensor:
    """Map an output weight `[d, H·h]` to `[d, H·r]`."""
    heads, exact = tensor.view(len(tensor), shape.heads, shape.head_dim), _exact(tensor)
    maps = solution["output_map"].to(exact)
    return torch.cat([heads[:, i].to(exact) @ maps[i // shape.group].mT for i in range(shape.heads)], dim=1)


def _exact(tensor: torch.Tensor) -> torch.dtype:
    return torch.float32 if tensor.itemsize == 2 else torch.float64
