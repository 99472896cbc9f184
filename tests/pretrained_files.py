"""Files of weights for tests, and what diffusers has made."""

import json
from pathlib import Path

import jax
import numpy as np
import safetensors

from eqxldm import pretrained
from eqxldm.models import DiT
from eqxldm.pretrained.files import WEIGHTS, write_safetensors

from helpers import perturbed, reference

FIXTURE = Path(__file__).parent / "reference" / "dit_diffusers.safetensors"
FILE = f"{WEIGHTS}.safetensors"


def fixture():
    """`(config, weights, the rest)` of what diffusers has made."""
    with safetensors.safe_open(FIXTURE, framework="np") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    split = {n.removeprefix("weights/"): t for n, t in tensors.items() if n.startswith("weights/")}
    return config, split, {n: t for n, t in tensors.items() if not n.startswith("weights/")}


CONFIG, WEIGHTS_OF_DIFFUSERS, VALUES = fixture()


def write_folder(folder, *, config=CONFIG, tensors=WEIGHTS_OF_DIFFUSERS):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / FILE, tensors, {"format": "pt"})
    return folder


def changed(tensors, **changes):
    """The tensors with some replaced, or removed where None."""
    return {n: t for n, t in {**tensors, **changes}.items() if t is not None}


def tiny(**changes):
    sizes = dict(patch_size=2, depth=2, width=16, num_heads=2, num_classes=3)
    return perturbed(DiT((3, 8, 8), **{**sizes, **changes}, key=jax.random.key(0)))


def equal(a, b):
    """The same module: structure, static fields, dtypes and every bit."""
    same = jax.tree.structure(a) == jax.tree.structure(b) and type(a) is type(b)
    bits = lambda m: [(x.dtype, x.shape, np.asarray(x).tobytes()) for x in jax.tree.leaves(m)]
    return same and bits(a) == bits(b)


SD_CONFIG = dict(
    _class_name="AutoencoderKL",
    block_out_channels=[128, 256, 512, 512],
    down_block_types=["DownEncoderBlock2D"] * 4,
    up_block_types=["UpDecoderBlock2D"] * 4,
    layers_per_block=2,
    sample_size=256,
)


def levels(n):
    """The block types of `n` levels without attention."""
    return dict(
        down_block_types=["DownEncoderBlock2D"] * n, up_block_types=["UpDecoderBlock2D"] * n
    )


TINY_SD = SD_CONFIG | dict(
    block_out_channels=[4, 8], layers_per_block=1, norm_num_groups=2, **levels(2)
)


def state_of_diffusers(name):
    file = reference(f"autoencoder_{name}")
    return {k: file[k] for k in file.files if file[k].dtype == np.float16}


def tiny_autoencoder(**changes):
    return perturbed(
        pretrained.autoencoder.from_diffusers(TINY_SD | changes, key=jax.random.key(0))
    )
