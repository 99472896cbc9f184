"""What a network of ours, or of another library, cannot have: one message that lists all of it."""

from collections.abc import Iterable, Mapping
from typing import Any

from .layout import WeightsError


def refuse_options(
    name: str, given: Mapping[str, Any], only: Mapping[str, Any], wrong: Iterable[str] = ()
) -> None:
    """Refuses a `config.json` of a network that `name` cannot be.

    **Arguments**: `given` are its options, `only` the one value that an option must have, and
    `wrong` what else is wrong, each as "option = value (what is needed)".

    **Raises** `WeightsError` that lists them.

    >>> refuse_options("DiT", {"act": "silu"}, {"act": "gelu"})
    Traceback (most recent call last):
    ...
    eqxldm.pretrained.layout.WeightsError: DiT: config.json has what DiT has not (in brackets): \
act = 'silu' ('gelu')
    """
    values = [f"{k} = {given[k]!r} ({v!r})" for k, v in only.items() if given[k] != v]
    if listed := [*values, *wrong]:
        raise WeightsError(
            f"{name}: config.json has what {name} has not (in brackets): {', '.join(listed)}"
        )


def refuse_network(name: str, library: str, reasons: Mapping[str, bool]) -> None:
    """Refuses a network that another library does not have, for the `reasons` that hold.

    **Raises** `WeightsError` that lists them.

    >>> refuse_network("DiT", "diffusers", {"it has a rope": True, "it has no labels": False})
    Traceback (most recent call last):
    ...
    eqxldm.pretrained.layout.WeightsError: DiT: diffusers cannot hold this network: it has a rope.
    """
    if why := [reason for reason, holds in reasons.items() if holds]:
        raise WeightsError(f"{name}: {library} cannot hold this network: {'; '.join(why)}.")
