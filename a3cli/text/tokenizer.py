"""Load a checkpoint's tokenizer and hash its files."""

from pathlib import Path
from typing import Any

from a3cli.errors import A3Error, first_line
from a3cli.work.files import Json, hash_file

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "merges.txt")
TOKENIZER_EXTRAS = ("added_tokens.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json")


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Return the checkpoint's tokenizer. Raises A3Error if there is none or it does not load."""
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise A3Error(f"{folder} has no tokenizer files; copy the model's tokenizer there")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # tokenizer files fail in many libraries
        raise A3Error(f"{folder}: the tokenizer does not load: {first_line(error)}") from error


def tokenizer_fingerprint(folder: Path) -> Json:
    """Return the hash of each file that tokenisation depends on."""
    names = (*TOKENIZER_FILES, *TOKENIZER_EXTRAS)
    return {name: hash_file(folder / name) for name in names if (folder / name).is_file()}
