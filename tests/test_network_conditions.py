"""Networks of other shapes, of two times, and of conditions that are sequences."""

import dataclasses
import json
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from eqxldm import models, nn, pretrained, training
from eqxldm.models import ByteTextEncoder, CrossAttentionDiTBlock, DiT, UNet

from helpers import filled, perturbed

KEY = jax.random.key(0)
T = jnp.array(0.3)
SIZES = dict(patch_size=2, depth=2, width=16, num_heads=2)
UNSCALED = nn.Sinusoid(scale=1.0, offset=0.0, size=32)
TEXT = models.ByteTextConfig(16, 1, 2, 8)
IDS = jnp.array([256, 104, 105, 33, 0, 0])
MODERN = dict(
    norm=nn.RMSNorm, swiglu=True, qk_norm=nn.RMSNorm, rope=nn.RoPE((4, 4)), modulated=False,
    condition_tokens=2, time_tokens=1, tokens_start=1, early_depth=1, early_head=True,
    patch_bottleneck=3,
)  # fmt: skip
SHAPES = {1: (3, 8), 2: (3, 4, 8), 3: (2, 2, 4, 4)}


def make(shape=SHAPES[2], **options):
    return filled(lambda: DiT(shape, **{**SIZES, **options}, key=KEY), size=0.1)


def noise(shape, seed=1):
    return jax.random.normal(jax.random.key(seed), shape)


# Any number of axes


@pytest.mark.parametrize("axes", SHAPES)
def test_a_training_step_of_any_number_of_axes_lowers_the_loss(axes):
    dit = DiT(SHAPES[axes], **SIZES, num_classes=3, remat=None, key=KEY)
    x, label = noise((4, *SHAPES[axes])), jnp.array([0, 1, 2, 3])

    def loss_fn(model, batch, key, context):
        out = jax.vmap(model)(batch["x0"], jnp.linspace(0.1, 0.9, 4), batch["cond"])
        return jnp.mean((out - batch["x0"]) ** 2), {}

    optimizer = optax.adam(1e-2)
    state, static = training.init_state(dit, optimizer)
    step = jax.jit(training.make_train_step(loss_fn, static, optimizer))
    losses = []
    for _ in range(8):
        state, metrics = step(state, {"x0": x, "cond": label}, KEY)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("axes", SHAPES)
def test_patches_are_cut_and_put_back_in_order(axes):
    shape = SHAPES[axes]
    x = noise(shape)
    patch = (1, 2, 2)[-axes:] if axes > 1 else 2
    grid, sizes = nn.patch_grid(shape[1:], patch)
    tokens = nn.patchify(x, patch).reshape(-1, shape[0], int(np.prod(sizes)))
    back = nn.unpatchify(tokens.swapaxes(1, 2).reshape(len(tokens), -1), shape[1:], patch)
    np.testing.assert_array_equal(back, x)
    place = tuple(min(1, g - 1) for g in grid)
    cut = tuple(slice(p * s, (p + 1) * s) for p, s in zip(place, sizes, strict=True))
    row = int(np.ravel_multi_index(place, grid))
    np.testing.assert_array_equal(tokens[row].reshape(shape[0], *sizes), x[(slice(None), *cut)])


def test_positions_of_every_grid_are_distinct_and_those_of_two_axes_as_published():
    for grid, size in (((7,), 16), ((3, 4), 18), ((2, 3, 4), 16), ((2, 3, 4), 1024)):
        table = nn.sincos_positions(grid, size)
        assert table.shape == (int(np.prod(grid)), size)
        assert len(np.unique(table.round(6), axis=0)) == len(table)
    w = 10_000.0 ** -(np.arange(4) / 4)
    rows, columns = np.meshgrid(np.arange(3), np.arange(5), indexing="ij")
    halves = [f(p.reshape(-1, 1) * w) for p in (columns, rows) for f in (np.sin, np.cos)]
    np.testing.assert_array_equal(nn.sincos_positions((3, 5), 16), np.concatenate(halves, 1))


def test_shapes_that_no_dit_has_are_refused():
    for shape in ((3,), (3, 2, 2, 2, 2)):
        with pytest.raises(ValueError, match="the channels and one to three spatial axes"):
            DiT(shape, **SIZES, key=KEY)
    with pytest.raises(ValueError, match=r"patch_size: need one number, or 2 for 2 axes"):
        DiT((3, 4, 4), **{**SIZES, "patch_size": (1, 2, 2)}, key=KEY)
    with pytest.raises(ValueError, match="rope needs a size for each of the 2 axes"):
        DiT((3, 4, 4), **SIZES, rope=nn.RoPE((4,)), key=KEY)
    with pytest.raises(TypeError, match=r"no option named dropout\. There are: .*mlp_ratio"):
        DiT((3, 4, 4), **SIZES, dropout=0.1, key=KEY)


# Times


def test_a_network_of_one_time_refuses_a_step_and_one_of_two_takes_none_as_zero():
    one, two = make(), make(step_embedding=UNSCALED)
    x = noise(one.shape)
    with pytest.raises(ValueError, match="DiT: the network has one time, t, and takes no step h"):
        one(x, T, h=jnp.array(0.5))
    np.testing.assert_array_equal(two(x, T), two(x, T, h=0.0))
    assert jnp.max(jnp.abs(two(x, T, h=0.5) - two(x, T))) > 1e-4
    unet = dict(channels=(8,), blocks=1, attention_levels=(False,), groups=4)
    unet = perturbed(UNet(2, **unet, step_embedding=UNSCALED, key=KEY))
    x = noise((2, 4, 4))
    np.testing.assert_array_equal(unet(x, T), unet(x, T, h=0.0))
    assert jnp.max(jnp.abs(unet(x, T, h=0.5) - unet(x, T))) > 1e-4


def test_the_scale_of_the_time_is_the_slope_of_its_angles():
    published, unscaled = nn.Sinusoid(), nn.Sinusoid(scale=1.0, offset=0.0)
    np.testing.assert_array_equal(published(T), nn.sinusoidal(1000 * T - 1, 256))
    np.testing.assert_array_equal(unscaled(T), nn.sinusoidal(T, 256))
    slope = lambda s: float(jnp.max(jnp.abs(jax.jacfwd(s)(T))))
    assert slope(unscaled) <= 1 < 100 < slope(published)


def test_a_time_embedding_may_be_a_module_of_ones_own():
    given = nn.TimeEmbedding(16, scale=5.0, offset=0.0, key=KEY)
    dit = DiT(SHAPES[2], **SIZES, time_embedding=given, key=KEY)
    assert dit.time_embedding is given
    assert dit.config.time_embedding == nn.Sinusoid(scale=5.0, offset=0.0)


@pytest.mark.parametrize("case", ["joint", "cross", "modern", "unet", "mmdit"])
def test_forward_mode_agrees_with_differences_and_with_reverse_mode(case):
    """In float64, `d out / d (x, t, h)` along a direction."""
    with jax.enable_x64(True):
        times = dict(time_embedding=UNSCALED, step_embedding=UNSCALED)
        text = dict(embed_cond=models.ByteTextConfig(16, 1, 2, 8), qk_norm=nn.RMSNorm)
        tokens, shape = noise((6, 16)).astype(jnp.float64), (2, 4, 4)
        cond: Any = nn.Conditioning(tokens=tokens, mask=jnp.arange(6) < 4)
        if case == "unet":
            sizes = dict(channels=(8, 8), blocks=1, attention_levels=(False, True), groups=4)
            net: Any = UNet(2, **sizes, context_size=16, **times, key=KEY)
        elif case == "mmdit":
            sizes = dict(depth=2, dual_depth=1, width=16, num_heads=2, max_grid=4, base_grid=2)
            net = models.MMDiT(2, **sizes, context_size=16, qk_norm=nn.RMSNorm, **times, key=KEY)
        else:
            block = CrossAttentionDiTBlock if case == "cross" else models.DiTBlock
            rope = nn.RoPE((4, 4))
            options = text | dict(block=block, rope=rope)
            if case == "modern":
                options = dict(embed_cond=TEXT) | MODERN
            net = DiT(SHAPES[2], **SIZES, **times, **options, key=KEY)
            shape, cond = SHAPES[2], IDS
        wide = lambda a: a.astype(jnp.float64) if eqx.is_inexact_array(a) else a
        net = jax.tree.map(wide, perturbed(net))
        point = (noise(shape).astype(jnp.float64), jnp.float64(0.4), jnp.float64(0.2))
        along = (noise(shape, 2).astype(jnp.float64), jnp.float64(1.0), jnp.float64(-0.7))
        run = jax.jit(lambda x, t, h: net(x, t, cond, h=h))
        tangent = jax.jvp(run, point, along)[1]
        step = 1e-5
        ahead, behind = (
            run(*(a + s * d for a, d in zip(point, along, strict=True))) for s in (step, -step)
        )
        size = float(jnp.max(jnp.abs(tangent)))
        assert size > 1e-2
        np.testing.assert_allclose(tangent, (ahead - behind) / (2 * step), atol=1e-6 * size)
        probe = noise(tangent.shape, 3).astype(jnp.float64)
        gradients = jax.vjp(run, *point)[1](probe)
        inner = sum(jnp.vdot(g, d) for g, d in zip(gradients, along, strict=True))
        np.testing.assert_allclose(jnp.vdot(probe, tangent), inner, rtol=1e-8)


# Conditions


@pytest.mark.parametrize("block", [models.DiTBlock, CrossAttentionDiTBlock])
@pytest.mark.parametrize("rope", [None, nn.RoPE((4, 4))])
def test_masked_tokens_of_a_text_change_nothing(block, rope):
    dit = make(embed_cond=TEXT, block=block, rope=rope)
    x = noise(dit.shape)
    out = dit(x, T, IDS)
    longer = jnp.concatenate([IDS, jnp.zeros(2, IDS.dtype)])
    np.testing.assert_allclose(dit(x, T, longer), out, atol=1e-5)
    np.testing.assert_allclose(dit(x, T, IDS[:4]), out, atol=1e-5)
    assert jnp.max(jnp.abs(dit(x, T, IDS.at[2].set(99)) - out)) > 1e-4
    batch = jax.jit(jax.vmap(dit))(jnp.stack([x, x]), jnp.stack([T, T]), jnp.stack([IDS, IDS]))
    np.testing.assert_allclose(batch[1], out, atol=1e-5)


def sequence(vector=True, mask=None):
    """A condition of tokens given as they are."""

    def embed(cond):
        given = jnp.ones(16) if vector else None
        return nn.Conditioning(given, cond, None if mask is None else jnp.asarray(mask))

    return embed


@pytest.mark.parametrize("block", [models.DiTBlock, CrossAttentionDiTBlock])
def test_tokens_matter_in_both_kinds_of_block_and_only_unmasked_ones(block):
    tokens = noise((3, 16))
    for mask in (None, [True, False, True]):
        dit = make(embed_cond=sequence(mask=mask), block=block)
        x = noise(dit.shape)
        gradient = jax.grad(lambda tokens, d=dit, x=x: jnp.sum(jnp.sin(d(x, T, tokens))))(tokens)
        used = [bool(jnp.any(row != 0)) for row in gradient]
        assert used == ([True] * 3 if mask is None else mask)


def test_joint_tokens_are_part_of_the_sequence_and_crossed_ones_are_not():
    seen = []

    def attention(q, k, v, mask=None, bias=None):
        seen.append((len(q), len(k)))
        return nn.attend(q, k, v, mask, bias)

    for block in (models.DiTBlock, CrossAttentionDiTBlock):
        dit = make(embed_cond=sequence(), block=block, attention=attention, remat=None)
        dit(noise(dit.shape), T, noise((3, 16)))
    assert set(seen) == {(11, 11), (8, 8), (8, 3)}


def test_cross_attention_starts_silent_and_needs_tokens():
    dit = DiT(SHAPES[2], **SIZES, embed_cond=sequence(), block=CrossAttentionDiTBlock, key=KEY)
    assert not jnp.any(dit.blocks.stacked.cross_attention.proj.weight)
    label = make(num_classes=3, block=CrossAttentionDiTBlock)
    with pytest.raises(ValueError, match="there are no tokens to attend to"):
        label(noise(label.shape), T, jnp.array(1))
    joint = make(embed_cond=sequence())
    with pytest.raises(ValueError, match=r"must have the width 16, got 6\. Project them"):
        joint(noise(joint.shape), T, noise((3, 6)))


def test_a_unet_takes_a_context_with_a_mask_alone_with_a_label_and_from_a_text():
    sizes = dict(channels=(8, 8), blocks=1, attention_levels=(False, True), groups=4)
    x, context = noise((2, 4, 4)), noise((5, 16))
    mask = jnp.arange(5) < 3
    for labels, wrap in ((None, lambda c: c), (3, lambda c: (jnp.array(1), c))):
        unet = perturbed(UNet(2, **sizes, context_size=16, num_classes=labels, key=KEY))
        masked = unet(x, T, wrap(nn.Conditioning(tokens=context, mask=mask)))
        np.testing.assert_allclose(masked, unet(x, T, wrap(context[:3])), atol=1e-5)
        assert jnp.max(jnp.abs(masked - unet(x, T, wrap(context)))) > 1e-4
    text = models.ByteTextConfig(32, 1, 2, 8)
    unet = perturbed(UNet(2, **sizes, context_size=32, embed_cond=text, key=KEY))
    np.testing.assert_allclose(unet(x, T, IDS), unet(x, T, IDS[:4]), atol=1e-5)
    plain = UNet(2, **sizes, embed_cond=text, key=KEY)
    with pytest.raises(ValueError, match=r"no cross-attention\. Make it with context_size=32"):
        plain(x, T, IDS)


def test_a_text_encoder_ignores_padding_and_order_matters():
    encoder = perturbed(ByteTextEncoder(16, 2, 2, 8, key=KEY))
    text = encoder(IDS)
    assert text.mask.tolist() == [True] * 4 + [False] * 2
    short = encoder(IDS[:4])
    np.testing.assert_allclose(text.vector, short.vector, atol=1e-5)
    np.testing.assert_allclose(text.tokens[:4], short.tokens, atol=1e-5)
    swapped = encoder(jnp.array([256, 105, 104, 33]))
    assert jnp.max(jnp.abs(swapped.vector - text.vector)) > 1e-4
    assert jnp.all(jnp.isfinite(encoder(jnp.zeros(3, int)).vector))  # nothing but padding
    assert jnp.all(jnp.isnan(encoder(jnp.array([256, 257])).tokens[1]))
    with pytest.raises(ValueError, match="at most 8 ids, got 9"):
        encoder(jnp.ones(9, int))


def test_a_network_learns_a_text_together_with_its_encoder():
    """Two captions, two pictures: only the text can tell which."""
    dit = DiT(SHAPES[2], **SIZES, embed_cond=TEXT, remat=None, key=KEY)
    ids = jnp.array([[256, 97, 0], [256, 98, 0]])
    pictures = noise((2, *SHAPES[2]))

    def loss_fn(model, batch, key, context):
        out = jax.vmap(model)(jnp.zeros_like(batch["x0"]), jnp.full(2, 0.5), batch["cond"])
        return jnp.mean((out - batch["x0"]) ** 2), {}

    optimizer = optax.adam(1e-2)
    state, static = training.init_state(dit, optimizer)
    step = jax.jit(training.make_train_step(loss_fn, static, optimizer), donate_argnums=0)
    for _ in range(60):
        state, metrics = step(state, {"x0": pictures, "cond": ids}, KEY)
    apart = jnp.mean((pictures - jnp.mean(pictures, 0)) ** 2)  # what one picture for both leaves
    assert float(metrics["loss"]) < 0.3 * float(apart)


# How a model was made

SMALL_UNET = dict(channels=(8, 8), blocks=1, attention_levels=(False, True), groups=4)
RECORDED = {
    "dit": lambda: DiT((3, 4, 8), **SIZES, num_classes=3, qk_norm=nn.RMSNorm, unroll=2, key=KEY),
    "clip": lambda: DiT((3, 2, 4, 8), **{**SIZES, "patch_size": (1, 2, 2)}, key=KEY),
    "text": lambda: DiT(
        (3, 4, 8), **SIZES, embed_cond=TEXT, block=CrossAttentionDiTBlock, rope=nn.RoPE((4, 4)),
        time_embedding=UNSCALED, step_embedding=UNSCALED, key=KEY,
    ),
    "modern": lambda: DiT((3, 4, 8), **SIZES, **MODERN, num_classes=3, key=KEY),
    "module": lambda: DiT((3, 4, 8), **SIZES, embed_cond=TEXT.build(key=KEY), key=KEY),
    "unet": lambda: UNet(2, **SMALL_UNET, num_classes=3, remat=nn.save_narrow, key=KEY),
    "rows": lambda: UNet(2, **SMALL_UNET, embed_cond=nn.Labels(3, 32, has_null=False), key=KEY),
    "autoencoder": lambda: models.AutoencoderKL(
        3, 4, channels=(8, 8), blocks=1, groups=4, attention_levels=[True, False], key=KEY
    ).with_latent_stats(0.5, (1.0, 2.0, 3.0, 4.0)),
    "discriminator": lambda: models.PatchDiscriminator(
        3, channels=8, layers=1, conv=nn.SpectralConv, norm=eqx.nn.Identity, key=KEY
    ),
    "lpips": lambda: models.LPIPS(channels=(2,) * 5, key=KEY),
    "encoder": lambda: ByteTextEncoder(16, 2, 2, 8, key=KEY),
    "captions": lambda: models.CaptionEncoder(16, 1, 2, 8, 99, key=KEY),
}  # fmt: skip


@pytest.mark.parametrize("name", RECORDED)
def test_a_model_is_made_again_from_its_record_and_from_its_file(name, tmp_path):
    model = RECORDED[name]()
    assert dataclasses.is_dataclass(model.config) and hash(model.config) == hash(model.config)
    assert model.config.build(key=KEY).config == model.config
    written = json.loads(json.dumps(pretrained.records.to_json(model.config)))
    assert pretrained.records.from_json(written) == model.config
    pretrained.save(model, tmp_path / "model.safetensors")
    again = pretrained.load(tmp_path / "model.safetensors")
    assert type(again) is type(model) and bool(eqx.tree_equal(again, model))
