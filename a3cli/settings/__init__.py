"""Frozen settings of each stage: the one definition of every option of the command line.

A field holds type, default, choices, bounds and help text; an `Option` beside it names the panel of `--help`. A field
without a default is an argument. All problems of one set of settings are reported together.
"""

from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from a3cli.errors import A3Error
from a3cli.settings.base import Settings as Settings
from a3cli.settings.budgets import Budget, BudgetBytes, BudgetParams, Fraction, KvBudget, Memory, parse_size
from a3cli.settings.components import COMPONENTS as COMPONENTS
from a3cli.settings.components import Component as Component
from a3cli.settings.components import Components
from a3cli.settings.gates import Gate, parse_gate
from a3cli.settings.names import Public, PushToHub, SolutionName
from a3cli.settings.options import CUT, HOW, MACHINE, OUTPUT, TEXT, TextOptions, option_of
from a3cli.settings.problems import find_problems
from a3cli.settings.texts import MixedText, SeqLen, name_mixture, part_settings, weigh_alike
from a3cli.settings.texts import TextSettings as TextSettings

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
Sensitivity = Literal["gradient", "residual", "probe"]
# How config.json of a stock export describes RoPE of smaller heads; a3cli/runtimes says which runtime loads what.
RopeForm = Literal["auto", "theta", "linear", "longrope"]
DEFAULT_DATASET = "wikitext2"
DEFAULT_CALIBRATION = ("wikitext2", "c4")  # half each: docs/text.md says why
DEFAULT_WORK = Path("a3-work")
# The meaning of predicted losses, by how they were converted to a common unit.
LOSSES: dict[Sensitivity, str] = {
    "gradient": "KL(source ‖ compressed) to second order, nats a token",
    "residual": "squared error relative to the residual stream",
    "probe": "KL(source ‖ compressed) as probed, nats a token",
}
Rate = Annotated[Annotated[float, Field(gt=0, allow_inf_nan=False)] | None, MACHINE]

# Settings of several stages.
Revision = Annotated[str | None, HOW, Field(description="Branch, tag or commit of a Hub id.")]
RemoteCode = Annotated[bool, HOW, Field(description="Run code that comes with the model.")]
FollowSymlinks = Annotated[bool, HOW, Field(description="Follow symbolic links out of the model's folder.")]
FullCheck = Annotated[bool, HOW, Field(description="Hash the source's weights in full, not samples.")]
MlpStats = Annotated[
    Literal["full", "diagonal"], HOW, Field(description="Gram matrix of the MLP; `paper` needs only the diagonal.")
]
Shape = Annotated[
    Literal["stock", "per-layer"], CUT, Field(description="One size for all layers, or one each (needs remote code).")
]
HeadMultiple = Annotated[int, CUT, Field(ge=1, description="Make head sizes a multiple of this.")]
MlpMultiple = Annotated[int, CUT, Field(ge=1, description="Make MLP widths a multiple of this.")]
Weighting = Annotated[Sensitivity, HOW, Field(description="Weigh losses by gradients, stream length or probed KL.")]
Device = Annotated[str, MACHINE, Field(description="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[DtypeName, MACHINE, Field(description="auto: float32 on a CPU, the checkpoint's on a GPU.")]
BatchSize = Annotated[int, MACHINE, Field(ge=1, description="Batch size, in blocks.")]


def parse_batch_size(text: Any) -> Any:
    """Return a number of blocks, or None for `auto`."""
    if text is None or text == "auto":
        return None
    if isinstance(text, str) and text.removeprefix("-").isdecimal():
        return int(text)
    if isinstance(text, bool) or not isinstance(text, int):
        raise ValueError("must be a whole number of at least 1, or auto")
    return text


AutoBatchSize = Annotated[
    Annotated[int, Field(ge=1)] | None,
    MACHINE,
    BeforeValidator(parse_batch_size),
    Field(description="Batch size, in blocks, or auto: as large as fits."),
]


OF_EACH = {
    "text_field": Field(description="Field that holds the text; one for all sets, or one each."),
    "split": Field(description="Split of a Hub data set; one for all sets, or one each."),
}


class CalibrateSettings(Settings):
    model: Annotated[str, Field(description="Local folder or Hub id of a safetensors checkpoint.")]
    revision: Revision = None
    text: Annotated[
        TextSettings,
        TextOptions(
            {
                "dataset": Field(description="Name, Hub id, file, folder[:weight] (default: wikitext2+c4)."),
                **OF_EACH,
            },
            parts="texts",
        ),
    ]
    texts: Annotated[
        tuple[MixedText, ...],
        AfterValidator(weigh_alike),
        Field(description="Texts of a mixture, which share the settings of `text`."),
    ] = ()
    device: Device = "auto"
    devices: Annotated[str | None, MACHINE, Field(description="Devices of consecutive layers, like cuda:0,cuda:1.")] = (
        None
    )
    dtype: Dtype = "auto"
    batch_size: AutoBatchSize = Field(default="auto", validate_default=True)
    hidden_states: Annotated[
        Literal["disk", "memory", "device"], MACHINE, Field(description="Where hidden states are kept between layers.")
    ] = "disk"
    mlp_stats: MlpStats = "full"
    trust_remote_code: RemoteCode = False
    follow_symlinks: FollowSymlinks = False
    full_check: FullCheck = False
    num_processes: Annotated[
        int, MACHINE, Field(ge=1, description="Processes on this machine that share the blocks.")
    ] = 1

    @model_validator(mode="before")
    @classmethod
    def _name_mixture(cls, values: Any) -> Any:
        return name_mixture(values)

    @property
    def parts(self) -> tuple[TextSettings, ...]:
        """Return the text, or the texts of a mixture with their blocks. Raises A3Error if there are too few blocks."""
        return part_settings(self.text, self.texts) if self.texts else (self.text,)


class SolveSettings(Settings):
    budget: Budget = None
    kv_budget: KvBudget = None
    budget_bytes: BudgetBytes = None
    budget_params: BudgetParams = None
    attention_budget: Annotated[Fraction | None, CUT, Field(description="Fraction of q, k, v and o to remove.")] = None
    mlp_budget: Annotated[Fraction | None, CUT, Field(description="Fraction of the MLP's weights to remove.")] = None
    method: Annotated[
        Literal["best", "paper"], HOW, Field(description="`paper` is the published method; `best` goes beyond it.")
    ] = "best"
    shape: Shape = "stock"
    context: Annotated[
        int | None, HOW, Field(ge=2, description="Longest text to serve, in tokens (default: the model's).")
    ] = None
    components: Components = None
    head_multiple: HeadMultiple = 16
    mlp_multiple: MlpMultiple = 64
    min_head: Annotated[int, CUT, Field(ge=1, description="Smallest head size.")] = 1
    min_mlp: Annotated[int, CUT, Field(ge=1, description="Smallest MLP width.")] = 1
    rope_form: Annotated[RopeForm, HOW, Field(description="RoPE of smaller heads; auto: theta if it costs little.")] = (
        "auto"
    )
    eigenvalue_floor: Annotated[
        float, HOW, Field(ge=0, lt=1, description="Smallest eigenvalue, relative to the largest.")
    ] = 1e-10
    ridge: Annotated[float, HOW, Field(ge=0, description="Damping of refits, relative to the Gram's diagonal.")] = 1e-6
    sensitivity: Weighting = "gradient"
    probe_blocks: Annotated[int, HOW, Field(ge=1, description="Calibration blocks that are probed.")] = 2
    probe_points: Annotated[int, HOW, Field(ge=1, description="Sizes probed per component and layer.")] = 1
    sequential: Annotated[
        bool, HOW, Field(description="Refit each layer to the cuts before it, in a second sweep.")
    ] = False
    refit_rounds: Annotated[
        int, HOW, Field(ge=0, description="Gauss-Newton rounds of --sequential; 0: only outputs.")
    ] = 2
    device: Device = "auto"
    dtype: Dtype = "auto"
    batch_size: BatchSize = 1
    num_processes: Annotated[
        int | None, MACHINE, Field(ge=1, description="Layers solved in parallel (default: one per core).")
    ] = None
    memory: Memory = None
    name: SolutionName = None

    @property
    def cut(self) -> tuple[Component, ...]:
        """Return the components that may be cut: all, unless the settings or the model's family name fewer."""
        return self.components or COMPONENTS


class ExportSettings(Settings):
    name: SolutionName = None
    dtype: Annotated[
        Literal["source", "float32", "bfloat16", "float16"], OUTPUT, Field(description="Dtype of the weights.")
    ] = "source"
    max_shard_size: Annotated[
        int, OUTPUT, BeforeValidator(parse_size), Field(ge=1, description="Largest weight file, like 5GB.")
    ] = Field(default="5GB", validate_default=True)
    as_type: Annotated[
        Literal["llama"] | None, OUTPUT, Field(description="Write as this model type: exact for qwen2, see docs.")
    ] = None
    overwrite: Annotated[bool, OUTPUT, Field(description="Replace an earlier export.")] = False
    num_processes: Annotated[int, MACHINE, Field(ge=1, description="Weight files written in parallel.")] = 1
    full_check: FullCheck = False
    check_reproducible: Annotated[
        bool, HOW, Field(description="Write twice, compare hashes; exit code 1 if they differ.")
    ] = False
    evaluations: Annotated[
        tuple[Path, ...],
        OUTPUT,
        Field(description="Show figures from this file of `a3 eval --json`; repeatable."),
    ] = ()
    push_to_hub: PushToHub = None
    public: Public = False


def parse_budgets(text: Any) -> Any:
    """Return the decimal numbers of `0.1:0.5:0.05` (the end included) or `0.1,0.25,0.4`."""
    if not isinstance(text, str):
        return text
    try:
        if ":" not in text:
            return tuple(float(part) for part in text.split(","))
        start, stop, step = (Decimal(part) for part in text.split(":"))
        if step <= 0 or not 0 <= start <= stop < 1:
            raise ValueError
    except (ValueError, InvalidOperation):
        raise ValueError("must have the form 0.1:0.5:0.05 or 0.1,0.25,0.4, with budgets from 0 up to below 1") from None
    return tuple(float(start + i * step) for i in range(int((stop - start) / step) + 1))


MOST_BLOCKS = Field(default=None, description="Maximum number of blocks (default: all).")


class ParetoSettings(Settings):
    """Budgets to solve for with every method; with `text`, each result is measured on it too."""

    budgets: Annotated[
        tuple[Fraction, ...],
        CUT,
        BeforeValidator(parse_budgets),
        Field(min_length=1, max_length=1000, description="first:last:step, or a list like 0.1,0.25,0.4."),
    ] = Field(default="0.1:0.5:0.05", validate_default=True)
    head_multiple: HeadMultiple = 16
    mlp_multiple: MlpMultiple = 64
    sensitivity: Weighting = "gradient"
    sequential: Annotated[bool, HOW, Field(description="Measure `best` with --sequential; `paper` without.")] = False
    text: Annotated[
        TextSettings | None,
        TextOptions(
            {
                "dataset": Field(default=None, description="Data set to measure each point on, as for eval."),
                "samples": MOST_BLOCKS,
            },
            omitted=("chat", "seed"),
        ),
    ] = None
    device: Device = "auto"
    dtype: Dtype = "auto"
    batch_size: BatchSize = 1


class EvalSettings(Settings):
    model: Annotated[str, Field(description="Local folder or Hub id.")]
    revision: Revision = None
    against: Annotated[str | None, HOW, Field(description="Source to compare with: KL and top-1 agreement.")] = None
    against_revision: Annotated[str | None, HOW, Field(description="Revision of --against.")] = None
    texts: Annotated[
        tuple[TextSettings, ...],
        TextOptions(
            {
                "dataset": Field(description="As for calibrate; repeatable (default: wikitext2)."),
                **OF_EACH,
                "samples": MOST_BLOCKS,
            },
            omitted=("seed",),
        ),
    ]
    fail_if: Annotated[
        tuple[Annotated[Gate, BeforeValidator(parse_gate)], ...],
        HOW,
        Field(description="Exit code 1 if so, like 'kl > 0.1'; repeatable (docs/ci.md)."),
    ] = ()
    continuations: Annotated[
        int | None, HOW, Field(ge=1, description="Passages whose continuation to choose (docs/ci.md).")
    ] = None
    bootstrap: Annotated[int, HOW, Field(ge=0, description="Resamples for the 95 % intervals; 0 for none.")] = 1000
    seed: Annotated[int, HOW, Field(ge=0, description="Seed of the resamples.")] = 0
    tasks: Annotated[tuple[str, ...], HOW, Field(description="Comma list of lm-evaluation-harness tasks.")] = ()
    tasks_path: Annotated[Path | None, HOW, Field(description="Folder with your own task files; their code runs.")] = (
        None
    )
    task_limit: Annotated[int | None, HOW, Field(ge=1, description="Maximum number of documents per task.")] = None
    device: Device = "auto"
    dtype: Dtype = "auto"
    batch_size: BatchSize = 1
    trust_remote_code: RemoteCode = False
    follow_symlinks: FollowSymlinks = False


class VerifySettings(Settings):
    """The export and the reference compute in `dtype`; auto is float32, whatever the weights are."""

    device: Device = "auto"
    dtype: Annotated[DtypeName, MACHINE, Field(description="Dtype to compute in; auto: float32.")] = "auto"
    trust_remote_code: Annotated[
        bool, HOW, Field(description="Run a per-layer export's code if it is what a3 ships.")
    ] = False
    require_reference: Annotated[
        bool, HOW, Field(description="Fail without the work folder that the export is from.")
    ] = False


class PlanSettings(Settings):
    """The run to plan for, and its machine; a rate that is not given is assumed or measured."""

    model: Annotated[str, Field(description="Local folder or Hub id; weights are not downloaded.")]
    revision: Revision = None
    follow_symlinks: FollowSymlinks = False
    budget: Annotated[Budget, Field(description="Fraction of linear weights to remove (default: 0.25).")] = None
    kv_budget: KvBudget = None
    budget_bytes: BudgetBytes = None
    budget_params: BudgetParams = None
    shape: Shape = "stock"
    samples: Annotated[int, TEXT, Field(ge=1, description="Number of blocks.")] = 128
    seq_len: SeqLen = None
    batch_size: AutoBatchSize = Field(default="auto", validate_default=True)
    mlp_stats: MlpStats = "full"
    head_multiple: Annotated[HeadMultiple, Field(ge=2, multiple_of=2)] = 16
    mlp_multiple: MlpMultiple = 64
    dtype: Dtype = "auto"
    devices: Annotated[
        str,
        MACHINE,
        Field(pattern=r"^(cpu|cuda(:\d+)?(,cuda(:\d+)?)*)$", description="cpu, cuda, or a list like cuda:0,cuda:1."),
    ] = "cpu"
    num_processes: Annotated[int, MACHINE, Field(ge=1, description="Processes that share the blocks.")] = 1
    start_seconds: Annotated[Rate, Field(description="Seconds until a stage begins to work (default: 4.2).")] = None
    disk_gbps: Annotated[Rate, Field(description="Disk speed in GB/s (default: 2).")] = None
    tflops: Annotated[Rate, Field(description="Matmul TFLOP/s in --dtype (default: CPU 0.3, GPU 200).")] = None
    solve_tflops: Annotated[Rate, Field(description="Matmul TFLOP/s in float64 (default: CPU 0.15, GPU 10).")] = None
    memory: Memory = None
    measure: Annotated[bool, MACHINE, Field(description="Measure the rates that are not given; takes seconds.")] = False


S = TypeVar("S", bound=Settings)


def make_settings(kind: type[S], **values: Any) -> S:
    """Build settings. Raises A3Error naming every bad value in one line."""
    try:
        return kind(**values)
    except ValidationError as error:
        problems = (each.describe(option_of(each.keys) if each.keys else None) for each in find_problems(error, kind))
        raise A3Error("bad settings: " + "; ".join(problems)) from None
