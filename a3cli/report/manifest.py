"""a3_manifest.json, the provenance of an export, as pydantic models from which docs/ gets its JSON Schema.

The schema is closed: an unknown field makes a manifest invalid. Add new fields here, and run
`python scripts/manifest_schema.py` to update the schema.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator

from a3cli.report.measured import Measured
from a3cli.runtimes.rules import Loads
from a3cli.work.files import Json, read_json
from a3cli.work.manifests import Calibration, Solution, Source, Versions
from a3cli.work.schema import FileHash, Part, Sealed, Sha256, Size
from a3cli.work.sealed import unaltered

MANIFEST = "a3_manifest.json"
SCHEMA_ID = "a3_manifest.schema.json"


AsType = Annotated[
    Literal["llama"] | None, Field(description="model type that config.json has in place of the source's")
]


class Runtime(Part):
    runtime: str
    loads: Loads
    note: str = Field(description="the reason, or a condition")


class ExportSummary(Part):
    """What an inspection shows of an export beside its calibration and solution."""

    dtype: str
    max_shard_size: Size
    as_type: AsType = None
    runtimes: list[Runtime]
    files: dict[str, FileHash]


class ExportFacts(Part):
    """How an export was made: all of its manifest but the hashes."""

    source: Source
    calibration: Calibration
    solution: Solution
    dtype: Literal["source", "float32", "bfloat16", "float16"]
    max_shard_size: Size
    as_type: AsType = None
    measured: list[Measured] = Field(description="figures of a3 eval that were given to a3 export")
    runtimes: list[Runtime] = Field(min_length=1, description="which runtimes load the export")
    versions: Versions


class Manifest(ExportFacts, Sealed):
    """Provenance of an export: its source, how it was made, and the hash of each of its files."""

    model_config = ConfigDict(title="a3_manifest.json")

    files: dict[str, FileHash] = Field(min_length=1, description="hash of every other file of the folder")
    sha256: Sha256 = Field(
        description="hash of the rest of this file: JSON with sorted keys, as written by Python's json.dumps"
    )

    @model_validator(mode="after")
    def _one_entry_a_layer(self) -> "Manifest":
        if len(self.solution.per_layer) != len(self.solution.sizes):
            raise ValueError("per_layer and sizes have different lengths")
        return self

    def summary(self) -> ExportSummary:
        said = ExportSummary.model_fields.keys() & self.model_fields_set
        return ExportSummary(**{name: getattr(self, name) for name in said})


def schema() -> Json:
    """Return the JSON Schema, draft 2020-12."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": SCHEMA_ID,
        **Manifest.model_json_schema(),
    }


def read_export_manifest(path: Path) -> Manifest:
    """Return an export's manifest.

    Raises A3Error if it does not follow this version's schema or was altered.
    """
    found = read_json(path)
    manifest = Manifest.parse(found, path, "run a3 export again")
    unaltered(found, path, "export again")
    return manifest
