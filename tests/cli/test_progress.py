"""Every step that takes long says what it does, how far it is and how long it will take; short ones say nothing."""

import io
import logging
import re
import shutil
import time
from contextlib import suppress
from itertools import pairwise

import pytest
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from a3cli.cli import progress as shown
from a3cli.cli.console import set_up_logging
from a3cli.cli.progress import SweepProgress, sweep_progress
from a3cli.work.processes import spread
from a3cli.work.progress import advance, portion, reporting
from tests.conftest import SHORT, SOLVE

pytestmark = pytest.mark.usefixtures("hasty")


class Clock:
    """A clock that stands still until it is told to go on, and then ticks as the real one does."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.progress: SweepProgress | None = None

    def __call__(self) -> float:
        return self.now

    def go_on(self, seconds: int) -> None:
        for _ in range(seconds):
            self.now += 1
            if self.progress is not None:
                self.progress.tick()


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def lines(clock):
    """Log lines with the time of each."""
    found: list[tuple[float, str]] = []

    class Keeping(logging.Handler):
        def emit(self, record):
            found.append((clock.now, record.getMessage()))

    set_up_logging()
    log = logging.getLogger("a3cli")
    log.handlers = [Keeping()]
    return found


def without_terminal(clock) -> SweepProgress:
    clock.progress = SweepProgress(None, clock)
    return clock.progress


def test_a_long_step_has_lines_at_most_every_ten_seconds(clock, lines):
    with reporting(without_terminal(clock), "analysing", 32, "layers") as finished:
        for _ in range(32):
            clock.go_on(4)
            finished()
    times = [at for at, _ in lines]
    assert len(lines) > 8
    assert all(10 <= later - earlier <= 13 for earlier, later in pairwise(times))
    assert lines[1][1] == "analysing: 5 of 32 layers, 108 s left"
    clock.go_on(100)
    assert len(times) == len(lines), "it has ended"


@pytest.mark.parametrize("total", [1, 5])
def test_a_step_that_reports_nothing_has_a_line_every_thirty_seconds(total, clock, lines):
    with reporting(without_terminal(clock), "loading model", total, "layers" if total > 1 else ""):
        clock.go_on(200)
    times = [1000, *(at for at, _ in lines)]
    assert all(later - earlier <= 30 for earlier, later in pairwise(times))
    assert len(lines) == 7
    assert lines[1][1] == ("loading model: 40 s so far" if total == 1 else "loading model: 0 of 5 layers, 40 s so far")
    assert "3 min so far" in lines[-1][1]


def test_a_silent_sweep_has_lines_too(clock, lines):
    progress = without_terminal(clock)
    progress(layer=0, layers=2, tokens=0, total_tokens=8)
    clock.go_on(31)
    assert [line for _, line in lines] == ["layer 1 of 2: 0/8 tokens, 30 s so far"]
    progress(layer=0, layers=2, tokens=8, total_tokens=8)
    assert lines[-1][1] == "layer 1 of 2: 8/8 tokens, 31 s left"
    progress(layer=1, layers=2, tokens=8, total_tokens=8)
    clock.go_on(60)
    assert len(lines) == 3


def test_short_steps_show_nothing(clock, lines):
    progress = without_terminal(clock)
    for number in range(40):
        with reporting(progress, f"step {number}", 4, "files") as finished:
            for _ in range(2):
                finished()
                clock.go_on(1)
    assert lines == []


def test_the_innermost_step_is_shown(clock, lines):
    progress = without_terminal(clock)
    with reporting(progress, "points", 4, "points"):
        with reporting(progress, "evaluating", 7, "blocks") as finished:
            finished()
            clock.go_on(15)
        clock.go_on(30)
    assert [line.split(":")[0] for _, line in lines] == ["evaluating", "points"]


def test_bytes_have_units_and_a_failure_ends_its_step(clock, lines):
    progress = without_terminal(clock)

    def fail():
        with reporting(progress, "writing", 10**10, "bytes") as written:
            clock.go_on(5)
            written(25 * 10**8)
            clock.go_on(10)
            raise ValueError("full")

    with pytest.raises(ValueError, match="full"):
        fail()
    assert [line for _, line in lines] == ["writing: 2.5 GB of 10 GB, 30 s left"]
    clock.go_on(100)
    assert len(lines) == 1


def test_layers_in_threads_report_as_they_finish():
    reported = []
    with reporting(lambda **at: reported.append(at["done"]), "projecting", 20, "layers") as finished:
        list(spread(lambda _: finished(), range(20), 4))
    assert reported == [*range(20), 19, 20]


def test_a_bar_shows_a_step_that_has_lasted(clock):
    """It is drawn by the tick of a step that says nothing, and gone when the step has ended."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[speed]}"))
    bar = Progress(*columns, console=console, auto_refresh=False)
    clock.progress = SweepProgress(bar, clock)
    with bar, reporting(clock.progress, "analysing", 32, "layers") as finished:
        finished()
        clock.go_on(2)
        assert bar.tasks == []
        clock.go_on(2)
        finished(3)
        bar.refresh()
        (task,) = bar.tasks
        assert (task.completed, task.total) == (4, 32)
    assert "analysing" in out.getvalue()
    assert "4 of 32 layers" in out.getvalue()
    assert bar.tasks == []


def test_a_bar_without_a_total_moves(clock):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100)
    bar = Progress(TextColumn("{task.description} {task.fields[speed]}"), console=console, auto_refresh=False)
    clock.progress = SweepProgress(bar, clock)
    with bar, reporting(clock.progress, "reading", None, "tokens") as read:
        clock.go_on(4)
        read(131072)
        bar.refresh()
        (task,) = bar.tasks
        assert (task.completed, task.total) == (131072, None)
    assert "reading 131,072 tokens" in out.getvalue()
    assert bar.tasks == []


@pytest.fixture
def long_text(text_file, tmp_path):
    path = tmp_path / "long.txt"
    path.write_text(8 * text_file.read_text("utf-8"), "utf-8")
    return path


@pytest.fixture
def slow_tokenizer(clock, monkeypatch):
    """Each call of a tokenizer takes 20 seconds, as of a model with a slow one."""
    from a3cli.text import tokenizer

    def load(folder, **options):
        loaded = tokenizer.load_tokenizer(folder, **options)

        def encode(text, **options):
            clock.go_on(20)
            return loaded(text, **options)

        return encode

    for stage in ("calibrate", "evaluate"):
        monkeypatch.setattr(f"a3cli.stages.{stage}.load_tokenizer", load)


def silences(lines) -> list[float]:
    times = [1000.0, *(at for at, _ in lines)]
    return [later - earlier for earlier, later in pairwise(times)]


@pytest.mark.usefixtures("slow_tokenizer")
def test_calibrate_says_how_much_text_it_has_read(clock, lines, checkpoint, long_text, tmp_path, monkeypatch):
    """The blocks are chosen from eight times as many tokens as they have."""
    from a3cli.settings import CalibrateSettings
    from a3cli.stages.calibrate import calibrate
    from a3cli.work.folder import Work

    monkeypatch.setattr("a3cli.stages.calibrate.Sweep.run", lambda *_: 1 / 0)  # the text has been read
    text = {"dataset": str(long_text), "samples": 500, "seq_len": 64}
    settings = CalibrateSettings(model=str(checkpoint("llama-gqa")), text=text, device="cpu")
    progress = without_terminal(clock)
    with pytest.raises(ZeroDivisionError):
        calibrate(settings, Work(tmp_path / "work"), overwrite=False, progress=progress)
    found = [line for _, line in lines if line.startswith("reading the calibration text: ")]
    assert len(found) >= 3
    counts = [int(re.search(r": ([\d,]+) of 256,000 tokens, ", line)[1].replace(",", "")) for line in found]
    assert counts == sorted(counts)
    assert counts[-1] > 65536
    assert found[-1].endswith(" left")
    assert max(silences(lines)) <= 30
    assert progress.steps == {}


@pytest.mark.usefixtures("slow_tokenizer")
def test_eval_says_how_much_text_it_has_read(clock, lines, checkpoint, long_text):
    """Of a text that is read whole, it cannot say how much is left."""
    from a3cli.models.checkpoint import resolve_model
    from a3cli.settings import TextSettings
    from a3cli.stages import evaluate

    opened = resolve_model(str(checkpoint("llama-gqa")))
    tokenizer = evaluate.load_tokenizer(opened.folder)
    whole = TextSettings(dataset=str(long_text), samples=None, seq_len=64)
    blocks, _ = evaluate.read_blocks(whole, tokenizer, opened, without_terminal(clock))
    assert sum(map(len, blocks)) > 200_000
    assert re.fullmatch(rf"reading long\.txt: {sum(map(len, blocks)):,} tokens, \d+ s so far", lines[-1][1])
    assert max(silences(lines)) <= 30
    lines.clear()
    part = whole.model_copy(update={"samples": 3000})
    blocks, _ = evaluate.read_blocks(part, tokenizer, opened, without_terminal(clock))
    assert sum(map(len, blocks)) == 192_000
    assert re.fullmatch(r"reading long\.txt: [\d,]+ of 192,000 tokens, \d+ s left", lines[-1][1])


@pytest.fixture
def all_is_long(monkeypatch):
    """Each report of each step is shown."""
    monkeypatch.setattr(shown, "SHOWN_AFTER", 0.0)
    monkeypatch.setattr(shown, "LINE_EVERY", 0.0)


@pytest.mark.usefixtures("all_is_long")
def test_every_stage_says_what_it_does(a3, work, source, text_file, tmp_path):
    """Each line has how far the step is and how long it takes; with --quiet there is none."""
    out, text = tmp_path / "out", ("--dataset", text_file, "--samples", 3, "--seq-len", 32)
    points = ("pareto", "--budgets", "0.2", "--head-multiple", 2, "--mlp-multiple", 8, "--work", work, *text)
    expected = {
        (*SOLVE, "--overwrite", "--work", work): ("checking the statistics: 1 of 3 files", "analysing", "projecting"),
        ("export", out, "--overwrite", "--work", work): ("checking the solution", "writing weights"),
        ("verify", out, "--work", work): ("checking out", "computing the reference: 3 of 4 layers"),
        ("eval", out, "--against", source, *text): ("loading source", "evaluating out on text.txt: 2 of 3 blocks"),
        points: ("points of paper", "analysing", "writing weights", "evaluating export on text.txt"),
    }
    a3("export", out, "--work", work)
    for command, steps in expected.items():
        outcome = a3(*command)
        assert outcome.code == 0, outcome
        for step in steps:
            assert re.search(rf"^{step}.* (left|so far)$", outcome.stderr, re.M), (step, outcome.stderr)
        assert a3(*command, "--quiet").stderr == ""


@pytest.mark.usefixtures("all_is_long")
def test_a_streamed_model_says_how_many_layers_it_has_run(a3, source, text_file, monkeypatch):
    monkeypatch.setattr("a3cli.stages.answers.available_memory", lambda machine, settings: 0)
    outcome = a3("eval", source, "--dataset", text_file, *SHORT)
    assert outcome.code == 0, outcome
    assert "running source: 1 of 2 layers" in outcome.stderr


def test_the_clock_ticks_by_itself(monkeypatch, capsys):
    """A step that reports nothing has lines, from a thread that ends with the stage."""
    for name, value in (("TICK", 0.01), ("SHOWN_AFTER", 0.01), ("LINE_EVERY", 0.01), ("SILENT_FOR", 0.05)):
        monkeypatch.setattr(shown, name, value)
    set_up_logging()
    printed = ""
    with sweep_progress(quiet=False) as progress, reporting(progress, "loading"):
        deadline = time.monotonic() + 30
        while printed.count("loading: ") < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
            printed += capsys.readouterr().err
    assert printed.count("loading: ") >= 2
    assert not [thread for thread in shown.threading.enumerate() if thread.name == "progress"]


def test_shares_of_a_part_add_up_to_it():
    """Whatever the parts within a layer report, the layer counts once; a part that fails is not counted to its end."""
    reported = []
    with reporting(lambda **at: reported.append(at["done"]), "predicting", 3, "layers") as finished:
        with portion(of=finished):
            for _ in range(3):
                with portion(1 / 3):
                    advance(0.25)
                    advance(5.0)
                advance(0.01)
        with portion(of=finished), suppress(ValueError), portion(0.5):
            advance(0.5)
            raise ValueError
        advance(1.0)  # outside of any part
    assert reported == sorted(reported)
    assert reported[0] == 0
    assert reported[1] == pytest.approx(1 / 12)
    assert reported[-3:] == [pytest.approx(1.25), 2, 3]
    assert 1 in reported


def test_parts_in_threads_do_not_mix():
    reported = []

    def layer(_):
        with portion(of=finished):
            for _ in range(10):
                advance(0.1)

    with reporting(lambda **at: reported.append(at["done"]), "projecting", 8, "layers") as finished:
        list(spread(layer, range(8), 4))
    assert reported == sorted(reported)
    assert reported[-1] == 8
    assert [each for each in reported if each == int(each)][-2:] == [7, 8]


def test_the_time_left_is_known_within_the_first_layer(clock, lines):
    with reporting(without_terminal(clock), "predicting losses", 4, "layers") as finished, portion(of=finished):
        for _ in range(4):
            clock.go_on(10)
            advance(0.25)
    found = [line for _, line in lines]
    assert found[:2] == [
        "predicting losses: 0 of 4 layers, 10 s so far",
        "predicting losses: 0 of 4 layers, 2 min left",
    ]
    assert max(silences(lines)) <= 12


def test_a_bar_moves_within_a_step_of_one_part(clock):
    bar = Progress(BarColumn(), TextColumn("{task.fields[speed]}"), console=Console(file=io.StringIO()))
    clock.progress = SweepProgress(bar, clock)
    with bar, reporting(clock.progress, "preparing RoPE slots") as finished, portion(of=finished):
        clock.go_on(4)
        (task,) = bar.tasks
        assert task.total is None
        advance(0.4)
        assert (task.completed, task.total) == (pytest.approx(0.4), 1)


@pytest.mark.parametrize("shape", ["stock", "per-layer"])
def test_every_long_step_of_solve_moves_within_a_layer(shape, work):
    """On a large model a layer takes minutes; the first to last report of a step ascend from 0 to its total."""
    from a3cli.settings import SolveSettings, make_settings
    from a3cli.stages.solve import solve
    from a3cli.work.folder import Work

    found: dict[str, list[float]] = {}

    def report(*, step, done, total, unit):
        found.setdefault(step, []).append(done / total)

    for kept in ("kept", "channels"):
        shutil.rmtree(work / kept)
    settings = make_settings(SolveSettings, kv_budget=0.25, budget=0.3, mlp_multiple=8, head_multiple=2, shape=shape)
    solve(settings, Work(work), overwrite=True, progress=report)
    inside = {"analysing": 20, "choosing sizes": 4, "predicting losses": 20, "preparing RoPE slots": 5, "projecting": 6}
    if shape == "stock":
        inside |= {"comparing RoPE slots": 4}
    for step, least in inside.items():
        shares = found[step]
        assert shares == sorted(shares), step
        assert (shares[0], shares[-1]) == (0, 1), step
        assert len(shares) >= least, step
    assert {"measuring the solution", "comparing logits"} <= found.keys()
