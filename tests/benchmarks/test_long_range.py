"""The long-range benchmark's task, counts and verdicts, with predictors written by hand."""

import itertools
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from tests.conftest import ROOT, build_model


@pytest.fixture(scope="module")
def long_range():
    """Return the benchmark as a module; it imports the task from `scripts`."""
    return imported("long_range", ROOT / "benchmarks")


@pytest.fixture(scope="module")
def task(long_range):
    return imported("recall_task", ROOT / "scripts")


def imported(name: str, folder: Path) -> ModuleType:
    before = list(sys.path)
    sys.path.insert(0, str(folder))
    try:
        return __import__(name)
    finally:
        sys.path[:] = before


def test_the_key_at_the_stated_distance_tells_the_answer(task):
    batch = task.make_batch(4, 512, seed=3)
    assert len(batch.queries) == 4 * (512 // task.PAIR_ROOM)
    for (sequence, place, distance), answer in zip(batch.queries.tolist(), batch.answers().tolist(), strict=True):
        tokens = batch.tokens[sequence].tolist()
        key = tokens[place]
        assert [i for i, token in enumerate(tokens) if token == key] == [place - distance, place]
        assert tokens[place - distance + 1] == tokens[place + 1] == answer
        assert key < task.FIRST_VALUE <= answer < task.FIRST_FILLER
    assert min(batch.queries[:, 2]) >= task.SHORTEST
    assert max(batch.queries[:, 2]) > 256


def test_filler_walks_on_past_the_pairs(task):
    batch = task.make_batch(2, 256, seed=0)
    for tokens in batch.tokens.tolist():
        states = [token - task.FIRST_FILLER for token in tokens if token >= task.FIRST_FILLER]
        assert all((b - 3 * a) % task.FILLERS < task.SUCCESSORS for a, b in itertools.pairwise(states))
    assert torch.equal(task.make_batch(2, 256, seed=0).tokens, batch.tokens)
    assert not torch.equal(task.make_batch(2, 256, seed=1).tokens, batch.tokens)


def test_text_and_tokens_are_the_same(task, tmp_path):
    train = imported("train_recall_model", ROOT / "scripts")
    tokens = task.make_batch(3, 64, seed=0).tokens
    train.save_tokenizer(train.build_tokenizer(), tmp_path)
    from a3cli.settings import TextSettings
    from a3cli.text.blocks import sample_blocks
    from a3cli.text.tokenizer import load_tokenizer

    (tmp_path / "text.txt").write_text(task.to_text(tokens))
    settings = TextSettings(dataset=str(tmp_path / "text.txt"), samples=3, seq_len=64)
    assert torch.equal(sample_blocks(load_tokenizer(tmp_path), settings).blocks, tokens)  # blocks are whole sequences


def test_the_sketch_looks_where_it_should(task):
    """Without training, the first head attends to the previous token, the second to the token after the queried key."""
    train = imported("train_recall_model", ROOT / "scripts")
    torch.manual_seed(0)
    model = train.LlamaForCausalLM(train.CONFIG)
    train.sketch_recall(model)
    model.set_attn_implementation("eager")
    batch = task.make_batch(2, 256, seed=5)
    with torch.no_grad():
        first, second = (layer[:, 0] for layer in model(batch.tokens, output_attentions=True).attentions)
    assert first.diagonal(-1, 1, 2).mean() > 0.7
    sequence, place, distance = batch.queries.T
    assert second[sequence, place, place - distance + 1].mean() > 10 / 256


def oracle(task, *, reach):
    """Return a predictor that finds keys up to `reach` tokens back and rates all successors of a filler equally."""

    def predict(tokens, *, use_cache):
        logits = torch.zeros(*tokens.shape, len(task.WORDS))
        for b, row in enumerate(tokens.tolist()):
            seen, state = {}, None
            for place, token in enumerate(row):
                if token < task.FIRST_VALUE and place - seen.get(token, -math.inf) <= reach:
                    logits[b, place, row[seen[token] + 1]] = 50
                elif token >= task.FIRST_FILLER:
                    state = token - task.FIRST_FILLER
                if state is not None:
                    following = [task.FIRST_FILLER + (3 * state + i) % task.FILLERS for i in range(task.SUCCESSORS)]
                    logits[b, place, following] += 25
                seen[token] = place
        return SimpleNamespace(logits=logits)

    return predict


def test_accuracy_by_distance_of_an_oracle(task):
    batch = task.make_batch(6, 256, seed=1)
    hits, filler_loss = task.answer_queries(oracle(task, reach=63), batch)
    assert torch.equal(hits, batch.queries[:, 2] <= 63)
    accuracy = task.accuracy_by_distance(hits, batch.queries[:, 2])
    assert list(accuracy) == [4, 8, 16, 32, 64, 128]
    assert sum(asked for _, asked in accuracy.values()) == len(batch.queries)
    assert all(right == (asked if low < 64 else 0) for low, (right, asked) in accuracy.items())
    assert filler_loss == pytest.approx(math.log(task.SUCCESSORS), abs=0.4)  # the first token cannot be predicted


def test_bucket_borders(task):
    counts = task.accuracy_by_distance(torch.tensor([True, False, True, True]), torch.tensor([8, 15, 16, 31]))
    assert counts == {8: (1, 2), 16: (2, 2)}


def test_verdict_on_recall_heeds_chance(long_range):
    distances = torch.full((1000,), 100)
    paper, best = torch.ones(1000, dtype=torch.bool), torch.ones(1000, dtype=torch.bool)
    best[:9] = False  # 9 queries lost, none gained: not more than three times √9
    assert long_range.worse_than_first([("paper", paper), ("best", best)], distances, "") == []
    best[:20] = False
    lines = long_range.worse_than_first([("paper", paper), ("best", best)], distances, "--budget 0.1")
    assert lines == ["best, --budget 0.1, distance 64–127: 2.0 % worse than paper"]
    assert long_range.worse_than_first([("paper", best), ("best", paper)], distances, "") == []


def test_loss_by_position_is_a_literal_loop(long_range):
    model = build_model("llama-gqa")
    blocks = torch.randint(0, 260, (3, 24), generator=torch.Generator().manual_seed(0))
    losses = long_range.loss_by_position(model, blocks, at_once=2)
    for n, block in enumerate(blocks):
        for t in range(1, 24):
            with torch.no_grad():
                log_p = model(block[None, :t]).logits[0, -1].log_softmax(-1)
            assert losses[n, t - 1].item() == pytest.approx(-log_p[block[t]].item(), abs=2e-4)
    means = long_range.bucket_means(losses, (1, 8, 24))
    for n, rows in enumerate(losses.tolist()):
        assert means[n].tolist() == pytest.approx([sum(rows[t - 1] for t in range(1, 8)) / 7, sum(rows[7:]) / 16])


def test_growth_with_position_is_flagged(long_range):
    noise = 0.01 * torch.randn(100, 6, generator=torch.Generator().manual_seed(0)).double()
    flat, growing = noise + 0.5, noise.flip(0) + torch.linspace(0, 0.1, 6)
    assert long_range.growing_faster([("paper", growing), ("best", flat)], "") == []
    assert len(long_range.growing_faster([("paper", flat), ("best", growing)], "")) == 1


def test_tables_go_between_the_markers(long_range, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n\n<!-- long range -->\nold\n<!-- end of long range -->\nafter\n")
    long_range.write_between(page, "long range", "| new |")
    assert page.read_text() == "before\n\n<!-- long range -->\n| new |\n<!-- end of long range -->\nafter\n"
