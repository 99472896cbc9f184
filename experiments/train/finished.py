"""A finished run: what its folder says, its networks, and what measures it again."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from .conditions import Condition
from .config import Config
from .data import open_source, open_test
from .diffusion import load_finished
from .job import Compute, Inputs, Job, read_data
from .methods import Method, make_method
from .options import read_options
from .reference import Reference
from .run import RunFolder
from .sampling import Trained
from .terminal import Signals


@dataclass(frozen=True)
class Finished:
    """What the folder of a finished run says; `about` is the content of data.json."""

    run: RunFolder
    config: Config
    method: Method
    condition: Condition
    about: dict[str, Any]

    def networks(self, mesh: Mesh, sigma_rel: float | None = None) -> Trained:
        """The averaged models, as `load_finished` gives them."""
        return load_finished(self.config, self.run, self.condition, mesh, sigma_rel)

    def measured(
        self, images: Path | None, inputs: Inputs, compute: Compute, mesh: Mesh, signals: Signals
    ) -> tuple[Job, Reference]:
        """A job on these images, or else those of the training, and the real ones that samples
        are compared with."""
        config, run, condition = self.config, self.run, self.condition
        images = images or (Path(self.about["path"]) if self.about.get("path") else None)
        source = open_source(config, images)
        test = open_test(config, images, inputs.test_images, source)
        reference = Reference(config, source, test, condition, strict=inputs.strict)
        return Job(config, compute, inputs, source, condition, run, mesh, signals), reference


def open_finished(run: RunFolder) -> Finished:
    """**Raises** `UserError` for a folder without a run, and for one that is damaged."""
    config = read_options(Config, run)
    return Finished(run, config, make_method(config), *read_data(run, config))
