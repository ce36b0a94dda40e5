"""Where a checkpoint's files are: a local folder, or the hub's cache. Its config.json as it stands."""

from collections.abc import Sequence
from pathlib import Path

from a3cli.errors import A3Error, first_line
from a3cli.work import Json, read_json


def find_folder(model: str, revision: str | None = None, *, files: Sequence[str], option: str = "--revision") -> Path:
    """The local folder, or that of a hub id in the hub's cache, with the `files` (patterns) downloaded.

    Raises A3Error if there is neither, the hub cannot be reached, or a local folder is asked for a revision, which
    `option` gave.
    """
    if Path(model).is_dir():
        if revision is not None:
            raise A3Error(f"model {model!r} is a local folder, which has no revisions; leave out {option}")
        return Path(model)
    if Path(model).exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise A3Error(f"model {model!r}: no such folder, and no hub id (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(files)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise A3Error(
            f"model {model!r} is no local folder and cannot be had from the hub: {first_line(error)} "
            "(check the name, `hf auth login` for gated models, HF_HUB_OFFLINE)"
        ) from error


def read_config(folder: Path, name: str) -> Json:
    """The raw config.json. Raises A3Error if it is missing, no JSON object, or that of a quantised model."""
    config = read_json(folder / "config.json")
    if config.get("quantization_config") or config.get("compression_config"):
        raise A3Error(f"{name} is quantised (config.json says so); a3 needs its fp32, bf16 or fp16 original")
    return config


def refuse_per_layer(config: Json, name: str) -> None:
    """Raise A3Error for a model that is itself a per-layer export: it can be measured, not made smaller again."""
    if "per_layer_config" in config:
        raise A3Error(f"{name}: its layers differ in size (a per-layer export?); compress its source instead")
