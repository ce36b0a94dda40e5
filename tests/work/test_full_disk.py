"""A file system that is really full: a tmpfs in its own namespace, enlarged until each stage has finished.

This file is also the script that runs in the namespace.
"""

import json
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, SOLVE, snapshot

NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount")
STEP = 24 << 10  # bytes added after each failure
STAGES = {
    "calibrate": ("calibrate", "../source", "--dataset", "../text.txt", "--samples", 4, "--seq-len", 40),
    "solve": (*SOLVE, "--num-processes", 1),
    "export": ("export", "out", "--max-shard-size", "30KB"),
}
COMMON = ("--work", "work", "--quiet")


def command_line(*arguments: object) -> tuple[int, str]:
    """Run the command in this process; return its exit code and its error."""
    from a3cli.cli.app import main

    sys.argv = ["a3", *map(str, arguments)]
    said = StringIO()
    with redirect_stdout(StringIO()), redirect_stderr(said):
        try:
            main()
        except SystemExit as stop:
            return int(stop.code or 0), said.getvalue()
    return 0, said.getvalue()


def mount(options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", Path.cwd()], check=True)


def bytes_used() -> int:
    found = os.statvfs(".")
    return (found.f_blocks - found.f_bfree) * found.f_frsize


def whole_files() -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in Path().rglob("[!.t]*.safetensors")}


def run_until_done(*command: object) -> list[dict[str, Any]]:
    """Return, for each run that found the disk full: exit code, error, and the tensor files that exist now."""
    failed: list[dict[str, Any]] = []
    size = bytes_used()
    while True:
        size += STEP
        mount(f"remount,size={size}")
        code, said = command_line(*command)
        if code == 0:
            return failed
        failed.append({"code": code, "said": said, "files": whole_files()})


def main() -> None:
    """Run all stages in the folder `full`, then copy their files to where the test can see them."""
    os.chdir("full")
    mount(f"size={STEP}")
    os.chdir(Path.cwd())  # into the mounted file system
    shutil.disk_usage = lambda path: shutil._ntuple_diskusage(1 << 40, 0, 1 << 40)  # hides the full disk from the check
    failed = {stage: run_until_done(*command, *COMMON) for stage, command in STAGES.items()}
    shutil.copytree(".", "../copy")
    Path("../failed.json").write_text(json.dumps(failed))


@pytest.mark.slow
def test_each_stage_goes_on_when_there_is_room_again(a3, checkpoint, text_file, tmp_path, monkeypatch):
    for folder in ("full", "plain"):
        (tmp_path / folder).mkdir()
    try:
        subprocess.run([*NAMESPACE, "mount", "-t", "tmpfs", "tmpfs", tmp_path / "full"], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no tmpfs can be mounted in a user namespace here: {error}")
    shutil.copytree(checkpoint("llama-gqa", num_hidden_layers=4, max_shard_size="40KB"), tmp_path / "source")
    shutil.copyfile(text_file, tmp_path / "text.txt")
    root = ROOT
    script = [*NAMESPACE, sys.executable, "-m", "tests.work.test_full_disk"]
    subprocess.run(script, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(root)}, check=True)
    monkeypatch.chdir(tmp_path / "plain")
    for stage, failed in json.loads((tmp_path / "failed.json").read_text()).items():
        check_failures(failed, "full/out" if stage == "export" else "work/")
        assert a3(*STAGES[stage], *COMMON).code == 0
    assert snapshot(tmp_path / "copy") == snapshot(tmp_path / "plain")


def check_failures(failed: list[dict[str, Any]], place: str) -> None:
    """Each error is one line that names the place; the next run keeps finished files, all but the one in progress."""
    assert len(failed) > 3
    for each in failed:
        assert each["code"] == 2, each
        (line,) = each["said"].splitlines()
        assert line.startswith("error: ")
        assert "cannot be written: " in line
        assert "No space left on device" in line
        assert place in line.replace(".out", "out")
    assert len({len(each["files"]) for each in failed}) > 3  # in the middle of the stage
    for earlier, later in pairwise(each["files"] for each in failed):
        assert len([name for name, written in earlier.items() if later.get(name) != written]) <= 1


if __name__ == "__main__":
    main()
