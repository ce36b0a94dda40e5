"""Name models and texts in public: without local paths, and with what was read of a text."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from a3cli.settings.texts import joined_name
from a3cli.work.files import Json

if TYPE_CHECKING:
    from a3cli.work.manifests import Calibration, Ingredient, MixturePart, Solution, TextRead

# A Hub id of `--dataset`, optionally with a configuration; and the suffixes of local files.
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:[\w.-]+)?")
TEXT_FILES = (".jsonl", ".parquet", ".txt")
FILES_NAMED = 5  # files of a folder listed on a card; the manifest lists all


def public_name(model: str, revision: str | None) -> str:
    """Return a Hub id, or the name of a folder without its path."""
    return model if revision else Path(model).name


def public_dataset(dataset: str) -> str:
    """Return the public name of a data set: a Hub id, or the last part of a local path."""
    path = Path(dataset)
    on_hub = HUB_ID.fullmatch(dataset) and path.suffix not in TEXT_FILES and not path.exists()
    return dataset if on_hub else path.name


def public_request(request: Json) -> Json:
    """Return a calibration's request, or a part of a merged one, without local paths."""
    named = {**request, "text": {**request["text"], "dataset": public_dataset(request["text"]["dataset"])}}
    if "mixture" in request:
        named["mixture"] = [public_request(part) for part in request["mixture"]]
        named["text"]["dataset"] = joined_name(part["text"]["dataset"] for part in named["mixture"])
    return named | {"merged": [public_request(part) for part in request["merged"]]} if "merged" in request else named


def describe_texts(calibration: "Calibration", quoted: Callable[[str], str]) -> str:
    """Describe what a calibration, or each of its merged parts, has read: data set, files, rows."""
    request = calibration.request
    if request.merged:
        merged = (describe_mixture(part.mixture, quoted) or describe_read(part, quoted) for part in request.merged)
        return " and ".join(merged)
    own = describe_text(request.text.dataset, request.text_files, calibration.text_read, quoted)
    return describe_mixture(request.mixture, quoted) or own


def describe_mixture(mixture: "list[MixturePart] | None", quoted: Callable[[str], str]) -> str:
    """Describe each text of a mixture with its number of blocks; nothing if there is none."""
    return " and ".join(describe_read(part, quoted, count_blocks(part.text.samples or 0)) for part in mixture or ())


def count_blocks(blocks: int) -> str:
    return "1 block" if blocks == 1 else f"{blocks:,} blocks"


def describe_read(part: "Ingredient | MixturePart", quoted: Callable[[str], str], *notes: str) -> str:
    return describe_text(part.text.dataset, part.text_files, part.text_read, quoted, *notes)


def describe_text(
    dataset: str, text_files: dict[str, str], read: "TextRead | None", quoted: Callable[[str], str], *first: str
) -> str:
    name, files = public_dataset(dataset), list(text_files)
    notes = list(first)
    if files and files != [name]:
        more = f" and {len(files) - FILES_NAMED} more" if len(files) > FILES_NAMED else ""
        notes.append(f"read: {', '.join(map(quoted, files[:FILES_NAMED]))}{more}")
    if read and read.rows:
        notes.append(f"{read.rows:,} rows, {read.skipped:,} without text skipped")
    return quoted(name) + (f" ({'; '.join(notes)})" if notes else "")


def describe_context(solution: "Solution") -> str:
    """Return a sentence about `--context`, empty if it was not given."""
    if (context := solution.request.settings.context) is None:
        return ""
    return f"Made for texts of up to {context:,} tokens, which is `max_position_embeddings` in config.json."
