"""SIGKILL at random moments of each stage: unfinished work never looks finished, and a rerun gives the same bytes."""

import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.conftest import snapshot
from tests.helpers import forks

TEXT = ("--samples", 8, "--seq-len", 64, "--batch-size", 2)
SOLVE = ("solve", "--budget", 0.25, "--mlp-multiple", 8, "--head-multiple", 2, "--sequential")
MADE = {
    "calibrate": "work/calibration/manifest.json",
    "solve": "work/solution/manifest.json",
    "export": "out",
    "export --overwrite": "out",
}


@dataclass(frozen=True)
class Step:
    """A stage's command, the folder before and after it, and its undisturbed run time."""

    command: tuple[object, ...]
    before: Path
    after: Path
    seconds: float


@pytest.fixture(scope="module")
def road(checkpoint, text_file, tmp_path_factory) -> dict[str, Step]:
    source = checkpoint("llama-gqa", num_hidden_layers=4, intermediate_size=160, max_shard_size="200KB")
    commands = {
        "calibrate": ("calibrate", source, "--dataset", text_file, *TEXT, "--work", "work", "--quiet"),
        "solve": (*SOLVE, "--work", "work", "--quiet"),
        "export": ("export", "out", "--max-shard-size", "100KB", "--work", "work", "--quiet"),
        "export --overwrite": ("export", "out", "--max-shard-size", "70KB", "--overwrite", "--work", "work", "--quiet"),
    }
    forks.run(("--version",), tmp_path_factory.mktemp("imports"))  # does the slow imports before the clock starts
    steps = {}
    before = tmp_path_factory.mktemp("undisturbed")
    for stage, command in commands.items():
        after = Path(shutil.copytree(before, tmp_path_factory.mktemp("after") / "folder"))
        process = forks.start(command, after)
        started = time.perf_counter()
        process.join()
        assert process.exitcode == 0
        steps[stage] = Step(command, before, after, time.perf_counter() - started)
        before = after
    return steps


def content(folder: Path) -> dict[str, bytes | None]:
    return {name: data for name, data in snapshot(folder).items() if not name.startswith(forks.OUTPUTS)}


@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=pytest.mark.slow)])
@pytest.mark.parametrize("stage", list(MADE))
def test_killed_at_random_moments(stage, kills, road, tmp_path):
    step, moments, died = road[stage], random.Random(stage), 0
    before, after = content(step.before), content(step.after)
    for number in range(kills):
        folder = Path(shutil.copytree(step.before, tmp_path / str(number)))
        died += forks.kill_after(moments.uniform(0, step.seconds), step.command, folder) != 0
        found = content(folder)
        if "export" not in stage:
            assert not (folder / MADE[stage]).exists() or after.items() <= found.items()  # leftovers are removed last
        elif (folder / "out").exists():  # the complete new folder, or the previous one
            out = {name: data for name, data in found.items() if name.startswith("out")}
            assert out.items() <= after.items() or out.items() <= before.items()
        else:
            with pytest.raises(OSError, match="out"):
                AutoModelForCausalLM.from_pretrained(folder / "out", local_files_only=True)
        again = forks.run(step.command, folder)
        assert again.code == 0, again.stderr
        assert content(folder) == after
    assert died >= max(1, kills // 10)  # the others were killed too late, since run times vary
