"""Cut a text into passages with a continuation to choose and a last word to guess, by a rule that knows no tokenizer.

Words are what white space separates. Each `WORDS` consecutive words are one passage: a context, its continuation, and
the pieces of text after that, which are the wrong continuations: near in the text, so alike in topic and style.
"""

import itertools
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from a3cli.errors import A3Error
from a3cli.settings import TextSettings
from a3cli.text.documents import TextRead, documents
from a3cli.text.stream import pieces

CONTEXT = 64  # words
PIECE = 16  # words of a continuation
CHOICES = 4
WORDS = CONTEXT + CHOICES * PIECE
LAST_WORD = re.compile(r"[^\W\d_]{4,}")  # letters, punctuation may follow


class Passage(NamedTuple):
    """A context, its possible continuations with the true one first, and the last word of that with all before it."""

    context: str
    continuations: tuple[str, ...]
    last_word: tuple[str, str] | None


def read_passages(tokenizer: Any, settings: TextSettings, count: int) -> list[Passage]:
    """Return the first `count` passages of a text, or all of a shorter one; the tokenizer only renders chats.

    Raises A3Error if there is none.
    """
    read = TextRead()
    text = pieces(documents(tokenizer, settings, purpose="evaluate", read=read), read)
    words = itertools.islice((word for piece in text for word in piece.split()), count * WORDS)
    found = list(cut(words))
    if not found:
        raise A3Error(
            f"dataset {settings.dataset}: --continuations needs {WORDS} words, separated by white space; use a longer "
            "text, or leave out --continuations"
        )
    return found


def cut(words: Iterable[str]) -> Iterable[Passage]:
    """Yield a passage for each full `WORDS` words."""
    iterator = iter(words)
    while len(chunk := list(itertools.islice(iterator, WORDS))) == WORDS:
        starts = range(CONTEXT, WORDS, PIECE)
        continuations = tuple(" ".join(chunk[start : start + PIECE]) for start in starts)
        yield Passage(" ".join(chunk[:CONTEXT]), continuations, last_word(chunk[: CONTEXT + PIECE]))


def last_word(words: list[str]) -> tuple[str, str] | None:
    """Return the text before the last word of the continuation that begins with four letters, and these letters."""
    for index in reversed(range(CONTEXT, len(words))):
        if found := LAST_WORD.match(words[index]):
            return " ".join(words[:index]), found[0]
    return None
