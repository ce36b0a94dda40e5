"""docs/transcript.md shows what the commands print today, but for figures, which differ by machine."""

import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.slow
FRAME = re.compile("[━─│┃┏┓┗┛┡┩┠┨┯┷┿╇╈┳┻╋┼├┤┬┴└┘┌┐╭╮╰╯╸╺]")


def words_of(text: str) -> str:
    """Return the words in their order, with `#` for each number, without the lines of tables."""
    return " ".join(re.sub(r"[+-]?\d[\d,.:]*(e-\d+)?", "#", FRAME.sub(" ", text)).split())


def test_the_transcript_is_up_to_date(tmp_path):
    made = tmp_path / "made.md"
    subprocess.run([sys.executable, ROOT / "scripts" / "transcript.py", "--output", made], check=True)
    kept = (ROOT / "docs" / "transcript.md").read_text("utf-8")
    assert words_of(made.read_text("utf-8")) == words_of(kept), "run python scripts/transcript.py"
    assert max(map(len, kept.split("```")[1].splitlines())) <= 80
