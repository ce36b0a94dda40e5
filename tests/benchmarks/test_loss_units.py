import json

import pytest
import torch
from safetensors.torch import load_file

from a3cli.work.folder import Work
from benchmarks.loss_units import main, ratio_rows, share_of_longest, stream_energies

pytestmark = pytest.mark.usefixtures("hasty")


def test_share_of_the_longest_tokens():
    energies = torch.ones(200, dtype=torch.float64)
    energies[:2] = 99.0
    assert share_of_longest(energies) == pytest.approx(0.5)


def test_ratios_are_probed_kl_over_predicted_losses(a3, checkpoint, text_file, tmp_path, monkeypatch, capsys):
    source, work = checkpoint("llama-gqa"), tmp_path / "work"
    assert a3("calibrate", source, "--dataset", text_file, "--samples", 6, "--seq-len", 60, "--work", work).code == 0
    cut = ("--budget", 0.2, "--head-multiple", 4, "--mlp-multiple", 16, "--shape", "per-layer", "--work", work)
    assert a3("solve", *cut).code == 0
    assert a3("solve", *cut, "--sensitivity", "probe", "--name", "probed").code == 0
    predicted = a3("solve", *cut, "--sensitivity", "residual", "--name", "by-length", "--json").json["per_layer"]
    blocks = load_file(Work(work).tokens)["tokens"]
    rows = ratio_rows(Work(work), stream_energies(source, blocks))
    probed = json.loads((work / "probes" / "best-per-layer.json").read_text())["result"]["layers"]
    energies = json.loads((work / "gradients" / "energies.json").read_text())["result"]["layers"]
    for index, (layer, found) in enumerate(zip(predicted, probed, strict=True)):
        _, kept, by_length, other = rows[index]
        curve, kl = layer["curves"]["mlp"], found["mlp"]["kl"][0]
        statistics = load_file(Work(work).statistics(index))
        by_gradient = energies[index]["mlp"] / (statistics["mlp_inverse"] / statistics["tokens"]).item()
        assert found["mlp"]["size"] == [64]
        assert kept == pytest.approx(kl / (by_gradient * curve["loss"][curve["size"].index(64)]), rel=1e-4)
        assert other > by_length  # the mean of 1/x is above 1 over the mean of x
    page = tmp_path / "page.md"
    page.write_text("<!-- loss-units -->\n<!-- end of loss-units -->\n", "utf-8")
    monkeypatch.setattr("sys.argv", ["loss_units", str(source), str(work), "--write", str(page)])
    main()
    assert capsys.readouterr().out.strip() in page.read_text("utf-8")
