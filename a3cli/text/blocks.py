"""Turn a dataset or local file into token blocks `[N, T]`. The only importer of `datasets`.

docs/text.md describes how blocks are cut: rows are joined by a blank line and tokenised as one stream,
the stream is read until it holds `POOL` times the tokens asked for (or ends), and N blocks that do not
overlap are placed in it at seeded random offsets, uniformly among all such placements.
"""

import itertools
import logging
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from a3cli.errors import A3Error, first_line
from a3cli.settings import TextSettings
from a3cli.work.files import Json, hash_file

log = logging.getLogger(__name__)

POOL = 8
SEPARATOR = "\n\n"
TEXT_CHUNK = 1 << 16
LARGE_TEXT, PACKED_AT_MOST = 1 << 26, 200  # bytes; text packs to a tenth at best
# alias: (hub id, configuration, split to calibrate on, split to evaluate on)
ALIASES = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", "test"),
    "wikitext103": ("Salesforce/wikitext", "wikitext-103-raw-v1", "train", "test"),
    "c4": ("allenai/c4", "en", "train", "validation"),
    "slimpajama": ("DKYoon/SlimPajama-6B", None, "train", "test"),
}
LINES = "Salesforce/wikitext"  # its rows are lines; papers join them all, with the empty ones
FORMATS = {".jsonl": "json", ".parquet": "parquet", ".txt": "text"}
SPEAKERS = {"human": "user", "gpt": "assistant", "system": "system"}  # roles of ShareGPT's `from`
CHATS = ("messages", "conversations")
HUB_PATIENCE = 10.0  # seconds
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "merges.txt")
TOKENIZER_EXTRAS = ("added_tokens.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json")


@dataclass
class TextRead:
    """Counts and files of a data set that is being read."""

    files: dict[str, str] = field(default_factory=dict)  # hash of each local file that was opened, in reading order
    rows: int = 0  # of files other than .txt, and of Hub data sets
    skipped: int = 0  # rows without text
    whole: bool = False  # whether the data set was read to its end

    def describe(self) -> Json:
        """Return the counts for a manifest."""
        return {"rows": self.rows, "skipped": self.skipped, "whole": self.whole}

    @property
    def skipping(self) -> str:
        """Return how many rows were skipped, in words; empty if none."""
        return f"skipped {self.skipped} of {self.rows} rows without text" if self.skipped else ""


def log_skipped(settings: TextSettings, read: TextRead) -> None:
    if read.skipping:
        log.info("dataset %s: %s", settings.dataset, read.skipping)


def sample_blocks(tokenizer: Any, settings: TextSettings, read: TextRead | None = None) -> torch.Tensor:
    """Return `samples` blocks `[N, T]` int64 for calibration; `read` records their source.

    Raises A3Error if there is too little text.
    """
    assert settings.samples is not None
    read = read or TextRead()
    wanted = settings.samples * settings.seq_len
    tokens = itertools.islice(token_stream(tokenizer, settings, purpose="calibrate", read=read), POOL * wanted)
    stream = torch.tensor(array("q", tokens), dtype=torch.int64)
    slack = len(stream) - wanted
    if slack < 0:
        raise A3Error(
            f"dataset {settings.dataset}: too little text, {len(stream)} tokens give {len(stream) // settings.seq_len} "
            f"blocks of {settings.seq_len}, {settings.samples} were asked for; lower --samples or --seq-len"
            + (f" ({read.skipping})" if read.skipping else "")
        )
    log_skipped(settings, read)
    # Sorted draws from [0, slack], one per block, plus the length of the blocks before it: every placement of N
    # non-overlapping blocks is possible.
    generator = torch.Generator().manual_seed(settings.seed)
    offsets = torch.randint(slack + 1, (settings.samples,), generator=generator).sort().values
    starts = offsets + settings.seq_len * torch.arange(settings.samples)
    return torch.stack([stream[start : start + settings.seq_len] for start in starts])


def evaluation_blocks(tokenizer: Any, settings: TextSettings, read: TextRead | None = None) -> list[torch.Tensor]:
    """Return the stream as consecutive blocks of `seq_len`, the last one shorter; `samples` limits their number.

    Every token is in exactly one block; `read` records their source. Raises A3Error if there are fewer than two
    tokens.
    """
    read = read or TextRead()
    stream = token_stream(tokenizer, settings, purpose="evaluate", read=read)
    limit = None if settings.samples is None else settings.samples * settings.seq_len
    tokens = torch.tensor(list(itertools.islice(stream, limit)))
    if len(tokens) < 2:
        raise A3Error(f"dataset {settings.dataset}: too little text, {len(tokens)} tokens; two are needed")
    log_skipped(settings, read)
    return list(tokens.split(settings.seq_len))


def check_fit(blocks: Iterable[torch.Tensor], config: Json, model: str) -> None:
    """Check that blocks fit the model's context and have only tokens with an embedding. Raises A3Error."""
    context, vocabulary = config.get("max_position_embeddings"), config.get("vocab_size")
    for block in blocks:
        if isinstance(context, int) and len(block) > context:
            raise A3Error(f"--seq-len {len(block)} is longer than the context of {model} ({context}); lower it")
        if isinstance(vocabulary, int) and int(block.max()) >= vocabulary:
            raise A3Error(
                f"the tokenizer of {model} gives token {int(block.max())}, its vocabulary has {vocabulary}; "
                "use the tokenizer files of this model"
            )


def token_stream(
    tokenizer: Any, settings: TextSettings, *, purpose: str, read: TextRead | None = None
) -> Iterator[int]:
    """Yield the token ids of the whole text, with one BOS at the beginning if the tokenizer adds one."""
    first = True
    for text in texts(tokenizer, settings, purpose=purpose, read=read or TextRead()):
        try:
            tokens = tokenizer(text, add_special_tokens=first, verbose=False)["input_ids"]
        except Exception as error:  # tokenizer settings that no library checks on loading
            raise A3Error(f"dataset {settings.dataset}: the model's tokenizer fails: {first_line(error)}") from error
        yield from tokens
        first = False


def texts(tokenizer: Any, settings: TextSettings, *, purpose: str, read: TextRead) -> Iterator[str]:
    """Yield pieces of text of about 64 KiB, tokenised one by one: encodings take about 100 times the text's size."""
    pending: list[str] = []
    size = 0
    for piece in pieces(tokenizer, settings, purpose=purpose, read=read):
        pending.append(piece)
        size += len(piece)
        if size >= TEXT_CHUNK:
            yield "".join(pending)
            pending, size = [], 0
    if pending:
        yield "".join(pending)


def pieces(tokenizer: Any, settings: TextSettings, *, purpose: str, read: TextRead) -> Iterator[str]:
    """Yield all documents in pieces, with the separator between documents.

    Raises A3Error if there are rows and none of them has text.
    """
    begun = False
    for document in documents(tokenizer, settings, purpose=purpose, read=read):
        for index, piece in enumerate(document):
            if begun and index == 0:
                yield SEPARATOR
            begun = True
            yield piece
    read.whole = True
    if read.skipped and not begun:
        raise A3Error(
            f"dataset {settings.dataset}: all of its {read.rows} rows are without text; use another data set, "
            "or choose another field with --text-field"
        )


def documents(tokenizer: Any, settings: TextSettings, *, purpose: str, read: TextRead) -> Iterator[Iterable[str]]:
    """Yield each document as an iterable of pieces: a .txt file's lines as they stand, or a row's whole text."""
    check_exists(settings)
    path = Path(settings.dataset)
    if not path.exists():
        yield from row_documents(load_hub_dataset(settings, purpose=purpose), tokenizer, settings, read)
        return
    for file in local_files(path):
        read.files[name_in(path, file)] = hash_text_file(file)
        if file.suffix == ".txt":
            yield read_lines(file)
        else:
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


def local_files(path: Path) -> list[Path]:
    """Return the file, or the readable files of the folder in name order. Raises A3Error if there are none."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in FORMATS)
    if not files or files[0].suffix not in FORMATS:
        raise A3Error(f"dataset {path}: not a .txt, .jsonl or .parquet file, nor a folder with any")
    return files


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
    if unpacked > max(LARGE_TEXT, PACKED_AT_MOST * packed):
        sizes = f"{packed / 1e6:.1f} MB that unpack to {unpacked / 1e6:,.0f} MB"
        raise A3Error(f"dataset {file}: {sizes} are no text; use another file")


def load_hub_dataset(settings: TextSettings, *, purpose: str) -> Iterable[Json]:
    """Stream a Hub data set: an alias, or `owner/name[:configuration]`."""
    name, _, configuration = settings.dataset.partition(":")
    default = "train" if purpose == "calibrate" else "test"
    if name in ALIASES:
        alias, alias_configuration, train, test = ALIASES[name]
        return load(
            alias,
            settings,
            name=configuration or alias_configuration,
            split=settings.split or (train if purpose == "calibrate" else test),
        )
    return load(name, settings, name=configuration or None, split=settings.split or default)


def hub_id(dataset: str) -> str:
    """Return the Hub id that an alias or an `owner/name[:configuration]` stands for."""
    name = dataset.partition(":")[0]
    return ALIASES[name][0] if name in ALIASES else name


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


def load(path: str, settings: TextSettings, **options: Any) -> Iterable[Json]:
    from datasets import load_dataset

    try:
        return load_dataset(path, streaming=True, **options)  # type: ignore[no-any-return]
    except Exception as error:  # `datasets` raises what its file systems and parsers raise
        raise A3Error(f"dataset {settings.dataset}: {first_line(error)} (HF_HUB_OFFLINE={offline()})") from error


def row_documents(
    loaded: Iterable[Json], tokenizer: Any, settings: TextSettings, read: TextRead
) -> Iterator[tuple[str]]:
    """Yield the text of each non-empty row, and count the others."""
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
        text = chat_of(row, tokenizer, settings, where) if settings.chat else text_of(row, settings, where)
        read.rows += 1
        if text.strip() or (keep_empty and row[text_field(settings)] is not None):
            yield (text,)
        else:
            read.skipped += 1


def text_field(settings: TextSettings) -> str:
    return settings.text_field or "text"


def text_of(row: Json, settings: TextSettings, where: str) -> str:
    """Return a row's text, empty for null. Raises A3Error if there is no such field or it holds something else."""
    field = text_field(settings)
    if field not in row:
        chats = [name for name in CHATS if name in row]
        reader = f"--chat reads its {chats[0]!r}" if chats else "choose one with --text-field"
        raise A3Error(
            f"dataset {settings.dataset} has no field {field!r}; its fields are {', '.join(sorted(row))} ({reader})"
        )
    value = row[field]
    if value is None or isinstance(value, str):
        return value or ""
    reader = "--chat reads messages" if isinstance(value, list) else "--text-field chooses another"
    raise A3Error(f"{where}: field {field!r} holds {type(value).__name__}, not text ({reader})")


def chat_of(row: Json, tokenizer: Any, settings: TextSettings, where: str) -> str:
    """Return a row's messages rendered by the chat template, empty if it has none."""
    fields = [settings.text_field] if settings.text_field else list(CHATS)
    found = [field for field in fields if field in row]
    if not found:
        raise A3Error(
            f"dataset {settings.dataset} has no field {' or '.join(map(repr, fields))} for --chat; its fields are "
            f"{', '.join(sorted(row))} (leave out --chat, or name the field of the messages with --text-field)"
        )
    messages = next((row[field] for field in found if row[field]), None)
    return render_chat(tokenizer, as_messages(messages, where), where) if messages else ""


def as_messages(turns: Any, where: str) -> list[Json]:
    """Return turns with `role` and `content`; those of ShareGPT have `from` and `value`."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise A3Error(f"{where}: the messages are not a list of turns with role and content, or from and value")
    return [as_message(turn, f"{where}, turn {number}") for number, turn in enumerate(turns, 1)]


def as_message(turn: Json, where: str) -> Json:
    if turn.get("role") is not None:
        return turn
    if "from" not in turn or not isinstance(turn.get("value"), str):
        raise A3Error(f"{where}: has neither role and content, nor from and value with text")
    speaker = str(turn["from"])
    if speaker not in SPEAKERS:
        raise A3Error(f"{where}: unknown speaker {speaker!r}; --chat knows {', '.join(SPEAKERS)}")
    return {"role": SPEAKERS[speaker], "content": turn["value"]}


def render_chat(tokenizer: Any, messages: list[Json], where: str) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # templates are programs
        if getattr(tokenizer, "chat_template", None) is None:
            raise A3Error(
                f"{where}: the model's tokenizer has no chat template; add a chat_template.jinja to the model's "
                "folder, or leave out --chat"
            ) from error
        raise A3Error(f"{where}: the chat template failed: {first_line(error)}") from error


def offline() -> str:
    return os.environ.get("HF_HUB_OFFLINE", "0")


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


def describe_text(settings: TextSettings) -> Json:
    """Return the settings as requests record them: a local data set without its folder."""
    described = settings.model_dump()
    path = Path(settings.dataset)
    if path.exists():
        described["dataset"] = Path(os.path.abspath(path)).name  # noqa: PTH100, resolve would follow links
    return described


def as_compared(text: Json, files: Json) -> Json:
    """Return described settings in the form in which two requests are compared.

    A local data set counts as the `files` read from it, whatever its name; options for rows count only if there were
    rows.
    """
    rows = not files or any(not name.endswith(".txt") for name in files)
    field = text["text_field"] or (None if text["chat"] else "text")
    how = {"text_field": field, "chat": text["chat"]} if rows else {"text_field": None, "chat": False}
    return {**text, **how, "dataset": None if files else text["dataset"]}


def files_now(settings: TextSettings, files: Json, *, whole: bool) -> Json:
    """Return the hash of each local file that reading the same text again would open; none for a set on the Hub.

    `files` were opened when it was read before, to the end of the data set if `whole`; only as many are hashed. They
    are returned if the same content would be read, perhaps of files with other names. Raises A3Error if the data set is
    not there.
    """
    check_exists(settings)
    path = Path(settings.dataset)
    if not path.exists():
        return {}
    found = local_files(path)
    count = len(found) if whole else max(1, len(files))
    now = {name_in(path, file): hash_text_file(file) for file in found[:count]}
    return files if contents(now) == contents(files) else now


def contents(files: Json) -> list[tuple[str, str]]:
    """Return format and hash of each file, in reading order."""
    return [(Path(name).suffix, digest) for name, digest in files.items()]
