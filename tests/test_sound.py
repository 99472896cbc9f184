"""Sound: spectra and back, onsets, the common clock, and objectives and samplers of two parts."""

import time
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqxldm as ex
from eqxldm.audio import (
    Matches,
    MelSpectrogram,
    Tones,
    istft,
    match_events,
    mel_filters,
    onsets,
    read_wav,
    stft,
    wav_bytes,
)
from eqxldm.data import MovingDigits
from eqxldm.metrics import motions, track, wall_times
from eqxldm.models import ByteTextConfig, SoundAutoencoder, TwoTowers
from eqxldm.nn import RoPE
from eqxldm.objectives import JointDenoising

MEL, TONES = MelSpectrogram(), Tones()
FLOW = ex.Diffusion(ex.LinearFlow(), ex.predict_velocity)
DISC = np.uint8(255) * (np.hypot(*np.mgrid[-13.5:14, -13.5:14]) < 6)[None]


def test_spectra_have_the_amplitude_and_go_back_to_the_wave():
    rng = np.random.default_rng(0)
    wave = rng.normal(size=2000)
    spectra = stft(wave, 128, 50)
    assert spectra.shape == (40, 65)
    assert np.allclose(istft(spectra, 128, 50), wave)
    sine = 0.3 * np.sin(2 * np.pi * 1000 * np.arange(2000) / 8000)
    assert np.abs(np.abs(stft(sine, 128, 50))[10:30].max(1) - 0.3).max() < 1e-3
    with pytest.raises(ValueError, match="window 128 must be even and at least the hop, 200"):
        stft(wave, 128, 200)
    with pytest.raises(ValueError, match="half the rate"):
        mel_filters(8000, 512, 4, 100.0, 5000.0)


def test_a_spectrogram_becomes_a_sound_with_the_same_tones():
    wave = TONES.wave([(0.3, 2), (0.8, 9)], 1.25)
    y = MEL(wave)
    assert y.shape == (80, 40) and y.min() == -1 and (y[:15] == -1).all()
    again = MEL.wave(y)
    assert again.shape == wave.shape and np.abs(MEL(again) - y)[y > -0.5].mean() < 0.1
    for second, tone in ((0.3, 2), (0.8, 9)):
        part = again[int(8000 * second) : int(8000 * second) + 1600]
        loudest = np.abs(np.fft.rfft(part)).argmax() * 8000 / 1600
        assert abs(loudest / TONES.frequency(tone) - 1) < 0.03
    assert np.abs(MEL.wave(-np.ones((8, 40), np.float32))).max() < 1e-6  # silence stays silent


def test_onsets_are_where_tones_are_struck():
    struck = [(0.1, 3), (0.5, 3), (0.62, 7), (1.4, 0)]
    found = MEL.seconds(136)[onsets(MEL(TONES.wave(struck, 2.125)))]
    assert np.abs(found - [s for s, _ in struck]).max() < 0.02
    assert onsets(-np.ones((9, 4), np.float32)) == []
    assert match_events([0.1, 0.2, 0.9], [0.15, 0.25, 2.0], 0.1) == Matches(2, 3, 3)
    assert match_events([0.0], [0.5], 0.4) == Matches(0, 1, 1)
    assert np.isnan(Matches(0, 0, 1).precision) and Matches(0, 0, 1).recall == 0
    assert Matches.total([Matches(1, 2, 3), Matches(4, 5, 6)]) == Matches(5, 7, 9)


def test_digits_sound_when_they_bounce_and_the_tracker_agrees():
    source = MovingDigits(DISC, np.array([4]), 12, count=1, tones=TONES)
    tracked, heard = [], []
    for i in range(12):
        clip, wave = source.clip(i), source[i].sound
        true = [frame for frame, _ in clip.bounces]
        for frame, k in clip.bounces:  # at that moment it is at a wall
            straight = clip.places[0, k] + frame * clip.velocities[k]
            assert np.abs(straight / 36 - np.round(straight / 36)).min() < 1e-9
        (motion,) = motions(track(clip.frames[..., 0], 1), (36.0, 36.0)) or []
        tracked.append(match_events(motion.bounces, true, 1.0))
        assert wave is not None and len(wave) == 17_000
        seconds = MEL.seconds(136)[onsets(MEL(wave))]
        heard.append(match_events(8 * seconds, true, 1.0))
    for found in (Matches.total(tracked), Matches.total(heard)):
        assert found.wanted > 12 and min(found.precision, found.recall) > 0.85
    assert MovingDigits(DISC, np.array([4]), 12)[0].sound is None
    assert source.digest() != MovingDigits(DISC, np.array([4]), 12, count=1).digest()
    assert wall_times(5.0, 0.0, 10.0, 9.0) == [] and wall_times(5.0, 1.0, 10.0, 5.0) == [5.0]


def test_wav_files_come_back_at_any_rate(tmp_path):
    wave = TONES.wave([(0.1, 1)], 0.5)
    (tmp_path / "a.wav").write_bytes(wav_bytes(wave, 8000))
    assert np.abs(read_wav(tmp_path / "a.wav", 8000) - wave).max() < 1e-4
    half = read_wav(tmp_path / "a.wav", 4000)
    assert len(half) == 2000 and np.abs(half - wave[::2])[1000:1900].max() < 0.02
    (tmp_path / "b.wav").write_bytes(b"RIFF" + bytes(9))
    with pytest.raises(ValueError, match=r"b\.wav: no WAV file"):
        read_wav(tmp_path / "b.wav", 8000)
    (tmp_path / "c.wav").write_bytes(wav_bytes(wave, 8000)[:-501])
    with pytest.raises(ValueError, match="needed is a whole WAV file"):
        read_wav(tmp_path / "c.wav", 8000)
    (tmp_path / "d.wav").write_bytes(wav_bytes(np.zeros(10**5), 1))  # a day long
    with pytest.raises(ValueError, match=r"1 samples a second, .* 1000 to 768000 samples"):
        read_wav(tmp_path / "d.wav", 8000)
    (tmp_path / "e.wav").write_bytes(wav_bytes(np.zeros(10**5), 767_957))  # a prime number
    begin = time.perf_counter()
    assert abs(len(read_wav(tmp_path / "e.wav", 8000)) / 8000 - 10**5 / 767_957) < 2e-3
    assert time.perf_counter() - begin < 1


def test_a_latent_of_sound_sees_no_later_frame():
    autoencoder = SoundAutoencoder(5, 3, width=8, blocks=1, key=jax.random.key(0))
    autoencoder = autoencoder.with_latent_stats((1.0, 2.0, 3.0), (2.0, 2.0, 2.0))
    y = jax.random.normal(jax.random.key(1), (5, 16))
    z = autoencoder.encode(y)
    assert z.shape == (3, 4) and autoencoder.decode(z).shape == (5, 16)
    later = autoencoder.encode(y.at[:, 8:].set(7.0))
    assert jnp.allclose(z[:, :2], later[:, :2]) and not jnp.allclose(z[:, 2], later[:, 2])
    raw = autoencoder.posterior(y).mean
    assert jnp.allclose(autoencoder.decode(z), autoencoder.decode_raw(raw), atol=1e-4)
    with pytest.raises(ValueError, match="frames a multiple of 4"):
        autoencoder.encode(y[:, :6])


SHAPES = {"video": (2, 3, 4, 4), "sound": (3, 6)}


def towers(**options):
    given: Any = dict(video_seconds=(0.0, 0.3, 0.6), sound_seconds=tuple(np.arange(6) / 8))
    given |= dict(patch_size=(1, 2, 2), depth=1, width=24, num_heads=2, key=jax.random.key(0))
    made = TwoTowers(SHAPES["video"], SHAPES["sound"], **(given | options))
    # Every gate opened: of an untrained network all outputs are zero.
    rng = np.random.default_rng(3)
    add = lambda a: jnp.asarray(np.asarray(a) + 0.1 * rng.normal(size=a.shape), a.dtype)
    return jax.tree.map(lambda a: add(a) if eqx.is_inexact_array(a) else a, made)


@pytest.fixture(scope="module")
def made():
    return towers()


def inputs(seed=0):
    keys = jax.random.split(jax.random.key(seed), 2)
    return {n: jax.random.normal(k, SHAPES[n]) for n, k in zip(SHAPES, keys, strict=True)}


def test_towers_look_at_each_other_by_the_differences_of_their_seconds_alone(made):
    run = eqx.filter_jit(lambda network, x, t: network(x, t))
    t = {"video": jnp.array(0.4), "sound": jnp.array(0.7)}
    x = inputs()
    out = run(made, x, t)
    assert {n: a.shape for n, a in out.items()} == SHAPES
    for part, other in (("video", "sound"), ("sound", "video")):
        changed = run(made, x | {other: inputs(1)[other]}, t)
        assert jnp.abs(changed[part] - out[part]).max() > 1e-3
        changed = run(made, x, t | {other: jnp.array(0.1)})
        assert jnp.abs(changed[part] - out[part]).max() > 1e-4
    # Moved together in time nothing changes; apart, what they see of each other does.
    exchange, turn = jax.tree.map(lambda a: a[0], made.blocks.stacked.to_sound), RoPE((12,))
    sound, video = jnp.ones((6, 24)) * jnp.arange(24), inputs()["video"].reshape(4, 24)
    c, seconds = jnp.ones(24), (np.arange(6) / 8, np.array([0.0, 0.2, 0.4, 0.6]))
    seen = lambda a, b: exchange(sound, video, c, c, turn(16 * a), turn(16 * b))
    at = seen(*seconds)
    assert jnp.allclose(seen(seconds[0] + 5, seconds[1] + 5), at, atol=1e-3)
    assert jnp.abs(seen(seconds[0], seconds[1] + 0.3) - at).max() > 1e-2
    shifted = dict(sound_seconds=tuple(s + 0.2 for s in made.config.sound_seconds))
    skewed = run(towers(**shifted), x, t)
    assert all(jnp.abs(skewed[n] - out[n]).max() > 1e-4 for n in out)


def test_both_towers_can_have_gated_mlps():
    gated, t = towers(swiglu=True), dict.fromkeys(SHAPES, jnp.array(0.5))
    blocks = gated.blocks.stacked
    assert blocks.video.gate is not None and blocks.sound.gate is not None
    out = gated(inputs(), t)
    # With the gates' layers closed the MLPs give their last bias alone, and the outputs move.
    closed = eqx.tree_at(
        lambda m: [m.blocks.stacked.video.gate.weight, m.blocks.stacked.video.gate.bias],
        gated,
        replace_fn=jnp.zeros_like,
    )
    moved = closed(inputs(), t)
    assert all(jnp.abs(moved[n] - out[n]).max() > 1e-5 for n in out)


def test_towers_are_told_captions_and_refuse_what_does_not_fit(made):
    text = towers(embed_cond=ByteTextConfig(24, 1, 2, 4), remat=None)
    ids = jnp.array([[256, 65, 0, 0], [256, 66, 0, 0]])
    t = dict.fromkeys(SHAPES, jnp.array(0.5))
    a, b = jax.jit(jax.vmap(lambda i: text(inputs(), t, i)))(ids).values()
    assert jnp.abs(a[0] - a[1]).max() > 1e-5 and jnp.abs(b[0] - b[1]).max() > 1e-5
    with pytest.raises(ValueError, match="the sound of shape"):
        made({"video": inputs()["video"]}, t)
    with pytest.raises(ValueError, match="sound_seconds must have a number for each of 6"):
        towers(sound_seconds=(0.0,))
    with pytest.raises(ValueError, match="multiple of 6"):
        towers(width=32)


def test_times_are_of_four_kinds():
    kinds: Any = dict(given=0.4, alone=0.2, apart=0.1)
    times = JointDenoising(FLOW, ("video", "sound"), **kinds).times(jax.random.key(0), 4000)
    v, s = times["video"], times["sound"]
    share = lambda of: float(jnp.mean(of))
    assert share(v == s) == pytest.approx(0.3, abs=0.03)
    for one, other in ((v, s), (s, v)):
        assert share((one == 0) & (other > 0)) == pytest.approx(0.2, abs=0.03)
        assert share((one == 1) & (other < 1)) == pytest.approx(0.1, abs=0.03)
    with pytest.raises(ValueError, match="shares of the examples"):
        JointDenoising(FLOW, ("a", "b"), given=0.8, alone=0.3)


def test_a_part_that_is_given_costs_nothing():
    objective = JointDenoising(FLOW, ("video", "sound"))
    zero = lambda x_t, t, cond, *, key=None: {n: 0 * x for n, x in x_t.items()}
    t = {"video": jnp.array(0.0), "sound": jnp.array(0.5)}
    loss, parts = objective.loss(zero, inputs(), t, None, key=jax.random.key(0))
    assert parts["video"] == 0 and parts["sound"] > 0.5 and loss == parts["sound"]
    exact = lambda x_t, t, cond, *, key=None: {
        n: (x_t[n] - inputs()[n]) / t[n] for n in x_t
    }  # fmt: skip
    t = {"video": jnp.array(0.3), "sound": jnp.array(1.0)}
    assert objective.loss(exact, inputs(), t, None, key=jax.random.key(0))[0] < 1e-9


def test_parts_are_weighted_by_their_own_times():
    flow = ex.Diffusion(ex.LinearFlow(), ex.predict_x0)
    objective = JointDenoising(flow, ("video", "sound"), weight=ex.velocity_weight(ex.predict_x0))
    off = lambda x_t, t, cond, *, key=None: {n: x + 1 for n, x in inputs().items()}
    t = {"video": jnp.array(0.5), "sound": jnp.array(0.1)}
    parts = objective.loss(off, inputs(), t, None, key=jax.random.key(0))[1]
    assert parts["video"] == pytest.approx(4) and parts["sound"] == pytest.approx(100)


def test_one_network_samples_both_and_either_from_the_other():
    """Of two correlated Gaussians the velocity is known: samples must have their covariance."""
    rho = 0.8
    covariance = jnp.array([[1.0, rho], [rho, 1.0]])

    def denoiser(x_t, t, cond=None, *, key=None):
        x, times = (jnp.stack([d["a"][0], d["b"][0]]) for d in (x_t, {k: t[k][None] for k in t}))
        # x_t = (1 - t) x0 + t eps: E[x0 | x_t] by the rule of Gaussians, a little noise everywhere.
        scale, noise = jnp.diag(1 - times), jnp.diag(times**2 + 1e-8)
        gain = covariance @ scale @ jnp.linalg.inv(scale @ covariance @ scale + noise)
        x0 = gain @ x
        velocity = (x - x0) / jnp.maximum(times, 1e-4)
        return {"a": velocity[:1], "b": velocity[1:]}

    n, grid = 2000, ex.uniform_times(40)
    noise = jax.random.normal(jax.random.key(0), (n, 2))
    both = ex.together(denoiser, {"a": (1,), "b": (1,)})
    run = lambda network, x: ex.sample(network, FLOW, ex.Heun(), grid, x)
    found = jax.jit(jax.vmap(lambda x: run(both.denoiser, x)))(noise)
    assert jnp.abs(jnp.cov(found.T) - covariance).max() < 0.1
    given = jax.random.normal(jax.random.key(1), (n, 1))
    follow = lambda time: jax.jit(
        jax.vmap(lambda x, b: run(ex.one_part(denoiser, "a", {"b": b}, time=time), x))
    )(noise[:, :1], given)
    assert jnp.corrcoef(follow(0.0)[:, 0], given[:, 0])[0, 1] == pytest.approx(rho, abs=0.05)
    assert abs(jnp.corrcoef(follow(1.0)[:, 0], given[:, 0])[0, 1]) < 0.08
