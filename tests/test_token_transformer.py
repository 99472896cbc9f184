"""The transformer over tokens: causal and not, with time, with a cache, in LLaDA's files."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqxldm import discrete as dd, nn, pretrained
from eqxldm.models import AdaptiveTokenBlock, TokenTransformer, TokenTransformerConfig
from eqxldm.pretrained.llada import MASK, load_llada

from helpers import llada_folder

SIZES = dict(depth=1, width=16, num_heads=2, max_length=8, remat=None)
IDS = jnp.array([0, 3, 2, 4, 1, 1])


def make(**options):
    """A network whose parameters are all random, also those that start at zero."""
    network = TokenTransformer(5, **(SIZES | options), key=jax.random.key(0))
    params, static = eqx.partition(network, eqx.is_inexact_array)
    rng = np.random.default_rng(1)
    noisy = lambda a: jnp.asarray(a + 0.3 * rng.standard_normal(a.shape), jnp.float32)
    return eqx.combine(jax.tree.map(noisy, params), static)


@eqx.filter_jit
def call(network, *args, **options):
    return network(*args, **options)


def test_a_causal_network_sees_nothing_later_and_its_twin_does():
    changed = IDS.at[4].set(0)
    for causal in (True, False):
        network = make(causal=causal)
        before, after = call(network, IDS), call(network, changed)
        assert np.allclose(before[:4], after[:4], atol=1e-6) == causal
        assert not np.allclose(before[4:], after[4:], atol=1e-3)


@pytest.mark.parametrize("causal", [True, False])
def test_a_cache_filled_in_parts_gives_the_logits_of_one_call(causal):
    network = make(causal=causal)
    sees = jnp.asarray(dd.block_mask(6, 3)) if not causal else None
    whole = call(network, IDS, mask=sees)
    extend = eqx.filter_jit(lambda network, *args, **options: network.extend(*args, **options))
    cache, parts = network.empty_cache(8), []
    for start in (0, 3):
        cache = cache._replace(start=jnp.array(start, jnp.int32))
        mask = jnp.arange(8) < start + 3
        logits, cache = extend(network, IDS[start : start + 3], cache, mask=mask)
        parts.append(logits)
    np.testing.assert_allclose(jnp.concatenate(parts), whole, rtol=2e-4, atol=2e-5)


def test_autoregressive_draws_have_the_likelihood_that_the_network_says():
    """One token after the start, as often as its probability; and the cache is in use."""
    network = make(causal=True)
    tokens = jax.jit(lambda key: dd.sample_next_tokens(network, 4, 2, 4096, key=key))(
        jax.random.key(0)
    )
    p = jnp.exp(dd.log_probabilities(call(network, jnp.array([4])), 4))[0]
    np.testing.assert_allclose(np.bincount(tokens[:, 0], minlength=5) / 4096, p, atol=0.04)
    second = tokens[tokens[:, 0] == int(jnp.argmax(p)), 1]
    q = jnp.exp(dd.log_probabilities(call(network, jnp.array([4, int(jnp.argmax(p))])), 4))[1]
    np.testing.assert_allclose(np.bincount(second, minlength=5) / len(second), q, atol=0.06)


def test_shifted_logits_are_those_of_the_place_before():
    plain, shifted = make(), make(shifted=True)
    np.testing.assert_array_equal(call(shifted, IDS)[1:], call(plain, IDS)[:-1])
    with pytest.raises(ValueError, match="shifted logits has no cache"):
        shifted.extend(IDS, shifted.empty_cache(8))


def test_a_network_with_adaptive_norms_has_a_time_or_none():
    timed = make(block=AdaptiveTokenBlock, time_embedding=nn.Sinusoid(size=8), vector_size=4)
    assert not np.allclose(call(timed, IDS, 0.1), call(timed, IDS, 0.9))
    with pytest.raises(ValueError, match="needs a time t"):
        timed(IDS)
    timeless = make(block=AdaptiveTokenBlock)
    np.testing.assert_array_equal(call(timeless, IDS), call(timeless, IDS, 0.9))
    with pytest.raises(ValueError, match="needs blocks with adaptive norms"):
        make(time_embedding=nn.Sinusoid())


def test_half_precision_and_files(tmp_path):
    network = make(block=AdaptiveTokenBlock, tied=True)
    pretrained.save(network, tmp_path / "a.safetensors")
    assert eqx.tree_equal(pretrained.load(tmp_path / "a.safetensors"), network)
    half = pretrained.load(tmp_path / "a.safetensors", dtype=jnp.bfloat16)
    assert call(half, IDS).dtype == jnp.bfloat16
    np.testing.assert_allclose(call(half, IDS).astype(float), call(network, IDS), atol=0.5)


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="at most 8 tokens, got 9"):
        make()(jnp.zeros(9, int))
    with pytest.raises(ValueError, match="heads must have an even size"):
        TokenTransformerConfig(5, depth=1, width=3, num_heads=1, max_length=4).build(
            key=jax.random.key(0)
        )


def test_a_folder_of_llada_is_read_and_a_wrong_one_refused(tmp_path):
    network = make(hidden=24, rope_theta=500_000.0)
    llada_folder(tmp_path, network)
    loaded = load_llada(tmp_path)
    np.testing.assert_allclose(call(loaded, IDS), call(network, IDS), rtol=1e-5, atol=1e-5)
    assert loaded.config.hidden == 24 and MASK == 126_336
    llada_folder(tmp_path, network, n_kv_heads=1)
    with pytest.raises(pretrained.WeightsError, match="n_kv_heads"):
        load_llada(tmp_path)
    llada_folder(tmp_path, network, n_layers=2)
    with pytest.raises(pretrained.WeightsError, match=r"missing: model\.transformer\.blocks\.1"):
        load_llada(tmp_path)
