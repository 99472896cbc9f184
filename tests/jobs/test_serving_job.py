"""`make serve`: runs and folders behind the engine, the command line, the load generator."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from serving import drawn, make_generator, pixels, running, written
from test_serving_http import served

from eqxldm.serving import Request, RequestError, load_bundle
from eqxldm.serving.text import TextRequest
from experiments.serve import clients, folders, generators
from experiments.serve.__main__ import main
from experiments.serve.clients import picture
from experiments.serve.options import Serve, load, make_engine
from experiments.train import finished
from experiments.train.conditions import Labels
from experiments.train.config import Config, DiTConfig, PictureOptions, SamplingConfig
from experiments.train.diffusion import Trained
from experiments.train.methods import make_method
from experiments.train.networks import Pixels, make_denoiser
from experiments.train.presets import preset
from experiments.train.run import as_dict
from experiments.train.sampling import Sampler
from experiments.train.streams import stream_key
from experiments.train.terminal import UserError, run_main

import tiny_pipelines
from helpers import filled, llada_folder


def write_run(folder, monkeypatch, objective="denoising"):
    """A run folder as a finished run leaves it, but for its weights, which are random."""
    found = preset("mnist", "pixel", objective=objective)
    diffusion = found.diffusion
    config = Config(
        size=(8, 8), space="pixel", objective=objective, diffusion=diffusion, few=found.few,
        pictures=PictureOptions(channels=1, pad=2, flip=False),
        dit=DiTConfig("dit_s_2", depth=1, width=16, num_heads=2, patch_size=4),
    )  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(as_dict(config)))
    data = dict(condition="label", class_names=["a", "b", "c"], num_classes=3, path=None)
    (folder / "data.json").write_text(json.dumps(data))
    condition, shape = Labels(3, 3), (1, 12, 12)
    network = filled(lambda: make_denoiser(config, shape, condition), seed=3)
    trained = Trained(Pixels(1), network, shape, condition.null)
    monkeypatch.setattr(finished, "load_finished", lambda *_: trained)
    return config, trained, condition


def by_the_job(config, trained, condition, label, seed, sampling):
    """What `make sample` draws."""
    sampler = Sampler(make_method(config), sampling, config.pictures.pad)
    keys = jax.vmap(lambda i: jax.random.fold_in(stream_key(seed, "samples"), i))(np.arange(2))
    draw = sampler.function(trained.shape, trained.null)
    cond = condition.of([label, label]).cond
    return np.asarray(draw(trained.space, trained.denoiser, cond, keys)).astype(int)


def test_a_run_draws_what_make_sample_draws(tmp_path, monkeypatch):
    config, *about = write_run(tmp_path / "a", monkeypatch)
    generator = generators.from_run(tmp_path / "a")
    assert generator.name == "a" and generator.labels == ("a", "b", "c")
    assert generator.defaults.steps == 20 and "unipc" in generator.solver_names
    generator = generator.replace(solvers={"ddim": generator.solvers["ddim"]})
    with running(generator, slots=2, sizes=(4,), decodes=(2,)) as engine:
        seed, interval = 2**40 + 1, (0.0, 0.8)
        wanted = Request("ddim", 5, 2.5, interval, seed, n=2, label=1)
        (found,) = drawn(engine, wanted)
    sampling = SamplingConfig("ddim", 5, 2.5, interval)
    want = by_the_job(config, *about, 1, seed, sampling)
    assert np.abs(np.stack(found).astype(int)[..., None] - want).max() <= 1 and np.ptp(want) > 20


def test_a_run_of_few_steps_is_served_by_its_map(tmp_path, monkeypatch):
    config, *about = write_run(tmp_path / "a", monkeypatch, "imf")
    generator = generators.from_run(tmp_path / "a")
    assert generator.defaults.solver == "map" and generator.defaults.steps == 1
    with running(generator.replace(solvers={}), slots=2, sizes=(2,), decodes=(2,)) as engine:
        (found,) = drawn(engine, Request("map", 1, 1.0, (0.0, 1.0), 7, n=2, label=2))
    want = by_the_job(config, *about, 2, 7, SamplingConfig("map", 1, 1.0))
    assert np.abs(np.stack(found).astype(int)[..., None] - want).max() <= 1


def test_a_run_of_few_steps_is_exported_with_its_map(tmp_path, monkeypatch):
    """The run says what its objective is: by default one call of the map draws."""
    from experiments.export import __main__ as exporting

    config, *about = write_run(tmp_path / "a", monkeypatch, "imf")
    monkeypatch.setattr(exporting, "PLATFORMS", ["cpu"])
    exporting.main(["--preset", "mnist", "--run-dir", str(tmp_path / "a")])
    bundle = load_bundle(tmp_path / "a" / "model.bundle")
    said = bundle.settings
    assert (said["solver"], said["steps"], said["guidance"]) == ("map", 1, 1.0)
    keys = [jax.random.fold_in(stream_key(7, "samples"), i) for i in range(2)]
    words = (jax.random.key_data(key).tolist() for key in keys)
    seeds = [high << 32 | low for high, low in words]
    found = np.asarray(bundle.draw(seeds, np.array([2, 2], np.int32)), int)
    want = by_the_job(config, *about, 2, 7, SamplingConfig("map", 1, 1.0))
    assert np.abs(found - want).max() <= 1 and np.ptp(want) > 20
    arguments = ["--preset", "mnist", "--run-dir", str(tmp_path / "a"), "--format", "onnx"]
    with pytest.raises(UserError, match="a flow map has no file of ONNX"):
        exporting.main(arguments)


def test_a_folder_draws_what_make_generate_draws(tmp_path):
    from experiments.generate.__main__ import main as generate

    tiny_pipelines.write_dit(tmp_path / "dit")
    generator = generators.from_folder(tmp_path / "dit", None, "float32")
    assert generator.labels == ("tench", "goldfish", "2") and generator.size == (8, 8)
    assert generator.solver_names[:2] == ("scheduler", "ddim")
    generator = generator.replace(solvers={"scheduler": generator.solvers["scheduler"]})
    with running(generator, slots=1, sizes=(2,), decodes=(1,)) as engine:
        ((found,),) = drawn(engine, Request("scheduler", 4, 4.0, (0.0, 1.0), 5, label=1))
    out = tmp_path / "a.png"
    generate([
        "--model", str(tmp_path / "dit"), "--label", "goldfish", "--steps", "4", "--guidance",
        "4", "--seed", "5", "--out", str(out),
    ])  # fmt: skip
    want = pixels(out.read_bytes()).astype(int)
    assert np.abs(found.astype(int) - want).max() <= 1 and np.ptp(want) > 20


def test_a_run_of_words_writes_what_make_generate_text_writes(tmp_path, capsys):
    from eqxldm import models, pretrained
    from experiments.words.__main__ import main as words

    sizes = dict(depth=1, width=8, num_heads=2, max_length=8)
    network = filled(lambda: models.TokenTransformer(5, **sizes, key=jax.random.key(0)), size=1.0)
    pretrained.save(network, tmp_path / "masked.safetensors")
    (tmp_path / "vocabulary.json").write_text('{"characters": "abcd"}')
    options = Serve(run=tmp_path, slots=2, rows=2)
    generator = load(options)
    assert generator.length == 8 and generator.sampler_names[:2] == ("random", "ancestral")
    with pytest.raises(UserError, match="--length 9: the network's context has 8 tokens"):
        load(replace(options, length=9))
    engine = make_engine(options, generator)
    engine.start()
    try:
        assert engine.ready.wait(60), engine.failed
        wanted = TextRequest(("ab",), "margin", 2**40 + 1, n=2, max_tokens=4, temperature=0.8)
        (found,) = written(engine, wanted, decode=generator.decode)
        with pytest.raises(
            RequestError, match="'é' is not among the 4 characters that the network"
        ):
            engine.submit(TextRequest(("é",), "random", 0), print)
    finally:
        engine.stop()
    words([
        "generate", "--model", str(tmp_path), "--prompt", "ab", "--length", "6", "--n", "2",
        "--sampler", "margin", "--temperature", "0.8", "--seed", str(2**40 + 1),
    ])  # fmt: skip
    assert capsys.readouterr().out.splitlines()[:2] == [text for text, _ in found]


def test_a_folder_of_llada_is_served_as_text(tmp_path):
    from eqxldm import models

    tokenizers = pytest.importorskip("tokenizers")
    known = {word: i for i, word in enumerate("a b c d [MASK]".split())}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, "a"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    sizes = dict(depth=1, width=16, num_heads=2, hidden=24, max_length=8, rope_theta=5e5)
    network = filled(lambda: models.TokenTransformer(5, **sizes, key=jax.random.key(0)))
    llada_folder(tmp_path, network, mask_token_id=4)
    generator = load(Serve(model=tmp_path, length=6, dtype="bfloat16"))
    assert (generator.length, generator.vocabulary, generator.mask_id) == (6, 5, 4)
    assert generator.network.token_table.dtype == "bfloat16"
    assert generator.decode(generator.encode("b c")) == "b c"


def test_bad_input_is_one_message(tmp_path, capsys):
    from eqxldm.serving.server import bind

    unfinished = tmp_path / "words"
    (unfinished / "checkpoints" / "masked").mkdir(parents=True)
    with bind("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        for args, text in {
            ("serve", "--port", "0"): "what is to be served?",
            ("serve", "--run", "a", "--model", "b", "--port", "0"): "what is to be served?",
            ("serve", "--run", str(tmp_path / "none"), "--port", "0"): "no run in",
            ("serve", "--model", str(tmp_path), "--port", "0"): "model_index.json",
            ("serve", "--run", str(unfinished), "--port", "0"): "no finished run",
            ("serve", "--run", "a", "--slots", "0"): "--slots must lie in",
            ("serve", "--run", "a", "--port", port): "Take another PORT",
            ("bench", "--run", str(unfinished)): "is a run of words",
            ("bench",): "what is to be served?",
            ("bench", "--run", "a", "--diffusers", "b"): "--diffusers reads no run",
            ("bench", "--model", "a", "--diffusers", "none"): "there is no such program",
            ("soak",): "which run?",
        }.items():
            assert run_main(lambda args=args: main(args)) == 2
            shown = capsys.readouterr().err
            assert shown.count("error:") == 1 and text in shown, (args, shown)


def test_a_folder_with_random_weights_can_be_measured(tmp_path):
    folders.write_dit(tmp_path / "dit")
    generator = generators.from_folder(tmp_path / "dit", None, "float32")
    assert generator.size == (32, 32) and generator.guided and len(generator.labels) == 1000


def test_the_load_generator_counts_answers():
    with running(make_generator(solvers={"ddim": make_generator().solvers["ddim"]}), slots=2,
                 sizes=(4,), decodes=(2,)) as engine, served(engine) as client:  # fmt: skip
        seen = []
        body = lambda i: {"label": i % 3, "seed": i, "steps": 2}
        found = clients.load(
            str(client.base_url), 3, body, seconds=60, most=12,
            seen=lambda i, answer: seen.append((i, picture(answer)[:4])),
        )  # fmt: skip
        assert found.statuses == {200: 12} and found.rate > 0
        assert {i for i, _ in seen} == set(range(12)) and {p for _, p in seen} == {b"\x89PNG"}
        assert found.percentile(50) <= found.percentile(99)
        refused = clients.load(str(client.base_url), 1, lambda i: {"label": 9}, seconds=60, most=2)
        assert refused.statuses == {400: 2}
    with pytest.raises(KeyError):
        picture(b'{"error": 1}')
