"""The job's clips with sound: what is drawn, what is heard in it, files, and what is refused."""

import json
from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from eqxldm import pretrained
from eqxldm.audio import Tones, read_wav, wav_bytes
from eqxldm.data import MovingDigits
from eqxldm.models import SoundAutoencoder
from experiments.train.run import RunFolder, as_dict, write_json
from experiments.train.terminal import UserError
from experiments.video.__main__ import main
from experiments.video.commands import check_network, load_trained
from experiments.video.config import Sample, Train, check_clips
from experiments.video.data import WithSound, captions_of, open_clips_of, spectrogram_of
from experiments.video.drawing import Drawn
from experiments.video.listening import Ears, check_sound, measured_sound, sounding
from experiments.video.networks import SoundingClips, make_autoencoder, make_denoiser, sound_shape
from experiments.video.outcome import summary
from experiments.video.pictures import save_animation
from experiments.video.training import Job, make_prepare

DISC = np.uint8(255) * (np.hypot(*np.mgrid[-13.5:14, -13.5:14]) < 6)[None]
DEFAULT = Train()


def idx(array):
    sizes = b"".join(n.to_bytes(4, "big") for n in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


CLIPS = replace(DEFAULT.clips, frames=5, size=(32, 32), digits=1, sound=True)
CONFIG = replace(
    DEFAULT.config,
    clips=CLIPS,
    autoencoder=replace(DEFAULT.autoencoder, channels=(4, 4, 4), latent_channels=2),
    diffusion=replace(DEFAULT.diffusion, depth=1, width=24, num_heads=2, tokens="bytes"),
    sound=replace(DEFAULT.sound, width=8, blocks=1, latent_channels=3),
)
TINY = """--frames 5 --size 32 32 --count 10 --test 10 --digits 1 --classifier.steps 2
    --classifier.batch-size 4 --classifier.channels 2 --classifier.features 4 --autoencoder.steps 2
    --autoencoder.batch-size 4 --autoencoder.crop 16 --autoencoder.crop-frames 5
    --autoencoder.channels 4 4 4 --autoencoder.latent-channels 2 --diffusion.steps 2
    --diffusion.batch-size 4 --diffusion.depth 1 --diffusion.width 24 --diffusion.num-heads 2
    --diffusion.warmup 1 --diffusion.tokens bytes --sampling.solver euler --sampling.steps 2
    --samples 10 --sampling-batch 10""".split()
LATENT = (2, 2, 4, 4)


def test_a_whole_run_learns_both_and_leaves_numbers_sounds_and_pictures(tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "t10k"):
        images = rng.integers(0, 256, (10, 28, 28), dtype=np.uint8)
        (tmp_path / f"{split}-images-idx3-ubyte").write_bytes(idx(images))
        (tmp_path / f"{split}-labels-idx1-ubyte").write_bytes(idx(np.arange(10, dtype=np.uint8)))
    folder = tmp_path / "run"
    command = ["train", "--sound", "--mnist", str(tmp_path), "--run-dir", str(folder)]
    command += ["--sound.steps", "2", "--sound.batch-size", "4", "--sound.width", "8"]
    main([*command, *TINY])
    metrics = json.loads((folder / "metrics.json").read_text())
    rows = {"real", "encoded and decoded", "sounds of clips", "clips of sounds", "each alone"}
    assert rows <= metrics["sound"].keys()
    assert metrics["sound"]["real"]["recall"] <= 1 and "sound, real: " in summary(metrics)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    last = [entry for entry in log if entry.get("stage") == "diffusion"][-1]
    assert last["loss"] == pytest.approx(last["video"] + last["sound"], rel=1e-4)
    for name in ("sample", "sound-of-clip", "clip-of-sound"):
        assert (folder / f"{name}-sound.png").exists() and (folder / f"{name}-0.wav").exists()
    trained, _ = load_trained(folder)
    assert trained.sound is not None and isinstance(trained.denoiser, SoundingClips)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What a finished run leaves, of networks that have learned nothing."""
    folder = RunFolder(tmp_path_factory.mktemp("runs") / "sound")
    folder.open(as_dict(CONFIG) | {"content": ""}, overwrite=False)
    keys = jax.random.split(jax.random.key(0), 3)
    save = lambda model, name: pretrained.save(model, folder.file(f"{name}.safetensors"))
    save(make_autoencoder(CONFIG, key=keys[0]), "autoencoder")
    save(make_denoiser(CONFIG, LATENT, captioned=True, key=keys[1]).network, "denoiser")
    save(SoundAutoencoder(40, 3, width=8, blocks=1, key=keys[2]), "sound-autoencoder")
    write_json(folder.file("texts.json"), {"texts": ["a 4 moving up"]})
    return folder.path


def test_a_run_with_sound_draws_the_sound_of_a_clip_and_clips_of_a_sound(run, tmp_path):
    given = np.random.default_rng(0).integers(0, 256, (5, 32, 32), dtype=np.uint8)
    pictures = [Image.fromarray(frame) for frame in given]
    clip = tmp_path / "clip.webp"
    pictures[0].save(clip, save_all=True, append_images=pictures[1:], lossless=True, duration=125)
    wave = Tones().wave([(0.2, 3)], 5 / 8)
    (tmp_path / "a.wav").write_bytes(wav_bytes(wave, 8000))
    options = ["--run-dir", str(run), "--n", "2", "--solver", "euler", "--steps", "1"]
    out = tmp_path / "b.png"
    main(["sample", *options, "--clip", str(clip), "--out", str(out)])
    assert len(read_wav(tmp_path / "b-1.wav", 8000)) == 5000
    with Image.open(out) as animation, Image.open(tmp_path / "b-sound.png") as picture:
        animation.seek(3)
        assert (np.asarray(animation)[4:68:2, 4:68:2] == given[3]).all()  # the clip stays
        assert picture.size == (5 * 32, 2 * (32 + 16 + 80 + 10))
    out = tmp_path / "c.png"
    main(["sample", *options, "--wav", str(tmp_path / "a.wav"), "--out", str(out)])
    again = read_wav(tmp_path / "c-0.wav", 8000)
    assert Ears(CONFIG).onsets(again) == pytest.approx([0.2], abs=0.03)  # and the sound does


def test_what_a_run_cannot_sound_like_is_said_at_once(run, tmp_path):
    ask = lambda **options: check_sound(Sample(run_dir=run, **options), CONFIG)
    some = tmp_path / "a"
    with pytest.raises(UserError, match="one of the two is given"):
        ask(clip=some, wav=some)
    with pytest.raises(UserError, match="the frames of --clip are all given"):
        ask(clip=some, first=some)
    with pytest.raises(UserError, match="clips with sound have 5 frames"):
        ask(frames=9)
    with pytest.raises(UserError, match="knows no sounds"):
        plain = replace(CONFIG, clips=replace(CLIPS, sound=False))
        check_sound(Sample(run_dir=run, wav=some), plain)
    with pytest.raises(UserError, match=r"--clip, --wav: .*No such file"):
        main(["sample", "--run-dir", str(run), "--wav", str(some)])
    with pytest.raises(UserError, match=r"together at most 1, got 0\.9 \+ 0\.9 \+ 0\.1"):
        check_network(replace(CONFIG, sound=replace(CONFIG.sound, given=0.9, alone=0.9)))
    assert "divide 1000" in (check_clips(replace(CLIPS, fps=7.0)) or "")
    with pytest.raises(UserError, match="of moving digits"):
        open_clips_of(replace(DEFAULT, clips=CLIPS, videos=tmp_path), RunFolder(tmp_path))


class Echo:
    """In place of a drawing: it gives back the clips and sounds that belong together."""

    def __init__(self, made: Any, trained: Any):
        self.made, self.trained = made, trained

    def draw(self, texts, key, *, what, **given):
        if what == "apart":  # sounds of other clips
            return Drawn(self.made.frames, np.roll(self.made.mels, 1, 0))
        return self.made


def test_sounds_are_compared_with_bounces_and_with_those_of_other_clips(run, tmp_path):
    clips = replace(CLIPS, frames=17, size=(64, 64))
    source = MovingDigits(DISC, np.array([4]), 6, count=1, tones=Tones())
    mel = spectrogram_of(clips)
    waves: list[Any] = [source[i].sound for i in range(6)]
    made = Drawn(
        np.stack([source.clip(i).frames for i in range(6)]),
        np.stack([mel(wave) for wave in waves]),
    )
    command = replace(DEFAULT, clips=clips)
    job: Any = type("Job", (), {"command": command, "run": RunFolder(tmp_path)})
    job.clips = type("Clips", (), {"test": source})
    trained, _ = load_trained(run)
    echo: Any = Echo(made, trained)
    rows = measured_sound(job, echo, made, ["a 4 moving up"] * 6)
    for name in ("real", "sounds of clips", "clips of sounds", "both"):
        assert min(rows[name]["precision"], rows[name]["recall"]) > 0.8, name
        assert rows[f"{name}, shuffled"]["precision"] < 0.6, name
    assert rows["each alone"]["precision"] < 0.6
    assert rows["sounds of clips"]["right_tone"] > 0.9
    assert (tmp_path / "sound-of-clip-3.wav").exists()
    assert (tmp_path / "sample-sound.png").exists()
    with Image.open(tmp_path / "sound-of-clip-sounding.png") as animation:
        assert animation.n_frames == 17


def test_what_has_sounded_is_bright():
    frames = np.random.default_rng(0).integers(0, 256, (4, 6, 6, 1), dtype=np.uint8)
    shown = sounding(frames, np.ones((32, 5)))
    assert shown.shape == (4, 12 + 8 + 10 + 8, 40, 3)
    assert (shown[:, 4:16:2, 14:26:2] == frames).all()
    sounds = shown[:, -14:-4, 4:-4]
    for k in range(4):
        assert (sounds[k, :, : 8 * (k + 1)].max(-1) > 200).all()
        assert (sounds[k, :, 8 * (k + 1) :].max(-1) < 80).all()


def test_a_batch_has_the_latents_of_both_and_known_frames_cost_nothing(run):
    trained, _ = load_trained(run)
    source = MovingDigits(DISC, np.array([4]), 2, count=1, frames=5, size=32, tones=Tones())
    told = WithSound(captions_of(CONFIG).read, spectrogram_of(CLIPS))(source[0])
    job: Any = Job(replace(DEFAULT, clips=CLIPS), None, None, None, None, None)
    job.condition = WithSound(captions_of(CONFIG).read, spectrogram_of(CLIPS))
    assert job.captioned
    moments = jnp.ones((3, *LATENT))
    batch: Any = {"mean": moments, "logvar": -9 * moments}
    batch["cond"] = {name: jnp.stack([jnp.asarray(a)] * 3) for name, a in told.items()}
    sound: Any = trained.sound
    made = make_prepare(job, trained.autoencoder, sound)(batch, jax.random.key(0))
    assert {n: a.shape[1:] for n, a in made["x0"].items()} == {
        "video": LATENT,
        "sound": sound_shape(CONFIG),
    }
    assert jnp.allclose(made["x0"]["sound"][0], sound.encode(told["mel"].T), atol=1e-5)
    denoiser: Any = trained.denoiser
    assert isinstance(denoiser, SoundingClips)
    x0 = jax.tree.map(lambda a: a[0], made["x0"])
    cond = {"known": x0["video"], "mask": jnp.array([1.0, 0.0]), "text": told["text"]}
    noisy, t = jax.tree.map(lambda a: 0.5 * a + 0.5, x0), dict.fromkeys(x0, jnp.array(0.5))
    out = eqx.filter_jit(denoiser)(noisy, t, cond)
    exact = denoiser.diffusion.target(x0["video"], 0.5, jnp.ones_like(x0["video"]))
    assert np.allclose(out["video"][:, 0], exact[:, 0], atol=1e-4)
    assert (out["video"][:, 1] == 0).all() and (out["sound"] == 0).all()  # untrained


def test_mp4_files_have_the_sound(tmp_path):
    av = pytest.importorskip("av")
    wave = Tones().wave([(0.25, 3)], 0.5)
    save_animation(tmp_path / "a.mp4", np.zeros((4, 16, 16, 1), np.uint8), 8.0, (wave, 8000))
    with av.open(str(tmp_path / "a.mp4")) as file:
        heard = np.concatenate([f.to_ndarray()[0] for f in file.decode(audio=0)])
    with av.open(str(tmp_path / "a.mp4")) as file:
        assert len(list(file.decode(video=0))) == 4
    assert abs(len(heard) - 4000) < 3000 and np.abs(heard).max() > 0.1
    assert np.abs(heard[:1500]).max() < 0.02
