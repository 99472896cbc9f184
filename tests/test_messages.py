"""What is said of wrong arguments, and what is taken for a JAX array."""

import traceback

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

import eqxldm as ex
from eqxldm._typecheck import check

from helpers import small_autoencoder, small_dit

KEY = jax.random.key(0)
DIT, AE = small_dit(), small_autoencoder()
UNET = ex.models.UNet(
    1, channels=(8, 8), blocks=1, attention_levels=(False, True), num_classes=5, groups=4, key=KEY
)
X, T, LABEL = jnp.zeros((3, 4, 8)), jnp.array(0.5), jnp.array(3)
FLOW, TIMES = ex.Diffusion(ex.LinearFlow(), ex.predict_velocity), ex.uniform_times(2)
KEYS = jax.random.split(KEY, 4)
PIXELS = jnp.zeros((3, 4, 8), jnp.uint8)


def loss(x0, t, **options):
    return ex.denoising_loss(DIT, FLOW, ex.constant_weight, x0, t, LABEL, **options)


def sample(**changes):
    options = dict(denoiser=DIT, diffusion=FLOW, solver=ex.DDIM(), times=TIMES, x_T=X, cond=LABEL)
    return ex.sample(**{**options, **changes})


# What is done wrong, and what the message says of it: the name, what was given, how to fix it.
ERRORS = {
    "a batch for an image": (
        lambda: AE.encode(jnp.zeros((2, 1, 8, 8))),
        ["AutoencoderKL.encode: ", "'x'", "f32[2,1,8,8]", "(c, h, w)", "jax.vmap(model.encode)(x)"],
    ),
    "a batch for a latent": (
        lambda: DIT(jnp.zeros((2, 3, 4, 8)), T, LABEL),
        ["DiT: ", "x_t", "(2, 3, 4, 8)", "batch of 2", "jax.vmap(dit)(x_t, t, cond)"],
    ),
    "a batch for a U-Net": (
        lambda: UNET(jnp.zeros((2, 1, 8, 8)), T, LABEL),
        ["UNet: ", "'x_t'", "f32[2,1,8,8]", "jax.vmap(model)(x_t, t, cond)"],
    ),
    "a batch of times": (
        lambda: DIT(X, jnp.zeros(2), LABEL),
        ["DiT: ", "'t'", "f32[2]", "float scalar", "jax.vmap(model)(x_t, t, cond)"],
    ),
    "a batch of labels": (
        lambda: DIT(X, T, jnp.zeros(2, int)),
        ["LabelEmbedding: ", "'label'", "i32[2]", "integer scalar", "jax.vmap"],
    ),
    "a batch of keys": (
        lambda: AE.encode(jnp.zeros((1, 8, 8)), key=KEYS),
        ["'key'", "key<fry>[4]", "one random key", "key[0]", "jax.vmap"],
    ),
    "a batch for a function": (
        lambda: ex.nn.sinusoidal(jnp.zeros(4), 8),
        ["sinusoidal: ", "'position'", "f32[4]", "jax.vmap(lambda position: sinusoidal("],
    ),
    "pixels as bytes": (
        lambda: DIT(PIXELS, T, LABEL),
        ["DiT: ", "'x_t'", "u8[3,4,8]", "eqxldm.data.to_float(images)"],
    ),
    "pixels as bytes, NumPy": (
        lambda: loss(np.zeros((3, 4, 8), np.uint8), T, key=KEY),
        ["denoising_loss: ", "'x0'", "u8[3,4,8](numpy)", "eqxldm.data.to_float(images)"],
    ),
    "a timestep for a time": (
        lambda: DIT(X, jnp.array(500), LABEL),
        ["DiT: ", "'t'", "i32[]", "float scalar", "timestep i of T is t = (i + 1) / T"],
    ),
    "a timestep for a time, NumPy": (
        lambda: loss(X, np.int64(500), key=KEY),
        ["denoising_loss: ", "'t'", "np.int64(500)", "timestep i of T is t = (i + 1) / T"],
    ),
    "a timestep for a time, Python": (
        lambda: UNET(jnp.zeros((1, 8, 8)), 500, LABEL),
        ["UNet: ", "t must lie in [0, 1]", "got 500", "Timestep i of T is t = (i + 1) / T"],
    ),
    "a constant time above 1, under jit": (
        lambda: jax.jit(lambda x: DIT(x, 1.5, LABEL))(X),
        ["DiT: ", "t must lie in [0, 1]", "got 1.5", "t = (i + 1) / T"],
    ),
    "a time above 1 in a loss": (
        lambda: loss(X, 1.5, key=KEY),
        ["t must lie in [0, 1]", "got 1.5", "t = (i + 1) / T"],
    ),
    "a label out of range": (
        lambda: DIT(X, T, 6),
        ["label must lie in 0 .. 5", "5 means no label", "got 6"],
    ),
    "a negative label": (lambda: DIT(X, T, LABEL - 4), ["label must lie in 0 .. 5", "got -1"]),
    "a label that is a float": (
        lambda: DIT(X, T, jnp.array(3.0)),
        ["'label'", "f32[]", "integer scalar", "label.astype(jnp.int32)"],
    ),
    "an argument left out": (
        lambda: DIT(X),
        ["DiT: ", "no argument for parameter 't'", "f32[3,4,8]", "float scalar", "DiT(x_t, t)"],
    ),
    "the last argument left out": (
        lambda: ex.sample(DIT, FLOW, ex.DDIM(), TIMES),
        ["sample: ", "no argument for parameter 'x_T'", "DiT(...)", "f64[3](numpy)", "times, x_T)"],
    ),
    "an argument in the middle left out": (
        lambda: ex.sample(DIT, FLOW, TIMES, X, LABEL),
        ["sample: ", "no argument for parameter 'solver'", "AbstractSolver", "solver, times, x_T)"],
    ),
    "a keyword left out": (
        lambda: ex.models.DiT((3, 4, 8), patch_size=2, depth=1, width=16, num_heads=2),
        ["DiT: ", "no argument for parameter 'key'", "key=...)"],
    ),
    "a keyword misspelt": (
        lambda: ex.guide(DIT, 5, 3.0, rescal=0.7),
        ["guide: ", "no parameter 'rescal'", "rescal=0.7", "did you mean rescale?"],
    ),
    "one argument too many": (
        lambda: DIT(X, T, LABEL, KEY),
        ["DiT: too many positional arguments", "key<fry>[]", "x_t, t, cond", "help("],
    ),
    "another shape": (
        lambda: FLOW.noise(X, T, jnp.zeros((3, 8, 4))),
        ["Diffusion.noise: ", "'eps'", "f32[3,8,4]", "like that of x0, (3, 4, 8)", "jax.vmap"],
    ),
    "an axis too few": (
        lambda: AE.encode(jnp.zeros((8, 8))),
        ["AutoencoderKL.encode: ", "'x'", "f32[8,8]", "(c, h, w)", "x[None]"],
    ),
    "another dtype": (
        lambda: ex.data.to_float(np.zeros((1, 4, 4, 1))),
        ["to_float: ", "'images'", "f64[1,4,4,1](numpy)", "uint8", "fix:"],
    ),
    "a list for an array": (
        lambda: sample(times=[1.0, 0.5, 0.0]),
        ["sample: ", "'times'", "[1.0, 0.5, 0.0]", "jnp.asarray(times)"],
    ),
    "a seed for a key": (
        lambda: FLOW.sample_prior((2,), key=7),
        ["Diffusion.sample_prior: ", "'key'", "given:  7", "jax.random.key(7)"],
    ),
    "numbers for a key": (
        lambda: sample(key=jnp.zeros(2)),
        ["sample: ", "'key'", "f32[2]", "random key", "key=jax.random.key(0)"],
    ),
    "no key where noise is drawn": (
        lambda: sample(solver=ex.DDIM(1.0)),
        ["DDIM", "key", "key=jax.random.key(0)"],
    ),
    "a class for its instance": (
        lambda: sample(solver=ex.DDIM),
        ["sample: ", "'solver'", "the class DDIM", "AbstractSolver", "DDIM(...)"],
    ),
    "a path for a diffusion": (
        lambda: sample(diffusion=ex.LinearFlow()),
        ["sample: ", "'diffusion'", "LinearFlow(...)", "needed: Diffusion", "help("],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_says_what_came_what_is_needed_and_how_to_fix_it(name):
    call, parts = ERRORS[name]
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert [part for part in parts if part not in message] == [], message
    lines = message.splitlines()
    assert len(lines) <= 6 and max(map(len, lines)) < 180
    assert "patch_embedding" not in message and "weight=" not in message  # no model is printed
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@pytest.mark.parametrize("name", ERRORS)
def test_a_traceback_has_no_frames_of_the_checker(name):
    with pytest.raises(ValueError) as caught:
        ERRORS[name][0]()
    files = {frame.filename for frame in traceback.extract_tb(caught.value.__traceback__)}
    assert not [file for file in files if "typecheck" in file or "beartype" in file], files


def test_errors_are_of_every_kind_that_a_caller_may_catch():
    for kind in (ex.ArgumentError, TypeCheckError, TypeError, ValueError):
        with pytest.raises(kind):
            DIT(X, T, jnp.array(3.0))


def test_a_type_error_of_the_function_itself_stays():
    with pytest.raises(TypeError, match="unsupported operand") as caught:
        ex.checked(lambda x_t, t, cond, key=None: x_t + cond)(X, T, None)
    assert not isinstance(caught.value, ex.ArgumentError)


def test_a_result_that_is_not_what_was_promised_is_named():
    with pytest.raises(ex.ArgumentError) as caught:
        check(promises_a_float)("x")
    assert str(caught.value).splitlines()[:3] == [
        "promises_a_float: the result is not what it should be.",
        "  given:  'x'",
        "  needed: float",
    ]


def promises_a_float(x) -> float:
    return x


def test_where_a_value_is_traced_the_check_is_at_run_time():
    label = eqx.filter_jit(lambda label: DIT(X, T, label))
    assert jnp.all(jnp.isfinite(label(LABEL)))
    checked = eqx.filter_jit(lambda t, label: ex.checked(DIT)(X, t, label))
    with pytest.raises(RuntimeError, match=r"t must lie in \[0, 1\].* t = \(i \+ 1\) / T"):
        checked(jnp.array(1.5), LABEL)
    perturbed = jax.tree.map(lambda a: a + 0.1 if eqx.is_inexact_array(a) else a, DIT)
    assert jnp.all(jnp.isnan(eqx.filter_jit(lambda y: perturbed(X, T, y))(LABEL + 9)))
    with pytest.raises(RuntimeError, match="output holds NaN"):
        eqx.filter_jit(lambda y: ex.checked(perturbed)(X, T, y))(LABEL + 9)


# The same call on NumPy arrays and numbers, and on JAX arrays.
x, image = np.linspace(-1, 1, 96).reshape(3, 4, 8), np.linspace(-1, 1, 64).reshape(1, 8, 8)
TAKEN = {
    "dit": (lambda: DIT(x, 0.5, 3), lambda: DIT(jnp.asarray(x), T, LABEL)),
    "dit, ints": (lambda: DIT(x, 1, np.int64(3)), lambda: DIT(jnp.asarray(x), T + 0.5, LABEL)),
    "dit, under jit": (
        lambda: jax.jit(lambda x: DIT(x, np.float32(0.5), 3))(x),
        lambda: DIT(jnp.asarray(x), T, LABEL),
    ),
    "unet": (lambda: UNET(image, 0.5, 3), lambda: UNET(jnp.asarray(image), T, LABEL)),
    "encode": (lambda: AE.encode(image), lambda: AE.encode(jnp.asarray(image))),
    "decode": (
        lambda: AE.decode(np.asarray(AE.encode(image))),
        lambda: AE.decode(AE.encode(jnp.asarray(image))),
    ),
    "an old key": (
        lambda: AE.encode(image, key=jax.random.PRNGKey(3)),
        lambda: AE.encode(jnp.asarray(image), key=jax.random.key(3)),
    ),
    "sample": (
        lambda: sample(x_T=x, cond=3, times=jnp.asarray(TIMES)),
        lambda: sample(x_T=jnp.asarray(x)),
    ),
    "guide": (
        lambda: ex.guide(DIT, 5, np.float32(3))(x, 0.5, 3),
        lambda: ex.guide(DIT, DIT.null, 3.0)(jnp.asarray(x), T, LABEL),
    ),
    "noise": (
        lambda: FLOW.noise(x, 0.25, np.ones((3, 4, 8))),
        lambda: FLOW.noise(jnp.asarray(x), jnp.array(0.25), jnp.ones((3, 4, 8))),
    ),
    "loss": (
        lambda: loss(x, 0.5, key=jax.random.PRNGKey(1)),
        lambda: loss(jnp.asarray(x), T, key=jax.random.key(1)),
    ),
    "to_float": (
        lambda: ex.data.to_float(np.full((1, 2, 2, 1), 200, np.uint8)),
        lambda: ex.data.to_float(jnp.full((1, 2, 2, 1), 200, jnp.uint8)),
    ),
    "to_uint8": (
        lambda: ex.data.to_uint8(np.zeros((1, 1, 2, 2))),
        lambda: ex.data.to_uint8(jnp.zeros((1, 1, 2, 2))),
    ),
    "psnr": (
        lambda: ex.metrics.psnr(image[None], image[None] + 0.1),
        lambda: ex.metrics.psnr(jnp.asarray(image[None]), jnp.asarray(image[None] + 0.1)),
    ),
    "frechet_distance, of JAX arrays": (
        lambda: ex.metrics.frechet_distance(jnp.asarray(image[0]), jnp.asarray(image[0]) ** 2),
        lambda: ex.metrics.frechet_distance(
            image[0].astype("float32"), image[0].astype("float32") ** 2
        ),
    ),
}


@pytest.mark.parametrize("name", TAKEN)
def test_numpy_arrays_and_numbers_are_taken_for_jax_arrays(name):
    loose, strict = (call() for call in TAKEN[name])
    assert jnp.asarray(loose).dtype == jnp.asarray(strict).dtype
    np.testing.assert_allclose(loose, strict, rtol=1e-5, atol=1e-6)


def test_a_precision_that_was_asked_for_stays(x64):
    assert FLOW.noise(x, 0.5, x).dtype == jnp.float64
    assert FLOW.noise(x.astype("float32"), np.float32(0.5), x.astype("float32")).dtype == "float32"
