"""Time the solution of one layer: the paper's method in seconds, the refit method relative to its FLOPs.

The layer is a decoder layer with random weights (bfloat16) and random full statistics, by default of Llama-3.1-70B's
shape. The solvers are timed as `a3 solve` calls them, from statistics in memory to projections:

QK + OV, paper   pair scores, `W_o,i W_o,iᵀ` and the joint decomposition of values               goal: under 2 s
MLP, paper       channel scores and selection                                                     goal: under 1 s
MLP, best        greedy selection at every width, and the refit at three quarters of the width
OV, best         the output projection refit over all heads

The last two are reported relative to their FLOPs (`a3cli/models/costs.py`) at the speed of a large float64 product,
measured in the same run before and after; the goal is a ratio of 1.5. The exit code is 1 if a goal is missed.

    python benchmarks/solve_layer.py                       # 28672² float64: about 12 GB of memory, half an hour
    python benchmarks/solve_layer.py --paper-only          # a minute
    python benchmarks/solve_layer.py --shape 8b            # about 4 GB, minutes
    python benchmarks/solve_layer.py --device cuda         # about 25 GB of the GPU's memory, seconds
    python benchmarks/solve_layer.py --shape tiny          # seconds; the ratios are meaningless at this size
"""

import argparse
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from random_checkpoint import SHAPES

from a3cli.methods.analysis import BLOCKS
from a3cli.solvers.mlp import keep_channels, order_channels, refit_down, score_channels
from a3cli.solvers.ov import output_gram_of, refit_output, solve_ov
from a3cli.solvers.qk import keep_pairs, score_pairs

FLOOR, RIDGE = 1e-10, 1e-6
GOALS = {"QK + OV, paper": 2.0, "MLP, paper": 1.0}
RATIO = 1.5


def gram_of(channels: int, tokens: int, dtype: torch.dtype) -> torch.Tensor:
    """Return a Gram matrix `[n, n]` of full rank: random tokens plus a diagonal."""
    x = torch.randn(tokens, channels, dtype=dtype) * torch.linspace(1, 0.1, channels, dtype=dtype)
    gram = (x.mT @ x).div_(tokens)
    gram.diagonal().add_(0.01)
    return gram


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    wait = torch.cuda.synchronize if torch.get_default_device().type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    result = run()
    wait()
    return time.perf_counter() - started, result


def product_speed(size: int) -> float:
    """Return the FLOPs per second of one float64 product."""
    matrix = torch.randn(size, size, dtype=torch.float64)
    seconds = min(timed(lambda: matrix @ matrix)[0] for _ in range(3))
    return 2 * size**3 / seconds


class Layer:
    def __init__(self, name: str) -> None:
        config = SHAPES[name]
        self.d, self.width = config["hidden_size"], config["intermediate_size"]
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.h = config["head_dim"]
        torch.manual_seed(0)
        self.o = torch.randn(self.d, self.heads * self.h).div_(self.d**0.5).bfloat16()
        self.down = torch.randn(self.d, self.width).div_(self.width**0.5).bfloat16()

    @property
    def output_weight(self) -> torch.Tensor:
        """Return `W_o,i` `[H, h, d]`."""
        return self.o.view(self.d, self.heads, self.h).permute(1, 2, 0)

    def head_grams(self, heads: int) -> torch.Tensor:
        return torch.stack([gram_of(self.h, 2 * self.h, torch.float64) for _ in range(heads)])

    def paper_attention(self) -> float:
        q, k, v = (self.head_grams(count) for count in (self.heads, self.kv_heads, self.kv_heads))

        def solve() -> None:
            keep_pairs(score_pairs(q, k).sum(0), 3 * self.h // 8)
            solve_ov(v, output_gram_of(self.output_weight), floor=FLOOR)

        return timed(solve)[0]

    def paper_mlp(self) -> float:
        energy = torch.rand(self.width, dtype=torch.float64)
        return timed(lambda: keep_channels(score_channels(energy, self.down), 3 * self.width // 4))[0]

    def best_mlp(self) -> tuple[float, float]:
        """Return the seconds and FLOPs of selection and refit."""
        kept, d, n = 3 * self.width // 4, self.d, self.width
        gram = gram_of(n, min(n, 4096), torch.float32)
        block = max(1, n // BLOCKS)
        selected, found = timed(lambda: order_channels(gram.double(), self.down, block=block, overwrite_gram=True))
        channels = found.order[:kept].sort().values
        refit = timed(lambda: refit_down(gram, self.down, channels, ridge=RIDGE))[0]
        products = n**3 / 3 + 1.5 * n**2 * d + kept * n * d + kept**3 / 6 + kept**2 * d
        return selected + refit, 2 * products

    def best_output(self) -> tuple[float, float]:
        rank = 3 * self.h // 4
        gram = gram_of(self.heads * self.h, self.heads * self.h, torch.float32)
        maps = torch.randn(self.kv_heads, self.h, rank, dtype=torch.float64)
        weight = self.output_weight.flatten(0, 1)
        seconds = timed(lambda: refit_output(gram, weight, maps, ridge=RIDGE))[0]
        full, kept = self.heads * self.h, self.heads * rank
        return seconds, 2 * (kept * full * (full + self.d) + kept**2 * (full + self.d) + kept**3 / 6)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="70b")
    parser.add_argument("--paper-only", action="store_true", help="without the refit method: seconds")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.set_default_device(arguments.device)
    if arguments.device == "cuda":  # its libraries are initialised at the first call
        small = Layer("tiny")
        small.paper_attention(), small.paper_mlp(), small.best_mlp(), small.best_output()
    layer = Layer(arguments.shape)
    size = min(8192 if arguments.device == "cuda" else 4096, 2 * layer.width)
    speeds = [product_speed(size)]
    paper = {"QK + OV, paper": layer.paper_attention(), "MLP, paper": layer.paper_mlp()}
    best = {} if arguments.paper_only else {"MLP, best": layer.best_mlp(), "OV, best": layer.best_output()}
    speeds.append(product_speed(size))
    speed = sum(speeds) / 2
    print(
        f"{arguments.shape}: d {layer.d}, heads {layer.heads}/{layer.kv_heads}, MLP {layer.width}; {speed / 1e9:.0f} "
        f"GFLOP/s float64 with {torch.get_num_threads()} threads ({speeds[0] / 1e9:.0f} before, "
        f"{speeds[1] / 1e9:.0f} after)"
    )
    print(f"{'':<18}{'seconds':>10}{'TFLOP':>10}{'of its FLOPs':>15}")
    missed = False
    for name, seconds in paper.items():
        over = seconds > GOALS[name]
        missed |= over
        print(f"{name:<18}{seconds:>10.2f}{'':>25}{f'  over {GOALS[name]:g} s' if over else ''}")
    for name, (seconds, flops) in best.items():
        ratio = seconds * speed / flops
        missed |= ratio > RATIO
        print(f"{name:<18}{seconds:>10.2f}{flops / 1e12:>10.2f}{ratio:>14.2f}×{'  over 1.5' if ratio > RATIO else ''}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"peak memory {peak / 1e9:.2f} GB")
    return int(missed and arguments.shape != "tiny")


if __name__ == "__main__":
    sys.exit(main())
