"""The parts of the job of clips: crops, losses of images, known frames, judges, animations."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import eqxldm as ex
from eqxldm.data import MovingDigits, read_clips
from eqxldm.data.clips import Wanted
from eqxldm.text import vocabulary_size
from experiments.train.conditions import Captions
from experiments.video.config import Config, Train
from experiments.video.data import captions_of, said_by
from experiments.video.images import ReadBoth, both_batches, both_loss
from experiments.video.measuring import Measure, psnr_by_frame
from experiments.video.networks import KnownFrames, make_denoiser, to_clips, to_frames
from experiments.video.pictures import filmstrip, grid_frames, save_animation
from experiments.video.training import cropped

RNG = np.random.default_rng(0)


def test_the_autoencoder_learns_from_all_frames_of_a_clip():
    """What sees nine frames at most decodes the ones after worse."""
    options, clips = Train().autoencoder, jnp.zeros((2, 17, 64, 48, 1))
    assert cropped(clips, options, jax.random.key(0)).shape == (2, 17, 32, 32, 1)
    some = replace(options, crop=64, crop_frames=9)
    assert cropped(clips, some, jax.random.key(0)).shape == (2, 9, 64, 48, 1)


def test_the_loss_of_images_is_added_and_that_of_clips_keeps_its_numbers():
    class Network:
        def with_frames(self, count):
            return count

    of_clips = lambda model, batch, key, context: (jnp.array(2.0) * batch, {"clips": batch})
    of_images = lambda frames, batch, key, context: (jnp.array(3.0) * batch * frames, {})
    loss = both_loss(of_clips, of_images, 0.25)
    error, aux = loss(Network(), {"clips": 10.0, "images": 100.0}, jax.random.key(0), None)
    assert error == 2 * 10 + 0.25 * 300 and aux == {"clips": 10.0, "images": 300.0}


def test_the_image_beside_a_clip_depends_on_seed_epoch_and_clip_alone():
    class Numbers:
        def __init__(self, n):
            self.n = n

        def __len__(self):
            return self.n

        def read(self, indices, flipped):
            return indices

    clips: Any = Numbers(50)
    images: Any = Numbers(7)

    def draw(seed, epoch):
        return ReadBoth(clips, images, seed)(np.arange(50), np.full(50, epoch))[0]["images"]

    assert set(draw(0, 0)) == set(range(7))
    assert (draw(0, 1) == draw(0, 1)).all()
    assert (draw(0, 0) != draw(0, 1)).any() and (draw(0, 0) != draw(2**63, 0)).any()
    first, second = (both_batches(clips, images, 4, seed=1) for _ in range(2))
    kept = [next(first) for _ in range(3)][2]
    second.set_state({**second.get_state(), "batches": 2})
    again = next(second)
    assert all((kept[name] == again[name]).all() for name in ("clips", "images"))


class Guess:
    """A network in place of the transformer: it sees the mask's channel and the noisy clip."""

    def __call__(self, x, t, cond):
        return 0 * x + 7.0


@pytest.mark.parametrize("prediction", [ex.predict_velocity, ex.predict_v, ex.predict_x0])
def test_known_frames_end_where_they_are_and_cost_nothing(prediction):
    shape, key = (2, 3, 4, 4), jax.random.key(0)
    x0, eps = jax.random.normal(key, (2, *shape))
    mask = jnp.array([1.0, 1.0, 0.0])
    cond = {"known": x0 * mask[:, None, None], "mask": mask}
    flow = ex.Diffusion(ex.LinearFlow(), prediction)
    denoiser = KnownFrames(Guess(), flow)  # type: ignore[arg-type]
    t = jnp.array(0.4)
    out = denoiser((1 - t) * x0 + t * eps, t, cond)
    assert np.allclose(out[:, :2], flow.target(x0, t, eps)[:, :2], atol=1e-5)
    assert (out[:, 2] == 7).all()
    end = ex.sample(denoiser, flow, ex.DPMSolverPP2M(), ex.shifted_times(6, 2.0), eps, cond)
    assert np.allclose(end[:, :2], x0[:, :2], atol=1e-4)
    if prediction is not ex.predict_v:
        guess = 7.0 if prediction is ex.predict_x0 else eps[:, 2] - 7
        assert np.allclose(end[:, 2], guess, atol=1e-4)


@pytest.mark.parametrize(("tokens", "last"), [("clip", vocabulary_size(8) - 1), ("bytes", 256)])
def test_captions_are_byte_pairs_or_bytes(tokens, last):
    small: Any = dict(depth=1, width=24, num_heads=2, tokens=tokens, merges=8, max_length=4)
    config = Config(diffusion=replace(Train().diffusion, **small))
    make = partial(make_denoiser, config, (2, 2, 4, 4), key=jax.random.key(0))
    read = make(captioned=True).dit.embed_cond
    assert jnp.isfinite(read(jnp.array([last, 1, 2])).tokens).all()
    assert jnp.isnan(read(jnp.array([last + 1, 1, 2])).tokens).any()  # no such token
    assert make(captioned=False).dit.embed_cond is None
    captions = captions_of(config)
    assert isinstance(captions, Captions) and captions.merges == (8 if tokens == "clip" else None)


def test_clips_become_floats_and_bytes_again():
    frames = RNG.integers(0, 256, (2, 3, 4, 5, 3), dtype=np.uint8)
    clips = to_clips(jnp.asarray(frames))
    assert clips.shape == (2, 3, 3, 4, 5) and float(clips[1, 2, 0, 3, 4]) == pytest.approx(
        frames[1, 0, 3, 4, 2] / 127.5 - 1
    )
    assert (np.asarray(to_frames(clips)) == frames).all()


def test_captions_are_judged_by_what_was_tracked():
    real = MovingDigits(
        (255 * (np.hypot(*np.mgrid[-13.5:14, -13.5:14]) < 6)).astype(np.uint8)[None],
        np.array([4]), 12,
    )  # fmt: skip
    clips = [real.clip(i) for i in range(12)]
    frames, texts = np.stack([c.frames for c in clips]), [c.caption for c in clips]
    measure = Measure(None, None)  # type: ignore[arg-type]
    measure._which = lambda clip, path: 4  # type: ignore[method-assign]
    found = measure.tracked(frames, texts)
    assert found["digits"] == 1 and found["directions"] > 0.85 and found["turns_at_walls"] == 1
    swapped = [t.translate(str.maketrans("4", "5")).replace("up", "down") for t in texts]
    assert measure.tracked(frames, swapped)["digits"] == 0
    assert measure.tracked(frames, swapped)["directions"] < found["directions"]
    assert measure.tracked(0 * frames, texts) == {"seen": 0.0}
    assert said_by("a 4 moving down").sum() == 2 and said_by("nothing").sum() == 0
    noisy = frames ^ np.uint8(16)
    assert psnr_by_frame(frames, noisy) == pytest.approx(20 * np.log10(255 / 16) * np.ones(17))


def test_animations_play_what_was_drawn(tmp_path):
    clips = RNG.integers(0, 256, (3, 5, 8, 8, 1), dtype=np.uint8)
    frames = grid_frames(clips, 2, scale=1)
    assert frames.shape == (5, 22, 22, 1) and (frames[2, 2:10, 2:10] == clips[0, 2]).all()
    for ending in ("png", "gif", "webp"):
        save_animation(tmp_path / f"a.{ending}", frames, 8.0)
        with Image.open(tmp_path / f"a.{ending}") as animation:
            animation.seek(3)
            assert animation.n_frames == 5  # type: ignore[attr-defined]
            assert np.abs(np.asarray(animation.convert("L")) - frames[3, ..., 0]).max() == 0
    assert filmstrip(clips, scale=1).shape == (32, 52, 1)


def test_animations_are_mp4_too(tmp_path):
    pytest.importorskip("av")
    frames = np.zeros((5, 17, 31, 1), np.uint8)
    frames[3] = 255
    save_animation(tmp_path / "a.mp4", frames, 8.0)
    (clip,) = read_clips(tmp_path / "a.mp4", Wanted(5, (16, 32), 1))
    assert (clip.mean((1, 2, 3)) > 200).tolist() == [False, False, False, True, False]
