import numpy as np
import pytest

from pipelines.sweeps.scaling import fit_power_law, pareto_front


def test_pareto_front_is_what_no_other_point_beats() -> None:
    rng = np.random.default_rng(0)
    points = rng.integers(0, 12, (40, 3)).astype(float)  # with ties and with equal points

    def beats(one: np.ndarray, other: np.ndarray) -> bool:
        return all(one <= other) and any(one < other)

    expected = [not any(beats(other, point) for other in points) for point in points]
    assert 1 < sum(expected) < len(points) / 2
    assert pareto_front(points).tolist() == expected
    assert pareto_front(np.array([[1.0, 2.0], [1.0, 2.0]])).tolist() == [True, True]


def test_power_law_is_found_again() -> None:
    sizes = np.array([88e6, 302e6, 1.1e9, 4.5e9])
    law = fit_power_law(sizes, 0.3 * (sizes / 1e9) ** -0.4 + 0.1)
    assert law is not None
    assert law.exponent == pytest.approx(0.4, rel=1e-3)
    assert law.constant == pytest.approx(0.1, rel=1e-3)
    assert law.scale == pytest.approx(0.3 * (law.reference / 1e9) ** -0.4, rel=1e-3)
    assert law.at(np.array([1e12])) == pytest.approx(0.3 * 1000**-0.4 + 0.1, rel=1e-3)


def test_interval_of_noisy_trials_holds_the_truth_about_as_often_as_it_says() -> None:
    sizes = np.repeat(np.geomspace(1e6, 1e9, 7), 2)
    held = []
    for seed in range(8):
        noise = np.random.default_rng(seed).normal(0, 0.02, len(sizes))
        law = fit_power_law(sizes, 5 * (sizes / 1e6) ** -0.3 * np.exp(noise) + 0.5, seed)
        assert law is not None
        low, high = law.exponent_interval
        assert low < law.exponent < high
        held.append(low <= 0.3 <= high)
    assert sum(held) >= 6


def test_too_few_sizes_give_no_constant_and_then_no_law() -> None:
    sizes = np.array([1e6, 4e6, 9e6])
    law = fit_power_law(sizes, 2 * (sizes / 1e6) ** -0.5)
    assert law is not None
    assert law.constant == 0.0
    assert law.exponent == pytest.approx(0.5, rel=1e-3)
    assert fit_power_law(np.repeat(sizes[:2], 5), np.arange(1.0, 11.0)) is None
