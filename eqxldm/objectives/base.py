"""What a training objective is: which times it draws, and the loss of one example at them."""

import abc
from typing import Any

import equinox as eqx
from jaxtyping import Array, Float, Int, Key, PyTree

Aux = dict[str, Any]  # scalars to log beside the loss


class Context(eqx.Module):
    """What the train step lends an objective: how far training is, and the averaged networks.

    **Arguments**: `step` counts the steps done; `ema` has the network with each of the state's
    averages in the place of its parameters, in their order: teachers, through which no gradient
    flows to the parameters.
    """

    step: Int[Array, ""]
    ema: tuple[Any, ...] = ()


class AbstractObjective(eqx.Module):
    """A training objective. To add one, write these two functions.

    The times of an objective are whatever it needs: one a example for denoising, two for a flow
    map. The loss is of one example; `training.make_loss` makes the batch.

    >>> import jax, jax.numpy as jnp
    >>> from eqxldm import uniform_time
    >>> class Reconstruct(AbstractObjective):  # a toy: the network should give x0 from x_t = x0 / 2
    ...     def times(self, key, n):
    ...         return uniform_time(key, n)
    ...     def loss(self, denoiser, x0, times, cond, *, key, context=None):
    ...         return jnp.mean((denoiser(x0 / 2, times, cond, key=key) - x0) ** 2), {}
    >>> denoiser = lambda x_t, t, cond, key=None: 2 * x_t
    >>> loss, _ = Reconstruct().loss(denoiser, jnp.ones(3), jnp.array(0.5), None, key=None)
    >>> float(loss)
    0.0
    """

    @abc.abstractmethod
    def times(self, key: Key[Array, ""], n: int) -> PyTree:
        """The times of a batch: a PyTree of arrays `(n,)`, such as `t` or `{"t": t, "r": r}`."""

    @abc.abstractmethod
    def loss(
        self,
        denoiser: Any,
        x0: Float[Array, "*shape"],
        times: PyTree,
        cond: PyTree,
        *,
        key: Any,
        context: Context | None = None,
    ) -> tuple[Float[Array, ""], Aux]:
        """The loss of one example at its times, and scalars to log.

        `denoiser` is `(x_t, t, cond, *, key=)`; one of two times also takes `h=`, the step of a
        flow map. `context` is None outside of a train step.
        """


class OneTimeObjective(AbstractObjective):
    """An objective of one time an example, `t`: that which its `time_sampler` draws."""

    # That field is in the classes: one here would stand before theirs.
    def times(self, key: Key[Array, ""], n: int) -> Float[Array, " n"]:
        return self.time_sampler(key, n)  # type: ignore[attr-defined]
