"""A budget that rounding overshoots by more than a tenth is named, with multiples that keep to it."""

import itertools
import re
from fractions import Fraction

import pytest

from a3cli.models import costs, uniform
from a3cli.models.checkpoint import resolve_model
from a3cli.models.families import LayerSizes
from a3cli.models.model import describe
from a3cli.settings import SolveSettings
from a3cli.solvers.allocate import sizes
from a3cli.stages.rounding import overshoots, stays_near, warnings_of
from a3cli.work.folder import Work
from a3cli.work.manifests import SolutionManifest
from tests.conftest import but

pytestmark = pytest.mark.usefixtures("hasty")

DEFAULTS = ("--head-multiple", 16, "--mlp-multiple", 64)
SOLVE = ("solve", "--method", "paper", "--overwrite", *DEFAULTS)


def about_rounding(outcome) -> list[str]:
    return [each for each in outcome.json["warnings"] if "were asked for" in each]


def suggested(warning: str) -> tuple[str, ...]:
    """The options that a warning names as the remedy."""
    (found,) = re.findall(r"; use ((?:--\S+ \d+ )+)to come within a tenth of the budget$", warning)
    return tuple(found.split())


@pytest.mark.parametrize(
    ("budget", "reached", "remedy"),
    [
        (("--budget", 0.1), "20.0 %", ("--mlp-multiple", "16")),
        (("--budget", 0.05, "--head-multiple", 8, "--components", "qk,ov"), "20.0 %", ("--head-multiple", "2")),
        (("--mlp-budget", 0.16), "33.3 %", ("--mlp-multiple", "16")),
    ],
)
def test_the_multiple_that_solve_names_keeps_to_the_budget(budget, reached, remedy, a3, work):
    command, asked = (*but(SOLVE, *budget), "--work", work), budget[1]
    (warning,) = about_rounding(a3(*command, "--json"))
    assert warning.startswith(f"{budget[0]}: {100 * asked:g} % were asked for, {reached} are removed"), warning
    assert suggested(warning) == remedy
    shown = a3(*command)
    assert f"warning: {warning}" in shown.stderr.splitlines()
    again = a3(*but(command, *remedy), "--json")
    assert about_rounding(again) == []
    if budget[0] == "--budget":
        assert asked <= again.json["budget_reached"] <= 1.1 * asked


def test_no_multiple_keeps_to_a_tiny_budget(a3, work):
    (warning,) = about_rounding(a3(*SOLVE, "--budget", 0.01, "--work", work, "--json"))
    remedy = warning.partition("--mlp-multiple 64; ")[2]
    nothing = "no multiple down to 2 (heads) and 8 (MLP) comes within a tenth of the budget"
    assert remedy == f"{nothing}; --shape per-layer has finer steps"


def test_a_budget_that_is_met_is_no_warning(a3, work):
    assert about_rounding(a3(*SOLVE, "--budget", 0.19, "--work", work, "--json")) == []  # 20 %
    assert overshoots(0.1, 0.1101)
    assert not overshoots(0.1, 0.1099)
    assert not overshoots(0.0, 0.0)


def test_without_the_source_no_multiple_is_named(a3, work):
    assert a3(*SOLVE, "--budget", 0.1, "--work", work).code == 0
    (work / "source.json").unlink()
    folder = Work(work)
    (warning,) = warnings_of(SolutionManifest.read(folder.solution_manifest, ""), folder)
    assert warning.endswith("; lower these multiples")


def test_the_multiple_that_plan_names_keeps_to_the_budget(a3, checkpoint):
    command = ("plan", checkpoint("llama-gqa"), "--budget", 0.1, *DEFAULTS)
    found = a3(*command, "--json").json
    (warning,) = found["warnings"]
    assert "--budget: 10 % were asked for, 20.0 % are removed" in warning
    shown = a3(*command)
    assert f"warning: {warning}" in shown.stderr.splitlines()
    again = a3(*but(command, *suggested(warning)), "--json").json
    assert again["warnings"] == []
    assert 0.1 <= again["budget_reached"] <= 0.11
    assert a3(*command, "--shape", "per-layer", "--json").json["warnings"] == []


def removed(shape, head: int, width: int) -> Fraction:
    total = costs.linear_weights(shape, shape.sizes[:1])
    return Fraction(total - costs.linear_weights(shape, [LayerSizes(head, head, width)]), total)


@pytest.mark.parametrize("name", ["llama-gqa", "starcoder2-gqa"])
def test_least_cuts_are_those_of_which_no_size_can_be_larger(name, checkpoint):
    shape = describe(resolve_model(str(checkpoint(name)))).shape
    heads, widths = sizes(shape.head_dim, 2), sizes(shape.intermediate_size, 8)
    for budget in ("0", "0.05", "0.2", "0.55", "0.95"):
        every = itertools.product(heads, widths)
        enough = [each for each in every if removed(shape, *each) >= Fraction(budget)]
        largest = {
            (head, width)
            for head, width in enough
            if not any((h >= head and w >= width and (h, w) != (head, width)) for h, w in enough)
        }
        found = uniform.least_cuts(shape, float(budget), heads=heads, widths=widths)
        assert {(size.qk, size.mlp) for size, _ in found} == largest
        assert all(share == pytest.approx(float(removed(shape, size.qk, size.mlp))) for size, share in found)


def test_layers_with_sizes_of_their_own_are_judged_by_one_step(checkpoint):
    shape = describe(resolve_model(str(checkpoint("llama-gqa")))).shape
    step = 8 * 3 * shape.hidden_size / costs.linear_weights(shape, shape.sizes)  # of the MLP of one layer
    for components in (("mlp",), ("qk", "ov", "mlp")):
        near = SolveSettings(budget=10.1 * step, shape="per-layer", components=components)
        assert stays_near(near, shape, 16, 8)
        assert not stays_near(near.model_copy(update={"budget": 4.9 * step}), shape, 16, 8)
    heads = SolveSettings(attention_budget=0.5, shape="per-layer")
    assert stays_near(heads, shape, 2, 64)
    assert not stays_near(heads, shape, 8, 64)
