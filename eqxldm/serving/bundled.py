"""A bundle as something to serve: what `make export` wrote, without the model's code."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..betas import alpha_bar_from_betas, linear_betas
from ..diffusion import Diffusion
from ..paths import AbstractPath, CosineVP, DiscreteVP, LinearFlow
from ..predictions import LearnedRange, predict_eps, predict_v, predict_velocity, predict_x0
from ..times import respace, shifted_times, timestep_times
from .export import Bundle, BundleError, load_bundle
from .generator import Defaults, Generator
from .pipeline import OTHERS, solvers_that_fit

TIMESTEPS = 1000  # of the table of "ddpm"
PATHS: dict[str, Callable[[], AbstractPath]] = {
    "flow": LinearFlow,
    "cosine": CosineVP,
    "ddpm": lambda: DiscreteVP(alpha_bar_from_betas(linear_betas(TIMESTEPS))),
}
PREDICTIONS: dict[str, Any] = {
    "velocity": predict_velocity,
    "eps": predict_eps,
    "v": predict_v,
    "x0": predict_x0,
}


_NUMBERS = {  # of a bundle's record, and their ranges
    "steps": (1, 1000),
    "guidance": (0, 1e6),
    "shift": (1e-6, 1e6),
    "channels": (1, 4),
    "pad": (0, 2**16),
    "stream": (0, 2**32 - 1),
}


def from_bundle(path: str | Path) -> Generator:
    """The bundle of a finished run, as `make export` writes it, as a `Generator`.

    Its network is the exported one, so every solver that fits its diffusion can be asked for, with
    any number of steps; a flow map, too, if the bundle has one. A consistency function has its map
    alone.

    **Raises** as `load_bundle`, and `BundleError` for a bundle that does not say what it is of.
    """
    bundle = load_bundle(path)
    said = bundle.settings
    try:
        _check(bundle)
        prediction = PREDICTIONS[said["prediction"]]
        prediction = LearnedRange(prediction) if said["learned_range"] else prediction
        diffusion = Diffusion(PATHS[said["path"]](), prediction)
        shift = float(said["shift"])
        times = lambda steps: shifted_times(steps, shift)
        if said["path"] == "ddpm":
            times = lambda steps: timestep_times(TIMESTEPS, respace(TIMESTEPS, [steps]))
        interval = said["interval"]
        usual = Defaults(
            said["solver"],
            int(said["steps"]),
            float(said["guidance"]),
            (float(interval[0]), float(interval[1])),
        )
        condition, about, null = said["condition"], said["cond"], said["null"]
        labels = tuple(condition["names"]) if condition["kind"] == "label" else ()
        number = int(said["stream"])
        return Generator(
            str(said["name"]),
            bundle.network,
            diffusion,
            bundle.shape,
            bundle.picture,
            (int(said["size"][0]), int(said["size"][1])),
            {} if said.get("map_alone") else solvers_that_fit(diffusion, times(3), OTHERS),
            times,
            usual,
            _reader(bundle),
            None if null is None else np.asarray(null, about[0]),
            labels=labels,
            takes_text=condition["kind"] == "text",
            flow_map=bundle.flow_map,
            pad=int(said["pad"]),
            channels=int(said["channels"]),
            stream=lambda key: jax.random.fold_in(key, number),
        )
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
        raise BundleError(
            f"{path} does not say what it is of ({type(error).__name__}: {str(error)[:500]}). "
            "Write it with `make export RUN=folder`."
        ) from error


def _check(bundle: Bundle) -> None:
    """Refuses settings that nobody could draw by, or that are not those of the functions."""
    said = bundle.settings
    for name, (low, high) in _NUMBERS.items():
        if not isinstance(said[name], (int, float)) or not low <= said[name] <= high:
            raise ValueError(f"{name} is {said[name]!r}")
    channels, height, width = bundle.programs["decoder"].out_avals[0].shape[1:]
    size = [height - 2 * said["pad"], width - 2 * said["pad"]]
    if (said["channels"], said["size"]) != (channels, size) or min(size) < 1:
        raise ValueError(f"its pictures are not {said['channels']} x {said['size']!r}")
    if said["null"] is not None and np.shape(said["null"]) != tuple(said["cond"][1:]):
        raise ValueError(f"null is {said['null']!r}")
    if not all(isinstance(name, str) for name in said["condition"].get("names", [])):
        raise ValueError("the classes have names that are no text")


def _reader(bundle: Bundle) -> Callable[[str | None, int | None], Any]:
    """A request's condition, on the host."""
    condition = bundle.settings["condition"]
    if condition["kind"] == "label":
        return lambda prompt, label: np.int32(label or 0)
    if condition["kind"] != "text":
        return lambda prompt, label: None
    length = int(condition["length"])
    if condition["merges"] is None:
        from ..data import caption_bytes

        read = caption_bytes(length)
        return lambda prompt, label: read.tokens(prompt or "")
    from ..data import fetch_clip_vocabulary
    from ..text import byte_pairs, clip_tokenizer

    tokenizer = clip_tokenizer(*byte_pairs(fetch_clip_vocabulary(), int(condition["merges"])))
    return lambda prompt, label: tokenizer([prompt or ""], length).ids[0]
