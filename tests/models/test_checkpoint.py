"""Writing and checking shards: copied and computed bytes, and values whose sum overflows."""

import io
import os
from itertools import chain

import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file, save_file

from a3cli.errors import A3Error
from a3cli.models.checkpoint import Checkpoint, TensorInfo, check_finite, fill, read_header, read_stored, row_groups
from a3cli.models.shards import PlannedTensor, write_shard


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_finite_weights_pass_and_one_bad_value_does_not(dtype):
    weight = torch.full((300, 300), torch.finfo(dtype).max, dtype=dtype)  # their sum is not finite
    check_finite(weight, "w", "here")
    for bad in ("nan", "inf", "-inf"):
        broken = torch.randn(300, 300).to(dtype)
        broken[123, 45] = float(bad)
        with pytest.raises(A3Error, match="here: tensor w has NaN or Inf"):
            check_finite(broken, "w", "here")


def stored_rows(info: TensorInfo) -> list[torch.Tensor]:
    return [read_stored(group) for group in row_groups(info)]


def test_stored_tensors_are_copied_and_made_ones_written(tmp_path, monkeypatch):
    monkeypatch.setattr("a3cli.models.checkpoint.COPIED_AT_ONCE", 1000)  # several pieces per tensor
    tensors = {f"t{i}": torch.randn(40, 30 + i, dtype=torch.float32) for i in range(4)}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(3, 0), "long": torch.randn(1000)}
    save_file(tensors, tmp_path / "source.safetensors")
    infos = read_header(tmp_path / "source.safetensors")
    planned = [PlannedTensor(name, tuple(value.shape), value.dtype) for name, value in tensors.items()]
    values = [stored_rows(infos["t0"]), [tensors["t1"]], stored_rows(infos["t2"]), tensors["t3"].split(7)]
    values += [stored_rows(infos[name]) for name in ("scalar", "empty", "long")]
    digest = write_shard(tmp_path / "out.safetensors", planned, chain.from_iterable(values))
    assert digest == f"blake3:{blake3((tmp_path / 'out.safetensors').read_bytes()).hexdigest()}"
    written = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(written[name], value) for name, value in tensors.items())


@pytest.mark.parametrize(
    "wrong", [torch.ones(4, 2), torch.ones(5, 3), torch.ones(7, 3), torch.ones(4, 3).double(), torch.ones(3, 3)]
)
def test_what_differs_from_its_plan_is_not_written(wrong, tmp_path):
    planned = [PlannedTensor("t", (4, 3), torch.float32)]
    write_shard(tmp_path / "right", planned, torch.ones(4, 3).split(3))
    with pytest.raises(ValueError, match="planned"):
        write_shard(tmp_path / "wrong", planned, wrong.split(3))


def test_a_source_cut_short_meanwhile_is_told(tmp_path):
    file = tmp_path / "source.safetensors"
    save_file({"t": torch.randn(100)}, file)
    info = read_header(file)["t"]
    os.truncate(file, info.offset + 50)
    with pytest.raises(A3Error, match=r"source.safetensors is truncated"):
        stored_rows(info)
    file.unlink()
    with pytest.raises(A3Error, match=r"source.safetensors cannot be read"):
        stored_rows(info)


def test_reading_goes_on_where_the_system_stopped():
    class AtMostThree(io.RawIOBase):
        left = bytes(range(10))

        def readinto(self, buffer):
            part, self.left = self.left[: min(3, len(buffer))], self.left[min(3, len(buffer)) :]
            buffer[: len(part)] = part
            return len(part)

    buffer = bytearray(10)
    assert fill(AtMostThree(), buffer)
    assert buffer == bytes(range(10))
    assert not fill(AtMostThree(), bytearray(11))


def test_offsets_are_where_the_bytes_are(checkpoint):
    source = Checkpoint(checkpoint("llama-gqa"))
    for name, info in source.tensors.items():
        data = info.file.read_bytes()[info.offset : info.offset + info.bytes]
        assert torch.equal(torch.frombuffer(bytearray(data), dtype=info.dtype).view(info.shape), source.read(name))
