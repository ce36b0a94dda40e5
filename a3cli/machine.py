"""Where and in what precision a stage computes."""

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
