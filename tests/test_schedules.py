import numpy as np
import pytest
from hypothesis import given, strategies as st

import eqxldm

from helpers import ALPHA_BAR, LINEAR_BETAS, reference

TINY = np.finfo(np.float64).eps


@st.composite
def sections(draw):
    """A number of timesteps and, for each of a few sections, how many of its own it keeps."""
    count = draw(st.integers(1, 4))
    timesteps = draw(st.integers(count, 300))
    sizes = [timesteps // count + (k < timesteps % count) for k in range(count)]
    return timesteps, sizes, [draw(st.integers(1, size)) for size in sizes]


def test_linear_tables_equal_reference():
    expected = reference("schedule_linear_1000")
    # The reference's betas were taken back from its alpha_bar: absolute rounding near 1.
    np.testing.assert_allclose(LINEAR_BETAS, expected["betas"], atol=2 * TINY)
    # A product of 1000 rounded factors.
    np.testing.assert_allclose(ALPHA_BAR, expected["alphas_cumprod"], rtol=1000 * TINY)


def test_cosine_alpha_bar_is_the_cosine_until_beta_is_clipped():
    betas = eqxldm.cosine_betas(1000)
    i = np.flatnonzero(betas < 0.999)
    f = np.cos(np.pi / 2 * (np.arange(1001) / 1000 + 0.008) / 1.008) ** 2
    alpha_bar = eqxldm.alpha_bar_from_betas(betas)
    assert len(i) == 999
    np.testing.assert_allclose(alpha_bar[i], f[i + 1] / f[0], rtol=1e-10)


@given(st.lists(st.floats(1e-4, 0.5), min_size=1, max_size=30))
def test_betas_invert_alpha_bar(betas):
    recovered = eqxldm.betas_from_alpha_bar(eqxldm.alpha_bar_from_betas(np.array(betas)))
    # 1 - (a ratio near 1): the error is absolute.
    np.testing.assert_allclose(recovered, betas, atol=4 * TINY)


def test_respaced_betas_keep_alpha_bar():
    kept = ALPHA_BAR[eqxldm.respace(1000, [25])]
    again = eqxldm.alpha_bar_from_betas(eqxldm.betas_from_alpha_bar(kept))
    np.testing.assert_allclose(again, kept, rtol=100 * TINY)


@given(sections())
def test_respace_keeps_what_each_section_asks(case):
    timesteps, sizes, counts = case
    kept = eqxldm.respace(timesteps, counts)
    assert np.all(np.diff(kept) > 0)
    start = 0
    for size, count in zip(sizes, counts, strict=True):
        own = kept[(kept >= start) & (kept < start + size)]
        assert len(own) == count
        assert own[0] == start
        if count > 1:
            assert own[-1] == start + size - 1
            spacing = (size - 1) / (count - 1)
            assert np.all(np.abs(np.diff(own) - spacing) <= 1)
        start += size
    assert start == timesteps


@given(st.integers(1, 300))
def test_respace_of_everything_is_everything(timesteps):
    np.testing.assert_array_equal(eqxldm.respace(timesteps, [timesteps]), np.arange(timesteps))


@given(st.integers(1, 300), st.integers(1, 20))
def test_stride_starts_at_zero_with_one_whole_step(timesteps, step):
    count = len(range(0, timesteps, step))
    kept = eqxldm.stride(timesteps, count)
    assert kept[0] == 0 and len(kept) == count and kept[-1] < timesteps
    assert len(set(np.diff(kept))) <= 1


def test_respacings_equal_reference():
    ddpm, ddim = reference("ddpm_linear_1000_respaced25"), reference("ddim_linear_1000_ddim20_eta0")
    np.testing.assert_array_equal(eqxldm.respace(1000, [25]), np.sort(ddpm["timesteps"]))
    np.testing.assert_array_equal(eqxldm.stride(1000, 20), np.sort(ddim["timesteps"]))


@given(st.integers(1, 300), st.floats(0.1, 10))
def test_grids_descend_from_noise_to_data(steps, shift):
    kept = eqxldm.respace(1000, [steps])
    for times in (
        eqxldm.uniform_times(steps),
        eqxldm.shifted_times(steps, shift),
        eqxldm.timestep_times(1000, kept),
    ):
        assert len(times) == steps + 1 and times[-1] == 0 and np.all(np.diff(times) < 0)
        assert times[0] == pytest.approx((kept[-1] + 1) / 1000 if times[0] < 0.9 else 1.0)


@given(st.integers(1, 100), st.floats(0.1, 10))
def test_shift_multiplies_the_odds_of_noise(steps, shift):
    u, t = eqxldm.uniform_times(steps)[1:-1], eqxldm.shifted_times(steps, shift)[1:-1]
    np.testing.assert_allclose(t / (1 - t), shift * u / (1 - u), rtol=1e-10)
    np.testing.assert_allclose(eqxldm.shifted_times(steps, 1.0)[1:-1], u, rtol=4 * TINY)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: eqxldm.linear_betas(0), "timesteps must be at least 1, got 0"),
        (lambda: eqxldm.linear_betas(10, 0.0, 0.02), "strictly between 0 and 1"),
        (lambda: eqxldm.cosine_betas(0), "timesteps must be at least 1"),
        (lambda: eqxldm.alpha_bar_from_betas(np.array([0.1, 1.0])), "strictly between 0 and 1"),
        (lambda: eqxldm.alpha_bar_from_betas(np.array([0.1, np.nan])), "strictly between 0 and 1"),
        (lambda: eqxldm.betas_from_alpha_bar(np.array([0.5, 0.5])), "strictly decrease"),
        (lambda: eqxldm.betas_from_alpha_bar(np.array([])), "non-empty"),
        (lambda: eqxldm.respace(10, []), "need 1 to 10 counts, got 0"),
        (lambda: eqxldm.respace(10, [3, 6]), "cannot keep 6 of the 5 timesteps of section 1"),
        (lambda: eqxldm.respace(10, [0]), "cannot keep 0 of the 10"),
        (lambda: eqxldm.stride(10, 6), "no whole stride keeps 6 of 10"),
        (lambda: eqxldm.stride(10, 11), "no whole stride keeps 11 of 10"),
        (lambda: eqxldm.timestep_times(10, np.array([0, 10])), "increase within 0 .. 9"),
        (lambda: eqxldm.timestep_times(10, np.array([3, 3])), "increase within 0 .. 9"),
        (lambda: eqxldm.uniform_times(0), "steps must be at least 1"),
        (lambda: eqxldm.shifted_times(4, 0.0), "shift must be positive, got 0.0"),
        (lambda: eqxldm.shifted_times(4, float("inf")), "shift must be positive"),
    ],
)
def test_wrong_arguments_say_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()
