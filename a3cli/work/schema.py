"""What all manifests are made of: parts that allow no unknown field, and files that hold a hash of their content."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from typing_extensions import Self

from a3cli.errors import A3Error
from a3cli.settings.problems import find_problems
from a3cli.work.files import Json, hash_json, read_json, write_json
from a3cli.work.sealed import unaltered

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]  # of JSON content
FileHash = Annotated[str, Field(pattern="^blake3:[0-9a-f]{64}$")]
ShardHash = Annotated[str, Field(pattern="^(sampled-)?blake3:[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]
Size = Annotated[int, Field(ge=1)]
Loss = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Pair = Annotated[float, Field(ge=0)]


class Part(BaseModel):
    """A part of a manifest. Its Python names may differ from the file's: `config` is `config.json` there."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    def plain(self, **which: Any) -> Json:
        """Return the content as JSON has it, without entries that were never set."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True, **which)


class Sealed(Part):
    """A manifest: a file with a hash of its own content."""

    sha256: Sha256 = Field(description="hash of the rest of the file")

    @classmethod
    def write(cls, path: Path, content: Json) -> Self:
        """Write a manifest with this content and return it."""
        sealed = {**content, "sha256": hash_json(content)}
        manifest = cls.model_validate(sealed)
        write_json(path, sealed)
        return manifest

    @classmethod
    def read(cls, path: Path, remedy: str) -> Self:
        """Return the manifest in a file. Raises A3Error if it is missing, malformed, altered or of another version."""
        return cls.parse(unaltered(read_json(path, remedy), path, remedy), path, remedy)

    @classmethod
    def parse(cls, content: Json, path: Path, remedy: str) -> Self:
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = find_problems(error, cls)[0].describe()
            raise A3Error(f"{path} does not follow the schema of this version of a3 ({first}); {remedy}") from None
