import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

import eqxldm

from helpers import PATHS, perturbed, small_dit

pytestmark = pytest.mark.usefixtures("strict_dtypes")

T = jnp.array(0.4)
X = jnp.array([[1.0, -2.0], [0.5, 3.0]])
COND, NULL = jnp.array(2.0), jnp.array(-1.0)


def denoiser(x_t, t, cond, *, key=None):
    return jnp.tanh(cond * x_t) + t


def branches():
    return denoiser(X, T, NULL), denoiser(X, T, COND)


@pytest.mark.parametrize("scale, branch", [(0.0, 0), (1.0, 1)])
def test_scale_one_is_conditional_and_zero_unconditional(scale, branch):
    guided = eqxldm.guide(denoiser, NULL, scale)
    np.testing.assert_allclose(guided(X, T, COND), branches()[branch], atol=1e-6)


@pytest.mark.parametrize("scale", [-0.5, 1.5, 4.0, jnp.array(2.5)])
def test_guidance_is_linear_in_the_scale(scale):
    unconditional, conditional = branches()
    guided = eqxldm.guide(denoiser, NULL, scale)(X, T, COND)
    expected = unconditional + float(scale) * (conditional - unconditional)
    np.testing.assert_allclose(guided, expected, rtol=1e-6)


def test_scale_may_be_a_function_of_time():
    guided = eqxldm.guide(denoiser, NULL, lambda t: 1 + 5 * t)
    for t in (jnp.array(0.1), jnp.array(0.9)):
        expected = eqxldm.guide(denoiser, NULL, float(1 + 5 * t))(X, t, COND)
        np.testing.assert_allclose(guided(X, t, COND), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "t, inside", [(0.1, False), (0.25, True), (0.5, True), (0.75, True), (0.8, False)]
)
def test_interval_is_closed_and_conditional_outside(t, inside):
    t = jnp.array(t)
    guided = jax.jit(eqxldm.guide(denoiser, NULL, 3.0, interval=(0.25, 0.75)))
    plain = eqxldm.guide(denoiser, NULL, 3.0 if inside else 1.0)
    np.testing.assert_allclose(guided(X, t, COND), plain(X, t, COND), atol=1e-6)


def calls_of(t, **interval):
    shapes = []

    def counted(x_t, t, cond, *, key=None):
        jax.debug.callback(lambda c: shapes.append(np.shape(c)), cond)
        return cond * x_t

    guided = jax.jit(eqxldm.guide(counted, NULL, 3.0, **interval))
    jax.block_until_ready(guided(X, jnp.array(t), COND))
    jax.effects_barrier()
    return len(shapes)


def test_outside_the_interval_the_network_is_called_once():
    assert calls_of(0.5, interval=(0.25, 0.75)) == 2
    assert calls_of(0.9, interval=(0.25, 0.75)) == 1


def test_conditions_may_be_trees():
    def tree_denoiser(x_t, t, cond, *, key=None):
        return cond["a"] * x_t + cond["b"].sum()

    cond, null = {"a": jnp.array(2.0), "b": jnp.ones(3)}, {"a": jnp.array(1.0), "b": jnp.zeros(3)}
    guided = eqxldm.guide(tree_denoiser, null, 2.0)(X, T, cond)
    np.testing.assert_allclose(guided, X + 2 * (X + 3), rtol=1e-6)


@pytest.mark.parametrize("a, b", [("eps", "v"), ("x0", "velocity")])
def test_guidance_commutes_with_the_change_of_prediction(a, b, x64):
    predictions = {
        name: getattr(eqxldm, f"predict_{name}") for name in ("eps", "x0", "v", "velocity")
    }
    at = PATHS["cosine"].coefficients(jnp.array(0.4))
    x = jnp.asarray(X, jnp.float64)

    def as_b(x_t, t, cond, *, key=None):
        x0, eps = eqxldm.to_x0_eps(predictions[a], at, x_t, denoiser(x_t, t, cond))
        return eqxldm.target(predictions[b], at, x0, eps)

    time, cond, null = (jnp.asarray(v, jnp.float64) for v in (0.4, 2.0, -1.0))
    from_a = eqxldm.to_x0_eps(
        predictions[a], at, x, eqxldm.guide(denoiser, null, 3.0)(x, time, cond)
    )
    from_b = eqxldm.to_x0_eps(predictions[b], at, x, eqxldm.guide(as_b, null, 3.0)(x, time, cond))
    np.testing.assert_allclose(from_a, from_b, rtol=1e-10)


def test_guidance_of_a_dit_uses_its_null_row(key):
    dit = perturbed(small_dit())
    x, label = jax.random.normal(key, dit.shape), jnp.array(3)
    guided = jax.jit(eqxldm.guide(dit, dit.null, 2.0))(x, T, label)
    conditional, unconditional = dit(x, T, label), dit(x, T, dit.null)
    assert jnp.max(jnp.abs(conditional - unconditional)) > 1e-3
    np.testing.assert_allclose(guided, 2 * conditional - unconditional, atol=1e-4)


@pytest.mark.parametrize("scale", [-1.0, 0.0, 1.0, 7.5])
def test_guiding_a_network_with_itself_changes_nothing(scale):
    alone = denoiser(X, T, COND)
    by_null = eqxldm.guide(denoiser, COND, scale)(X, T, COND)
    by_itself = eqxldm.autoguide(denoiser, denoiser, scale)(X, T, COND)
    # Two roundings of a number of at most 1.
    np.testing.assert_allclose(by_null, alone, atol=1e-6)
    np.testing.assert_allclose(by_itself, alone, atol=1e-6)


@given(scale=st.floats(-2, 10), t=st.floats(0, 1))
def test_a_constant_function_equals_its_number_and_the_whole_interval_plain_guidance(x64, scale, t):
    x, t, cond, null = (jnp.asarray(v, jnp.float64) for v in (X, t, 2.0, -1.0))
    plain = eqxldm.guide(denoiser, null, scale)(x, t, cond)
    for same in (
        eqxldm.guide(denoiser, null, lambda t: jnp.full_like(t, scale)),
        eqxldm.guide(denoiser, null, eqxldm.linear_scale(scale, scale)),
        eqxldm.guide(denoiser, null, eqxldm.cosine_scale(scale, scale)),
        eqxldm.guide(denoiser, null, jnp.asarray(scale)),
        eqxldm.guide(denoiser, null, eqxldm.AdaptiveScale(lambda t, a, b: jnp.full_like(t, scale))),
        eqxldm.guide(denoiser, null, scale, interval=(0.0, 1.0)),
        eqxldm.guide(denoiser, null, scale, interval=(0, 1)),
    ):
        np.testing.assert_allclose(same(x, t, cond), plain, rtol=1e-12)


@given(a=st.floats(-3, 3), b=st.floats(-3, 3), share=st.floats(0, 1))
def test_guidance_is_affine_in_the_scale(x64, a, b, share):
    x, t, cond, null = (jnp.asarray(v, jnp.float64) for v in (X, 0.4, 2.0, -1.0))
    of = lambda scale: eqxldm.guide(denoiser, null, scale)(x, t, cond)
    mixed = share * of(a) + (1 - share) * of(b)
    np.testing.assert_allclose(of(share * a + (1 - share) * b), mixed, atol=1e-13)


@pytest.mark.parametrize("schedule", [eqxldm.linear_scale, eqxldm.cosine_scale])
@given(noise=st.floats(0, 5), data=st.floats(0, 5), t=st.floats(0, 1))
def test_scale_schedules_go_from_end_to_end(x64, schedule, noise, data, t):
    w = schedule(noise, data)
    assert float(w(jnp.array(0.0))) == pytest.approx(data, abs=1e-12)
    assert float(w(jnp.array(1.0))) == pytest.approx(noise, abs=1e-12)
    assert float(w(jnp.array(0.5))) == pytest.approx((noise + data) / 2, abs=1e-12)
    assert min(noise, data) - 1e-12 <= float(w(jnp.array(t))) <= max(noise, data) + 1e-12


@given(scale=st.floats(1, 10), bound=st.floats(0.01, 10))
def test_a_bounded_scale_bounds_what_guidance_adds(x64, scale, bound):
    x, t, cond, null = (jnp.asarray(v, jnp.float64) for v in (X, 0.4, 2.0, -1.0))
    guided = eqxldm.guide(denoiser, null, eqxldm.bounded_scale(scale, bound))(x, t, cond)
    added = float(jnp.sqrt(jnp.mean((guided - denoiser(x, t, cond)) ** 2)))
    free = float(jnp.sqrt(jnp.mean((denoiser(x, t, cond) - denoiser(x, t, null)) ** 2)))
    assert added == pytest.approx((scale - 1) * min(free, bound), rel=1e-12, abs=1e-14)


def test_a_bounded_scale_of_equal_outputs_is_finite():
    guided = eqxldm.guide(denoiser, COND, eqxldm.bounded_scale(3.0, 0.1))
    assert jnp.all(jnp.isfinite(jax.grad(lambda x: jnp.sum(guided(x, T, COND)))(X)))


def test_autoguidance_extrapolates_from_the_weaker_network_under_the_same_condition():
    weak = lambda x_t, t, cond, key=None: cond * x_t
    guided = eqxldm.autoguide(denoiser, weak, 2.5)(X, T, COND)
    strong, weaker = denoiser(X, T, COND), COND * X
    np.testing.assert_allclose(guided, weaker + 2.5 * (strong - weaker), rtol=1e-6)
    zero, one = (eqxldm.autoguide(denoiser, weak, w)(X, T, COND) for w in (0.0, 1.0))
    np.testing.assert_allclose(zero, weaker, atol=1e-6)
    np.testing.assert_allclose(one, strong, atol=1e-6)


@pytest.mark.parametrize("t, inside", [(0.1, False), (0.5, True)])
def test_autoguidance_has_an_interval_too(t, inside):
    weak = lambda x_t, t, cond, key=None: cond * x_t
    guided = eqxldm.autoguide(denoiser, weak, 3.0, interval=(0.25, 0.75))(X, jnp.array(t), COND)
    strong = denoiser(X, jnp.array(t), COND)
    expected = COND * X + 3 * (strong - COND * X) if inside else strong
    np.testing.assert_allclose(guided, expected, rtol=1e-5)


def test_rescaling_keeps_the_standard_deviation_of_the_conditional_output():
    unconditional, conditional = branches()
    plain = unconditional + 4 * (conditional - unconditional)
    whole = eqxldm.guide(denoiser, NULL, 4.0, rescale=1.0)(X, T, COND)
    assert float(jnp.std(whole)) == pytest.approx(float(jnp.std(conditional)), rel=1e-5)
    np.testing.assert_allclose(whole / plain, jnp.std(conditional) / jnp.std(plain), rtol=1e-5)
    part = eqxldm.guide(denoiser, NULL, 4.0, rescale=0.7)(X, T, COND)
    np.testing.assert_allclose(part, 0.7 * whole + 0.3 * plain, rtol=1e-5)
    none = eqxldm.guide(denoiser, NULL, 4.0, rescale=0.0)(X, T, COND)
    np.testing.assert_allclose(none, plain, rtol=1e-6)


def test_only_the_first_channels_are_guided_the_others_stay_conditional():
    x = jax.random.normal(jax.random.key(0), (4, 2, 2))
    guided = eqxldm.guide(denoiser, NULL, 4.0, channels=3)(x, T, COND)
    whole = eqxldm.guide(denoiser, NULL, 4.0)(x, T, COND)
    np.testing.assert_array_equal(guided[:3], whole[:3])
    np.testing.assert_array_equal(guided[3:], denoiser(x, T, COND)[3:])


def test_a_learned_variance_is_the_conditional_networks_own():
    def learned(x_t, t, cond, *, key=None):
        return jnp.concatenate([denoiser(x_t, t, cond), jnp.cos(cond * x_t)])

    guided = eqxldm.guide(learned, NULL, 4.0)(X, T, COND)
    np.testing.assert_allclose(guided[:2], eqxldm.guide(denoiser, NULL, 4.0)(X, T, COND))
    np.testing.assert_allclose(guided[2:], jnp.cos(COND * X), rtol=1e-6)


def test_labels_may_be_python_numbers_and_of_any_integer_type():
    table = jnp.arange(300.0)
    network = lambda x_t, t, cond, key=None: table[cond] * x_t
    for cond in (3, jnp.array(3, jnp.uint8), np.int64(3)):
        guided = eqxldm.guide(network, jnp.array(256), 2.0)(jnp.ones(1), T, cond)
        assert float(guided[0]) == 256 + 2 * (3 - 256)  # a null of 256 is no uint8


def test_both_branches_are_one_batched_call():
    shapes = []

    @jax.custom_batching.custom_vmap
    def network(x):
        return x

    @network.def_vmap
    def _(axis_size, in_batched, x):
        shapes.append(x.shape)
        return x, True

    batched = lambda x_t, t, cond, key=None: network(cond * x_t)
    eqxldm.guide(batched, NULL, 3.0)(X, T, COND)
    assert shapes == [(2, *X.shape)]


def test_nothing_retraces_when_the_scale_changes():
    traces = []

    def counted(x_t, t, cond, *, key=None):
        traces.append(t)
        return cond * x_t

    @jax.jit
    def run(scale, t, cond):
        guided = eqxldm.guide(counted, NULL, scale, interval=(0.2, 0.8))
        return guided(X, t, cond)

    for scale in (1.0, 2.0, 3.0):
        run(jnp.array(scale), jnp.array(0.1 * scale), jnp.array(scale))
    assert len(traces) == 2  # one for each side of the interval


def test_bfloat16_stays_bfloat16():
    guided = eqxldm.guide(denoiser_of_bfloat16, NULL, lambda t: 2 * t, interval=(0.1, 0.9))
    assert guided(X.astype(jnp.bfloat16), T, COND).dtype == jnp.bfloat16


def denoiser_of_bfloat16(x_t, t, cond, *, key=None):
    return x_t * cond.astype(x_t.dtype)


@pytest.mark.parametrize("interval", [(0.5, 0.5), (-0.1, 1.0), (0.0, 1.1), (0.8, 0.2)])
def test_a_wrong_interval_is_refused(interval):
    with pytest.raises(ValueError, match="guide: interval must satisfy 0 <= low < high <= 1"):
        eqxldm.guide(denoiser, NULL, 1.0, interval=interval)
    with pytest.raises(ValueError, match="autoguide: interval"):
        eqxldm.autoguide(denoiser, denoiser, 1.0, interval=interval)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: eqxldm.guide(denoiser, NULL, 2.0, rescale=1.5), r"rescale must lie in \[0, 1\]"),
        (lambda: eqxldm.guide(denoiser, NULL, 2.0, channels=0), "channels must be at least 1"),
        (lambda: eqxldm.guide(denoiser, NULL, np.inf), "guide: the scale must be finite"),
        (lambda: eqxldm.linear_scale(1.0, np.nan), "linear_scale: the scale must be finite"),
        (lambda: eqxldm.cosine_scale(np.inf, 1.0), "cosine_scale: the scale must be finite"),
        (lambda: eqxldm.bounded_scale(2.0, 0.0), "bound must be positive, got 0"),
        (lambda: eqxldm.guide(denoiser, NULL, 2.0)(X, T, None), "Was cond forgotten"),
        (lambda: eqxldm.guide(denoiser, None, 2.0)(X, T, COND), "null and cond must be alike"),
        (
            lambda: eqxldm.guide(denoiser, NULL, 2.0)(X, T, jnp.ones(3)),
            r"null has the shape \(\) and cond \(3,\)",
        ),
        (
            lambda: eqxldm.guide(denoiser, NULL, 2.0)(X, T, jnp.array(3)),
            "null is float32 and cond int32; labels are integers",
        ),
        (
            lambda: eqxldm.guide(denoiser, NULL, 2.0, channels=3)(X, T, COND),
            r"channels = 3, but x_t has the shape \(2, 2\)",
        ),
    ],
)
def test_wrong_arguments_say_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()
