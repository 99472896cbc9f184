"""The autoencoder's train step: reconstruction, KL and a hinge GAN with an adaptive weight."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key, PyTree

from ..nn.conv import depth_to_space
from ..objectives import hinge_discriminator_loss, hinge_generator_loss, kl_to_standard_normal
from ..sharding import batch_vmap
from .ema import Decay
from .state import Metrics, TrainState, apply_gradients, check_gradients, counters

Images = Float[Array, "b c h w"]
Distance = Callable[[Images, Images], Float[Array, ""]]
# step(state, images, key) or step(state, images, key, perceptual)
AutoencoderStep = Callable[..., tuple["AutoencoderState", Metrics]]


class AutoencoderState(eqx.Module):
    """The two players' training states."""

    autoencoder: TrainState
    discriminator: TrainState


def l1_distance(x: Images, y: Images) -> Float[Array, ""]:
    """`mean |x - y|`.

    >>> float(l1_distance(jnp.zeros((1, 1, 2, 2)), jnp.ones((1, 1, 2, 2))))
    1.0
    """
    return jnp.mean(jnp.abs(x - y))


def l2_distance(x: Images, y: Images) -> Float[Array, ""]:
    """`mean (x - y)^2`.

    >>> float(l2_distance(jnp.zeros((1, 1, 2, 2)), 2 * jnp.ones((1, 1, 2, 2))))
    4.0
    """
    return jnp.mean((x - y) ** 2)


class MeanDistance(eqx.Module):
    """`weight` times the mean over a batch of a distance of two images, `models.LPIPS` say.

    A PyTree, so that the distance's arrays can enter a jitted step as an argument.

    >>> distance = MeanDistance(lambda x, y: jnp.sum((x - y) ** 2), weight=0.5)
    >>> float(distance(jnp.zeros((2, 1, 2, 2)), jnp.ones((2, 1, 2, 2))))
    2.0
    """

    distance: Callable[[Float[Array, "c h w"], Float[Array, "c h w"]], Float[Array, ""]]
    weight: float = eqx.field(static=True, default=1.0)

    def __call__(self, x: Images, y: Images) -> Float[Array, ""]:
        return self.weight * jnp.mean(jax.vmap(self.distance)(x, y))


def adaptive_weight(
    nll_gradient: PyTree, gan_gradient: PyTree, *, largest: float = 1e4
) -> Float[Array, ""]:
    """`|grad nll| / (|grad gan| + 1e-4)`, clipped to `[0, largest]` (Esser et al. 2021, eq. 7).

    Both gradients are at the decoder's last layer. Finite at all times: gradients that are not
    finite give 0.

    >>> float(adaptive_weight(jnp.array([3.0, 4.0]), jnp.array([0.0, 0.0])))
    10000.0
    """
    ratio = optax.tree.norm(nll_gradient) / (optax.tree.norm(gan_gradient) + 1e-4)
    return jnp.where(jnp.isfinite(ratio), jnp.clip(ratio, 0.0, largest), 0.0)


def make_autoencoder_step(
    autoencoder_static: PyTree,
    discriminator_static: PyTree,
    autoencoder_optimizer: optax.GradientTransformation,
    discriminator_optimizer: optax.GradientTransformation,
    *,
    distance: Distance = l1_distance,
    perceptual: Distance | None = None,
    kl_weight: float = 1e-6,
    gan_weight: float = 0.5,
    adversarial: bool = True,
    ema_decays: Sequence[Decay] = (),
    dtype: Any = jnp.float32,
) -> AutoencoderStep:
    """A pure `step(state, images, key) -> (state, metrics)` over images `(b, c, h, w)` in [-1, 1].

    The autoencoder minimises `nll + kl_weight KL + gan_weight w gan`, with `nll = distance
    (+ perceptual)`, `KL` in nats a pixel value, `gan` the hinge loss on the reconstruction and `w`
    the adaptive weight; the discriminator its hinge loss (Esser et al. 2021, eq. 6).
    LDM's code has a learned log-variance of the pixels in `nll`, but gives it to no optimizer
    (`AutoencoderKL.configure_optimizers` of CompVis/latent-diffusion): it stays 0, as here.

    With `adversarial=False` the discriminator is neither run nor trained: the step for the
    warm-up, over the same state. Two functions and not a branch inside one: XLA:CPU runs
    convolutions inside a conditional some 20 times slower.

    A `perceptual` that is a network is given to the step, `step(state, images, key,
    MeanDistance(lpips))`, in place of the one given here: its parameters are then an argument of
    the compiled program, neither trained nor in the state and its checkpoints. Given here they
    would be constants inside the program: LPIPS's 59 MB make its gradient alone compile for 6 s
    instead of 1 and take 103 MB in the compilation cache.

    The gradients at the reconstruction are taken once for each loss; the last layer's, which
    balance the two, and the whole decoder's follow from them, so that the balance costs no
    second backward pass.

    The networks compute in `dtype`; parameters, posteriors, reconstructions and losses are
    float32. A step whose loss or gradient is not finite, in either player, changes neither of
    them. The metrics are those of `make_train_step`, `loss` being `nll + kl_weight KL`, and each
    term's.
    """

    wide = lambda tree: jax.tree.map(lambda a: a.astype(jnp.float32), tree)

    def logits(disc: Any, images: Images) -> Float[Array, "b h2 w2"]:
        return wide(batch_vmap(lambda x: disc(x.astype(dtype)))(images))

    def step(
        state: AutoencoderState,
        x: Images,
        key: Key[Array, ""],
        perceptual: Distance | None = perceptual,
    ) -> tuple[AutoencoderState, Metrics]:
        ae_state, disc_state = state.autoencoder, state.discriminator
        keys = jax.random.split(jax.random.fold_in(key, ae_state.step), x.shape[0])

        def body(params: PyTree) -> tuple[Any, Float[Array, ""]]:
            model = eqx.combine(params, autoencoder_static)
            posterior = batch_vmap(lambda x: wide(model.posterior(x.astype(dtype))))(x)
            z = jax.vmap(lambda p, k: p.sample(k).astype(dtype))(posterior, keys)
            h = batch_vmap(lambda z: model.decoder.features(jnp.moveaxis(z, 0, -1)))(z)
            kl = jax.vmap(kl_to_standard_normal)(posterior.mean, posterior.logvar)
            return h, jnp.sum(kl) / x.size

        def last_layer(head: PyTree, h: Any) -> Images:
            conv = eqx.combine(head, autoencoder_static.decoder.head)
            unfold = lambda y: depth_to_space(y, autoencoder_static.decoder.patch_size)
            return jnp.moveaxis(wide(batch_vmap(lambda h: unfold(conv(h)))(h)), -1, 1)

        def nll(reconstruction: Images) -> Float[Array, ""]:
            loss = distance(x, reconstruction)
            return loss if perceptual is None else loss + perceptual(x, reconstruction)

        (h, kl), pull_body = jax.vjp(body, ae_state.params)
        reconstruction, pull_head = jax.vjp(last_layer, ae_state.params.decoder.head, h)
        nll_value, nll_cotangent = jax.value_and_grad(nll)(reconstruction)

        metrics = {"nll": nll_value, "kl": kl}
        cotangent, players = nll_cotangent, {}
        if adversarial:

            def gan(reconstruction: Images) -> Float[Array, ""]:
                disc = eqx.combine(disc_state.params, discriminator_static)
                return hinge_generator_loss(logits(disc, reconstruction))

            def discriminate(params: PyTree) -> Float[Array, ""]:
                disc = eqx.combine(params, discriminator_static)
                return hinge_discriminator_loss(logits(disc, x), logits(disc, reconstruction))

            gan_value, gan_cotangent = jax.value_and_grad(gan)(reconstruction)
            weight = adaptive_weight(
                pull_head(nll_cotangent)[0].weight, pull_head(gan_cotangent)[0].weight
            )
            cotangent = nll_cotangent + gan_weight * weight * gan_cotangent
            disc_value, disc_gradients = jax.value_and_grad(discriminate)(disc_state.params)
            players = {"discriminator": disc_gradients}
            metrics |= {"gan": gan_value, "adaptive_weight": weight, "discriminator": disc_value}

        head_gradient, h_cotangent = pull_head(cotangent)
        (gradients,) = pull_body((h_cotangent, jnp.asarray(kl_weight, kl.dtype)))
        gradients = eqx.tree_at(lambda g: g.decoder.head, gradients, head_gradient)
        loss = nll_value + kl_weight * kl
        # Both players or neither: one that goes on alone would train against a broken other.
        total = loss + metrics.get("gan", 0.0) + metrics.get("discriminator", 0.0)
        finite, measured = check_gradients(total, {"autoencoder": gradients, **players})
        ae_state = apply_gradients(ae_state, gradients, autoencoder_optimizer, ema_decays, finite)
        if adversarial:
            disc_state = apply_gradients(
                disc_state, players["discriminator"], discriminator_optimizer, (), finite
            )
        metrics = {"loss": loss, **metrics, **measured, **counters(ae_state)}
        return AutoencoderState(ae_state, disc_state), metrics

    return step
