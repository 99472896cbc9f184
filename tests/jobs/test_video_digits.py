"""What a network is told of moving digits: which there are, and where they move."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqxldm import nn, pretrained
from eqxldm.models import CrossAttentionDiTBlock, DiTBlock
from experiments.train.terminal import UserError
from experiments.video import __main__ as program
from experiments.video.commands import check_network, check_shapes, train as train_clips
from experiments.video.config import Config, SamplingOptions, Train, earlier
from experiments.video.data import NAMED, Clips, Named, captions_of, choose_condition
from experiments.video.networks import make_denoiser
from experiments.video.training import like

CONFIG = Train().config
SMALL: Any = dict(depth=1, width=24, num_heads=2)
TINY = replace(CONFIG, diffusion=replace(CONFIG.diffusion, **SMALL))
SOUNDING = replace(TINY, clips=replace(TINY.clips, sound=True))


def test_a_caption_is_what_it_names_in_any_order():
    read = captions_of(TINY).read
    both = read.tokens("a 3 moving up and a 7 moving left")
    assert both.shape == (NAMED,) and both.sum() == 6
    assert (both == read.tokens("a 7 moving left and a 3 moving up")).all()
    # Not which digit moves where alone: who goes where is told apart.
    other = read.tokens("a 7 moving up and a 3 moving left")
    assert (both[:14] == other[:14]).all() and not (both == other).all()
    assert not captions_of(TINY).null.any() and read.cut("anything") == ""


@pytest.mark.parametrize("config", [TINY, SOUNDING], ids=["clips", "sound"])
def test_a_network_is_told_digits_beside_the_time_and_can_be_saved(config, tmp_path):
    check_shapes(config, SamplingOptions())
    latent = (2, 5, 4, 4)
    denoiser = make_denoiser(config, latent, captioned=True, key=jax.random.key(0))
    network = denoiser.network
    assert isinstance(network.embed_cond, nn.VectorEmbedding)
    blocks = network.blocks.stacked
    assert isinstance(blocks.video if config.clips.sound else blocks, DiTBlock)
    # Weights that start at zero would give zero.
    network = jax.tree.map(lambda a: a + 0.1 if isinstance(a, jax.Array) else a, network)
    pretrained.save(network, tmp_path / "network.safetensors")
    again = pretrained.load(tmp_path / "network.safetensors")
    x: Any = jax.random.normal(jax.random.key(1), (3, *latent[1:]))
    t: Any = jnp.array(0.5)
    if config.clips.sound:
        x = {"video": x, "sound": jnp.ones(network.sound.shape)}
        t = {"video": t, "sound": t}
    told = lambda network, text: jnp.concatenate(
        [out.reshape(-1) for out in jax.tree.leaves(network(x, t, jnp.asarray(text)))]
    )
    up, left = (Named().tokens(f"a 3 moving {way}") for way in ("up", "left"))
    assert (told(network, up) == told(again, up)).all()
    assert not np.allclose(told(network, up), told(network, left), rtol=1e-4)


@pytest.mark.parametrize("config", [TINY, SOUNDING], ids=["clips", "sound"])
def test_what_a_gpu_trained_draws_on_every_device(config):
    make = lambda **options: make_denoiser(
        config, (2, 5, 4, 4), captioned=True, key=jax.random.key(0), **options
    )
    trained, plain = make(attention="cudnn"), make()
    assert jax.tree.structure(trained) != jax.tree.structure(plain)
    drawn = like(jax.eval_shape(make), trained)
    assert jax.tree.structure(drawn) == jax.tree.structure(plain)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), drawn, plain))


def test_an_attention_that_is_not_there_is_refused_and_leaves_nothing(tmp_path):
    command = replace(Train(), run_dir=tmp_path / "run", attention="cudnn")
    with pytest.raises(
        UserError, match=r"needs a GPU and --diffusion.dtype bfloat16; here are cpu"
    ):
        train_clips(command)
    assert not command.run_dir.exists()


@pytest.mark.parametrize("sound", [False, True])
def test_heads_that_an_attention_does_not_have_are_refused_before_training(sound):
    half = replace(TINY.diffusion, dtype="bfloat16")  # two heads of 12
    config = replace(TINY, diffusion=half, clips=replace(TINY.clips, sound=sound))
    check_shapes(config, SamplingOptions())
    with pytest.raises(UserError, match="needs a head size that is a multiple of 8, got 12"):
        check_shapes(config, SamplingOptions(), "cudnn")


def test_the_large_form_is_one_that_can_be_trained(monkeypatch):
    asked: list[Train] = []
    monkeypatch.setattr(program, "train", asked.append)
    program.main(["--large", "train"])
    program.main(["--large", "train", "--sound", "--diffusion.steps", "5"])
    program.main(["--large", "train", "--videos", "clips"])
    for command in asked:
        assert command.run_dir.name == "video-large" and command.diffusion.width == 384
        check_network(command.config)
        check_shapes(command.config, command.sampling)
    assert [command.diffusion.steps for command in asked] == [17_000, 5, 17_000]
    assert asked[2].clips.channels == 3 and asked[2].diffusion.tokens == "clip"


def test_captions_of_files_are_read_as_text(monkeypatch):
    asked: list[Train] = []
    monkeypatch.setattr(program, "train", asked.append)
    program.main(["train"])
    program.main(["train", "--videos", "clips"])
    assert [command.diffusion.tokens for command in asked] == ["digits", "clip"]
    assert earlier().diffusion.tokens == "bytes"
    captioned = make_denoiser(asked[1].config, (2, 1, 4, 4), captioned=True, key=jax.random.key(0))
    assert isinstance(captioned.dit.blocks.stacked, CrossAttentionDiTBlock)

    class Captioned(list):
        has_captions = True

    files: Any = Captioned()
    with pytest.raises(UserError, match="of --videos are read as clip or bytes"):
        choose_condition(TINY, Clips(files, files))


@pytest.mark.parametrize("prompt", ["a fox", "a 3 moving up", "", "a 3 moving up and a 3 flying"])
def test_a_prompt_must_say_what_the_digits_do(prompt):
    captions = captions_of(TINY)
    captions.say_cut("a 3 moving up and a 7 moving left")
    with pytest.raises(UserError, match=r"2 digits .* such as: a 3 moving up and a 7 moving left"):
        captions.say_cut(prompt)
    one = captions_of(Config(clips=replace(TINY.clips, digits=1)))
    with pytest.raises(UserError, match=r"1 digit .* such as: a 3 moving up$"):
        one.say_cut("a fox")
