"""How text becomes blocks: where they are cut, what a row is, and that nothing is lost or counted twice."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from a3cli import text
from a3cli.errors import A3Error
from a3cli.settings import TextSettings
from tests.conftest import build_tokenizer

TOKENIZER = build_tokenizer()


def text_settings(path, **options):
    return TextSettings(**{"dataset": str(path), "samples": 4, "seq_len": 8, **options})


def tokens_of(string: str) -> list[int]:
    return TOKENIZER(string)["input_ids"]


@given(extra=st.integers(0, 40), samples=st.integers(1, 5), seq_len=st.integers(2, 9), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_blocks_are_disjoint_runs_of_the_stream(tmp_path_factory, extra, samples, seq_len, seed):
    path = tmp_path_factory.mktemp("t") / "t.txt"
    # 256 different characters in a row: a run is known by its first token
    stream = "".join(chr(0x100 + i) for i in range(0, (samples * seq_len + extra + 1) // 2 * 1))
    path.write_text(stream, "utf-8")
    all_tokens = tokens_of(stream)
    if len(all_tokens) < samples * seq_len:
        return
    blocks = text.sample_blocks(TOKENIZER, text_settings(path, samples=samples, seq_len=seq_len, seed=seed))
    assert blocks.shape == (samples, seq_len)
    position = 0
    for block in blocks.tolist():
        while all_tokens[position : position + seq_len] != block:
            position += 1
            assert position <= len(all_tokens) - seq_len, "not a later run of the stream"
        position += seq_len


def test_every_placement_is_reached(tmp_path):
    """Two blocks of 3 in 8 tokens have 6 placements; over seeds each of them comes up."""
    path = tmp_path / "t.txt"
    path.write_text("abcdefgh")
    placements = {
        tuple(
            block[0].item()
            for block in text.sample_blocks(TOKENIZER, text_settings(path, samples=2, seq_len=3, seed=s))
        )
        for s in range(100)
    }
    first = tokens_of("abcdefgh")
    assert placements == {(first[a], first[b]) for a in range(6) for b in range(a + 3, 6)}


def test_seed_decides(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("".join(chr(97 + i % 26) * (i % 7) for i in range(300)))
    one, again, other = (text.sample_blocks(TOKENIZER, text_settings(path, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_too_little_text_says_how_many_blocks_there_are(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("x" * 20)
    with pytest.raises(A3Error, match=r"20 tokens give 2 blocks of 8, 4 were asked for"):
        text.sample_blocks(TOKENIZER, text_settings(path))


@given(length=st.integers(2, 60), seq_len=st.integers(2, 20))
@settings(max_examples=40, deadline=None)
def test_evaluation_blocks_hold_every_token_once(tmp_path_factory, length, seq_len):
    path = tmp_path_factory.mktemp("t") / "t.txt"
    path.write_text("ab" * (length // 2) + "c")
    blocks = text.evaluation_blocks(TOKENIZER, text_settings(path, samples=None, seq_len=seq_len))
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
    stream = list(text.token_stream(TOKENIZER, text_settings(path, text_field="body"), purpose="calibrate"))
    assert TOKENIZER.decode(stream) == "one\n\ntwo\n\nthree"


def test_a_folder_is_read_in_name_order(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    write_rows(tmp_path, [{"text": "third"}], ".jsonl")
    (tmp_path / "a.txt").write_text("first\nline")
    (tmp_path / "ignored.md").write_text("no")
    stream = list(text.token_stream(TOKENIZER, text_settings(tmp_path), purpose="calibrate"))
    assert TOKENIZER.decode(stream) == "first\nline\n\nsecond\n\nthird"


def test_chat_rows_go_through_the_template(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    path = write_rows(tmp_path, [{"messages": messages}], ".jsonl")
    stream = list(text.token_stream(tokenizer, text_settings(path, chat=True), purpose="calibrate"))
    assert tokenizer.decode(stream) == "<user>hi<assistant>ho"


def test_one_bos_at_the_very_beginning(tmp_path):
    class WithBos:
        def __call__(self, string, *, add_special_tokens, verbose):
            return {"input_ids": [1] * add_special_tokens + [len(string)]}

    path = tmp_path / "t.txt"
    path.write_text(("x" * 999 + "\n") * 3000)
    stream = list(text.token_stream(WithBos(), text_settings(path), purpose="calibrate"))
    assert stream[0] == 1
    assert 1 not in stream[1:]
    assert len(stream) > 2  # pieces of about a MiB


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
    """What is asked of `datasets`, and that rows beyond the pool are never pulled."""
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
        text.sample_blocks(TOKENIZER, wanted)
    else:
        text.evaluation_blocks(TOKENIZER, wanted)
    assert asked == [expected]
    assert len(pulled) <= 12  # one piece of a MiB
