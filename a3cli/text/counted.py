"""Count the tokens of a text while it is read, which may take minutes before the first layer runs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from a3cli.work.progress import Progress, reporting


class CountedTokenizer:
    """A tokenizer that tells how many tokens each of its calls has made; it has all that the tokenizer has."""

    def __init__(self, tokenizer: Any, counted: Callable[[int], object]) -> None:
        self._tokenizer, self._counted = tokenizer, counted

    def __call__(self, text: Any, **options: Any) -> Any:
        encoded = self._tokenizer(text, **options)
        ids = encoded["input_ids"]
        self._counted(len(ids) if isinstance(text, str) else sum(map(len, ids)))
        return encoded

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


@contextmanager
def counting(progress: Progress, step: str, tokenizer: Any, total: int | None) -> Iterator[Any]:
    """Report a step that reads `total` tokens, None for all there are; yield the tokenizer that counts them."""
    with reporting(progress, step, total, "tokens") as counted:
        yield CountedTokenizer(tokenizer, counted)
