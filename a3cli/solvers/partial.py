"""A³-QK with partial RoPE: real-linear maps, real scores.

RoPE rotates the first R pairs, dims `(p, p + R)`; the other `n = h − 2R` dims are not rotated. A band never holds both,
since no frequency lies between them. The unrotated dims are A³-QK without RoPE, so Theorem A³-QK (`solvers/qk.py`)
solves them, two real dims per slot.

Then every slot may mix every dim, which is more general than complex maps of pairs: an unrotated dim needs no partner.
A map is complex, `M` `[h, S]`, and slot s of a head `x` is the pair `z̃_s = (Mᴴ x)_s`, any two real combinations of its
dims; its frequency is φ_s, which is 0 for unrotated slots. In the coordinates `w = T x`, `T` unitary,

    w = ((x_p + i·x_{p+R})/√2, (x_p − i·x_{p+R})/√2, the unrotated dims),

RoPE is diagonal with frequencies (θ, −θ, 0), a slot is two with frequencies φ and −φ, and the real score is the one
that `solvers/slots.py` computes from complex coordinates. So its alternation minimises the error of real scores.
"""

from dataclasses import replace

import torch

from a3cli.solvers.qk import solve_qk, sum_over_group
from a3cli.solvers.rope import Band, Distances, PairGrams, band_maps, pair_grams
from a3cli.solvers.slots import HeadStatistics, SlotMaps, SlotProblem


def coordinates(head_dim: int, turning: int) -> torch.Tensor:
    """Return the unitary `T` `[h, h]` of `w = T x`."""
    basis = torch.eye(head_dim, dtype=torch.complex128)
    first, second = basis[:turning], 1j * basis[turning : 2 * turning]
    return torch.cat([(first + second) / 2**0.5, (first - second) / 2**0.5, basis[2 * turning :]])


def partial_statistics(
    q_gram: torch.Tensor, k_gram: torch.Tensor, k_mean: torch.Tensor, turning: int
) -> HeadStatistics:
    """Return the statistics of `w`, from real Gram matrices `[H, h, h]`, `[K, h, h]` and key means `[K, h]`.

    The queries' Gram is doubled, so that losses are twice those of real scores, about as those of complex scores are.
    """
    change = coordinates(k_gram.shape[-1], turning)
    queries = sum_over_group(q_gram, len(k_gram)).to(change)
    keys = k_gram.to(change)
    return HeadStatistics(2 * change @ queries @ change.mH, change @ keys @ change.mH, k_mean.to(change) @ change.mT)


def partial_grams(
    q_gram: torch.Tensor,
    k_gram: torch.Tensor,
    k_mean: torch.Tensor,
    constancy: torch.Tensor,
    *,
    centring: float,
    floor: float,
) -> PairGrams:
    """Return `pair_grams` of the rotated pairs, with `constancy` `[R, R]`, and the theorem for the unrotated dims."""
    turned, passed = slice(0, 2 * len(constancy)), slice(2 * len(constancy), None)
    grams = pair_grams(
        q_gram[:, turned, turned], k_gram[:, turned, turned], k_mean[:, turned], constancy, centring=centring
    )
    mean = k_mean[:, passed].double()
    keys = k_gram[:, passed, passed].double() - centring * mean[:, :, None] * mean[:, None, :]
    return replace(grams, still=solve_qk(q_gram[:, passed, passed], keys, floor=floor))


def key_start(grams: PairGrams, bands: list[Band], *, floor: float) -> torch.Tensor:
    """Return keys' maps `[K, h, S]` of bands, rotated pairs first; the last band is that of the unrotated dims."""
    assert grams.still is not None
    turned = band_maps(grams, bands[:-1], floor=floor)[1]
    first, second = grams.still.shared_map[..., : 2 * bands[-1].rank].chunk(2, -1)
    passed = torch.complex(first, -second)
    maps = torch.zeros(len(passed), 2 * turned.shape[1] + passed.shape[1], turned.shape[2] + passed.shape[2]).to(turned)
    maps[:, : 2 * turned.shape[1], : turned.shape[2]] = torch.cat([turned, -1j * turned], 1)
    maps[:, 2 * turned.shape[1] :, turned.shape[2] :] = passed
    return maps


class PartialProblem:
    """`SlotProblem` for maps `[K, h, S]` of heads `x`; heads are `partial_statistics`, pairs the rotated ones `[R]`."""

    def __init__(
        self,
        heads: HeadStatistics,
        pairs: torch.Tensor,
        slots: torch.Tensor,
        distances: Distances,
        *,
        centring: float,
        floor: float,
    ) -> None:
        head_dim = heads.keys.shape[-1]
        still = pairs.new_zeros(head_dim - 2 * len(pairs))
        self._change = coordinates(head_dim, len(pairs))
        self._problem = SlotProblem(
            heads,
            torch.cat([pairs, -pairs, still]),
            torch.cat([slots, -slots]),
            distances,
            centring=centring,
            floor=floor,
        )

    def solve(self, key: torch.Tensor) -> SlotMaps:
        """Alternate from the given keys' maps `[K, h, S]`. No half-step increases the loss."""
        found = self._problem.solve(self._doubled(key))
        return SlotMaps(self._halved(found.query), self._halved(found.key), found.loss)

    def loss(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Return the loss `[K]` of maps `[K, h, S]`: twice the squared error of real scores."""
        return self._problem.loss(self._doubled(query), self._doubled(key))

    def _doubled(self, maps: torch.Tensor) -> torch.Tensor:
        """Return the maps of `w`, `[K, h, 2S]`: each slot and its conjugate."""
        return self._change @ torch.cat([maps, maps.conj()], -1) / 2**0.5

    def _halved(self, maps: torch.Tensor) -> torch.Tensor:
        return 2**0.5 * self._change.mH @ maps[..., : maps.shape[-1] // 2]


def complex_columns(maps: torch.Tensor) -> torch.Tensor:
    """Return the complex `M` `[..., h, S]` of `real_columns`, from real maps `[..., h, 2S]`."""
    real, imaginary = maps.chunk(2, -1)
    return torch.complex(real, -imaginary)


def real_columns(maps: torch.Tensor) -> torch.Tensor:
    """Return `z̃ = Mᴴ x`, `M` `[..., h, S]`, as a real matrix `[..., h, 2S]`: real parts, then imaginary ones."""
    return torch.cat([maps.real, -maps.imag], -1)
