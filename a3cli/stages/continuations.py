"""Accuracy that a reader feels: choosing the true continuation of a passage among four, and guessing its last word.

Perplexity hides damage. The log-probability of a continuation, per character, chooses; a word is guessed if greedy
decoding writes all its tokens. Both come from the same forwards. `text.passages` says how a text is cut.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import torch

from a3cli.errors import A3Error
from a3cli.models.checkpoint import Checkpoint
from a3cli.models.families import usual_entries
from a3cli.stages.answers import Answers, batches, short_name
from a3cli.text.blocks import CONTEXT
from a3cli.text.passages import CHOICES, Passage
from a3cli.work.progress import Progress, reporting


class Choice(NamedTuple):
    """One continuation behind its context: tokens `[T]`, where it begins, its characters, and where its word is."""

    tokens: torch.Tensor
    start: int
    characters: int
    word: slice | None


class Score(NamedTuple):
    """The log-probability of a continuation, in nats per character, and whether greedy decoding writes its word."""

    likelihood: float
    word: bool


def encode(tokenizer: Any, passages: Sequence[Passage], checkpoint: Checkpoint) -> list[Choice]:
    """Return `CHOICES` choices per passage; the first has the word. Raises A3Error if one is too long."""
    choices = [choice for passage in passages for choice in encode_passage(tokenizer, passage)]
    longest = max(len(choice.tokens) for choice in choices)
    context = usual_entries(checkpoint.config).get(CONTEXT)
    if isinstance(context, int) and longest > context:
        raise A3Error(
            f"--continuations: passages have up to {longest} tokens, more than the context of {checkpoint.name} "
            f"({context}); leave it out"
        )
    return choices


def encode_passage(tokenizer: Any, passage: Passage) -> Iterator[Choice]:
    before = encode_text(tokenizer, passage.context)
    for index, continuation in enumerate(passage.continuations):
        tokens = encode_text(tokenizer, f"{passage.context} {continuation}")
        word = None
        if index == 0 and passage.last_word is not None:
            head, last = passage.last_word
            ends = (encode_text(tokenizer, text) for text in (head, f"{head} {last}"))
            word = slice(*(common(tokens, end) for end in ends))
        yield Choice(torch.tensor(tokens), common(tokens, before), len(continuation), word)


def encode_text(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, verbose=False)["input_ids"])


def common(tokens: Sequence[int], others: Sequence[int]) -> int:
    """Return how many tokens two texts share at their beginning; at least 1, since nothing predicts the first."""
    return max(1, sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(tokens, others, strict=False))))


def measure_choices(
    models: Sequence[Answers], choices: Sequence[Choice], text: str, batch_size: int, progress: Progress
) -> torch.Tensor:
    """Return sums per passage, `[N, 4]` or with a source `[N, 6]` float64.

    A row has: 1; whether the passage has a word; whether the true continuation is more likely than all others, and
    whether the word was guessed; the same two of the source.
    """
    words = [choice.word is not None for choice in choices[::CHOICES]]
    columns = [torch.ones(len(words)), torch.tensor(words)]
    for model in models:
        step = f"{short_name(model.name)}: choosing continuations of {text}"
        with reporting(progress, step, len(choices), "continuations") as finished:
            scores = list(score_choices(model, choices, batch_size, finished))
        likelihood = torch.tensor([score.likelihood for score in scores], dtype=torch.float64).view(-1, CHOICES)
        columns.append(likelihood[:, 0] > likelihood[:, 1:].amax(1))
        columns.append(torch.tensor([score.word for score in scores[::CHOICES]]))
    return torch.stack([column.double() for column in columns], 1)


def score_choices(
    model: Answers, choices: Sequence[Choice], batch_size: int, finished: Callable[[], object] = lambda: None
) -> Iterator[Score]:
    """Yield the score of each choice, and call `finished`.

    Padding follows the tokens, where causal attention does not see it.
    """
    longest = max(len(choice.tokens) for choice in choices)
    padded = [torch.nn.functional.pad(choice.tokens, (0, longest - len(choice.tokens))) for choice in choices]
    numbered = iter(choices)
    for tokens, logits in zip(batches(padded, batch_size), model.logits(padded, batch_size), strict=True):
        for row in range(len(tokens)):
            yield score_choice(next(numbered), logits[row])
            finished()


def score_choice(choice: Choice, logits: torch.Tensor) -> Score:
    """Score a choice by logits `[T, V]`, each of which predicts the next token."""
    end = len(choice.tokens)
    log_p = logits[choice.start - 1 : end - 1].float().log_softmax(-1)
    targets = choice.tokens[choice.start :].to(log_p.device)
    likelihood = log_p.gather(-1, targets[:, None]).sum(dtype=torch.float64).item() / choice.characters
    if choice.word is None:
        return Score(likelihood, False)
    first, last = choice.word.start, choice.word.stop
    guessed = logits[first - 1 : last - 1].argmax(-1).cpu()
    return Score(likelihood, first < last and bool((guessed == choice.tokens[first:last]).all()))


def accuracies(total: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the figures for sums `[..., 4 or 6]` over passages (see `measure_choices`)."""
    passages, words, *right = total.unbind(-1)
    figures = {"continuation_accuracy": right[0] / passages, "last_word_accuracy": right[1] / words}
    if len(right) == 2:
        return figures
    source = {"source_continuation_accuracy": right[2] / passages, "source_last_word_accuracy": right[3] / words}
    drops = {"continuation_drop": (right[2] - right[0]) / passages, "last_word_drop": (right[3] - right[1]) / words}
    return figures | source | drops
