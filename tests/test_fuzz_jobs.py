"""What clips, evaluations, texts and the larger networks are read from, fed damaged bytes."""

import contextlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

from eqxldm import (
    Diffusion,
    Euler,
    LinearFlow,
    pipelines,
    predict_x0,
    pretrained,
    uniform_times,
)
from eqxldm.audio import read_wav, wav_bytes
from eqxldm.data import Wanted, list_clips, open_clips, read_clips, write_clips
from eqxldm.data.npz_images import NpzImages
from eqxldm.metrics.reference import Gaussian, read_reference, write_reference
from eqxldm.models import CLIPImage, DINOv2, Flux, MMDiT, TokenTransformer
from eqxldm.nn import RMSNorm, RoPE
from eqxldm.pretrained.files import write_safetensors
from eqxldm.pretrained.lora import read_lora
from eqxldm.serving import Exportable, from_bundle, save_bundle
from eqxldm.serving.plans import Plans
from eqxldm.sharding import make_mesh
from experiments.evaluate.store import PROGRESS, _opened, _progress
from experiments.generate.options import Generate, complete
from experiments.generate.pictures import read_settings, write_picture
from experiments.train.options import check
from experiments.train.run import write_json
from experiments.words.commands import NETWORK, VOCABULARY, load_network, vocabulary_json
from experiments.words.corpus import Vocabulary, open_corpus

from fuzzing import (
    Reader,
    check_pipe,
    check_reader,
    damaged_bundle,
    damaged_json,
    damaged_safetensors,
    one,
)
from helpers import filled, llada_folder
from tiny_pipelines import export, write_wan

KEY = jax.random.key(0)
CLIP = Wanted(3, (8, 8))


# Clips


def animation(folder, kind="gif", **options):
    first, *rest = (Image.new("RGB", (9, 7), (40 * k, 0, 0)) for k in range(4))
    first.save(folder / f"a.{kind}", save_all=True, append_images=rest, duration=100, **options)


def captioned(folder):
    animation(folder)
    (folder / "captions.json").write_text(json.dumps({"a.gif": "one"}))


def clips(folder):
    (folder / "in").mkdir()
    animation(folder / "in")
    write_clips(folder / "in", folder, CLIP)


def read_kept_clips(path):
    kept = open_clips(path.parent)
    [kept[i] for i in range(len(kept))]


def sound(path):
    with contextlib.suppress(ValueError):  # what the command makes a message of
        assert len(read_wav(path, 8000)) < 10**6


# Evaluations


def images(folder):
    np.savez_compressed(folder / "a.npz", np.zeros((3, 8, 8, 3), np.uint8), np.arange(3))


def read_images(path):
    found = NpzImages(path)
    list(found.batches(2)), found.labels


def moments(folder):
    write_reference(folder / "a.npz", Gaussian(np.zeros(3), np.eye(3)))


def read_moments(path):
    with contextlib.suppress(ValueError):  # what the command makes a message of
        read_reference(path)


def progress(folder):
    np.save(folder / "pooled.npy", np.zeros((5, 4), np.float32))
    about = {"about": {"a": 1}, "done": 3, "widths": {"pooled": 4}}
    (folder / PROGRESS).write_text(json.dumps(about))


def read_progress(path):
    done, widths = _progress(path.parent, {"a": 1}, 5)
    for name, width in widths.items():
        _opened(path.parent, name, 5, width, done)


# Pictures that are made again


def made(folder):
    (folder / "settings").write_text(
        json.dumps({"model": "m", "steps": 3, "size": [8, 8], "seed": 1, "guidance": 2.0})
    )


def read_made(path):
    picture = path.with_name("a.png")
    write_picture(picture, np.zeros((4, 4, 3), np.uint8), json.loads(path.read_bytes()))
    options = Generate(repeat=picture)
    written = read_settings(picture)
    check(complete(options, written))


@st.composite
def other_settings(draw, content):
    """Whatever is written there is JSON."""
    damage = draw(damaged_json(content))
    try:
        return json.dumps(json.loads(damage)).encode()
    except (ValueError, RecursionError):
        return content


def png(folder):
    write_picture(folder / "a.png", np.zeros((4, 4, 3), np.uint8), {"steps": 3})


# Texts


def words(folder):
    write_json(folder / VOCABULARY, vocabulary_json(Vocabulary("abc")))
    sizes = dict(depth=1, width=8, num_heads=2, max_length=4)
    pretrained.save(filled(lambda: TokenTransformer(4, **sizes, key=KEY)), folder / NETWORK)


def llada(folder):
    import tokenizers

    names = {word: i for i, word in enumerate("a b c d [MASK]".split())}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(names, "a")).save(
        str(folder / "tokenizer.json")
    )
    sizes = dict(depth=1, width=16, num_heads=2, hidden=24, max_length=8, rope_theta=5e5)
    network = filled(lambda: TokenTransformer(5, **sizes, key=KEY))
    llada_folder(folder, network, mask_token_id=4)


def read_words(path):
    _, vocabulary = load_network(path.parent, make_mesh())
    vocabulary.decode(vocabulary.encode("a"))


def tokens(folder):
    import tokenizers

    names = {word: i for i, word in enumerate("a b c ?".split())}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(names, "?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(folder / "tokenizer.json"))


def read_tokens(path):
    text = path.with_name("text")
    text.write_text("a b c " * 30)
    open_corpus(text, str(path), 4)


# Networks


def network(make):
    return lambda folder: export(filled(make), folder)


def flux():
    sizes = dict(depth=1, single_depth=1, width=16, num_heads=2, context_size=6, pooled_size=5)
    return Flux(2, **sizes, guidance=True, rope=RoPE((4, 2, 2)), key=KEY)


def mmdit():
    sizes = dict(depth=2, width=16, num_heads=2, context_size=6, pooled_size=5, out_channels=2)
    return MMDiT(2, **sizes, qk_norm=RMSNorm, max_grid=6, base_grid=4, key=KEY)


def lora(folder):
    layer = "transformer_blocks.0.attn1.to_q"
    matrices = {"lora_A.weight": np.ones((2, 8)), "lora_B.weight": np.ones((8, 2))}
    tensors = {f"{layer}.{k}": v.astype(np.float32) for k, v in matrices.items()}
    write_safetensors(folder / "lora.safetensors", tensors, {})


def read_network(path):
    pretrained.load(path.parent)


def read_wan(path):
    folder = next(p for p in path.parents if (p / "vae").is_dir())
    pipelines.describe(folder)
    bare = pipelines.load(folder, parts=())
    bare.check_size(16, 16, 5)
    pipelines.load(folder, parts=[path.parent.name])


# Bundles


def bundle(folder):
    """Of a network with a condition, weights in two dtypes and guidance."""
    weights = jnp.ones((2, 1, 1)), jnp.array(0.5, jnp.bfloat16)
    network = jax.tree_util.Partial(lambda w, x, t, c, key=None: w[0] * x + t * c, weights)
    decoder = jax.tree_util.Partial(lambda w, z: w[1] * z[:1], weights)
    flow = Diffusion(LinearFlow(), predict_x0), Euler(), uniform_times(2)
    model = Exportable(network, decoder, *flow, (2, 4, 4), np.int32(0), np.int32(2), pad=1)
    said = {
        "name": "a", "path": "flow", "prediction": "x0", "learned_range": False, "solver": "euler",
        "steps": 2, "guidance": 2.0, "size": [2, 2], "channels": 1, "stream": 11, "shift": 1.0,
        "condition": {"kind": "label", "classes": 2, "names": ["a", "b"]},
    }  # fmt: skip
    save_bundle(model, folder / "a.bundle", said, platforms=["cpu"])


def read_bundle(path):
    generator = from_bundle(path)
    usual = generator.defaults
    Plans(generator)(usual.solver, usual.steps)
    generator.condition(None, 1), generator.stream(KEY)


READERS = {
    "bundle": Reader(bundle, "a.bundle", read_bundle, damaged_bundle),
    **{kind: Reader(lambda folder, kind=kind: animation(folder, kind), f"a.{kind}",
                    lambda path: read_clips(path, CLIP)) for kind in ("gif", "webp", "apng")},
    "wav": Reader(one(wav_bytes(np.zeros(400), 6000)), "file", sound),
    "captions of clips": Reader(
        captioned, "captions.json", lambda path: list_clips(path.parent), damaged_json
    ),
    "clips.json": Reader(clips, "clips.json", read_kept_clips, damaged_json),
    "images.npz": Reader(images, "a.npz", read_images),
    "moments.npz": Reader(moments, "a.npz", read_moments),
    "progress.json": Reader(progress, PROGRESS, read_progress, damaged_json),
    "settings of a picture": Reader(made, "settings", read_made, other_settings),
    "a picture that was made": Reader(png, "a.png", read_settings),
    "text": Reader(one(b"a text " * 40), "file", lambda path: open_corpus(path, "characters", 4)),
    "tokens": Reader(tokens, "tokenizer.json", read_tokens, damaged_json),
    "vocabulary.json": Reader(words, VOCABULARY, read_words, damaged_json),
    "llada: config.json": Reader(llada, "config.json", read_words, damaged_json),
    "llada: tokenizer.json": Reader(llada, "tokenizer.json", read_words, damaged_json),
    "lora": Reader(lora, "lora.safetensors", read_lora, damaged_safetensors),
    "flux": Reader(network(flux), "config.json", read_network, damaged_json),
    "mmdit": Reader(network(mmdit), "config.json", read_network, damaged_json),
    "dinov2": Reader(
        network(lambda: DINOv2(8, 1, 2, grid=2, patch_size=4, key=KEY)), "config.json",
        read_network, damaged_json,
    ),
    "clip image": Reader(
        network(lambda: CLIPImage(8, 1, 2, 5, grid=2, patch_size=4, key=KEY)), "config.json",
        read_network, damaged_json,
    ),
    **{f"wan: {part}": Reader(write_wan, f"{part}/config.json", read_wan, damaged_json)
       for part in ("transformer", "vae", "text_encoder")},
}  # fmt: skip


@pytest.mark.filterwarnings("default::hypothesis.errors.HypothesisWarning")
@pytest.mark.parametrize("name", READERS)
def test_a_reader_of_the_jobs_ends_with_a_value_or_one_message(name, tmp_path):
    slow = name in ("flux", "mmdit", "dinov2") or name.startswith(("wan", "llada"))
    check_reader(READERS[name], tmp_path, cases=3 if slow else 8)


@pytest.mark.parametrize(
    "name",
    ["gif", "captions of clips", "clips.json", "images.npz", "vocabulary.json",
     "llada: tokenizer.json", "tokens", "text", "a picture that was made", "bundle"],
)  # fmt: skip
def test_a_pipe_in_the_place_of_a_file_of_the_jobs_is_refused(name, tmp_path):
    check_pipe(READERS[name], tmp_path)
