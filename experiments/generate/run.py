"""`generate`: from options to pictures, with what was found and how far it is."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import eqxldm as ex
from eqxldm import pipelines, pretrained
from eqxldm.data.pixels import to_uint8
from eqxldm.pipelines import PipelineError
from eqxldm.pipelines.families import Family, family_of
from eqxldm.pipelines.folder import open_pipeline_folder
from eqxldm.quantization import quantize, weight_bytes
from eqxldm.sharding import make_mesh, parse_mesh

from ..train.checks import check_writable
from ..train.methods import SOLVERS
from ..train.options import check
from ..train.terminal import Signals, StageBar, UserError, say, user_errors
from .clips import write_clip
from .memory import available, check_fits, show, step_bytes
from .options import Generate, check_request, complete, to_json
from .pictures import (
    file_digest,
    next_path,
    paths_of,
    picture_size,
    read_mask,
    read_picture,
    read_settings,
    write_picture,
)

PREVIEWS = 8  # a run


class Inputs(NamedTuple):
    """What a run starts from: latents, conditions, keys, and what of a picture stays."""

    times: Any
    x: jax.Array
    cond: Any
    keys: Any
    denoiser: Any
    keep: pipelines.Keep | None


def generate(options: Generate) -> list[Path]:
    """Makes the pictures that the options ask for; returns where they were written."""
    Signals()
    written = None if options.repeat is None else read_settings(options.repeat)
    files = {} if written is None else written.pop("files", {})
    for name in ("index", "version"):
        if written is not None:
            written.pop(name, None)
    options = complete(options, written)
    check(options)
    model = options.model
    if model is None:
        raise UserError("which model? MODEL=folder, with a model_index.json.")
    out = options.out or next_path(Path("pictures"))
    if out.suffix.lower() != ".png":
        raise UserError(f"OUT={out}: pictures are written as PNG, as a.png.")
    check_writable(paths_of(out, options.n or 1)[-1], "OUT")
    options = dataclasses.replace(options, out=out)
    with user_errors(PipelineError, pretrained.WeightsError, FileNotFoundError):
        folder = open_pipeline_folder(model)
        family = family_of(folder.class_name)
        takes_text, makes_clips = family.encode is not None, family.size is not None
        check_request(options, takes_text=takes_text, makes_clips=makes_clips)
        if options.lora is not None:
            pipelines.check_lora(family, options.lora)
        options = _with_folders_defaults(options, family)
        _check_files(options, files)
        return _generate(options, folder, family)


def _generate(options: Generate, folder: Any, family: Family) -> list[Path]:
    model, n = options.model, options.n
    assert model is not None and n is not None
    with user_errors(ValueError, what=f"MESH={options.mesh}"):
        mesh = None if options.mesh is None else make_mesh(parse_mesh(options.mesh))
    dtype = jnp.dtype(options.dtype or "float32")
    network, encoders = family.network, [e for _, e in family.texts if e in folder.parts]
    sizes = _announce(options, folder, dtype)
    # Without weights: sizes and steps are refused before the first gigabyte is read.
    bare = pipelines.load(model, parts=())
    height, width = size = _size(options, bare)
    bare.check_size(*size, options.frames)
    _grid(options, bare, size)
    divided = 1 if mesh is None else mesh.shape["fsdp"] * mesh.shape["tensor"]
    for parts in (encoders, [network, "vae"]):
        needed = sum(sizes[p].bytes(jnp.float32 if p == "vae" else dtype) for p in parts)
        advice = "Take a smaller DTYPE, or MESH=tensor=4 on several devices."
        check_fits(f"loading {' and '.join(parts)}", needed // divided, advice)
    # Latents of four channels at least, in float32.
    latents = n * (options.frames or 1) // bare.time_factor * (height * width // bare.factor**2)
    advice = "Take a smaller N, or a smaller SIZE."
    check_fits(f"drawing {n} pictures at once", 16 * latents, advice)

    cond = null = None
    if encoders:  # and they are let go of before the network is loaded
        texts = _merged(options, pipelines.load(model, dtype=dtype, mesh=mesh, parts=encoders))
        cond, null = _conditions(options, texts, size)
        jax.block_until_ready(cond)
        del texts
    pipe = _merged(options, pipelines.load(model, dtype=dtype, mesh=mesh, parts=(network, "vae")))
    if options.quantize is not None:
        small = quantize(pipe.network, options.quantize)
        before, now = map(show, map(weight_bytes, (pipe.network, small)))
        say(f"  denoiser in {options.quantize}: {before} before, {now} now")
        pipe = dataclasses.replace(pipe, network=small)
        del small
    if not encoders:
        label = _label(options, pipe)
        cond, null = pipe.encode([label]), pipe.null()
    inputs = _inputs(options, pipe, size, cond, null)
    solver = pipe.solver if options.solver is None else SOLVERS[options.solver]
    with user_errors(ValueError, what=f"SOLVER={options.solver}"):
        ex.check_combination(pipe.diffusion, solver, inputs.times)
    _check_batch(pipe, solver, inputs, sizes[network].bytes(dtype) // divided)

    out = options.out
    assert out is not None
    preview = _previewer(options, pipe, out)
    calls = ex.nfe(pipe.diffusion.path, solver, inputs.times)
    arguments = inputs.denoiser, pipe.diffusion, solver, inputs.times, inputs.x, inputs.cond
    with StageBar("drawing", calls) as bar:
        step = None
        for step in pipelines.sample_steps(*arguments, keys=inputs.keys, keep=inputs.keep):
            jax.block_until_ready(step.x)
            shown = "" if options.frames is None else f"{options.frames} x "
            bar.update(step.done, f"{n} x {shown}{height} x {width}")
            preview(step)
    assert step is not None
    if not bool(jnp.all(jnp.isfinite(step.x))):
        raise UserError(
            "the latents hold NaN or infinity: take DTYPE=float32 or bfloat16, or a lower GUIDANCE."
        )
    return _write(options, out, pipe.decode(step.x))


def _merged(options: Generate, pipe: pipelines.Pipeline) -> pipelines.Pipeline:
    if options.lora is None:
        return pipe
    scale = 1.0 if options.lora_scale is None else options.lora_scale
    say(f"  merged: {options.lora}, scale {scale:g}")
    return pipelines.merge_lora(pipe, options.lora, scale)


def _announce(options: Generate, folder: Any, dtype: Any) -> dict[str, Any]:
    """Prints what is in the folder; the parts' sizes."""
    sizes = pipelines.describe(folder.path)
    say(f"{folder.class_name} in {folder.path}")
    for name, part in sizes.items():
        bytes_ = part.bytes(jnp.float32 if name == "vae" else dtype)
        say(
            f"  {name:<16} {part.class_name:<34} {part.parameters:>14,} parameters, "
            f"{part.dtype} in the file, {show(bytes_)} here"
        )
    scheduler = folder.parts.get("scheduler", "")
    say(f"  {'scheduler':<16} {scheduler:<34} {options.steps} steps")
    total, there = sum(p.bytes(dtype) for p in sizes.values()), available()
    known = "unknown" if there is None else show(there)
    say(f"  weights: {show(total)} in all, text encoders first and let go; memory there: {known}")
    return sizes


def _with_folders_defaults(options: Generate, family: Family) -> Generate:
    defaults: dict[str, Any] = dict(steps=family.steps, guidance=family.guidance)
    if family.size is not None:
        defaults |= dict(frames=family.size[0], fps=16.0)
    if options.init is not None:
        defaults |= dict(strength=1.0 if options.mask is not None else 0.8)
    opened = {k: v for k, v in defaults.items() if getattr(options, k) is None}
    return dataclasses.replace(options, **opened)


def _check_files(options: Generate, digests: Any) -> None:
    """A picture is repeated from the same INIT, MASK and LORA, or not at all."""
    if not isinstance(digests, dict):
        raise UserError(f"{options.repeat}: its settings are damaged: files.")
    for name in ("init", "mask", "lora"):
        before, path = digests.get(name), getattr(options, name)
        if before is None or path is None or not path.is_file():
            continue
        if file_digest(path) != before:
            raise UserError(
                f"{name.upper()} {path} is not what the picture was made from. Bring it back, or "
                f"give {name.upper()}= to make another one."
            )


def _size(options: Generate, pipe: pipelines.Pipeline) -> tuple[int, int]:
    if options.size is not None:
        return options.size
    return pipe.default_size if options.init is None else picture_size(options.init)


def _grid(options: Generate, pipe: pipelines.Pipeline, size: tuple[int, int]) -> tuple[Any, Any]:
    """The whole grid, and the part of it that is run over."""
    assert options.steps is not None
    whole = pipe.times(options.steps, *size)
    if options.init is None:
        return whole, whole
    strength = options.strength or 1.0
    with user_errors(ValueError):
        return whole, pipelines.steps_of_strength(whole, strength, round_up=pipe.family.round_up)


def _conditions(options: Generate, pipe: pipelines.Pipeline, size: tuple[int, int]):
    told: dict[str, Any] = dict(size=size, guidance=options.guidance)
    prompts, clip_skip = [options.prompt or ""], options.clip_skip or 0
    encoding = pipe.encode_and_tell(prompts, clip_skip=clip_skip, **told)
    for cut in dict.fromkeys(cut for row in encoding.cut for cut in row if cut):
        say(f"  the prompt is too long for a text encoder, which does not see: {cut[:200]!r}")
    return encoding.cond, pipe.null(options.negative, **told)


def _label(options: Generate, pipe: pipelines.Pipeline) -> int:
    names = pipe.folder.options.get("id2label")
    names = names if isinstance(names, dict) else {}
    classes = int(pipe.network.null)  # the label after the last
    text = (options.label or "").strip()
    if text.isdecimal() and int(text) < classes:
        return int(text)
    for number, name in names.items():
        named = text and text.lower() in [part.strip().lower() for part in str(name).split(",")]
        if named and str(number).isdecimal() and int(number) < classes:
            return int(number)
    raise UserError(f"LABEL={text}: need 0 .. {classes - 1}, or a name that the folder has.")


def _inputs(options: Generate, pipe, size, cond, null) -> Inputs:
    n, seed = options.n, options.seed
    assert n is not None and seed is not None
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(n))
    start, solver_keys = jax.vmap(lambda key: tuple(jax.random.split(key)))(keys)
    whole, times = _grid(options, pipe, size)
    drawn = pipe.noise(start, *size, times, frames=options.frames)
    noise = drawn / pipe.schedule.start_std(times)
    x, keep = pipe.schedule.start_std(whole) * noise, None
    denoiser: Any = pipe.denoiser
    extra = pipe.network_channels - noise.shape[1]
    if extra and options.mask is None:
        raise UserError(f"this is a network for inpainting ({extra} more channels): INIT and MASK.")
    if options.init is not None:
        picture = jnp.asarray(read_picture(options.init, size))
        latent = pipe.encode_image(picture)
        if options.mask is None or options.strength != 1:
            x = pipelines.start_latents(pipe.diffusion, times, latent, noise)
        if options.mask is not None:
            mask = jnp.asarray(read_mask(options.mask, size, picture_size(options.init)))
            small = pipelines.latent_mask(mask, latent.shape[1:])
            if extra:
                hidden = pipe.encode_image(picture * (mask < 0.5))
                denoiser = pipelines.ExtraChannels(denoiser, jnp.concatenate([small, hidden]))
            else:
                keep = pipelines.Keep(small, latent, noise)
    scale = options.true_guidance if pipe.family.packed else options.guidance
    skip = None
    if options.skip_layers:
        if pipe.family.texts[2:] == ():
            raise UserError("SKIP_LAYERS is for Stable Diffusion 3.5.")
        skip = pipelines.skip_layers(times, options.skip_layers, options.skip_scale or 2.5)
    if scale is not None and (scale > 1 or skip is not None):
        strength = jnp.asarray(scale, jnp.float32)
        denoiser = pipelines.GuidedDenoiser(denoiser, null, strength, options.rescale or 0.0, skip)
    cond = jax.tree.map(lambda a: jnp.repeat(a[:1], n, axis=0), cond)
    return Inputs(times, x, cond, solver_keys, denoiser, keep)


def _check_batch(pipe, solver, inputs: Inputs, weights: int) -> None:
    """N pictures at once, as the compiler counts a step's memory."""
    program = pipelines.step_program(
        inputs.denoiser, pipe.diffusion, solver, inputs.times, inputs.x, inputs.cond, inputs.keys
    )
    try:
        temporary = step_bytes(*program)
    except ValueError as error:  # such as blocks to skip that there are none of
        raise UserError(" ".join(str(error).split())) from error
    n = len(inputs.x)
    say(f"  a step: {show(temporary)} beside the weights, for {n} at once")
    there = available()
    if there is None:
        return
    one = max(temporary // n, 1)
    fits = max(0, there // one)
    advice = f"Take N={fits}." if fits else "Take a smaller SIZE, or a smaller DTYPE."
    check_fits(f"drawing {n} pictures at once", temporary, advice)


def _previewer(options: Generate, pipe, out: Path):
    if not options.preview:
        return lambda step: None
    decoder = pipe.autoencoder
    if options.tae is not None:
        decoder = _tiny_autoencoder(options.tae)
        if getattr(decoder, "latent_channels", None) != pipe.autoencoder.latent_channels:
            raise UserError(f"TAE={options.tae} is not of this model's latents.")
    path = out.with_name(f"{out.stem}-preview.png")
    decode = eqx.filter_jit(lambda decoder, z: decoder.decode(z))

    def preview(step: pipelines.Step) -> None:
        if step.done % max(1, step.of // PREVIEWS) == 0 and step.done < step.of:
            picture = to_uint8(decode(decoder, step.x0[0])[None])[0]
            write_picture(path, np.asarray(picture), {"preview": f"{step.done} of {step.of}"})

    say(f"  previews in {path}")
    return preview


def _tiny_autoencoder(path: Path) -> Any:
    """A diffusers folder, or what the names of TAESD's two files begin with, as in tae/taesd."""
    halves = [path.with_name(f"{path.name}_{half}.safetensors") for half in ("encoder", "decoder")]
    if not path.exists() and all(half.exists() for half in halves):
        return pretrained.load_tiny_autoencoder(*halves)
    if not path.is_dir():
        raise UserError(
            f"TAE={path}: there is no such folder, and no {halves[0].name} with {halves[1].name}."
        )
    return pretrained.load(path)


def _write(options: Generate, out: Path, images: jax.Array) -> list[Path]:
    settings = to_json(options) | {"version": ex.__version__}
    names = ("init", "mask", "lora")
    files = {k: getattr(options, k) for k in names if getattr(options, k) is not None}
    settings["files"] = {name: file_digest(path) for name, path in files.items()}
    paths = paths_of(out, len(images))
    if images.ndim == 5:
        return _write_clips(options, paths, images, settings)
    for i, (path, image) in enumerate(zip(paths, np.asarray(to_uint8(images)), strict=True)):
        write_picture(path, image, settings | {"index": i})
        say(f"wrote {path}")
    if options.preview:
        out.with_name(f"{out.stem}-preview.png").unlink(missing_ok=True)
    return paths


def _write_clips(
    options: Generate, paths: list[Path], clips: jax.Array, settings: dict[str, Any]
) -> list[Path]:
    written = []
    for i, (path, clip) in enumerate(zip(paths, clips, strict=True)):
        frames = np.asarray(to_uint8(jnp.moveaxis(clip, 1, 0)))
        if len(frames) == 1:
            write_picture(path, frames[0], settings | {"index": i})
            new = [path]
        else:
            new = write_clip(path, frames, options.fps or 16.0, settings | {"index": i})
        say(f"wrote {', '.join(map(str, new))}")
        written += new
    return written
