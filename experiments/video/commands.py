"""The commands: train everything and measure it, draw with a finished run."""

import time
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import eqxldm as ex
from eqxldm import pretrained
from eqxldm.data import (
    ANIMATION_ENDINGS,
    VIDEO_ENDINGS,
    DataError,
    decode_and_crop,
    no_condition,
)
from eqxldm.data.clips import read_clips
from eqxldm.distributed import is_primary
from eqxldm.durable import check_is_file, read_file
from eqxldm.models import CausalVideoAutoencoder, DiT, SoundAutoencoder, TwoTowers
from eqxldm.sharding import check_batch, make_mesh, parse_mesh

from ..train.checks import check_attention, check_writable
from ..train.config import AttentionName
from ..train.methods import DTYPES
from ..train.options import check, read_options
from ..train.run import CONFIG, CONTENT, RunFolder, as_dict, read_json
from ..train.streams import stream_key
from ..train.telemetry import check_packages
from ..train.terminal import Signals, UserError, say
from .classifier import ClipClassifier, halved
from .config import Config, Sample, SamplingOptions, Train, check_clips, earlier
from .data import (
    NAMED,
    Clips,
    WithSound,
    captions_of,
    choose_condition,
    identity,
    open_clips_of,
    say_long_captions,
    spectrogram_of,
)
from .drawing import Trained
from .listening import check_sound, sample_sound
from .measuring import Measure
from .networks import (
    KnownFrames,
    SoundingClips,
    make_autoencoder,
    make_denoiser,
    make_diffusion,
    sound_shape,
)
from .outcome import AUTOENCODER, DENOISER, SOUND, TEXTS, finish, summary
from .pictures import check_ending, grid_frames, save_animation, save_filmstrip
from .sound import train_sound
from .sound_drawing import SoundDrawing, make_drawing
from .training import (
    Job,
    cache_images,
    cache_latents,
    train_autoencoder,
    train_clip_classifier,
    train_diffusion,
    train_digits,
    with_stats,
)


def train(command: Train) -> None:
    signals = Signals()
    check(command)
    check_packages(command.log)
    check_attention(command.attention, command.diffusion.dtype)
    problem = check_clips(command.clips)
    if problem is not None:
        raise UserError(problem)
    if command.images is not None and command.videos is None:
        raise UserError("--images: are learned beside the clips of --videos.")
    if command.images is not None and command.diffusion.patch_size[0] != 1:
        raise UserError(
            "--images: one frame must be tokens of its own: --diffusion.patch-size 1 2 2."
        )
    try:
        mesh = make_mesh(parse_mesh(command.mesh))
        for options in parts_of(command):
            check_batch(options.batch_size, mesh)
        if command.config.pictures_first:
            check_batch(command.diffusion.image_batch_size, mesh)
    except ValueError as error:
        raise UserError(str(error)) from None
    check_network(command.config)
    check_shapes(command.config, command.sampling, command.attention)
    run = RunFolder(command.run_dir, primary=is_primary())
    content = identity(command)
    with run.locked():
        new = not (run.path / CONFIG).exists() or command.overwrite
        # Other clips are another run; the folder says which it is about.
        about = {**as_dict(command.config), CONTENT: content}
        before = earlier(files=command.videos is not None)
        run.open(about, overwrite=command.overwrite, defaults=as_dict(before))
        found = run.metrics()
        if found is not None:
            say(f"{run.path} is finished; --overwrite starts anew.\n{summary(found)}")
            return
        try:
            clips = open_clips_of(command, run)
            condition = choose_condition(command.config, clips)
            if command.videos is not None and condition is not no_condition:
                say_long_captions(command.config, clips)
            if command.clips.sound:
                condition = WithSound(condition, spectrogram_of(command.clips))
            check_batches(command, clips)
        except (UserError, DataError):
            if new and run.primary:  # what is refused leaves nothing
                run.delete()
            raise
        job = Job(command, clips, condition, run, mesh, signals)
        finish(job, *train_all(job))


def parts_of(command: Train) -> list[Any]:
    """The options of the stages that are trained."""
    parts = [command.classifier, command.autoencoder, command.diffusion]
    return [*parts, command.sound] if command.clips.sound else parts


def check_batches(command: Train, clips: Clips) -> None:
    """Refuses batches that the clips are too few for."""
    for options in parts_of(command):
        if options.batch_size > len(clips.train):
            raise UserError(
                f"a batch of {options.batch_size} is more than the {len(clips.train)} clips to "
                "learn from. Give smaller batches or more clips."
            )
    images, size = clips.images, command.diffusion.batch_size
    if images is not None and size > len(images):
        raise UserError(f"--images: a batch of {size} is more than the {len(images)} images.")


def check_shapes(
    config: Config, sampling: SamplingOptions, attention: AttentionName = "xla"
) -> None:
    """Refuses sizes that do not fit each other, or the attention: the networks and the drawing, as
    shapes only."""
    key, options = jax.random.key(0), config.classifier
    captioned = config.clips.condition != "none"

    def draw() -> Any:
        sizes = dict(channels=options.channels, features=options.features)
        clip = jnp.zeros((1, config.clips.frames, *config.clips.size, config.clips.channels))
        seen = ClipClassifier(config.clips.channels, 8, **sizes, key=key)(halved(clip)[0])
        autoencoder = make_autoencoder(config, key=key)
        shape = autoencoder.latent_shape(config.clips.frames, *config.clips.size)
        denoiser = make_denoiser(config, shape, captioned=captioned, attention=attention, key=key)
        z = denoiser.diffusion.sample_prior(shape, key=key)
        cond = {"known": z, "mask": jnp.zeros(shape[1])}
        # Any ids: those of captions may need a list that is fetched, for clips that have none.
        ids = jnp.zeros(config.diffusion.max_length, int)
        text = jnp.zeros(NAMED) if config.diffusion.tokens == "digits" else ids
        cond |= {"text": text} if captioned else {}
        crop = [min(config.autoencoder.crop, side) for side in config.clips.size]
        frames = min(config.autoencoder.crop_frames or config.clips.frames, config.clips.frames)
        part = jnp.zeros((config.clips.channels, frames, *crop))
        again = autoencoder.decode(autoencoder.encode(part))
        if not config.clips.sound:
            return seen, again, denoiser(z, 0.5, cond)
        parts = {"video": z, "sound": jnp.zeros(sound_shape(config))}
        return seen, again, denoiser(parts, dict.fromkeys(parts, jnp.array(0.5)), cond)

    try:
        eqx.filter_eval_shape(draw)
        ex.shifted_times(sampling.steps, config.diffusion.shift)
    except ValueError as error:
        raise UserError(" ".join(str(error).split())) from None


def check_network(config: Config) -> None:
    """Refuses widths that do not divide, before anything is trained."""
    width, heads = config.diffusion.width, config.diffusion.num_heads
    if width % 6 or width % (2 * heads):
        raise UserError(
            f"--diffusion.width {width}: must be a multiple of 6, for the three axes, and divide "
            f"into {heads} heads of an even size."
        )
    crop, crop_frames = config.autoencoder.crop, config.autoencoder.crop_frames
    if crop % 8 or (crop_frames is not None and (crop_frames - 1) % 4):
        frames = "" if crop_frames is None else f" and {crop_frames}"
        raise UserError(
            "--autoencoder.crop must be a multiple of 8 and --autoencoder.crop-frames 4 k + 1, got "
            f"{crop}{frames}."
        )
    shares = config.sound.given, config.sound.alone, config.sound.apart
    if sum(shares) > 1:
        raise UserError(
            "--sound.given, --sound.alone and --sound.apart are shares of the clips: together at "
            f"most 1, got {' + '.join(map(str, shares))}."
        )


def train_all(job: Job) -> tuple[Trained, Measure]:
    """The stages one after another; each goes on where it stopped."""
    measure = Measure(train_digits(job), train_clip_classifier(job))
    autoencoder = with_stats(job, train_autoencoder(job))
    begin = time.monotonic()
    latents = cache_latents(job, autoencoder)
    job.stages.timings["latents"] = {"seconds": time.monotonic() - begin}
    images = cache_images(job, autoencoder)
    sound = train_sound(job) if job.command.clips.sound else None
    denoiser = train_diffusion(job, autoencoder, latents, sound, images)
    return Trained(autoencoder, denoiser, job.command.config, job.captioned, sound), measure


def load_trained(folder: Path) -> tuple[Trained, list[str]]:
    """The networks of a finished run, and the captions of its test clips."""
    run = RunFolder(folder)
    config = read_options(Config, run, CONTENT, earlier=earlier)
    if not (folder / DENOISER).exists() or not (folder / TEXTS).exists():
        raise UserError(f"the run in {folder} is not finished: run the train command again.")
    repair = "Train again with --overwrite."
    texts = read_json(folder / TEXTS, {"texts": list | None}, repair=repair).get("texts")
    if not all(isinstance(text, str) for text in texts or ()):
        raise UserError(f"{folder / TEXTS} is damaged: it holds more than texts. {repair}")
    try:
        autoencoder = pretrained.load(folder / AUTOENCODER)
        network = pretrained.load(folder / DENOISER)
        heard = pretrained.load(folder / SOUND) if config.clips.sound else None
    except (pretrained.WeightsError, OSError) as error:
        raise UserError(f"the run in {folder} is damaged: {error} {repair}") from None
    kinds = (SoundAutoencoder, TwoTowers) if config.clips.sound else (type(None), DiT)
    fits = isinstance(heard, kinds[0]) and isinstance(network, kinds[1])
    if not isinstance(autoencoder, CausalVideoAutoencoder) or not fits:
        raise UserError(f"the run in {folder} is damaged: its networks are others. {repair}")
    told: Any = SoundingClips if config.clips.sound else KnownFrames
    denoiser = told(network, make_diffusion(config), DTYPES[config.diffusion.dtype])
    trained = Trained(autoencoder, denoiser, config, texts is not None, heard)
    return trained, texts or [""]


def sample(command: Sample) -> None:
    Signals()
    check(command)
    trained, texts = load_trained(command.run_dir)
    clips = trained.config.clips
    if command.prompt is not None and not trained.captioned:
        raise UserError(f"--prompt: the run in {command.run_dir} knows no captions.")
    if command.prompt is not None:  # what cuts it may have to be fetched first
        captions_of(trained.config).say_cut(command.prompt)
    frames = command.frames or clips.frames
    longer = frames > clips.frames and command.overlap >= clips.frames
    if not clips.sound and ((command.overlap - 1) % 4 or longer):
        raise UserError(
            f"--overlap {command.overlap}: must be 4 k + 1 and less than the {clips.frames} frames "
            "of a window."
        )
    check_sound(command, trained.config)
    run = RunFolder(command.run_dir)
    out = command.out
    if out is not None:
        check_ending(out)
        for file in (out, strip_of(out)):
            check_writable(file, "--out")
    wanted = [command.prompt] if command.prompt is not None else texts
    wanted = [wanted[i % len(wanted)] for i in range(command.n)]
    first = None if command.first is None else read_first(command, trained.config)
    drawing = make_drawing(trained, command.sampling, min(command.sampling_batch, command.n))
    key = stream_key(command.seed, "samples")
    path = out or run.file("sample.png")
    if isinstance(drawing, SoundDrawing):
        found = sample_sound(command, drawing, wanted, key, first, path)
    else:
        found = drawing.long(wanted, key, frames, overlap=command.overlap, first=first)
    save_animation(path, grid_frames(found, min(4, command.n)), clips.rate)
    save_filmstrip(strip_of(path), found)
    if trained.captioned and command.prompt is None:
        say("row by row: " + "; ".join(wanted))
    say(f"wrote {path} and a filmstrip beside it")


def strip_of(path: Path) -> Path:
    """Where the filmstrip of an animation is."""
    return path.with_name(f"{path.stem}-strip.png")


def read_first(command: Sample, config: Config) -> Any:
    """The first frames of every clip: those of a picture or of a clip's beginning."""
    path, clips = command.first, config.clips
    assert path is not None
    is_clip = path.is_dir() or path.suffix.lower() in VIDEO_ENDINGS + ANIMATION_ENDINGS
    count = command.first_frames or (5 if is_clip else 1)
    if (count - 1) % 4 or count >= clips.frames:
        raise UserError(
            f"--first-frames {count}: must be 4 k + 1 and less than the {clips.frames} of a clip."
        )
    try:
        check_is_file(path)
        if is_clip:
            first = read_clips(path, clips.wanted(count), most=1)[0]
        elif count > 1:
            raise UserError(f"--first {path}: is one picture; --first-frames {count} need a clip.")
        else:
            image = decode_and_crop(read_file(path), clips.size, clips.channels, name=str(path))
            first = image[None]
    except (DataError, OSError) as error:
        raise UserError(f"--first: {error}") from None
    return np.repeat(first[None], command.n, 0)
