"""What solve says of a solution's quality is what `a3 eval` measures on the same blocks."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from a3cli.models import costs
from a3cli.stages.evaluate import describe_sums, sum_blocks
from a3cli.stages.measured_loss import choose_blocks, pieces
from tests.conftest import SHORT, SOLVE


@pytest.fixture(autouse=True)
def all_tokens(hasty, monkeypatch):
    monkeypatch.setattr(costs, "MEASURED_TOKENS", 4096)


class Whole:
    """A whole model of transformers."""

    def __init__(self, folder):
        self.name = str(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True).eval()

    def logits(self, blocks, batch_size):
        yield from (self.model(block[None]).logits for block in blocks)


@pytest.mark.parametrize("how", [(), ("--shape", "per-layer"), ("--method", "paper"), ("--sequential",)])
@pytest.mark.parametrize("name", ["llama-gqa", "smollm3-bias", "nemotron-mha-bias", "qwen3-gqa"])
def test_it_equals_whole_models_on_those_blocks(name, how, a3, checkpoint, text_file, tmp_path):
    source, work, out = checkpoint(name), tmp_path / "work", tmp_path / "out"
    assert a3("calibrate", source, "--dataset", text_file, *SHORT, "--work", work).code == 0
    found = a3(*SOLVE, *how, "--work", work, "--json").json["measured_loss"]
    assert a3("export", out, "--work", work).code == 0
    kept = load_file(work / "calibration" / "tokens.safetensors")
    tokens = choose_blocks(kept["held_out"])
    assert found["held_out"] is True
    assert not {*map(tuple, tokens.tolist())} & {*map(tuple, kept["tokens"].tolist())}
    sums, _ = sum_blocks(Whole(out), Whole(source), list(tokens), 1)
    expected = describe_sums(sums)
    assert found["tokens"] == expected["predicted_tokens"]
    assert found["perplexity"]["before"] == pytest.approx(expected["source_perplexity"], rel=1e-3)
    assert found["perplexity"]["after"] == pytest.approx(expected["perplexity"], rel=2e-3)
    assert found["kl"] == pytest.approx(expected["kl"], rel=2e-2, abs=1e-4)
    assert found["top1_agreement"] == pytest.approx(expected["top1_agreement"], abs=0.02)


@pytest.mark.parametrize(
    ("count", "length", "chosen"),
    [(4, 16, [0, 1, 2, 3]), (128, 1024, [0, 32, 64, 96]), (6, 3000, [0]), (2, 10_000, [0])],
)
def test_blocks_are_evenly_spread(count, length, chosen):
    blocks = torch.arange(count)[:, None].expand(count, length)
    found = choose_blocks(blocks)
    assert found[:, 0].tolist() == chosen
    assert found.shape[1] == min(length, costs.MEASURED_TOKENS)


@pytest.mark.parametrize(("blocks", "length"), [(3, 1000), (1, 256), (40, 32), (7, 100), (2, 2)])
def test_every_prediction_is_in_one_piece(blocks, length):
    seen = torch.zeros(blocks, length - 1)
    for chosen, places in pieces(blocks, length):
        assert len(chosen) * len(places) <= costs.HEAD_TOKENS
        seen[chosen.start : chosen.stop, places.start : places.stop] += 1
    assert torch.equal(seen, torch.ones_like(seen))


def test_logits_that_are_not_finite_are_a_warning(a3, checkpoint, text_file, tmp_path, monkeypatch):
    """The solution may be good all the same: in another dtype, say."""
    assert a3("calibrate", checkpoint("llama-gqa"), "--dataset", text_file, *SHORT, "--work", tmp_path).code == 0
    monkeypatch.setattr("torch.Tensor.log_softmax", lambda x, _dim: x * float("nan"))
    outcome = a3(*SOLVE, "--sensitivity", "residual", "--work", tmp_path)
    assert outcome.code == 0
    assert "the solution was not measured" in outcome.stderr
    assert "perplexity" not in outcome.stdout


def test_an_infinite_perplexity_is_a_warning_too(a3, checkpoint, text_file, tmp_path, monkeypatch):
    assert a3("calibrate", checkpoint("llama-gqa"), "--dataset", text_file, *SHORT, "--work", tmp_path).code == 0
    loss = "a3cli.stages.evaluate.negative_log_likelihood"
    monkeypatch.setattr(loss, lambda log_p, tokens, _name: 1000.0 * len(tokens))
    outcome = a3(*SOLVE, "--work", tmp_path)
    assert outcome.code == 0
    assert "the solution was not measured: its perplexity is infinite" in " ".join(outcome.stderr.split())


def test_people_are_told(a3, checkpoint, text_file, tmp_path):
    assert a3("calibrate", checkpoint("llama-gqa"), "--dataset", text_file, *SHORT, "--work", tmp_path).code == 0
    outcome = a3(*SOLVE, "--work", tmp_path)
    found = a3(*SOLVE, "--work", tmp_path, "--json").json["measured_loss"]
    before, after = found["perplexity"].values()
    said = " ".join(outcome.stdout.split())
    assert f"perplexity goes from {before:.4g} to {after:.4g} ({after / before - 1:+.1%})" in said
    assert f"the same at {found['top1_agreement']:.0%} of positions" in said


def test_without_other_text_it_says_so(a3, checkpoint, text_file, tmp_path):
    """A text that is just long enough."""
    from a3cli.text.tokenizer import load_tokenizer

    source, text = checkpoint("llama-gqa"), tmp_path / "short.txt"
    tokenizer = load_tokenizer(source)
    text.write_text(tokenizer.decode(tokenizer(text_file.read_text())["input_ids"][:96]))
    whole = len(tokenizer(text.read_text())["input_ids"])
    assert (
        a3("calibrate", source, "--dataset", text, "--samples", whole // 32, "--seq-len", 32, "--work", tmp_path).code
        == 0
    )
    assert list(load_file(tmp_path / "calibration" / "tokens.safetensors")) == ["tokens"]
    outcome = a3(*SOLVE, "--work", tmp_path)
    assert "of the calibration itself, where the loss is smallest" in " ".join(outcome.stdout.split())
    assert a3(*SOLVE, "--work", tmp_path, "--json").json["measured_loss"]["held_out"] is False


def test_merged_calibrations_keep_what_was_held_out(a3, checkpoint, text_file, tmp_path):
    held_out = []
    for seed in (0, 1):
        work = tmp_path / str(seed)
        assert (
            a3(
                "calibrate", checkpoint("llama-gqa"), "--dataset", text_file, *SHORT, "--seed", seed, "--work", work
            ).code
            == 0
        )
        held_out.append(load_file(work / "calibration" / "tokens.safetensors")["held_out"])
    assert a3("stats", "merge", tmp_path / "0", tmp_path / "1", "--into", tmp_path / "both").code == 0
    merged = load_file(tmp_path / "both" / "calibration" / "tokens.safetensors")["held_out"]
    assert torch.equal(merged, torch.cat(held_out))
