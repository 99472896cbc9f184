"""Lists whose cross products the tests run over, and problems with a known answer."""

import itertools
import json
from pathlib import Path
from unittest import mock

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import eqxldm
from eqxldm import pretrained
from eqxldm.models import AutoencoderKL, DiT, PatchDiscriminator
from eqxldm.pretrained.files import write_safetensors

LINEAR_BETAS = eqxldm.linear_betas(1000)
ALPHA_BAR = eqxldm.alpha_bar_from_betas(LINEAR_BETAS)

PATHS = {
    "discrete": eqxldm.DiscreteVP(ALPHA_BAR),
    "cosine": eqxldm.CosineVP(),
    "linear": eqxldm.LinearFlow(),
    "exploding": eqxldm.VarianceExploding(0.02, 5.0),
}
VP_PATHS = {name: PATHS[name] for name in ("discrete", "cosine")}
PREDICTIONS = {
    "eps": eqxldm.predict_eps,
    "x0": eqxldm.predict_x0,
    "v": eqxldm.predict_v,
    "velocity": eqxldm.predict_velocity,
    "score": eqxldm.predict_score,
}
ODE_SOLVERS = {
    "euler": eqxldm.Euler(),
    "heun": eqxldm.Heun(),
    "ddim": eqxldm.DDIM(),
    "dpmpp": eqxldm.DPMSolverPP2M(),
    "dpmpp3m": eqxldm.DPMSolverPP3M(),
    "unipc": eqxldm.UniPC(lower_order_final=False),
}
SDE_SOLVERS = {
    "ddim_eta1": eqxldm.DDIM(1.0),
    "ddpm_small": eqxldm.DDPM(),
    "ddpm_large": eqxldm.DDPM(eqxldm.fixed_large),
    "euler_maruyama": eqxldm.EulerMaruyama(),
    "dpmpp_sde": eqxldm.DPMSolverPP2M(1.0),
}
SOLVERS = ODE_SOLVERS | SDE_SOLVERS


def reference(name):
    return np.load(Path(__file__).parent / "reference" / f"{name}.npz")


def relative_error(actual, expected):
    """The largest difference, relative to the largest value expected."""
    expected = np.asarray(expected)
    return np.max(np.abs(np.asarray(actual) - expected)) / np.max(np.abs(expected))


def gaussian_denoiser(path, prediction, mean, std):
    """The optimal denoiser of `x0 ~ N(mean, std^2)`: `E[out | x_t]`."""
    return eqxldm.GaussianMixture([1.0], [mean], [std]).denoiser(path, prediction)


def transported(path, mean, std, t, s, x_t):
    """Where the probability-flow ODE of `N(mean, std^2)` carries `x_t` at `t` to at `s`."""

    def spread(at):
        return np.sqrt(at.alpha**2 * std**2 + at.sigma**2)

    at_t, at_s = path.coefficients(t), path.coefficients(s)
    return at_s.alpha * mean + spread(at_s) / spread(at_t) * (x_t - at_t.alpha * mean)


# Of most paths t = 1 holds no data: some predictions are singular there.
LATEST = 0.98
MEAN, STD = 0.7, 0.5
X_T = np.array([-1.5, -0.2, 0.4, 2.0])


def sample(solver, path, times, x_T, *, prediction=eqxldm.predict_v, mean=MEAN, std=STD, seed=0):
    """From `x_T` with the exact denoiser of N(mean, std^2)."""
    denoiser = gaussian_denoiser(path, prediction, mean, std)
    run = jax.jit(
        lambda x_T, key: eqxldm.sample(
            denoiser, eqxldm.Diffusion(path, prediction), solver, times, x_T, key=key
        )
    )
    return run(jnp.asarray(x_T), jax.random.key(seed))


class WithNoise(eqxldm.AbstractSolver):
    """A solver whose noise is given, one array a call, instead of drawn from the key."""

    solver: eqxldm.AbstractSolver
    noise: np.ndarray

    def plan(self, path, times):
        plan = self.solver.plan(path, times)
        return eqxldm.Plan(plan.t, plan.s, plan.step, (plan.table, self.noise))

    def init(self, x):
        return self.solver.init(x)

    def step(self, table, x, estimate, carry, *, key):
        table, noise = table
        with mock.patch("jax.random.normal", lambda key, shape, dtype: noise.astype(dtype)):
            return self.solver.step(table, x, estimate, carry, key=key)


def array_batches(arrays, batch_size, *, seed, **options):
    """Batches of rows of arrays that share their first axis."""
    from eqxldm.data import Batches

    n = len(next(iter(arrays.values())))
    read = lambda indices, epochs: ({name: a[indices] for name, a in arrays.items()}, {})
    return Batches(n, batch_size, read, seed=seed, **options)


def small_dit(*, seed=0, **changes):
    """A DiT of a size for tests, on a latent that is not square."""
    sizes = dict(patch_size=2, depth=3, width=16, num_heads=2, num_classes=5, mlp_ratio=2.0)
    return DiT((3, 4, 8), **{**sizes, **changes}, key=jax.random.key(seed))


@eqx.filter_jit
def run(dit, *args):
    """A network's output, compiled."""
    return dit(*args)


@eqx.filter_jit
def value_and_gradient(dit, *args):
    """A network's output, and the gradient of a weighted sum of it."""

    def loss(dit):
        out = dit(*args)
        weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        return jnp.sum(out.astype(jnp.float32) * weights), out

    gradient, out = eqx.filter_grad(loss, has_aux=True)(dit)
    return out, gradient


def small_autoencoder(*, seed=0, in_channels=1, latent_channels=2, **changes):
    sizes = dict(channels=(8, 16), blocks=1, groups=4)
    key = jax.random.key(seed)
    return AutoencoderKL(in_channels, latent_channels, **{**sizes, **changes}, key=key)


def small_discriminator(*, seed=0, in_channels=1, layers=1):
    key = jax.random.key(seed)
    return PatchDiscriminator(in_channels, channels=8, layers=layers, groups=4, key=key)


def perturbed(model, *, seed=1, size=0.1):
    """The model with noise on every parameter, so that nothing that starts at zero hides."""
    params, static = eqx.partition(model, eqx.is_inexact_array)
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noisy = [p + size * jax.random.normal(k, p.shape) for p, k in zip(leaves, keys, strict=True)]
    return eqx.combine(jax.tree.unflatten(treedef, noisy), static)


def filled(make, *, seed=0, size=0.2):
    """A model with a random number for every parameter; its own start is never computed."""
    rng = np.random.default_rng(seed)

    def fill(leaf):
        described = isinstance(leaf, jax.ShapeDtypeStruct)
        return jnp.asarray(size * rng.normal(size=leaf.shape), leaf.dtype) if described else leaf

    return jax.tree.map(fill, eqx.filter_eval_shape(make))


def named_leaves(tree):
    """`{path: array}` of the inexact leaves."""
    leaves = jax.tree_util.tree_leaves_with_path(eqx.filter(tree, eqx.is_inexact_array))
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def tree_error(actual, expected):
    """The largest `relative_error` of a leaf, against the largest value of the whole tree."""
    scale = max(float(jnp.max(jnp.abs(e))) for e in jax.tree.leaves(expected))
    differences = jax.tree.map(lambda a, e: float(jnp.max(jnp.abs(a - e))), actual, expected)
    return max(jax.tree.leaves(differences)) / scale


def numbered(model):
    """The model with another number at every place, and how many there are."""
    leaves, treedef = jax.tree.flatten(model)
    sizes = np.cumsum([0] + [leaf.size for leaf in leaves])
    numbers = [np.arange(a, b, dtype=np.float32) for a, b in itertools.pairwise(sizes)]
    shaped = [n.reshape(leaf.shape) for n, leaf in zip(numbers, leaves, strict=True)]
    return jax.tree.unflatten(treedef, shaped), int(sizes[-1])


def llada_folder(path, network, **changes):
    """A folder as LLaDA is published, in two files with an index."""
    tensors = pretrained.to_state(network, pretrained.llada.llada_layout)
    names, half = sorted(tensors), len(tensors) // 2
    index = {}
    for i, part in enumerate((names[:half], names[half:])):
        write_safetensors(path / f"model-{i}.safetensors", {n: tensors[n] for n in part}, {})
        index |= dict.fromkeys(part, f"model-{i}.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    config = dict(
        model_type="llada", d_model=16, n_layers=1, n_heads=2, mlp_hidden_size=24, vocab_size=5,
        embedding_size=5, max_sequence_length=8, rope_theta=500000.0, rms_norm_eps=1e-5,
    )  # fmt: skip
    (path / "config.json").write_text(json.dumps(config | changes))
