"""Find a text: local files or a Hub id. Check that it exists and that its options apply to it."""

import logging
from collections.abc import Sequence
from pathlib import Path

from a3cli.errors import A3Error
from a3cli.settings import TextSettings

log = logging.getLogger(__name__)

# alias: (hub id, configuration, split to calibrate on, split to evaluate on)
ALIASES = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", "test"),
    "wikitext103": ("Salesforce/wikitext", "wikitext-103-raw-v1", "train", "test"),
    "c4": ("allenai/c4", "en", "train", "validation"),
    "slimpajama": ("DKYoon/SlimPajama-6B", None, "train", "test"),
}
FORMATS = {".jsonl": "json", ".parquet": "parquet", ".txt": "text"}
HUB_PATIENCE = 10.0  # seconds


def check_texts(texts: Sequence[TextSettings]) -> None:
    """Check that all data sets exist and every option affects at least one of them. Raises A3Error."""
    for text in texts:
        check_exists(text)
    names = ", ".join(text.dataset for text in texts)
    rows, hub = any(map(has_rows, texts)), any(not Path(text.dataset).exists() for text in texts)
    if not rows and any(text.chat for text in texts):
        raise A3Error(
            f"dataset {names}: --chat renders rows of messages, and a .txt file has no rows; leave out --chat"
        )
    if not rows and any(text.text_field is not None for text in texts):
        raise A3Error(
            f"dataset {names}: --text-field names a field of rows, and a .txt file has no rows; leave out --text-field"
        )
    if not hub and any(text.split is not None for text in texts):
        raise A3Error(f"dataset {names}: --split names a split of a Hub data set, and this is local; leave out --split")


def check_mixture(texts: Sequence[TextSettings]) -> None:
    """Check the texts of a calibration. Raises A3Error, also if one is there twice: it would give the same blocks."""
    check_texts(texts)
    seen = set()
    for text in texts:
        path = Path(text.dataset)
        key = (str(path.resolve()) if path.exists() else text.dataset, text.text_field, text.split)
        if key in seen:
            raise A3Error(f"dataset {text.dataset} is given twice, and its text would count twice; give it once")
        seen.add(key)


def check_exists(settings: TextSettings) -> None:
    """Check that a data set has readable local files or is a Hub id. Raises A3Error."""
    path, name = Path(settings.dataset), settings.dataset.partition(":")[0]
    if path.exists():
        local_files(path)
    elif name not in ALIASES and (
        path.suffix in FORMATS or name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith("/")
    ):
        raise A3Error(
            f"dataset {settings.dataset!r}: no such file or folder, not a Hub id (owner/name[:configuration]), "
            f"and none of {', '.join(ALIASES)}"
        )


def check_on_hub(settings: TextSettings) -> None:
    """Check that the Hub has the data set. Raises A3Error; does nothing if the Hub cannot be reached."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if Path(settings.dataset).exists():
        return
    try:
        HfApi().dataset_info(hub_id(settings.dataset), timeout=HUB_PATIENCE)
    except GatedRepoError:
        return
    except RepositoryNotFoundError as error:
        raise A3Error(
            f"dataset {settings.dataset!r}: the Hub has no such data set, or it is private (hf auth login)"
        ) from error
    except Exception:  # offline, no network or a server error: the name may be right
        log.debug("the Hub does not say whether there is a data set %s", settings.dataset)


def has_rows(settings: TextSettings) -> bool:
    """Return whether the text has rows with fields, as everything but .txt files does."""
    path = Path(settings.dataset)
    return not path.exists() or any(file.suffix != ".txt" for file in local_files(path))


def local_files(path: Path) -> list[Path]:
    """Return the file, or the readable files of the folder in name order. Raises A3Error if there are none."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in FORMATS)
    if not files or files[0].suffix not in FORMATS:
        raise A3Error(f"dataset {path}: not a .txt, .jsonl or .parquet file, nor a folder with any")
    return files


def hub_id(dataset: str) -> str:
    """Return the Hub id that an alias or an `owner/name[:configuration]` stands for."""
    name = dataset.partition(":")[0]
    return ALIASES[name][0] if name in ALIASES else name
