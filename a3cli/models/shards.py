"""Plan and write safetensors files: weights in, files and their hashes out.

Tensors stream through `write_shard` some rows at a time, so a file may be larger than memory.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from a3cli.models.checkpoint import DTYPES
from a3cli.models.hub import SINGLE
from a3cli.work.files import name_hash
from a3cli.work.writer import HashingWriter

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor that will be written; `source` is its name in the source's class, if that is another."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    source: str = ""

    @property
    def source_name(self) -> str:
        return self.source or self.name

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def plan_shards(tensors: Iterable[PlannedTensor], max_bytes: int) -> dict[str, list[PlannedTensor]]:
    """Return the tensors of each weight file by its name, in order.

    No file exceeds `max_bytes`, except for a larger tensor, which gets a file of its own.
    """
    groups: list[list[PlannedTensor]] = []
    size = max_bytes + 1
    for tensor in tensors:
        if size + tensor.bytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.bytes
    count = len(groups)
    names = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    return dict(zip(names, groups, strict=True))


def write_shard(path: Path, planned: list[PlannedTensor], rows: Iterable[torch.Tensor]) -> str:
    """Write one safetensors file and return its hash.

    `rows` yields the planned tensors in order, each as pieces of consecutive rows. Raises ValueError if they differ
    from the plan.
    """
    pieces = (piece for piece in rows if piece.nbytes)
    with HashingWriter(path) as file:
        file.write(encode_header(planned))
        for tensor in planned:
            left = tensor.bytes
            while left:
                piece = next(pieces, None)
                if piece is None:
                    raise ValueError(f"planned {tensor}, got {left} bytes less")
                left -= piece.nbytes
                if left < 0 or piece.shape[1:] != tensor.shape[1:] or piece.dtype != tensor.dtype:
                    raise ValueError(f"planned {tensor}, got {tuple(piece.shape)} {piece.dtype}")
                file.write(tensor_bytes(piece))
        if (piece := next(pieces, None)) is not None:
            raise ValueError(f"planned nothing more, got {tuple(piece.shape)} {piece.dtype}")
    return name_hash(file.digest)


def encode_header(planned: list[PlannedTensor]) -> bytes:
    """Return what a safetensors file begins with: the header's length, and the header in JSON."""
    offset, header = 0, dict[str, Any](__metadata__={"format": "pt"})
    for tensor in planned:
        header[tensor.name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.bytes],
        }
        offset += tensor.bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the little-endian bytes of a tensor, without a copy if it is contiguous on the CPU."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data


def write_index(path: Path, shards: dict[str, list[PlannedTensor]]) -> None:
    """Write the index that names the weight file of each tensor."""
    index = {
        "metadata": {"total_size": sum(t.bytes for tensors in shards.values() for t in tensors)},
        "weight_map": {t.name: shard for shard, tensors in shards.items() for t in tensors},
    }
    path.write_text(json.dumps(index, indent=2) + "\n", "utf-8")
