"""Judge a calibration's statistics: effective ranks and conditions of their spectra."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from a3cli.methods.inputs import check_statistics
from a3cli.models.checkpoint import Checkpoint
from a3cli.models.families import family_of, usual_entries
from a3cli.settings import Component
from a3cli.solvers.linalg import effective_rank
from a3cli.solvers.moments import gram_blocks, unpack_upper
from a3cli.work.files import check_hash, open_tensors
from a3cli.work.folder import Work
from a3cli.work.schema import Part

SINGULAR = 1e-10  # of the largest eigenvalue: the solvers' default floor
WIDEST_SPECTRUM = 2048  # largest width whose eigenvalues are all computed: wider ones take a minute per layer
REMEDY = "run a3 calibrate --overwrite"


@dataclass(frozen=True)
class Dimensions:
    """H, K, h, I; and, if the source or the export is available, d, the bytes of a weight, and whether the MLP has a
    gate. H and K are 0 where attention is carried.
    """

    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    hidden: int | None = None
    item: int | None = None
    gated: bool = True
    experts: int = 0  # MLPs in each layer; 0: one, without a router
    active_experts: int = 0  # those that a token goes through

    def full_size(self, component: Component) -> int:
        return self.intermediate if component == "mlp" else self.head_dim

    def of_gram(self, component: Component) -> int:
        """Return the size of the largest inverted matrix: all heads together for the refit of the output projection."""
        return {"qk": self.head_dim, "ov": self.heads * self.head_dim, "mlp": self.intermediate}[component]

    def bytes(self, component: Component, size: int) -> int | None:
        """Return the bytes of a component's weights in one layer, without biases; None if they are not known."""
        if self.hidden is None or self.item is None or (component != "mlp" and not self.heads):
            return None
        rows = (3 if self.gated else 2) if component == "mlp" else self.heads + self.kv_heads
        many = self.experts or 1 if component == "mlp" else 1
        return many * rows * size * self.hidden * self.item

    def share_of_tokens(self, component: Component) -> float:
        """Return which share of the tokens the statistics of a component see: of an expert, on average its own."""
        return self.active_experts / self.experts if component == "mlp" and self.experts else 1.0


class Health(Part):
    """Spectra of one component's Gram matrices; None where they were not computed."""

    effective_rank: float | None = None  # mean over heads
    condition: float | None = None  # of the worst head; None also if singular
    singular: int | None = None  # number of eigenvalues that are rounding
    dead: int | None = None  # number of channels that are always zero


LayerHealth = dict[Component, Health]


def describe_statistics(
    work: Work, hashes: Sequence[str], source: Checkpoint | None
) -> tuple[Dimensions | None, list[LayerHealth]]:
    """Return the dimensions of the finished layers' statistics, and the health of their spectra."""
    health, dimensions = [], None
    for layer, expected in enumerate(hashes):
        check_hash(work.statistics(layer), expected, REMEDY)
        with open_tensors(work.statistics(layer), REMEDY) as file:
            dimensions = read_dimensions(file, source)
            health.append(layer_health(file, dimensions, layer))
    return dimensions, health


def read_dimensions(file: Any, source: Checkpoint | None) -> Dimensions:
    config = usual_entries(source.config) if source else {}
    experts, active = count_experts(file)
    heads, kv_heads, head_dim = 0, 0, config.get("head_dim", 0)
    if has_heads(file):
        heads, head_dim, _ = file.get_slice("q_gram").get_shape()
        kv_heads = file.get_slice("k_gram").get_shape()[0]
    return Dimensions(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=file.get_slice("mlp_energy").get_shape()[-1],
        hidden=config.get("hidden_size"),
        item=source.dtype.itemsize if source else None,
        gated=source is None or family_of(source.config.get("model_type")).gated,
        experts=experts,
        active_experts=active,
    )


def count_experts(file: Any) -> tuple[int, int]:
    """Return how many experts a layer has, and how many of them a token goes through; zeros without experts."""
    if "expert_tokens" not in file.keys():  # noqa: SIM118, a safetensors file is no dictionary
        return 0, 0
    of_each = file.get_tensor("expert_tokens")
    return len(of_each), round((of_each.sum() / file.get_tensor("tokens")).item())


def has_heads(file: Any) -> bool:
    """Return whether statistics have sums of heads, which those of carried attention have not."""
    return "q_gram" in file.keys()  # noqa: SIM118, a safetensors file is no dictionary


def layer_health(file: Any, dimensions: Dimensions, layer: int) -> LayerHealth:
    """Return effective rank and condition of one layer's Gram matrices, for the worst head."""

    def sums(name: str) -> torch.Tensor:
        found: torch.Tensor = file.get_tensor(name)
        check_statistics(found, name, layer)
        return found

    mlp = mlp_health(file, dimensions, sums)
    if not has_heads(file):
        return {"qk": Health(), "ov": Health(), "mlp": mlp}
    width = dimensions.heads * dimensions.head_dim
    outputs = unpack_upper(sums("o_gram"), width)
    attention = spectrum_health(gram_blocks(outputs, dimensions.heads))
    if width <= WIDEST_SPECTRUM:  # used by the refit of the output projection
        attention = with_conditions(attention, outputs[None])
    keys = sums("k_gram")
    scores = with_conditions(spectrum_health(keys), torch.cat([sums("q_gram"), keys]))
    return {"qk": scores, "ov": attention, "mlp": mlp}


def mlp_health(file: Any, dimensions: Dimensions, sums: Callable[[str], torch.Tensor]) -> Health:
    """Return the health of the MLP's statistics, of experts that of those with as many tokens as channels."""
    width, energy = dimensions.intermediate, sums("mlp_energy").double()
    tokens = sums("expert_tokens") if dimensions.experts else torch.full((1,), torch.inf)
    enough = (tokens >= width).nonzero().flatten()
    energies = energy.view(-1, width)[enough]
    if not len(energies):
        return Health()
    dead = int((energies <= SINGULAR * energies.amax(-1, keepdim=True)).sum())
    found = Health(effective_rank=effective_rank(energies).mean().item(), dead=dead)
    computable = len(energies) * width**3 <= WIDEST_SPECTRUM**3
    if "mlp_gram" in file.keys() and computable:  # noqa: SIM118, no dictionary
        packed = sums("mlp_gram").view(len(tokens), -1)[enough]
        found = with_conditions(found, torch.stack([unpack_upper(each, width) for each in packed]))
    return found


def with_conditions(health: Health, grams: torch.Tensor) -> Health:
    """Return `health` with the condition of other matrices than those of the effective rank."""
    found = spectrum_health(grams)
    return health.model_copy(update={"condition": found.condition, "singular": found.singular})


def spectrum_health(grams: torch.Tensor) -> Health:
    """Return mean effective rank, worst condition and number of rounding eigenvalues of Gram matrices `[n, h, h]`."""
    values = torch.linalg.eigvalsh(grams.double())
    least, largest = values.amin(-1), values.amax(-1)
    condition = torch.where(least > 0, largest / least, torch.inf).max().item()
    return Health(
        effective_rank=effective_rank(values).mean().item(),
        condition=condition if condition < 1 / SINGULAR else None,
        singular=int((values <= SINGULAR * largest[:, None]).sum()),
    )
