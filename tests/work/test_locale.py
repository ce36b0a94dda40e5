"""Names with umlauts in an ASCII locale: the commands, the processes that they start, and their output."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from a3cli.errors import A3Error
from a3cli.work.processes import ERROR_FOLDER, hand_over, raise_first
from tests.conftest import SHORT

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.fixture
def place(prepared, text_file, tmp_path) -> Path:
    """Return a folder with the source, its work folder and text."""
    folder = tmp_path / "Größen"
    shutil.copytree(prepared / "source", folder / "source")
    shutil.copytree(prepared / "work", folder / "work")
    shutil.copy(text_file, folder / "Sätze.txt")
    return folder


def in_ascii(*arguments: object, program: tuple[str, ...] = ("-m", "a3cli"), **environment: str):
    return subprocess.run(
        [sys.executable, *program, *map(str, arguments)],
        env={**os.environ, **ASCII, **environment},
        capture_output=True,
        check=False,
    )


@pytest.mark.slow
def test_calibrate_in_an_ascii_locale(place):
    """The tokenizers library accepts only UTF-8 names."""
    work = ("--work", place / "work")
    calibrated = in_ascii("calibrate", place / "source", "--dataset", place / "Sätze.txt", *SHORT, *work, "--overwrite")
    assert calibrated.returncode == 0, calibrated.stderr


@pytest.mark.slow
def test_verify_in_an_ascii_locale(a3, place):
    work = ("--work", place / "work")
    assert a3("calibrate", place / "source", "--dataset", place / "Sätze.txt", *SHORT, *work).code == 0
    assert a3("export", place / "out", *work).code == 0
    verified = in_ascii("verify", place / "out", *work, "--require-reference")
    assert verified.returncode == 0, verified.stdout + verified.stderr
    # Without the restart in UTF-8 mode the checking process still finds the export.
    itself = ("-c", "from a3cli.cli.app import main; main()")
    verified = in_ascii("verify", place / "out", "--work", place, "--json", program=itself)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    outcomes = {check["name"]: check["outcome"] for check in json.loads(verified.stdout)["checks"]}
    assert outcomes.pop("reference") == "skipped"
    assert set(outcomes.values()) == {"passed"}


def test_an_error_in_an_ascii_locale(tmp_path):
    missing = in_ascii("plan", tmp_path / "Größen")
    assert missing.returncode == 2
    assert missing.stderr.decode("utf-8").startswith(f"error: model '{tmp_path / 'Größen'}': no such folder")


def test_output_in_an_encoding_that_lacks_umlauts(a3, place, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="ascii", write_through=True))
    assert a3("inspect", place / "work").code == 0
    assert r"Gr\xf6\xdfen/work: solved" in written.getvalue().decode("ascii")


def test_an_error_with_a_name_that_is_no_utf8_is_handed_over(tmp_path, monkeypatch):
    name = os.fsdecode(b"caf\xe9.txt")
    for key, value in {ERROR_FOLDER: str(tmp_path), "RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(key, value)
    assert hand_over(f"{name} is missing")
    with pytest.raises(A3Error) as raised:
        raise_first({0: 2}, tmp_path)
    assert str(raised.value) == f"{name} is missing"
