"""Turn the documents of a text into one stream of tokens: joined by a blank line, tokenised in pieces."""

from collections.abc import Iterable, Iterator
from typing import Any

from a3cli.errors import A3Error, first_line
from a3cli.settings import TextSettings
from a3cli.text.documents import TextRead, documents

SEPARATOR = "\n\n"
TEXT_CHUNK = 1 << 16


def token_stream(
    tokenizer: Any, settings: TextSettings, *, purpose: str, read: TextRead | None = None
) -> Iterator[int]:
    """Yield the token ids of the whole text, with one BOS at the beginning if the tokenizer adds one.

    Raises A3Error if there are rows and none of them has text.
    """
    read = read or TextRead()
    found = documents(tokenizer, settings, purpose=purpose, read=read)
    begun = False
    for token in tokens_of(tokenizer, settings, pieces(found, read)):
        begun = True
        yield token
    if read.skipped and not begun:
        raise A3Error(
            f"dataset {settings.dataset}: all of its {read.rows} rows are without text; use another data set, "
            "or choose another field with --text-field"
        )


def tokens_of(tokenizer: Any, settings: TextSettings, parts: Iterable[str], *, first: bool = True) -> Iterator[int]:
    """Yield the token ids of a text in pieces, `first` with a BOS if the tokenizer adds one."""
    for text in chunks(parts):
        try:
            tokens = tokenizer(text, add_special_tokens=first, verbose=False)["input_ids"]
        except Exception as error:  # tokenizer settings that no library checks on loading
            raise A3Error(f"dataset {settings.dataset}: the model's tokenizer fails: {first_line(error)}") from error
        yield from tokens
        first = False


def chunks(parts: Iterable[str]) -> Iterator[str]:
    """Yield pieces of text of about 64 KiB, tokenised one by one: encodings take about 100 times the text's size."""
    pending: list[str] = []
    size = 0
    for piece in parts:
        pending.append(piece)
        size += len(piece)
        if size >= TEXT_CHUNK:
            yield "".join(pending)
            pending, size = [], 0
    if pending:
        yield "".join(pending)


def pieces(documents: Iterable[Iterable[str]], read: TextRead) -> Iterator[str]:
    """Yield all documents in pieces, with the separator between documents."""
    begun = False
    for document in documents:
        for index, piece in enumerate(document):
            if begun and index == 0:
                yield SEPARATOR
            begun = True
            yield piece
    read.whole = True
