"""Evaluation of a model that does not fit in memory: the same figures, one layer at a time."""

import pytest
import torch

from a3cli.stages import answers
from a3cli.stream.decoder import Decoder
from a3cli.work.machine import Machine
from tests.conftest import MODELS, refused

FIGURES = ("perplexity", "source_perplexity", "kl", "top1_agreement")


@pytest.fixture
def no_memory(monkeypatch):
    """Make weights appear too large for memory; hidden states still fit."""
    monkeypatch.setattr(answers, "available_memory", lambda machine, settings: 0)


@pytest.fixture
def held(monkeypatch):
    """Return the recorded number of layers whose weights are in memory, noted whenever one is loaded."""
    now, seen = [], []
    plain = Decoder.load

    def load(self, prefix, module, device):
        now[:] = [layer for layer in self.layers if next(layer.parameters()).device.type != "meta"]
        seen.append(len(now))
        plain(self, prefix, module, device)

    monkeypatch.setattr(Decoder, "load", load)
    return seen


@pytest.mark.parametrize("name", MODELS)
def test_a_streamed_model_has_the_same_figures(name, a3, checkpoint, text_file, tmp_path, held, monkeypatch):
    """Include a shorter block at the end, and an incomplete batch."""
    text = tmp_path / "text.txt"
    text.write_text(text_file.read_text("utf-8")[:330], "utf-8")
    command = ("eval", checkpoint(name, seed=1), "--against", checkpoint(name), "--dataset", text, "--seq-len", 64)
    command = (*command, "--batch-size", 2, "--json")
    whole = a3(*command).json
    assert not held
    monkeypatch.setattr(answers, "available_memory", lambda machine, settings: 0)
    streamed = a3(*command).json
    assert [streamed[key] for key in FIGURES] == pytest.approx([whole[key] for key in FIGURES], rel=1e-5, abs=1e-9)
    assert held
    assert set(held) == {0}  # each layer is emptied before the next one is loaded


def test_a_streamed_model_has_the_same_figures_in_background_threads(a3, checkpoint, text_file, no_memory, monkeypatch):
    """Read and write batches in threads, as for a GPU."""
    command = ("eval", checkpoint("llama-gqa"), "--dataset", text_file, "--samples", 5, "--seq-len", 32)
    command = (*command, "--batch-size", 2, "--json")
    plain = a3(*command).json
    monkeypatch.setattr(Machine, "copies", property(lambda self: True))
    in_background = a3(*command)
    assert in_background.code == 0, in_background.stderr
    assert in_background.json["perplexity"] == plain["perplexity"]


def test_a_per_layer_export_is_streamed_by_its_own_code(a3, work, source, text_file, tmp_path, monkeypatch):
    assert a3("solve", "--budget", 0.15, "--shape", "per-layer", "--overwrite", "--work", work).code == 0
    assert a3("export", tmp_path / "out", "--work", work).code == 0
    command = ("eval", tmp_path / "out", "--against", source, "--dataset", text_file, "--samples", 5, "--seq-len", 32)
    refused(a3(*command), "--trust-remote-code")
    command = (*command, "--trust-remote-code", "--json")
    whole = a3(*command).json
    monkeypatch.setattr(answers, "available_memory", lambda machine, settings: 0)
    outcome = a3(*command)
    assert outcome.code == 0, outcome.stderr
    streamed = outcome.json
    assert [streamed[key] for key in FIGURES] == pytest.approx([whole[key] for key in FIGURES], rel=1e-5, abs=1e-9)


def test_only_what_does_not_fit_is_streamed(a3, checkpoint, text_file, monkeypatch):
    """There is room for the model, but not for its source too."""
    folder, opened = checkpoint("llama-gqa"), []
    bytes_of_one = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    monkeypatch.setattr(answers, "available_memory", lambda machine, settings: 3 * bytes_of_one // 2)
    plain = answers.StreamedModel.__init__
    monkeypatch.setattr(
        answers.StreamedModel, "__init__", lambda self, *given: (opened.append(given[0]), plain(self, *given))[1]
    )
    outcome = a3("eval", folder, "--against", folder, "--dataset", text_file, "--samples", 2, "--seq-len", 64)
    assert outcome.code == 0
    assert len(opened) == 1
    assert "layer by layer" in outcome.stderr


def test_tasks_need_the_whole_model(a3, checkpoint, no_memory, monkeypatch):
    monkeypatch.setattr("a3cli.stages.evaluate.open_tasks", lambda settings: object())
    refused(a3("eval", checkpoint("llama-gqa"), "--tasks", "arc_easy"), "--tasks needs the whole model", "GB")


def test_hidden_states_that_do_not_fit(a3, checkpoint, text_file, no_memory, monkeypatch):
    monkeypatch.setattr(answers, "free_memory", lambda device: 1000)
    outcome = a3("eval", checkpoint("llama-gqa"), "--dataset", text_file, "--samples", 4, "--seq-len", 64, "--quiet")
    refused(outcome, "hidden states of 256 tokens", "--samples")


def test_available_memory_on_a_cpu_is_what_is_free(monkeypatch):
    from a3cli.settings import EvalSettings

    monkeypatch.setattr(answers, "free_memory", lambda device: {"cpu": 7, "cuda": 5}[device.type])
    settings = EvalSettings(model="m", texts=())
    on_cpu, on_gpu = (Machine(torch.device(kind), torch.float32) for kind in ("cpu", "cuda"))
    assert answers.available_memory(on_cpu, settings) == 7
    assert answers.available_memory(on_gpu, settings) == 12
    assert answers.available_memory(on_gpu, EvalSettings(model="m", texts=(), device="cuda:0")) == 5
