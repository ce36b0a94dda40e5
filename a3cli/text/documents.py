"""Read the documents of a text: local files, and data sets of the Hub. The only importer of `datasets`."""

import itertools
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from a3cli.errors import A3Error, first_line
from a3cli.settings import TextSettings
from a3cli.text.reach import unreachable
from a3cli.text.rows import chat_field, chat_of, text_field, text_of
from a3cli.text.sources import ALIASES, FORMATS, check_exists, check_on_hub, hub_id, local_files
from a3cli.work.files import Json, hash_file
from a3cli.work.manifests import TextRead as RecordedRead

log = logging.getLogger(__name__)

LARGE_TEXT = 1 << 26  # bytes
LARGEST_RATIO = 200  # of unpacked to packed bytes; text reaches ten
LINES = "Salesforce/wikitext"  # its rows are lines: papers keep the empty ones


@dataclass
class TextRead:
    """Counts and files of a data set that is being read."""

    files: dict[str, str] = field(default_factory=dict)  # hash of each local file that was opened, in reading order
    rows: int = 0  # of files other than .txt, and of Hub data sets
    skipped: int = 0  # rows without text
    whole: bool = False  # whether the data set was read to its end
    from_each: bool = False  # whether a folder was too large for that and each of its files gave a share
    recognised: set[str] = field(default_factory=set)  # files and sets whose chats the log has mentioned

    def describe(self) -> Json:
        """Return the counts for a manifest."""
        counts = {"rows": self.rows, "skipped": self.skipped, "whole": self.whole}
        return counts | ({"from_each": True} if self.from_each else {})

    @property
    def skipping(self) -> str:
        """Return how many rows were skipped, in words; empty if none."""
        return f"skipped {self.skipped} of {self.rows} rows without text" if self.skipped else ""


def describe_all(reads: Sequence[TextRead | RecordedRead]) -> Json:
    """Return the counts of several texts together."""
    rows, skipped = sum(each.rows for each in reads), sum(each.skipped for each in reads)
    whole, from_each = all(each.whole for each in reads), any(each.from_each for each in reads)
    return TextRead(rows=rows, skipped=skipped, whole=whole, from_each=from_each).describe()


def check_reachable(texts: Sequence[TextSettings], *, purpose: str) -> None:
    """Check that the Hub has its data sets, or the cache if the Hub cannot be reached. Raises A3Error."""
    on_hub = [text for text in texts if not Path(text.dataset).exists()]
    reason = unreachable() if on_hub else None
    for text in on_hub:
        if reason:
            load_hub_dataset(text, purpose=purpose, reason=reason)
        else:
            check_on_hub(text)


def documents(tokenizer: Any, settings: TextSettings, *, purpose: str, read: TextRead) -> Iterator[Iterable[str]]:
    """Yield each document as an iterable of pieces: a .txt file's lines as they stand, or a row's whole text."""
    check_exists(settings)
    path = Path(settings.dataset)
    if not path.exists():
        yield from row_documents(load_hub_dataset(settings, purpose=purpose), tokenizer, settings, read)
        return
    for file in local_files(path):
        read.files[name_in(path, file)] = hash_text_file(file)
        yield from file_documents(file, tokenizer, settings, read)


def file_documents(file: Path, tokenizer: Any, settings: TextSettings, read: TextRead) -> Iterator[Iterable[str]]:
    """Yield the documents of one local file of a data set."""
    if file.suffix == ".txt":
        yield read_lines(file)
        return
    if file.suffix == ".parquet":
        check_parquet(file)
    one = settings.model_copy(update={"dataset": str(file)})  # what an error names
    loaded = load(FORMATS[file.suffix], one, data_files=str(file), split="train")
    yield from row_documents(loaded, tokenizer, one, read)


def name_in(path: Path, file: Path) -> str:
    """Return a file's path relative to the data set `path`, or its name if it is the data set."""
    return file.name if file == path else file.relative_to(path).as_posix()


def hash_text_file(file: Path) -> str:
    try:
        return hash_file(file)
    except OSError as error:
        raise A3Error(f"dataset {file}: {error.strerror}") from error


def read_lines(file: Path) -> Iterator[str]:
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            yield from lines
    except (OSError, UnicodeDecodeError) as error:
        raise A3Error(f"dataset {file}: {error}; a3 reads UTF-8 text") from error


def check_parquet(file: Path) -> None:
    """Check that a small file does not unpack to a huge one, which would exhaust memory. Raises A3Error."""
    from pyarrow import ArrowException, parquet

    try:
        metadata = parquet.read_metadata(file)
    except (ArrowException, OSError):
        return  # not a parquet file: loading it raises the error
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    columns = [group.column(i) for group in groups for i in range(group.num_columns)]
    packed, unpacked = (
        sum(getattr(c, f"total_{kind}_size") for c in columns) for kind in ("compressed", "uncompressed")
    )
    if unpacked > max(LARGE_TEXT, LARGEST_RATIO * packed):
        sizes = f"{packed / 1e6:.1f} MB that unpack to {unpacked / 1e6:,.0f} MB"
        raise A3Error(f"dataset {file}: {sizes} are no text; use another file")


def load_hub_dataset(settings: TextSettings, *, purpose: str, reason: str | None = None) -> Iterable[Json]:
    """Stream a Hub data set: an alias, or `owner/name[:configuration]`. `reason` says why the Hub is out of reach."""
    name, _, configuration = settings.dataset.partition(":")
    path, usual, train, test = ALIASES.get(name, (name, None, "train", "test"))
    split = settings.split or (train if purpose == "calibrate" else test)
    options = {"name": configuration or usual, "split": split}
    if reason := reason or unreachable():
        return load_cached(path, settings, reason, **options)
    return load(path, settings, **options)


def load_cached(path: str, settings: TextSettings, reason: str, **options: Any) -> Iterable[Json]:
    """Read a Hub data set from the cache of `datasets`. Raises A3Error with `reason` if it is not there."""
    from datasets import load_dataset

    try:
        with working_offline():
            return load_dataset(path, streaming=True, **options)  # type: ignore[no-any-return]
    except Exception as error:
        detail = f" ({first_line(error)})" if isinstance(error, ValueError) else ""  # another configuration or split is
        raise A3Error(
            f"dataset {settings.dataset}: {reason}, and it is not in the cache{detail}; give --dataset FILE"
        ) from error


@contextmanager
def working_offline() -> Iterator[None]:
    """Let the libraries use their caches only, as with HF_HUB_OFFLINE=1."""
    from datasets import config
    from huggingface_hub import constants

    before = config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


def load(path: str, settings: TextSettings, **options: Any) -> Iterable[Json]:
    from datasets import load_dataset

    try:
        return load_dataset(path, streaming=True, **options)  # type: ignore[no-any-return]
    except Exception as error:  # `datasets` raises what its file systems and parsers raise
        raise A3Error(f"dataset {settings.dataset}: {first_line(error)} (HF_HUB_OFFLINE={offline()})") from error


def row_documents(
    loaded: Iterable[Json], tokenizer: Any, settings: TextSettings, read: TextRead
) -> Iterator[tuple[str]]:
    """Yield the text of each non-empty row, and count the others. Rows with messages in place of text are chats."""
    keep_empty = hub_id(settings.dataset) == LINES and not settings.chat
    iterator = iter(loaded)
    for number in itertools.count(1):
        try:
            row = next(iterator, None)
        except Exception as error:
            raise A3Error(f"dataset {settings.dataset}: cannot be read: {first_line(error)}") from error
        if row is None:
            return
        where = f"dataset {settings.dataset}, row {number}"
        chats = chat_field(row, settings)
        rendered = settings.chat or chats
        text = chat_of(row, tokenizer, settings, where) if rendered else text_of(row, settings, where)
        if chats and text and not settings.chat and settings.dataset not in read.recognised:
            log.info("dataset %s: no field 'text'; its %r go through the chat template", settings.dataset, chats)
            read.recognised.add(settings.dataset)
        read.rows += 1
        if text.strip() or (keep_empty and row.get(text_field(settings)) is not None):
            yield (text,)
        else:
            read.skipped += 1


def offline() -> str:
    return os.environ.get("HF_HUB_OFFLINE", "0")
