"""Shards written and checked: bytes copied or made, errors of the writing threads, values that overflow a sum."""

import hashlib
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from a3cli.checkpoint import Checkpoint, HashingWriter, PlannedTensor, check_finite, read_header, write_shard
from a3cli.errors import A3Error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_finite_weights_pass_and_one_bad_value_does_not(dtype):
    weight = torch.full((300, 300), torch.finfo(dtype).max, dtype=dtype)  # their sum is not finite
    check_finite(weight, "w", "here")
    for bad in ("nan", "inf", "-inf"):
        broken = torch.randn(300, 300).to(dtype)
        broken[123, 45] = float(bad)
        with pytest.raises(A3Error, match="here: tensor w has NaN or Inf"):
            check_finite(broken, "w", "here")


def test_stored_tensors_are_copied_and_made_ones_written(tmp_path, monkeypatch):
    monkeypatch.setattr("a3cli.checkpoint.COPIED_AT_ONCE", 1000)  # several pieces a tensor
    tensors = {f"t{i}": torch.randn(40, 30 + i, dtype=torch.float32) for i in range(4)}
    save_file(tensors, tmp_path / "source.safetensors")
    infos = read_header(tmp_path / "source.safetensors")
    planned = [PlannedTensor(name, tuple(value.shape), value.dtype) for name, value in tensors.items()]
    values = [infos["t0"], [tensors["t1"]], infos["t2"], tensors["t3"].split(7)]
    digest = write_shard(tmp_path / "out.safetensors", planned, iter(values))
    assert digest == hashlib.sha256((tmp_path / "out.safetensors").read_bytes()).hexdigest()
    written = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(written[name], value) for name, value in tensors.items())


def test_a_source_cut_short_meanwhile_is_told(tmp_path):
    save_file({"t": torch.randn(100)}, tmp_path / "source.safetensors")
    info = read_header(tmp_path / "source.safetensors")["t"]
    os.truncate(tmp_path / "source.safetensors", info.offset + 50)
    with pytest.raises(A3Error, match="truncated"):
        write_shard(tmp_path / "out", [PlannedTensor("t", (100,), torch.float32)], iter([info]))


def test_what_a_writing_thread_meets_is_raised(tmp_path):
    def write_much() -> None:
        with HashingWriter(tmp_path / "file") as file:
            full = os.open("/dev/full", os.O_WRONLY)
            os.dup2(full, file._file.fileno())
            os.close(full)
            for _ in range(10):
                file.write(b"x" * 100_000)

    with pytest.raises(OSError, match="No space left"):
        write_much()


def test_offsets_are_where_the_bytes_are(checkpoint):
    source = Checkpoint(checkpoint("llama-gqa"))
    for name, info in source.tensors.items():
        data = info.file.read_bytes()[info.offset : info.offset + info.bytes]
        assert torch.equal(torch.frombuffer(bytearray(data), dtype=info.dtype).view(info.shape), source.read(name))
