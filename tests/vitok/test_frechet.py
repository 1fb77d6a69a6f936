from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vitok.frechet import FeatureMoments, Gaussian, few_samples, frechet_distance


def features_of(count: int, dim: int, seed: int = 0) -> np.ndarray:
    """Draw features like those behind a ReLU: correlated, not negative, far from centred."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(count, dim)) @ rng.normal(size=(dim, dim)) / dim**0.5
    return np.maximum(mixed + 2.0, 0).astype(np.float32)


def gaussian_of(features: np.ndarray) -> Gaussian:
    return FeatureMoments.of([features]).gaussian()


def by_root_of_the_product(features_a: np.ndarray, features_b: np.ndarray) -> float:
    """Follow pytorch-fid's fid_score.py and clean-fid's fid_from_feats.

    Both take numpy's mean and unbiased covariance, and the trace of scipy's root of the product;
    where that is not finite, of the product of covariances with 1e-6 more on their diagonals.
    """
    mean_a, mean_b = features_a.mean(axis=0), features_b.mean(axis=0)
    cov_a, cov_b = (np.cov(x, rowvar=False) for x in (features_a, features_b))
    root = scipy.linalg.sqrtm(cov_a @ cov_b)
    if not np.isfinite(root).all():
        more = 1e-6 * np.eye(len(cov_a))
        root = scipy.linalg.sqrtm((cov_a + more) @ (cov_b + more))
    assert np.abs(root.diagonal().imag).max() < 1e-3
    shift = mean_a - mean_b
    return shift @ shift + np.trace(cov_a) + np.trace(cov_b) - 2 * np.trace(root.real)


def by_eigenvalues_of_the_product(features_a: np.ndarray, features_b: np.ndarray) -> float:
    """Follow torch-fidelity's metric_fid.py, and torchmetrics: no root of a matrix."""
    shift = features_a.mean(axis=0) - features_b.mean(axis=0)
    cov_a, cov_b = (np.cov(x, rowvar=False) for x in (features_a, features_b))
    overlap = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).astype(complex)).real.sum()
    return shift @ shift + np.trace(cov_a) + np.trace(cov_b) - 2 * overlap


def test_moments_are_those_of_numpy() -> None:
    features = features_of(500, 30)
    found = gaussian_of(features)
    assert found.count == 500
    np.testing.assert_allclose(found.mean, features.astype(np.float64).mean(0), atol=2**-16)
    expected = np.cov(features.astype(np.float64), rowvar=False)
    np.testing.assert_allclose(found.covariance, expected, atol=1e-5)


def test_features_on_the_grid_lose_nothing() -> None:
    """What remains is the rounding of one division, also far from zero."""
    rng = np.random.default_rng(0)
    levels = rng.integers(-50, 50, size=(300, 8)) + 2**25
    found = gaussian_of(levels / 2**16)
    np.testing.assert_allclose(found.mean, levels.mean(0) / 2**16, rtol=1e-15)
    expected = np.cov(levels - 2**25, rowvar=False) / 2**32
    np.testing.assert_allclose(found.covariance, expected, rtol=1e-12)


def test_sums_are_the_same_to_the_last_bit_for_any_order_batches_and_workers() -> None:
    features = features_of(401, 24)
    features[7] *= 40  # another batch of products that stays exact
    whole = gaussian_of(features)
    order = np.random.default_rng(1).permutation(len(features))
    for parts in (1, 2, 4, 401):
        workers = [FeatureMoments.of([part]) for part in np.array_split(features[order], parts)]
        merged = workers.pop()
        for other in workers:
            merged.merge(other)
        found = merged.gaussian()
        assert found.count == 401
        np.testing.assert_array_equal(found.mean, whole.mean)
        np.testing.assert_array_equal(found.covariance, whole.covariance)
    floats = [x.T @ x for x in (features.astype(np.float64), features[order].astype(np.float64))]
    assert (floats[0] != floats[1]).any(), "plain sums do depend on the order"


@settings(max_examples=40, deadline=None)
@given(
    dim=st.integers(2, 40),
    more=st.tuples(st.integers(1, 100), st.integers(1, 100)),
    scale=st.floats(0.1, 10),
    seed=st.integers(0, 2**32 - 1),
)
def test_distance_is_that_of_the_packages_that_papers_use(
    dim: int, more: tuple[int, int], scale: float, seed: int
) -> None:
    """In float64 and on the grid of the exact sums, so that nothing but the arithmetic differs."""
    a = np.rint(features_of(dim + more[0], dim, seed) * 2**16) / 2**16
    b = np.rint(features_of(dim + more[1], dim, seed + 1) * scale * 2**16) / 2**16
    found = frechet_distance(gaussian_of(a), gaussian_of(b))
    for published in (by_root_of_the_product, by_eigenvalues_of_the_product):
        # What is nearly singular has a root of half as many digits.
        assert found == pytest.approx(published(a, b), rel=1e-6), published.__name__
    assert found > 0.01


def test_known_gaussians_have_the_distance_that_follows_by_hand() -> None:
    """Diagonal covariances: |m|^2 + sum (sqrt a - sqrt b)^2."""
    a = Gaussian(np.zeros(3), np.diag([1.0, 4.0, 9.0]))
    b = Gaussian(np.array([1.0, 2.0, 2.0]), np.diag([4.0, 4.0, 1.0]))
    assert frechet_distance(a, b) == pytest.approx(9 + 1 + 0 + 4, rel=1e-12)
    turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))
    turned = (Gaussian(turn @ x.mean, turn @ x.covariance @ turn.T) for x in (a, b))
    assert frechet_distance(*turned) == pytest.approx(14, rel=1e-12)


@settings(max_examples=20, deadline=None)
@given(count=st.integers(2, 150), dim=st.integers(1, 64), seed=st.integers(0, 2**32 - 1))
@example(count=30, dim=64, seed=0)
def test_distance_to_itself_is_0_and_it_is_symmetric(count: int, dim: int, seed: int) -> None:
    """Also with fewer images than features, where sqrtm fails."""
    a, b = (gaussian_of(features_of(count, dim, seed + i)) for i in range(2))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert frechet_distance(a, b) > 1e-4


def test_moments_refuse_what_they_cannot_sum() -> None:
    moments = FeatureMoments(4)
    for bad, complaint in (
        (np.ones((2, 5)), r"shape \(2, 5\) are not \[N, 4\]"),
        (np.full((2, 4), np.nan), "nan is not below 1024"),
        (np.full((2, 4), 1024.0), "1024.0 is not below 1024"),
    ):
        with pytest.raises(ValueError, match=complaint):
            moments.add(bad)
    moments.add(np.ones((1, 4)))
    assert moments.count == 1
    with pytest.raises(ValueError, match="1 images have no covariance"):
        moments.gaussian()
    with pytest.raises(ValueError, match="no features to describe"):
        FeatureMoments.of([])


def test_moments_that_would_overflow_are_refused() -> None:
    moments = FeatureMoments.of([np.full((512, 2), 1023.0)])
    with pytest.raises(ValueError, match="add up to more than int64 holds"):
        for _ in range(12):
            moments.merge(moments)


def test_statistics_survive_a_file(tmp_path: Path) -> None:
    features = features_of(50, 6)
    written = FeatureMoments.of([features]).gaussian("d" * 64)
    written.save(tmp_path / "statistics.npz")
    read = Gaussian.load(tmp_path / "statistics.npz")
    np.testing.assert_array_equal(read.mean, written.mean)
    np.testing.assert_array_equal(read.covariance, written.covariance)
    assert (read.count, read.extractor) == (50, "d" * 64)
    with np.load(tmp_path / "statistics.npz", allow_pickle=False) as file:
        assert {"mu", "sigma"} <= set(file.files), "as other packages look for them"


def test_statistics_of_other_packages_are_read(tmp_path: Path) -> None:
    mean, covariance = np.arange(3.0, dtype=np.float32), np.eye(3)
    np.savez(tmp_path / "theirs.npz", mu=mean, sigma=covariance, arr_0=np.zeros((2, 4, 4, 3)))
    found = Gaussian.load(tmp_path / "theirs.npz")
    assert (found.count, found.extractor) == (0, "")
    assert found.mean.dtype == np.float64
    ours = Gaussian(np.zeros(3), np.eye(3), 100, "d" * 64)
    assert frechet_distance(found, ours) == pytest.approx(5)


def no_file(path: Path) -> None:
    path.unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("write", "error", "complaint"),
    [
        (no_file, FileNotFoundError, "no statistics at"),
        (lambda path: path.write_bytes(b"text"), ValueError, "no readable .npz"),
        (lambda path: np.savez(path, other=np.ones(3)), ValueError, "no mu and sigma, only other"),
        (
            lambda path: np.savez(path, mu=np.array([{}], dtype=object), sigma=np.eye(1)),
            ValueError,
            "no readable .npz",
        ),
        (
            lambda path: np.savez(path, mu=np.ones(2), sigma=np.eye(3)),
            ValueError,
            "do not belong together",
        ),
        (
            lambda path: np.savez(path, mu=np.ones(2), sigma=np.full((2, 2), np.inf)),
            ValueError,
            "not finite",
        ),
    ],
)
def test_files_that_hold_no_statistics_are_named(
    write: Callable[[Path], object], error: type[Exception], complaint: str, tmp_path: Path
) -> None:
    path = tmp_path / "statistics.npz"
    write(path)
    with pytest.raises(error, match=complaint):
        Gaussian.load(path)


def test_statistics_of_different_networks_are_not_compared() -> None:
    a = Gaussian(np.zeros(2), np.eye(2), 10, "a" * 64)
    with pytest.raises(ValueError, match="networks aaaaaaaaaaaa... and bbbbbbbbbbbb... cannot"):
        frechet_distance(a, Gaussian(np.zeros(2), np.eye(2), 10, "b" * 64))
    with pytest.raises(ValueError, match="statistics of 2 and of 3 features"):
        frechet_distance(a, Gaussian(np.zeros(3), np.eye(3)))


def test_few_samples_say_both_numbers() -> None:
    assert few_samples(50_000, 2048) == ""
    assert few_samples(0, 2048) == "", "a file that does not say"
    assert few_samples(800, 2048).startswith("800 images for 2,048 features: fewer images than")
    assert "biased upwards" in few_samples(5000, 2048)
