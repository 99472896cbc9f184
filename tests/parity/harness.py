"""One network twice, in torch and in JAX: random weights, files, and the comparison."""

import copy
import math
import os
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models import embeddings

from eqxldm import pretrained

from helpers import relative_error

BOUND = 2e-5
COUNT = int(os.environ.get("COUNT", 30))
SEED = int(os.environ.get("SEED", 0))
# How a folder may hold its weights: the dtype, and the options of `save_pretrained`.
FORMS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "sharded": (torch.float32, dict(max_shard_size="24KB")),
    "bin": (torch.float32, dict(safe_serialization=False)),
    "fp16": (torch.float16, {}),
    "fp16 variant": (torch.float16, dict(variant="fp16")),
    "fp16 sharded": (torch.float16, dict(variant="fp16", max_shard_size="24KB")),
    "bf16": (torch.bfloat16, {}),
}
DTYPES = {
    torch.float32: jnp.float32,
    torch.float16: jnp.float16,
    torch.bfloat16: jnp.bfloat16,
}

# `t` is a float32: `1000 t - 1` is a bit off the timestep for 23 of the 1000, and with it the angle
# of the fastest wave by up to 2^-14, which is more than `BOUND`. Networks are compared at the
# others; `test_the_waves_of_all_timesteps` has a bound for all.
_TIMESTEPS = np.arange(1000)
_T = ((_TIMESTEPS + 1) / 1000).astype(np.float32)
EXACT_TIMESTEPS = _TIMESTEPS[
    (_T * np.float32(1000) - np.float32(1) == _TIMESTEPS)  # rounded twice
    & (
        (1000 * _T.astype(np.float64) - 1).astype(np.float32) == _TIMESTEPS
    )  # multiplied and added in one
]

each_configuration = pytest.mark.parametrize("number", range(COUNT))


class Pair(NamedTuple):
    """A torch module and our model of the same weights, called with the same `inputs`.

    `theirs(module, **inputs)` and `ours(model, **inputs)` take a batch and give a dict of outputs.
    Gradients are taken by all parameters and by those inputs that are floats, but not by `fixed`.
    """

    theirs: Callable[..., dict[str, torch.Tensor]]
    ours: Callable[..., dict[str, jax.Array]]
    layout: Callable[[Any], pretrained.Layout]
    inputs: dict[str, np.ndarray]
    fixed: tuple[str, ...] = ()


class Draw:
    """Random choices of one configuration of one model."""

    def __init__(self, model: str, number: int):
        self.rng = np.random.default_rng([SEED, number, *model.encode()])
        self.number = number

    def one(self, *options):
        return options[self.rng.integers(len(options))]

    def between(self, low, high):
        """A whole number, `high` included."""
        return int(self.rng.integers(low, high + 1))

    def normal(self, *shape):
        return self.rng.standard_normal(shape, np.float32)

    def timesteps(self, n):
        """`n` whole timesteps of a table of 1000 that a float32 time gives exactly."""
        return self.rng.choice(EXACT_TIMESTEPS, n)

    def form(self):
        """Every form comes in turn."""
        return list(FORMS)[self.number % len(FORMS)]


def randomise(module: torch.nn.Module, draw: Draw) -> torch.nn.Module:
    """Every parameter random, also what starts at zero, such that activations stay near 1."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            noise = torch.from_numpy(draw.normal(*parameter.shape))
            if parameter.ndim > 1:
                # An embedding is a sum of one term.
                terms = 1 if "embedding" in name and "linear" not in name else None
                noise = noise / math.sqrt(terms or math.prod(parameter.shape[1:]))
            else:
                noise = 0.2 * noise + ("norm" in name and name.endswith("weight"))
            parameter.copy_(noise)
    return module.eval()


def save(module: Any, folder: Path, form: str) -> Any:
    """Writes the folder, and gives the float32 module that diffusers makes of it."""
    dtype, options = FORMS[form]
    copy.deepcopy(module).to(dtype).save_pretrained(folder, **options)
    return read(type(module), folder, variant=options.get("variant"))


def read(kind: Any, folder: Path, **options) -> Any:
    """What diffusers makes of a folder, in float32."""
    module, about = kind.from_pretrained(
        folder,
        torch_dtype=torch.float32,
        low_cpu_mem_usage=False,
        output_loading_info=True,
        **options,
    )
    assert not any(about.values()), about
    return module.eval()


def check_dtypes(folder: Path, form: str) -> None:
    """The file's dtype with `dtype=None`, else the one asked for, with the file's values."""
    kept, half = pretrained.load(folder, dtype=None), pretrained.load(folder, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in leaves(kept)} == {jnp.dtype(DTYPES[FORMS[form][0]])}
    for a, b in zip(leaves(kept), leaves(half), strict=True):
        assert b.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(a).astype(jnp.bfloat16), np.asarray(b))


def times(timestep):
    """`t` of timesteps, divided on the host: XLA would multiply by 0.001, a rounding off."""
    return ((timestep + 1) / 1000).astype(np.float32)


def flow_times(draw: Draw, n: int = 2) -> dict[str, np.ndarray]:
    """`t` in [0, 1] with its ends, and the timestep `1000 t` of networks of flows."""
    t = draw.rng.random(n, np.float32)
    t[0] = draw.one(t[0], 0.0, 1.0)
    return dict(t=t, timestep=np.float32(1000) * t)


def check_original(model: Any, module: torch.nn.Module, convert: Callable, prefix: str) -> None:
    """The original layout by diffusers' own conversion is what diffusers has, and is read again."""
    layout = getattr(pretrained, type(model).__name__.lower()).original_layout
    state = pretrained.to_state(model, layout)
    tensors = {prefix + name: torch.from_numpy(value.copy()) for name, value in state.items()}
    expected = {name: value.float() for name, value in module.state_dict().items()}
    same_bits(convert(tensors), expected)
    assert eqx.tree_equal(pretrained.load_state(model, state), model)


def leaves(model: Any) -> list[jax.Array]:
    return jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))


def compare(module: torch.nn.Module, model: Any, pair: Pair) -> dict[str, float]:
    """`{kind: largest relative error}` of outputs and gradients; all must be within the bound.

    Every output and every gradient by an input is compared relative to its own largest value, the
    gradient by the parameters, which is one vector, to the largest of it: a part of it may be zero
    but for rounding (a key's bias).
    """
    out, gradient_inputs, gradient = _of_torch(module, pair)
    found, found_inputs, found_gradient = _of_jax(model, pair)
    assert found.keys() == out.keys()
    errors = dict(
        forward=_errors(found, out),
        by_input=_errors(found_inputs, gradient_inputs),
        by_parameter=_parameter_errors(found_gradient, gradient, pair.layout(model)),
    )
    largest = {kind: float(np.max(list(e.values()))) for kind, e in errors.items() if e}
    # Not "above": a NaN is neither.
    wrong = [
        f"{n} {error:.1e}" for e in errors.values() for n, error in e.items() if not error <= BOUND
    ]
    more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
    assert not wrong, f"relative errors above {BOUND}: {', '.join(wrong[:4])}{more}"
    return largest


def compare_back(
    kind: Any, module: Any, model: Any, folder: Path, pair: Pair, *, read: Callable = read
) -> float:
    """Export, read by diffusers: bit for bit the same weights; the forward pass's error."""
    pretrained.export(model, folder)
    again = read(kind, folder)
    same_bits(again.state_dict(), module.state_dict())
    with torch.no_grad(), rounded_once():
        out = pair.theirs(again, **_tensors(pair.inputs))
        expected = pair.theirs(module, **_tensors(pair.inputs))
    error = float(np.max(list(_errors(out, expected).values())))
    assert error <= BOUND
    return error


def same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    differing = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not differing, differing


@contextmanager
def rounded_once():
    """Inside, diffusers' frequencies of time are those of a float64 exponential, rounded.

    torch's own in float32 is a bit off for some, which ones depends on the processor, and at
    timestep 999 a bit is an angle of 2^-14: more than `BOUND`. What it does to the waves has a
    bound in `test_the_waves_of_all_timesteps`.
    """
    theirs, exp = embeddings.get_timestep_embedding, torch.exp

    def get_timestep_embedding(*args, **options):
        with mock.patch.object(torch, "exp", lambda x: exp(x.double()).to(x.dtype)):
            return theirs(*args, **options)

    with mock.patch.object(embeddings, "get_timestep_embedding", get_timestep_embedding):
        yield


def _of_torch(module, pair):
    tensors = _tensors(pair.inputs)
    floats = {n: t.requires_grad_() for n, t in tensors.items() if _differentiated(pair, n)}
    with rounded_once():
        out = pair.theirs(module, **tensors)
    loss = sum((value * torch.from_numpy(_probe(name, value))).sum() for name, value in out.items())
    parameters = dict(module.named_parameters())
    parameters = {name: p for name, p in parameters.items() if p.requires_grad}
    gradients = torch.autograd.grad(loss, [*floats.values(), *parameters.values()])
    n = len(floats)
    return (
        {name: value.detach() for name, value in out.items()},
        dict(zip(floats, gradients[:n], strict=True)),
        dict(zip(parameters, gradients[n:], strict=True)),
    )


@eqx.filter_jit
def _value_and_gradients(ours, model, floats, rest):
    def loss(model_and_floats):
        model, floats = model_and_floats
        out = ours(model, **floats, **rest)
        return sum(jnp.sum(value * _probe(name, value)) for name, value in out.items()), out

    (_, out), gradients = eqx.filter_value_and_grad(loss, has_aux=True)((model, floats))
    return out, gradients


def _of_jax(model, pair):
    arrays = {name: jnp.asarray(value) for name, value in pair.inputs.items()}
    floats = {name: value for name, value in arrays.items() if _differentiated(pair, name)}
    rest = {name: value for name, value in arrays.items() if name not in floats}
    # Compiled by hand, it is let go of at the end, where a jit's cache would keep it.
    run = _value_and_gradients.lower(pair.ours, model, floats, rest).compile()
    out, (gradient, gradient_inputs) = run(pair.ours, model, floats, rest)
    return out, gradient_inputs, gradient


def _parameter_errors(found, expected, layout):
    """Of each tensor; the gradient of those that hold the same values is the sum over them."""
    copies = {part.name: part.copies for parts in layout.leaves.values() for part in parts}
    tensors = pretrained.layout.unfill(found, layout)
    mine = {name: tensors[name] for name in copies}
    theirs = {
        name: sum(expected[copy].double().numpy() for copy in (name, *copies[name]))
        for name in mine
    }
    assert len(expected) == sum(1 + len(c) for c in copies.values())
    scale = max(float(np.max(np.abs(value))) for value in theirs.values())
    return {n: float(np.max(np.abs(mine[n] - theirs[n]))) / scale for n in mine}


def _errors(found, expected):
    return {name: float(relative_error(found[name], value)) for name, value in expected.items()}


def _probe(name, value):
    """A fixed random projection of an output."""
    rng = np.random.default_rng(list(name.encode()))
    return rng.standard_normal(tuple(value.shape), np.float32)


def _differentiated(pair, name):
    return pair.inputs[name].dtype == np.float32 and name not in pair.fixed


def _tensors(inputs):
    return {name: torch.from_numpy(value.copy()) for name, value in inputs.items()}
