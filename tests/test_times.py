import numpy as np
import pytest
from hypothesis import given, strategies as st
from jaxtyping import TypeCheckError

import eqxldm
from eqxldm.times import check_times

from helpers import ALPHA_BAR, PATHS

TINY = np.finfo(np.float64).eps
ALL_PATHS = PATHS | {
    "zero_terminal": eqxldm.DiscreteVP(eqxldm.rescale_zero_terminal_snr(ALPHA_BAR)),
    "respaced": eqxldm.DiscreteVP(ALPHA_BAR[eqxldm.respace(1000, [10])]),
    "shifted_cosine": eqxldm.CosineVP(0.3),
}
each_path = pytest.mark.parametrize("name", ALL_PATHS)

positive = lambda low, high: st.floats(low, high, allow_subnormal=False)
step_counts = st.integers(1, 200)


def reach(path):
    """The largest noise-to-signal ratio of a path, or 1000 where it has no bound."""
    return min(float(np.exp(-path.logsnr(1.0) / 2)), 1000.0)


def assert_grid(times, steps):
    assert type(times) is np.ndarray and times.dtype == np.float64 and times.shape == (steps + 1,)
    assert times[0] <= 1 and times[-1] == 0 and np.all(np.diff(times) < 0)
    np.testing.assert_array_equal(check_times(times), times)  # what `sample` accepts


def logsnr_error(path, t):
    """How far rounding moves logSNR at `t`: t by eps, its two logarithms, and what they are of.

    A respaced table turns by up to 90 degrees in one step, so alpha near its end is a difference:
    alpha and sigma are exact to eps of 1.
    """
    at = path.coefficients(t)
    slope = np.abs(at.dalpha / at.alpha) + np.abs(at.dsigma / at.sigma)
    of_logs = np.abs(np.log(at.alpha)) + np.abs(np.log(at.sigma))
    of_values = 1 / at.alpha + 1 if isinstance(path, eqxldm.DiscreteVP) else 2
    return 8 * TINY * (t * slope + of_logs + of_values)


@given(step_counts, positive(0.05, 1), positive(0, 0.9))
def test_uniform_times_are_evenly_spaced_from_start_to_end(steps, start, end):
    end = end * start
    times = eqxldm.uniform_times(steps, start, end)
    assert len(times) == steps + 1 and times[0] == start and times[-1] == end
    np.testing.assert_allclose(np.diff(times), (end - start) / steps, atol=4 * TINY)
    assert_grid(eqxldm.uniform_times(steps), steps)
    assert eqxldm.uniform_times(steps)[0] == 1


@given(step_counts, positive(0.01, 100))
def test_shifted_times_descend_from_exactly_one(steps, shift):
    times = eqxldm.shifted_times(steps, shift)
    assert_grid(times, steps)
    assert times[0] == 1


@given(st.integers(1, 300), st.sampled_from(["respace", "leading", "trailing"]))
def test_timestep_times_visit_what_is_kept_from_the_last_to_the_first(count, spacing):
    kept = {
        "respace": eqxldm.linspace_timesteps,
        "leading": eqxldm.leading_timesteps,
        "trailing": eqxldm.trailing_timesteps,
    }[spacing](1000, count)
    times = eqxldm.timestep_times(1000, kept)
    assert_grid(times, count)
    np.testing.assert_array_equal(np.rint(1000 * times[:-1]), kept[::-1] + 1)
    assert spacing == "leading" or count == 1 or times[0] == 1


@given(st.integers(1, 100), positive(0.1, 10))
def test_shift_multiplies_the_odds_of_noise(steps, shift):
    u, t = eqxldm.uniform_times(steps)[1:-1], eqxldm.shifted_times(steps, shift)[1:-1]
    np.testing.assert_allclose(t / (1 - t), shift * u / (1 - u), rtol=1e-10)
    np.testing.assert_allclose(eqxldm.shifted_times(steps, 1.0)[1:-1], u, rtol=4 * TINY)


@given(positive(0.001, 0.999), positive(0.1, 10))
def test_shifting_time_shifts_the_logsnr_of_the_linear_flow(t, shift):
    path = PATHS["linear"]
    shifted = eqxldm.shift_time(np.array(t), shift)
    bound = logsnr_error(path, t) + logsnr_error(path, float(shifted))
    assert path.logsnr(shifted) == pytest.approx(path.logsnr(t) - 2 * np.log(shift), abs=bound)


@given(positive(0, 1), positive(0.1, 10), positive(0.1, 10))
def test_shifts_of_time_are_a_group(t, first, second):
    shift = eqxldm.shift_time
    # d log t' / d log t = s' / (s t' + 1 - t') of the denominators: at most max(1, 1 / s).
    bound = 8 * TINY * (1 + max(1, 1 / second))
    twice = float(shift(shift(np.array(t), first), second))
    assert twice == pytest.approx(float(shift(np.array(t), first * second)), rel=bound)
    back = float(shift(shift(np.array(t), first), 1 / first))
    assert back == pytest.approx(t, rel=8 * TINY * (1 + max(1, first)))
    assert float(shift(np.array(t), 1.0)) == pytest.approx(t, rel=2 * TINY)


@pytest.mark.parametrize("shift", [0.01, 0.1, 0.2, 0.3, 1.7, 3.0, 100.0])
def test_shifting_time_keeps_its_ends_exactly(shift):
    np.testing.assert_array_equal(eqxldm.shift_time(np.array([0.0, 1.0]), shift), [0.0, 1.0])


@each_path
@given(
    steps=st.integers(2, 200),
    low=positive(1e-4, 0.3),
    high=positive(0.4, 0.999),
    rho=positive(1, 10),
)
def test_karras_times_have_the_published_ratios(name, steps, low, high, rho):
    path = ALL_PATHS[name]
    low, high = low * reach(path), high * reach(path)
    times = eqxldm.karras_times(path, steps, low, high, rho)
    assert_grid(times, steps)
    i = np.arange(steps)
    root = high ** (1 / rho) + i / (steps - 1) * (low ** (1 / rho) - high ** (1 / rho))
    t = times[:-1]
    ratio = path.sigma(t) / path.alpha(t)
    # The root rounds to eps of its largest value, and `rho` multiplies that.
    bound = logsnr_error(path, t) + 8 * TINY * rho * (1 + root[0] / root)
    assert np.all(np.abs(ratio / root**rho - 1) <= bound) and np.all(bound < 1e-9)


def test_karras_times_have_the_published_defaults():
    times = eqxldm.karras_times(eqxldm.CosineVP(), 18)
    ratio = np.tan(np.pi / 2 * times)  # what sigma / alpha is on this path
    assert ratio[0] == pytest.approx(80, rel=1e-12) and ratio[17] == pytest.approx(0.002, rel=1e-12)
    expected = (80 ** (1 / 7) + 1 / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert ratio[1] == pytest.approx(expected, rel=1e-12)


@each_path
@given(steps=st.integers(2, 200), low=positive(-8, 0), width=positive(0.1, 12))
def test_logsnr_times_are_evenly_spaced_in_logsnr(name, steps, low, width):
    path = ALL_PATHS[name]
    low = max(low, float(path.logsnr(1.0)))
    times = eqxldm.logsnr_times(path, steps, low, low + width)
    assert_grid(times, steps)
    bound = logsnr_error(path, times[:-1])
    expected = low + width / (steps - 1) * np.arange(steps)
    assert np.all(np.abs(path.logsnr(times[:-1]) - expected) <= bound) and np.all(bound < 1e-9)


@pytest.mark.parametrize("name", ["discrete", "exploding", "respaced"])  # of bounded logSNR
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_grids_may_begin_where_the_path_ends(name, steps):
    path = ALL_PATHS[name]
    ends = [path.sigma(1.0) / path.alpha(1.0), np.exp(-path.logsnr(1.0) / 2)]
    for largest in map(float, ends):
        for rho in (1.0, 3.0, 5.0, 7.0, 9.0):
            times = eqxldm.karras_times(path, steps, 0.01 * largest, largest, rho)
            assert_grid(times, steps)
            assert times[0] == pytest.approx(1, abs=1e-9)
    times = eqxldm.logsnr_times(path, steps, float(path.logsnr(1.0)), 10.0)
    assert_grid(times, steps)
    assert times[0] == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("largest", [2.0, 10.0, 12.0, 13.0, 50.0, 80.0])
def test_karras_times_of_the_exploding_path_begin_at_its_own_end(largest):
    path = eqxldm.VarianceExploding(0.02, largest)
    for sigma_max in (float(path.sigma(1.0)), float(np.exp(-path.logsnr(1.0) / 2))):
        assert_grid(eqxldm.karras_times(path, 10, 0.002, sigma_max), 10)


@each_path
@given(t=st.lists(positive(1e-6, 0.999), min_size=1, max_size=5))
def test_time_at_logsnr_inverts_the_path(name, t):
    path, t = ALL_PATHS[name], np.array(t)
    found = eqxldm.time_at_logsnr(path, path.logsnr(t))
    at = path.coefficients(t)
    slope = 2 * (at.dsigma / at.sigma - at.dalpha / at.alpha)
    # The error of logSNR, over its slope, is the error of time; twice: of t and of what is found.
    bound = 2 * logsnr_error(path, t) / slope + 2 * TINY * t
    assert np.all(np.abs(found - t) <= bound)
    assert np.all(bound < 1e-11)


@each_path
def test_time_at_logsnr_gives_the_nearer_end_beyond_what_the_path_reaches(name):
    path = ALL_PATHS[name]
    assert list(eqxldm.time_at_logsnr(path, np.array([-np.inf, np.inf]))) == [1, 0]
    ends = eqxldm.time_at_logsnr(path, path.logsnr(np.array([0.0, 1.0])))
    assert ends[0] == 0 and ends[1] == pytest.approx(1, abs=1e-12)
    if path.alpha(1.0) > 0:
        assert list(eqxldm.time_at_logsnr(path, path.logsnr(1.0) - np.array([1.0]))) == [1]


LINEAR, EXPLODING = PATHS["linear"], PATHS["exploding"]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: eqxldm.timestep_times(10, np.array([0, 10])), "increase within 0 .. 9"),
        (lambda: eqxldm.timestep_times(10, np.array([3, 3])), "kept must increase within 0 .. 9"),
        (lambda: eqxldm.timestep_times(10, np.array([5, 3])), "kept must increase"),
        (lambda: eqxldm.timestep_times(10, np.array([-1, 3])), "kept must increase"),
        (lambda: eqxldm.timestep_times(10, np.array([], int)), "kept must increase"),
        (lambda: eqxldm.timestep_times(10, np.arange(11)), "kept must increase within 0 .. 9"),
        (lambda: eqxldm.uniform_times(0), "uniform_times: steps must be at least 1, got 0"),
        (lambda: eqxldm.uniform_times(-1), "uniform_times: steps must be at least 1, got -1"),
        (lambda: eqxldm.uniform_times(4, 1.5), "0 <= end < start <= 1, got 1.5 and 0.0"),
        (lambda: eqxldm.uniform_times(4, 0.5, 0.5), "end < start"),
        (lambda: eqxldm.uniform_times(4, 1.0, -0.5), "0 <= end < start <= 1, got 1.0 and -0.5"),
        (lambda: eqxldm.uniform_times(4, np.nan), "0 <= end < start <= 1, got nan"),
        (lambda: eqxldm.shifted_times(0, 2.0), "steps must be at least 1, got 0"),
        (lambda: eqxldm.shifted_times(4, 0.0), "shift must be positive, got 0.0"),
        (lambda: eqxldm.shifted_times(4, float("inf")), "shift must be positive"),
        (lambda: eqxldm.shift_time(np.array(0.5), -1.0), "shift must be positive, got -1.0"),
        (lambda: eqxldm.shift_time(np.array(0.5), np.nan), "shift must be positive, got nan"),
        (lambda: eqxldm.karras_times(LINEAR, 0), "karras_times: steps must be at least 1, got 0"),
        (lambda: eqxldm.karras_times(LINEAR, 4, 2.0, 1.0), "0 < sigma_min < sigma_max .*2.0, 1.0"),
        (lambda: eqxldm.karras_times(LINEAR, 4, 0.0, 1.0), "0 < sigma_min < sigma_max"),
        (lambda: eqxldm.karras_times(LINEAR, 4, np.nan, 1.0), "0 < sigma_min < sigma_max"),
        (lambda: eqxldm.karras_times(LINEAR, 4, rho=0.0), "rho > 0, got 0.002, 80.0 and 0.0"),
        (
            lambda: eqxldm.karras_times(EXPLODING, 4),
            r"karras_times: logSNR .*sigma / alpha = 80\) lies outside .* VarianceExploding reaches"
            r".*sigma / alpha up to 5\)",
        ),
        (
            lambda: eqxldm.karras_times(PATHS["discrete"], 4, sigma_max=200.0),
            r"sigma / alpha = 200\) lies outside .* DiscreteVP reaches.* up to 157",
        ),
        (lambda: eqxldm.logsnr_times(LINEAR, 0), "logsnr_times: steps must be at least 1, got 0"),
        (lambda: eqxldm.logsnr_times(LINEAR, 4, 1.0, 1.0), "low < high, got 1.0 and 1.0"),
        (lambda: eqxldm.logsnr_times(LINEAR, 4, -np.inf, 1.0), "finite low < high, got -inf"),
        (lambda: eqxldm.logsnr_times(LINEAR, 4, 0.0, np.nan), "finite low < high, got 0.0 and nan"),
        (
            lambda: eqxldm.logsnr_times(EXPLODING, 4),
            r"logsnr_times: logSNR -10 .* lies outside .* VarianceExploding reaches, \[-3.219, inf",
        ),
        (lambda: check_times(np.array([1.0])), r"times must be one row .* the shape \(1,\)"),
        (lambda: check_times(np.array([])), r"times must be one row .* the shape \(0,\)"),
        (lambda: check_times(np.ones((2, 2))), r"times must be one row .* the shape \(2, 2\)"),
        (lambda: check_times(np.array([1.5, 0.0])), r"in \[0, 1\], got times\[0\] = 1.5"),
        (lambda: check_times(np.array([1.0, np.nan])), r"in \[0, 1\], got times\[1\] = nan"),
        (lambda: check_times(np.array([1.0, 0.5, 0.6])), r"times\[1\] = 0.5 and times\[2\] = 0.6"),
        (lambda: check_times(np.array([1.0, 0.5, 0.5])), r"times\[1\] = 0.5 and times\[2\] = 0.5"),
        (lambda: check_times(np.array([0.5, 0.5, 0.0])), r"times\[0\] = 0.5 and times\[1\] = 0.5"),
    ],
)
def test_wrong_arguments_say_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "call, name",
    [
        (lambda: eqxldm.uniform_times(10.0), "steps"),
        (lambda: eqxldm.timestep_times(10, np.array([0.0, 1.0])), "kept"),
        (lambda: eqxldm.timestep_times(10, np.array([[0, 1]])), "kept"),
        (lambda: eqxldm.karras_times(ALPHA_BAR, 10), "path"),
    ],
)
def test_arguments_of_a_wrong_type_are_named(call, name):
    with pytest.raises(TypeCheckError, match=f"parameter '{name}'"):
        call()


def test_an_ascending_grid_passes_the_check():
    times = np.array([0.0, 0.25, 1.0])
    np.testing.assert_array_equal(check_times(times), times)


def test_repaint_times_take_every_jump_as_often_as_asked():
    times = eqxldm.repaint_times(20, jump=5, resamplings=3)
    steps = np.diff(times)
    assert (
        times[0] == 1 and times[-1] == 0 and set(np.unique(times)) == set(eqxldm.uniform_times(20))
    )
    np.testing.assert_allclose(steps[steps > 0], 5 / 20)
    assert np.sum(steps > 0) == (20 // 5) * 2 and np.sum(steps < 0) == 20 * 3
    np.testing.assert_array_equal(
        eqxldm.repaint_times(7, jump=3, resamplings=1), eqxldm.uniform_times(7)
    )
    for wrong in ({"jump": 0}, {"resamplings": 0}):
        with pytest.raises(ValueError, match="must be at least 1, got 0"):
            eqxldm.repaint_times(4, **wrong)


@pytest.mark.parametrize("timesteps", [1000, 999, 4000])
def test_respacing_follows_the_running_sum_of_the_published_code(timesteps):
    """Position j is j strides added one by one: `round(j * stride)` differs for many counts."""
    differ = 0
    for count in range(2, timesteps + 1, 1 if timesteps < 2000 else 37):
        stride, position, expected = (timesteps - 1) / (count - 1), 0.0, []
        for _ in range(count):
            expected.append(round(position))
            position += stride
        np.testing.assert_array_equal(eqxldm.respace(timesteps, [count]), expected)
        differ += expected != [round(j * stride) for j in range(count)]
    assert differ > 5
