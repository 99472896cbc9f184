"""A small convolutional classifier, whose features measure generated images."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from eqxldm.nn import Conv, Linear


class ConvClassifier(eqx.Module):
    """Image `(c, h, w)` in [-1, 1] to features and class logits.

    Two stride-2 convolutions, then a layer of `features` units whose activations serve as the
    features of Fréchet distance and of precision and recall, then the logits.

    >>> net = ConvClassifier((1, 28, 28), 10, key=jax.random.key(0))
    >>> features, logits = net(jnp.zeros((1, 28, 28)))
    >>> features.shape, logits.shape
    ((128,), (10,))
    """

    conv1: Conv
    conv2: Conv
    hidden: Linear
    head: Linear

    def __init__(
        self,
        shape: tuple[int, int, int],
        num_classes: int,
        *,
        channels: int = 32,
        features: int = 128,
        key,
    ):
        k1, k2, k3, k4 = jax.random.split(key, 4)
        c, h, w = shape
        self.conv1 = Conv(c, channels, 5, stride=2, padding=((2, 2), (2, 2)), key=k1)
        self.conv2 = Conv(channels, 2 * channels, 3, stride=2, padding=((1, 1), (1, 1)), key=k2)
        size = -(-h // 4) * -(-w // 4) * 2 * channels
        self.hidden = Linear(size, features, key=k3)
        self.head = Linear(features, num_classes, key=k4)

    def __call__(
        self, x: Float[Array, "c h w"]
    ) -> tuple[Float[Array, " features"], Float[Array, " classes"]]:
        y = jax.nn.relu(self.conv1(jnp.moveaxis(x, 0, -1)))
        y = jax.nn.relu(self.conv2(y))
        features = jax.nn.relu(self.hidden(y.reshape(-1)))
        return features, self.head(features)
