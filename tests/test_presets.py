"""Presets, options, streams of random numbers, evaluators."""

import dataclasses
import re
import warnings

import jax
import numpy as np
import pytest

from experiments.train import commands
from experiments.train.__main__ import PRESETS, chosen_preset
from experiments.train.commands import run_folder
from experiments.train.conditions import Labels, Nothing
from experiments.train.options import range_of
from experiments.train.presets import preset
from experiments.train.scores import EVALUATORS
from experiments.train.streams import STREAMS, stream_key, stream_seed

from job_runs import (
    call,
    said,
)


def test_presets_are_what_help_shows(capsys):
    assert call("train", "--preset", "cifar10", "--help") == 0
    text = said(capsys)
    assert "(default: cifar10)" in text and "(default: 32 32)" in text
    first = [w.strip(",") for w in text.split() if re.fullmatch("--[a-z-]+,?", w)]
    names = (
        "size space denoiser form objective seed preset images run-dir samples eval-every overwrite"
    )
    wanted = [f"--{name}" for name in names.split()]
    assert list(dict.fromkeys(first))[2:14] == wanted  # after --help


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("which", [("latent", "dit"), ("pixel", "unet"), ("pixel", "dit")])
def test_every_preset_makes_networks_for_every_space(name, which):
    size = "128 192" if name == "images" else ""
    args = ["--preset", name, "--space", which[0], "--denoiser", which[1]]
    args += ["--size", *size.split()] if size else []
    found = chosen_preset(args)
    commands.check(found.config)
    for condition in (Labels(10, 10), Nothing()):
        commands.check_networks(found.config, found.sampling, condition, None)


def test_the_default_of_imagenet_is_the_published_recipe():
    found = preset("imagenet256")
    d = found.config.diffusion
    assert (d.batch_size, d.learning_rate, d.weight_decay, d.warmup) == (256, 1e-4, 0.0, 0)
    assert (d.ema_decays, d.ema_warmup, d.cond_dropout, d.steps) == ((0.9999,), False, 0.1, 400_000)
    assert (d.path, d.prediction, d.learned_range) == ("ddpm", "eps", True)
    assert (found.sampling.solver, found.sampling.steps) == ("ddpm", 250)


def every_field(kind, prefix=""):
    import typing

    hints = typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        plain = typing.get_type_hints(kind)[field.name]
        if dataclasses.is_dataclass(plain):
            yield from every_field(plain, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", hints[field.name], plain


@pytest.mark.parametrize(
    "kind", [commands.Train, commands.Autoencoder, commands.Sample, commands.Evaluate]
)
def test_every_number_has_a_range_and_every_option_a_sentence(kind, capsys):
    for name, hint, plain in every_field(kind):
        numbers = "int" in str(plain) or "float" in str(plain)
        words = "str" in str(plain) or "bool" in str(plain) or "Literal" in str(plain)
        assert not numbers or words or range_of(hint) is not None, name
    assert call(kind.__name__.lower(), "--help") == 0
    import tyro  # its parser's own help texts, without the frame

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parser = tyro.extras.get_parser(kind)
    for action in parser._actions:
        assert action.help and not action.help.startswith("(default"), action


def test_all_streams_of_all_seeds_differ():
    seeds = (0, 1, 7, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**63, 2**64 - 1)
    keys = {
        tuple(jax.random.key_data(stream_key(seed, name)).tolist())
        for seed in seeds
        for name in STREAMS
    }
    assert len(keys) == len(seeds) * len(STREAMS)
    assert len({stream_seed(seed, name) for seed in seeds for name in STREAMS}) == len(keys)
    with pytest.raises(ValueError, match="is not one of"):
        stream_key(0, "diffusion/typo")
    with pytest.raises(ValueError, match="a seed must lie in"):
        stream_key(2**64, "samples")


def test_each_kind_of_run_has_its_folder():
    names = {
        run_folder(commands.Sample(preset, space, denoiser)).path.name
        for preset in ("mnist", "smoke")
        for space in ("latent", "pixel")
        for denoiser in ("dit", "unet")
    }
    for form, name in (("modern", "cifar10"), ("published", "cifar10-published")):
        assert run_folder(commands.Sample("cifar10", form=form)).path.name == name
    assert names == {
        f"{preset}{space}{denoiser}"
        for preset in ("mnist", "smoke")
        for space in ("", "-pixel")
        for denoiser in ("", "-unet")
    }


def test_evaluators_see_what_they_should():
    from experiments.train.classifier import Described
    from experiments.train.scores import Comparison

    rng = np.random.default_rng(0)
    features, classes = rng.normal(size=(40, 3)), np.arange(40) % 4
    same = Comparison(Described(features, None), Described(features, classes), classes)
    found = {name: x for function in EVALUATORS for name, x in function(same).items()}
    assert found["fd"] == pytest.approx(0, abs=1e-6) and found["accuracy"] == 1
    assert found["precision"] == found["recall"] == 1
    far = same._replace(samples=Described(features + 9, classes[::-1]))
    found = {name: x for function in EVALUATORS for name, x in function(far).items()}
    assert found["fd"] > 100 and found["precision"] == 0 and found["accuracy"] < 0.5
