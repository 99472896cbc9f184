"""The activations of transformers' encoders by their names in a `config.json`."""

from collections.abc import Callable, Mapping
from typing import Any

from ..nn import gelu, gelu_tanh, quick_gelu

ACTIVATIONS: dict[str, Callable[..., Any]] = {
    "quick_gelu": quick_gelu,
    "gelu": gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
}
NAMES = {function: name for name, function in ACTIVATIONS.items()}


def wrong_activation(given: Mapping[str, Any]) -> list[str]:
    """What is wrong with the `hidden_act` of a configuration, for `refuse_options`."""
    name = given["hidden_act"]
    return [] if name in ACTIVATIONS else [f"hidden_act = {name!r} ({', '.join(ACTIVATIONS)})"]


def foreign_activation(function: Callable[..., Any]) -> dict[str, bool]:
    """Why transformers has no network of this activation, for `refuse_network`."""
    return {f"its activation is {getattr(function, '__name__', function)}": function not in NAMES}
