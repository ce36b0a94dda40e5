"""What does not depend on the budget is computed once per work folder, and a later solution has the same bytes."""

import shutil

import pytest

from a3cli.methods import maps, normed
from a3cli.stream.decoder import Decoder
from tests.conftest import SHORT, SOLVE, but, snapshot
from tests.helpers.damage import flip

pytestmark = pytest.mark.usefixtures("hasty")

PER_LAYER = ("--shape", "per-layer")
SMALLER_HEADS = ("--kv-budget", 0.25)
VARIANTS = {
    "stock": ("llama-gqa", SMALLER_HEADS),
    "per-layer": ("llama-gqa", PER_LAYER),
    "normed": ("qwen3-gqa", (*PER_LAYER, "--components", "qk,ov,mlp")),
}


@pytest.fixture
def computed(monkeypatch):
    """Record what is computed of query and key maps: each refinement, and each alternation of the closed form."""
    found: list[tuple[object, ...]] = []

    def record(kind, name):
        original = getattr(kind, name)

        def recorded(self, layer, slots, *rest):
            effort = rest[1] if len(rest) > 1 else None
            found.append((name, layer.inputs().layer, tuple(slots.pairs), effort))
            return original(self, layer, slots, *rest)

        monkeypatch.setattr(kind, name, recorded)

    for kind, name in (
        (maps.MapSolver, "_refine_maps"),
        (maps.MapSolver, "closed_form"),
        (normed.NormedSolver, "refine"),
    ):
        record(kind, name)
    return found


@pytest.fixture
def solve(a3):
    def run(work, budget, name, *options):
        outcome = a3(*but(SOLVE, "--budget", budget), *options, "--work", work, "--name", name)
        assert outcome.code == 0, outcome
        return outcome

    return run


@pytest.fixture
def calibrated(a3, checkpoint, text_file, tmp_path):
    def run(name):
        work = tmp_path / "calibrated"
        assert a3("calibrate", checkpoint(name), "--dataset", text_file, *SHORT, "--work", work).code == 0
        return work

    return run


def solution(work, name):
    return snapshot(work / "solutions" / name)


def is_refinement(each) -> bool:
    return each[0] != "closed_form"


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_second_budget_refines_nothing_again(variant, computed, solve, calibrated, tmp_path):
    name, options = VARIANTS[variant]
    work = calibrated(name)
    alone = shutil.copytree(work, tmp_path / "alone")
    solve(work, 0.4, "first", *options)
    first = computed.copy()
    assert len(set(filter(is_refinement, first))) == len([*filter(is_refinement, first)]), "none of it twice"
    computed.clear()
    solve(work, 0.3, "second", *options)
    second = computed.copy()
    assert not set(first) & set(filter(is_refinement, second))
    computed.clear()
    solve(alone, 0.3, "second", *options)
    assert set(first) & set(filter(is_refinement, computed)), "it needs some of what the first had"
    assert solution(work, "second") == solution(alone, "second") != solution(work, "first")
    computed.clear()
    solve(work, 0.4, "again", *options)
    assert computed == []
    assert solution(work, "again") == solution(work, "first")


@pytest.mark.parametrize("kept", ["layer-000.json", "layer-001-*.safetensors"])
def test_damage_of_what_is_kept_is_noticed(kept, computed, solve, work):
    shutil.rmtree(work / "kept")  # what the solution without a name may have left there
    solve(work, 0.4, "first", *SMALLER_HEADS)
    records = sorted(path.name for path in (work / "kept").glob("*.json"))
    assert records == ["layer-000.json", "layer-001.json", "source.json"]
    damaged = next((work / "kept").glob(kept))
    before = damaged.read_bytes()
    computed.clear()
    flip(damaged)
    outcome = solve(work, 0.4, "again", *SMALLER_HEADS)
    assert f"{damaged} has changed since it was written; it is computed again" in outcome.stderr
    assert {each[1] for each in filter(is_refinement, computed)} == {int(kept[6:9])}
    assert solution(work, "again") == solution(work, "first")
    assert damaged.suffix == ".json" or damaged.read_bytes() == before
    computed.clear()
    solve(work, 0.4, "third", *SMALLER_HEADS)
    assert computed == []


@pytest.mark.parametrize("option", [("--context", 40), ("--eigenvalue-floor", 1e-3)], ids=str)
def test_what_is_kept_belongs_to_its_settings(option, solve, work, tmp_path):
    alone = shutil.copytree(work, tmp_path / "alone", ignore=shutil.ignore_patterns("kept"))
    solve(work, 0.4, "first", *SMALLER_HEADS)
    solve(work, 0.4, "second", *SMALLER_HEADS, *option)
    solve(alone, 0.4, "second", *SMALLER_HEADS, *option)
    assert solution(work, "second") == solution(alone, "second")
    assert solution(work, "second").keys() == solution(work, "first").keys()
    name = "layer-001.safetensors"
    assert solution(work, "second")[name] != solution(work, "first")[name]


def test_what_is_kept_belongs_to_its_statistics(a3, computed, solve, work, source, text_file, tmp_path):
    """What another calibration left is removed with it, and not used if someone puts it back."""
    solve(work, 0.4, "first")
    other = shutil.copytree(work / "kept", tmp_path / "kept")
    calibrate = ("calibrate", source, "--dataset", text_file, *SHORT, "--seed", 5, "--work", work, "--overwrite")
    assert a3(*calibrate).code == 0
    assert not (work / "kept").exists()
    assert not (work / "channels").exists()
    alone = shutil.copytree(work, tmp_path / "alone")
    solve(alone, 0.4, "first")
    shutil.copytree(other, work / "kept")
    solve(work, 0.4, "first")
    assert solution(work, "first") == solution(alone, "first")
    assert snapshot(work / "kept") == snapshot(alone / "kept"), "nothing of the other calibration is left"


def test_the_source_is_run_once_to_measure_solutions(solve, work, monkeypatch):
    layers, original = [], Decoder.layer

    def counted(self, index, *rest):
        layers.append((type(self).__name__, index))
        return original(self, index, *rest)

    monkeypatch.setattr(Decoder, "layer", counted)
    shutil.rmtree(work / "kept")
    both = [("SmallerDecoder", 0), ("Decoder", 0), ("SmallerDecoder", 1), ("Decoder", 1)]
    for name, expected in (("first", both), ("second", both[::2]), ("third", both)):
        layers.clear()
        outcome = solve(work, 0.4, name, "--sensitivity", "residual")
        assert layers == expected
        assert solution(work, name) == solution(work, "first")
        (states,) = (work / "kept").glob("source-*.safetensors")
        if name == "second":
            flip(states)
    assert f"{states} has changed since it was written; it is computed again" in outcome.stderr


@pytest.mark.parametrize("options", [("--components", "mlp"), ("--components", "ov,mlp", *PER_LAYER)], ids=str)
def test_heads_that_cannot_be_cut_are_not_refined(options, computed, solve, work):
    """Only the energy in the manifest is computed of them: no closed form, and no step of refinement."""
    shutil.rmtree(work / "kept")
    solve(work, 0.2, "whole", *options)
    assert [(each[0], each[-1]) for each in computed] == [("_refine_maps", maps.UNREFINED)] * 2
    computed.clear()
    solve(work, 0.1, "again", *options)
    assert computed == []


def test_heads_that_stay_whole_are_not_refined_thoroughly(computed, solve, work):
    """Their losses are needed to choose the sizes, and nothing else is."""
    shutil.rmtree(work / "kept")
    found = solve(work, 0.1, "whole", "--mlp-budget", 0.3, "--json").json
    assert found["head_dim"] == {"before": 16, "after": 16}
    efforts = [each[-1] for each in filter(is_refinement, computed)]
    assert {*efforts} == {maps.QUICK, maps.UNREFINED}
