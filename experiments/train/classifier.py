"""The stage of the classifier, whose features and answers measure images."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, UInt8

from eqxldm.data import label_condition, no_condition
from eqxldm.data.pixels import to_float
from eqxldm.nn import Conv, Linear
from eqxldm.training import adamw

from .config import Config
from .job import Job
from .methods import warmup_cosine
from .streams import stream_key

Images = UInt8[np.ndarray, "n h w c"]
VALUES = 2**22  # of images that are in a network at a time


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


class Described(NamedTuple):
    """What a network says of images: features, and the likeliest classes where it knows any."""

    features: Float[np.ndarray, "n d"]
    classes: Int[np.ndarray, " n"] | None


Features = Callable[[Images], Described]


class ClassifierFeatures:
    """The classifier's features and answers, of images of any size; compiled once."""

    def __init__(self, classifier: ConvClassifier, *, labelled: bool, size: tuple[int, int]):
        self._classifier, self._labelled = classifier, labelled

        def apply(classifier, images):
            x = to_float(images)
            if x.shape[2:] != size:
                x = jax.image.resize(x, (*x.shape[:2], *size), "linear", antialias=True)
            return jax.vmap(classifier)(x)

        self._apply = eqx.filter_jit(apply)

    def __call__(self, images: Images) -> Described:
        batch = int(np.clip(VALUES // images[0].size, 1, 500))
        features, logits = map_images(self._apply, self._classifier, images, batch)
        return Described(features, logits.argmax(1) if self._labelled else None)


def map_images(
    function: Callable[[Any, Any], Any], model: Any, images: Images, batch: int, put: Any = None
) -> Any:
    """`function(model, images)` over all images; the last batch is padded, so that one size is
    compiled. `put` places a batch on devices, to which the model must have been copied."""
    parts = []
    for i in range(0, len(images), batch):
        part = images[i : i + batch]
        padded = np.pad(part, [(0, batch - len(part))] + [(0, 0)] * 3)
        outputs = function(model, padded if put is None else put(padded))
        parts.append(jax.tree.map(lambda a, part=part: np.asarray(a)[: len(part)], outputs))
    return jax.tree.map(lambda *a: np.concatenate(a), *parts)


def classifier_size(size: tuple[int, int]) -> tuple[int, int]:
    """What the classifier sees of images of this size: at most 64 pixels a side.

    >>> classifier_size((32, 32)), classifier_size((256, 384))
    ((32, 32), (43, 64))
    """
    scale = min(1.0, 64 / max(size))
    return max(8, round(size[0] * scale)), max(8, round(size[1] * scale))


def turned(images: Any, key: Any) -> tuple[Any, Any]:
    """Each image turned by a random number of quarters, and that number: what to tell apart.

    A task without labels whose features see what is in a picture (Gidaris et al. 2018, RotNet).
    Images that are not square are turned by half a turn or not at all.
    """
    b, h, w, _ = images.shape
    turns = 4 if h == w else 2
    number = jax.random.randint(key, (b,), 0, turns)
    ways = jnp.stack([jnp.rot90(images, k * (4 // turns), (1, 2)) for k in range(turns)])
    return ways[number, jnp.arange(b)], number


def classifier_loss(model: ConvClassifier, batch: Any, key: Any, context: Any = None):
    """The cross entropy of a batch with `image`, uint8, and its class as `cond`, if it has one."""
    images, labels = batch["image"], batch.get("cond")
    if labels is None:
        images, labels = turned(images, key)
    _, logits = jax.vmap(model)(to_float(images))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean(losses), {}


def make_classifier(config: Config, classes: int) -> ConvClassifier:
    """The network; without classes it tells apart how images were turned."""
    options, size = config.classifier, classifier_size(config.size)
    return ConvClassifier(
        (config.pictures.channels, *size),
        classes or (4 if size[0] == size[1] else 2),
        channels=options.channels,
        features=options.features,
        key=stream_key(config.seed, "classifier/model"),
    )


def classifier_optimizer(options: Any) -> optax.GradientTransformation:
    """Of `options`, the `learning_rate` and the `steps` count."""
    rate = warmup_cosine(options.learning_rate, options.steps, options.steps // 10)
    return adamw(rate, weight_decay=0.05)


def train_classifier(job: Job) -> Features:
    """The features of the trained classifier, on this process's own device."""
    config, classes = job.config, len(job.source.class_names)
    options, size = config.classifier, classifier_size(config.size)
    condition = label_condition if classes else no_condition
    model = job.stages.average(
        "classifier",
        lambda: make_classifier(config, classes),
        classifier_optimizer(options),
        classifier_loss,
        job.images("classifier", options.batch_size, size=size, condition=condition),
        options,
    )
    return ClassifierFeatures(model, labelled=bool(classes), size=size)
