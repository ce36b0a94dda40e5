"""Compare the files of calibrations."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file


def statistics(work: Path) -> list[dict[str, torch.Tensor]]:
    return [load_file(path) for path in sorted((work / "calibration").glob("layer-*.safetensors"))]


def assert_close(works: Sequence[Path]) -> None:
    """Check that statistics are equal up to the order of float32 sums; samples may be rounded differently."""
    first, *others = map(statistics, works)
    for other in others:
        for expected, found in zip(first, other, strict=True):
            assert expected.keys() == found.keys()
            for name, value in expected.items():
                assert found[name].dtype == value.dtype
                difference = (found[name].double() - value.double()).norm() / value.double().norm()
                assert difference < (1e-3 if value.dtype == torch.bfloat16 else 1e-6), name


def calibration_files(work):
    return {path.name: path.read_bytes() for path in (work / "calibration").iterdir()}
