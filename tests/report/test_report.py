"""`a3 report`: the content of the page, and that a browser renders it without the network."""

import json
import re
import shutil
import subprocess
import sys
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import ROOT, refused
from tests.helpers.evaluation import EVALUATION

pytestmark = pytest.mark.usefixtures("hasty")

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
SECTIONS = ("summary", "warnings", "changes", "measured", "curves", "map", "rope", "distance", "layers", "provenance")


class Page(HTMLParser):
    """Ids, text, and everything that could access the network."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.ids, self.outside, self.texts = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if (name in ("src", "href") and value != "data:,") or tag in ("script", "iframe", "object"):
                self.outside.append((tag, name, value))

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


@pytest.fixture
def evaluation(tmp_path) -> Path:
    path = tmp_path / "eval.json"
    path.write_text(json.dumps(EVALUATION))
    return path


@pytest.fixture
def out(a3, work, tmp_path) -> Path:
    budgets = ("--attention-budget", 0.25, "--mlp-budget", 0.25, "--shape", "per-layer")
    options = (*budgets, "--head-multiple", 2, "--mlp-multiple", 8, "--overwrite")
    assert a3("solve", *options, "--work", work).code == 0
    assert a3("export", tmp_path / "out", "--work", work).code == 0
    return tmp_path / "out"


@pytest.fixture
def page(a3, out, evaluation, tmp_path) -> Path:
    assert a3("report", out, "--html", tmp_path / "report.html", "--eval", evaluation).code == 0
    return tmp_path / "report.html"


def test_everything_is_in_one_page(page, out):
    html = page.read_text("utf-8")
    found = Page(html)
    manifest = json.loads((out / "a3_manifest.json").read_text())
    assert set(SECTIONS) <= set(found.ids)
    assert found.outside == []
    assert "url(" not in html
    assert "@import" not in html
    for size in manifest["solution"]["sizes"]:
        assert f"{size['mlp']}" in found.text
    for words in ("12.50", "10.00", "+25.0%", "0.0321", "87.5%", "out.txt, blocks of 64", "fewer than 10"):
        assert words in found.text
    for digest in (*manifest["files"].values(), manifest["solution"]["sha256"], manifest["calibration"]["sha256"]):
        assert digest in html
    for command in (
        "a3 calibrate source --dataset",
        "a3 solve --attention-budget 0.25",
        "--shape per-layer",
        "a3 export OUT",
    ):
        assert command in found.text
    curves = manifest["solution"]["per_layer"]
    assert html.count('class="line') == 3 * len(curves) + len(curves) + 1
    assert html.count('class="dot"') == 3 * len(curves)


@pytest.mark.parametrize("stage", ["calibrated", "solved"])
def test_a_work_folder(stage, a3, work, tmp_path):
    if stage == "calibrated":
        shutil.rmtree(work / "solution")
    outcome = a3("report", work, "--html", tmp_path / "report.html", "--json")
    assert outcome.json["html"] == str(tmp_path / "report.html")
    found = Page((tmp_path / "report.html").read_text("utf-8"))
    assert ("curves" in found.ids) == (stage == "solved")
    assert {"text", "layers", "provenance"} <= set(found.ids)
    assert a3("report", work, "--html", tmp_path / "again.html", "--quiet").code == 0
    assert (tmp_path / "again.html").read_bytes() == (tmp_path / "report.html").read_bytes()


def test_several_data_sets_and_gates(a3, out, tmp_path):
    sets = [{**EVALUATION, "gates": [{"gate": "kl > 0.01", "failed": True, "value": 0.0321, "limit": 0.01}]}]
    (tmp_path / "eval.json").write_text(json.dumps({"datasets": [*sets, {**EVALUATION, "dataset": "other.txt"}]}))
    assert a3("report", out, "--html", tmp_path / "r.html", "--eval", tmp_path / "eval.json").code == 0
    text = Page((tmp_path / "r.html").read_text("utf-8")).text
    assert "fails if kl > 0.01 failed" in text
    assert "other.txt" in text


def test_figures_of_the_export_itself(a3, work, evaluation, tmp_path):
    """The report shows the figures given to a3 export, unless a3 report is given others."""
    assert a3("export", tmp_path / "out", "--eval", evaluation, "--work", work).code == 0
    assert a3("report", tmp_path / "out", "--html", tmp_path / "r.html").code == 0
    found = Page((tmp_path / "r.html").read_text("utf-8"))
    assert "measured" in found.ids
    for words in ("12.50", "10.00", "+25.0%", "0.0321", "87.5%"):
        assert words in found.text
    evaluation.write_text(json.dumps({**EVALUATION, "kl": 0.0654}))
    assert a3("report", tmp_path / "out", "--html", tmp_path / "r.html", "--eval", evaluation).code == 0
    text = Page((tmp_path / "r.html").read_text("utf-8")).text
    assert "0.0654" in text
    assert "0.0321" not in text


def test_figures_of_a_recipes_work_folder(a3, work, source, text_file, tmp_path):
    """The report shows them as long as they belong to the current solution."""
    text = {"dataset": str(text_file), "samples": 2, "seq_len": 32}
    recipe = {
        "work": str(work),
        "out": str(tmp_path / "out"),
        "calibrate": {"model": str(source), "text": {**text, "samples": 3}},
        "solve": {"budget": 0.25, "head_multiple": 2, "mlp_multiple": 8},
        "eval": {"against": str(source), "text": text},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    found = a3("run", tmp_path / "recipe.yaml", "--json").json["eval"]
    shown = a3("report", work, "--html", tmp_path / "r.html", "--json").json
    assert [each["kl"] for each in shown["measured"]] == [found["kl"]]
    page = Page((tmp_path / "r.html").read_text("utf-8"))
    assert "measured" in page.ids
    assert f"{found['kl']:.4f}" in page.text
    assert f"{found['perplexity']:,.2f}" in page.text
    again = ("--budget", 0.3, "--head-multiple", 2, "--mlp-multiple", 8, "--overwrite")
    assert a3("solve", *again, "--work", work).code == 0
    assert a3("report", work, "--html", tmp_path / "r.html", "--json").json["measured"] == []


def test_names_are_escaped(a3, checkpoint, text_file, tmp_path):
    name = "<script>alert(1)</script>\x1b[31m\u202e\n&"
    source = Path(shutil.copytree(checkpoint("llama-gqa"), tmp_path / name.replace("/", "")))
    text = tmp_path / "<b>text\x07.txt"
    text.write_bytes(text_file.read_bytes())
    work = ("--work", tmp_path / "work")
    assert a3("calibrate", source, "--dataset", text, "--samples", 2, "--seq-len", 32, *work).code == 0
    outcome = a3("inspect", tmp_path / "work")
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202e]", outcome.stdout)
    assert a3("report", tmp_path / "work", "--html", tmp_path / "r.html").code == 0
    html = (tmp_path / "r.html").read_text("utf-8")
    assert "<script" not in html
    assert "<b>text" not in html
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202e]", html)
    assert r"\x1b[31m" in html


def test_bad_places_and_evaluations(a3, work, tmp_path):
    refused(a3("report", work), "--html FILE")
    refused(a3("report", work, "--html", tmp_path / "no" / "r.html"), "no folder")
    refused(a3("report", work, "--html", tmp_path), "is a folder")
    refused(a3("report", tmp_path / "nothing", "--html", tmp_path / "r.html"), "nothing", "neither")
    for content in (
        "{}",
        "[]",
        "{",
        '{"datasets": [{"dataset": "x"}]}',
        json.dumps({**EVALUATION, "perplexity": "low"}),
    ):
        (tmp_path / "eval.json").write_text(content)
        refused(a3("report", work, "--html", tmp_path / "r.html", "--eval", tmp_path / "eval.json"), "eval.json")
    assert not (tmp_path / "r.html").exists()


def test_the_template_is_in_the_wheel(tmp_path):
    """The wheel is built by `pip wheel`, without the network."""
    command = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path / 'wheel')!r})"
    tree = tmp_path / "tree"
    tree.mkdir()
    (tmp_path / "wheel").mkdir()
    shutil.copytree(ROOT / "a3cli", tree / "a3cli", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    subprocess.run([sys.executable, "-c", command], cwd=tree, check=True, capture_output=True)
    (wheel,) = (tmp_path / "wheel").glob("*.whl")
    assert "a3cli/report/templates/report.html" in zipfile.ZipFile(wheel).namelist()


def browse(page: Path, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    flags = (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
        f"--user-data-dir={folder / 'profile'}",
    )  # fmt: skip
    return subprocess.run(
        [CHROMIUM, *flags, *options, page.as_uri()], check=True, capture_output=True, text=True, timeout=120
    )


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path (Debian: apt-get install chromium)")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_it(width, page, tmp_path):
    colours = {}
    for scheme, number in (("dark", 0), ("light", 1)):
        shot = tmp_path / f"{scheme}.png"
        options = (
            f"--window-size={width},1400",
            f"--screenshot={shot}",
            f"--blink-settings=preferredColorScheme={number}",
        )
        outcome = browse(page, tmp_path, *options)
        assert "CONSOLE" not in outcome.stderr, outcome.stderr
        with Image.open(shot) as picture:
            found = picture.convert("RGB")
            assert found.size == (width, 1400)
            assert len(found.getcolors(1 << 24)) > 100  # text and charts, not a blank page
            colours[scheme] = sum(found.getpixel((2, 2)))
    assert colours["dark"] < 200 < 600 < colours["light"]
    dom = browse(page, tmp_path, f"--window-size={width},1400", "--dump-dom").stdout
    assert set(SECTIONS) <= set(Page(dom).ids)
