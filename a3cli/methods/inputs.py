"""What a method reads of one layer: its statistics and its weights, on demand."""

from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path

import torch

from a3cli.errors import A3Error
from a3cli.methods.gradients import LayerGradients
from a3cli.models.families import Role
from a3cli.models.families.base import HEAD_NORM_ROLES
from a3cli.models.model import Model
from a3cli.models.rope import Rope
from a3cli.solvers.linalg import effective_rank
from a3cli.solvers.moments import LARGE, Tensors, gram_blocks, unpack_upper
from a3cli.solvers.ov import output_gram_of
from a3cli.solvers.samples import NAMES, WEIGHT
from a3cli.work.files import Json, open_tensors, read_named
from a3cli.work.folder import Work
from a3cli.work.kept import Kept
from a3cli.work.manifests import CalibrationManifest
from a3cli.work.sealed import versions

REMEDY = "run a3 calibrate --overwrite"
# Component of each statistic, for messages.
COMPONENT_OF = {
    **dict.fromkeys(("q_gram", "q_sum", "k_gram", "k_sum", "distance", "sample_q", "sample_k", WEIGHT), "QK"),
    **dict.fromkeys(("v_gram", "v_sum", "sample_v", "o_gram", "o_sum", "o_weight", "attention_inverse"), "OV"),
    **dict.fromkeys(("mlp_gram", "mlp_energy", "x_sum", "expert_tokens", "mlp_inverse"), "MLP"),
}
# Dimensions of the sums that methods read of heads, which statistics of carried attention do not have.
DIMENSIONS = {"q_gram": 3, "k_gram": 3, "v_gram": 3, "k_sum": 2, "distance": 1}


def check_statistics(value: torch.Tensor, name: str, layer: int) -> None:
    """Check that a value is finite. Raises A3Error naming layer, component and sum."""
    if not torch.isfinite(value).all():
        place = f"layer {layer}, {COMPONENT_OF[name]}" if name in COMPONENT_OF else f"layer {layer}"
        raise A3Error(f"{place}: statistics {name} have NaN or Inf values; run a3 calibrate --overwrite")


def read_samples(path: Path) -> Tensors | None:
    """Return the attention samples of a layer's statistics, with the names of `samples.py`; None if there are none."""
    samples = read_named(path, NAMES, REMEDY)
    return None if samples is None else samples | (read_named(path, (WEIGHT,), REMEDY) or {})


class LayerInputs:
    """Statistics (means over tokens) and weights of one layer, read on demand.

    An error e of a projection's output counts `‖e‖²` in the residual stream, and `w ‖γ ∘ e‖²` if a norm with weight γ
    follows the projection. The statistics contain the tokens' weights w (`moments.py`), and the output weights named
    `…_in_stream` contain γ.

    Raises A3Error for statistics that are missing or not finite.
    """

    def __init__(
        self,
        model: Model,
        work: Work,
        calibration: CalibrationManifest,
        layer: int,
        gradients: LayerGradients | None = None,
    ) -> None:
        self.shape, self.layer, self._gradients = model.shape, layer, gradients
        self._model, self._path, self._work, self._calibration = model, work.statistics(layer), work, calibration

    def check(self) -> None:
        """Check all small sums, also unused ones; the large ones are checked when they are read."""
        with open_tensors(self._path, REMEDY) as file:
            for name in file.keys():  # noqa: SIM118, a safetensors file is no dictionary
                if name not in LARGE:
                    check_statistics(file.get_tensor(name), name, self.layer)

    def mean(self, name: str, expert: int | None = None) -> torch.Tensor:
        """Return one sum of `moments.py` over the token count, as stored: the large ones are packed triangles.

        With `expert`, only that expert's part is read. Where attention is carried, those of heads are of no heads.
        """
        if self.shape.carried_attention and name in DIMENSIONS:
            return torch.zeros(0, *[self.shape.head_dim] * (DIMENSIONS[name] - 1), dtype=torch.float64)
        with open_tensors(self._path, REMEDY) as file:
            if name not in file.keys():  # noqa: SIM118, a safetensors file is no dictionary
                full = " --mlp-stats full, or use --method paper" if name == "mlp_gram" else ""
                raise A3Error(f"layer {self.layer}: the statistics have no {name}; {REMEDY}{full}")
            value: torch.Tensor = file.get_tensor(name) if expert is None else file.get_slice(name)[expert]
            value = value / file.get_tensor("tokens").to(value.dtype)
        check_statistics(value, name, self.layer)
        return value

    def samples(self) -> Tensors:
        """Return the attention samples, with the names of `samples.py`."""
        if (samples := read_samples(self._path)) is None:
            raise A3Error(f"layer {self.layer}: the statistics have no attention samples; run a3 calibrate --overwrite")
        return samples

    def opened_again(self) -> "Callable[[], LayerInputs]":
        """Return a function that opens the same inputs without the tensors read so far."""
        return partial(LayerInputs, self._model, self._work, self._calibration, self.layer, self._gradients)

    @cached_property
    def o_gram(self) -> torch.Tensor:
        """Return `E[o oᵀ]` `[Hh, Hh]` over all heads, float64."""
        return unpack_upper(self.mean("o_gram"), self.shape.heads * self.shape.head_dim).double()

    @cached_property
    def head_outputs(self) -> torch.Tensor:
        """Return `E[o_i o_iᵀ]` `[H, h, h]` of each head."""
        return gram_blocks(self.o_gram, self.shape.heads) if self.shape.heads else self.mean("v_gram")

    def mlp_gram(self, expert: int | None = None) -> torch.Tensor:
        """Return `E[x xᵀ]` `[I, I]` float64, by far the largest tensor here: computed at each call, not kept."""
        return unpack_upper(self.mean("mlp_gram", expert).double(), self.shape.intermediate_size)

    @cached_property
    def expert_tokens(self) -> list[int]:
        """Return how many tokens went through each expert; empty without experts."""
        if not self.shape.experts:
            return []
        with open_tensors(self._path, REMEDY) as file:
            return [int(count) for count in file.get_tensor("expert_tokens").tolist()]

    def weight(self, role: Role, expert: int) -> torch.Tensor:
        """Return a linear weight of one expert."""
        return self._model.read(self.layer, role, expert=expert)

    @cached_property
    def mlp_mean(self) -> torch.Tensor:
        """Return `E[x]` `[I]`."""
        return self.mean("x_sum")

    @cached_property
    def output_weight(self) -> torch.Tensor:
        """Return `W_o,i` of each head, `[H, h, d]`: a view of the output projection `[d, H·h]`."""
        weight = self._model.read(self.layer, "o")
        return weight.view(len(weight), self.shape.heads, self.shape.head_dim).permute(1, 2, 0)

    @cached_property
    def head_gains(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the norms behind queries and keys multiply by, `[h]` float64."""
        query, key = (self._model.read(self.layer, role).double() + self.shape.norm_offset for role in HEAD_NORM_ROLES)
        return query, key

    @cached_property
    def output_weight_in_stream(self) -> torch.Tensor:
        """Return `W_o,i` `[H, h, d]`, times the weight of the norm that follows, if there is one."""
        gain = self._post_norm("o")
        return self.output_weight if gain is None else self.output_weight * gain

    @cached_property
    def output_gram(self) -> torch.Tensor:
        """Return `W_o,i W_o,iᵀ` `[H, h, h]`, of the weights in the stream."""
        return output_gram_of(self.output_weight_in_stream) if self.shape.heads else self.mean("v_gram")

    @cached_property
    def value_gram(self) -> torch.Tensor:
        """Return `E[v vᵀ]` `[K, h, h]`, times the mean weight of a token if a norm follows the output projection."""
        gram = self.mean("v_gram")
        return gram if self._post_norm("o") is None else gram * self.mean("o_weight")

    @cached_property
    def down(self) -> torch.Tensor:
        """Return the down projection `[d, I]`."""
        return self._model.read(self.layer, "down")

    @property
    def down_in_stream(self) -> torch.Tensor:
        """Return the down projection `[d, I]`, times the weight of the norm that follows, if there is one."""
        gain = self._post_norm("down")
        return self.down if gain is None else self.down * gain[:, None]

    def mlp_metric(self) -> torch.Tensor | None:
        """Return the root S `[d, d]` of the metric of errors of the MLP's output, or None without gradients."""
        return None if self._gradients is None else self._gradients.root(self.shape.hidden_size)

    def _post_norm(self, role: Role) -> torch.Tensor | None:
        """Return the weight γ `[d]` of the norm between a projection and the residual sum, or None without a norm."""
        family = self._model.family
        if role not in family.post_norms:
            return None
        weight = self._model.source.read(f"{family.layer_prefix(self.layer)}{family.post_norms[role]}.weight")
        return weight.float() + family.norm_offset

    @cached_property
    def down_bias(self) -> torch.Tensor:
        """Return the down projection's bias `[d]`, for models whose MLP has biases."""
        return self._model.read(self.layer, "down", "bias")

    @cached_property
    def attention_unit(self) -> float:
        """Return the factor from squared errors of the attention output to relative ones of the stream.

        It is the mean over tokens of 1/‖·‖²: a few tokens have streams a thousand times as long as all others.
        """
        return self.shape.residual_multiplier**2 * self.mean("attention_inverse").item()

    @cached_property
    def mlp_unit(self) -> float:
        """Return the same factor for the MLP's output."""
        return self.shape.residual_multiplier**2 * self.mean("mlp_inverse").item()

    def score_unit(self, attained: float) -> torch.Tensor:
        """Return the factors `[K]` from squared scores (before scaling) to relative errors of the stream.

        attained is the share of the bound in `attention_effect` that score errors reach: errors independent of the
        values reach Σ a² of the attention weights a; docs/experiments.md has measurements.
        """
        if not self.shape.heads:
            return torch.zeros(0, dtype=torch.float64)
        effect = attained * attention_effect(self.value_gram, self.head_outputs, self.output_gram)
        scale: float = self.rope.attention_factor**2 * self.shape.softmax_scale
        return effect * (self.attention_unit * scale**2)

    @property
    def rope(self) -> Rope:
        """Return the rotation of this layer's heads."""
        return self._model.rope_of(self.layer)

    @property
    def origin(self) -> Json:
        """Return the hashes of this layer's statistics, weights and gradients."""
        request, hashes = self._calibration.request, self._calibration.layers
        gradients = {} if self._gradients is None else {"gradients": self._gradients.hash}
        return {"statistics": hashes[self.layer], "source": request.source.plain(), **gradients}

    @property
    def channels_file(self) -> Path:
        """Return the path of the file with the order of this layer's MLP channels."""
        return self._work.channel_order(self.layer, directed=self._gradients is not None)

    @property
    def kept(self) -> Kept:
        """Return what earlier commands found of this layer's query and key heads."""
        request = {"calibration": self._calibration.sha256, "layer": self.layer, "versions": versions()}
        return Kept(self._work.kept, f"layer-{self.layer:03d}", request)

    def key_ranks(self) -> list[float]:
        ranks: list[float] = effective_rank(torch.linalg.eigvalsh(self.mean("k_gram"))).tolist()
        return ranks


def attention_effect(v_gram: torch.Tensor, head_outputs: torch.Tensor, output_gram: torch.Tensor) -> torch.Tensor:
    """Return the largest effect of a unit of score variance on the residual stream, per KV head `[K]`.

    To first order a score error δ moves head i's output by `Cov_attention(δ, v)`, so by Cauchy-Schwarz its
    square is at most `Var(δ) · Var_attention(v W_o,i)`, and the variance of the values under the attention
    weights is `tr W_o,iᵀ (E[v vᵀ] − E[o_i o_iᵀ]) W_o,i`. The mean over the group's heads.
    """
    kv_heads = len(v_gram)
    spread = v_gram.double().repeat_interleave(len(head_outputs) // kv_heads, 0) - head_outputs
    effect = (spread * output_gram).sum((-1, -2)).clamp_min(0)
    return effect.view(kv_heads, -1).mean(1)
