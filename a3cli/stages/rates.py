"""The speeds that estimates of seconds need: stated by the user, measured here, or assumed."""

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from a3cli.errors import A3Error
from a3cli.settings import PlanSettings
from a3cli.work.files import Json
from a3cli.work.writer import HashingWriter

# Defaults for an unknown machine: a solid-state disk, a desktop's cores, one data-centre GPU.
DISK_GBPS = 2.0
TFLOPS = {"cpu": 0.3, "cuda": 200.0}
SOLVE_TFLOPS = {"cpu": 0.15, "cuda": 10.0}  # float64
STARTUP = 4.2  # seconds until a stage starts to work
NEEDED = "import a3cli.stages.calibrate; from transformers import AutoTokenizer, LlamaConfig; LlamaConfig()"


@dataclass(frozen=True)
class Rates:
    """Seconds to start a stage, disk bytes per second, FLOPs per second in the calibration's dtype and in float64.

    `origin` says where each comes from.
    """

    start: float
    disk: float
    compute: float
    solve: float
    origin: Json


def find_rates(settings: PlanSettings, dtype: str) -> Rates:
    """Return the given rates; others are measured with `--measure`, or assumed."""
    kind = settings.devices.partition(":")[0].partition(",")[0]
    stated = {
        "start": settings.start_seconds,
        "disk": settings.disk_gbps,
        "compute": settings.tflops,
        "solve": settings.solve_tflops,
    }
    assumed = {"start": STARTUP, "disk": DISK_GBPS, "compute": TFLOPS[kind], "solve": SOLVE_TFLOPS[kind]}
    found, origin = {}, {}
    for name, value in stated.items():
        if value is not None:
            found[name], origin[name] = value, "stated"
        elif settings.measure:
            found[name], origin[name] = measure(name, kind, dtype), "measured"
        else:
            found[name], origin[name] = assumed[name], "assumed"
    return Rates(found["start"], found["disk"] * 1e9, found["compute"] * 1e12, found["solve"] * 1e12, origin)


def measure(what: str, kind: str, dtype: str) -> float:
    """Measure the seconds to start a stage, GB/s of the current folder's disk, or TFLOP/s of matrix products."""
    if what == "start":
        return min(start_time() for _ in range(2))  # the first one may read everything from the disk
    if what == "disk":
        return disk_speed(Path.cwd()) / 1e9
    return product_speed(kind, dtype if what == "compute" else "float64") / 1e12


def start_time() -> float:
    """Return the seconds in which a process imports the libraries that every stage needs."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", NEEDED], check=True, capture_output=True)  # noqa: S603, our own line
    return time.perf_counter() - started


def disk_speed(folder: Path, size: int = 1 << 28) -> float:
    """Return bytes per second of writing as an export does and reading back, the slower of the two."""
    part = os.urandom(1 << 20)
    with tempfile.TemporaryDirectory(prefix=".a3-plan-", dir=folder) as own:
        path = Path(own) / "file"
        started = time.perf_counter()
        with HashingWriter(path) as written:
            for _ in range(size // len(part)):
                written.write(part)
        wrote = time.perf_counter() - started
        with path.open("rb", buffering=0) as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            started = time.perf_counter()
            while file.read(len(part)):
                pass
            return size / max(wrote, time.perf_counter() - started)


def product_speed(kind: str, dtype: str) -> float:
    """Return FLOPs per second of products of square matrices. Raises A3Error for a missing device."""
    if kind == "cuda" and not torch.cuda.is_available():
        raise A3Error("--measure: this machine has no CUDA device; give --tflops and --solve-tflops, or --devices cpu")
    size = 8192 if kind == "cuda" else 2048  # fills the device
    matrix = torch.randn(size, size, dtype=torch.float32, device=kind).to(getattr(torch, dtype))
    done, elapsed = 0, 0.0
    (matrix @ matrix)[0, 0].item()  # warm up
    started = time.perf_counter()
    while elapsed < 0.5:
        product = matrix @ matrix
        product[0, 0].item()  # waits for a GPU
        done, elapsed = done + 1, time.perf_counter() - started
    return 2 * size**3 * done / elapsed
