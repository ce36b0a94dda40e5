"""Associative recall over a whole context: the task of `train_recall_model.py` and `benchmarks/long_range.py`.

A sequence has pairs `key value`. Each key occurs exactly twice: at its definition and, a stated distance later, at its
query, where the token to predict is the definition's value. No key is defined or queried a second time, so only the
token after the key's first position determines the answer. Between the pairs there is filler, a random walk in which
each filler token is followed by one of a few (pairs may come between), so filler is predictable from nearby tokens.

Words are `k0 …`, `v0 …` and `f0 …`, one token each, so text and tokens are equivalent.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

KEYS, VALUES, FILLERS = 128, 64, 32
SUCCESSORS = 4
PAIR_ROOM = 11  # tokens of a sequence per pair: four belong to it, the rest is filler
SHORTEST = 4  # tokens from a key's definition to its query
WORDS = [f"{kind}{i}" for kind, count in (("k", KEYS), ("v", VALUES), ("f", FILLERS)) for i in range(count)]
FIRST_VALUE, FIRST_FILLER = KEYS, KEYS + VALUES


@dataclass(frozen=True)
class Batch:
    """Sequences `[B, T]` and their queries `[Q, 3]`, each with sequence, position of the key and distance.

    The answer is in the sequence itself, right after the key.
    """

    tokens: torch.Tensor
    queries: torch.Tensor

    def answers(self) -> torch.Tensor:
        return self.tokens[self.queries[:, 0], self.queries[:, 1] + 1]

    def is_filler(self) -> torch.Tensor:
        """Return a mask `[B, T]` of filler, without the first position, which cannot be predicted."""
        filler = self.tokens >= FIRST_FILLER
        filler[:, 0] = False
        return filler


def make_batch(sequences: int, length: int, *, seed: int) -> Batch:
    """Return a batch with `length // PAIR_ROOM` pairs in each sequence."""
    rng = random.Random(seed)
    tokens, queries = [], []
    for index in range(sequences):
        sequence, asked = make_sequence(length, length // PAIR_ROOM, rng)
        tokens.append(sequence)
        queries += [(index, place, distance) for place, distance in asked]
    return Batch(torch.tensor(tokens), torch.tensor(queries))


def make_sequence(length: int, pairs: int, rng: random.Random) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the tokens, and (position of the key, distance to its definition) of each query, log-uniform distances."""
    tokens = [-1] * length
    queries = []
    for key in rng.sample(range(KEYS), pairs):
        first, distance = free_places(tokens, rng)
        value = FIRST_VALUE + rng.randrange(VALUES)
        for place in (first, first + distance):
            tokens[place : place + 2] = key, value
        queries.append((first + distance, distance))
    fill(tokens, rng)
    return tokens, queries


def free_places(tokens: list[int], rng: random.Random) -> tuple[int, int]:
    """Return where a key may be defined, and how far from there it may be queried."""
    longest = len(tokens) - 2
    while True:
        distance = round(SHORTEST * (longest / SHORTEST) ** rng.random())
        first = rng.randint(0, longest - distance)
        if all(tokens[place] < 0 for start in (first, first + distance) for place in (start, start + 1)):
            return first, distance


def fill(tokens: list[int], rng: random.Random) -> None:
    """Fill the empty positions with the random walk of filler."""
    state = rng.randrange(FILLERS)
    for place, token in enumerate(tokens):
        if token < 0:
            tokens[place] = FIRST_FILLER + state
            state = (3 * state + rng.randrange(SUCCESSORS)) % FILLERS


def accuracy_by_distance(hits: torch.Tensor, distances: torch.Tensor) -> dict[int, tuple[int, int]]:
    """Count hits and queries in each bucket `lowest … 2·lowest − 1`, by its lowest distance; both inputs are `[Q]`."""
    octave = distances.double().log2().floor().long()
    return {
        2**which: (int(hits[octave == which].sum()), int((octave == which).sum())) for which in octave.unique().tolist()
    }


@torch.inference_mode()
def answer_queries(model: Callable[..., Any], batch: Batch, *, at_once: int = 4) -> tuple[torch.Tensor, float]:
    """Return whether each query `[Q]` is answered correctly, and the filler's mean negative log-likelihood in nats."""
    hits, loss, fillers = torch.zeros(len(batch.queries), dtype=torch.bool), 0.0, 0
    for start in range(0, len(batch.tokens), at_once):
        tokens, is_filler = (x[start : start + at_once] for x in (batch.tokens, batch.is_filler()))
        log_p = model(tokens, use_cache=False).logits.float().log_softmax(-1)
        mine = (batch.queries[:, 0] >= start) & (batch.queries[:, 0] < start + at_once)
        sequence, place = batch.queries[mine, 0] - start, batch.queries[mine, 1]
        hits[mine] = log_p[sequence, place].argmax(-1) == tokens[sequence, place + 1]
        row, place = is_filler.nonzero(as_tuple=True)
        loss -= log_p[row, place - 1, tokens[row, place]].sum(dtype=torch.float64).item()
        fillers += len(row)
    return hits, loss / fillers


def to_text(tokens: torch.Tensor) -> str:
    """Return one line per sequence of `[B, T]`."""
    return "".join(" ".join(WORDS[i] for i in row) + "\n" for row in tokens.tolist())
