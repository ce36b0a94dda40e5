"""Dataset or local file → token blocks `[N, T]`. The only importer of `datasets`.

How blocks are cut is stated in docs/text.md: rows are joined by a blank line and tokenised as one stream,
the stream is read until it holds `POOL` times the tokens asked for (or ends), and N blocks that do not
overlap are placed in it at seeded random offsets, uniformly among all such placements.
"""

import itertools
import os
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from a3cli.errors import A3Error, first_line
from a3cli.settings import TextSettings
from a3cli.work import Json, hash_file

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
FORMATS = {".jsonl": "json", ".parquet": "parquet", ".txt": "text"}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "merges.txt")
TOKENIZER_EXTRAS = ("added_tokens.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json")


def sample_blocks(tokenizer: Any, settings: TextSettings) -> torch.Tensor:
    """`samples` blocks `[N, T]` int64 for calibration. Raises A3Error if there is too little text."""
    assert settings.samples is not None
    wanted = settings.samples * settings.seq_len
    tokens = itertools.islice(token_stream(tokenizer, settings, purpose="calibrate"), POOL * wanted)
    stream = torch.tensor(array("q", tokens), dtype=torch.int64)
    slack = len(stream) - wanted
    if slack < 0:
        raise A3Error(
            f"dataset {settings.dataset}: too little text, {len(stream)} tokens give {len(stream) // settings.seq_len} "
            f"blocks of {settings.seq_len}, {settings.samples} were asked for; lower --samples or --seq-len"
        )
    # Sorted draws from [0, slack], one a block, plus the room of the blocks before: every placement of N
    # blocks that do not overlap is reached.
    generator = torch.Generator().manual_seed(settings.seed)
    offsets = torch.randint(slack + 1, (settings.samples,), generator=generator).sort().values
    starts = offsets + settings.seq_len * torch.arange(settings.samples)
    return torch.stack([stream[start : start + settings.seq_len] for start in starts])


def evaluation_blocks(tokenizer: Any, settings: TextSettings) -> list[torch.Tensor]:
    """The stream cut in consecutive blocks of `seq_len`, the last one shorter; `samples` limits their number.

    Every token is in exactly one block. Raises A3Error if there are fewer than two tokens.
    """
    stream = token_stream(tokenizer, settings, purpose="evaluate")
    limit = None if settings.samples is None else settings.samples * settings.seq_len
    tokens = torch.tensor(list(itertools.islice(stream, limit)))
    if len(tokens) < 2:
        raise A3Error(f"dataset {settings.dataset}: too little text, {len(tokens)} tokens; two are needed")
    return list(tokens.split(settings.seq_len))


def check_fit(blocks: Iterable[torch.Tensor], config: Json, model: str) -> None:
    """Raise A3Error if blocks are longer than the model's context, or hold tokens that it has no embedding for."""
    context, vocabulary = config.get("max_position_embeddings"), config.get("vocab_size")
    for block in blocks:
        if isinstance(context, int) and len(block) > context:
            raise A3Error(f"--seq-len {len(block)} is longer than the context of {model} ({context}); lower it")
        if isinstance(vocabulary, int) and int(block.max()) >= vocabulary:
            raise A3Error(
                f"the tokenizer of {model} gives token {int(block.max())}, its vocabulary has {vocabulary}; "
                "the tokenizer files are of another model"
            )


def token_stream(tokenizer: Any, settings: TextSettings, *, purpose: str) -> Iterator[int]:
    """Token ids of the whole text, with one BOS at its very beginning if the tokenizer adds one."""
    first = True
    for text in texts(tokenizer, settings, purpose=purpose):
        try:
            tokens = tokenizer(text, add_special_tokens=first, verbose=False)["input_ids"]
        except Exception as error:  # settings of the tokenizer that no library checks when it is loaded
            raise A3Error(f"dataset {settings.dataset}: the model's tokenizer fails: {first_line(error)}") from error
        yield from tokens
        first = False


def texts(tokenizer: Any, settings: TextSettings, *, purpose: str) -> Iterator[str]:
    """Pieces of text of about 64 KiB, to be tokenised one by one: encodings take some hundred times the text's size."""
    pending: list[str] = []
    size = 0
    for row in rows(tokenizer, settings, purpose=purpose):
        pending.append(row)
        size += len(row)
        if size >= TEXT_CHUNK:
            yield "".join(pending)
            pending, size = [], 0
    if pending:
        yield "".join(pending)


def rows(tokenizer: Any, settings: TextSettings, *, purpose: str) -> Iterator[str]:
    """Lines of a .txt file as they stand, documents of other sets; the separator between files and documents."""
    if Path(settings.dataset).exists():
        for index, file in enumerate(local_files(Path(settings.dataset))):
            if index:
                yield SEPARATOR
            if file.suffix == ".txt":
                yield from read_lines(file)
            else:
                if file.suffix == ".parquet":
                    check_parquet(file)
                one = settings.model_copy(update={"dataset": str(file)})  # what an error names
                loaded = load(FORMATS[file.suffix], one, data_files=str(file), split="train")
                yield from documents(loaded, tokenizer, one)
    else:
        yield from documents(load_hub_dataset(settings, purpose=purpose), tokenizer, settings)


def read_lines(file: Path) -> Iterator[str]:
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            yield from lines
    except (OSError, UnicodeDecodeError) as error:
        raise A3Error(f"dataset {file}: {error}; a3 reads UTF-8 text") from error


def local_files(path: Path) -> list[Path]:
    """The file, or the readable files of the folder in name order. Raises A3Error if there are none."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in FORMATS)
    if not files or files[0].suffix not in FORMATS:
        raise A3Error(f"dataset {path}: not a .txt, .jsonl or .parquet file, nor a folder with any")
    return files


def check_parquet(file: Path) -> None:
    """Raise A3Error for a small file that unpacks to a huge one: memory would be gone before the first row is there."""
    from pyarrow import ArrowException, parquet

    try:
        metadata = parquet.read_metadata(file)
    except (ArrowException, OSError):
        return  # no parquet: loading it says so
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    columns = [group.column(i) for group in groups for i in range(group.num_columns)]
    packed, unpacked = (
        sum(getattr(c, f"total_{kind}_size") for c in columns) for kind in ("compressed", "uncompressed")
    )
    if unpacked > max(LARGE_TEXT, PACKED_AT_MOST * packed):
        sizes = f"{packed / 1e6:.1f} MB that unpack to {unpacked / 1e6:,.0f} MB"
        raise A3Error(f"dataset {file}: {sizes} are no text; use another file")


def load_hub_dataset(settings: TextSettings, *, purpose: str) -> Iterable[Json]:
    """Stream a hub set: an alias, or `owner/name[:configuration]`."""
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
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise A3Error(
            f"dataset {settings.dataset!r}: no such file or folder, no hub id (owner/name[:configuration]), "
            f"and none of {', '.join(ALIASES)}"
        )
    return load(name, settings, name=configuration or None, split=settings.split or default)


def load(path: str, settings: TextSettings, **options: Any) -> Iterable[Json]:
    from datasets import load_dataset

    try:
        return load_dataset(path, streaming=True, **options)  # type: ignore[no-any-return]
    except Exception as error:  # `datasets` raises what its file systems and parsers raise
        raise A3Error(f"dataset {settings.dataset}: {first_line(error)} (HF_HUB_OFFLINE={offline()})") from error


def documents(loaded: Iterable[Json], tokenizer: Any, settings: TextSettings) -> Iterator[str]:
    """The text of each row, with the separator between."""
    field = "messages" if settings.chat else settings.text_field
    iterator = iter(loaded)
    for index in itertools.count():
        try:
            row = next(iterator, None)
        except Exception as error:
            raise A3Error(f"dataset {settings.dataset}: cannot be read: {first_line(error)}") from error
        if row is None:
            return
        if field not in row:
            raise A3Error(
                f"dataset {settings.dataset} has no field {field!r}; its fields are {', '.join(sorted(row))} "
                "(choose one with --text-field)"
            )
        if index:
            yield SEPARATOR
        where = f"dataset {settings.dataset}, row {index + 1}"
        yield render_chat(tokenizer, row[field], where) if settings.chat else text_of(row[field], field, where)


def text_of(value: Any, field: str, where: str) -> str:
    if not isinstance(value, str):
        raise A3Error(f"{where}: field {field!r} holds {type(value).__name__}, not text (--text-field chooses another)")
    return value


def render_chat(tokenizer: Any, messages: Any, where: str) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # templates are programs of their own
        raise A3Error(f"{where}: the chat template failed: {first_line(error)}") from error


def offline() -> str:
    return os.environ.get("HF_HUB_OFFLINE", "0")


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The checkpoint's own tokenizer. Raises A3Error if there is none that loads."""
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise A3Error(f"{folder} has no tokenizer files; copy the model's tokenizer there")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # tokenizer files fail in many libraries
        raise A3Error(f"{folder}: the tokenizer does not load: {first_line(error)}") from error


def tokenizer_fingerprint(folder: Path) -> Json:
    """Hash of each file that says how text becomes tokens."""
    names = (*TOKENIZER_FILES, *TOKENIZER_EXTRAS)
    return {name: hash_file(folder / name) for name in names if (folder / name).is_file()}


def text_fingerprint(settings: TextSettings) -> Json:
    """Hash of each local file that the text is read from; none for a set on the hub. Raises A3Error if one can't be."""
    path, hashes = Path(settings.dataset), {}
    for file in local_files(path) if path.exists() else []:
        try:
            hashes[file.name if file == path else file.relative_to(path).as_posix()] = hash_file(file)
        except OSError as error:
            raise A3Error(f"dataset {file}: {error.strerror}") from error
    return hashes
