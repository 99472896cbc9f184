from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, strategies as st
from jaxtyping import TypeCheckError

import eqxldm

from helpers import ALPHA_BAR, LINEAR_BETAS, reference

TINY = np.finfo(np.float64).eps
SPACINGS = {
    "leading": eqxldm.leading_timesteps,
    "trailing": eqxldm.trailing_timesteps,
    "linspace": eqxldm.linspace_timesteps,
}
each_spacing = pytest.mark.parametrize("spacing", SPACINGS)

positive = lambda low, high: st.floats(low, high, allow_subnormal=False)
timesteps_of_a_schedule = st.integers(200, 1000)  # enough for the first to keep most of the data
schedules = {
    "linear": st.builds(
        eqxldm.linear_betas, timesteps_of_a_schedule, positive(1e-6, 0.01), positive(0.01, 0.3)
    ),
    "scaled_linear": st.builds(
        eqxldm.scaled_linear_betas,
        timesteps_of_a_schedule,
        positive(1e-6, 0.01),
        positive(0.01, 0.3),
    ),
    "cosine": st.builds(
        eqxldm.cosine_betas, timesteps_of_a_schedule, positive(0.001, 0.05), positive(0.9, 1 - 1e-6)
    ),
    "sigmoid": st.builds(
        eqxldm.sigmoid_betas,
        timesteps_of_a_schedule,
        st.floats(-3, 0),
        st.floats(1, 3),
        positive(0.3, 2),
        positive(0.9, 1 - 1e-6),
    ),
}
betas_of_any_size = st.lists(positive(1e-4, 0.5), min_size=2, max_size=30).map(np.array)
tables = betas_of_any_size.map(eqxldm.alpha_bar_from_betas)


@st.composite
def sections(draw):
    """A number of timesteps and, for each of a few sections, how many of its own it keeps."""
    count = draw(st.integers(1, 4))
    timesteps = draw(st.integers(count, 300))
    sizes = [timesteps // count + (k < timesteps % count) for k in range(count)]
    return timesteps, sizes, [draw(st.integers(1, size)) for size in sizes]


@st.composite
def counts(draw):
    """A number of timesteps and how many of them are kept."""
    timesteps = draw(st.integers(1, 300))
    return timesteps, draw(st.integers(1, timesteps))


def sigmoid_alpha_bar(t, start, end, temperature):
    """`(S(end) - S(u)) / (S(end) - S(start))`, `S(a) - S(b) = sinh((a - b) / 2) / (2 cosh cosh)`.

    In this form no difference of two numbers near 1 is taken.
    """
    u = start + t * (end - start)
    drop = lambda v: np.sinh((end - v) / 2 / temperature) / np.cosh(v / 2 / temperature)
    return drop(u) / drop(start)


def test_linear_tables_equal_reference():
    expected = reference("schedule_linear_1000")
    # The reference's betas were taken back from its alpha_bar: absolute rounding near 1.
    np.testing.assert_allclose(LINEAR_BETAS, expected["betas"], atol=2 * TINY)
    # A product of 1000 rounded factors.
    np.testing.assert_allclose(ALPHA_BAR, expected["alphas_cumprod"], rtol=1000 * TINY)


@given(st.integers(2, 1000), positive(1e-5, 0.01), positive(0.01, 0.5))
def test_scaled_linear_betas_are_squares_evenly_spaced_in_the_root(timesteps, start, end):
    betas = eqxldm.scaled_linear_betas(timesteps, start, end)
    assert len(betas) == timesteps
    assert betas[[0, -1]] == pytest.approx([start, end], rel=4 * TINY)
    gaps = np.diff(np.sqrt(betas))
    np.testing.assert_allclose(gaps, (end**0.5 - start**0.5) / (timesteps - 1), atol=8 * TINY)


def test_scaled_linear_defaults_are_those_of_stable_diffusion():
    betas = eqxldm.scaled_linear_betas()
    assert len(betas) == 1000
    assert betas[[0, -1]] == pytest.approx([0.00085, 0.012], rel=4 * TINY)


@pytest.mark.parametrize("largest", [0.999, 0.5])
def test_cosine_alpha_bar_is_the_cosine_until_beta_is_clipped(largest):
    betas = eqxldm.cosine_betas(1000, largest=largest)
    i = np.flatnonzero(betas < largest)
    f = np.cos(np.pi / 2 * (np.arange(1001) / 1000 + 0.008) / 1.008) ** 2
    alpha_bar = eqxldm.alpha_bar_from_betas(betas)
    assert len(i) == (999 if largest == 0.999 else 997) and np.all(betas <= largest)
    np.testing.assert_allclose(alpha_bar[i], f[i + 1] / f[0], rtol=1e-10)


# The last is sharp: by float64's S alone, S(end) - S(t) near the end would keep only 3 digits.
@pytest.mark.parametrize("start, end, temperature", [(-3, 3, 1.0), (0, 3, 0.3), (0, 3, 0.1)])
def test_sigmoid_alpha_bar_is_the_sigmoid_until_beta_is_clipped(start, end, temperature):
    betas = eqxldm.sigmoid_betas(1000, start, end, temperature)
    i = np.flatnonzero(betas < 0.999)
    alpha_bar = eqxldm.alpha_bar_from_betas(betas)
    expected = sigmoid_alpha_bar((i + 1) / 1000, start, end, temperature)
    assert len(i) == 999
    # A product of 1000 factors 1 - beta, each rounded a few times and at least 0.1 but one.
    np.testing.assert_allclose(alpha_bar[i], expected, rtol=4 * 1000 * TINY)


@pytest.mark.parametrize("name", schedules)
@given(data=st.data())
def test_alpha_bar_decreases_from_about_one(name, data):
    betas = data.draw(schedules[name])
    alpha_bar = eqxldm.alpha_bar_from_betas(betas)
    assert alpha_bar.dtype == np.float64 and alpha_bar.shape == betas.shape
    # 200 timesteps or more: the steepest start, of sigmoids from 0 to 3 at 0.3, drops by 0.025.
    assert 0.97 < alpha_bar[0] < 1 and np.all(np.diff(alpha_bar) < 0) and alpha_bar[-1] > 0


@given(st.lists(positive(1e-4, 0.5), min_size=1, max_size=30), st.booleans())
def test_betas_invert_alpha_bar(betas, all_noise_at_the_end):
    betas = np.array([*betas, 1.0] if all_noise_at_the_end else betas)
    alpha_bar = eqxldm.alpha_bar_from_betas(betas)
    recovered = eqxldm.betas_from_alpha_bar(alpha_bar)
    # 1 - (a ratio near 1): the error is absolute.
    np.testing.assert_allclose(recovered, betas, atol=4 * TINY)
    if all_noise_at_the_end:
        assert alpha_bar[-1] == 0 and recovered[-1] == 1


@given(tables, st.booleans())
def test_alpha_bar_inverts_betas(alpha_bar, all_noise_at_the_end):
    alpha_bar = np.append(alpha_bar, 0.0) if all_noise_at_the_end else alpha_bar
    again = eqxldm.alpha_bar_from_betas(eqxldm.betas_from_alpha_bar(alpha_bar))
    assert_equal_as_products(again, alpha_bar)


def assert_equal_as_products(actual, alpha_bar):
    """Each factor `1 - beta` is rounded to an absolute eps or two; relative errors add up."""
    ratio = alpha_bar / np.append(1.0, alpha_bar[:-1])
    ratio[ratio == 0] = 1.0  # 1 - 1 is exact
    assert np.all(np.abs(actual - alpha_bar) <= alpha_bar * np.cumsum(3 * TINY / ratio))


@given(tables)
def test_rescaled_to_zero_terminal_snr_ends_at_zero_and_starts_as_before(alpha_bar):
    rescaled = eqxldm.rescale_zero_terminal_snr(alpha_bar)
    assert rescaled[-1] == 0 and rescaled[0] == pytest.approx(alpha_bar[0], rel=8 * TINY)
    assert np.all(np.diff(rescaled) < 0)
    # One scale for all: the gaps of sqrt(alpha_bar) keep their proportions.
    a, b = np.sqrt(alpha_bar), np.sqrt(rescaled)
    np.testing.assert_allclose(np.diff(b) * (a[0] - a[-1]), np.diff(a) * a[0], atol=8 * TINY)


@given(tables)
def test_zero_terminal_snr_has_betas_and_rescales_to_itself(alpha_bar):
    rescaled = eqxldm.rescale_zero_terminal_snr(alpha_bar)
    betas = eqxldm.betas_from_alpha_bar(rescaled)
    assert betas[-1] == 1 and np.all(betas[:-1] < 1) and np.all(betas > 0)
    assert_equal_as_products(eqxldm.alpha_bar_from_betas(betas), rescaled)
    again = eqxldm.rescale_zero_terminal_snr(rescaled)
    np.testing.assert_allclose(again, rescaled, rtol=8 * TINY)


shifts = positive(0.1, 10)


@given(tables, shifts)
def test_shifted_alpha_bar_has_a_shifted_logsnr(alpha_bar, shift):
    times = np.arange(1, len(alpha_bar) + 1) / len(alpha_bar)
    before = eqxldm.DiscreteVP(alpha_bar).logsnr(times)
    shifted = eqxldm.shift_alpha_bar(alpha_bar, shift)
    after = eqxldm.DiscreteVP(shifted).logsnr(times)
    # log(1 - alpha_bar) feels the rounding of an alpha_bar near 1.
    bound = TINY * (8 / (1 - np.maximum(alpha_bar, shifted)) + 4 * np.abs(before) + 16)
    # And the logarithm of alpha that of t T times how steep it is there: at most 2 T eps / alpha.
    bound += 4 * len(alpha_bar) * TINY / np.sqrt(np.minimum(alpha_bar, shifted))
    assert np.all(np.abs(after - (before - 2 * np.log(shift))) <= bound)


@given(tables, shifts, shifts)
def test_two_shifts_are_one_by_their_product(alpha_bar, first, second):
    shift = eqxldm.shift_alpha_bar
    # d log shift(a, s) / d log a = s^2 / (a + s^2 (1 - a)) <= max(1, s^2), and a few roundings.
    twice = shift(shift(alpha_bar, first), second)
    bound = 8 * TINY * (1 + max(1, second**2))
    np.testing.assert_allclose(twice, shift(alpha_bar, first * second), rtol=bound)
    np.testing.assert_allclose(shift(alpha_bar, 1.0), alpha_bar, rtol=2 * TINY)


def test_shift_keeps_zero_terminal_snr():
    assert list(eqxldm.shift_alpha_bar(np.array([0.8, 0.0]), 2.0)) == pytest.approx([0.5, 0.0])


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


@each_spacing
@given(case=counts())
def test_spacings_increase_without_repeats(spacing, case):
    timesteps, count = case
    kept = SPACINGS[spacing](timesteps, count)
    assert np.issubdtype(kept.dtype, np.integer) and len(kept) == count
    assert kept[0] >= 0 and kept[-1] < timesteps and np.all(np.diff(kept) > 0)


@each_spacing
@given(timesteps=st.integers(1, 300))
def test_spacings_of_everything_are_everything(spacing, timesteps):
    np.testing.assert_array_equal(SPACINGS[spacing](timesteps, timesteps), np.arange(timesteps))


@given(counts())
def test_spacings_keep_what_their_definitions_say(case):
    timesteps, count = case
    leading, trailing, linspace = (SPACINGS[name](timesteps, count) for name in SPACINGS)
    assert leading[0] == 0 and set(np.diff(leading)) <= {timesteps // count}
    assert trailing[-1] == timesteps - 1
    assert linspace[0] == 0 and (count == 1 or linspace[-1] == timesteps - 1)
    nearest = lambda kept, exact: all(
        abs(int(k) - e) <= Fraction(1, 2) for k, e in zip(kept, exact, strict=True)
    )
    step = Fraction(timesteps, count)
    assert nearest(trailing, [(j + 1) * step - 1 for j in range(count)])
    between = Fraction(timesteps - 1, max(count - 1, 1))
    assert nearest(linspace, [j * between for j in range(count)])


@pytest.mark.parametrize("spacing", [*SPACINGS, "respace", "stride"])
@given(count=st.sampled_from([1, 2, 4, 10, 25, 37, 250, 1000]))
def test_respaced_alpha_bar_equals_the_original_at_what_is_kept(spacing, count):
    if spacing == "respace":
        kept = eqxldm.respace(1000, [count // 2, count - count // 2] if count > 1 else [1])
    elif spacing == "stride":
        kept = eqxldm.stride(1000, len(range(0, 1000, count)))
    else:
        kept = SPACINGS[spacing](1000, count)
    times = eqxldm.timestep_times(1000, kept)[-2::-1]
    # Times are rounded: to 1000 eps of a timestep, in which alpha_bar changes by less than 2 %.
    on_the_path = eqxldm.DiscreteVP(ALPHA_BAR).alpha(times) ** 2
    np.testing.assert_allclose(on_the_path, ALPHA_BAR[kept], rtol=100 * TINY)
    respaced = eqxldm.DiscreteVP(ALPHA_BAR[kept])
    own = eqxldm.timestep_times(len(kept), np.arange(len(kept)))[-2::-1]
    # Here a step can be the whole way from data to noise, alpha from 1 to 0.006.
    bound = 8 * len(kept) * TINY / np.sqrt(ALPHA_BAR[kept])
    assert np.all(np.abs(respaced.alpha(own) ** 2 / ALPHA_BAR[kept] - 1) <= bound)


def test_respacings_equal_reference():
    ddpm, ddim = reference("ddpm_linear_1000_respaced25"), reference("ddim_linear_1000_ddim20_eta0")
    np.testing.assert_array_equal(eqxldm.respace(1000, [25]), np.sort(ddpm["timesteps"]))
    np.testing.assert_array_equal(eqxldm.stride(1000, 20), np.sort(ddim["timesteps"]))


@pytest.mark.parametrize(
    "spec, expected",
    [
        ("25", eqxldm.respace(1000, [25])),
        ("10,15,20", eqxldm.respace(1000, [10, 15, 20])),
        (" 10, 15 ", eqxldm.respace(1000, [10, 15])),
        ("ddim50", eqxldm.stride(1000, 50)),
        ("", np.arange(1000)),
    ],
)
def test_respacings_are_read_from_text(spec, expected):
    np.testing.assert_array_equal(eqxldm.parse_respacing(1000, spec), expected)


@pytest.mark.parametrize("spec", ["ddim", "ddim5,5", "x", "1.5", "-5", ",", "5,", "5 5", "DDIM5"])
def test_text_that_is_no_respacing_is_refused(spec):
    with pytest.raises(ValueError, match=rf'parse_respacing: expected "25".* got "{spec}"'):
        eqxldm.parse_respacing(1000, spec)


INSIDE = "must lie strictly between 0 and 1"
FEW = np.array([0.1, 0.2])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: eqxldm.linear_betas(0), "timesteps must be at least 1, got 0"),
        (lambda: eqxldm.linear_betas(10, 0.0, 0.02), f"betas {INSIDE}.* got 0.0 at timestep 0"),
        (lambda: eqxldm.linear_betas(3, 0.1, 1.1), f"betas {INSIDE}.* got 1.1 at timestep 2"),
        (lambda: eqxldm.scaled_linear_betas(0), "timesteps must be at least 1, got 0"),
        (lambda: eqxldm.scaled_linear_betas(9, -1.0), "start and end in .*got -1.0 and 0.012"),
        (lambda: eqxldm.scaled_linear_betas(9, 0.1, 1.5), "start and end in .*got 0.1 and 1.5"),
        (lambda: eqxldm.cosine_betas(0), "timesteps must be at least 1"),
        (lambda: eqxldm.cosine_betas(9, largest=0.0), f"betas {INSIDE}.* got 0.0 at timestep 0"),
        (lambda: eqxldm.sigmoid_betas(0), "timesteps must be at least 1"),
        (lambda: eqxldm.sigmoid_betas(9, 3.0, -3.0), "start < end .*start 3.0, end -3.0"),
        (lambda: eqxldm.sigmoid_betas(9, temperature=0.0), "positive temperature.* 0.0"),
        (lambda: eqxldm.alpha_bar_from_betas(np.array([1.0, 0.1])), "betas .*1.0 at timestep 0"),
        (lambda: eqxldm.alpha_bar_from_betas(np.array([0.1, 1.1])), "betas .*1.1 at timestep 1"),
        (lambda: eqxldm.alpha_bar_from_betas(np.array([0.1, -0.1, 0.1])), "-0.1 at timestep 1"),
        (lambda: eqxldm.alpha_bar_from_betas(np.array([0.1, np.nan])), "betas .*nan at timestep 1"),
        (lambda: eqxldm.alpha_bar_from_betas(np.array([])), "betas is empty"),
        (lambda: eqxldm.betas_from_alpha_bar(np.array([0.9, 0.5, 0.5])), "0.5 at timestep 2"),
        (lambda: eqxldm.betas_from_alpha_bar(np.array([0.5, 0.6])), "alpha_bar must strictly dec"),
        (lambda: eqxldm.betas_from_alpha_bar(np.array([1.0, 0.5])), f"alpha_bar {INSIDE}.*step 0"),
        (lambda: eqxldm.betas_from_alpha_bar(np.array([0.5, 0.0, 0.0])), "0.0 at timestep 1"),
        (lambda: eqxldm.betas_from_alpha_bar(np.array([0.5, np.nan])), "nan at timestep 1"),
        (lambda: eqxldm.betas_from_alpha_bar(np.array([])), "alpha_bar is empty"),
        (lambda: eqxldm.rescale_zero_terminal_snr(np.array([0.5])), "at least two timesteps"),
        (lambda: eqxldm.rescale_zero_terminal_snr(np.array([0.5, 0.9])), "alpha_bar must strictly"),
        (lambda: eqxldm.shift_alpha_bar(ALPHA_BAR, 0.0), "shift must be positive, got 0.0"),
        (lambda: eqxldm.shift_alpha_bar(ALPHA_BAR, np.nan), "shift must be positive, got nan"),
        (lambda: eqxldm.shift_alpha_bar(FEW, 2.0), "alpha_bar must strictly decrease"),
        (lambda: eqxldm.respace(10, []), "need 1 to 10 counts, got 0"),
        (lambda: eqxldm.respace(2, [1, 1, 1]), "need 1 to 2 counts, got 3"),
        (lambda: eqxldm.respace(10, [3, 6]), "cannot keep 6 of the 5 timesteps of section 1"),
        (lambda: eqxldm.respace(10, [0]), "cannot keep 0 of the 10"),
        (lambda: eqxldm.respace(10, [11]), "cannot keep 11 of the 10"),
        (lambda: eqxldm.stride(0, 1), "timesteps must be at least 1"),
        (lambda: eqxldm.stride(10, 6), "no whole stride keeps 6 of 10"),
        (lambda: eqxldm.stride(10, 11), "no whole stride keeps 11 of 10"),
        (lambda: eqxldm.leading_timesteps(10, 11), "leading_timesteps: cannot keep 11 of 10"),
        (lambda: eqxldm.trailing_timesteps(10, 0), "trailing_timesteps: cannot keep 0 of 10"),
        (lambda: eqxldm.trailing_timesteps(0, 1), "timesteps must be at least 1"),
        (lambda: eqxldm.linspace_timesteps(10, 11), "cannot keep 11 of 10"),
        (lambda: eqxldm.parse_respacing(10, "11"), "cannot keep 11 of the 10"),
        (lambda: eqxldm.parse_respacing(10, "ddim6"), "no whole stride keeps 6 of 10"),
        (lambda: eqxldm.parse_respacing(10, "0"), "cannot keep 0 of the 10"),
    ],
)
def test_wrong_arguments_say_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "call, name",
    [
        (lambda: eqxldm.alpha_bar_from_betas(np.full((2, 2), 0.1)), "betas"),
        (lambda: eqxldm.alpha_bar_from_betas([0.1, 0.2]), "betas"),
        (lambda: eqxldm.alpha_bar_from_betas(np.array([1, 2])), "betas"),
        (lambda: eqxldm.betas_from_alpha_bar(ALPHA_BAR[:, None]), "alpha_bar"),
        (lambda: eqxldm.linear_betas(10.0), "timesteps"),
        (lambda: eqxldm.parse_respacing(1000, 25), "spec"),
    ],
)
def test_arguments_of_a_wrong_type_are_named(call, name):
    with pytest.raises(TypeCheckError, match=f"parameter '{name}'"):
        call()
