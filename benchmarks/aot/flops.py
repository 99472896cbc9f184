"""FLOPs counted from a program: its matrix products and convolutions."""

import math
from typing import Any


def count_flops(jaxpr: Any) -> int:
    """Two a multiply-add of every `dot_general` and convolution, loops as often as they run.

    Zeros that a stride puts between the elements of a convolution's input do not count. Of a
    branch the larger side counts, of a `while` of unknown length one round.

    >>> import jax, jax.numpy as jnp
    >>> product = jax.make_jaxpr(jnp.dot)(jnp.ones((2, 3)), jnp.ones((3, 5)))
    >>> count_flops(product)
    60
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            depth = math.prod(left[axis] for axis in contracted)
            total += 2 * depth * math.prod(equation.outvars[0].aval.shape)
        elif name == "conv_general_dilated":
            total += _convolution(equation)
        elif name == "cond":
            total += max(count_flops(branch) for branch in params["branches"])
        else:
            times = params["length"] if name == "scan" else 1
            total += times * sum(count_flops(inner) for inner in _inside(params))
    return total


def _convolution(equation: Any) -> int:
    params, kernel = equation.params, equation.invars[1].aval.shape
    out, numbers = equation.outvars[0].aval.shape, params["dimension_numbers"]
    inputs = kernel[numbers.rhs_spec[1]]
    window = math.prod(kernel[axis] for axis in numbers.rhs_spec[2:])
    zeros = math.prod(params["lhs_dilation"])
    return 2 * math.prod(out) * inputs * window // (zeros * params["batch_group_count"])


def _inside(params: dict[str, Any]) -> list[Any]:
    """The programs that an equation holds."""
    found = []
    for value in params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if hasattr(one, "eqns") or hasattr(getattr(one, "jaxpr", None), "eqns"):
                found.append(one)
    return found
