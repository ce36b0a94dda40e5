"""Frozen settings of each stage. All problems of one set of settings are reported together."""

from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from a3cli.errors import A3Error
from a3cli.settings.gates import Gate, parse_gate

Component = Literal["qk", "ov", "mlp"]
COMPONENTS: tuple[Component, ...] = ("qk", "ov", "mlp")
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Sensitivity = Literal["residual", "probe"]
# How config.json of a stock export describes RoPE of smaller heads; a3cli/runtimes says which runtime loads what.
RopeForm = Literal["auto", "theta", "linear", "longrope"]
# What predicted losses are, by how they were brought to one unit.
LOSSES: dict[Sensitivity, str] = {
    "residual": "squared error relative to the residual stream",
    "probe": "KL(source ‖ compressed) as probed, nats a token",
}
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]


class Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TextSettings(Settings):
    """Which text, and how many blocks of how many tokens are cut from it."""

    dataset: str
    text_field: str | None = None  # `text`; with `chat`, `messages` or `conversations`
    split: str | None = None
    chat: bool = False
    samples: int | None = Field(default=128, ge=1)
    seq_len: int = Field(default=2048, ge=2)
    seed: int = Field(default=0, ge=0)


def parse_batch_size(text: Any) -> Any:
    """A number of blocks, or `auto`: None."""
    if text == "auto":
        return None
    return int(text) if isinstance(text, str) and text.removeprefix("-").isdecimal() else text


BatchSize = Annotated[Annotated[int, Field(ge=1)] | None, BeforeValidator(parse_batch_size)]


class CalibrateSettings(Settings):
    model: str
    revision: str | None = None
    text: TextSettings
    device: str = "auto"
    devices: str | None = None
    dtype: Dtype = "auto"
    batch_size: BatchSize = None
    hidden_states: Literal["disk", "memory", "device"] = "disk"
    mlp_stats: Literal["full", "diagonal"] = "full"
    trust_remote_code: bool = False
    follow_symlinks: bool = False
    full_check: bool = False
    num_processes: int = Field(default=1, ge=1)


def _not_empty(components: tuple[Component, ...]) -> tuple[Component, ...]:
    if not components:
        raise ValueError("name at least one of qk, ov, mlp")
    return tuple(c for c in COMPONENTS if c in components)


class SolveSettings(Settings):
    budget: Fraction | None = None
    attention_budget: Fraction | None = None
    mlp_budget: Fraction | None = None
    method: Literal["best", "paper"] = "best"
    shape: Literal["stock", "per-layer"] = "stock"
    context: int | None = Field(default=None, ge=2)
    components: Annotated[tuple[Component, ...], AfterValidator(_not_empty)] = COMPONENTS
    head_multiple: int = Field(default=16, ge=1)
    mlp_multiple: int = Field(default=64, ge=1)
    min_head: int = Field(default=1, ge=1)
    min_mlp: int = Field(default=1, ge=1)
    rope_form: RopeForm = "auto"
    eigenvalue_floor: float = Field(default=1e-10, ge=0, lt=1)
    ridge: float = Field(default=1e-6, ge=0)
    sensitivity: Sensitivity = "residual"
    probe_blocks: int = Field(default=8, ge=1)
    probe_points: int = Field(default=4, ge=1)
    sequential: bool = False
    refit_rounds: int = Field(default=2, ge=0)
    device: str = "auto"
    dtype: Dtype = "auto"
    batch_size: int = Field(default=1, ge=1)
    num_processes: int | None = Field(default=None, ge=1)


def parse_size(text: Any) -> Any:
    """Bytes from '5GB', '500MB', '1.5GiB' or a plain number of bytes."""
    if not isinstance(text, str):
        return text
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "B": 1, "": 1}
    number = text.strip().rstrip("BGIKMbgikm")
    unit = text.strip()[len(number) :].upper()
    try:
        return int(float(number) * units[unit])
    except (KeyError, ValueError, OverflowError):
        raise ValueError("not of the form 5GB, 500MB or 2GiB") from None


class ExportSettings(Settings):
    dtype: Literal["source", "float32", "bfloat16", "float16"] = "source"
    max_shard_size: Annotated[int, BeforeValidator(parse_size)] = Field(default=5_000_000_000, ge=1)
    overwrite: bool = False
    num_processes: int = Field(default=1, ge=1)
    full_check: bool = False
    check_reproducible: bool = False
    evaluations: tuple[Path, ...] = ()


def parse_budgets(text: Any) -> Any:
    """`0.1:0.5:0.05` (the end included) or `0.1,0.25,0.4`, as decimal numbers."""
    if not isinstance(text, str):
        return text
    try:
        if ":" not in text:
            return tuple(float(part) for part in text.split(","))
        start, stop, step = (Decimal(part) for part in text.split(":"))
        if step <= 0 or not 0 <= start <= stop < 1:
            raise ValueError
    except (ValueError, InvalidOperation):
        raise ValueError("not of the form 0.1:0.5:0.05 or 0.1,0.25,0.4, with budgets from 0 up to below 1") from None
    return tuple(float(start + i * step) for i in range(int((stop - start) / step) + 1))


class ParetoSettings(Settings):
    """Budgets to solve for with every method; with `text`, each result is measured on it too."""

    budgets: Annotated[tuple[Fraction, ...], BeforeValidator(parse_budgets), Field(min_length=1, max_length=1000)]
    head_multiple: int = Field(default=16, ge=1)
    mlp_multiple: int = Field(default=64, ge=1)
    sensitivity: Sensitivity = "residual"
    sequential: bool = False
    text: TextSettings | None = None
    device: str = "auto"
    dtype: Dtype = "auto"
    batch_size: int = Field(default=1, ge=1)


class EvalSettings(Settings):
    model: str
    revision: str | None = None
    against: str | None = None
    against_revision: str | None = None
    texts: tuple[TextSettings, ...]
    fail_if: tuple[Annotated[Gate, BeforeValidator(parse_gate)], ...] = ()
    bootstrap: int = Field(default=1000, ge=0)
    seed: int = Field(default=0, ge=0)
    tasks: tuple[str, ...] = ()
    tasks_path: Path | None = None
    task_limit: int | None = Field(default=None, ge=1)
    device: str = "auto"
    dtype: Dtype = "auto"
    batch_size: int = Field(default=1, ge=1)
    trust_remote_code: bool = False
    follow_symlinks: bool = False


class VerifySettings(Settings):
    """`dtype` is what both the export and the reference compute in; auto is float32, whatever the weights are."""

    device: str = "auto"
    dtype: Dtype = "auto"
    trust_remote_code: bool = False
    require_reference: bool = False


class PlanSettings(Settings):
    """What a run would be asked to do, and on what machine; a rate that is not given is assumed or measured."""

    model: str
    revision: str | None = None
    follow_symlinks: bool = False
    budget: Fraction = 0.25
    shape: Literal["stock", "per-layer"] = "stock"
    samples: int = Field(default=128, ge=1)
    seq_len: int = Field(default=2048, ge=2)
    batch_size: BatchSize = None
    mlp_stats: Literal["full", "diagonal"] = "full"
    head_multiple: int = Field(default=16, ge=2, multiple_of=2)
    mlp_multiple: int = Field(default=64, ge=1)
    dtype: Dtype = "auto"
    devices: str = Field(default="cpu", pattern=r"^(cpu|cuda(:\d+)?(,cuda(:\d+)?)*)$")
    num_processes: int = Field(default=1, ge=1)
    start_seconds: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    disk_gbps: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    tflops: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    solve_tflops: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    measure: bool = False


S = TypeVar("S", bound=Settings)


def make_settings(kind: type[S], **values: Any) -> S:
    """Build settings. Raises A3Error naming every bad value in one line."""
    try:
        return kind(**values)
    except ValidationError as error:
        problems = sorted(f"{option_of(item['loc'])} {item['input']!r}: {item['msg']}" for item in error.errors())
        raise A3Error("bad settings: " + "; ".join(problems)) from None


def option_of(place: tuple[int | str, ...]) -> str:
    """The command-line option of a setting, whether alone, in a tuple or in nested settings."""
    return "--" + [part for part in place if isinstance(part, str)][-1].replace("_", "-")
