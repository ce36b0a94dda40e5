"""Find the files of a checkpoint, in a local folder or the Hub's cache, and read its config.json."""

import glob
from collections.abc import Sequence
from pathlib import Path

from a3cli.errors import A3Error, first_line
from a3cli.models.families.wrappers import decoder_config
from a3cli.work.files import Json, read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "adapter_config.json"
# Files that are downloaded, and that an export carries over, beside the weights.
METADATA_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "NOTICE*", "USE_POLICY*", "README.md")


def find_folder(model: str, revision: str | None = None, *, files: Sequence[str], cached_only: bool = False) -> Path:
    """Return the local folder, or that of a Hub id in the cache after downloading its `files` (patterns).

    Files in subfolders of a repository are not downloaded; with `cached_only` none are. Raises A3Error if the model is
    neither a folder nor a Hub id, or the Hub cannot be reached.
    """
    if Path(model).is_dir():
        if revision is not None:
            raise A3Error(
                f"model {model!r} is a local folder, which has no revisions; leave out --revision (--against-revision)"
            )
        return Path(model)
    if Path(model).exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise A3Error(f"model {model!r}: no such folder, and not a Hub id (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                model,
                revision=revision,
                allow_patterns=list(files),
                ignore_patterns=["*/*"],
                local_files_only=cached_only,
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise A3Error(
            f"model {model!r} is not a local folder and could not be downloaded from the Hub: {first_line(error)} "
            "(check the name, `hf auth login` for gated models, HF_HUB_OFFLINE)"
        ) from error


def find_checkpoint(model: str, revision: str | None = None, *, cached_only: bool = False) -> Path:
    """Return the folder of a checkpoint; for a Hub id, download the weights that are read and no others.

    The repository's index names them, so it is downloaded first, with config.json and the small files.
    """
    folder = find_folder(model, revision, files=METADATA_FILES, cached_only=cached_only)
    if Path(model).is_dir():
        return folder
    weights = [glob.escape(file) for file in weight_files(folder)]
    return find_folder(model, folder.name, files=(*METADATA_FILES, *weights), cached_only=cached_only)


def weight_files(folder: Path) -> list[str]:
    """Return the names of the weight files that loaders may read: the single file, and the shards of the index."""
    indexed = read_index(folder).values() if (folder / INDEX).is_file() else ()
    return sorted({SINGLE, *indexed})


def read_index(folder: Path) -> dict[str, str]:
    """Return the index's `weight_map`, tensor → file. Raises A3Error unless all are safetensors files of the folder."""
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise A3Error(f"{folder / INDEX} has no weight_map; download the checkpoint again")
    for file in weight_map.values():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise A3Error(
                f"{folder / INDEX} names {file!r}, which is not a safetensors file of this folder; "
                "download the checkpoint again"
            )
    return weight_map


def has_weights(folder: Path) -> bool:
    """Return whether all weight files that loaders read exist."""
    if (folder / SINGLE).is_file():
        return True
    return (folder / INDEX).is_file() and all((folder / file).is_file() for file in read_index(folder).values())


def read_remote_tensors(model: str, revision: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtype and shape of each tensor of a Hub id from its files' headers, without downloading weights.

    Raises A3Error with the reason if they cannot be read.
    """
    from huggingface_hub import get_safetensors_metadata

    try:
        files = get_safetensors_metadata(model, revision=revision).files_metadata
    except Exception as error:  # HTTP, the Hub's client, parsing
        raise A3Error(f"their headers could not be read: {first_line(error)}") from error
    return {name: (info.dtype, tuple(info.shape)) for file in files.values() for name, info in file.tensors.items()}


def read_config(folder: Path, name: str) -> Json:
    """Return the raw config.json. Raises A3Error if it is missing, no JSON object, or that of a quantised model."""
    config = read_json(folder / "config.json")
    for part in (config, decoder_config(config)):
        if found := part.get("quantization_config") or part.get("compression_config"):
            method = found.get("quant_method") if isinstance(found, dict) else None
            how = f"{method}, config.json says" if isinstance(method, str) else "config.json says so"
            raise A3Error(f"{name} is quantised ({how}); use its fp32, bf16 or fp16 original")
    return config


def refuse_per_layer(config: Json, name: str) -> None:
    """Raise A3Error for a model that is itself a per-layer export: it cannot be compressed again."""
    if "per_layer_config" in config:
        raise A3Error(f"{name}: its layers differ in size (a per-layer export?); compress its source instead")


def refuse_adapter(folder: Path) -> None:
    """Raise A3Error for a folder with an adapter: transformers adds it to the weights wherever peft is installed."""
    if (folder / ADAPTER).exists():
        raise A3Error(
            f"{folder / ADAPTER} belongs to an adapter, which transformers loads if peft is installed and a3 does not; "
            "merge the adapter into the weights first (peft's merge_and_unload), or remove its files"
        )
