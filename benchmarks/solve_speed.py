"""Measure how much faster QK and OV are solved in head space than by the printed formulas, in one run.

For one decoder layer of the shapes of Llama-3.1-8B and Llama-2-7B, with random weights (bfloat16 values) and random
full-rank statistics of `2d` correlated tokens, this times

ours     `a3cli.solvers`: `score_pairs`, `solve_qk`, and `output_gram_of` with `solve_ov`, for the whole layer; the
         median of `--repeats` runs. Their inputs come from the same `R` and weights (`G_q,i = W_q,iᵀ R W_q,i`
         and so on); in a real run calibration accumulates them directly, so that derivation is timed on neither side.
literal  Theorems A³-QK and A³-OV in float64: the square root of the `d x d` autocorrelation `R` by `eigh`, then per KV
         group the SVD of the `R^½ W_q,i W_kᵀ R^½` of its heads stacked, `(g·d) x d`, or of `R^½ W_v [W_o,1 … W_o,g]`,
         `d x (g·d)`, products included. The score for RoPE is that of the columns of `R^½ W_q` and `R^½ W_k`.

The literal side takes minutes a group, so `--literal-groups` groups are measured, and the layer is extrapolated from
their mean: `square roots x seconds + groups x seconds`. Square roots are shared as in the paper: one `R`
for QK and for OV with GQA, one attention-weighted `R_i` per head for OV with MHA. One of each is measured. The RoPE
score is measured for the whole layer. `--factorise gram` replaces the SVD by `eigh` of the `d x d` Gram matrix
`MᵀM`, a shortcut in favour of the literal side. Neither side's time includes applying the result to the weights.

At each measured group both answers are compared in float64: squared singular values relative to the largest, and
the rank-`h/2` matrices by Frobenius norm. The exit code is 1 if any differs by more than 1e-8.

    python benchmarks/solve_speed.py                     # d = 4096: about 20 minutes on one core, 6 GB of memory
    python benchmarks/solve_speed.py --factorise gram    # about 3 minutes
    python benchmarks/solve_speed.py --scale small       # d = 256: seconds
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from a3cli.solvers.linalg import JointDecomposition
from a3cli.solvers.ov import output_gram_of, solve_ov
from a3cli.solvers.qk import score_pairs, solve_qk

FLOOR = 1e-10
TOLERANCE = 1e-8
GOAL = 100


@dataclass(frozen=True)
class Shape:
    """Sizes of one layer's attention: `d`, `H`, `K`, `h`."""

    name: str
    d: int
    heads: int
    kv_heads: int
    h: int

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads


SHAPES = {
    "full": (Shape("Llama-3.1-8B", 4096, 32, 8, 128), Shape("Llama-2-7B", 4096, 32, 32, 128)),
    "small": (Shape("Llama-3.1-8B, small", 256, 8, 2, 32), Shape("Llama-2-7B, small", 256, 8, 8, 32)),
}


@dataclass(frozen=True)
class Weights:
    """Weights in bfloat16 as in a checkpoint: `q` `[H, d, h]`, `k` and `v` `[K, d, h]`, `o` `[H, h, d]`."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    o: torch.Tensor


@dataclass(frozen=True)
class Grams:
    """The solvers' input from calibration, float64: `q` `[H, h, h]`, `k` and `value` `[K, h, h]`."""

    q: torch.Tensor
    k: torch.Tensor
    value: torch.Tensor


@dataclass(frozen=True)
class Statistics:
    """`R` `[d, d]` of the layer input and, by KV group, the `[d, d]` that its values are applied to; float64."""

    layer_input: torch.Tensor
    value_input: dict[int, torch.Tensor]


@dataclass(frozen=True)
class Literal:
    """One group by the paper's formula: `values` are squared singular values `[d]`, `rank_r` is `M_r`."""

    seconds: float
    values: torch.Tensor
    rank_r: torch.Tensor


@dataclass(frozen=True)
class Seconds:
    """Times of the literal side: of each measured root and group, and the number of roots and groups in the layer."""

    roots: list[float]
    groups: list[float]
    root_count: int
    group_count: int

    @property
    def measured(self) -> float:
        return sum(self.roots) + sum(self.groups)

    @property
    def layer(self) -> float:
        return self.root_count * statistics.mean(self.roots) + self.group_count * statistics.mean(self.groups)

    @property
    def terms(self) -> str:
        root, group = statistics.mean(self.roots), statistics.mean(self.groups)
        return f"{self.root_count} x {root:.3g} + {self.group_count} x {group:.3g}"


@dataclass(frozen=True)
class Timing:
    """One line of the timing table, in seconds per layer."""

    component: str
    ours: float
    measured: float
    layer: float
    terms: str


@dataclass(frozen=True)
class Agreement:
    """One line of the agreement table: relative differences between the two results."""

    component: str
    values: float
    rank_r: float | None = None

    @property
    def holds(self) -> bool:
        return max(self.values, self.rank_r or 0.0) <= TOLERANCE


def random_weights(shape: Shape, generator: torch.Generator) -> Weights:
    def random(heads: int, rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(heads, rows, columns, generator=generator) / shape.d**0.5).bfloat16()

    return Weights(
        q=random(shape.heads, shape.d, shape.h),
        k=random(shape.kv_heads, shape.d, shape.h),
        v=random(shape.kv_heads, shape.d, shape.h),
        o=random(shape.heads, shape.h, shape.d),
    )


def random_inputs(d: int, generator: torch.Generator) -> torch.Tensor:
    """Return correlated layer inputs `[2d, d]`: scales that fall as a power law plus `d/8` shared directions."""
    scales = torch.arange(1, d + 1, dtype=torch.float64) ** -0.5
    own = torch.randn(2 * d, d, generator=generator, dtype=torch.float64) * scales
    shared = torch.randn(2 * d, d // 8, generator=generator, dtype=torch.float64)
    directions = torch.randn(d // 8, d, generator=generator, dtype=torch.float64) / d
    return own + shared @ directions


def attend(inputs: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return attention-weighted inputs `[n, d]`: each a mean of four tokens' inputs under random softmax weights."""
    weights = torch.randn(len(inputs), 4, 1, generator=generator, dtype=torch.float64).mul(2).softmax(1)
    shifts = torch.randint(len(inputs), (4,), generator=generator).tolist()
    return torch.stack([weights[:, i] * inputs.roll(shift, 0) for i, shift in enumerate(shifts)]).sum(0)


def autocorrelation(inputs: torch.Tensor) -> torch.Tensor:
    return inputs.mT @ inputs / len(inputs)


def random_statistics(shape: Shape, groups: int, generator: torch.Generator) -> Statistics:
    """Return random statistics. For MHA each measured head has its own `R_i`; the others use `R`, in the same time."""
    inputs = random_inputs(shape.d, generator)
    layer_input = autocorrelation(inputs)
    value_input = {}
    for k in range(groups):
        value_input[k] = layer_input if shape.group > 1 else autocorrelation(attend(inputs, generator))
    return Statistics(layer_input, value_input)


def derive_grams(weights: Weights, seen: Statistics) -> Grams:
    """Compute the Gram matrices of the projections' outputs from `R` and the weights, as calibration would."""

    def gram(weight: torch.Tensor, R: torch.Tensor) -> torch.Tensor:
        return weight.double().mT @ R @ weight.double()

    return Grams(
        q=torch.stack([gram(w, seen.layer_input) for w in weights.q]),
        k=torch.stack([gram(w, seen.layer_input) for w in weights.k]),
        value=torch.stack([gram(w, seen.value_input.get(k, seen.layer_input)) for k, w in enumerate(weights.v)]),
    )


def timed(function: Callable[[], Any], repeats: int = 1) -> tuple[Any, float]:
    """Return the last result and the median seconds."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - start)
    return result, statistics.median(seconds)


def square_root(R: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(R)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.mT


def qk_sides(shape: Shape, weights: Weights, root: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factors of group `k`'s matrix `A Bᵀ`: `A` `[g·d, h]` stacks `R^½ W_q,i`, `B` `[d, h]` is `R^½ W_k`."""
    queries = weights.q[k * shape.group : (k + 1) * shape.group].double()
    return (root @ queries).flatten(0, 1), root @ weights.k[k].double()


def ov_sides(shape: Shape, weights: Weights, root: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the same for the transpose of `R^½ W_v [W_o,1 … W_o,g]`: `A` stacks the `W_o,iᵀ`, `B` is `R^½ W_v`."""
    outputs = weights.o[k * shape.group : (k + 1) * shape.group].double()
    return outputs.mT.flatten(0, 1), root @ weights.v[k].double()


def solve_literally(sides: Callable[[], tuple[torch.Tensor, torch.Tensor]], rank: int, factorise: str) -> Literal:
    """Form `M = A Bᵀ` `[g·d, d]` and decompose it; the truncation `M_r = M V_r V_rᵀ` is not timed."""

    def decompose() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        A, B = sides()
        M = A @ B.mT
        if factorise == "svd":
            _, values, right = torch.linalg.svd(M, full_matrices=False)
            return M, values.square(), right.mT
        values, vectors = torch.linalg.eigh(M.mT @ M)
        return M, values.flip(-1), vectors.flip(-1)

    (M, values, V), seconds = timed(decompose)
    return Literal(seconds, values, (M @ V[:, :rank]) @ V[:, :rank].mT)


def score_pairs_literally(shape: Shape, weights: Weights, root: torch.Tensor) -> torch.Tensor:
    """Return the CUR score `[K, h/2]`: squared column norms of `R^½ W_q`, summed over a group, times `R^½ W_k`'s."""
    queries = (root @ weights.q.double()).square().sum(1).view(shape.kv_heads, shape.group, shape.h).sum(1)
    keys = (root @ weights.k.double()).square().sum(1)
    return (queries * keys).view(shape.kv_heads, 2, shape.h // 2).sum(1)


def compare(
    component: str, literal: Literal, sides: tuple[torch.Tensor, torch.Tensor], ours: JointDecomposition, k: int
) -> Agreement:
    """Compare group `k`: all squared singular values (zero beyond the `h`-th), and `M_r` of the measured rank."""
    A, B = sides
    h = ours.values.shape[-1]
    rank = h // 2
    rank_r = (A @ ours.other_map[k, :, :rank]) @ (B @ ours.shared_map[k, :, :rank]).mT
    values = torch.zeros_like(literal.values)
    values[:h] = ours.values[k]
    return Agreement(
        f"{component}, group {k}",
        relative(values, literal.values),
        ((rank_r - literal.rank_r).norm() / literal.rank_r.norm()).item(),
    )


def relative(ours: torch.Tensor, literal: torch.Tensor) -> float:
    return ((ours - literal).abs().max() / literal.abs().max()).item()


def measure(shape: Shape, groups: int, repeats: int, factorise: str) -> tuple[list[Timing], list[Agreement]]:
    """Measure both sides of one shape."""
    generator = torch.Generator().manual_seed(0)
    note(f"{shape.name}: random weights and statistics")
    weights = random_weights(shape, generator)
    seen = random_statistics(shape, groups, generator)
    grams = derive_grams(weights, seen)

    scores, rope_ours = timed(lambda: score_pairs(grams.q, grams.k), repeats)
    qk, qk_ours = timed(lambda: solve_qk(grams.q, grams.k, floor=FLOOR), repeats)
    ov, ov_ours = timed(lambda: solve_ov(grams.value, output_gram_of(weights.o), floor=FLOOR), repeats)
    note(f"{shape.name}: ours done; square root of the layer input's autocorrelation")

    rank = shape.h // 2
    root, root_seconds = timed(lambda: square_root(seen.layer_input))
    literal_scores, rope_seconds = timed(lambda: score_pairs_literally(shape, weights, root))
    agreements = [Agreement("QK with RoPE, scores", relative(scores, literal_scores))]
    qk_groups, ov_groups, ov_roots = [], [], []
    for k in range(groups):
        note(f"{shape.name}: literal QK, group {k}")
        literal = solve_literally(lambda k=k: qk_sides(shape, weights, root, k), rank, factorise)
        qk_groups.append(literal.seconds)
        agreements.append(compare("QK", literal, qk_sides(shape, weights, root, k), qk, k))
        note(f"{shape.name}: literal OV, group {k}")
        value_root = root
        if shape.group == 1:
            value_root, seconds = timed(lambda k=k: square_root(seen.value_input[k]))
            ov_roots.append(seconds)
        literal = solve_literally(lambda k=k, R=value_root: ov_sides(shape, weights, R, k), rank, factorise)
        ov_groups.append(literal.seconds)
        agreements.append(compare("OV", literal, ov_sides(shape, weights, value_root, k), ov, k))

    K = shape.kv_heads
    literal_qk = Seconds([root_seconds], qk_groups, 1, K)
    literal_ov = Seconds(ov_roots or [root_seconds], ov_groups, K if ov_roots else 1, K)
    shared = 0.0 if ov_roots else root_seconds  # QK and OV of a GQA layer use the square root of the same R
    rope = root_seconds + rope_seconds
    timings = [
        Timing("QK", qk_ours, literal_qk.measured, literal_qk.layer, literal_qk.terms),
        Timing("OV", ov_ours, literal_ov.measured, literal_ov.layer, literal_ov.terms),
        Timing(
            "QK + OV",
            qk_ours + ov_ours,
            literal_qk.measured + literal_ov.measured - shared,
            literal_qk.layer + literal_ov.layer - shared,
            "both, a shared root once",
        ),
        Timing("QK with RoPE", rope_ours, rope, rope, f"1 x {root_seconds:.3g} + all heads {rope_seconds:.3g}"),
        Timing(
            "QK with RoPE + OV",
            rope_ours + ov_ours,
            rope + literal_ov.measured - shared,
            rope + literal_ov.layer - shared,
            "both, a shared root once",
        ),
    ]
    return timings, agreements


def timing_table(shape: Shape, timings: list[Timing]) -> str:
    lines = [
        f"{shape.name}: d {shape.d}, {shape.heads} heads, {shape.kv_heads} KV heads, h {shape.h}; seconds a layer",
        f"{'component':<20}{'ours':>10}{'literal,':>12}{'literal,':>14}{'ratio,':>10}{'ratio,':>10}  literal layer =",
        f"{'':<20}{'':>10}{'measured':>12}{'extrapolated':>14}{'measured':>10}{'layer':>10}  roots x s + groups x s",
    ]
    lines += [
        f"{t.component:<20}{t.ours:>10.3g}{t.measured:>12.4g}{t.layer:>14.4g}"
        f"{t.measured / t.ours:>9.0f}x{t.layer / t.ours:>9.0f}x  {t.terms}"
        for t in timings
    ]
    return "\n".join(lines)


def agreement_table(shape: Shape, agreements: list[Agreement]) -> str:
    lines = [f"{shape.name}: relative difference, float64", f"{'':<24}{'values':>10}{'rank h/2':>10}"]
    for a in agreements:
        rank_r = "-" if a.rank_r is None else f"{a.rank_r:.1e}"
        lines.append(f"{a.component:<24}{a.values:>10.1e}{rank_r:>10}  {'agrees' if a.holds else 'DIFFERS'}")
    return "\n".join(lines)


def note(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scale", choices=sorted(SHAPES), default="full")
    parser.add_argument("--literal-groups", type=int, default=1, help="KV groups measured on the literal side")
    parser.add_argument("--factorise", choices=["svd", "gram"], default="svd", help="how the literal side does it")
    parser.add_argument("--repeats", type=int, default=5, help="runs of ours, of which the median counts")
    parser.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    arguments = parser.parse_args()
    if not 1 <= arguments.literal_groups <= min(shape.kv_heads for shape in SHAPES[arguments.scale]):
        parser.error("--literal-groups: between 1 and the KV heads of the smallest shape")
    if arguments.repeats < 3:
        parser.error("--repeats: at least 3")
    return arguments


@torch.inference_mode()
def main() -> int:
    arguments = parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), literal side by {arguments.factorise}, "
        f"{arguments.literal_groups} group(s) measured, ours the median of {arguments.repeats} runs"
    )
    ratios, agree = [], True
    for shape in SHAPES[arguments.scale]:
        timings, agreements = measure(shape, arguments.literal_groups, arguments.repeats, arguments.factorise)
        print("", timing_table(shape, timings), "", agreement_table(shape, agreements), sep="\n", flush=True)
        ratios.append(next(t.layer / t.ours for t in timings if t.component == "QK + OV"))
        agree &= all(a.holds for a in agreements)
    print(f"\nQK + OV of a layer, least ratio: {min(ratios):.0f}x (goal {GOAL}x at full scale)")
    print(f"all answers agree to {TOLERANCE:.0e}" if agree else f"answers DIFFER by more than {TOLERANCE:.0e}")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
