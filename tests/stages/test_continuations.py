"""Continuations to choose and last words to guess: the rule that cuts a text, and the accuracies of a model."""

import pytest
import torch

from a3cli.stages import answers
from a3cli.stages.continuations import Choice, accuracies, encode_passage, measure_choices, score_choices
from a3cli.text.passages import CHOICES, CONTEXT, PIECE, WORDS, cut, last_word
from a3cli.work.progress import silent
from tests.conftest import build_model, build_tokenizer, refused

pytestmark = pytest.mark.usefixtures("hasty")

FIGURES = ("continuation_accuracy", "last_word_accuracy")


class Known:
    """A model whose next token is that of a text that it knows, wherever the eight tokens before it occur in it."""

    name, vocabulary = "known", 257

    def __init__(self, text: str) -> None:
        tokens = build_tokenizer()(text)["input_ids"]
        self.next = {tuple(tokens[i - 8 : i]): tokens[i] for i in range(8, len(tokens))}

    def logits(self, blocks, batch_size):
        for batch in answers.batches(blocks, batch_size):
            out = torch.zeros(*batch.shape, self.vocabulary)
            for row, tokens in enumerate(batch.tolist()):
                for i in range(7, len(tokens)):
                    out[row, i, self.next.get(tuple(tokens[i - 7 : i + 1]), 0)] = 9.0
            yield out


class Silent(Known):
    """A model to which all tokens are alike."""

    def logits(self, blocks, batch_size):
        for batch in answers.batches(blocks, batch_size):
            yield torch.zeros(*batch.shape, self.vocabulary)


@pytest.fixture(scope="module")
def passages(text_file):
    return list(cut(text_file.read_text("utf-8").split()))[:6]


@pytest.fixture(scope="module")
def choices(passages):
    return [choice for each in passages for choice in encode_passage(build_tokenizer(), each)]


def test_passages_are_consecutive_words():
    words = [f"w{i}" for i in range(2 * WORDS + 5)]
    first, second = cut(words)
    pieces = [words[start : start + PIECE] for start in range(CONTEXT, WORDS, PIECE)]
    assert first.context == " ".join(words[:CONTEXT])
    assert first.continuations == tuple(map(" ".join, pieces))
    assert len(first.continuations) == CHOICES
    assert second.context.startswith(f"w{WORDS} ")


def test_the_last_word_begins_with_four_letters():
    words = ["before"] * CONTEXT + ["One", "under-stood", "walking,", "was", ".", "1999"]
    assert last_word(words) == (" ".join(words[: CONTEXT + 2]), "walking")
    assert last_word(["before"] * CONTEXT + ["all", "is", "3"]) is None


def test_accuracies_of_models_that_know_all_and_nothing(passages, choices):
    text = " ".join(f"{each.context} {each.continuations[0]}" for each in passages)
    models = [Silent(text), Known(text)]
    sums = measure_choices(models, choices, "text", 3, silent)
    found = {key: value.item() for key, value in accuracies(sums.sum(0)).items()}
    assert found["continuation_accuracy"] < 0.5  # only the number of tokens per character differs
    assert found["last_word_accuracy"] == 0
    assert found["source_continuation_accuracy"] > 0.8
    assert found["source_last_word_accuracy"] > 0.5
    drop = found["source_continuation_accuracy"] - found["continuation_accuracy"]
    assert found["continuation_drop"] == pytest.approx(drop)
    assert found["last_word_drop"] == found["source_last_word_accuracy"]


@torch.inference_mode()
def test_scores_equal_a_plain_computation(passages, choices):
    """Each sequence alone, token by token, without padding."""
    model, tokenizer = build_model("llama-gqa", max_position_embeddings=2048).eval(), build_tokenizer()
    found = list(score_choices(answers.LoadedModel(model, "model", torch.device("cpu")), choices[:8], 3))
    for index, score in enumerate(found):
        passage, own = passages[index // CHOICES], passages[index // CHOICES].continuations[index % CHOICES]
        before, all_of_it = (tokenizer(text)["input_ids"] for text in (passage.context, f"{passage.context} {own}"))
        log_p = model(torch.tensor([all_of_it])).logits[0].double().log_softmax(-1)
        expected = sum(log_p[i - 1, all_of_it[i]].item() for i in range(len(before), len(all_of_it)))
        assert score.likelihood == pytest.approx(expected / len(own), rel=1e-5)


@torch.inference_mode()
def test_a_word_is_guessed_if_greedy_decoding_writes_it(passages):
    """Let a model write the last word itself: it is right about that one, and wrong about one with another letter."""
    model, tokenizer = build_model("llama-gqa", max_position_embeddings=2048).eval(), build_tokenizer()
    head = torch.tensor([tokenizer(passages[0].last_word[0] + " ")["input_ids"]])
    written = head
    for _ in range(5):
        written = torch.cat([written, model(written).logits[:, -1:].argmax(-1)], 1)
    loaded = answers.LoadedModel(model, "model", torch.device("cpu"))
    for change, guessed in ((0, True), (1, False)):
        tokens = written[0].clone()
        tokens[-1] = (tokens[-1] + change) % 256
        choice = Choice(tokens, 10, 1, slice(len(head[0]), len(tokens)))
        assert next(score_choices(loaded, [choice], 1)).word == guessed


def test_the_command_measures_both_models(a3, checkpoint, text_file, monkeypatch):
    model, source = (checkpoint("llama-gqa", seed=seed, max_position_embeddings=2048) for seed in (1, 0))
    command = ("eval", model, "--dataset", text_file, "--samples", 2, "--seq-len", 48, "--continuations", 5)
    command = (*command, "--batch-size", 3, "--json")
    both = a3(*command, "--against", source, "--bootstrap", 50).json
    assert both["passages"] == 5
    for key in FIGURES:
        low, high = both["confidence"][key]
        assert 0 <= low <= both[key] <= high <= 1
    drop = both["source_continuation_accuracy"] - both["continuation_accuracy"]
    assert both["continuation_drop"] == pytest.approx(drop)
    monkeypatch.setattr(answers, "available_memory", lambda machine, settings: 0)
    streamed = a3(*command).json
    assert [streamed[key] for key in FIGURES] == [both[key] for key in FIGURES]


def test_a_model_passes_a_gate_against_itself_and_is_refused_what_it_does_not_measure(a3, checkpoint, text_file):
    model = checkpoint("llama-gqa", max_position_embeddings=2048)
    command = ("eval", model, "--against", model, "--dataset", text_file, "--samples", 2, "--seq-len", 48)
    gate = ("--fail-if", "continuation_drop > 0", "--fail-if", "last_word_accuracy < 0")
    passed = a3(*command, "--continuations", 2, *gate)
    assert passed.code == 0, passed.stderr
    assert "true continuation of four" in passed.stdout
    assert a3(*command, "--continuations", 2, "--fail-if", "continuation_drop >= 0").code == 1
    refused(a3(*command, *gate), "--continuations NUMBER")
    refused(
        a3("eval", model, "--continuations", 2, "--fail-if", "last_word_drop > 0", *command[4:]), "--against SOURCE"
    )


def test_texts_that_do_not_do(a3, checkpoint, text_file, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("too few words " * 9, "utf-8")
    model = checkpoint("llama-gqa")
    options = ("--seq-len", 48, "--samples", 1, "--continuations", 2)
    refused(a3("eval", model, "--dataset", short, *options), f"needs {WORDS} words", "short.txt")
    refused(a3("eval", model, "--dataset", text_file, *options), "more than the context")
