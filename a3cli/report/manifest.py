"""a3_manifest.json, the provenance of an export, as pydantic models from which docs/ gets its JSON Schema.

The schema is closed: an unknown field makes a manifest invalid. Add new fields here, and run
`python scripts/manifest_schema.py` to update the schema.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from a3cli.errors import A3Error
from a3cli.report.measured import Measured
from a3cli.runtimes.rules import Loads
from a3cli.settings import SolveSettings, TextSettings
from a3cli.work.folder import Json, read_json, unaltered

MANIFEST = "a3_manifest.json"
SCHEMA_ID = "a3_manifest.schema.json"

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]  # of JSON content
FileHash = Annotated[str, Field(pattern="^blake3:[0-9a-f]{64}$")]
ShardHash = Annotated[str, Field(pattern="^(sampled-)?blake3:[0-9a-f]{64}$")]
TextFiles = Annotated[
    dict[str, FileHash],
    Field(description="hash of each local file that was read, by its path in the data set; empty for a Hub data set"),
]
Count = Annotated[int, Field(ge=0)]
Size = Annotated[int, Field(ge=1)]
Loss = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Pair = Annotated[float, Field(ge=0)]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


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


class Ingredient(Part):
    """One of the calibrations that were merged."""

    calibration: Sha256 = Field(description="hash of its manifest")
    text: TextSettings
    text_files: TextFiles
    text_read: TextRead | None = Field(description="null if an earlier version of a3 calibrated")
    tokens: Size
    device: str
    batch_size: Size | Literal["auto"]
    made_with: list[MadeWith] = Field(description="one entry per layer")


class CalibrationRequest(Part):
    text: TextSettings
    text_files: TextFiles
    source: Fingerprint
    tokenizer: dict[str, FileHash]
    batch_size: Size | Literal["auto"]
    mlp_stats: Literal["full", "diagonal"]
    device: str
    dtype: str
    trust_remote_code: bool = Field(description="whether code of the source's tokenizer or model could run")
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


class Curve(Part):
    size: list[Size] = Field(min_length=1)
    loss: list[Loss] = Field(min_length=1)


class Curves(Part):
    qk: Curve
    ov: Curve
    mlp: Curve


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


class Layer(Part):
    effective_rank: EffectiveRank
    floored_eigenvalues: Floored
    energy: ByComponent = Field(description="loss of keeping nothing")
    attention_error: AttentionError | None = Field(description="only for smaller heads, with --method best")
    damping: Damping = Field(description="damping used by the refits")
    curves: Curves
    score_error: ByDistance
    tokens_per_dimension: TokensPerDimension


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
    prefill_flops_per_token: Flops
    rope_slots: list[Pair] | list[list[Pair]] | None = Field(
        description="source pair whose frequency each slot has, including pairs that RoPE does not rotate; "
        "null if heads keep their size"
    )
    context: Size
    predicted_loss: ByComponent
    predicted_score_error: ByDistance
    per_layer: list[Layer] = Field(min_length=1)
    versions: Versions
    sha256: Sha256 = Field(description="hash of the solution's manifest")


class Runtime(Part):
    runtime: str
    loads: Loads
    note: str = Field(description="the reason, or a condition")


class Manifest(Part):
    """Provenance of an export: its source, how it was made, and the hash of each of its files."""

    model_config = ConfigDict(extra="forbid", title="a3_manifest.json")

    source: Source
    calibration: Calibration
    solution: Solution
    dtype: Literal["source", "float32", "bfloat16", "float16"]
    max_shard_size: Size
    measured: list[Measured] = Field(description="figures of a3 eval that were given to a3 export")
    runtimes: list[Runtime] = Field(min_length=1, description="which runtimes load the export")
    versions: Versions
    files: dict[str, FileHash] = Field(min_length=1, description="hash of every other file of the folder")
    sha256: Sha256 = Field(
        description="hash of the rest of this file: JSON with sorted keys, as written by Python's json.dumps"
    )

    @model_validator(mode="after")
    def _one_entry_a_layer(self) -> "Manifest":
        if len(self.solution.per_layer) != len(self.solution.sizes):
            raise ValueError("per_layer and sizes have different lengths")
        return self


def schema() -> Json:
    """Return the JSON Schema, draft 2020-12."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": SCHEMA_ID,
        **Manifest.model_json_schema(),
    }


def read_export_manifest(path: Path) -> Json:
    """Return an export's manifest.

    Raises A3Error if it does not follow this version's schema or was altered.
    """
    found = read_json(path)
    try:
        Manifest.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise A3Error(
            f"{path} does not follow the schema of this version of a3 ({where}: {first['msg']}); run a3 export again"
        ) from None
    return unaltered(found, path, "export again")
