"""Random solutions."""

import torch

from a3cli.models.families import LayerSizes
from tests.conftest import family_of_row, mlp_width


def random_solution(
    name: str, sizes: LayerSizes, slots: list[float], *, method: str, width: int = 48
) -> dict[str, torch.Tensor]:
    """Return the tensors of `projections.py` for one layer; a component that keeps its size has none.

    Without RoPE there are no slots.
    """
    kv_heads, heads = (4 if "mha" in name else 2), 4
    solution = {}
    if sizes.qk < 16 and method == "paper" and slots:
        solution["pairs"] = torch.tensor([int(slot) for slot in slots])
    elif sizes.qk < 16:
        solution["query_map"] = torch.randn(kv_heads, 16, sizes.qk, dtype=torch.float64) / 4
        solution["key_map"] = torch.randn(kv_heads, 16, sizes.qk, dtype=torch.float64) / 2
    if sizes.ov < 16:
        solution["value_map"] = torch.randn(kv_heads, 16, sizes.ov, dtype=torch.float64) / 4
        if method == "paper":
            solution["output_map"] = torch.randn(kv_heads, sizes.ov, 16, dtype=torch.float64) / 4
        else:
            solution["output_weight"] = torch.randn(width, heads * sizes.ov) / 4
    if sizes.mlp < (full := mlp_width(name)):
        experts = (4,) if family_of_row(name).experts else ()
        solution["channels"] = torch.rand(*experts, full).argsort()[..., : sizes.mlp].sort().values
        if method == "best":
            solution["down_weight"] = torch.randn(*experts, width, sizes.mlp) / 8
    return solution or {"unchanged": torch.zeros(0)}
