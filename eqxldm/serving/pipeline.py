"""A published pipeline as something to serve."""

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import numpy as np

from ..diffusion import Diffusion
from ..pipelines import Pipeline
from ..pipelines.errors import PipelineError
from ..sampling import check_combination
from ..solvers import DDIM, DDPM, AbstractSolver, DPMSolverPP2M, DPMSolverPP3M, Euler, Heun, UniPC
from .generator import Defaults, Generator

SCHEDULER = "scheduler"  # the folder's own
OTHERS: dict[str, AbstractSolver] = {
    "ddim": DDIM(),
    "ddpm": DDPM(),
    "euler": Euler(),
    "heun": Heun(),
    "dpmsolver++": DPMSolverPP2M(),
    "dpmsolver++3m": DPMSolverPP3M(),
    "unipc": UniPC(),
}


class Decoder(eqx.Module):
    """An autoencoder's decoder, one latent.

    >>> import jax.numpy as jnp
    >>> from eqxldm.models import AutoencoderKL
    >>> vae = AutoencoderKL(1, 2, channels=(4,), blocks=1, groups=2, key=jax.random.key(0))
    >>> Decoder(vae)(jnp.zeros((2, 4, 4))).shape
    (1, 4, 4)
    """

    autoencoder: Any

    def __call__(self, z):
        return self.autoencoder.decode(z)


def from_pipeline(
    pipe: Pipeline,
    *,
    size: tuple[int, int] | None = None,
    negative: str | None = None,
    name: str | None = None,
) -> Generator:
    """A `pipelines.load`ed folder as a `Generator` for pictures of one size.

    **Arguments**:

    - `size`: height and width; None is the model's own.
    - `negative`: what guidance leads away from, for every request; None is the empty prompt.
    - `name`: what clients know it by; None is the folder's name.

    FLUX.1 is told a guidance scale, its default for every request, and guided in no other way.

    **Raises** `PipelineError` for a size that does not do, and for networks for inpainting.
    """
    size = pipe.default_size if size is None else size
    shape = pipe.latent_shape(*size)
    if pipe.network_channels != shape[0]:
        raise PipelineError("this is a network for inpainting, which needs a picture: not served.")
    height, width = size
    times = lambda steps: pipe.times(steps, height, width)
    diffusion = pipe.diffusion
    found = {SCHEDULER: pipe.solver} | solvers_that_fit(diffusion, times(3), OTHERS)
    labels = _labels(pipe)

    def condition(prompt, label):
        what = [label or 0] if labels else [prompt or ""]
        return jax.tree.map(lambda a: np.asarray(a)[0], pipe.encode(what, size=size))

    null = None
    if not pipe.family.packed:
        null = jax.tree.map(np.asarray, pipe.null(negative, size=size))
    guidance = 1.0 if null is None else pipe.family.guidance
    return Generator(
        pipe.folder.path.resolve().name if name is None else name,
        pipe.denoiser, diffusion, shape, Decoder(pipe.autoencoder), size, found, times,
        Defaults(SCHEDULER, pipe.family.steps, guidance), condition, null, labels=labels,
        takes_text=not labels, channels=3, start_std=pipe.schedule.start_std,
    )  # fmt: skip


def solvers_that_fit(
    diffusion: Diffusion, times: Any, solvers: Mapping[str, AbstractSolver]
) -> dict[str, AbstractSolver]:
    """Those whose coefficients are finite over such a grid.

    >>> from eqxldm import CosineVP, predict_eps, uniform_times
    >>> flow = Diffusion(CosineVP(), predict_eps)
    >>> solvers_that_fit(flow, uniform_times(3), {"ddim": DDIM()})
    {}
    """

    def fits(solver: AbstractSolver) -> bool:
        try:
            check_combination(diffusion, solver, times)
        except ValueError:
            return False
        return True

    return {name: solver for name, solver in solvers.items() if fits(solver)}


def _labels(pipe: Pipeline) -> tuple[str, ...]:
    """The names of a DiT's classes; its folder may give none."""
    if pipe.family.encode is not None:
        return ()
    names = pipe.folder.options.get("id2label") or {}
    classes = int(pipe.network.null)  # the label after the last
    first = lambda i: str(names.get(str(i), i)).split(",")[0].strip()
    return tuple(first(i) for i in range(classes))
