"""Read the tokens from which calibration blocks are cut: the beginning of a text, or of each file of a large folder."""

import itertools
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from a3cli.settings import TextSettings
from a3cli.settings.shares import divide
from a3cli.text.documents import TextRead, file_documents, hash_text_file, name_in
from a3cli.text.sources import local_files
from a3cli.text.stream import SEPARATOR, pieces, token_stream, tokens_of

LEAST = 16  # tokens of a small file beside large ones, with the separator before it

Tokens: TypeAlias = "array[int]"  # 64 bits each


def read_pool(tokenizer: Any, settings: TextSettings, most: int, read: TextRead) -> Tokens:
    """Return the first `most` tokens of a text; `read` records their source.

    If a folder has more, each of its files gives a share instead, so that the first ones do not hide the others.
    """
    path = Path(settings.dataset)
    files = local_files(path) if path.is_dir() else []
    stream = token_stream(tokenizer, settings, purpose="calibrate", read=read)
    if len(files) < 2:
        return take(stream, most)
    beginning = take(stream, most + 1)
    if len(beginning) <= most:
        return beginning
    reads, shares = read_from_each(tokenizer, settings, files, most, read.recognised)
    names = {name_in(path, file): file for file in files}
    read.files = {name: read.files.get(name) or hash_text_file(file) for name, file in names.items()}
    read.rows, read.skipped = sum(each.rows for each in reads), sum(each.skipped for each in reads)
    read.whole, read.from_each = False, True
    return array("q", itertools.chain.from_iterable(shares))


def take(tokens: Iterable[int], most: int) -> Tokens:
    return array("q", itertools.islice(tokens, most))


def read_from_each(
    tokenizer: Any, settings: TextSettings, files: list[Path], most: int, recognised: set[str]
) -> tuple[list[TextRead], list[Tokens]]:
    """Return `most` tokens, those of each file from its beginning on, in proportion to the sizes of the files.

    What a file lacks for its share, the others give. What was read of each file is returned, too.
    """
    sizes = [file.stat().st_size for file in files]
    reads = [TextRead() for _ in files]
    found: list[Tokens] = [array("q") for _ in files]
    longer = list(range(len(files)))  # files that have their share
    while longer:
        left = most - sum(len(found[index]) for index in range(len(files)) if index not in longer)
        shares = divide([sizes[index] for index in longer], left, least=min(LEAST, left // len(longer)))
        for index, share in zip(longer, shares, strict=True):
            reads[index] = TextRead(recognised=recognised)
            stream = file_stream(tokenizer, settings, files[index], reads[index], first=index == 0)
            found[index] = take(stream, share)
        enough = [index for index, share in zip(longer, shares, strict=True) if len(found[index]) == share]
        if enough == longer:
            break
        longer = enough
    return reads, found


def file_stream(tokenizer: Any, settings: TextSettings, file: Path, read: TextRead, *, first: bool) -> Iterator[int]:
    """Yield the tokens of one file of a folder; but for the first, with the separator from the file before it."""
    parts = pieces(file_documents(file, tokenizer, settings, read), read)
    return tokens_of(tokenizer, settings, parts if first else itertools.chain([SEPARATOR], parts), first=first)
