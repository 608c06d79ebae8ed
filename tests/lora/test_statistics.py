"""Spectra from the factors: known by hand for built matrices, those of the full ΔW's SVD for random ones."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.backend import to_device, to_numpy
from minilora.lora.statistics import (
    effective_rank,
    frobenius_norm,
    projected_norm,
    spectrum,
    stable_rank,
    subspace_similarity,
    update_norm,
)

generators = st.builds(np.random.default_rng, st.integers(0, 2**32 - 1))
sizes = st.integers(1, 12)


def orthonormal(random: np.random.Generator, n: int, k: int) -> np.ndarray:
    """(n, k) with orthonormal columns."""
    return np.linalg.qr(random.normal(size=(n, k)))[0]


def factors(random: np.random.Generator, out: int, inside: int, r: int) -> tuple[np.ndarray, np.ndarray]:
    return random.normal(size=(r, inside)), random.normal(size=(out, r))


# ---------------------------------------------------------------- the spectrum of ΔW


def test_a_matrix_built_from_its_svd_has_just_those_singular_values_and_directions(device):
    """ΔW = 2 · B A with B = U diag(3, 2, ½) and A = Vᵀ: σ = 6, 4, 1."""
    random = np.random.default_rng(0)
    U, V = orthonormal(random, 11, 3), orthonormal(random, 7, 3)
    found = spectrum(to_device(V.T.copy(), device), to_device(U * [3.0, 2.0, 0.5], device), 2.0)
    np.testing.assert_allclose(to_numpy(found.values), [6, 4, 1], rtol=1e-13)
    for directions, expected in ((found.left, U), (found.right, V)):  # up to their signs
        np.testing.assert_allclose(np.abs(to_numpy(directions).T @ expected), np.eye(3), atol=1e-13)
    assert found.rank == 3


@given(random=generators, out=sizes, inside=sizes, r=sizes, scale=st.sampled_from([1.0, -2.5, 1e-8, 3e6]))
def test_the_spectrum_is_that_of_the_full_matrix(random, out, inside, r, scale):
    """Also where the rank exceeds a side of ΔW."""
    A, B = factors(random, out, inside, r)
    found, delta = spectrum(A, B, scale), scale * B @ A
    expected = np.linalg.svd(delta, compute_uv=False)
    count = min(r, out, inside)
    assert found.left.shape == (out, count)
    assert found.right.shape == (inside, count)
    np.testing.assert_allclose(found.values, expected[:count], atol=1e-12 * expected[0])
    np.testing.assert_allclose(found.left * found.values @ found.right.T, delta, atol=1e-12 * expected[0])
    assert np.linalg.norm(found.values) == pytest.approx(update_norm(A, B, scale), rel=1e-9)


@given(random=generators, out=sizes, inside=sizes, r=st.integers(1, 4))
def test_another_factorisation_of_the_same_update_has_the_same_spectrum(random, out, inside, r):
    """B A = (B M)(M⁻¹ A): singular values belong to ΔW, not to its factors."""
    A, B = factors(random, out, inside, r)
    M = orthonormal(random, r, r) * random.uniform(0.5, 2, r)
    other = spectrum(np.linalg.inv(M) @ A, B @ M, 1.0)
    np.testing.assert_allclose(other.values, spectrum(A, B, 1.0).values, rtol=1e-9, atol=1e-12)


def test_float32_factors_are_decomposed_in_float64():
    A, B = factors(np.random.default_rng(0), 9, 8, 3)
    A32, B32 = A.astype(np.float32), B.astype(np.float32)
    expected = np.linalg.svd(B32.astype(np.float64) @ A32.astype(np.float64), compute_uv=False)[:3]
    found = spectrum(A32, B32, 1.0)
    assert found.values.dtype == np.float64
    np.testing.assert_allclose(found.values, expected, rtol=1e-13)


def test_directions_without_a_singular_value_are_not_counted():
    random = np.random.default_rng(0)
    A, B = factors(random, 9, 8, 4)
    A[3] = A[0] - 2 * A[1]
    assert spectrum(A, B, 1.0).rank == 3
    assert spectrum(A, 0 * B, 1.0).rank == 0


# ---------------------------------------------------------------- how many directions count


@pytest.mark.parametrize(
    ("values", "effective", "stable"),
    [
        ([2.0, 2, 2, 2], 4, 4),
        ([5.0, 0, 0], 1, 1),
        ([0.0, 0], 0, 0),
        ([2.0, 1, 1], 2 * math.sqrt(2), 1.5),  # p = ½, ¼, ¼: H = 1.5 ln 2
        ([1e-200, 1e-200], 2, 2),
    ],
)
def test_effective_and_stable_rank_by_hand(values, effective, stable):
    assert effective_rank(np.array(values)) == pytest.approx(effective, abs=1e-12)
    assert stable_rank(np.array(values)) == pytest.approx(stable, abs=1e-12)


@given(values=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20), factor=st.floats(1e-6, 1e6))
def test_ranks_lie_between_one_and_the_count_and_do_not_see_the_scale(values, factor):
    values = np.array(values)
    for rank in (effective_rank, stable_rank):
        assert 1 - 1e-9 <= rank(values) <= len(values) + 1e-9
        assert rank(values * factor) == pytest.approx(rank(values), rel=1e-9)
    assert stable_rank(values) <= effective_rank(values) * len(values)


# ---------------------------------------------------------------- beside the base


def test_the_amplification_of_directions_that_w_has_is_known_by_hand(device):
    """W = Σ w_i u_i v_iᵀ has 0.3 and 0.4 in the directions where ΔW has 5 and 12: ‖ΔW‖ = 13, ‖UᵀWV‖ = 0.5."""
    random = np.random.default_rng(0)
    U, V = orthonormal(random, 2000, 4), orthonormal(random, 7, 4)  # more rows than are taken at a time
    W = U * [0.3, 0.4, 100, 50] @ V.T
    update = spectrum(to_device(V[:, :2].T.copy(), device), to_device(U[:, :2] * [5.0, 12], device), 1.0)
    assert float(np.linalg.norm(to_numpy(update.values))) == pytest.approx(13)
    assert projected_norm(to_device(W, device), update) == pytest.approx(0.5)
    assert frobenius_norm(to_device(W, device)) == pytest.approx(math.sqrt(0.25 + 12500))


def test_a_direction_that_only_rounding_made_does_not_count_in_the_amplification():
    random = np.random.default_rng(0)
    U, V = orthonormal(random, 9, 3), orthonormal(random, 7, 3)
    update = spectrum(V.T, U * [5.0, 12, 0], 1.0)
    assert projected_norm(U * [0.3, 0.4, 100] @ V.T, update) == pytest.approx(0.5)


@given(random=generators, out=sizes, inside=sizes, r=st.integers(1, 4))
def test_what_lies_in_some_directions_is_at_most_all_of_w(random, out, inside, r):
    W = random.normal(size=(out, inside))
    update = spectrum(*factors(random, out, inside, r), 1.0)
    full = np.linalg.svd(update.left * update.values @ update.right.T)
    k = update.rank
    assert projected_norm(W, update) == pytest.approx(np.linalg.norm(full[0][:, :k].T @ W @ full[2][:k].T), rel=1e-6)
    assert projected_norm(W, update) <= frobenius_norm(W) * (1 + 1e-12)
    assert frobenius_norm(W) == pytest.approx(np.linalg.norm(W))


# ---------------------------------------------------------------- two adapters


def test_the_similarity_of_subspaces_that_share_some_axes_is_known_by_hand(device):
    """P = e1 e2 e3, Q = e2 e4 e1: φ(i, j) = |{first i} ∩ {first j}| / min(i, j)."""
    axes = np.eye(6)
    found = subspace_similarity(to_device(axes[:, [0, 1, 2]], device), to_device(axes[:, [1, 3, 0]], device))
    np.testing.assert_allclose(to_numpy(found), [[0, 0, 1], [1, 1 / 2, 1], [1, 1 / 2, 2 / 3]], atol=1e-15)


def test_an_axis_turned_by_an_angle_has_its_squared_cosine():
    angle = 0.3
    found = subspace_similarity(np.eye(4)[:, :1], np.array([[math.cos(angle)], [math.sin(angle)], [0], [0]]))
    assert found[0, 0] == pytest.approx(math.cos(angle) ** 2)


@given(random=generators, n=st.integers(4, 12), k=st.integers(1, 4), m=st.integers(1, 4))
def test_similarity_is_that_of_its_definition_and_blind_to_turns(random, n, k, m):
    P, Q, turn = orthonormal(random, n, k), orthonormal(random, n, m), orthonormal(random, n, n)
    found = subspace_similarity(P, Q)
    for i in range(1, k + 1):
        for j in range(1, m + 1):
            expected = np.linalg.norm(P[:, :i].T @ Q[:, :j]) ** 2 / min(i, j)
            assert found[i - 1, j - 1] == pytest.approx(expected, abs=1e-12)
            assert -1e-12 <= found[i - 1, j - 1] <= 1 + 1e-12
    np.testing.assert_allclose(subspace_similarity(turn @ P, turn @ Q), found, atol=1e-12)
    np.testing.assert_allclose(subspace_similarity(Q, P), found.T, atol=1e-12)
    assert subspace_similarity(P, P)[-1, -1] == pytest.approx(1)


def test_random_directions_have_the_similarity_of_chance():
    """On average max(i, j) / n."""
    random = np.random.default_rng(0)
    found = np.mean(
        [subspace_similarity(orthonormal(random, 40, 3), orthonormal(random, 40, 8)) for _ in range(400)], axis=0
    )
    chance = np.maximum(np.arange(1, 4)[:, None], np.arange(1, 9)) / 40
    np.testing.assert_allclose(found, chance, rtol=0.1)
