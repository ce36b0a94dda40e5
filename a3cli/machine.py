"""Where and in what precision a stage computes."""

import ctypes
from contextlib import suppress
from dataclasses import dataclass

import torch

from a3cli.errors import A3Error


@dataclass(frozen=True)
class Machine:
    device: torch.device
    dtype: torch.dtype


def choose_machine(device: str, dtype: str, source_dtype: torch.dtype) -> Machine:
    """`auto` is the GPU if there is one; float32 on the CPU, the checkpoint's own dtype on a GPU."""
    try:
        chosen = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    except RuntimeError:
        raise A3Error(f"--device {device!r} is no device; use auto, cpu, cuda or cuda:N") from None
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise A3Error(f"--device {device!r}: this machine has {torch.cuda.device_count()} CUDA devices")
    if chosen.type not in ("cpu", "cuda"):
        raise A3Error(f"--device {device!r} is not supported; use auto, cpu, cuda or cuda:N")
    if dtype != "auto":
        return Machine(chosen, getattr(torch, dtype))
    return Machine(chosen, torch.float32 if chosen.type == "cpu" else source_dtype)


def return_freed_memory() -> None:
    """From now on, make glibc give memory of more than 1 MiB back to the system as soon as it is freed.

    Left alone, it keeps pieces of up to 32 MiB, and the holes that activations leave in its heap outweigh a layer.
    """
    mmap_threshold = -3  # M_MMAP_THRESHOLD of malloc.h
    with suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).mallopt(mmap_threshold, 1 << 20)
