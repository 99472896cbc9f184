"""Wan's folders: clips from prompts, by the functions and by `make generate`."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from eqxldm import pipelines, solvers
from eqxldm.pipelines import PipelineError
from experiments.generate.__main__ import main
from experiments.generate.pictures import read_settings
from experiments.train.terminal import run_main
from experiments.video.pictures import can_write_mp4

from tiny_pipelines import FLOW_UNIPC, write_json, write_wan

SIZE = (16, 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("wan") / "tiny"
    write_wan(path)
    return path


@pytest.fixture(scope="module")
def pipe(folder):
    return pipelines.load(folder)


def test_a_prompt_becomes_a_clip_or_a_picture(pipe):
    cond, null = pipe.encode(["a fox", "a boat"]), pipe.null()
    assert isinstance(pipe.solver, solvers.UniPC)
    times = pipe.times(3, *SIZE)
    keys = jax.random.split(jax.random.key(0), 2)
    denoiser = pipelines.GuidedDenoiser(pipe.denoiser, null, jnp.asarray(5.0))
    for frames in (5, 1):
        x = pipe.noise(keys, *SIZE, times, frames=frames)
        assert x.shape == (2, 2, 1 + frames // 4, 4, 2)
        run = denoiser, pipe.diffusion, pipe.solver, times, x, cond
        shown = pipe.decode(pipelines.sample_latents(*run))
        assert shown.shape == (2, 3, frames, *SIZE) and jnp.all(jnp.isfinite(shown))
        assert jnp.max(jnp.abs(shown[0] - shown[1])) > 1e-4
    assert (pipe.default_frames, pipe.default_size) == (81, (480, 832))
    assert (pipe.factor, pipe.time_factor, pipe.multiple) == (4, 4, 8)


def test_texts_are_cleaned_and_end_in_zeros(pipe):
    tokens = pipe.encode(["a fox", "a &amp;amp; b", " a  &\n b "]).tokens
    assert tokens.shape == (3, 512, 8)
    counts = np.sum(np.any(np.asarray(tokens) != 0, -1), -1)
    assert counts[0] < 10 and np.all(np.asarray(tokens[0, counts[0] :]) == 0)
    np.testing.assert_array_equal(tokens[1], tokens[2])


def test_the_grid_of_a_flow_and_the_whole_timesteps():
    schedule = pipelines.read_schedule(FLOW_UNIPC)
    told = pipelines.NetworkDenoiser(lambda x, t, cond, key=None: t + 0 * x, whole=True)
    for steps in (1, 7, 40, 50):
        times = schedule.times(steps)
        assert len(times) == steps + 1 and times[0] < 1 and times[-1] == 0
        u = np.linspace(1, 1e-3, steps + 1)[:-1]
        shifted = np.minimum(3 * u / (1 + 2 * u), 1 - 1e-6)
        np.testing.assert_allclose(times[:-1], shifted, rtol=2e-7)
        found = jax.vmap(lambda t: told(jnp.zeros(()), t, None))(jnp.asarray(times[:-1]))
        np.testing.assert_allclose(1000 * found, np.floor(1000 * shifted), rtol=1e-6)
    with pytest.raises(PipelineError, match="allows 1 to 1000"):
        schedule.times(1001)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(use_dynamic_shifting=True), r"use_dynamic_shifting = True \(False\)"),
        (dict(prediction_type="epsilon"), r"prediction_type = 'epsilon' \('flow_prediction'\)"),
        (dict(shift_terminal=0.1), "shift_terminal = 0.1"),
        (dict(solver_order=4), "solver_order = 4 is not one of"),
        (dict(_class_name="DPMSolverMultistepScheduler"), r"use_flow_sigmas = True \(False\)"),
    ],
)
def test_other_schedules_of_flows_are_refused(change, message):
    with pytest.raises(PipelineError, match=message):
        pipelines.read_schedule(FLOW_UNIPC | change)


def test_two_networks_are_refused(folder, tmp_path):
    index = json.loads((folder / "model_index.json").read_text())
    part = ["diffusers", "WanTransformer3DModel"]
    for name in ("tokenizer", "text_encoder", "transformer", "vae", "scheduler"):
        (tmp_path / name).symlink_to(folder / name)
    write_json(tmp_path / "model_index.json", index | {"transformer_2": [None, None]})
    assert pipelines.load(tmp_path, parts=()).network is None
    write_json(tmp_path / "model_index.json", index | {"transformer_2": part})
    with pytest.raises(PipelineError, match=r"two networks.*Wan 2\.2's 14B"):
        pipelines.load(tmp_path, parts=())


def made(folder, out, *options):
    given = ["--model", str(folder), "--prompt", "a fox", "--steps", "2", "--out", str(out)]
    main([*given, "--size", "8", "8", *options])


def frames_of(path):
    with Image.open(path) as image:
        frames = []
        for i in range(getattr(image, "n_frames", 1)):
            image.seek(i)
            frames.append(np.asarray(image.convert("RGB")))
        return np.stack(frames), image.info


def test_make_generate_writes_an_animation_that_can_be_repeated(folder, tmp_path, capsys):
    made(folder, tmp_path / "a.png", "--frames", "5", "--n", "2", "--fps", "8", "--seed", "3")
    shown = capsys.readouterr().out
    assert "WanTransformer3DModel" in shown and "2 x 5 x 8 x 8" in shown
    first, info = frames_of(tmp_path / "a-0.png")
    assert first.shape == (5, 8, 8, 3) and info["duration"] == 125
    assert np.any(first[0] != first[4])
    assert (tmp_path / "a-0.mp4").exists() == can_write_mp4()
    settings = read_settings(tmp_path / "a-1.png")
    assert (settings["frames"], settings["fps"], settings["index"]) == (5, 8.0, 1)
    main(["--repeat", str(tmp_path / "a-1.png"), "--out", str(tmp_path / "b.png")])
    for i in range(2):
        again = frames_of(tmp_path / f"b-{i}.png")[0]
        np.testing.assert_array_equal(again, frames_of(tmp_path / f"a-{i}.png")[0])
    made(folder, tmp_path / "one.png", "--frames", "1")
    assert len(frames_of(tmp_path / "one.png")[0]) == 1


BAD = {
    "a clip of 8 frames does not do: this model makes 1 + 4 k, such as 5 or 9": ("--frames", "8"),
    "The nearest is 16 x 8": ("--size", "17", "8"),
    "INIT is for models of pictures": ("--init", "a.png"),
    "PREVIEW is for models of pictures": ("--preview",),
    "the prompt is empty": ("--prompt", " "),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_one_message(message, folder, tmp_path, capsys):
    call = lambda: made(folder, tmp_path / "a.png", *BAD[message])
    assert run_main(call) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("error:") == 1 and "Traceback" not in shown
