"""Describe calibration text from its token blocks; its language and domain are not checked."""

from collections import Counter
from typing import Any

import torch

from a3cli.work.schema import Part

NGRAM = 13  # tokens; a repeated sequence of this length is a copy rather than a phrase
OVERLAP = 0.5  # share of a block's n-grams in another block from which on the two count as duplicates
MOST_FREQUENT = 12


class Frequent(Part):
    token: int
    share: float
    text: str | None = None


class Overlap(Part):
    """A block most of whose n-grams occur earlier, in block `of`."""

    block: int
    of: int
    share: float


class Repetition(Part):
    ngram: int
    repeated_ngrams: float
    overlapping_blocks: list[Overlap]


class TokenStatistics(Repetition):
    """Counts over token blocks; those of text are None if there is no tokenizer."""

    blocks: list[int]
    tokens: int
    distinct_tokens: int
    most_frequent: list[Frequent]
    vocabulary: int | None = None
    share_of_vocabulary: float | None = None
    bytes_per_token: float | None = None
    characters: dict[str, float] | None = None


def describe_blocks(blocks: torch.Tensor) -> TokenStatistics:
    """Return counts over blocks `[N, T]`: distinct and most frequent tokens, repeated n-grams, overlapping blocks."""
    values, counts = blocks.flatten().unique(return_counts=True)
    top = counts.argsort(descending=True, stable=True)[:MOST_FREQUENT]
    return TokenStatistics(
        blocks=list(blocks.shape),
        tokens=blocks.numel(),
        distinct_tokens=len(values),
        most_frequent=[Frequent(token=int(values[i]), share=float(counts[i]) / blocks.numel()) for i in top],
        **dict(find_repetition(blocks)),
    )


def find_repetition(blocks: torch.Tensor) -> Repetition:
    """Return the share of repeated n-grams, and the blocks most of whose n-grams occur earlier in one other block."""
    length = min(NGRAM, blocks.shape[1])
    hashes = _hash_ngrams(blocks, length)
    flat = hashes.flatten()
    order = flat.argsort(stable=True)  # equal n-grams together, earliest first
    grouped = flat[order]
    new = torch.ones(len(flat), dtype=torch.bool)
    new[1:] = grouped[1:] != grouped[:-1]
    first = torch.empty_like(order)
    first[order] = order[new][new.cumsum(0) - 1]
    block = torch.arange(len(blocks)).repeat_interleave(hashes.shape[1])
    owner = first // hashes.shape[1]
    copied = owner != block
    pairs, shared = torch.stack([block, owner])[:, copied].unique(dim=1, return_counts=True)
    overlaps = [
        Overlap(block=int(pairs[0, i]), of=int(pairs[1, i]), share=float(shared[i]) / hashes.shape[1])
        for i in (shared >= OVERLAP * hashes.shape[1]).nonzero().flatten()
    ]
    repeated = 1 - float(new.sum()) / len(flat)
    return Repetition(ngram=length, repeated_ngrams=repeated, overlapping_blocks=overlaps)


def _hash_ngrams(blocks: torch.Tensor, length: int) -> torch.Tensor:
    """Return a 64-bit hash of each n-gram `[N, T − n + 1]`: a polynomial in an odd number, modulo 2^64."""
    count = blocks.shape[1] - length + 1
    hashes = torch.zeros(len(blocks), count, dtype=torch.int64)
    for i in range(length):
        hashes = hashes * 6364136223846793005 + blocks[:, i : i + count] + 1442695040888963407
    return hashes


def describe_tokens(blocks: torch.Tensor, tokenizer: Any, vocabulary: int) -> TokenStatistics:
    """Extend `describe_blocks` by what needs the tokenizer: share of the vocabulary, token texts, bytes, characters."""
    found = describe_blocks(blocks)
    text = "".join(tokenizer.decode(block.tolist()) for block in blocks)
    return found.model_copy(
        update={
            "most_frequent": [
                each.model_copy(update={"text": tokenizer.decode([each.token])}) for each in found.most_frequent
            ],
            "vocabulary": vocabulary,
            "share_of_vocabulary": found.distinct_tokens / vocabulary,
            "bytes_per_token": len(text.encode("utf-8", errors="replace")) / blocks.numel(),
            "characters": _character_kinds(text),
        }
    )


def _character_kinds(text: str) -> dict[str, float]:
    """Return the share of each kind of character."""
    kinds = Counter(_kind(character) for character in text)
    return {kind: kinds[kind] / max(1, len(text)) for kind in ("Latin letters", "other letters", "digits", "spaces")}


def _kind(character: str) -> str:
    if character.isalpha():
        return "Latin letters" if character < "\u0250" else "other letters"
    if character.isspace():
        return "spaces"
    return "digits" if character.isdigit() else "other"
