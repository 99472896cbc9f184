"""Exact flow maps, velocities and consistency functions, of a mixture and of a normal."""

import jax
import jax.numpy as jnp
import numpy as np

import eqxldm as ex

FLOW = ex.Diffusion(ex.LinearFlow(), ex.predict_velocity)
TRIG = ex.Diffusion(ex.CosineVP(), ex.predict_v)
MIXTURE = ex.GaussianMixture([0.3, 0.7], [-1.0, 1.2], [0.2, 0.4])
MEAN, STD = 1.0, 0.5  # of the Gaussian, whose maps are closed forms: cheap


def grid():
    return jnp.linspace(-1.5, 1.5, 7)  # float64 under x64


def velocity(path=FLOW.path):
    return MIXTURE.denoiser(path, ex.predict_velocity)


def gaussian_map(path):
    """`x_s = alpha_s m + sqrt(v_s / v_t) (x_t - alpha_t m)`, `v = alpha^2 std^2 + sigma^2`."""

    def flow_map(x_t, t, s):
        at_t, at_s = path.coefficients(t), path.coefficients(s)
        spread = lambda at: jnp.hypot(at.alpha * STD, at.sigma)
        centred = (x_t - at_t.alpha * MEAN) / spread(at_t)
        return at_s.alpha * MEAN + spread(at_s) * centred

    return flow_map


def gaussian_velocity(path, prediction):
    return ex.GaussianMixture([1.0], [MEAN], [STD]).denoiser(path, prediction)


def off(network, theta):
    """The truth and a little of something else: smooth in everything it is given."""

    def moved(x_t, t, cond=None, *, key=None, **options):
        h = options.get("h", 0.0)
        return network(x_t, t, cond, key=key, **options) + theta * (x_t + jnp.cos(t + h))

    return moved


def slopes(objective, network, times, n, thetas=(0.0, 0.3), *, x0=None):
    """The slope of the loss in theta, a mean over `n` examples, and how sure: `(mean, error)`.

    Of the Gaussian, or of the data `x0`, `(n, 1)`.
    """
    if x0 is None:
        x0 = MEAN + STD * jax.random.normal(jax.random.key(0), (n, 1))
    times = jax.tree.map(jnp.asarray, times)

    def one(theta, x0, key):
        return objective.loss(off(network, theta), x0, times, None, key=key)[0]

    slope = jax.jit(jax.vmap(jax.grad(one), (None, 0, 0)))
    keys = jax.random.split(jax.random.key(1), n)
    found = [np.asarray(slope(jnp.asarray(theta), x0, keys)) for theta in thetas]
    return [(np.mean(s), np.std(s) / np.sqrt(n)) for s in found]
