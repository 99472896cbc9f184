"""Attention by TPUs' kernel, interpreted, beside the plain form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqxldm import nn, sharding

from helpers import tree_error


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


Q, K, V = (normal(n, 2, 8, seed=i) for i, n in enumerate((5, 130, 130)))
PROBE = normal(5, 2, 8, seed=3)


@pytest.fixture(scope="module")
def run():
    """`(gradients, output)` of both forms on one device: the interpreter does not end on two, and
    takes no kernel under vmap; TPUs' compiler takes both."""
    from jax.experimental.pallas import tpu

    def functions(attend):
        def loss(q, k, v, mask):
            out = attend(q, k, v, mask)
            return jnp.sum(out * PROBE), out

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))

    jitted = [functions(attend) for attend in (nn.flash_attend, nn.attend)]

    def both(mask):
        with tpu.force_tpu_interpret_mode():
            return [jax.device_get(function(Q, K, V, mask)) for function in jitted]

    return both


def test_flash_attend_gives_what_attend_gives_and_its_gradients(run):
    """With masked keys, and with tokens that do not divide into blocks."""
    (gradients, out), (expected_gradients, expected) = run(jnp.arange(130) % 3 > 0)
    assert out.all()
    np.testing.assert_allclose(out, expected, atol=2e-6)
    assert tree_error(gradients, expected_gradients) < 1e-5


def test_a_query_without_a_key_gets_zeros_of_flash_attend(run):
    (gradients, out), _ = run(jnp.zeros(130, bool))
    assert not out.any() and not any(gradient.any() for gradient in gradients)


def test_on_a_mesh_each_device_computes_its_heads_and_examples():
    """As it is traced; `make tpu-pieces` compiles it for slices."""
    batch = jnp.zeros((4, 256, 2, 8))
    shards = {}
    for axis in ("data", "tensor"):
        with jax.set_mesh(sharding.make_mesh({"data": 1} | {axis: 2})):
            program = jax.make_jaxpr(sharding.batch_vmap(nn.flash_attend))(*3 * [batch])
        (equation,) = [e for e in program.eqns if e.primitive.name == "shard_map"]
        shards[axis] = {v.aval.shape for v in equation.params["jaxpr"].invars}
    assert shards == {"data": {(2, 256, 2, 8)}, "tensor": {(4, 256, 1, 8)}}
