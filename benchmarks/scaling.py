"""Measure memory and time by number of layers and of blocks, compare with `a3 plan`, and write docs/scaling.md.

For random checkpoints of one shape with several numbers of layers, and for several numbers of blocks, each stage runs
in its own process, on the CPU unless `--device` says otherwise; its seconds and peak resident set are measured.
`a3 plan` predicts the same runs, with the speeds that `a3 plan --measure` finds at the start. Memory must be constant
and time linear; a prediction is correct within 25 %. The table is written to `--out`, with a plot beside it
(`scaling.svg`).

    python benchmarks/scaling.py --out docs/scaling.md                # shape "small", minutes on two quiet cores
    python benchmarks/scaling.py --shape tiny --out /tmp/scaling.md   # a trial: the figures are mostly imports
"""

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from random_checkpoint import SHAPES, Measured, make_in_a_child, make_text, run

SEQ_LEN = 512
WITHIN = 0.25
STAGES = ("calibrate", "solve --method paper", "solve --method best", "export")


@dataclass(frozen=True)
class Point:
    """One run: what was measured of each stage, and the plan's prediction."""

    layers: int
    blocks: int
    measured: dict[str, Measured]
    plan: dict[str, Any]


def stages(folder: Path, blocks: int, device: str) -> dict[str, list[object]]:
    work = ["--work", folder / "work", "--quiet", "--overwrite"]
    where = ["--device", device]
    text = ["--dataset", folder / "text.txt", "--samples", blocks, "--seq-len", SEQ_LEN]
    solve = ["solve", "--attention-budget", 0.25, "--mlp-budget", 0.25, "--ridge", 1e-2]
    return {
        "calibrate": ["calibrate", folder / "source", *text, *where, *work],
        **{f"solve --method {method}": [*solve, "--method", method, *where, *work] for method in ("paper", "best")},
        "export": ["export", folder / "out", *work],
    }


def measure_point(folder: Path, shape: str, layers: int, blocks: int, device: str, rates: list[object]) -> Point:
    make_in_a_child(folder / "source", shape, layers)
    make_text(folder / "text.txt")
    asked = ["--samples", blocks, "--seq-len", SEQ_LEN, "--devices", device, *rates, "--json"]
    plan = json.loads(run("-m", "a3cli", "plan", folder / "source", *asked).output)
    measured = {stage: run("-m", "a3cli", *command) for stage, command in stages(folder, blocks, device).items()}
    return Point(layers, blocks, measured, plan)


def measure_rates(folder: Path, shape: str, device: str) -> list[object]:
    """Return the machine's speeds as options of `a3 plan`."""
    make_in_a_child(folder / "source", shape, 1)
    plan = run("-m", "a3cli", "plan", folder / "source", "--devices", device, "--measure", "--json")
    machine = json.loads(plan.output)["machine"]
    names = ("start_seconds", "disk_gbps", "tflops", "solve_tflops")
    return [part for name in names for part in (f"--{name.replace('_', '-')}", machine[name])]


def row(point: Point, stage: str) -> tuple[str, bool]:
    found, seconds = point.measured[stage], point.plan["seconds"][stage]
    peak = point.plan["peak_ram_bytes"][stage]
    right = all(abs(planned / real - 1) <= WITHIN for planned, real in ((seconds, found.seconds), (peak, found.peak)))
    cells = (
        f"{point.layers}",
        f"{point.blocks}",
        stage,
        f"{found.seconds:.1f}",
        f"{seconds:.1f}",
        f"{found.peak / 1e6:.0f}",
        f"{peak / 1e6:.0f}",
        "yes" if right else "NO",
    )
    return f"| {' | '.join(cells)} |", right


def write_report(points: list[Point], out: Path, shape: str, device: str, rates: list[object]) -> bool:
    """Write the table; return True if every prediction is correct."""
    stated = " ".join(f"{x:.3g}" if isinstance(x, float) else str(x) for x in rates)
    options = (f" --shape {shape}" if shape != "small" else "") + (f" --device {device}" if device != "cpu" else "")
    where = "float32 on a CPU" if device == "cpu" else "bfloat16 on a GPU"
    lines = [
        "# How cost grows",
        "",
        "Memory hardly depends on the number of layers or blocks; time is linear in both. Measured on random",
        f"checkpoints of shape `{shape}` (`benchmarks/random_checkpoint.py`), blocks of {SEQ_LEN} tokens, {where}.",
        "The planned columns are the estimates of `a3 plan`, with the speeds that its `--measure` found at the start:",
        f"`{stated}`.",
        "",
        "```",
        f"python benchmarks/scaling.py{options} --out docs/scaling.md",
        "```",
        "",
        "![Seconds and peak memory against layers and blocks](scaling.svg)",
        "",
        "| layers | blocks | stage | seconds | planned | peak MB | planned | within 25 % |",
        "|---:|---:|---|---:|---:|---:|---:|---|",
    ]
    rows = [row(point, stage) for point in points for stage in STAGES]
    out.write_text("\n".join([*lines, *(line for line, _ in rows)]) + "\n", "utf-8")
    return all(right for _, right in rows)


def draw(by_layers: list[Point], by_blocks: list[Point], path: Path) -> None:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    panels = figure.subplots(2, 2, sharex="col")
    for column, (points, of) in enumerate(((by_layers, "layers"), (by_blocks, "blocks"))):
        x = [getattr(point, of) for point in points]
        for stage in STAGES:
            found = [point.measured[stage] for point in points]
            (line,) = panels[0][column].plot(x, [each.seconds for each in found], "o-", label=stage)
            planned = [point.plan["seconds"][stage] for point in points]
            panels[0][column].plot(x, planned, "--", color=line.get_color())
            panels[1][column].plot(x, [each.peak / 1e9 for each in found], "o-")
        panels[0][column].set(ylabel="seconds (dashed: planned)", ylim=(0, None))
        panels[1][column].set(ylabel="peak resident GB", ylim=(0, None), xlabel=of)
        for panel in panels[:, column]:
            panel.grid(alpha=0.3)
    panels[0][0].legend()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "a3"}):  # text stays text; the bytes are reproducible
        figure.savefig(path, format="svg", metadata={"Date": None})


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="markdown file to write, the plot beside it")
    parser.add_argument("--folder", type=Path, help="where to make a temporary folder (default: the system's place)")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 8, 16, 32])
    arguments = parser.parse_args()

    def measure(layers: int, blocks: int) -> Point:
        with tempfile.TemporaryDirectory(prefix="a3-scaling-", dir=arguments.folder) as folder:
            point = measure_point(Path(folder), arguments.shape, layers, blocks, arguments.device, rates)
        for stage in STAGES:
            print(row(point, stage)[0], flush=True)
        return point

    with tempfile.TemporaryDirectory(prefix="a3-scaling-", dir=arguments.folder) as folder:
        rates = measure_rates(Path(folder), arguments.shape, arguments.device)
    by_layers = [measure(layers, arguments.blocks[0]) for layers in arguments.layers]
    by_blocks = [by_layers[0], *(measure(arguments.layers[0], blocks) for blocks in arguments.blocks[1:])]
    draw(by_layers, by_blocks, arguments.out.parent / "scaling.svg")
    points = [*by_layers, *by_blocks[1:]]
    right = write_report(points, arguments.out, arguments.shape, arguments.device, rates)
    print("every prediction is within 25 %" if right else "some predictions are off by more than 25 %")
    return 0 if right or arguments.shape == "tiny" else 1


if __name__ == "__main__":
    sys.exit(main())
