"""Independent random streams of a run, all from its one seed."""

from typing import Any, Protocol

import jax


class Seeded(Protocol):
    """A configuration with a seed."""

    @property
    def seed(self) -> int: ...


STREAMS = ("classifier", "autoencoder", "discriminator", "diffusion", "sampling", "floor")
USES = ("model", "step", "data")


def stage_key(config: Seeded, stream: str, use: str) -> Any:
    """A key of its own for each use in each stage."""
    number = len(USES) * STREAMS.index(stream) + USES.index(use)
    return jax.random.fold_in(jax.random.key(config.seed), number)


def data_seed(config: Seeded, stream: str) -> int:
    """The same, as an integer for the shuffling of data."""
    return int(jax.random.randint(stage_key(config, stream, "data"), (), 0, 2**31 - 1))


def sampling_key(seed: int) -> Any:
    """The key of samples: another seed than the run's draws others from the same network."""
    return jax.random.fold_in(jax.random.key(seed), STREAMS.index("sampling"))
