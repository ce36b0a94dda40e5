"""Smaller heads behind norms at small scale: the trained model starts as the Llama, and each way is measured once."""

import json

import pytest
import torch

from benchmarks import qk_norm
from benchmarks.qk_norm import WAYS, with_norms
from benchmarks.training import random_batches
from tests.conftest import VOCABULARY, build_model


def test_a_model_starts_with_the_weights_and_the_mean_lengths_of_a_llama():
    llama = build_model("llama-gqa-tied")
    tokens = torch.randint(VOCABULARY, (2, 32), generator=torch.Generator().manual_seed(1))
    model = with_norms(llama, tokens)
    ours, theirs = model.state_dict(), llama.state_dict()
    assert ours.keys() - theirs.keys() == {
        f"model.layers.{layer}.self_attn.{norm}_norm.weight" for layer in range(2) for norm in "qk"
    }
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    x = llama.model.layers[0].input_layernorm(llama.model.embed_tokens(tokens))
    length = llama.model.layers[0].self_attn.k_proj(x).square().mean().sqrt()
    torch.testing.assert_close(ours["model.layers.0.self_attn.k_norm.weight"], length.expand(16))


def test_batches_depend_on_the_seed_alone():
    stream = torch.arange(1000)
    first, again, other = (next(random_batches(stream, 16, seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(first - first[:, :1], torch.arange(16).expand(8, -1))


@pytest.mark.slow
@pytest.mark.usefixtures("hasty")
def test_each_way_is_measured_once(checkpoint, text_file, tmp_path, monkeypatch):
    written = tmp_path / "table.md"
    written.write_text("before\n<!-- qk-norm -->\n\n<!-- end of qk-norm -->\nafter\n")
    options = ("--samples", 3, "--seq-len", 32, "--blocks", 2, "--steps", 2, "--seeds", 1, "--write", written)
    budgets = ("--budgets", "0.2", "--kv-budgets", "0.2")  # values alone reach a quarter
    texts = ("--training", text_file, "--evaluation", text_file, "--folder", tmp_path / "bench")
    command = ["qk_norm.py", checkpoint("llama-gqa-tied"), *texts, *options, *budgets]
    monkeypatch.setattr("sys.argv", list(map(str, command)))
    qk_norm.main()
    table = written.read_text()
    assert table.count("\n| weights | 20 % |") == len(WAYS["weights"])
    assert table.count("\n| KV cache | 20 % |") == len(WAYS["KV cache"])
    cells = [json.loads(line) for line in (tmp_path / "bench" / "cells.jsonl").read_text().splitlines()]
    assert {size["qk"] for size in cells[0]["sizes"]} == {16}
    monkeypatch.setattr(qk_norm, "Bench", lambda *_: pytest.fail("measured again"))
    qk_norm.main()
    assert written.read_text() == table
