"""The device and precision of a stage, and how much memory is free."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from a3cli.errors import A3Error, OutOfMemory, first_line

# Messages of CUDA's own calls, also for pinned memory; accelerate knows those of PyTorch's allocators.
CUDA_IS_FULL = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUSOLVER_STATUS_ALLOC_FAILED")
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h


@dataclass(frozen=True)
class Machine:
    """The `device` and dtype of a stage. A sweep with several `devices` puts consecutive layers on them in turn."""

    device: torch.device
    dtype: torch.dtype
    devices: tuple[torch.device, ...] = ()

    @property
    def copies(self) -> bool:
        """Return whether the device has its own memory, so that copying in a thread pays."""
        return self.device.type != "cpu"

    def describe(self) -> dict[str, str]:
        """Return the properties that rounding depends on, for a request: files with different ones are not resumed."""
        return {"device": self.device.type, "dtype": str(self.dtype).removeprefix("torch.")}

    def free_memory(self) -> int:
        """Return the free bytes of the device, or of the fullest one."""
        return min(free_memory(device) for device in self.devices or (self.device,))


def choose_machine(device: str, dtype: str, source_dtype: torch.dtype, *, devices: str | None = None) -> Machine:
    """Return the machine for these options. Raises A3Error if they contradict each other.

    `auto` is the GPU if there is one; the dtype is float32 on the CPU and the checkpoint's own on a GPU. `devices` is a
    list like `cuda:0,cuda:1`, in place of `device`; several processes on a machine divide it.
    """
    if devices is not None and device != "auto":
        raise A3Error(f"--devices {devices} and --device {device} contradict each other: give one of them")
    names = own_part(devices) if devices is not None else [device]
    option = "--device" if devices is None else "--devices"
    chosen = tuple(find_device(name, option) for name in names)
    if len({each.type for each in chosen}) > 1:
        raise A3Error(f"--devices {devices}: all must be of one kind")
    first = chosen[0]
    kind = getattr(torch, dtype) if dtype != "auto" else torch.float32 if first.type == "cpu" else source_dtype
    return Machine(first, kind, chosen)


def own_part(devices: str) -> list[str]:
    """Return this process's devices. Raises A3Error if the list cannot be divided evenly among the processes."""
    names = [name.strip() for name in devices.split(",")]
    rank, count = (int(os.environ.get(f"LOCAL_{name}", default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    if len(names) % count:
        raise A3Error(f"--devices {devices}: {len(names)} devices cannot be divided among {count} processes")
    each = len(names) // count
    return names[rank * each : (rank + 1) * each]


def find_device(name: str, option: str) -> torch.device:
    """Return the device of this name. Raises A3Error if it does not exist."""
    try:
        chosen = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError:
        raise A3Error(f"{option} {name!r} is not a device; use auto, cpu, cuda or cuda:N") from None
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise A3Error(f"{option} {name!r}: this machine has {torch.cuda.device_count()} CUDA devices")
    if chosen.type not in ("cpu", "cuda"):
        raise A3Error(f"{option} {name!r} is not supported; use auto, cpu, cuda or cuda:N")
    return chosen


def free_memory(device: torch.device) -> int:
    """Return the bytes that this process can still allocate on a device.

    On the CPU: without swapping, within the container's limit, divided by the number of this run's processes there.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    free: int = psutil.virtual_memory().available
    with suppress(OSError, ValueError):  # no such files, or no limit ("max")
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        statistics = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(statistics.get("inactive_file", 0)))  # pages that can be reclaimed
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextmanager
def explaining_memory() -> Iterator[None]:
    """Raise OutOfMemory if torch runs out of memory, on any device."""
    try:
        yield
    except RuntimeError as error:
        if problem := out_of_memory(error):
            raise problem from error
        raise


def out_of_memory(error: RuntimeError) -> OutOfMemory | None:
    """Return an OutOfMemory for torch's error, or None if it has another cause."""
    from accelerate.utils.memory import should_reduce_batch_size

    if not error.args or not isinstance(error.args[0], str):  # the parser's exit is a RuntimeError too
        return None
    if not should_reduce_batch_size(error) and not any(words in error.args[0] for words in CUDA_IS_FULL):
        return None
    return OutOfMemory(f"no memory left: {first_line(error)}; try a smaller --batch-size or --device cpu")


def load_linear_algebra(device: torch.device) -> None:
    """Load a GPU's linear algebra before threads use it: PyTorch's first call must not come from two threads."""
    if device.type == "cuda":
        torch.linalg.inv(torch.eye(1, device=device))


def return_freed_memory(*, batches: bool = False) -> None:
    """Make glibc return memory of more than 1 MiB to the system as soon as it is freed.

    By default glibc comes to keep pieces of up to 32 MiB, and the holes that activations leave in its heap exceed a
    layer's size. The cost is that memory is mapped again each time; torch uses large pages for that if they are enabled
    before its first allocation. With many equal `batches` or layers, keeping pieces of up to 16 MiB pays off.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    with suppress(AttributeError, OSError, TypeError):  # another C library
        allocator = ctypes.CDLL(None)
        allocator.mallopt(MMAP_THRESHOLD, (16 if batches else 1) << 20)
        allocator.mallopt(TRIM_THRESHOLD, 256 << 20 if batches else 128 << 10)
