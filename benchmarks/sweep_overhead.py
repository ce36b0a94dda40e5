"""What the statistics cost: `a3 calibrate`'s sweep against a bare forward of the same blocks by plain transformers.

Makes a random Llama of about 0.3 billion parameters in bfloat16 and blocks of random tokens, in a temporary folder.
The bare forward has the whole model resident and runs the decoder (no output head) over the blocks, batch by batch.
The sweep does the same and more: it reads each layer's weights, keeps hidden
states in files, and accumulates and writes the statistics. Each runs in a process of its own, as it would be by itself,
and counts with the fastest of some rounds. The exit code is 1 if a ratio is above its limit.

    python benchmarks/sweep_overhead.py [--layers 24] [--blocks 8] [--seq-len 2048] [--rounds 3] [--profile]
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from a3cli.checkpoint import Checkpoint
from a3cli.hidden import StatesOnDisk
from a3cli.machine import Machine, return_freed_memory
from a3cli.model import describe
from a3cli.processes import Processes
from a3cli.sweep import Decoder, Sweep
from a3cli.work import write_tensors

LIMITS = {"full": 1.6, "diagonal": 1.15}
CONFIG = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 32000,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


def make_model(folder: Path, layers: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG, num_hidden_layers=layers)).to(torch.bfloat16)
    print(f"{sum(parameter.numel() for parameter in model.parameters()) / 1e9:.2f} B parameters, bfloat16", end=", ")
    model.save_pretrained(folder)


@torch.inference_mode()
def forward(model: Any, blocks: torch.Tensor, batch_size: int) -> None:
    for batch in blocks.split(batch_size):
        model.model(batch, use_cache=False)


def calibrate(folder: Path, blocks: torch.Tensor, batch_size: int, *, full_mlp: bool) -> None:
    """What `a3 calibrate` does between the text and the manifest."""
    model = describe(Checkpoint(folder))
    machine = Machine(torch.device("cpu"), torch.bfloat16)
    states = StatesOnDisk(
        lambda layer: folder / f"hidden-{layer}.bin",
        folder / "hidden-next.bin",
        (*blocks.shape, model.shape.hidden_size),
        machine.dtype,
    )
    Sweep(
        Decoder(model, machine),
        blocks,
        states,
        Processes(),
        batch_size,
        adapt=False,
        full_mlp=full_mlp,
        finished=lambda layer, sums: write_tensors(folder / f"layer-{layer:03d}.safetensors", sums),
        progress=lambda **at: None,
    ).run(0)
    for path in [*folder.glob("hidden-*.bin"), *folder.glob("layer-*.safetensors")]:
        path.unlink()


def seconds(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def prepare(kind: str, folder: Path, blocks: torch.Tensor, batch_size: int) -> Callable[[], None]:
    """What is timed."""
    if kind == "bare":
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        return lambda: forward(model, blocks, batch_size)
    return_freed_memory()  # as the command itself does
    return lambda: calibrate(folder, blocks, batch_size, full_mlp=kind == "full")


def run(kind: str, folder: Path, arguments: argparse.Namespace) -> None:
    """In a child: print the fastest round's seconds, or a profile."""
    torch.manual_seed(1)
    blocks = torch.randint(CONFIG["vocab_size"], (arguments.blocks, arguments.seq_len))
    work = prepare(kind, folder, blocks, arguments.batch_size)
    if arguments.profile:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            work()
        print(profiled.key_averages().table(sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=50))
        return
    prepare(kind, folder, blocks[:1], 1)()  # kernels are chosen and pages read the first time
    print(min(seconds(work) for _ in range(arguments.rounds)))


def measure(arguments: argparse.Namespace, folder: Path) -> bool:
    """Print the table; False if a ratio is above its limit."""
    make_model(folder, arguments.layers)
    print(
        f"{arguments.blocks} blocks of {arguments.seq_len} tokens, {arguments.batch_size} a batch, "
        f"{torch.get_num_threads()} threads, fastest of {arguments.rounds}"
    )
    took: dict[str, float] = {}
    within = True
    print(f"{'':<14}{'seconds':>9}{'ratio':>8}{'limit':>8}", flush=True)
    for kind in ("bare", *LIMITS):
        command = [sys.executable, __file__, *sys.argv[1:], "--child", kind, "--folder", str(folder)]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        if arguments.profile:
            print(kind, printed, sep="\n")
            continue
        took[kind] = float(printed.split()[-1])
        ratio, limit = took[kind] / took["bare"], LIMITS.get(kind)
        within &= limit is None or ratio <= limit
        print(f"{kind:<14}{took[kind]:>9.2f}{ratio:>8.2f}" + ("" if limit is None else f"{limit:>8}"), flush=True)
    return within


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="print what each spends its time on instead")
    parser.add_argument("--folder", type=Path, help="where to make a temporary folder (default: the system's place)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        run(arguments.child, arguments.folder, arguments)
        return 0
    with tempfile.TemporaryDirectory(prefix="a3-overhead-", dir=arguments.folder) as folder:
        return 0 if measure(arguments, Path(folder)) else 1


if __name__ == "__main__":
    sys.exit(main())
