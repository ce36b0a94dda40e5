"""The written RoPE configuration gives each kept slot its source frequency, as stock transformers computes it."""

import copy

import numpy
import pytest
import torch
from transformers import LlamaConfig, NemotronConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.nemotron.modeling_nemotron import NemotronRotaryEmbedding

from a3cli.errors import A3Error
from a3cli.models.rope import affine_parameters, evenly_spaced, kept_rope_config, read_rope
from tests.conftest import DEFAULT, LINEAR, LLAMA3, LONGROPE, YARN

AFFINE = [[0, 1, 2], [0, 2, 4, 6], [1, 3, 5], [5, 6, 7], [4], [0, 3]]
# Without the attention factor of longrope.
PLAIN_LONGROPE = LONGROPE | {"attention_factor": 1.0}
SCATTERED = [[0, 1, 3], [1, 2, 6, 7], [0, 1, 2, 4, 7]]


def config(rope: dict, head_dim: int = 16) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=256,
        rope_parameters=dict(rope),
    )


def half(rope: dict, *, factor: float = 0.5, head_dim: int = 32) -> NemotronConfig:
    """Return a configuration that rotates half of each head: 8 pairs of a head of 32 dims, and 8 unrotated ones."""
    return NemotronConfig(
        hidden_size=64,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=256,
        rope_parameters={**rope, "partial_rotary_factor": factor},
    )


def partial_tables(written: NemotronConfig, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = NemotronRotaryEmbedding(written)(torch.zeros(1, dtype=torch.float64), torch.arange(length)[None])
    turning = cos.shape[-1] // 2
    return cos[0, :, :turning], sin[0, :, :turning]


def tables(written: LlamaConfig, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin `[length, head_dim/2]` of the stock rotary module."""
    rotary = LlamaRotaryEmbedding(written)
    cos, sin = rotary(torch.zeros(1, dtype=torch.float64), torch.arange(length)[None])
    half = cos.shape[-1] // 2
    return cos[0, :, :half], sin[0, :, :half]


@pytest.mark.parametrize("length", [40, 200])  # below and above the longrope source's original context
@pytest.mark.parametrize("pairs", AFFINE + SCATTERED, ids=str)
@pytest.mark.parametrize("linear_factor", [False, True])
@pytest.mark.parametrize("rope", [DEFAULT, LINEAR, LLAMA3, YARN, LONGROPE], ids=lambda rope: rope["rope_type"])
def test_kept_pairs_turn_as_in_the_source(rope, linear_factor, pairs, length):
    source = config(rope)
    entries = kept_rope_config(read_rope(source), pairs, linear_factor=linear_factor)
    for spelling in (
        entries["rope_parameters"],
        {**(entries["rope_scaling"] or {}), "rope_theta": entries["rope_theta"]},
    ):
        written = config({"rope_type": "default", **spelling}, head_dim=2 * len(pairs))
        for ours, theirs in zip(tables(written, length), tables(source, length), strict=True):
            # frequencies are float32: an error of 1e-7 per radian, times the position
            torch.testing.assert_close(ours, theirs[:, pairs], rtol=0, atol=2e-4)


@pytest.mark.parametrize("length", [40, 200])
@pytest.mark.parametrize("still", [0, 1, 4])
@pytest.mark.parametrize("pairs", [[], *AFFINE, *SCATTERED], ids=str)
@pytest.mark.parametrize("rope", [DEFAULT, LINEAR, LLAMA3, PLAIN_LONGROPE], ids=lambda rope: rope["rope_type"])
def test_kept_pairs_of_heads_that_turn_in_part(rope, pairs, still, length):
    """Stock Nemotron rotates as many dims as there are rotated slots, with the frequencies of the source."""
    if not pairs and not still:
        return
    source = half(rope)
    entries = kept_rope_config(read_rope(source), [*pairs, *[8.0] * still])
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 2 * (len(pairs) + still)}
    assert entries["partial_rotary_factor"] == entries["rope_parameters"]["partial_rotary_factor"]
    for spelling in (("rope_parameters",), ("rope_scaling", "rope_theta", "partial_rotary_factor")):
        said = copy.deepcopy({key: entries[key] for key in spelling})
        written = NemotronConfig(**sizes, max_position_embeddings=256, **said)
        for ours, theirs in zip(partial_tables(written, length), partial_tables(source, length), strict=True):
            assert ours.shape[1] == len(pairs)
            torch.testing.assert_close(ours, theirs[:, pairs], rtol=0, atol=2e-4)


def test_evenly_spaced_slots_of_heads_that_turn_in_part_begin_with_pair_0():
    """Then they need no scaling, which Nemotron in transformers 4.57 does not support."""
    rope = read_rope(half(DEFAULT))
    lines = evenly_spaced(rope, [1.0, 2.0, 4.5, 8.0, 8.0])
    assert len(lines) == 2
    for line in lines:
        assert (line[0], line[3:]) == (0, [8.0, 8.0])
        assert kept_rope_config(rope, line)["rope_scaling"] is None
    assert lines[-1][2] == pytest.approx(7)


def test_scaled_attention_is_refused_where_part_of_a_head_is_passed_through():
    with pytest.raises(A3Error, match="partial_rotary_factor"):
        read_rope(half(YARN))
    assert read_rope(half(YARN, factor=1.0, head_dim=16)).attention_factor > 1


@pytest.mark.parametrize("pairs", AFFINE, ids=str)
@pytest.mark.parametrize("rope", [DEFAULT, LINEAR], ids=lambda rope: rope["rope_type"])
def test_evenly_spaced_pairs_need_no_longrope(rope, pairs):
    """A linear factor is written only if requested."""
    own, asked = (
        kept_rope_config(read_rope(config(rope)), pairs, linear_factor=allowed)["rope_parameters"]
        for allowed in (False, True)
    )
    assert own["rope_type"] == ("longrope" if pairs[0] else rope["rope_type"])
    assert own.get("factor") in (1.0, rope.get("factor"))
    assert asked["rope_type"] == ("linear" if pairs[0] else rope["rope_type"])


def test_longrope_has_mscale_only_where_attention_is_scaled():
    """transformers warns about these keys at every load."""
    plain = kept_rope_config(read_rope(config(DEFAULT)), [0, 1, 3])["rope_parameters"]
    assert plain["attention_factor"] == 1.0
    assert not plain.keys() & {"short_mscale", "long_mscale"}
    for rope in (YARN, LONGROPE):
        scaled = kept_rope_config(read_rope(config(rope)), [0, 1, 3])["rope_parameters"]
        assert scaled["short_mscale"] == scaled["long_mscale"] == scaled["attention_factor"] != 1.0


def test_llama3_scaling_composes_only_from_the_first_pair():
    rope = read_rope(config(LLAMA3))
    assert affine_parameters(rope, [0, 2, 4])["rope_type"] == "llama3"
    assert affine_parameters(rope, [1, 3, 5]) is None


def test_llama3_scaling_composes_at_whole_pairs_only():
    """Between two pairs, the scaled frequency differs from the interpolated one."""
    rope = read_rope(config(LLAMA3))
    assert affine_parameters(rope, [0.0, 1.5, 3.0]) is None
    assert evenly_spaced(rope, [0.0, 1.5, 3.2]) == [[0.0, 2.0, 4.0], [0.0, 3.0, 6.0]]
    assert evenly_spaced(rope, [0.0, 1.0, 2.0, 3.0, 3.5, 4.0]) == [[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]]


@pytest.mark.parametrize("count", range(2, 8))
def test_evenly_spaced_slots_may_span_all_pairs(count):
    """This holds despite rounding of the last one."""
    last = len(read_rope(config(DEFAULT)).short) - 1
    lines = evenly_spaced(read_rope(config(DEFAULT)), [0.0] * (count - 1) + [1.0])
    assert lines[-1][0] == 0
    assert last - 1e-9 < lines[-1][-1] <= last


@pytest.mark.parametrize("seed", range(20))
def test_the_nearest_line_is_not_lost_to_rounding(seed):
    rope = read_rope(config(DEFAULT))
    slots = torch.rand(5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).mul(7).sort().values
    step, start = numpy.polyfit(range(5), slots.numpy(), 1)
    start = min(max(start, 0.0), 7 - 4 * step)
    lines = evenly_spaced(rope, slots.tolist(), linear_factor=True)
    from_zero = evenly_spaced(rope, slots.tolist())
    assert lines[-len(from_zero) :] == from_zero
    assert all(line[0] == 0 for line in from_zero)
    assert len(lines) - len(from_zero) == (1 if start >= 0 else 0)
    if start >= 0:
        assert lines[0] == pytest.approx([start + j * step for j in range(5)], abs=1e-9)


@pytest.mark.parametrize("rope", [YARN, LONGROPE], ids=lambda rope: rope["rope_type"])
def test_index_dependent_scaling_never_composes(rope):
    assert affine_parameters(read_rope(config(rope)), [0, 1, 2]) is None


def test_all_pairs_of_a_default_rope_stay_default():
    entries = kept_rope_config(read_rope(config(DEFAULT)), list(range(8)))
    assert entries["rope_parameters"] == DEFAULT
    assert entries["rope_scaling"] is None


def test_longrope_switches_where_4_57_looks_for_it():
    """4.57 reads the original context at the top level only; without it, 4.57 would switch at the whole context."""
    for rope, original in ((LONGROPE, 64), (DEFAULT, 256)):
        assert kept_rope_config(read_rope(config(rope)), [0, 1, 3])["original_max_position_embeddings"] == original


def test_dynamic_rope_is_refused():
    with pytest.raises(A3Error, match="dynamic"):
        read_rope(config({"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}))
