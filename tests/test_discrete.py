"""Masked diffusion against a Markov chain whose every conditional is known."""

import itertools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqxldm import discrete as dd
from eqxldm.models import TokenTransformer

N, V = 3, 3  # tokens of a sequence, letters; [MASK] is letter number V
MASK = V
TRANSITION = np.array([[0.8, 0.15, 0.05], [0.1, 0.3, 0.6], [0.45, 0.1, 0.45]])
FIRST = np.array([0.5, 0.2, 0.3])
SEQUENCES = np.array(list(itertools.product(range(V), repeat=N)))
PROBABILITY = np.array(
    [FIRST[s[0]] * math.prod(TRANSITION[a, b] for a, b in itertools.pairwise(s)) for s in SEQUENCES]
)
EMPTY = jnp.full((4096, N), MASK)


def truth(x_t, t=None, cond=None, *, key=None, mask=None, positions=None):
    """The chain's own conditionals, `log p(x0[i] | the tokens of x_t that are no mask)`."""
    m = len(x_t)  # a beginning of the sequence has the beginnings' probabilities
    fits = jnp.all((x_t == MASK) | (SEQUENCES[:, :m] == x_t), axis=1)
    weights = jnp.where(fits, jnp.asarray(PROBABILITY, jnp.float32), 0.0)
    marginals = jnp.einsum("s,siv->iv", weights, jax.nn.one_hot(SEQUENCES[:, :m], V + 1))
    return jnp.log(marginals)


def guess(x_t, t=None, cond=None, *, key=None):
    """A network that is wrong, and looks at everything."""
    seen = jnp.sum(jnp.where(x_t == MASK, 0.3, x_t + 1.0) * (1 + jnp.arange(len(x_t))))
    return jnp.cos(seen * (1 + jnp.arange(V + 1)) + jnp.arange(len(x_t))[:, None])


def estimates(objective, denoiser, x0, n=20_000):
    """Many losses of one example, each at a time and with a key of its own."""
    times = objective.times(jax.random.key(1), n)
    one = lambda t, key: objective.loss(denoiser, x0, t, None, key=key)[0]
    return np.asarray(jax.jit(jax.vmap(one))(times, jax.random.split(jax.random.key(2), n)))


def close(values, expected):
    """Within five standard errors, of draws taken as independent: stratified ones vary less."""
    error = 5 * values.std() / math.sqrt(len(values))
    assert abs(values.mean() - expected) < error + 1e-4, (values.mean(), expected, error)


def test_the_bound_of_the_true_conditionals_is_the_entropy():
    bounds = jax.jit(jax.vmap(lambda x: dd.exact_bound(truth, x, MASK)))(jnp.asarray(SEQUENCES))
    np.testing.assert_allclose(bounds, -np.log(PROBABILITY), rtol=1e-5)


@pytest.mark.parametrize(
    "objective",
    [
        dd.MaskedDiffusion(dd.Masking(MASK)),
        dd.MaskedDiffusion(dd.Masking(MASK, dd.cosine_masking)),
        dd.MaskedDiffusion(dd.Masking(MASK, dd.polynomial_masking(2.0))),
        dd.MaskedCount(dd.Masking(MASK)),
    ],
)
def test_estimators_are_unbiased_for_every_schedule(objective):
    x0 = jnp.array([0, 2, 1])
    close(estimates(objective, guess, x0), float(dd.exact_bound(guess, x0, MASK)) / N)


def test_counting_masks_varies_less_than_drawing_times():
    x0, path = jnp.array([0, 2, 1]), dd.Masking(MASK)
    counted, timed = (
        estimates(objective, guess, x0)
        for objective in (dd.MaskedCount(path), dd.MaskedDiffusion(path))
    )
    assert counted.std() < timed.std() / 2


def test_without_its_weight_the_loss_of_independent_letters_is_half_their_entropy():
    unigram = lambda x_t, t, cond, *, key=None: jnp.log(jnp.array([[0.5, 0.2, 0.3, 1.0]] * N))
    x0, path = jnp.array([0, 2, 1]), dd.Masking(MASK)
    nats = -np.log([0.5, 0.3, 0.2]).mean()
    close(estimates(dd.MaskedDiffusion(path), unigram, x0), nats)

    class Unweighted(dd.Masking):
        def weight(self, t):
            return jnp.ones_like(t)

    close(estimates(dd.MaskedDiffusion(Unweighted(MASK)), unigram, x0), nats / 2)


@pytest.fixture(scope="module")
def network():
    """A small network whose head is not zero."""
    made = TokenTransformer(
        V + 1, depth=1, width=16, num_heads=2, max_length=8, remat=None, key=jax.random.key(3)
    )
    head = jax.random.normal(jax.random.key(4), made.lm_head.weight.shape)
    table = 10 * made.token_table
    return eqx.tree_at(lambda m: (m.lm_head.weight, m.token_table), made, (head, table))


def test_block_diffusion_lies_between_the_autoregressive_likelihood_and_masked_diffusion(network):
    x0 = jnp.array([0, 2, 1, 1])
    exact = jax.jit(lambda x: [dd.exact_block_bound(network, x, MASK, b) for b in (1, 2, 4)])(x0)
    np.testing.assert_allclose(exact[2], dd.exact_bound(network, x0, MASK), rtol=1e-5)
    # Blocks of one: the likelihood of a model that says p(x_i | x_<i), a call for each i.
    steps = [jnp.concatenate([x0[:i], jnp.array([MASK])]) for i in range(4)]
    before = [jnp.tril(jnp.ones((i + 1, i + 1), bool)) for i in range(4)]
    log_p = [
        dd.log_probabilities(network(x, mask=mask), MASK)[-1]
        for x, mask in zip(steps, before, strict=True)
    ]
    likelihood = -sum(float(row[x]) for row, x in zip(log_p, x0, strict=True))
    np.testing.assert_allclose(exact[0], likelihood, rtol=1e-5)
    path = dd.Masking(MASK)
    for block_size, bound in zip((1, 2, 4), exact, strict=True):
        objective = dd.BlockDiffusion(path, block_size)
        close(estimates(objective, network, x0, 1000), float(bound) / 4)


def test_the_true_chain_has_the_same_bound_in_blocks_of_any_size():
    x0 = jnp.asarray(SEQUENCES[11])
    for block_size in (1, 3):
        bound = dd.exact_block_bound(truth, x0, MASK, block_size)
        np.testing.assert_allclose(bound, -np.log(PROBABILITY[11]), rtol=1e-5)


def test_one_pass_over_both_halves_is_a_pass_for_each_block(network):
    x0, x_t = jnp.array([0, 2, 1, 1]), jnp.array([MASK, 2, MASK, 1])
    logits = dd.one_pass(network, x_t, x0, 2)
    first = network(x_t[:2])
    whole = jnp.concatenate([x0[:2], x_t[2:]])
    second = network(whole, mask=jnp.asarray(dd.block_mask(4, 2)))[2:]
    np.testing.assert_allclose(logits, jnp.concatenate([first, second]), rtol=1e-4, atol=1e-5)


SAMPLERS = {
    "ancestral": (dd.Ancestral(), 64),
    "low confidence": (dd.Ordered(), N),
    "at random": (dd.Ordered(dd.at_random), N),
    "margin": (dd.Ordered(dd.margin), N),
    "entropy": (dd.Ordered(dd.certainty), N),
    "entropy bounded": (dd.EntropyBounded(bound=0.0), N),
    "threshold": (dd.Threshold(confidence=1.0), N),
    "in blocks": (dd.InBlocks(dd.Ordered(dd.at_random), block_size=2), N),
}


def chi_square(tokens, probability=PROBABILITY):
    """Pearson's statistic less its mean, in its standard deviations."""
    places = tokens @ V ** np.arange(N)[::-1]
    seen = np.bincount(places, minlength=len(SEQUENCES))
    cells = probability > 0
    assert seen[~cells].sum() == 0
    expected = probability[cells] * len(tokens)
    freedom = cells.sum() - 1
    return (((seen[cells] - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)


def draw(sampler, steps, x=EMPTY, seed=0, **options):
    run = jax.jit(
        lambda x, key: dd.sample_tokens(
            truth, dd.Masking(MASK), sampler, steps, x, key=key, **options
        )
    )
    return run(x, key=jax.random.key(seed))


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_token_a_call_draws_from_the_chain(name):
    sampler, steps = SAMPLERS[name]
    found = draw(sampler, steps, EMPTY[:1024] if name == "ancestral" else EMPTY)
    assert chi_square(np.asarray(found.tokens)) < 5
    assert int(found.calls) <= steps


def test_an_order_by_the_drawn_token_does_not():
    assert chi_square(np.asarray(draw(dd.Ordered(dd.drawn), N).tokens)) > 5


def test_all_tokens_in_one_call_are_independent():
    tokens = np.asarray(draw(dd.Ordered(), 1).tokens)
    marginals = [np.bincount(SEQUENCES[:, i], PROBABILITY, V) for i in range(N)]
    product = np.array([math.prod(marginals[i][s[i]] for i in range(N)) for s in SEQUENCES])
    assert chi_square(tokens, product) < 5 < chi_square(tokens)


def test_infilling_draws_from_the_conditional_and_keeps_what_is_known():
    known = EMPTY.at[:, 1].set(2)
    tokens = np.asarray(draw(dd.Ordered(), 2, known).tokens)
    conditional = np.where(SEQUENCES[:, 1] == 2, PROBABILITY, 0)
    assert chi_square(tokens, conditional / conditional.sum()) < 5


def test_the_network_is_not_called_while_nothing_changed():
    one = EMPTY[:1]
    found = draw(dd.Ancestral(), 64, one, trajectory=True)
    assert int(found.calls) <= N
    assert found.trajectory.shape == (64, 1, N)
    np.testing.assert_array_equal(found.trajectory[-1], found.tokens)
    assert int(draw(dd.Ancestral(), 64, one, reuse=False).calls) > int(found.calls)
    assert int(draw(dd.Ordered(), 4, jnp.zeros((2, N), int)).calls) == 0  # nothing is masked


def test_thresholds_reveal_what_is_sure_at_once():
    sure = lambda x_t, t, cond, key=None: jnp.tile(jnp.array([9.0, 0, 0, 0]), (N, 1))
    for sampler in (dd.Threshold(0.9), dd.EntropyBounded(0.1)):
        found = dd.sample_tokens(
            sure, dd.Masking(MASK), sampler, N, EMPTY[:1], key=jax.random.key(0)
        )
        assert int(found.calls) == 1


def test_rare_tokens_are_drawn_as_often_as_they_should_be():
    """Sixty-four tokens of 4e-6 each, beside one that is nearly certain."""
    log_p = jnp.log(jnp.array([1 - 64 * 4e-6] + 64 * [4e-6], jnp.float32))
    rows = jnp.broadcast_to(log_p, (2**13, 65))
    count = jax.jit(lambda key: jnp.sum(dd.draw_tokens(rows, key=key) > 0))
    seen = sum(int(count(key)) for key in jax.random.split(jax.random.key(0), 16))
    expected = 16 * len(rows) * 64 * 4e-6
    assert abs(seen - expected) < 5 * math.sqrt(expected)


def test_temperature_and_nucleus():
    log_p = jnp.log(jnp.tile(jnp.array([0.5, 0.3, 0.15, 0.05]), (4096, 1)))
    count = lambda **options: np.bincount(
        dd.draw_tokens(log_p, key=jax.random.key(0), **options), minlength=4
    )
    assert count(temperature=0.0).tolist() == [4096, 0, 0, 0]
    assert count(top_p=0.7)[2:].sum() == 0 < count(top_p=0.7)[1]
    cold = np.array([0.5, 0.3, 0.15, 0.05]) ** 2
    np.testing.assert_allclose(count(temperature=0.5) / 4096, cold / cold.sum(), atol=0.04)


def test_guidance_by_the_prompt_at_scale_one_is_the_network_alone():
    x = jnp.array([0, MASK, MASK])
    prompt = x != MASK
    plain = guess(x)
    np.testing.assert_allclose(dd.guide_prompt(guess, MASK, 1.0)(x, None, prompt), plain)
    none = guess(jnp.full(N, MASK))
    expected = none + 2 * (plain - none)
    np.testing.assert_allclose(
        dd.guide_prompt(guess, MASK, 2.0)(x, None, prompt), expected, rtol=1e-5, atol=1e-5
    )


def test_a_cache_of_blocks_gives_the_tokens_of_full_passes(network):
    """Greedy, so that both ways have one answer; the exact cache, by blocks of two of eight."""
    path, sampler = dd.Masking(MASK), dd.Ordered(temperature=0.0)
    x = jnp.full((2, 8), MASK).at[1, :3].set(jnp.array([2, 0, 1]))
    cached = dd.sample_blocks(network, path, sampler, 2, x, block_size=2, key=jax.random.key(0))
    mask = jnp.asarray(dd.block_mask(8, 2))
    masked = lambda x_t, t, cond, key=None: network(x_t, mask=mask)
    blocks = dd.InBlocks(sampler, block_size=2)
    full = dd.sample_tokens(masked, path, blocks, 8, x, key=jax.random.key(0)).tokens
    np.testing.assert_array_equal(cached, full)
    near = dd.sample_blocks(
        network, path, sampler, 2, x, block_size=2, exact=False, key=jax.random.key(0)
    )
    assert not np.any(near == MASK) and near[1, :3].tolist() == [2, 0, 1]


def test_bad_arguments_are_named():
    path = dd.Masking(MASK)
    with pytest.raises(ValueError, match="2 blocks of 2 in 3 positions need one call each"):
        dd.InBlocks(dd.Ordered(), block_size=2).plan(path, 1, 3)
    with pytest.raises(ValueError, match="temperature must be 0 or above"):
        dd.Ordered(temperature=-1.0)
    with pytest.raises(ValueError, match="top_p must lie in"):
        dd.Threshold(top_p=0.0)
    with pytest.raises(ValueError, match="do not divide into blocks of 2"):
        dd.training_mask(3, 2)
    with pytest.raises(ValueError, match="mask_id 3 is outside of the 3 tokens"):
        dd.log_probabilities(jnp.zeros((2, 3)), 3)
    with pytest.raises(ValueError, match="at most 14 tokens; got 15"):
        dd.exact_bound(truth, jnp.zeros(15, int), MASK)
