"""Compare the peak memory of calibrate, solve and export on a 1B checkpoint with its size on disk.

This makes a random checkpoint of the shape of Llama-3.2-1B (bfloat16, shards of 1 GB), written tensor by tensor, with a
byte-level tokenizer and some of Python's own source as text. Each stage runs in its own process, on the CPU, in its
default dtype there (float32). The measure is the process's peak resident set, including mapped pages of files, minus
that of a process that only imports torch and transformers. The exit code is 1 if calibrate or export needs more than
40 % of the checkpoint's size. This needs about 8 GB of disk in a temporary folder that is removed.

    python benchmarks/memory.py [--folder DIR] [--samples 2] [--seq-len 2048] [--batch-size 1] [--method paper]

`--method best` solves for much longer, and is meaningful only with more tokens than the MLP is wide (8192).
"""

import argparse
import sys
import tempfile
from pathlib import Path

from random_checkpoint import make_in_a_child, make_text, run

LIMIT = 0.4
LIMITED = ("calibrate", "export")


def stages(folder: Path, arguments: argparse.Namespace) -> dict[str, list[object]]:
    """Return each stage's command line."""
    work = ["--work", folder / "work", "--quiet"]
    text = ["--dataset", folder / "text.txt", "--samples", arguments.samples, "--seq-len", arguments.seq_len]
    text += ["--batch-size", arguments.batch_size]
    return {
        "calibrate": ["calibrate", folder / "source", *text, "--device", "cpu", *work],
        "solve": ["solve", "--budget", 0.25, "--method", arguments.method, *work],
        "export": ["export", folder / "export", *work],
    }


def measure(folder: Path, arguments: argparse.Namespace) -> bool:
    """Print the table; return False if a stage exceeds the limit."""
    source = make_in_a_child(folder / "source", "1b")
    make_text(folder / "text.txt")
    size = sum(shard.stat().st_size for shard in source.glob("*.safetensors"))
    baseline = run("-c", "import torch, transformers").peak
    print(
        f"checkpoint {size / 1e9:.2f} GB, {arguments.samples} blocks of {arguments.seq_len} tokens, "
        f"{arguments.batch_size} a batch, method {arguments.method}"
    )
    print(f"{'process':<12}{'peak MB':>10}{'above imports':>16}{'share of checkpoint':>22}")
    print(f"{'imports':<12}{baseline / 1e6:>10.0f}")
    within = True
    for stage, command in stages(folder, arguments).items():
        peak = run("-m", "a3cli", *command).peak
        share = (peak - baseline) / size
        over = stage in LIMITED and share > LIMIT
        within &= not over
        note = f"  over the limit of {LIMIT:.0%}" if over else ""
        print(f"{stage:<12}{peak / 1e6:>10.0f}{(peak - baseline) / 1e6:>16.0f}{share:>22.1%}{note}", flush=True)
    return within


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where to make a temporary folder (default: the system's place)")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--method", default="paper", help="of a3 solve")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="a3-memory-", dir=arguments.folder) as folder:
        return 0 if measure(Path(folder), arguments) else 1


if __name__ == "__main__":
    sys.exit(main())
