"""Settings of `a3 generate`: which models continue which prompts, and how tokens are chosen."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from a3cli.settings import Device, Dtype, FollowSymlinks, RemoteCode, Revision, Settings
from a3cli.settings.options import HOW, TEXT


class GenerateSettings(Settings):
    """What is continued by a model and, with `against`, by a second one; each prompt on its own."""

    model: Annotated[str, Field(description="Local folder or Hub id.")]
    revision: Revision = None
    against: Annotated[str | None, HOW, Field(description="Model to compare with, such as the source.")] = None
    against_revision: Annotated[str | None, HOW, Field(description="Revision of --against.")] = None
    prompt: Annotated[
        tuple[Annotated[str, Field(min_length=1)], ...], TEXT, Field(description="Text to continue; repeatable.")
    ] = ()
    prompts: Annotated[Path | None, TEXT, Field(description="UTF-8 file with one text to continue per line.")] = None
    max_new_tokens: Annotated[int, HOW, Field(ge=1, description="Maximum number of tokens per continuation.")] = 50
    temperature: Annotated[
        float, HOW, Field(ge=0, allow_inf_nan=False, description="0: the likeliest token (greedy); above: sample.")
    ] = 0.0
    seed: Annotated[int, HOW, Field(ge=0, lt=2**63, description="Seed of each continuation that is sampled.")] = 0
    device: Device = "auto"
    dtype: Dtype = "auto"
    trust_remote_code: RemoteCode = False
    follow_symlinks: FollowSymlinks = False
