"""The comparison of KV caches at small scale: every method has the same bytes, and SVD is what it says."""

import re

import pytest
import torch

from benchmarks import kv_cache
from benchmarks.baselines import Calibration, per_head_svd, weight_of
from tests.conftest import VOCABULARY, build_model


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    tokens = torch.randint(VOCABULARY, (10, 32), generator=torch.Generator().manual_seed(1))
    return Calibration(build_model("llama-gqa-tied"), tokens, batch_size=4)


@pytest.mark.parametrize("whitened", [False, True])
def test_each_head_gets_the_rank_and_nothing_else_changes(whitened, calibration):
    smaller = per_head_svd(calibration, 6, whitened=whitened)
    for before, after in zip(calibration.model.model.layers, smaller.model.layers, strict=True):
        for role in ("k", "v"):
            for head in weight_of(after, role).split(16):
                assert torch.linalg.matrix_rank(head, rtol=1e-5) == 6
        for role in ("q", "o", "gate", "up", "down"):
            assert torch.equal(weight_of(before, role), weight_of(after, role))
    whole = per_head_svd(calibration, 16, whitened=whitened)
    torch.testing.assert_close(whole.state_dict(), calibration.model.state_dict(), rtol=1e-4, atol=1e-4)


def test_whitening_is_best_for_the_calibrated_keys_and_plain_svd_for_the_weights(calibration):
    models = {whitened: per_head_svd(calibration, 6, whitened=whitened) for whitened in (False, True)}
    for layer, grams in enumerate(calibration.grams):
        errors = {}
        for whitened, model in models.items():
            layers = (each.model.layers[layer] for each in (calibration.model, model))
            difference = torch.sub(*(weight_of(each, "k") for each in layers))
            errors[whitened] = (difference @ grams["q"] * difference).sum(), difference.square().sum()
        assert errors[True][0] < errors[False][0]
        assert errors[False][1] < errors[True][1]


@pytest.mark.slow
@pytest.mark.usefixtures("hasty")
def test_all_methods_are_measured_with_the_same_bytes(checkpoint, text_file, tmp_path, monkeypatch, capsys):
    written = tmp_path / "table.md"
    written.write_text("before\n<!-- kv-cache -->\n\n<!-- end of kv-cache -->\nafter\n")
    options = ("--samples", 3, "--seq-len", 32, "--blocks", 2, "--budgets", "0.4", "--write", written)
    texts = ("--calibration", text_file, "--evaluation", text_file)
    command = ["kv_cache.py", checkpoint("llama-gqa-tied"), *texts, *options]
    monkeypatch.setattr("sys.argv", list(map(str, command)))
    kv_cache.main()
    rows = re.findall(
        r"^\| 50\.0 % \| ([^|]+) \| (yes|) \| [\d.]+ \| [+-][\d.]+ \| [\d.]+ \|", written.read_text(), re.M
    )
    assert rows == [
        ("a3", "yes"),
        ("a3, per-layer", ""),
        ("a3, as published", "yes"),
        *((name, "") for name in kv_cache.SVD),
    ]
    assert capsys.readouterr().out in written.read_text() + "\n"
