"""What calibration, solution and source record, as pydantic models: the manifests of the work folder.

An export's manifest (`report/manifest.py`) holds the same models, and docs/ has their JSON Schema. The schema is
closed: an unknown field makes a manifest invalid.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import Field

from a3cli.settings import SolveSettings, TextSettings
from a3cli.work.files import Json
from a3cli.work.schema import Count, FileHash, Loss, Pair, Part, Sealed, Sha256, ShardHash, Share, Size
from a3cli.work.sealed import check_request, versions

TextFiles = Annotated[
    dict[str, FileHash],
    Field(description="hash of each local file that was read, by its path in the data set; empty for a Hub data set"),
]


class Fingerprint(Part):
    """Identity of a source: hashes of its configuration, of samples of each shard and, with --full-check, of all."""

    config: Sha256 = Field(alias="config.json", description="hash of config.json in canonical form")
    shards: dict[str, ShardHash] = Field(min_length=1)
    in_full: dict[str, FileHash] | None = None


class Source(Part):
    model: str = Field(description="name of the folder, or Hub id")
    revision: str | None = Field(description="commit on the Hub; null for a folder")
    fingerprint: Fingerprint


class MadeWith(Part):
    """How the sums of one layer were divided, on which rounding depends."""

    processes: Size
    batch_size: Size = Field(description="blocks per batch of each process")


class TextRead(Part):
    """What was read of a data set."""

    rows: Count = Field(description="rows read; text of .txt files is not counted")
    skipped: Count = Field(description="rows without text: null, empty or only white space")
    whole: bool = Field(description="whether the data set was read to its end")
    from_each: bool = Field(default=False, description="whether each file of a larger folder gave a share")


class RecordedText(TextSettings):
    """The settings of a text that was read, with its tokens per block."""

    seq_len: Annotated[int, Field(ge=2, description="Tokens per block.")]


class MixturePart(Part):
    """One of the texts of a mixture."""

    weight: Annotated[float, Field(gt=0, allow_inf_nan=False, description="relative to the other weights")]
    text: RecordedText = Field(description="its settings; `samples` is its number of blocks")
    text_files: TextFiles
    text_read: TextRead | None = None


class Ingredient(Part):
    """One of the calibrations that were merged."""

    calibration: Sha256 = Field(description="hash of its manifest")
    text: RecordedText
    text_files: TextFiles
    text_read: TextRead | None = Field(description="null if an earlier version of a3 calibrated")
    tokens: Size
    device: str
    batch_size: Size | Literal["auto"]
    made_with: list[MadeWith] = Field(description="one entry per layer")
    mixture: list[MixturePart] | None = None


class CalibrationRequest(Part):
    text: RecordedText
    text_files: TextFiles
    source: Fingerprint
    tokenizer: dict[str, FileHash]
    batch_size: Size | Literal["auto"]
    mlp_stats: Literal["full", "diagonal"]
    device: str
    dtype: str
    trust_remote_code: bool = Field(description="whether code of the source's tokenizer or model could run")
    mixture: list[MixturePart] | None = Field(
        default=None, description="the texts of a mixture, in the order of their blocks; `text` has what they share"
    )
    merged: list[Ingredient] | None = None


class Calibration(Part):
    request: CalibrationRequest
    text_read: TextRead | None = Field(description="null if an earlier version of a3 calibrated")
    tokens: Size
    blocks: tuple[Size, Size] = Field(description="number of blocks, and their length in tokens")
    tokens_hash: FileHash
    made_with: list[MadeWith] | None = Field(
        default=None, description="one entry per layer; null for merged calibrations"
    )
    sha256: Sha256 = Field(description="hash of the calibration's manifest")


class Sizes(Part):
    qk: Size
    ov: Size
    mlp: Size


class ByComponent(Part):
    qk: Loss
    ov: Loss
    mlp: Loss


class Change(Part):
    before: Size
    after: Size


class Flops(Change):
    seq_len: Size


class KvCache(Part):
    """Bytes of one sequence's KV cache."""

    tokens: Size
    before: Count
    after: Count


class Curve(Part):
    size: list[Size] = Field(min_length=1)
    loss: list[Loss] = Field(min_length=1)


class Curves(Part):
    qk: Curve
    ov: Curve
    mlp: Curve


class Perplexity(Part):
    before: Loss
    after: Loss


class MeasuredLoss(Part):
    """The figures of `a3 eval`, measured right after solving."""

    held_out: bool = Field(description="whether the tokens are none of those that were calibrated on")
    tokens: Size = Field(description="number of predicted tokens")
    perplexity: Perplexity
    kl: Loss = Field(description="KL(source ‖ compressed), nats per token")
    top1_agreement: Share


class ByDistance(Part):
    distance: list[Count]
    relative: list[Loss]


class EffectiveRank(Part):
    qk: list[Loss] = Field(description="one per KV head")
    ov: list[Loss] = Field(description="one per KV head")
    mlp: Loss


class Floored(Part):
    ov: list[Count] = Field(description="number of eigenvalues raised to the floor, per KV head")


class Damping(Part):
    """Damping relative to the mean of the Gram matrix's diagonal; above --ridge for singular statistics."""

    ov: Loss | None = None
    mlp: Loss | None = None


class AttentionError(Part):
    """Relative squared error of the stream on validation samples, with the closed form's query and key maps and with
    refined ones.
    """

    closed_form: Loss
    refined: Loss


class TokensPerDimension(Part):
    head: Loss
    mlp: Loss


class ExpertTokens(Part):
    """Tokens of the calibration that went through each expert of a layer."""

    tokens: list[Count] = Field(min_length=1)
    few_tokens: list[Count] = Field(description="experts with fewer tokens than channels, which are not refit")


class Layer(Part):
    effective_rank: EffectiveRank
    floored_eigenvalues: Floored
    energy: ByComponent = Field(description="loss of keeping nothing")
    attention_error: AttentionError | None = Field(description="only for smaller heads, with --method best")
    damping: Damping = Field(description="damping used by the refits")
    curves: Curves
    score_error: ByDistance
    tokens_per_dimension: TokensPerDimension
    experts: ExpertTokens | None = Field(default=None, description="of models with experts")


class SolutionRequest(Part):
    settings: SolveSettings
    calibration: Sha256


class Versions(Part):
    a3cli: str
    python: str
    torch: str
    transformers: str
    safetensors: str
    tokenizers: str


class Solution(Part):
    request: SolutionRequest
    shape: Literal["stock", "per-layer"]
    full_size: Sizes
    sizes: list[Sizes] = Field(min_length=1, description="one entry per layer")
    head_dim: Change | None = Field(default=None, description="stock shape only")
    intermediate_size: Change | None = Field(default=None, description="stock shape only")
    budget_asked: Share | None
    budget_reached: Share
    parameters: Change
    bytes: Change
    kv_bytes_per_token: Change
    kv_cache: KvCache | None = Field(
        default=None, description="at the full context, of sliding windows what they hold; null for an earlier a3"
    )
    prefill_flops_per_token: Flops
    rope_slots: list[Pair] | list[list[Pair]] | None = Field(
        description="source pair whose frequency each slot has, including pairs that RoPE does not rotate, of all "
        "layers, or a list for each; "
        "null if heads keep their size, or without RoPE"
    )
    context: Size
    predicted_loss: ByComponent
    measured_loss: MeasuredLoss | None = Field(
        default=None, description="null if logits are not finite; older solutions have none"
    )
    predicted_score_error: ByDistance
    per_layer: list[Layer] = Field(min_length=1)
    versions: Versions
    sha256: Sha256 = Field(description="hash of the solution's manifest")


class CalibrationManifest(Calibration, Sealed):
    """The content of calibration/manifest.json."""

    layers: list[FileHash] = Field(description="hash of each layer's statistics")
    versions: Versions


def calibration_content(request: Json, steps: Mapping[str, Json], blocks: Sequence[int]) -> Json:
    """Return a calibration manifest's content from the record of its steps, finished or not; `blocks` is `[N, T]`."""
    text, *layers = steps.values()  # in the order in which they were finished
    return {
        "request": request,
        "text_read": text["text_read"],
        "tokens": blocks[0] * blocks[1],
        "blocks": list(blocks),
        "tokens_hash": text["hash"],
        "layers": [each["hash"] for each in layers],
        "made_with": [{key: each[key] for key in ("processes", "batch_size")} for each in layers],
        "versions": versions(),
    }


class SolutionManifest(Solution, Sealed):
    """The content of solution/manifest.json."""

    layers: list[FileHash] = Field(min_length=1, description="hash of each layer's projections")


M = TypeVar("M", CalibrationManifest, SolutionManifest)


def finished_manifest(kind: type[M], file: Path, request: Json, *, holder: str, nested: str, otherwise: str) -> M:
    """Return the manifest of a finished stage. Raises A3Error, as `check_request` does, if it has another request."""
    found = kind.read(file, "use --overwrite")
    check_request(found.request.plain(), request, holder=holder, nested=nested, otherwise=otherwise)
    return found


SOURCE_REMEDY = "run a3 calibrate on the source again"


class SourceRecord(Sealed):
    """The content of source.json: which checkpoint was calibrated, and where the later stages find it."""

    model: str = Field(description="folder, or Hub id")
    revision: str | None = Field(description="commit on the Hub; null for a folder")
    follow_symlinks: bool = False
    fingerprint: Fingerprint
    small_files: dict[str, FileHash] = Field(description="hash of each carried file: tokenizer, chat template, licence")
    folder: str | None = Field(default=None, description="where the files of a Hub id lie; null for the Hub's cache")

    @property
    def place(self) -> str:
        """Return the folder, or the Hub id if its files are in the Hub's cache."""
        return self.folder or self.model
