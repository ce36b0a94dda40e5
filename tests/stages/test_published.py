"""`a3 plan` on the published sizes of well-known models: its figures are those of their cards, without a download."""

import json
import math
import socket
from typing import Any

import pytest

from a3cli.models.families import FAMILIES
from tests.helpers.published import PUBLISHED


@pytest.fixture
def planned(a3, tmp_path, monkeypatch):
    """Return a function that plans for a model of the table, of which there is only the config.json."""

    def plan(name: str, *options: object) -> Any:
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(PUBLISHED[name].config))
        outcome = a3("plan", folder, *options, "--json")
        assert outcome.code == 0, outcome.stderr
        assert [path.name for path in folder.iterdir()] == ["config.json"]
        return outcome.json

    def refuse(*_: object) -> None:
        raise AssertionError("a3 plan used the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    return plan


def test_there_are_enough_models():
    assert len(PUBLISHED) >= 25
    assert {row.model_type for row in PUBLISHED.values()} <= FAMILIES.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_figures_are_those_of_the_card(name, planned):
    """Parameters, head size and KV cache before; a quarter removed, in the components that the family allows, after."""
    row = PUBLISHED[name]
    shape = "stock" if FAMILIES[row.model_type].compressible("stock") else "per-layer"
    found = planned(name, "--shape", shape, "--mlp-multiple", row.multiple)
    assert found["weights"]["checked"] == "nothing"
    assert found["parameters"]["before"] == row.parameters
    assert found["bytes"]["before"] == 2 * row.parameters
    assert found["head_size"]["before"] == row.head
    assert found["mlp_width"]["before"] == row.width
    assert found["layers"] == row.layers
    assert found["kv_bytes_per_token"]["before"] == row.cache
    cut = FAMILIES[row.model_type].compressible(shape)
    assert found["components"] == [*cut]
    assert 0.25 <= found["budget_reached"] < row.most
    assert found["mlp_width"]["after"] % row.multiple == 0
    assert 0 < found["mlp_width"]["after"] < row.width
    smaller = found["kv_bytes_per_token"]["after"] / row.cache
    assert smaller == found["head_size"]["after"] / row.head
    assert (smaller < 1) == ("qk" in cut)
    removed = row.parameters - found["parameters"]["after"]
    heads = row.head - found["head_size"]["after"]
    channels = row.width - found["mlp_width"]["after"]
    of_heads = 2 * (row.heads + row.kv_heads) * heads * row.hidden
    of_channels = (3 if FAMILIES[row.model_type].gated else 2) * row.experts * channels * row.hidden
    biases = removed - row.layers * (of_heads + of_channels)
    assert 0 <= biases < 0.001 * removed
    for figures in ("disk_bytes", "device_memory_bytes", "peak_ram_bytes", "seconds"):
        assert all(value >= 0 and math.isfinite(value) for value in found[figures].values())
    assert all(each["loads"] in ("yes", "no", "untried") for each in found["runtimes"])


# The MLP width without a quarter of all weights, where query, key and value heads stay whole.
LEFT = {"Qwen3-0.6B": 1792, "Qwen3-4B": 6400, "Qwen3-8B": 8320}


@pytest.mark.parametrize("name", LEFT)
def test_a_norm_on_heads_makes_the_mlp_pay(name, planned):
    """Heads of 128 whatever the hidden size; in layers of their own, values pay too."""
    row, left = PUBLISHED[name], LEFT[name]
    stock, own = (planned(name, "--shape", shape) for shape in ("stock", "per-layer"))
    total = 2 * (row.heads + 8) * 128 * row.hidden + 3 * row.width * row.hidden
    for found in (stock, own):
        assert found["head_size"]["after"] == 128
        values, channels = 128 - found["value_head_size"]["after"], row.width - found["mlp_width"]["after"]
        assert found["budget_reached"] == pytest.approx(((row.heads + 8) * values + 3 * channels) * row.hidden / total)
        assert 0.25 <= found["budget_reached"] < row.most
    assert (stock["value_head_size"]["after"], stock["mlp_width"]["after"]) == (128, left)
    assert stock["kv_bytes_per_token"]["after"] == stock["kv_bytes_per_token"]["before"]
    assert own["value_head_size"]["after"] < 128
    assert own["mlp_width"]["after"] > left
    assert own["seconds"]["solve --method best"] > stock["seconds"]["solve --method best"]
    assert all(each["loads"] == "yes" for each in stock["runtimes"])


def test_layers_without_rope_are_named(planned):
    """Every fourth layer of SmolLM3."""
    assert "some layers have no RoPE" in planned("SmolLM3-3B")["whole_heads"]
