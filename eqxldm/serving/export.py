"""Bundles: a model as one file of compiled-to-be functions, which runs without the model's code.

A bundle is a zip archive with functions that `jax.export` has written (StableHLO, for any batch and
for several platforms), the weights that are their first argument, and a record of settings. JAX
alone loads it, as the page "Smaller and faster" shows; `load_bundle` does so in one call.
"""

import io
import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jaxtyping import Array, Float, PyTree

from ..data.pixels import to_uint8
from ..diffusion import Diffusion
from ..durable import replacing
from ..flow_maps import FlowMap, sample_map
from ..guidance import guide
from ..sampling import sample
from ..solvers import AbstractSolver

PLATFORMS = ("cpu", "cuda", "tpu")
FORMAT = 1  # of the archive's record
SETTINGS, WEIGHTS = "settings.json", "weights/{:05d}.npy"
FUNCTIONS = ("denoiser", "decoder", "sampler")
FLOW_MAP = "flow_map"  # a fourth function, of networks that were trained for few calls


class BundleError(ValueError):
    """A file that is no bundle, or not one for this machine."""


class Exportable(NamedTuple):
    """A model, and how it is sampled.

    `network` is `(x_t, t, cond)` of one example, of the given `shape`; `decoder` makes a picture in
    [-1, 1] of its `x0`, of which a border of `pad` pixels is cut off; `cond` is an example of a
    condition, and `null` the one for "none", if there is guidance, for t in `interval`. Both are
    arrays, or dicts, lists or tuples of arrays, or None.

    Of a network that was trained for few calls `flow_map` makes its map, `network -> FlowMap`
    (`flow_maps`). With `solver` None the sampler goes over `times` by it, as `sample_map` does, and
    has no use for a guidance scale.
    """

    network: Any
    decoder: Any
    diffusion: Diffusion
    solver: AbstractSolver | None
    times: Any
    shape: tuple[int, ...]
    cond: PyTree = None
    null: PyTree = None
    interval: tuple[float, float] = (0.0, 1.0)
    pad: int = 0
    flow_map: Callable[[Any], FlowMap] | None = None


def save_bundle(
    model: Exportable,
    path: str | Path,
    settings: dict[str, Any] | None = None,
    *,
    platforms: Sequence[str] = PLATFORMS,
) -> None:
    """Writes a bundle: the functions `denoiser`, `decoder` and `sampler`, and the weights once.

    With `w` the weights and a leading axis of any length `b` on the other arguments they are

    - `denoiser(w, x_t, t, cond) -> out`,
    - `decoder(w, z) -> pictures (b, c, h, w)` in about [-1, 1],
    - `sampler(w, keys, cond, scale) -> pictures (b, h, w, c)` in uint8: the noise of `keys (b, 2)`,
      uint32, sampled over the model's grid in one scan with the guidance scale `scale (b,)`, and
      decoded,
    - where the model has a flow map, `flow_map(w, x_t, t, s, cond, keys) -> x_s`; `keys (b, 2)` are
      of the noise that some maps draw.

    **Arguments**: `settings` are kept beside what the bundle says of itself, and must be JSON.
    `platforms`, of `jax.export`: what the functions are lowered for.

    **Raises** `ValueError` for a model with neither a solver nor a flow map.

    >>> import tempfile
    >>> from eqxldm import DDIM, LinearFlow, predict_x0, uniform_times
    >>> network = lambda x_t, t, cond, key=None: jnp.full_like(x_t, 0.5)
    >>> model = Exportable(network, lambda z: z, Diffusion(LinearFlow(), predict_x0), DDIM(),
    ...                    uniform_times(3), (1, 2, 2))
    >>> path = Path(tempfile.mkdtemp()) / "half.bundle"
    >>> save_bundle(model, path, platforms=["cpu"])
    >>> load_bundle(path).draw([1, 2, 3]).shape
    (3, 2, 2, 1)
    """
    if model.solver is None and model.flow_map is None:
        raise ValueError("save_bundle: the model has neither a solver nor a flow map.")
    params, static = eqx.partition((model.network, model.decoder), eqx.is_array)
    weights, treedef = jax.tree.flatten(params)
    parts = lambda w: eqx.combine(jax.tree.unflatten(treedef, w), static)

    def denoiser(w: Any, x_t: Array, t: Array, cond: Any) -> Array:
        return jax.vmap(parts(w)[0])(x_t, t, cond)

    def decoder(w: Any, z: Array) -> Array:
        return jax.vmap(parts(w)[1])(z)

    def sampler(w: Any, keys: Array, cond: Any, scale: Array) -> Array:
        network, decode = parts(w)

        def one(words: Array, cond: Any, scale: Array) -> Array:
            noise_key, key = jax.random.split(_key(words))
            x = model.diffusion.sample_prior(model.shape, key=noise_key)
            if model.solver is None:
                assert model.flow_map is not None
                return decode(sample_map(model.flow_map(network), model.times, x, cond, key=key))
            guided = network
            if model.null is not None:
                guided = guide(network, model.null, scale, interval=model.interval)
            arguments = model.diffusion, model.solver, model.times, x, cond
            return decode(sample(guided, *arguments, key=key))

        return to_uint8(jax.vmap(one)(keys, cond, scale), pad=model.pad)

    def flow_map(w: Any, x_t: Array, t: Array, s: Array, cond: Any, keys: Array) -> Array:
        assert model.flow_map is not None
        goes = model.flow_map(parts(w)[0])
        one = lambda x_t, t, s, cond, words: goes(x_t, t, s, cond, key=_key(words))
        return jax.vmap(one)(x_t, t, s, cond, keys)

    shape = lambda a, *batch: jax.ShapeDtypeStruct((*batch, *a.shape), a.dtype)
    given = [shape(a) for a in weights]
    (b,) = export.symbolic_shape("b")
    example = jax.tree.map(jnp.asarray, model.cond)
    cond = jax.tree.map(lambda a: shape(a, b), example)
    floats = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
    x, keys = floats(b, *model.shape), jax.ShapeDtypeStruct((b, 2), jnp.uint32)
    arguments: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "denoiser": (denoiser, (given, x, floats(b), cond)),
        "decoder": (decoder, (given, x)),
        "sampler": (sampler, (given, keys, cond, floats(b))),
    }
    if model.flow_map is not None:
        arguments[FLOW_MAP] = flow_map, (given, x, floats(b), floats(b), cond, keys)
    about = {
        "format": FORMAT,
        "shape": list(model.shape),
        "pad": model.pad,
        "interval": list(model.interval),
        "guided": model.null is not None,
        FLOW_MAP: model.flow_map is not None,
        "null": jax.tree.map(lambda a: np.asarray(a).tolist(), model.null),
        "cond": jax.tree.map(lambda a: [str(a.dtype), *a.shape], example),
        "weights": [str(a.dtype) for a in weights],
        "platforms": list(platforms),
        "jax": jax.__version__,
        **(settings or {}),
    }
    # An entry a file, uncompressed but for the text: weights hardly shrink.
    with replacing(Path(path)) as temporary, zipfile.ZipFile(temporary, "w") as file:
        file.writestr(SETTINGS, json.dumps(about, indent=2) + "\n")
        for name, (function, args) in arguments.items():
            written = export.export(jax.jit(function), platforms=platforms)(*args)
            file.writestr(f"{name}.bin", bytes(written.serialize()))
        for i, array in enumerate(weights):
            with file.open(WEIGHTS.format(i), "w", force_zip64=True) as entry:
                host = np.asarray(array)
                # Small floats are unknown to NumPy's files: their bits are written.
                plain = host if host.dtype.kind in "biuf" else host.view(f"u{host.itemsize}")
                np.save(entry, plain, allow_pickle=False)


class Bundle:
    """A loaded bundle: `settings`, `denoiser`, `decoder` and `draw`, for batches of any size.

    Programs are compiled at the first call for each size of a batch.
    """

    def __init__(self, settings: dict[str, Any], programs: dict[str, Any], weights: list[Any]):
        self.settings, self.programs, self.weights = settings, programs, weights
        self._calls = {name: jax.jit(program.call) for name, program in programs.items()}

    @property
    def shape(self) -> tuple[int, ...]:
        """Of `x_t`, one example."""
        return tuple(self.settings["shape"])

    def denoiser(self, x_t: Any, t: Any, cond: Any = None) -> Array:
        """The network's output for a batch."""
        return self._calls["denoiser"](self.weights, x_t, t, cond)

    def decoder(self, z: Float[Array, "b ..."]) -> Array:
        """Pictures in about [-1, 1] of a batch of what the sampling ends with."""
        return self._calls["decoder"](self.weights, z)

    def draw(self, seeds: Sequence[int], cond: Any = None, scale: float = 1.0) -> Array:
        """Pictures in uint8, one for each seed, by the bundle's own solver and grid.

        `cond` has a leading axis as long; `scale` is that of guidance.
        """
        keys = jnp.asarray([[s >> 32 & 0xFFFFFFFF, s & 0xFFFFFFFF] for s in seeds], jnp.uint32)
        scales = jnp.full(len(keys), scale, jnp.float32)
        return self._calls["sampler"](self.weights, keys, cond, scales)

    @property
    def network(self) -> "BundleNetwork":
        """The network as `eqxldm.sample` and every guidance take one, of one example."""
        return BundleNetwork(self.weights, Program(self.programs["denoiser"]))

    @property
    def flow_map(self) -> "BundleFlowMap | None":
        """The flow map as `eqxldm.sample_map` takes one, of one example; None without one."""
        if FLOW_MAP not in self.programs:
            return None
        return BundleFlowMap(self.weights, Program(self.programs[FLOW_MAP]))

    @property
    def picture(self) -> "BundleDecoder":
        """The decoder of one example, likewise."""
        return BundleDecoder(self.weights, Program(self.programs["decoder"]))


def load_bundle(path: str | Path) -> Bundle:
    """The bundle in a file, its weights on the default device.

    A bundle is a program: run one of people whom you trust. Damage is found by the CRC-32 that a
    zip archive has of each entry, and weights and settings of another bundle by what the functions
    take.

    **Raises** `FileNotFoundError`; `BundleError` if it is no bundle, is damaged, or was not lowered
    for this platform.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"load_bundle: there is no file {path}.")
    try:
        with zipfile.ZipFile(path) as file:
            settings = json.loads(_entry(file, SETTINGS))
            if settings["format"] != FORMAT:
                raise BundleError(
                    f"{path} is a bundle of format {settings['format']!r:.100}, not {FORMAT}."
                )
            # Files of before flow maps do not speak of them.
            names = [*FUNCTIONS, *([FLOW_MAP] if settings.get(FLOW_MAP) else [])]
            programs = {
                name: export.deserialize(bytearray(_entry(file, f"{name}.bin"))) for name in names
            }
            weights = []
            for i, dtype in enumerate(settings["weights"]):
                host = np.load(io.BytesIO(_entry(file, WEIGHTS.format(i))), allow_pickle=False)
                weights.append(jnp.asarray(host.view(jnp.dtype(dtype))))
        _check(settings, programs, weights)
    except BundleError:
        raise
    except Exception as error:  # zipfile, json, NumPy and jax.export raise their own kinds
        raise BundleError(
            f"{path} is damaged or no bundle ({type(error).__name__}: {str(error)[:500]}). `make "
            "export` writes one."
        ) from error
    here = jax.default_backend()
    known = {"gpu": ("cuda", "rocm")}.get(here, (here,))
    if not set(known) & set(programs["denoiser"].platforms):
        raise BundleError(
            f"{path} is for {', '.join(programs['denoiser'].platforms)}, and this machine has "
            f"{here}. Export it again for that: platforms=."
        )
    return Bundle(settings, programs, weights)


def _entry(file: zipfile.ZipFile, name: str) -> bytes:
    """An entry of a bundle, whose checksum has been compared; no larger than the file."""
    if file.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed")
    return file.read(name)


def _check(settings: dict[str, Any], programs: dict[str, Any], weights: list[Any]) -> None:
    """Refuses weights and settings that are not those of the functions."""
    given = [(a.shape, a.dtype) for a in weights]
    takes = lambda program: jax.tree.unflatten(program.in_tree, program.in_avals)[0]
    for name, program in programs.items():
        params, first = takes(program)[:2]
        if [(a.shape, a.dtype) for a in params] != given:
            raise ValueError(f"the weights are not those that {name} takes")
        if name != "sampler" and list(first.shape[1:]) != settings["shape"]:
            raise ValueError(f"{name} is not for a shape of {settings['shape']}")
    *_, example = takes(programs["denoiser"])
    cond = jax.tree.map(lambda a: [str(a.dtype), *a.shape[1:]], example)
    if cond != settings["cond"]:
        raise ValueError(f"the functions take {cond}, not {settings['cond']}")


class Program:
    """An exported function, equal to itself alone, so that programs around it are compiled once."""

    def __init__(self, exported: Any):
        self.call = exported.call


class BundleNetwork(eqx.Module):
    """A bundle's denoiser for one example; its weights are its leaves.

    Under `jax.vmap`, nested ones too, the whole batch is one call.
    """

    weights: list[Array]
    program: Program = eqx.field(static=True)

    def __call__(self, x_t: Array, t: Array, cond: PyTree = None, *, key: Any = None) -> Array:
        call = _batched(self.program.call)
        one = lambda a: jnp.asarray(a)[None]
        return call(self.weights, (one(x_t), one(t), jax.tree.map(one, cond)))[0]


class BundleFlowMap(eqx.Module):
    """A bundle's flow map for one example, likewise; without a key its noise is that of key 0."""

    weights: list[Array]
    program: Program = eqx.field(static=True)

    def __call__(
        self, x_t: Array, t: Array, s: Array, cond: PyTree = None, *, key: Any = None
    ) -> Array:
        words = jnp.zeros(2, jnp.uint32) if key is None else jax.random.key_data(key)
        one = lambda a: jnp.asarray(a)[None]
        given = one(x_t), one(t), one(s), jax.tree.map(one, cond), one(words)
        return _batched(self.program.call)(self.weights, given)[0]


class BundleDecoder(eqx.Module):
    """A bundle's decoder for one example, likewise."""

    weights: list[Array]
    program: Program = eqx.field(static=True)

    def __call__(self, z: Array) -> Array:
        return _batched(self.program.call)(self.weights, (z[None],))[0]


def _key(words: Array) -> Array:
    return jax.random.wrap_key_data(words, impl="threefry2x32")


def _batched(call: Any) -> Any:
    """`call(weights, *given)` with a batch axis, with a rule for one more axis: exported functions
    have none of their own."""

    @jax.custom_batching.custom_vmap
    def run(weights: Any, given: Any) -> Any:
        return call(weights, *given)

    @run.def_vmap
    def rule(size: int, batched: Any, weights: Any, given: Any) -> Any:
        if any(jax.tree.leaves(batched[0])):
            raise ValueError("a bundle's weights are the same for every example of a batch.")
        spread = lambda a, own: a if own else jnp.broadcast_to(a, (size, *a.shape))
        given = jax.tree.map(spread, given, batched[1])
        flat = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), given)
        inner = jax.tree.leaves(given)[0].shape[:2]
        out = _batched(call)(weights, flat)
        return jax.tree.map(lambda a: a.reshape(*inner, *a.shape[1:]), out), True

    return run
