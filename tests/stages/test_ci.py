"""docs/ci.md: its shell block runs as printed, its workflow's commands exist, and the exit codes are correct."""

import json
import os
import re
import shlex
import subprocess
import sys
from xml.etree import ElementTree

import pytest
import yaml

from a3cli.errors import INTERNAL_ERROR, A3Error, CheckFailed, Interrupted
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "ci.md").read_text("utf-8")


def block(language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.M | re.S)
    return found


@pytest.fixture
def environment(tmp_path):
    """Return an environment with the demo model, its text, and an `a3` on the path."""
    subprocess.run([sys.executable, ROOT / "scripts" / "demo_text.py", tmp_path / "text"], check=True)
    command = tmp_path / "bin" / "a3"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m a3cli "$@"\n')
    command.chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{command.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "MODEL": str(ROOT / "demo" / "model"),
        "CALIBRATION": str(tmp_path / "text" / "calibration.txt"),
        "EVALUATION": str(tmp_path / "text" / "evaluation.txt"),
        "OTHER": str(tmp_path / "other.txt"),
        "SAMPLES": "16",
        "SEQ_LEN": "512",  # the whole context: no warning about longer distances
        "BUDGET": "0.1",
    }


@pytest.mark.slow
def test_the_shell_example_runs_as_it_stands(environment, tmp_path):
    other = (ROOT / "demo" / "text" / "evaluation.txt").read_text("utf-8")[-20_000:]  # stays the same
    (tmp_path / "other.txt").write_text(other, "utf-8")
    done = subprocess.run(
        ["/bin/sh", "-c", block("sh")],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads((tmp_path / "eval.json").read_text())
    assert [each["dataset"].rpartition("/")[2] for each in measured["datasets"]] == ["evaluation.txt", "other.txt"]
    assert all(not gate["failed"] for each in measured["datasets"] for gate in each["gates"])
    for report, tests in (("verify.xml", "11"), ("eval.xml", "6")):
        suite = ElementTree.parse(tmp_path / report).getroot().find("testsuite")
        assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == (tests, "0", "0")
    # This small model's sizes are coarse, and some runtimes do not load the result; nothing else is worth a line.
    expected = ["warning: --budget: 10 % were asked for, 16.7 %", "warning: not loaded by llama.cpp"]
    assert [line[: len(begin)] for line, begin in zip(done.stderr.splitlines(), expected, strict=True)] == expected
    assert "\x1b" not in done.stdout


@pytest.mark.parametrize(("codes", "expected"), [([3, 3, 0], 0), ([3, 70], 70), ([2], 2)])
def test_the_shell_example_goes_on_after_code_3_only(codes, expected, tmp_path):
    """Run it with an `a3` whose calibrate returns these codes in turn and whose other commands succeed."""
    command = tmp_path / "a3"
    (tmp_path / "codes").write_text("\n".join(map(str, codes)) + "\n")
    command.write_text(
        "#!/bin/sh\ntest $1 = calibrate || exit 0\ncode=$(head -n 1 codes)\nsed -i 1d codes\nexit $code\n"
    )
    command.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["/bin/sh", "-c", block("sh")], cwd=tmp_path, env=environment, timeout=30, check=False)
    assert done.returncode == expected
    assert (tmp_path / "codes").read_text() == ""


def test_every_command_of_the_page_exists_with_its_options(command_line):
    workflow = yaml.safe_load(block("yaml"))
    steps = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    shell = block("sh").replace("\\\n", " ").splitlines()
    commands = [line.removeprefix("until ").strip() for line in [*steps, *shell]]
    used = [shlex.split(line) for line in commands if line.startswith("a3 ")]
    assert {words[1] for words in used} == {"calibrate", "solve", "export", "verify", "eval"}
    assert len(used) == 10
    for _, command, *words in used:
        known = {option for parameter in command_line.commands[command].params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known


def test_the_workflow_keeps_what_a_failed_job_has_done():
    """`actions/cache` alone saves nothing of a job that ended with code 3, and never saves a key twice."""
    (job,) = yaml.safe_load(block("yaml"))["jobs"].values()
    uses = {step["uses"].partition("@")[0]: step for step in job["steps"] if "uses" in step}
    assert "actions/cache" not in uses
    restore, save = uses["actions/cache/restore"], uses["actions/cache/save"]
    assert save["if"] == "always()"
    assert restore["with"]["path"] == save["with"]["path"] == "a3-work"
    assert restore["with"]["key"] == restore["with"]["restore-keys"] + "${{ github.run_attempt }}"
    assert save["with"]["key"] == f"${{{{ steps.{restore['id']}.outputs.cache-primary-key }}}}"
    order = [step.get("uses", step.get("run", "")) for step in job["steps"]]
    assert order.index(restore["uses"]) < order.index(save["uses"])


def test_the_workflow_names_files_that_ship():
    named = set(re.findall(r"\S+\.txt|demo/\S+", block("yaml")))
    assert named == {"demo/model", "demo/text/calibration.txt", "demo/text/evaluation.txt"}
    assert all((ROOT / name).exists() for name in named)


def test_exit_codes_are_those_of_the_table():
    table = dict(re.findall(r"^\| (\d+) \| ([^|]+) \|", PAGE, re.M))
    assert list(table) == ["0", "1", "2", "3", "70"]
    assert (CheckFailed.exit_code, A3Error.exit_code, Interrupted.exit_code, INTERNAL_ERROR) == (1, 2, 3, 70)
    readme = dict(re.findall(r"^\| (\d+) \| ([^|]+) \|", (ROOT / "README.md").read_text("utf-8"), re.M))
    assert list(readme) == list(table)
