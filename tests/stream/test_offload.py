"""Memory during a sweep: hidden states, prefetched weights, several devices, batch sizes that fit."""

import gc
import os
import weakref
from pathlib import Path

import pytest
import torch

from a3cli.cli.progress import SweepProgress
from a3cli.models.costs import block_bytes, layer_bytes, moment_bytes
from a3cli.models.families import ModelShape
from a3cli.solvers.moments import LayerMoments, unpack_upper
from a3cli.stream import sweep
from a3cli.stream.batches import Batching, read_batches
from a3cli.stream.hidden import StatesInMemory, checksums
from a3cli.stream.memory import choose_batch_size
from a3cli.work import machine
from a3cli.work.machine import Machine
from tests.conftest import but, refused, snapshot
from tests.helpers.statistics import assert_close, calibration_files

pytestmark = pytest.mark.usefixtures("hasty")

TEXT = ("--samples", 6, "--seq-len", 40, "--batch-size", 4)
LAYERS = 5


@pytest.fixture
def command(checkpoint, text_file) -> tuple[object, ...]:
    return ("calibrate", checkpoint("llama-gqa", num_hidden_layers=LAYERS), "--dataset", text_file, *TEXT, "--work")


@pytest.fixture
def whole(a3, command, tmp_path) -> Path:
    """Return the work folder of an undisturbed calibration."""
    assert a3(*command, tmp_path / "whole").code == 0
    return tmp_path / "whole"


@pytest.fixture
def cut(a3, command, tmp_path, monkeypatch) -> Path:
    """Return the work folder of a calibration that was interrupted in its fourth layer."""
    return interrupt(a3, monkeypatch, 3, *command, tmp_path / "cut")


def interrupt(a3, monkeypatch, layer: int, *command: object) -> Path:
    plain = SweepProgress.__call__

    def interrupting(self, **at):
        if at.get("layer") == layer:
            raise KeyboardInterrupt
        plain(self, **at)

    with monkeypatch.context() as patch:
        patch.setattr(SweepProgress, "__call__", interrupting)
        assert a3(*command).code == 3
    return Path(str(command[-1]))


def finished_alike(a3, command, cut: Path, whole: Path, *options: object) -> str:
    """Check that a calibration resumes and gives the same bytes; return its stderr."""
    kept = (cut / "calibration" / "layer-002.safetensors").stat().st_mtime_ns
    outcome = a3(*command[:-1], *options, "--work", cut)
    assert outcome.code == 0, outcome
    assert (cut / "calibration" / "layer-002.safetensors").stat().st_mtime_ns == kept
    assert calibration_files(cut) == calibration_files(whole)
    return outcome.stderr


@pytest.mark.parametrize("damage", ["truncated", "gone", "longer"])
def test_damaged_hidden_states_are_made_again(damage, a3, command, whole, cut):
    file = cut / "calibration" / "hidden-003.bin"
    size = file.stat().st_size
    assert size == 6 * 40 * 48 * 4
    file.unlink() if damage == "gone" else os.truncate(file, size - 8 if damage == "truncated" else size + 8)
    said = finished_alike(a3, command, cut, whole)
    assert "the input of layer 4 of 5 is missing" in said
    assert ("hidden-003.bin has changed since it was written" in said) == (damage != "gone")


def test_hidden_states_truncated_under_way(a3, command, whole, tmp_path, monkeypatch):
    """The layer in progress is lost, and one line says what to do."""
    plain = sweep.run_layer
    work = tmp_path / "cut"

    def truncating(*arguments):
        file = work / "calibration" / "hidden-003.bin"
        if file.exists():
            os.truncate(file, 100)
        return plain(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(sweep, "run_layer", truncating)
        refused(a3(*command, work, "--quiet"), "hidden-003.bin", "truncated", "rerun the same command")
    finished_alike(a3, command, work, whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [8, 5])
def test_check_sums_know_every_bit_and_place(width, dtype):
    blocks = torch.randn(3, 7, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = checksums(blocks)
    assert len(set(expected)) == 3
    for start in range(3):
        assert checksums(blocks[start:]) == expected[start:]  # whatever batch a block is in
    bits = blocks[1].clone().view(torch.uint8)
    found = set()
    for place in range(bits.numel()):
        for bit in range(8):
            bits.view(-1)[place] ^= 1 << bit
            found.add(checksums(bits.view(dtype)[None])[0])
            bits.view(-1)[place] ^= 1 << bit
    assert expected[1] not in found
    swapped = blocks[1, [1, 0, *range(2, 7)]]
    assert checksums(swapped[None]) != expected[1:2]
    assert checksums(torch.zeros_like(blocks[:1])) != expected[:1]


def test_check_sums_of_many_tokens_are_those_of_few(monkeypatch):
    blocks = torch.randn(2, 64, 16)
    expected = checksums(blocks)
    monkeypatch.setattr("a3cli.stream.hidden.CHECKED_AT_ONCE", 24)
    assert checksums(blocks) == expected


def test_hidden_states_of_which_nothing_is_recorded_are_made_again(a3, command, whole, tmp_path, monkeypatch):
    """A power failure before the first layer was finished may leave a file of the right size."""
    work = interrupt(a3, monkeypatch, 0, *command, tmp_path / "cut")
    file = work / "calibration" / "hidden-000.bin"
    file.write_bytes(bytes(file.stat().st_size))
    assert a3(*command, work).code == 0
    assert calibration_files(work) == calibration_files(whole)


def test_batches_on_a_device_are_not_pinned(monkeypatch):
    """The meta device replaces a GPU, whose memory cannot be pinned either."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    states = StatesInMemory((5, 4, 8), torch.float32, torch.device("meta"))
    batches = list(read_batches([states], Batching(5, 2, in_background=True)))
    assert [(start, len(batch), batch.device.type) for start, (batch,) in batches] == [
        (0, 2, "meta"), (2, 2, "meta"), (4, 1, "meta"),
    ]  # fmt: skip


@pytest.mark.parametrize("where", ["memory", "device"])
def test_in_memory_the_same_bytes_and_no_files(where, a3, command, whole, tmp_path, monkeypatch):
    options = (*command[:-1], "--hidden-states", where, "--work")
    work = interrupt(a3, monkeypatch, 3, *options, tmp_path / "memory")
    assert not list(work.rglob("hidden-*"))
    assert "rerunning the layers before it" in finished_alike(a3, command, work, whole, *options[-3:-1])
    monkeypatch.setattr("a3cli.stages.calibrate.free_memory", lambda device: 46_000)
    refused(a3(*options, tmp_path / "short"), f"--hidden-states {where}", "0.00 GB", "--hidden-states disk")
    assert not (tmp_path / "short").exists()
    before = snapshot(whole)
    refused(a3(*options, whole, "--seed", 1, "--overwrite"), f"--hidden-states {where}")
    assert snapshot(whole) == before


@pytest.mark.parametrize("devices", ["cpu,cpu", "cpu,cpu,cpu"])
def test_consecutive_layers_on_several_devices(devices, a3, command, whole, cut, tmp_path):
    """The bytes are equal, even for two layers per pass with a remainder, and after resuming with other devices."""
    assert a3(*command, tmp_path / "several", "--devices", devices).code == 0
    assert calibration_files(tmp_path / "several") == calibration_files(whole)
    finished_alike(a3, command, cut, whole, "--devices", devices)


def test_killed_between_two_layers_of_a_pass(a3, command, whole, tmp_path, monkeypatch):
    """Of two layers that ran together, the first is finished and the second is not."""
    from a3cli.stages import calibrate

    plain = calibrate.write_hashed

    def interrupting(path, tensors):
        if path.name == "layer-003.safetensors":
            raise KeyboardInterrupt
        return plain(path, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(calibrate, "write_hashed", interrupting)
        assert a3(*command, tmp_path / "cut", "--devices", "cpu,cpu").code == 3
    finished_alike(a3, command, tmp_path / "cut", whole)


def test_killed_before_the_manifest(a3, command, whole, tmp_path, monkeypatch):
    """All layers are finished, so nothing is rerun, wherever the hidden states were."""
    from a3cli.stages import calibrate

    options = (*command[:-1], "--hidden-states", "memory", "--work", tmp_path / "cut")

    def interrupting(self, blocks):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(calibrate.Calibration, "_close", interrupting)
        assert a3(*options).code == 3
    monkeypatch.setattr(sweep, "run_layer", None)
    finished_alike(a3, command, tmp_path / "cut", whole)


def test_bad_devices(a3, command, tmp_path, monkeypatch):
    refused(a3(*command, tmp_path / "w", "--devices", "cpu,gpu"), "--devices 'gpu'")
    refused(a3(*command, tmp_path / "w", "--devices", "cuda:7"), "--devices 'cuda:7'", "CUDA devices")
    refused(a3(*command, tmp_path / "w", "--devices", "cpu", "--device", "cpu"), "contradict")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    refused(a3(*command, tmp_path / "w", "--devices", "cpu,cpu,cpu"), "cannot be divided among 2 processes")
    assert not (tmp_path / "w").exists()


def test_threads_of_a_device_with_memory_of_its_own(a3, command, whole, tmp_path, monkeypatch):
    """Prefetching, background writes and fetching weights in a thread give the same bytes, and the same errors."""
    monkeypatch.setattr(Machine, "copies", True)
    for where in ("disk", "memory", "device"):
        assert a3(*command, tmp_path / where, "--hidden-states", where).code == 0
        assert calibration_files(tmp_path / where) == calibration_files(whole)

    def failing(self, start, count):
        raise sweep.A3Error("no such block")

    monkeypatch.setattr("a3cli.stream.hidden.HiddenStates.read", failing)
    refused(a3(*command, tmp_path / "failing", "--quiet"), "no such block")


def running_out_above(limit: int, plain):
    def run_layer(layer, batch, arguments):
        if len(batch) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nand more lines")
        return plain(layer, batch, arguments)

    return run_layer


@pytest.mark.parametrize("where", ["disk", "memory"])
def test_batches_are_halved_until_they_fit(where, a3, command, whole, tmp_path, monkeypatch):
    """A run that resumes later uses the batch size that fitted."""
    auto = (*but(command[:-1], "--batch-size", "auto"), "--hidden-states", where, "--work", tmp_path / "auto")
    monkeypatch.setattr(sweep, "run_layer", running_out_above(2, sweep.run_layer))
    outcome = a3(*auto, "--json")
    assert outcome.code == 0
    assert [line for line in outcome.stderr.splitlines() if "memory" in line] == [
        "out of memory: continuing with 3 blocks per batch",
        "out of memory: continuing with 1 blocks per batch",
    ]
    assert outcome.json["made_with"] == [{"processes": 1, "batch_size": 1}] * LAYERS
    assert_close([whole, tmp_path / "auto"])


def test_what_filled_the_memory_is_free_for_the_next_attempt(a3, command, tmp_path, monkeypatch):
    """The memory is freed without the garbage collector, whatever references the error."""
    plain, failed = sweep.run_layer, []

    def run_layer(layer, batch, arguments):
        assert not any(there() is not None for there in failed)
        if len(batch) > 1:
            failed.append(weakref.ref(batch))
            raise RuntimeError("CUDA out of memory. Tried to allocate 9 GiB")
        return plain(layer, batch, arguments)

    monkeypatch.setattr(sweep, "run_layer", run_layer)
    gc.disable()
    try:
        assert a3(*but(command[:-1], "--batch-size", "auto"), "--work", tmp_path / "auto").code == 0
    finally:
        gc.enable()
    assert len(failed) == 2


def test_a_batch_that_cannot_even_be_embedded_is_halved(a3, command, whole, tmp_path, monkeypatch):
    plain = sweep.Decoder.look_up

    def look_up(self, blocks, table):
        if len(blocks) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return plain(self, blocks, table)

    monkeypatch.setattr(sweep.Decoder, "look_up", look_up)
    outcome = a3(*but(command[:-1], "--batch-size", "auto"), "--work", tmp_path / "auto", "--json")
    assert outcome.code == 0, outcome
    assert "continuing with 3 blocks per batch" in outcome.stderr
    assert_close([whole, tmp_path / "auto"])
    ended = a3(*but(command[:-1], "--batch-size", 6), "--work", tmp_path / "asked", "--quiet")
    refused(ended, "out of memory at 6 blocks per batch")


def test_batch_is_halved_in_the_middle_and_kept(a3, command, whole, tmp_path, monkeypatch):
    """If memory runs out late, finished layers stay as they are, and the smaller batch size is kept."""
    plain = sweep.run_layer
    calls = []

    def run_layer(layer, batch, arguments):
        calls.append(len(batch))
        limit = 6 if len(calls) <= 2 else 3
        return running_out_above(limit, plain)(layer, batch, arguments)

    for where in ("disk", "memory"):
        calls.clear()
        auto = (*but(command[:-1], "--batch-size", "auto"), "--hidden-states", where, "--work", tmp_path / where)
        with monkeypatch.context() as patch:
            patch.setattr(sweep, "run_layer", run_layer)
            interrupt(a3, patch, 4, *auto)
        made_with = a3(*auto, "--json").json["made_with"]
        assert [made["batch_size"] for made in made_with] == [6, 6, 3, 3, 3]
        assert_close([whole, tmp_path / where])


def test_a_batch_that_was_asked_for_is_not_changed(a3, command, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "run_layer", running_out_above(2, sweep.run_layer))
    ended = a3(*command, tmp_path / "w", "--quiet")
    refused(
        ended, "out of memory at 4 blocks per batch (CUDA out of memory. Tried to allocate 9 GiB)", "--batch-size auto"
    )
    monkeypatch.setattr(sweep, "run_layer", running_out_above(0, sweep.run_layer))
    refused(
        a3(*but((*command, tmp_path / "w"), "--batch-size", "auto"), "--quiet"),
        "out of memory at 1 blocks",
        "--seq-len",
    )
    assert not (tmp_path / "w").exists()


def test_hidden_states_in_memory_leave_less_for_the_layer(a3, command, tmp_path, monkeypatch):
    """Each fits alone, but not both together."""
    monkeypatch.setattr("a3cli.stages.calibrate.free_memory", lambda device: 50_000)
    options = (*command[:-1], "--hidden-states", "memory", "--work")
    assert a3(*options, tmp_path / "w").code == 0
    monkeypatch.setattr("a3cli.stages.calibrate.costs.hidden_state_bytes", lambda *sizes: 10**12)
    monkeypatch.setattr("a3cli.stages.calibrate.free_memory", lambda device: 10**12)
    refused(a3(*options, tmp_path / "v"), "not enough memory on cpu", "beside 1000.00 GB of hidden states")
    assert not (tmp_path / "v").exists()


@pytest.mark.parametrize(
    "said",
    [
        "CUDA out of memory. Tried to allocate 9 GiB",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory",
    ],
)
def test_what_running_out_of_memory_looks_like(said):
    with pytest.raises(torch.OutOfMemoryError), sweep.as_out_of_memory():
        raise RuntimeError(said)
    with pytest.raises(RuntimeError, match="device-side") as other, sweep.as_out_of_memory():
        raise RuntimeError("CUDA error: device-side assert triggered")
    assert not isinstance(other.value, torch.OutOfMemoryError)


def test_a_layer_that_does_not_fit(a3, command, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "free_memory", lambda device: 200_000)
    refused(a3(*command, tmp_path / "w"), "not enough memory on cpu", "one layer 0.00 GB", "--mlp-stats diagonal")
    assert not (tmp_path / "w").exists()


LLAMA_70B = ModelShape(8192, 80, 64, 8, 128, 28672)


def test_batch_from_the_memory_that_is_free(monkeypatch):
    """For Llama-3.1-70B in bfloat16, a layer takes 1.7 GB and its statistics 5.3 GB; the rest is for blocks."""
    assert layer_bytes(LLAMA_70B, 2) == pytest.approx(1.71e9, rel=0.01)
    assert moment_bytes(LLAMA_70B, full_mlp=True) == pytest.approx(4 * 28672**2 + 2 * 28672**2, rel=0.1)
    monkeypatch.setattr(Machine, "free_memory", lambda self: 80 * 10**9)
    gpu = Machine(torch.device("cuda"), torch.bfloat16)
    batch = choose_batch_size(LLAMA_70B, gpu, 2048, 512, full_mlp=True)
    needed = layer_bytes(LLAMA_70B, 2) + moment_bytes(LLAMA_70B, full_mlp=True)
    block = block_bytes(LLAMA_70B, 2, 2048)
    assert needed + batch * block <= 0.9 * 80e9 < needed + (batch + 1) * block
    assert choose_batch_size(LLAMA_70B, gpu, 2048, 3, full_mlp=True) == 3
    cpu = Machine(torch.device("cpu"), torch.float32)
    assert choose_batch_size(LLAMA_70B, cpu, 2048, 128, full_mlp=True) == 1
    assert choose_batch_size(LLAMA_70B, cpu, 256, 128, full_mlp=True) == 8


@pytest.mark.parametrize("tokens", [700, pytest.param(7000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_of_half_precision_are_exact_to_float32(dtype, tokens, monkeypatch):
    """Use more tokens than a piece, more columns than a few rows of a triangle, and two batches; compare with float64.

    Larger batches are summed whole, as on a GPU.
    """
    monkeypatch.setattr(LayerMoments, "_on_cpu", tokens < 1000)
    generator = torch.Generator().manual_seed(0)
    batches = [(2 + torch.randn(2, tokens, 640, generator=generator)).to(dtype) for _ in range(2)]
    moments = LayerMoments(16, full_mlp=True, device=torch.device("cpu"))
    precision = torch.get_float32_matmul_precision()
    for batch in batches:
        moments.add_mlp(batch)
        moments.add_attention_output(batch)
        moments.add_heads("q", batch)
        moments.add_residual("mlp_inverse", batch)
    assert torch.get_float32_matmul_precision() == precision
    found = moments.finished()
    flat = torch.cat(batches).flatten(0, 1).double()
    heads = flat.unflatten(1, (-1, 16)).transpose(0, 1)
    expected = {
        "mlp_energy": flat.square().sum(0),
        "x_sum": flat.sum(0),
        "o_sum": flat.sum(0),
        "q_gram": heads.mT @ heads,
        "q_sum": heads.sum(1),
        "mlp_inverse": (1 / flat.square().sum(1)).sum(),
    }
    for name, value in expected.items():
        assert (found[name] - value).norm() < 1e-6 * value.norm(), name
    for name in ("mlp_gram", "o_gram"):
        assert (unpack_upper(found[name], 640) - flat.T @ flat).norm() < 1e-6 * (flat.T @ flat).norm(), name
    assert found["tokens"] == len(flat)
