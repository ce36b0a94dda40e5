"""Measure how uneven the tokens' streams are in each layer, and how well predicted losses of the MLP meet probed KL.

    a3 calibrate MODEL --dataset TEXT --work WORK
    a3 solve --budget 0.2 --shape per-layer --sensitivity probe --work WORK
    python benchmarks/stream_length.py MODEL WORK [--write docs/experiments.md]

A predicted loss is a squared error times a factor of the layer: the mean of 1/‖h‖² over tokens, with h the stream
behind the MLP, as a3 takes it, or 1 over the mean of ‖h‖². The best factor gives the same ratio of KL to loss in every
layer. The streams are those of the first calibration blocks.
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
    *("layer", "energy of the longest 1 % of tokens", "KL / loss, mean of 1/‖h‖² (kept)"),
    "KL / loss, 1 / mean of ‖h‖²",
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


def ratio_rows(work: Work, energies: list[torch.Tensor]) -> list[tuple[float, float, float]]:
    """Return each layer's row: the share of the longest tokens, and KL over the loss in both units."""
    (probes,) = work.probes.glob("best-*.json")
    rows = []
    for layer, (found, own) in enumerate(zip(read_json(probes)["result"]["layers"], energies, strict=True)):
        size, kl = found["mlp"]["size"][-1], found["mlp"]["kl"][-1]
        error = read_json(work.channel_order(layer))["result"]["curve"][size]
        rows.append((share_of_longest(own), kl / (error * float((1 / own).mean())), kl / (error / float(own.mean()))))
    return rows


def table(rows: list[tuple[float, float, float]]) -> str:
    lines = [*heading(COLUMNS)]
    for layer, (share, kept, other) in enumerate(rows):
        lines.append(line((layer, f"{100 * share:.0f} %", f"{kept:.1f}", f"{other:.1f}")))
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
        write_between(args.write, "stream-length", printed)


if __name__ == "__main__":
    main()
