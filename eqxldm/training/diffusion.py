"""The diffusion loss of a batch: what `make_train_step` needs to train a denoiser."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from ..losses import TimeSampler, Weight, constant_weight, denoising_loss
from ..paths import AbstractPath
from ..predictions import Prediction
from ..sharding import batch_vmap
from .state import LossFn

# (denoiser, path, prediction, x0, t, cond, *, key) -> scalar, of one example
ExampleLoss = Callable[..., Float[Array, ""]]
Latents = tuple[Float[Array, "b zc zh zw"], Int[Array, " b"]]


def drop_labels(
    labels: Int[Array, " b"], null: Int[Array, ""], probability: float, *, key: Key[Array, ""]
) -> Int[Array, " b"]:
    """Replaces each label by `null` with this probability: trains the unconditional branch.

    (Ho & Salimans 2022, algorithm 1)

    >>> drop_labels(jnp.arange(3), jnp.array(10), 1.0, key=jax.random.key(0))
    Array([10, 10, 10], dtype=int32)
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"drop_labels: probability must lie in [0, 1], got {probability}.")
    return jnp.where(jax.random.bernoulli(key, probability, labels.shape), null, labels)


def in_dtype(denoiser: Any, dtype: Any) -> Any:
    """The denoiser computing in `dtype`: it gets `x_t` in it, and its output is float32.

    Its layers cast their float32 parameters where they use them; norms' statistics, softmax and
    the time's embedding are float32 all the same.

    >>> half = in_dtype(lambda x_t, t, cond, *, key=None: x_t, jnp.bfloat16)
    >>> half(jnp.ones(2), 0.5, None).dtype
    dtype('float32')
    """
    if jnp.dtype(dtype) == jnp.float32:
        return denoiser

    def cast(x_t: Any, t: Any, cond: Any, *, key: Any = None) -> Any:
        return denoiser(x_t.astype(dtype), t, cond, key=key).astype(jnp.float32)

    return cast


def make_diffusion_loss(
    path: AbstractPath,
    prediction: Prediction,
    time_sampler: TimeSampler,
    *,
    weight: Weight = constant_weight,
    example_loss: ExampleLoss | None = None,
    label_dropout: float = 0.1,
    prepare: Callable[[Any, Key[Array, ""]], Latents] | None = None,
    dtype: Any = jnp.float32,
) -> LossFn:
    """`loss(model, batch, key)`: the mean loss of a batch `(x0, labels)`.

    The loss of an example is `denoising_loss` with `weight`, or `example_loss`, called as
    `eqxldm.hybrid_loss` is: DiT's own loss is `example_loss=eqxldm.hybrid_loss` with
    `LearnedRange(predict_eps)` and `discrete_time(1000)`.

    `prepare(batch, key) -> (x0, labels)` runs first, inside jit; it may, for example, draw
    latents from cached posteriors. The model must have a `null` label.

    The network computes in `dtype`; its parameters, the schedule and the loss stay float32
    (`in_dtype`).

    **Raises** `ValueError` if both a `weight` and an `example_loss` are given.
    """
    if example_loss is not None and weight is not constant_weight:
        raise ValueError("make_diffusion_loss: example_loss has its own weight; give one of them.")

    def loss_fn(model: Any, batch: Any, key: Key[Array, ""]):
        prepare_key, time_key, drop_key, noise_key = jax.random.split(key, 4)
        x0, labels = batch if prepare is None else prepare(batch, prepare_key)
        t = time_sampler(time_key, x0.shape[0])
        labels = drop_labels(labels, model.null, label_dropout, key=drop_key)
        keys = jax.random.split(noise_key, x0.shape[0])
        denoiser = in_dtype(model, dtype)

        def one(x0, t, label, key):
            if example_loss is not None:
                return example_loss(denoiser, path, prediction, x0, t, label, key=key)
            return denoising_loss(denoiser, path, prediction, weight, x0, t, label, key=key)

        return jnp.mean(batch_vmap(one)(x0, t, labels, keys)), {}

    return loss_fn
