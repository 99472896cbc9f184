import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eqxldm
from eqxldm import nn, training
from eqxldm.training import constant, exponential

from helpers import (
    named_leaves,
    perturbed,
    small_autoencoder,
    small_discriminator,
    small_dit,
    tree_error,
)

KEY = jax.random.key(3)
IMAGES = jax.random.uniform(jax.random.key(8), (2, 1, 16, 16), minval=-1.0)


def quadratic(model, batch, key, context=None):
    """A loss whose gradient depends on the key: noisy least squares."""
    noise = jax.random.normal(key, batch.shape)
    error = jax.vmap(model)(batch + 0.1 * noise) - 1
    return jnp.mean(error**2), {"error": jnp.mean(error)}


def line(seed=0):
    return nn.Linear(3, 2, key=jax.random.key(seed))


def make_line_step(optimizer, **options):
    num_emas = len(options.get("ema_decays", ()))
    state, static = training.init_state(line(), optimizer, num_emas=num_emas)
    return state, training.make_train_step(quadratic, static, optimizer, **options)


BATCH = jax.random.normal(jax.random.key(5), (4, 3))


def assert_trees_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_init_state_starts_at_zero_with_a_copy_of_the_parameters():
    optimizer = training.adamw(1e-3)
    state, static = training.init_state(line(), optimizer, num_emas=2)
    counters = (state.step, state.skipped, state.skipped_in_row)
    assert all(int(c) == 0 and not c.weak_type for c in counters)
    for ema in state.ema:
        assert_trees_equal(ema, state.params)
        assert ema.weight is not state.params.weight  # or donation would free it twice
    assert state.ema[0].weight is not state.ema[1].weight and len(state.ema) == 2
    assert_trees_equal(eqx.combine(state.params, static), line())
    assert training.init_state(line(), optimizer)[0].ema == ()


def test_average_of_bfloat16_parameters_is_float32():
    model = jax.tree.map(lambda a: a.astype(jnp.bfloat16), line())
    state, _ = training.init_state(model, optax.sgd(0.1), num_emas=1)
    assert {a.dtype for a in jax.tree.leaves(state.ema)} == {jnp.dtype("float32")}
    ema = training.update_ema(state.ema[0], state.params, 0.9999)
    assert {a.dtype for a in jax.tree.leaves(ema)} == {jnp.dtype("float32")}


def test_step_is_the_optimizers_update_of_the_folded_key():
    optimizer = optax.sgd(0.1)
    state, step = make_line_step(optimizer)
    new, metrics = jax.jit(step)(state, BATCH, KEY)
    (loss, aux), gradient = jax.value_and_grad(quadratic, has_aux=True)(
        line(), BATCH, jax.random.fold_in(KEY, 0)
    )
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, line(), gradient)
    np.testing.assert_allclose(new.params.weight, expected.weight, rtol=1e-5)
    counted = {"skipped", "skipped_in_row"}
    assert (
        int(new.step) == 1
        and metrics.keys() == {"loss", "error", "gradient_norm", "norms"} | counted
    )
    norm = optax.tree.norm(gradient)
    assert float(metrics["gradient_norm"]) == pytest.approx(float(norm), rel=1e-5)
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-5)
    assert float(metrics["error"]) == pytest.approx(float(aux["error"]), rel=1e-4)


def test_a_resumed_run_repeats_an_unbroken_one_bit_for_bit():
    state, step = make_line_step(
        training.adamw(1e-2, weight_decay=0.1), ema_decays=(exponential(0.99),)
    )
    step = jax.jit(step)
    saved = None
    for i in range(4):
        if i == 2:
            saved = jax.tree.map(np.array, state)
        state, _ = step(state, BATCH, KEY)
    resumed = jax.tree.map(jnp.asarray, saved)
    for _ in range(2):
        resumed, _ = step(resumed, BATCH, KEY)
    assert int(resumed.step) == 4
    assert_trees_equal(resumed, state)


def test_the_key_of_a_step_depends_on_the_step_and_on_the_key():
    state, step = make_line_step(optax.sgd(0.0))  # parameters stay: only the key moves the loss
    losses = []
    for key in (KEY, KEY, jax.random.key(4)):
        state, metrics = step(state, BATCH, key)
        losses.append(float(metrics["loss"]))
    assert len(set(losses)) == 3


@pytest.mark.parametrize("ema_decays", [(), (exponential(0.99), constant(0.9))])
def test_many_donated_steps_compile_once(ema_decays):
    traces = []

    def loss_fn(model, batch, key, context):
        traces.append(1)
        return quadratic(model, batch, key)

    optimizer = training.adamw(optax.warmup_cosine_decay_schedule(0.0, 1e-2, 2, 10))
    state, static = training.init_state(line(), optimizer, num_emas=len(ema_decays))
    step = training.make_train_step(loss_fn, static, optimizer, ema_decays=ema_decays)
    step = jax.jit(step, donate_argnums=0)
    losses = []
    for _ in range(5):
        state, metrics = step(state, BATCH, KEY)
        losses.append(metrics["loss"])
    assert len(traces) == 1 and int(state.step) == 5
    assert losses[-1] < losses[0]


def test_each_average_follows_the_updated_parameters_at_its_own_decay():
    decays = (exponential(0.9), constant(0.5))
    state, step = make_line_step(optax.sgd(0.1), ema_decays=decays)
    new, _ = jax.jit(step)(state, BATCH, KEY)
    for before, after, decay in zip(state.ema, new.ema, decays, strict=True):
        expected = training.update_ema(before, new.params, decay(jnp.array(0)))
        np.testing.assert_allclose(after.weight, expected.weight, rtol=1e-6)
        assert jnp.max(jnp.abs(after.weight - before.weight)) > 0


def test_a_state_with_another_number_of_averages_is_refused():
    state, _ = make_line_step(optax.sgd(0.1), ema_decays=(constant(0.5),))
    _, step = make_line_step(optax.sgd(0.1))
    with pytest.raises(ValueError, match="keeps 1 averages, but 0 decays"):
        step(state, BATCH, KEY)


def poisoned(model, batch, key, context):
    """`quadratic`, whose loss or gradient is what the batch's last row says."""
    loss, aux = quadratic(model, batch[:-1], key)
    poison = batch[-1, 0]
    # sqrt has an infinite slope at 0 and the loss there is finite.
    return loss + poison + jnp.sqrt(jnp.sum(model.weight**2) * batch[-1, 1]) * batch[-1, 2], aux


@pytest.mark.parametrize("last", [[np.nan, 0, 0], [np.inf, 0, 0], [0, 0, 1]])
def test_a_step_that_is_not_finite_changes_nothing_but_counters(last):
    optimizer, ema_decays = training.adamw(1e-2, clip_norm=1.0), (constant(0.9),)
    state, static = training.init_state(line(), optimizer, num_emas=1)
    step = jax.jit(training.make_train_step(poisoned, static, optimizer, ema_decays=ema_decays))
    good = jnp.concatenate([BATCH, jnp.array([[0.0, 1.0, 0.0]])])
    bad = good.at[-1].set(jnp.array(last))
    state, metrics = step(state, good, KEY)
    assert int(metrics["skipped"]) == 0
    before = jax.tree.map(np.array, state)
    for count in (1, 2):
        state, metrics = step(state, bad, KEY)
        assert (int(metrics["skipped"]), int(metrics["skipped_in_row"])) == (1, count)
        assert not np.isfinite(metrics["loss"]) or not np.isfinite(metrics["gradient_norm"])
    for name in ("params", "ema", "opt_state"):
        assert_trees_equal(getattr(state, name), getattr(before, name))
    assert (int(state.step), int(state.skipped), int(state.skipped_in_row)) == (3, 2, 2)
    state, metrics = step(state, good, KEY)
    assert (int(state.step), int(state.skipped), int(state.skipped_in_row)) == (4, 2, 0)
    assert not np.array_equal(state.params.weight, before.params.weight)
    # What was skipped does not count for the averages: this was the second update.
    assert int(optax.tree.get(state.opt_state, "count")) == 2


def plain(model, batch, key, context):
    return jnp.mean((jax.vmap(model)(batch) - 1) ** 2), {"mean": jnp.mean(batch)}


def test_accumulated_gradients_are_those_of_the_whole_batch():
    optimizer, batch = optax.sgd(0.1), jax.random.normal(KEY, (12, 3))
    state, static = training.init_state(line(), optimizer)
    steps = [training.make_train_step(plain, static, optimizer, grad_accum_steps=k) for k in (1, 3)]
    (whole, m1), (parts, m3) = (jax.jit(step)(state, batch, KEY) for step in steps)
    # Sums in another order: a few roundings of float32.
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    for name in ("loss", "mean", "gradient_norm"):
        np.testing.assert_allclose(m1[name], m3[name], rtol=1e-6, atol=1e-7)


def test_accumulated_parts_draw_different_noise():
    """The same rows in each part: with the same keys the two parts' losses would be equal."""
    batch = jnp.repeat(BATCH, 2, axis=0)
    losses = []

    def recorded(model, batch, key, context):
        jax.debug.callback(lambda value: losses.append(float(value)), jax.random.normal(key, ()))
        return quadratic(model, batch, key)

    state, static = training.init_state(line(), optax.sgd(0.1))
    step = training.make_train_step(recorded, static, optax.sgd(0.1), grad_accum_steps=2)
    jax.block_until_ready(jax.jit(step)(state, batch, KEY))
    jax.effects_barrier()
    assert len(set(losses)) == 2


@pytest.mark.parametrize("grad_accum_steps", [0, 3])
def test_a_batch_that_does_not_divide_into_the_parts_is_refused(grad_accum_steps):
    with pytest.raises(ValueError, match=r"grad_accum_steps must be|does not divide into 3 parts"):
        state, step = make_line_step(optax.sgd(0.1), grad_accum_steps=grad_accum_steps)
        step(state, BATCH, KEY)


def test_block_norms_name_the_blocks_and_add_up_to_the_whole():
    dit = small_dit(depth=2)
    gradients = jax.tree.map(jnp.ones_like, eqx.filter(dit, eqx.is_inexact_array))
    norms = training.block_norms(gradients)
    assert norms["blocks"].shape == (2,)
    assert {"patch_embedding", "time_embedding.linear1", "final_linear"} <= norms.keys()
    total = sum(float(jnp.sum(n**2)) for n in norms.values())
    assert total == pytest.approx(sum(a.size for a in jax.tree.leaves(gradients)), rel=1e-5)


@pytest.mark.parametrize(
    "model, decayed",
    [
        (small_dit(), lambda path: path.endswith(".weight")),
        (small_autoencoder(attention=True), lambda path: path.endswith(".weight")),
        (small_discriminator(layers=2), lambda path: path.endswith(".weight")),
    ],
    ids=["dit", "autoencoder", "discriminator"],
)
def test_decay_is_for_weights_only(model, decayed):
    params = eqx.filter(model, eqx.is_inexact_array)
    mask = jax.tree_util.tree_leaves_with_path(training.decay_mask(params))
    found = {jax.tree_util.keystr(path): flag for path, flag in mask}
    assert found.keys() == named_leaves(params).keys()
    for path, flag in found.items():
        kind = path.rsplit(".", 1)[-1]
        assert kind in ("weight", "bias", "scale", "table")
        assert flag == (kind == "weight") == decayed(path)
    assert any(found.values()) and not all(found.values())


def test_decay_of_stacked_biases_is_zero():
    params, _ = eqx.partition(small_dit(), eqx.is_inexact_array)
    params = jax.tree.map(jnp.ones_like, params)
    optimizer = training.adamw(0.1, weight_decay=0.5)
    gradients = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(params), params)
    new = optax.apply_updates(params, updates)
    for path, leaf in named_leaves(new).items():
        expected = 1 - 0.1 * 0.5 if path.endswith("weight") else 1.0
        np.testing.assert_allclose(leaf, expected, rtol=1e-6)
    assert new.blocks.stacked.fc1.bias.ndim == 2


def test_adamw_equals_its_formula():
    optimizer = training.adamw(0.1, b1=0.8, b2=0.9, weight_decay=0.01)
    params = line()
    state, m, v = optimizer.init(params), 0.0, 0.0
    w = np.asarray(params.weight, np.float64)
    for i in range(1, 4):
        gradients = jax.tree.map(jnp.sin, params)
        g = np.asarray(gradients.weight, np.float64)
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        w = w - 0.1 * (m / (1 - 0.8**i) / (np.sqrt(v / (1 - 0.9**i)) + 1e-8) + 0.01 * w)
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params.weight, w, rtol=1e-5, atol=1e-6)
        w = np.asarray(params.weight, np.float64)


def test_muon_turns_each_hidden_matrix_by_one_length_and_leaves_the_rest_to_adam():
    dit = small_dit()
    params = eqx.filter((dit, nn.Conv(3, 8, 3, key=jax.random.key(2))), eqx.is_inexact_array)
    gradients = jax.tree.map(lambda p: jax.random.normal(jax.random.key(p.size), p.shape), params)

    def update(optimizer):
        return jax.jit(optimizer.update)(gradients, optimizer.init(params), params)[0]

    muon, adamw = update(training.muon(0.1)), update(training.adamw(0.1))
    adams = dict(named_leaves(adamw))
    matrices = []
    for path, leaf in named_leaves(muon).items():
        outer = "patch_embedding" in path or "final_linear" in path
        if not path.endswith("weight") or outer:
            np.testing.assert_allclose(leaf, adams[path], rtol=1e-5, atol=1e-7, err_msg=path)
            continue
        kernel = leaf.ndim == 4  # of the convolution; blocks, and q, k and v, are stacked
        matrices += [leaf.reshape(-1, 8)] if kernel else list(leaf.reshape(-1, *leaf.shape[-2:]))
    assert len(matrices) > 8
    for matrix in matrices:
        singular = np.linalg.svd(matrix, compute_uv=False) / (0.02 * np.sqrt(max(matrix.shape)))
        assert singular.min() > 0.6 and singular.max() < 1.25


@pytest.mark.parametrize("norm", [0.5, 5.0])
def test_clipping_is_of_the_global_norm(norm):
    # Adam's first moment after one step is (1 - b1) times the clipped gradient.
    optimizer = training.adamw(1e-3, clip_norm=1.0)
    params = line()
    gradients = jax.tree.map(jnp.ones_like, params)
    gradients = jax.tree.map(lambda g: norm * g / jnp.sqrt(8.0), gradients)  # 6 + 2 parameters
    _, state = optimizer.update(gradients, optimizer.init(params), params)
    moments = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)
               if ".mu" in jax.tree_util.keystr(path)]  # fmt: skip
    assert float(optax.tree.norm(moments)) == pytest.approx(0.1 * min(norm, 1.0), rel=1e-5)


KL_WEIGHT, GAN_WEIGHT = 1e-2, 0.5


def gan_players(patch_size=1):
    # Perturbed enough that the two losses pull in different directions at every layer.
    ae = perturbed(small_autoencoder(patch_size=patch_size), size=0.05)
    return ae, perturbed(small_discriminator(), size=0.05)


def gan_step(ae, disc, *, adversarial, perceptual=None, optimizer=None, ema_decays=()):
    optimizer = optax.sgd(1.0) if optimizer is None else optimizer
    ae_state, ae_static = training.init_state(ae, optimizer, num_emas=len(ema_decays))
    disc_state, disc_static = training.init_state(disc, optimizer)
    step = training.make_autoencoder_step(
        ae_static, disc_static, optimizer, optimizer, perceptual=perceptual, kl_weight=KL_WEIGHT,
        gan_weight=GAN_WEIGHT, adversarial=adversarial, ema_decays=ema_decays,
    )  # fmt: skip
    return training.AutoencoderState(ae_state, disc_state), step


def reconstruction_and_kl(ae, step=0):
    keys = jax.random.split(jax.random.fold_in(KEY, step), len(IMAGES))

    def one(x, key):
        posterior = ae.posterior(x)
        kl = eqxldm.kl_to_standard_normal(posterior.mean, posterior.logvar)
        return ae.decode(posterior.sample(key)), kl

    rebuilt, kl = jax.vmap(one)(IMAGES, keys)
    return rebuilt, jnp.sum(kl) / IMAGES.size


def nll_of(ae, perceptual=None):
    rebuilt, _ = reconstruction_and_kl(ae)
    nll = jnp.mean(jnp.abs(IMAGES - rebuilt))
    return nll if perceptual is None else nll + perceptual(IMAGES, rebuilt)


def gan_of(ae, disc):
    return -jnp.mean(jax.vmap(disc)(reconstruction_and_kl(ae)[0]))


def brute_force(ae, disc, *, gan, perceptual=None):
    """The gradients as the definition of the loss says, with a backward pass for every norm."""

    def last_layer_norm(loss):
        gradient = eqx.filter_grad(loss)(ae)
        return jnp.linalg.norm(gradient.decoder.head.weight)

    weight = jnp.clip(
        last_layer_norm(lambda ae: nll_of(ae, perceptual))
        / (last_layer_norm(lambda ae: gan_of(ae, disc)) + 1e-4),
        0.0,
        1e4,
    )

    def total(ae):
        kl = reconstruction_and_kl(ae)[1]
        adversarial = GAN_WEIGHT * weight * gan_of(ae, disc) if gan else 0.0
        return nll_of(ae, perceptual) + KL_WEIGHT * kl + adversarial

    def discriminate(disc):
        rebuilt, _ = reconstruction_and_kl(ae)
        real, fake = jax.vmap(disc)(IMAGES), jax.vmap(disc)(rebuilt)
        return 0.5 * (jnp.mean(jnp.maximum(0, 1 - real)) + jnp.mean(jnp.maximum(0, 1 + fake)))

    _, kl = reconstruction_and_kl(ae)
    metrics = {"nll": nll_of(ae, perceptual), "kl": kl}
    metrics["loss"] = metrics["nll"] + KL_WEIGHT * kl
    disc_value, disc_gradient = eqx.filter_value_and_grad(discriminate)(disc)
    if gan:
        adversarial = gan_of(ae, disc)
        metrics |= {"gan": adversarial, "adaptive_weight": weight, "discriminator": disc_value}
    return eqx.filter_grad(total)(ae), disc_gradient, metrics


def change(before, after):
    return jax.tree.map(lambda b, a: b - a, before, after)


@pytest.mark.parametrize(
    "gan, patch_size, perceptual",
    [(True, 2, training.l2_distance), (False, 1, None)],
)
def test_autoencoder_gradient_equals_that_of_the_total_loss(gan, patch_size, perceptual):
    ae, disc = gan_players(patch_size)
    state, step = gan_step(ae, disc, adversarial=gan, perceptual=perceptual)
    new, metrics = jax.jit(step)(state, IMAGES, KEY)
    expected = eqx.filter_jit(brute_force)(ae, disc, gan=gan, perceptual=perceptual)
    # Plain SGD at rate 1: the change is the gradient, up to the rounding of the parameters.
    for name, gradient in zip(("autoencoder", "discriminator"), expected[:2], strict=True):
        found = change(getattr(state, name).params, getattr(new, name).params)
        gradient = eqx.filter(gradient, eqx.is_inexact_array)
        if name == "discriminator" and not gan:
            assert not any(np.any(leaf) for leaf in jax.tree.leaves(found))
        else:
            assert tree_error(found, gradient) < 1e-5
    assert expected[2].keys() <= metrics.keys()
    for name, value in expected[2].items():
        assert float(metrics[name]) == pytest.approx(float(value), rel=1e-4), name


def test_warm_up_leaves_the_discriminator_alone_and_each_step_compiles_once():
    ae, disc = gan_players()
    traces = []

    def perceptual(x, y):
        traces.append(1)
        return jnp.zeros(())

    options = dict(
        perceptual=perceptual, optimizer=training.adamw(1e-3), ema_decays=(constant(0.9),)
    )
    state, warm_up = gan_step(ae, disc, adversarial=False, **options)
    _, play = gan_step(ae, disc, adversarial=True, **options)
    warm_up, play = (jax.jit(step, donate_argnums=0) for step in (warm_up, play))
    discriminators, ema_decays = [jax.tree.map(np.array, state.discriminator)], []
    for step in (warm_up, warm_up, play, play):
        state, metrics = step(state, IMAGES, KEY)
        discriminators.append(jax.tree.map(np.array, state.discriminator))
        ema_decays.append(np.array(state.autoencoder.ema[0].decoder.head.weight))
        assert ("adaptive_weight" in metrics) == (step is play)
        assert all(bool(jnp.isfinite(m).all()) for m in jax.tree.leaves(metrics))
    assert len(traces) == 2
    assert_trees_equal(discriminators[0], discriminators[2])
    assert int(state.discriminator.step) == 2 and int(state.autoencoder.step) == 4
    moved = change(discriminators[2].params, discriminators[3].params)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(moved))
    assert not np.array_equal(ema_decays[0], ema_decays[1]) and state.discriminator.ema == ()


def test_autoencoder_step_folds_the_step_into_the_key():
    state, step = gan_step(*gan_players(), adversarial=False, optimizer=optax.sgd(0.0))
    step = jax.jit(step)
    first, one = step(state, IMAGES, KEY)
    _, two = step(first, IMAGES, KEY)
    _, again = step(state, IMAGES, KEY)
    assert float(one["nll"]) == float(again["nll"]) != float(two["nll"])


@pytest.mark.parametrize(
    "nll, gan, expected",
    [
        ([3.0, 4.0], [0.0, 1.0], 5 / 1.0001),
        ([3.0, 4.0], [0.0, 0.0], 1e4),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([np.nan, 0.0], [1.0, 0.0], 0.0),
        ([1.0, 0.0], [np.nan, 0.0], 0.0),
        ([np.inf, 0.0], [1.0, 0.0], 0.0),
        ([1.0, 0.0], [np.inf, 0.0], 0.0),
    ],
)
def test_adaptive_weight_is_a_ratio_of_norms_and_always_finite(nll, gan, expected):
    weight = training.adaptive_weight(jnp.array(nll), jnp.array(gan))
    assert float(weight) == pytest.approx(expected, rel=1e-5)


def test_distances():
    x, y = jnp.zeros((2, 1, 2, 2)), jnp.stack([jnp.ones((1, 2, 2)), -3 * jnp.ones((1, 2, 2))])
    assert float(training.l1_distance(x, y)) == 2.0
    assert float(training.l2_distance(x, y)) == 5.0


def test_measured_latents_have_mean_zero_and_variance_one():
    n = 4000
    rng = np.random.default_rng(0)
    spread = np.array([0.5, 2.0])[:, None, None]
    mean = (3.0 + spread * rng.standard_normal((n, 2, 2, 3))).astype(np.float32)
    logvar = rng.uniform(-3, 1, (n, 2, 2, 3)).astype(np.float32)
    shift, scale = training.measure_latents(mean, logvar)
    z_raw = mean + np.exp(logvar / 2) * rng.standard_normal(mean.shape)
    z = (z_raw - np.reshape(shift, (2, 1, 1))) * np.reshape(scale, (2, 1, 1))
    # Five standard errors; a fourth moment below 9 bounds that of the variance by sqrt(8 / n).
    assert np.all(np.abs(z.mean((0, 2, 3))) < 5 / np.sqrt(6 * n))
    assert np.all(np.abs(z.var((0, 2, 3)) - 1) < 5 * np.sqrt(8 / (6 * n)))
    with pytest.raises(ValueError, match="a latent channel has no variance"):
        training.measure_latents(mean * 0, np.full_like(mean, -np.inf))
