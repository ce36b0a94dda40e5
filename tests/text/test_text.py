"""How text becomes blocks: where they are cut, what a row is, and that nothing is lost or counted twice."""

import json
import shutil
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from a3cli.errors import A3Error
from a3cli.settings import TextSettings
from a3cli.text.blocks import evaluation_blocks, places_between, sample_blocks
from a3cli.text.documents import TextRead, row_documents
from a3cli.text.identity import files_now
from a3cli.text.pool import LEAST, read_pool
from a3cli.text.sources import check_texts
from a3cli.text.stream import token_stream
from a3cli.work.files import hash_file
from tests.conftest import build_tokenizer, refused

TOKENIZER = build_tokenizer()


def text_settings(path, **options):
    return TextSettings(**{"dataset": str(path), "samples": 4, "seq_len": 8, **options})


def tokens_of(string: str) -> list[int]:
    return TOKENIZER(string)["input_ids"]


@given(extra=st.integers(0, 40), samples=st.integers(1, 5), seq_len=st.integers(2, 9), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_blocks_are_disjoint_runs_of_the_stream(tmp_path_factory, extra, samples, seq_len, seed):
    path = tmp_path_factory.mktemp("t") / "t.txt"
    # 256 different characters in a row: the first token identifies a run
    stream = "".join(chr(0x100 + i) for i in range(0, (samples * seq_len + extra + 1) // 2 * 1))
    path.write_text(stream, "utf-8")
    all_tokens = tokens_of(stream)
    if len(all_tokens) < samples * seq_len:
        return
    wanted = text_settings(path, samples=samples, seq_len=seq_len, seed=seed)
    blocks = sample_blocks(TOKENIZER, wanted).blocks
    assert blocks.shape == (samples, seq_len)
    position = 0
    for block in blocks.tolist():
        while all_tokens[position : position + seq_len] != block:
            position += 1
            assert position <= len(all_tokens) - seq_len, "not a later run of the stream"
        position += seq_len


def test_every_placement_is_reached(tmp_path):
    """Two blocks of 3 in 8 tokens have 6 placements; over many seeds each of them occurs."""
    path = tmp_path / "t.txt"
    path.write_text("abcdefgh")
    placements = {
        tuple(sample_blocks(TOKENIZER, text_settings(path, samples=2, seq_len=3, seed=s)).blocks[:, 0].tolist())
        for s in range(100)
    }
    first = tokens_of("abcdefgh")
    assert placements == {(first[a], first[b]) for a in range(6) for b in range(a + 3, 6)}


@given(gaps=st.lists(st.integers(0, 20), min_size=1, max_size=8), length=st.integers(1, 6), most=st.integers(0, 9))
def test_what_is_held_out_lies_between_the_blocks(gaps, length, most):
    """As many as asked for, or as have room; none overlaps another or a block that is calibrated on."""
    starts = [sum(gaps[: i + 1]) + i * length for i in range(len(gaps) - 1)]
    end = sum(gaps) + length * len(starts)
    found = places_between(starts, length, end, most=most)
    assert len(found) == min(most, sum(gap // length for gap in gaps))
    taken = sorted([*starts, *found])
    assert all(after - before >= length for before, after in pairwise([*taken, end]))


def test_seed_decides(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("".join(chr(97 + i % 26) * (i % 7) for i in range(300)))
    one, again, other = (sample_blocks(TOKENIZER, text_settings(path, seed=seed)).blocks for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_too_little_text_says_how_many_blocks_there_are(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("x" * 20)
    with pytest.raises(A3Error, match=r"20 tokens give 2 blocks of 8, 4 were asked for"):
        sample_blocks(TOKENIZER, text_settings(path))


@given(length=st.integers(2, 60), seq_len=st.integers(2, 20))
@settings(max_examples=40, deadline=None)
def test_evaluation_blocks_hold_every_token_once(tmp_path_factory, length, seq_len):
    path = tmp_path_factory.mktemp("t") / "t.txt"
    path.write_text("ab" * (length // 2) + "c")
    blocks = evaluation_blocks(TOKENIZER, text_settings(path, samples=None, seq_len=seq_len))
    assert torch.cat(blocks).tolist() == tokens_of(path.read_text())
    assert all(len(block) == seq_len for block in blocks[:-1])


def write_rows(folder, rows, suffix):
    path = folder / f"rows{suffix}"
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_rows_are_joined_by_a_blank_line(tmp_path, suffix):
    path = write_rows(tmp_path, [{"body": "one"}, {"body": "two"}, {"body": "three"}], suffix)
    stream = list(token_stream(TOKENIZER, text_settings(path, text_field="body"), purpose="calibrate"))
    assert TOKENIZER.decode(stream) == "one\n\ntwo\n\nthree"


def test_a_folder_is_read_in_name_order(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    write_rows(tmp_path, [{"text": "third"}], ".jsonl")
    (tmp_path / "a.txt").write_text("first\nline")
    (tmp_path / "ignored.md").write_text("no")
    stream = list(token_stream(TOKENIZER, text_settings(tmp_path), purpose="calibrate"))
    assert TOKENIZER.decode(stream) == "first\nline\n\nsecond\n\nthird"


def test_chat_rows_go_through_the_template(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    path = write_rows(tmp_path, [{"messages": messages}], ".jsonl")
    stream = list(token_stream(tokenizer, text_settings(path, chat=True), purpose="calibrate"))
    assert tokenizer.decode(stream) == "<user>hi<assistant>ho"


def test_one_bos_at_the_very_beginning(tmp_path):
    class WithBos:
        def __call__(self, string, *, add_special_tokens, verbose):
            return {"input_ids": [1] * add_special_tokens + [len(string)]}

    path = tmp_path / "t.txt"
    path.write_text(("x" * 999 + "\n") * 3000)
    stream = list(token_stream(WithBos(), text_settings(path), purpose="calibrate"))
    assert stream[0] == 1
    assert 1 not in stream[1:]
    assert len(stream) > 2  # pieces of about one MiB


@pytest.mark.parametrize(
    ("dataset", "purpose", "expected"),
    [
        ("wikitext2", "calibrate", ("Salesforce/wikitext", {"name": "wikitext-2-raw-v1", "split": "train"})),
        ("wikitext2", "evaluate", ("Salesforce/wikitext", {"name": "wikitext-2-raw-v1", "split": "test"})),
        ("c4", "evaluate", ("allenai/c4", {"name": "en", "split": "validation"})),
        ("owner/set:part", "calibrate", ("owner/set", {"name": "part", "split": "train"})),
        ("owner/set", "evaluate", ("owner/set", {"name": None, "split": "test"})),
    ],
)
def test_hub_sets_are_streamed_and_read_no_further_than_needed(monkeypatch, dataset, purpose, expected):
    """Check the arguments to `datasets`, and that rows beyond the pool are never read."""
    import datasets

    asked, pulled = [], []

    def load_dataset(path, **options):
        asked.append((path, {key: value for key, value in options.items() if key != "streaming"}))
        assert options["streaming"] is True

        def generate():
            for i in range(10**9):
                pulled.append(i)
                yield {"text": "y" * 100_000}

        return generate()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    wanted = text_settings(dataset, samples=4, seq_len=512)
    if purpose == "calibrate":
        sample_blocks(TOKENIZER, wanted)
    else:
        evaluation_blocks(TOKENIZER, wanted)
    assert asked == [expected]
    assert len(pulled) <= 12  # one piece of one MiB


CHATS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def chat_tokenizer():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = CHATS
    return tokenizer


def read_all(tokenizer, path, **options):
    """Return the whole text, and the record of what was read."""
    read = TextRead()
    stream = list(token_stream(tokenizer, text_settings(path, **options), purpose="calibrate", read=read))
    return tokenizer.decode(stream), read


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_rows_without_text_are_skipped_and_counted(tmp_path, suffix):
    rows = [{"text": value} for value in (None, "one", "", " \n", "two", None)]
    found, read = read_all(TOKENIZER, write_rows(tmp_path, rows, suffix))
    assert found == "one\n\ntwo"
    assert read.describe() == {"rows": 6, "skipped": 4, "whole": True}


def test_a_set_without_any_text_is_an_error(tmp_path):
    path = write_rows(tmp_path, [{"text": None}, {"text": "\t"}], ".jsonl")
    with pytest.raises(A3Error, match="all of its 2 rows are without text"):
        read_all(TOKENIZER, path)
    (tmp_path / "a.txt").write_text("some")
    assert read_all(TOKENIZER, tmp_path)[0] == "some"


def test_empty_lines_of_wikitext_stay_as_the_papers_have_them(monkeypatch):
    """Its rows are lines: without the empty ones, perplexities could not be compared with published ones."""
    import datasets

    lines = [{"text": line} for line in ("", " = A = \n", "", "word\n", None)]
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **options: lines)
    found, read = read_all(TOKENIZER, "wikitext2")
    assert found == "\n\n".join(["", " = A = \n", "", "word\n"])
    assert read.skipped == 1
    assert read_all(TOKENIZER, "owner/other")[0] == " = A = \n\n\nword\n"


TALK = [{"from": "system", "value": "be"}, {"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("rows", "options", "expected"),
    [
        ([{"conversations": TALK}], {}, "<system>be<user>hi<assistant>ho"),
        ([{"messages": MESSAGES}, {"messages": []}, {"messages": None}], {}, "<user>hi"),
        ([{"messages": MESSAGES}, {"conversations": TALK[1:]}], {}, "<user>hi\n\n<user>hi<assistant>ho"),
        ([{"dialog": MESSAGES, "messages": TALK}], {"text_field": "dialog"}, "<user>hi"),
    ],
)
def test_chats_of_both_kinds_are_rendered(tmp_path, rows, options, expected):
    found, read = read_all(chat_tokenizer(), write_rows(tmp_path, rows, ".jsonl"), chat=True, **options)
    assert found == expected
    assert read.rows - read.skipped == expected.count("\n\n") + 1


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"conversations": [TALK[0], {"from": "tool", "value": "x"}]}, "row 2, turn 2: unknown speaker 'tool'"),
        ({"conversations": [{"from": "human", "value": None}]}, "row 2, turn 1: has neither role and content"),
        ({"conversations": ["hi"]}, "row 2: the messages are not a list of turns"),
    ],
)
def test_chats_that_cannot_be_rendered_name_the_row(tmp_path, row, said):
    rows = row_documents([{"conversations": TALK}, row], chat_tokenizer(), text_settings("rows", chat=True), TextRead())
    assert next(rows)
    with pytest.raises(A3Error, match=said):
        next(rows)


def test_chat_needs_messages_and_a_template(tmp_path):
    path = write_rows(tmp_path, [{"text": "x"}], ".jsonl")
    with pytest.raises(A3Error, match="no field 'messages' or 'conversations' for --chat; its fields are text"):
        read_all(chat_tokenizer(), path, chat=True)
    path = write_rows(tmp_path, [{"conversations": TALK}], ".jsonl")
    with pytest.raises(A3Error, match="row 1: the model's tokenizer has no chat template"):
        read_all(TOKENIZER, path, chat=True)
    with pytest.raises(A3Error, match=r"--chat reads its 'conversations'"):
        read_all(TOKENIZER, path, text_field="body")
    with pytest.raises(A3Error, match=r"holds a list, not text \(--chat reads messages\)"):
        read_all(TOKENIZER, path, text_field="conversations")


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"conversations": TALK}], "<system>be<user>hi<assistant>ho"),
        ([{"messages": MESSAGES, "id": 1}, {"messages": None, "id": 2}], "<user>hi"),
        ([{"messages": MESSAGES, "text": "plain"}], "plain"),  # the text field comes first
        ([{"messages": MESSAGES, "text": None}, {"messages": None, "text": "plain"}], "plain"),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_chats_are_recognised(tmp_path, rows, expected, suffix):
    assert read_all(chat_tokenizer(), write_rows(tmp_path, rows, suffix))[0] == expected


def test_each_file_of_a_folder_is_recognised_by_itself(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("one")
    write_rows(tmp_path, [{"messages": MESSAGES}] * 2, ".jsonl")
    write_rows(tmp_path, [{"text": "plain"}], ".parquet")
    caplog.set_level("INFO", "a3cli")
    assert read_all(chat_tokenizer(), tmp_path)[0] == "one\n\n<user>hi\n\n<user>hi\n\nplain"
    assert [each.getMessage() for each in caplog.records] == [
        f"dataset {tmp_path / 'rows.jsonl'}: no field 'text'; its 'messages' go through the chat template"
    ]


def test_messages_that_are_not_turns_are_no_chat(tmp_path):
    path = write_rows(tmp_path, [{"messages": "a text", "body": "b"}], ".jsonl")
    with pytest.raises(A3Error, match="no field 'text'; its fields are body, messages"):
        read_all(chat_tokenizer(), path)


def test_recognised_chats_need_a_template(a3, checkpoint, tmp_path):
    """Calibration and evaluation read chats alike: with a template they are rendered, without it one line says so."""
    source = shutil.copytree(checkpoint("llama-gqa"), tmp_path / "source")
    path = write_rows(tmp_path, [{"messages": [{"role": "user", "content": "hello " * 40}]}], ".jsonl")
    text = ("--dataset", path, "--samples", 2, "--seq-len", 16)
    commands = (("calibrate", source, *text, "--work", tmp_path / "work"), ("eval", source, *text))
    for command in commands:
        refused(a3(*command), "row 1: the model's tokenizer has no chat template", "chat_template.jinja")
    (source / "chat_template.jinja").write_text(CHATS)
    for command in commands:
        ended = a3(*command)
        assert ended.code == 0, ended
        assert "its 'messages' go through the chat template" in ended.stderr


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("t.txt", {"chat": True}, "--chat"),
        ("t.txt", {"text_field": "text"}, "--text-field"),
        ("t.txt", {"split": "train"}, "--split"),
        ("t.jsonl", {"split": "train"}, "--split"),
        ("t.jsonl", {"chat": True, "text_field": "x"}, None),
        ("", {"chat": True, "text_field": "x"}, None),  # the folder of both formats
        ("owner/name", {"split": "train"}, None),
        ("wikitext2:some", {"split": "train"}, None),
    ],
)
def test_options_without_effect_are_refused(tmp_path, name, options, said):
    (tmp_path / "t.txt").write_text("x")
    (tmp_path / "t.jsonl").write_text("{}")
    local = not name or "." in name
    asked = text_settings(tmp_path / name if local else name, **options)
    if said is None:
        return check_texts([asked])
    with pytest.raises(A3Error, match=f"{said} .*leave out {said}"):
        check_texts([asked])
    check_texts([asked, text_settings("owner/name", **options)])  # the options apply to the other data set
    return None


@pytest.mark.parametrize("name", ["none.txt", "texts/none.jsonl", "owner/", "nothing", "/no/where", "a/b/c"])
def test_a_data_set_that_is_not_there(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(A3Error, match="no such file or folder"):
        check_texts([text_settings(name)])


def three_files(folder):
    for name, letter in (("b.txt", "b"), ("d.txt", "d"), ("f.jsonl", "f")):
        (folder / name).write_text(letter * 200 if name.endswith(".txt") else '{"text": "x"}')


def test_only_files_that_are_opened_are_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr("a3cli.text.stream.TEXT_CHUNK", 1)
    three_files(tmp_path)
    read = TextRead()
    evaluation_blocks(TOKENIZER, text_settings(tmp_path, samples=32, seq_len=10), read)
    assert list(read.files) == ["b.txt", "d.txt"]
    assert read.files["b.txt"] == hash_file(tmp_path / "b.txt")
    assert not read.whole
    evaluation_blocks(TOKENIZER, text_settings(tmp_path, samples=None), whole := TextRead())
    assert list(whole.files) == ["b.txt", "d.txt", "f.jsonl"]
    assert whole.describe() == {"rows": 1, "skipped": 0, "whole": True}


def test_a_folder_that_fits_is_read_as_one_text(tmp_path):
    three_files(tmp_path)
    asked = text_settings(tmp_path)
    whole = list(token_stream(TOKENIZER, asked, purpose="calibrate"))
    assert list(read_pool(TOKENIZER, asked, len(whole), read := TextRead())) == whole
    assert read.describe() == {"rows": 1, "skipped": 0, "whole": True}


@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=12), most=st.integers(60, 200))
@settings(max_examples=40, deadline=None)
def test_a_huge_first_file_hides_no_other(tmp_path_factory, sizes, most):
    """All files are recorded and give what their sizes say; a file that is short leaves its share to the others."""
    folder = tmp_path_factory.mktemp("f")
    letters = "bcdefghijklm"[: len(sizes)]
    for letter, size in zip("a" + letters, (5000, *sizes), strict=True):
        (folder / f"{letter}.txt").write_text(letter * size)
    read = TextRead()
    stream = TOKENIZER.decode(list(read_pool(TOKENIZER, text_settings(folder), most, read)))
    assert len(stream) == most
    assert "".join(sorted(set(stream) - {"\n"})) == "a" + "".join(
        each for each, n in zip(letters, sizes, strict=True) if n
    )
    total, left = 5000 + sum(sizes), most
    for letter, size in zip(letters, sizes, strict=True):
        assert stream.count(letter) <= min(size, max(LEAST, most * size / total + 1))
        left -= stream.count(letter) + len("\n\n")
    assert stream.count("a") == left
    assert list(read.files) == [f"{letter}.txt" for letter in "a" + letters]
    assert read.describe() == {"rows": 0, "skipped": 0, "whole": False, "from_each": True}


def test_more_files_than_blocks(tmp_path):
    """Each file gives tokens, also those that are short; the same folder gives the same blocks."""
    for number in range(50):
        (tmp_path / f"{number:02d}.txt").write_text(chr(0x100 + number) * 300)
    (tmp_path / "rows.jsonl").write_text('{"text": null}\n{"text": "row"}\n' * 200)
    asked = text_settings(tmp_path, samples=8, seq_len=20)
    stream = TOKENIZER.decode(list(read_pool(TOKENIZER, asked, 8 * 8 * 20, TextRead())))
    assert {chr(0x100 + number) for number in range(50)} | {*"row"} == {*stream} - {"\n", "\ufffd"}
    blocks = sample_blocks(TOKENIZER, asked, read := TextRead()).blocks
    assert len(read.files) == 51
    assert read.rows == 2 * read.skipped > 0
    assert torch.equal(blocks, sample_blocks(TOKENIZER, asked).blocks)


def test_what_would_be_read_again(tmp_path, monkeypatch):
    """Changes to text that was not read do not matter, unless reading stopped at the end of the data."""
    three_files(tmp_path)

    def now(*, whole=False):
        known = {"b.txt": "", "d.txt": ""}
        return files_now(text_settings(tmp_path), known, whole=whole)

    before = now()
    assert list(before) == ["b.txt", "d.txt"]
    (tmp_path / "f.jsonl").write_text("changed")
    (tmp_path / "g.txt").write_text("new")
    assert now() == before
    assert list(now(whole=True)) == ["b.txt", "d.txt", "f.jsonl", "g.txt"]
    (tmp_path / "c.txt").write_text("before")
    assert list(now()) == ["b.txt", "c.txt"]
    monkeypatch.chdir(tmp_path)
    assert files_now(text_settings("b.txt"), {}, whole=False) == {"b.txt": before["b.txt"]}
    assert files_now(text_settings("owner/name"), {}, whole=True) == {}
