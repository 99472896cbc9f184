"""The networks whose features are compared, and how images come to them."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from eqxldm import pretrained
from eqxldm.checkpoints import Checkpoints
from eqxldm.digests import digest
from eqxldm.distributed import local_mesh, replicate
from eqxldm.models import CLIPImage, DINOv2, clip_input, dinov2_input, inception_input
from eqxldm.nn import resize_and_crop
from eqxldm.sharding import batch_sharding
from eqxldm.training import init_state

from ..train.classifier import classifier_optimizer, classifier_size, make_classifier
from ..train.finished import open_finished
from ..train.run import RunFolder, file_digest
from ..train.stages import restore_average
from ..train.terminal import UserError, user_errors
from .options import Evaluate

SIDE = 224


class Extractor:
    """A network on all devices of this process: a batch of images in, features out.

    `about` is the protocol: what else must be equal for numbers to compare.
    """

    def __init__(self, function: Callable[[Any, Any], dict[str, Any]], model: Any, about: dict):
        self.about = about
        self._mesh = local_mesh()
        self._model = replicate(model, self._mesh)
        self._run = eqx.filter_jit(function)

    def start(self, images: np.ndarray, batch: int) -> dict[str, Any]:
        """Begins with a batch, filled up to one size that the devices divide."""
        size = -(-batch // self._mesh.size) * self._mesh.size
        padded = np.pad(images, [(0, size - len(images))] + [(0, 0)] * 3)
        return self._run(self._model, jax.device_put(padded, batch_sharding(self._mesh)))

    def finish(self, outputs: dict[str, Any], count: int) -> dict[str, np.ndarray]:
        """The features of the batch's own images, on the host."""
        flat = lambda a: np.asarray(a, np.float32)[:count].reshape(count, -1)
        return {name: flat(value) for name, value in outputs.items()}


class OwnFunction:
    """Features by a user's function of NumPy images, on the host."""

    def __init__(self, function: Callable[[np.ndarray], Any], about: dict):
        self._function, self.about = function, about

    def start(self, images: np.ndarray, batch: int) -> dict[str, Any]:
        found = np.asarray(self._function(images))
        if found.ndim != 2 or len(found) != len(images):
            raise UserError(
                f"features(images): of {len(images)} images it must give an array "
                f"({len(images)}, d), got {found.shape}."
            )
        return {"pooled": found}

    def finish(self, outputs: dict[str, Any], count: int) -> dict[str, np.ndarray]:
        return {name: value.astype(np.float32) for name, value in outputs.items()}


def make_extractor(options: Evaluate) -> Any:
    """The network that the options name.

    **Raises** `UserError` for weights that cannot be read.
    """
    assert options.weights is not None
    makes = {
        "inception": _inception,
        "lpips-vgg": _lpips,
        "own": _own,
        "dinov2": _dinov2,
        "clip": _clip,
    }
    with user_errors(pretrained.WeightsError, OSError, ImportError, what="--weights"):
        return makes[options.features](options, options.weights)


def _about(options: Evaluate, model: Any, **more: Any) -> dict[str, Any]:
    weights = digest(eqx.filter(model, eqx.is_array))
    return dict(features=options.features, weights=weights, dtype="float32", **more)


def _each(function: Callable[[Any, Any], dict[str, Any]]) -> Callable[[Any, Any], dict[str, Any]]:
    """A function of one float image `(3, h, w)` from 0 to 255, for a batch of uint8 ones."""

    def run(model: Any, images: Any) -> dict[str, Any]:
        x = jnp.moveaxis(images, -1, 1).astype(jnp.float32)
        with jax.default_matmul_precision("highest"):
            return jax.vmap(lambda image: function(model, image))(x)

    return run


def _inception(options: Evaluate, weights: Path) -> Extractor:
    model = pretrained.load_inception(weights)

    def features(model: Any, image: Any) -> dict[str, Any]:
        out = model(inception_input(image, options.resizing))
        return {"pooled": out.pooled, "spatial": out.spatial, "logits": out.logits}

    about = _about(options, model, resizing=options.resizing)
    return Extractor(_each(features), model, about)


def _lpips(options: Evaluate, weights: Path) -> Extractor:
    model, side = pretrained.load_lpips(weights), options.side or SIDE

    def features(model: Any, image: Any) -> dict[str, Any]:
        x = resize_and_crop(image, side) / 127.5 - 1
        return {"pooled": jnp.mean(model.features(x)[-1], (0, 1))}

    about = _about(options, model, resizing=f"bicubic {side}", layer="relu5_3, mean")
    return Extractor(_each(features), model, about)


def _dinov2(options: Evaluate, weights: Path) -> Extractor:
    model, side = pretrained.load(weights), options.side or SIDE
    _check_kind(model, DINOv2, weights)
    if side % model.config.patch_size:
        raise UserError(f"--side: must be a multiple of {model.config.patch_size}, got {side}.")
    return _encoder(options, model, dinov2_input, side)


def _clip(options: Evaluate, weights: Path) -> Extractor:
    model = pretrained.load_clip_image(weights) if weights.is_dir() else pretrained.load(weights)
    _check_kind(model, CLIPImage, weights)
    if options.side not in (None, model.config.side):
        raise UserError(f"--side: this CLIP sees {model.config.side} pixels.")
    return _encoder(options, model, clip_input, model.config.side)


def _check_kind(model: Any, kind: type, weights: Path) -> None:
    if not isinstance(model, kind):
        raise UserError(f"--weights {weights}: is a {type(model).__name__}, not a {kind.__name__}.")


def _encoder(
    options: Evaluate, model: Any, prepare: Callable[[Any, int], Any], side: int
) -> Extractor:
    def features(model: Any, image: Any) -> dict[str, Any]:
        return {"pooled": model(prepare(image, side)).features}

    about = _about(options, model, resizing=f"bicubic {side}, the middle square")
    return Extractor(_each(features), model, about)


def _own(options: Evaluate, weights: Path) -> Any:
    if weights.is_dir():
        return _classifier(options, weights)
    spec = importlib.util.spec_from_file_location("own_features", weights)
    if spec is None or spec.loader is None:
        raise UserError(f"--weights: {weights} is no Python file with features(images).")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function: Any = getattr(module, "features", None)
    if not callable(function):
        raise UserError(
            f"--weights: {weights} has no function features(images), from uint8 (b, h, w, 3) to "
            "(b, d)."
        )
    return OwnFunction(
        function, dict(features="own", weights=file_digest(weights), dtype="its own")
    )


def _classifier(options: Evaluate, folder: Path) -> Extractor:
    """The classifier of a finished run of the training job."""
    finished = open_finished(RunFolder(folder))
    run, config = finished.run, finished.config
    classes = getattr(finished.condition, "classes", 0)
    optimizer = classifier_optimizer(config.classifier)
    build = lambda: init_state(make_classifier(config, classes), optimizer, num_emas=1)
    like, static = eqx.filter_eval_shape(build)
    with Checkpoints(run.checkpoints / "classifier") as checkpoints:
        steps = checkpoints.steps()
        if not steps:
            raise UserError(f"--weights: the run in {folder} has no classifier.")
        model = eqx.combine(restore_average(checkpoints, steps[-1], like), static)
    size, channels = classifier_size(config.size), config.pictures.channels

    def features(model: Any, image: Any) -> dict[str, Any]:
        x = image[:channels] / 127.5 - 1
        if x.shape[1:] != size:
            x = jax.image.resize(x, (channels, *size), "linear", antialias=True)
        return {"pooled": model(x)[0]}

    about = _about(options, model, resizing=f"linear {size[0]} x {size[1]}")
    return Extractor(_each(features), model, about)
