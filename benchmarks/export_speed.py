"""Compare export with `cp` of the same number of bytes, in one run.

This makes a random checkpoint (`--shape 1b`, bfloat16), calibrates it on two short blocks and solves (`--method paper`;
with `--method best` the solution itself is large and is read too). It then times `--repeats` times, alternating:

export   `a3 export` minus the process's start and imports (timed separately: `a3 --version` with torch and transformers
         imported)
cp       `cp` of a file of half the bytes that export reads and writes (source, solution, result), and `sync` of it
BLAKE3   hashing the files that export writes, on one core: the lower bound of an export

Every file is read once before, so that both find it in memory if it fits, and nothing waits to be written. Both start
after the same delay as a process's start, in which a virtual machine may reclaim freed memory, and both end on the
disk. The table has the median of each and their ratio; the exit code is 1 if it is above 1.5.

    python benchmarks/export_speed.py [--folder DIR]          # about 8 GB of disk
    python benchmarks/export_speed.py --shape tiny            # seconds; the ratio means nothing at this size
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from random_checkpoint import SHAPES, make_in_a_child, make_text, run

from a3cli.work.files import hash_file

LIMIT = 1.5
IMPORTS = (
    "-c",
    # Also the model's class, with which an export compares the source.
    "import a3cli.cli.app, a3cli.stages.export; from transformers import LlamaForCausalLM, AutoTokenizer; "
    "LlamaForCausalLM",
)


def prepare(folder: Path, arguments: argparse.Namespace) -> None:
    make_in_a_child(folder / "source", arguments.shape, arguments.layers)
    text = ["--dataset", make_text(folder / "text.txt"), "--samples", 2, "--seq-len", 128]
    kind = "diagonal" if arguments.method == "paper" else "full"
    work = ["--work", folder / "work", "--quiet"]
    run("-m", "a3cli", "calibrate", folder / "source", *text, "--mlp-stats", kind, *work)
    budgets = ["--attention-budget", 0.25, "--mlp-budget", 0.25, "--ridge", 1e-2]
    run("-m", "a3cli", "solve", *budgets, "--method", arguments.method, *work)


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def read_all(*folders: Path) -> None:
    for file in (file for folder in folders for file in folder.rglob("*.safetensors")):
        with file.open("rb") as opened:
            while opened.read(1 << 24):
                pass


def time_export(folder: Path) -> float:
    shutil.rmtree(folder / "out", ignore_errors=True)
    read_all(folder / "source", folder / "work" / "solution")
    os.sync()
    measured = run("-m", "a3cli", "export", folder / "out", "--work", folder / "work", "--quiet")
    return measured.seconds - run(*IMPORTS).seconds


def time_copy(folder: Path, size: int) -> float:
    original, copy = folder / "original", folder / "copy"
    if not original.exists() or original.stat().st_size != size:
        with original.open("wb") as file:
            for file_of_source in sorted((folder / "source").glob("*.safetensors")) * 4:
                with file_of_source.open("rb") as source:
                    while file.tell() < size and (part := source.read(min(1 << 24, size - file.tell()))):
                        file.write(part)
    copy.unlink(missing_ok=True)
    read_all(folder / "source")
    with original.open("rb") as file:
        while file.read(1 << 24):
            pass
    os.sync()
    run(*IMPORTS)
    started = time.perf_counter()
    subprocess.run(["cp", original, copy], check=True)
    subprocess.run(["sync", copy], check=True)
    return time.perf_counter() - started


def time_hash(folder: Path) -> float:
    read_all(folder)
    started = time.perf_counter()
    for file in folder.rglob("*.safetensors"):
        hash_file(file)
    return time.perf_counter() - started


def measure(folder: Path, arguments: argparse.Namespace) -> bool:
    """Print the table; return False if export is too slow."""
    prepare(folder, arguments)
    exports, copies = [time_export(folder)], []
    source, solution = size_of(folder / "source"), size_of(folder / "work" / "solution")
    written = size_of(folder / "out")
    for _ in range(arguments.repeats):
        copies.append(time_copy(folder, (source + solution + written) // 2))
        exports.append(time_export(folder))
    export, copy = statistics.median(exports[1:]), statistics.median(copies)
    hashing = time_hash(folder / "out")
    print(f"source {source / 1e9:.2f} GB, solution {solution / 1e9:.2f} GB, export {written / 1e9:.2f} GB")
    print(f"{'':10}{'seconds':>10}{'GB/s read + written':>22}")
    for name, seconds in (("export", export), ("cp", copy)):
        print(f"{name:10}{seconds:>10.2f}{(source + solution + written) / seconds / 1e9:>22.2f}")
    print(f"{'BLAKE3':10}{hashing:>10.2f}")
    print(f"ratio {export / copy:.2f} (limit {LIMIT})")
    return export <= LIMIT * copy


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where to make a temporary folder (default: the system's place)")
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--method", choices=("paper", "best"), default="paper")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="a3-export-", dir=arguments.folder) as folder:
        within = measure(Path(folder), arguments)
    return 0 if within or arguments.shape == "tiny" else 1


if __name__ == "__main__":
    sys.exit(main())
