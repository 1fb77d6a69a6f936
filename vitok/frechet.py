"""Fréchet distances between sets of images, seen through the features of a network.

The distance (Heusel et al., arXiv 1706.08500) compares the means and covariances of features: with
Inception-v3 it is FID, with DINO features FDD; `r` before the name says that reconstructions are
compared with their sources, `g` that generated images are compared with real ones.

Moments are summed exactly. Features are rounded to multiples of 2^-16, far below what moves a
distance, and their sums and products are added as integers: so they are the same, to the last bit,
for any number of workers, any batches and any order.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

_FRACTION_BITS = 16
_MAX_FEATURE = 2**10
_EXACT = 2**53  # float64 holds every integer up to here
_MAX_SQUARES = 2**62  # int64, with room for a sum of two

# Heusel et al. recommend at least so many samples; tables of papers use 50,000.
ENOUGH_SAMPLES = 10_000
_ARRAYS = ("mu", "sigma", "count", "extractor")


@dataclass(frozen=True, eq=False)
class Gaussian:
    """What a Fréchet distance knows of a set of images.

    Attributes:
        mean: [D] float64.
        covariance: [D, D] float64, unbiased.
        count: images behind it; 0 where a file does not say.
        extractor: sha256 (hex) of the network whose features they are; empty where a file does not
            say.
    """

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]
    count: int = 0
    extractor: str = ""

    def __post_init__(self) -> None:
        dim = len(self.mean)
        if self.mean.shape != (dim,) or self.covariance.shape != (dim, dim):
            raise ValueError(
                f"a mean of shape {self.mean.shape} and a covariance of {self.covariance.shape} do "
                "not belong together; give [D] and [D, D]"
            )
        if not (np.isfinite(self.mean).all() and np.isfinite(self.covariance).all()):
            raise ValueError("statistics hold values that are not finite; compute them again")

    def save(self, path: Path) -> None:
        """Write an .npz file; its arrays `mu` and `sigma` are named as other packages read them."""
        with path.open("wb") as file:
            np.savez(
                file,
                mu=self.mean,
                sigma=self.covariance,
                count=np.array(self.count),
                extractor=np.array(self.extractor),
            )

    @classmethod
    def load(cls, path: str | Path) -> "Gaussian":
        """Read what `save` wrote, or the `mu` and `sigma` of another package.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no .npz file, or holds no statistics.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"no statistics at {path}; give an .npz file with mu and sigma, such as an "
                "evaluation writes"
            )
        try:
            with np.load(path, allow_pickle=False) as file:
                found = {name: file[name] for name in _ARRAYS if name in file.files}
                names = file.files
        except (ValueError, OSError, EOFError, AttributeError) as error:
            raise ValueError(f"{path} is no readable .npz file: {error}") from error
        if not {"mu", "sigma"} <= found.keys():
            raise ValueError(f"{path} holds no mu and sigma, only {', '.join(names) or 'nothing'}")
        return cls(
            mean=found["mu"].astype(np.float64),
            covariance=found["sigma"].astype(np.float64),
            count=int(found.get("count", 0)),
            extractor=str(found.get("extractor", "")),
        )


class FeatureMoments:
    """Exact sums of features, from which their Gaussian follows; added and merged in any order.

    Args:
        dim: D, numbers that describe an image.

    Attributes:
        count: images so far.
    """

    def __init__(self, dim: int) -> None:
        self.count = 0
        self._sum = np.zeros(dim, np.int64)
        self._products = np.zeros((dim, dim), np.int64)

    @classmethod
    def of(cls, batches: Iterable[ArrayLike]) -> "FeatureMoments":
        """Sum over batches of features [N, D].

        Raises:
            ValueError: there are none.
        """
        moments: FeatureMoments | None = None
        for batch in batches:
            features = np.asarray(batch)
            moments = cls(features.shape[1]) if moments is None else moments
            moments.add(features)
        if moments is None:
            raise ValueError("there are no features to describe; give at least a batch of them")
        return moments

    def add(self, features: ArrayLike) -> None:
        """Take in the features [N, D] of N images.

        Raises:
            ValueError: another D, or a feature that is not finite or of 1024 and more.
        """
        values = np.asarray(features, np.float64)
        if values.ndim != 2 or values.shape[1] != len(self._sum):
            raise ValueError(f"features of shape {values.shape} are not [N, {len(self._sum)}]")
        peak = np.abs(values).max(initial=0.0)
        if not peak < _MAX_FEATURE:  # which NaN is not either
            raise ValueError(
                f"a feature of {peak} is not below {_MAX_FEATURE}; look at the images and the "
                "network that it is of"
            )
        levels = np.rint(values * 2**_FRACTION_BITS)
        # Float64 multiplies fast, and exactly as long as no sum leaves its integers.
        rows = int(_EXACT // max(1.0, peak * 2**_FRACTION_BITS) ** 2)
        for start in range(0, len(levels), max(1, rows)):
            part = levels[start : start + max(1, rows)]
            self._add(len(part), part.sum(axis=0), part.T @ part)

    def merge(self, other: "FeatureMoments") -> None:
        """Take in what another has summed."""
        self._add(other.count, other._sum, other._products)

    def gaussian(self, extractor: str = "") -> Gaussian:
        """Return mean and unbiased covariance.

        Args:
            extractor: digest of the network, as `Gaussian` notes it.

        Raises:
            ValueError: there are fewer than two images.
        """
        if self.count < 2:
            raise ValueError(f"{self.count} images have no covariance; give at least 2")
        # Around the integer next to the mean: still exact, as int64 wraps and the result fits.
        center = np.rint(self._sum / self.count).astype(np.int64)
        cross = np.outer(center, self._sum)
        products = self._products - cross - cross.T + self.count * np.outer(center, center)
        rest = (self._sum - self.count * center).astype(np.float64)
        scatter = products.astype(np.float64) - np.outer(rest, rest) / self.count
        return Gaussian(
            mean=(center + rest / self.count) / 2**_FRACTION_BITS,
            covariance=scatter / (self.count - 1) / 4**_FRACTION_BITS,
            count=self.count,
            extractor=extractor,
        )

    def _add(self, count: int, total: NDArray[Any], products: NDArray[Any]) -> None:
        # No product of two features exceeds the larger of their squares.
        squares = self._products.diagonal().astype(np.float64) + products.diagonal()
        if squares.max(initial=0.0) > _MAX_SQUARES:
            raise ValueError(
                f"the squares of {self.count + count} features add up to more than int64 holds; "
                "give fewer images, or scale the features down"
            )
        self.count += count
        self._sum += total.astype(np.int64)
        self._products += products.astype(np.int64)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Return |mean_a - mean_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2), in float64.

    With A = L L^T and B = M M^T from their eigenvalues, the last trace is that of the root of
    X X^T, X = L^T M: symmetric, so that its eigenvalues are real, and free of the directions in
    which A and B have nothing but rounding noise. scipy.linalg.sqrtm(A B), which the usual packages
    take, is of a matrix that is not symmetric, and fails with fewer images than features.

    Raises:
        ValueError: the statistics are of different networks.
    """
    if len(a.mean) != len(b.mean):
        raise ValueError(
            f"statistics of {len(a.mean)} and of {len(b.mean)} features are of different networks; "
            "compute them with the same one"
        )
    if a.extractor and b.extractor and a.extractor != b.extractor:
        raise ValueError(
            f"statistics of the networks {a.extractor[:12]}... and {b.extractor[:12]}... cannot be "
            "compared; compute both with the same weights"
        )
    cross = _factor(a.covariance).T @ _factor(b.covariance)
    squares = cross @ cross.T if cross.shape[0] <= cross.shape[1] else cross.T @ cross
    overlap = np.sqrt(np.linalg.eigvalsh(squares).clip(min=0))
    shift = a.mean - b.mean
    traces = np.trace(a.covariance) + np.trace(b.covariance)
    return max(0.0, float(shift @ shift + traces - 2 * overlap.sum()))


def few_samples(count: int, dim: int) -> str:
    """Say why a distance of so many images means little; empty if it does mean something.

    Args:
        count: of the smaller set; 0 if it is not known.
        dim: features of an image.
    """
    if count == 0 or count >= max(ENOUGH_SAMPLES, dim + 1):
        return ""
    known = f"{count:,} images for {dim:,} features"
    if count <= dim:
        return (
            f"{known}: fewer images than features leave the covariance singular, and the distance "
            f"far too large; take at least {ENOUGH_SAMPLES:,}"
        )
    return (
        f"{known}: below {ENOUGH_SAMPLES:,} images Fréchet distances are biased upwards; compare "
        "one only with others of the same images"
    )


def _factor(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return L [D, rank] with L L^T = covariance."""
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    real = values > len(values) * np.finfo(np.float64).eps * values.max()
    return vectors[:, real] * np.sqrt(values[real])
