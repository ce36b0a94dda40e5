"""Run all stages on a random checkpoint of Llama-3.1-8B's shape: peak memory and time of each.

Each stage runs in its own process, by default on the CPU; its peak resident set is measured, mapped pages included.
The exit code is 1 if a stage exceeds `--limit` (6 GB). This needs about 16 GB of disk for the source, 0.45 GB per layer
for statistics, and 12 GB for the export, all in a temporary folder that is removed.

    python benchmarks/chain_8b.py [--layers 8] [--method best] [--folder DIR] [--seq-len 2048] [--samples 4]
    python benchmarks/chain_8b.py --shape tiny           # a minute
    python benchmarks/chain_8b.py --shape 70b --layers 1 --samples 128 --device cuda --limit 20

Four blocks are fewer tokens than the MLP is wide, so the ridge is large; memory and time do not depend on it.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from random_checkpoint import SHAPES, make_in_a_child, make_text, run


def stages(folder: Path, source: Path, arguments: argparse.Namespace) -> dict[str, list[object]]:
    """Return each stage's command line."""
    work = ["--work", folder / "work", "--quiet"]
    text = ["--dataset", folder / "text.txt", "--samples", arguments.samples, "--seq-len", arguments.seq_len]
    where = ["--device", arguments.device]
    solve = ["solve", "--budget", 0.25, "--ridge", 1e-2, *where]
    return {
        "calibrate": ["calibrate", source, *text, *where, *work],
        **{
            f"solve --method {method}": [*solve, "--method", method, "--overwrite", *work]
            for method in arguments.method.split(",")
        },
        "export": ["export", folder / "export", *work],
    }


def measure(folder: Path, arguments: argparse.Namespace) -> bool:
    """Print the table; return False if a stage exceeds the limit."""
    source = arguments.source or make_in_a_child(folder / "source", arguments.shape, arguments.layers)
    make_text(folder / "text.txt")
    size = sum(shard.stat().st_size for shard in source.glob("*.safetensors"))
    layers = arguments.layers or SHAPES[arguments.shape]["num_hidden_layers"]
    print(f"{arguments.shape}, {layers} layers, {size / 1e9:.2f} GB, {arguments.samples} blocks of {arguments.seq_len}")
    print(f"{'stage':<24}{'seconds':>10}{'peak GB':>10}", flush=True)
    within = True
    for stage, command in stages(folder, source, arguments).items():
        measured = run("-m", "a3cli", *command)
        over = measured.peak > arguments.limit * 1e9
        within &= not over
        note = f"  over the limit of {arguments.limit:g} GB" if over else ""
        print(f"{stage:<24}{measured.seconds:>10.1f}{measured.peak / 1e9:>10.2f}{note}", flush=True)
    return within


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where to make a temporary folder (default: the system's place)")
    parser.add_argument("--source", type=Path, help="a checkpoint that random_checkpoint.py has made before")
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--method", default="paper,best", help="of a3 solve; several, one after another, by commas")
    parser.add_argument("--limit", type=float, default=6.0, help="GB a process may take")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="a3-chain-", dir=arguments.folder) as folder:
        return 0 if measure(Path(folder), arguments) else 1


if __name__ == "__main__":
    sys.exit(main())
