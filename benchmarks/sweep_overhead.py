"""Compare `a3 calibrate`'s sweep with a bare forward of the same blocks by plain transformers.

This makes a random Llama, of about 0.3 billion parameters unless `--shape` says otherwise, and blocks of random tokens,
in a temporary folder. Both compute in `--dtype`.

The bare forward has the whole model resident and runs the decoder (no output head) over the blocks, batch by batch.
The sweep also reads each layer's weights, keeps hidden states, and accumulates and writes the statistics. Each runs in
its own process, as it would alone, and the fastest of several rounds counts. The exit code is 1 if a ratio is above its
limit.

    python benchmarks/sweep_overhead.py [--layers 24] [--blocks 8] [--seq-len 2048] [--rounds 3] [--profile]
    python benchmarks/sweep_overhead.py --shape 135m --dtype float32 --seq-len 512 --blocks 32 --batch-size 8
    python benchmarks/sweep_overhead.py --device cuda --shape 8b --layers 4 --blocks 64 --batch-size 8
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
from random_checkpoint import SHAPES, make_in_a_child

from a3cli.models.checkpoint import Checkpoint
from a3cli.models.model import describe
from a3cli.solvers.moments import Tensors
from a3cli.stages.calibrate import write_hashed
from a3cli.stream.hidden import States, StatesInMemory, StatesOnDisk
from a3cli.stream.sweep import Decoder, Sweep
from a3cli.work.machine import Machine, return_freed_memory
from a3cli.work.processes import Processes

LIMITS = {"full": 1.6, "diagonal": 1.15}


@torch.inference_mode()
def forward(model: Any, blocks: torch.Tensor, batch_size: int, device: torch.device) -> None:
    for batch in blocks.split(batch_size):
        model.model(batch.to(device), use_cache=False)
    if device.type == "cuda":
        torch.cuda.synchronize()


def calibrate(
    folder: Path, blocks: torch.Tensor, batch_size: int, machine: Machine, where: str, *, full_mlp: bool
) -> None:
    """Run the part of `a3 calibrate` between the text and the manifest."""
    model, device = describe(Checkpoint(folder)), machine.device
    shape = (*blocks.shape, model.shape.hidden_size)
    states: States = (
        StatesOnDisk(lambda layer: folder / f"hidden-{layer}.bin", folder / "hidden-next.bin", shape, machine.dtype)
        if where == "disk"
        else StatesInMemory(shape, machine.dtype, device if where == "device" else torch.device("cpu"))
    )

    def keep(layer: int, sums: Tensors) -> None:
        write_hashed(folder / f"layer-{layer:03d}.safetensors", sums)

    Sweep(
        Decoder(model, machine),
        blocks,
        states,
        Processes(),
        batch_size,
        adapt=False,
        full_mlp=full_mlp,
        finished=keep,
        progress=lambda **at: None,
    ).run(0)
    for path in [*folder.glob("hidden-*.bin"), *folder.glob("layer-*.safetensors")]:
        path.unlink()


def seconds(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def prepare(
    kind: str, folder: Path, blocks: torch.Tensor, batch_size: int, machine: Machine, where: str
) -> Callable[[], None]:
    """Return the function to time."""
    if kind == "bare":
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=machine.dtype).to(machine.device).eval()
        return lambda: forward(model, blocks, batch_size, machine.device)
    return_freed_memory(batches=True)  # as the command itself does
    return lambda: calibrate(folder, blocks, batch_size, machine, where, full_mlp=kind == "full")


def run(kind: str, folder: Path, arguments: argparse.Namespace) -> None:
    """Print the fastest round's seconds, or a profile, from a child process."""
    torch.manual_seed(1)
    blocks = torch.randint(SHAPES[arguments.shape]["vocab_size"], (arguments.blocks, arguments.seq_len))
    machine = Machine(torch.device(arguments.device), getattr(torch, arguments.dtype))
    work = prepare(kind, folder, blocks, arguments.batch_size, machine, arguments.hidden_states)
    if arguments.profile:
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if machine.device.type == "cuda" else [])]
        with profile(activities=activities) as profiled:
            work()
        by = "self_cpu_time_total" if machine.device.type == "cpu" else "self_cuda_time_total"
        print(profiled.key_averages().table(sort_by=by, row_limit=30, max_name_column_width=50))
        return
    prepare(
        kind, folder, blocks[:1], 1, machine, arguments.hidden_states
    )()  # kernels are chosen and pages are read at the first call
    print(min(seconds(work) for _ in range(arguments.rounds)))


def measure(arguments: argparse.Namespace, folder: Path) -> bool:
    """Print the table; return False if a ratio is above its limit."""
    make_in_a_child(folder, arguments.shape, arguments.layers)
    size = sum(shard.stat().st_size for shard in folder.glob("*.safetensors"))
    print(f"{arguments.shape}, {size / 2e9:.2f} B parameters, {arguments.dtype}, on {arguments.device}", end=", ")
    print(
        f"{arguments.blocks} blocks of {arguments.seq_len} tokens, {arguments.batch_size} a batch, "
        f"{torch.get_num_threads()} threads, hidden states: {arguments.hidden_states}, fastest of {arguments.rounds}"
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
    parser.add_argument("--shape", choices=SHAPES, default="0.3b")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--hidden-states", choices=("disk", "memory", "device"), default="disk")
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
