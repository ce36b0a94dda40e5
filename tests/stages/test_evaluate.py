"""Perplexity, KL and agreement equal a plain computation of them."""

import math

import pytest
import torch

from tests.conftest import build_tokenizer


@torch.inference_mode()
def plain(folder, text, seq_len):
    """Return per-token log-probabilities `[predicted, vocabulary]` and targets, one block at a time."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.tensor(build_tokenizer()(text)["input_ids"])
    rows, targets = [], []
    for block in tokens.split(seq_len):
        if len(block) > 1:
            rows.append(model(block[None]).logits[0, :-1].double().log_softmax(-1))
            targets.append(block[1:])
    return torch.cat(rows), torch.cat(targets)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("length", [330, 321, 320])  # a tail of ten tokens, of one, and no tail
def test_measures_equal_a_plain_computation(length, batch_size, a3, checkpoint, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(chr(33 + i * i % 90) for i in range(length)))
    model, source = checkpoint("llama-gqa", seed=1), checkpoint("llama-gqa")
    result = a3(
        "eval", model, "--against", source, "--dataset", path, "--seq-len", 64, "--batch-size", batch_size, "--json"
    ).json
    log_p, targets = plain(model, path.read_text(), 64)
    log_q, _ = plain(source, path.read_text(), 64)
    assert result["tokens"] == length
    assert result["predicted_tokens"] == len(targets)
    assert result["perplexity"] == pytest.approx(math.exp(-log_p.gather(1, targets[:, None]).mean()), rel=1e-5)
    assert result["source_perplexity"] == pytest.approx(math.exp(-log_q.gather(1, targets[:, None]).mean()), rel=1e-5)
    assert result["kl"] == pytest.approx((log_q.exp() * (log_q - log_p)).sum(1).mean().item(), rel=1e-4)
    assert result["top1_agreement"] == pytest.approx((log_p.argmax(1) == log_q.argmax(1)).double().mean().item())


def test_a_model_is_no_distance_from_itself(a3, checkpoint, text_file):
    source = checkpoint("llama-gqa")
    result = a3(
        "eval", source, "--against", source, "--dataset", text_file, "--samples", 3, "--seq-len", 64, "--json"
    ).json
    assert result["kl"] == pytest.approx(0, abs=1e-9)
    assert result["top1_agreement"] == 1
    assert result["perplexity_increase"] == 0


def test_a_loss_that_is_not_finite_is_an_error(a3, tmp_path, text_file):
    from tests.conftest import build_model

    model = build_model("llama-gqa")
    with torch.no_grad():
        model.lm_head.weight.fill_(float("inf"))
    model.save_pretrained(tmp_path / "model")
    build_tokenizer().save_pretrained(tmp_path / "model")
    outcome = a3("eval", tmp_path / "model", "--dataset", text_file, "--samples", 1, "--seq-len", 64)
    assert outcome.code == 2
    assert "not finite" in outcome.stderr
