"""Measure in which unit the predicted losses of the MLP meet probed KL, and how uneven the tokens' streams are.

    a3 calibrate MODEL --dataset TEXT --work WORK
    a3 solve --budget 0.2 --shape per-layer --work WORK
    a3 solve --budget 0.2 --shape per-layer --sensitivity probe --name probed --work WORK
    python benchmarks/loss_units.py MODEL WORK [--write docs/experiments.md]

A predicted loss is a squared error times a factor of the layer: half of the mean energy of a gradient; the mean of
1/‖h‖² over tokens, with h the stream behind the MLP (`--sensitivity residual`); or 1 over the mean of ‖h‖². The best
factor gives the same ratio of KL to loss in every layer. Errors are those of the probed cuts, in which all directions
count alike. The streams are those of evenly spaced blocks.
"""

import argparse
import statistics
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers.utils import logging as transformers_logging

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from a3cli.work.files import read_json  # noqa: E402
from a3cli.work.folder import Work  # noqa: E402
from benchmarks.quality import load  # noqa: E402
from benchmarks.results import heading, line, write_between  # noqa: E402

COLUMNS = (
    *("layer", "energy of the longest 1 % of tokens", "KL / loss by gradient (kept)"),
    *("KL / loss by the mean of 1/‖h‖²", "KL / loss by 1 / mean of ‖h‖²"),
)


@torch.inference_mode()
def stream_energies(model: Path, blocks: torch.Tensor) -> list[torch.Tensor]:
    """Return ‖h‖² of each token `[tokens]` behind each layer."""
    loaded, found = load(model, torch.device("cpu")), []

    def keep(_layer: object, _args: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        found.append(hidden.double().square().sum(-1).flatten())

    for layer in loaded.model.layers:
        layer.register_forward_hook(keep)
    for block in blocks:
        loaded.model(block[None])
    layers = len(loaded.model.layers)
    return [torch.cat(found[layer::layers]) for layer in range(layers)]


def share_of_longest(energies: torch.Tensor) -> float:
    """Return the share of the energy that one token in a hundred has."""
    longest = energies.sort(descending=True).values[: max(1, len(energies) // 100)]
    return float(longest.sum() / energies.sum())


def ratio_rows(work: Work, energies: list[torch.Tensor]) -> list[tuple[float, ...]]:
    """Return each layer's row: the share of the longest tokens, and KL over the loss in each unit."""
    (probes,) = work.probes.glob("best-*.json")
    probed = read_json(probes)["result"]["layers"]
    gradients = read_json(work.gradients / "energies.json")["result"]["layers"]
    rows = []
    for layer, (found, gradient, own) in enumerate(zip(probed, gradients, energies, strict=True)):
        size, kl = found["mlp"]["size"][-1], found["mlp"]["kl"][-1]
        error = read_json(work.channel_order(layer, directed=False))["result"]["curve"][size]
        units = (gradient["mlp"], float((1 / own).mean()), 1 / float(own.mean()))
        rows.append((share_of_longest(own), *(kl / (error * unit) for unit in units)))
    return rows


def table(rows: list[tuple[float, ...]]) -> str:
    lines = [*heading(COLUMNS)]
    for layer, (share, *ratios) in enumerate(rows):
        lines.append(line((layer, f"{100 * share:.0f} %", *(f"{ratio:.1f}" for ratio in ratios))))
    _, *ratios = zip(*rows, strict=True)
    lines.append(line(("median", "", *(f"{statistics.median(each):.1f}" for each in ratios))))
    lines.append(line(("largest / smallest", "", *(f"{max(each) / min(each):.0f}" for each in ratios))))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--write", type=Path, help="replace the table between the markers of this file")
    args = parser.parse_args()
    transformers_logging.disable_progress_bar()
    work = Work(args.work)
    blocks = load_file(work.tokens)["tokens"]
    chosen = blocks[torch.linspace(0, len(blocks) - 1, min(args.blocks, len(blocks))).long()]
    printed = table(ratio_rows(work, stream_energies(args.model, chosen)))
    print(printed)
    if args.write:
        write_between(args.write, "loss-units", printed)


if __name__ == "__main__":
    main()
