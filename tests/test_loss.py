"""`make_loss`: an objective over a batch, with conditions that are dropped, times and teachers."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eqxldm as ex
from eqxldm import models, nn, training

from helpers import PATHS, perturbed, small_dit

KEY = jax.random.key(3)
FLOW = ex.Diffusion(PATHS["linear"], ex.predict_velocity)


def test_conditions_are_dropped_at_the_given_rate():
    n, labels = 10_000, jnp.arange(10_000) % 7
    dropped = training.drop_condition(labels, jnp.array(7), 0.1, key=KEY)
    lost = dropped == 7
    # Five standard deviations of a binomial.
    assert abs(int(lost.sum()) - 0.1 * n) < 5 * np.sqrt(n * 0.1 * 0.9)
    np.testing.assert_array_equal(dropped[~lost], labels[~lost])
    assert dropped.dtype == labels.dtype
    for probability, expected in ((0.0, labels), (1.0, jnp.full(n, 7))):
        dropped = training.drop_condition(labels, jnp.array(7), probability, key=KEY)
        np.testing.assert_array_equal(dropped, expected)


def test_a_condition_of_many_arrays_is_dropped_whole_or_not_at_all():
    cond = {"ids": jnp.ones((400, 5), int), "mask": jnp.ones((400, 5), bool)}
    null = {"ids": jnp.zeros(5, int), "mask": jnp.zeros(5, bool)}
    dropped = training.drop_condition(cond, null, 0.5, key=KEY)
    assert dropped["mask"].dtype == bool
    ids, mask = np.asarray(dropped["ids"]), np.asarray(dropped["mask"])
    np.testing.assert_array_equal(ids == 1, mask)
    assert set(ids.sum(1)) == {0, 5}


@pytest.mark.parametrize(
    "null, probability, message",
    [
        (jnp.array(7), 1.5, r"probability must lie in \[0, 1\], got 1.5"),
        ({"label": jnp.array(7)}, 0.1, "must have the structure of one example's condition"),
        (jnp.zeros(2, int), 0.1, r"null has an array of shape \(2,\) where .* has \(\)"),
    ],
)
def test_a_null_that_does_not_fit_is_refused(null, probability, message):
    with pytest.raises(ValueError, match=message):
        training.drop_condition(jnp.arange(3), null, probability, key=KEY)


def recorder(x_t, t, label, *, key=None):
    """A denoiser whose output is its label and its time."""
    return jnp.full_like(x_t, label.astype(x_t.dtype)) + t


@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_the_loss_is_the_mean_over_examples(dropout):
    times = jnp.array([0.2, 0.4, 0.9])
    x0, labels = jnp.stack([c * jnp.ones((1, 2, 2)) for c in (1.0, 2.0, 3.0)]), jnp.array([0, 1, 2])
    diffusion = ex.Diffusion(PATHS["linear"], ex.predict_x0)
    objective = ex.Denoising(diffusion, lambda at: at.alpha, lambda key, batch: times)
    loss_fn = training.make_loss(objective, null=9, cond_dropout=dropout)
    loss, metrics = loss_fn(recorder, {"x0": x0, "cond": labels}, KEY, None)
    seen = np.array([9, 9, 9]) if dropout else np.array([0, 1, 2])
    times = np.asarray(times)
    expected = np.mean((1 - times) * (seen + times - np.array([1, 2, 3])) ** 2)
    assert float(loss) == pytest.approx(expected, rel=1e-5) and metrics == {}


def test_a_batch_is_prepared_with_a_key_of_its_own():
    keys = []

    def prepare(batch, key):
        keys.append(jax.random.key_data(key).tolist())
        return {"x0": batch["x"], "cond": batch["y"]}

    def sampler(key, batch):
        keys.append(jax.random.key_data(key).tolist())
        return jnp.full(batch, 0.5)

    objective = ex.Denoising(ex.Diffusion(PATHS["linear"], ex.predict_x0), time_sampler=sampler)
    loss_fn = training.make_loss(objective, prepare=prepare)
    batch = {"x": jnp.zeros((2, 1, 2, 2)), "y": jnp.array([0, 1])}
    value = loss_fn(recorder, batch, KEY, None)[0]
    assert float(value) == pytest.approx((0.5**2 + 1.5**2) / 2)
    assert keys[0] != keys[1]


@pytest.mark.parametrize(
    "batch", [{"x0": jnp.ones((2, 3))}, {"x0": jnp.ones((2, 3)), "cond": None}]
)
def test_an_unconditional_network_gets_none(batch):
    seen = []

    def network(x_t, t, cond, *, key=None):
        seen.append(cond)
        return x_t

    training.make_loss(ex.Denoising(FLOW))(network, batch, KEY, None)
    assert seen == [None]


def test_dropout_without_a_null_is_refused():
    with pytest.raises(ValueError, match=r"cond_dropout = 0.1 needs null.*dit.null"):
        training.make_loss(ex.Denoising(FLOW), cond_dropout=0.1)


def test_dits_own_loss_is_an_objective_like_the_others():
    path = ex.DiscreteVP(ex.alpha_bar_from_betas(ex.linear_betas(10, 0.01, 0.5)))
    diffusion = ex.Diffusion(path, ex.LearnedRange(ex.predict_eps))
    dit = perturbed(small_dit(learn_sigma=True))
    x0, labels = jax.random.normal(KEY, (2, *dit.shape)), jnp.array([0, 1])
    loss_fn = training.make_loss(ex.Hybrid(diffusion))
    (loss, _), gradient = eqx.filter_jit(eqx.filter_value_and_grad(loss_fn, has_aux=True))(
        dit, {"x0": x0, "cond": labels}, KEY, None
    )
    _, time_key, _, loss_key = jax.random.split(KEY, 4)
    times, keys = ex.discrete_time(10)(time_key, 2), jax.random.split(loss_key, 2)
    expected = [
        ex.hybrid_loss(dit, diffusion, x, t, y, key=k)
        for x, t, y, k in zip(x0, times, labels, keys, strict=True)
    ]
    assert float(loss) == pytest.approx(float(sum(expected)) / 2, rel=1e-5)
    rows = jnp.split(gradient.final_linear.bias.reshape(-1, 2 * dit.shape[0]), 2, axis=1)
    assert all(jnp.any(part != 0) for part in rows)  # the mean's part and the variance's


@pytest.mark.parametrize(
    "path, prediction",
    [(PATHS["linear"], ex.LearnedRange(ex.predict_eps)), (PATHS["discrete"], ex.predict_eps)],
)
def test_the_hybrid_loss_refuses_what_has_no_table_or_no_variance(path, prediction):
    with pytest.raises(ValueError, match=r"Diffusion\(DiscreteVP\(alpha_bar\), LearnedRange"):
        ex.Hybrid(ex.Diffusion(path, prediction))


class ShortcutLike(ex.AbstractObjective):
    """Two times, and a teacher: the flow map's step over h is two of the teacher's over h / 2.

    On the linear flow with the network `out = u(x_t, t, h)`, `x_s = x_t - h u`.
    """

    def times(self, key, n):
        first, second = jax.random.split(key)
        t = ex.uniform_time(first, n)
        return {"t": t, "h": t * jax.random.uniform(second, (n,))}

    def loss(self, denoiser, x0, times, cond, *, key, context=None):
        t, h = times["t"], times["h"]
        eps_key, key = jax.random.split(key)
        x_t = FLOW.noise(x0, t, jax.random.normal(eps_key, x0.shape))
        teacher = context.ema[0]
        u1 = teacher(x_t, t, cond, h=h / 2)
        u2 = teacher(x_t - h / 2 * u1, t - h / 2, cond, h=h / 2)
        error = denoiser(x_t, t, cond, h=h, key=key) - jax.lax.stop_gradient(u1 + u2) / 2
        return jnp.mean(error**2), {"h": h, "step": context.step.astype(float)}


class TwoTimes(eqx.Module):
    """`out = w x_t + v t + u h`, a network of two times."""

    w: jax.Array
    v: jax.Array
    u: jax.Array

    def __call__(self, x_t, t, cond, *, h=0.0, key=None):
        return self.w * x_t + self.v * t + self.u * h


def test_an_objective_of_two_times_with_a_teacher_trains_in_the_same_step():
    network = TwoTimes(jnp.array(0.3), jnp.array(-0.2), jnp.array(1.0))
    optimizer = optax.sgd(0.5)
    state, static = training.init_state(network, optimizer, num_emas=1)
    state = eqx.tree_at(lambda s: s.ema[0].w, state, jnp.array(0.1))  # not the network itself
    loss_fn = training.make_loss(ShortcutLike())
    step = jax.jit(
        training.make_train_step(
            loss_fn, static, optimizer, ema_decays=(training.constant(1 - 1e-7),)
        )
    )
    batch = {"x0": jax.random.normal(KEY, (64, 2))}
    history = []
    for _ in range(200):
        state, metrics = step(state, batch, KEY)
        history.append(metrics)
    assert [int(m["step"]) for m in history[:3]] == [0, 1, 2] and 0 < history[0]["h"] < 1
    # The teacher is what is learned: its two half steps, to what is linear in t and h.
    assert history[-1]["loss"] < 0.05 * history[0]["loss"]
    assert float(state.params.w) == pytest.approx(0.1, abs=0.05)


def test_no_gradient_reaches_the_teachers():
    network = TwoTimes(jnp.array(0.3), jnp.array(-0.2), jnp.array(1.0))
    context = ex.Context(jnp.array(5), (network,))
    loss_fn = training.make_loss(ShortcutLike())
    batch = {"x0": jnp.ones((4, 2))}
    of_context = eqx.filter_grad(lambda c: loss_fn(network, batch, KEY, c)[0])(context)
    assert all(float(leaf) == 0 for leaf in jax.tree.leaves(of_context))


def test_a_dit_learns_one_batch():
    traces = []
    diffusion = ex.Diffusion(PATHS["discrete"], ex.predict_v)
    base = training.make_loss(
        ex.Denoising(diffusion, time_sampler=ex.stratified_time), null=5, cond_dropout=0.1
    )

    def loss_fn(model, batch, key, context):
        traces.append(1)
        return base(model, batch, key, context)

    optimizer = training.adamw(1e-2, clip_norm=1.0)
    state, static = training.init_state(small_dit(depth=2), optimizer, num_emas=1)
    step = training.make_train_step(
        loss_fn, static, optimizer, ema_decays=(training.exponential(0.99),)
    )
    step = jax.jit(step, donate_argnums=0)
    x0 = jnp.broadcast_to(jax.random.normal(KEY, (3, 4, 8)), (8, 3, 4, 8))
    losses = []
    for _ in range(100):
        state, metrics = step(state, {"x0": x0, "cond": jnp.arange(8) % 5}, KEY)
        losses.append(float(metrics["loss"]))
    assert len(traces) == 1
    # The untrained output is 0, whose loss is E v^2 = 1 for unit data; one image is easy to learn.
    assert np.mean(losses[:3]) == pytest.approx(1, abs=0.3)
    assert np.mean(losses[-10:]) < 0.5


STRATIFIED = ex.Denoising(FLOW, time_sampler=ex.stratified_time)


def test_bfloat16_training_stays_finite_where_float16_everywhere_does_not():
    """Deep and narrow, at a high rate: float32 masters, norms, softmax and time carry it."""
    sizes = dict(patch_size=2, depth=16, width=16, num_heads=2, num_classes=5, qk_norm=nn.RMSNorm)
    dit = models.DiT((3, 4, 8), **sizes, key=KEY)
    half = jax.tree.map(lambda a: a.astype(jnp.float16) if eqx.is_inexact_array(a) else a, dit)
    optimizer = training.adamw(1e-2)
    loss_fn = training.make_loss(STRATIFIED, null=dit.null, cond_dropout=0.1, dtype=jnp.bfloat16)
    x0 = jnp.broadcast_to(jax.random.normal(KEY, (3, 4, 8)), (8, 3, 4, 8))
    batch, losses = {"x0": x0, "cond": jnp.arange(8) % 5}, []
    state, static = training.init_state(dit, optimizer)
    step = jax.jit(training.make_train_step(loss_fn, static, optimizer), donate_argnums=0)
    for _ in range(60):
        state, metrics = step(state, batch, KEY)
        losses.append(float(metrics["loss"]))
    assert int(state.skipped) == 0 and np.mean(losses[-10:]) < 0.5 * np.mean(losses[:3])
    assert {a.dtype for a in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}

    state, static = training.init_state(half, optimizer)
    plain = training.make_loss(STRATIFIED, null=5, cond_dropout=0.1)
    step = jax.jit(training.make_train_step(plain, static, optimizer))
    for _ in range(3):
        state, _ = step(state, batch | {"x0": x0.astype(jnp.float16)}, KEY)
    assert not all(bool(jnp.isfinite(a).all()) for a in jax.tree.leaves(state.params))


def test_a_network_in_bfloat16_gives_the_loss_to_its_precision():
    losses = []
    for dtype in (jnp.float32, jnp.bfloat16):
        loss_fn = training.make_loss(STRATIFIED, null=5, cond_dropout=0.1, dtype=dtype)
        x0 = jax.random.normal(KEY, (8, 3, 4, 8))
        run = eqx.filter_jit(
            lambda model, x0, f=loss_fn: f(model, {"x0": x0, "cond": jnp.arange(8) % 5}, KEY, None)[
                0
            ]
        )
        losses.append(run(perturbed(small_dit(depth=2)), x0))
    assert {loss.dtype for loss in losses} == {jnp.dtype("float32")}
    assert float(losses[1]) != float(losses[0])
    np.testing.assert_allclose(losses[1], losses[0], rtol=2**-7)
