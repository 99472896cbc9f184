"""A diffusers folder of a small DiT with random weights: something that two libraries can serve."""

import json
from pathlib import Path

import jax

from eqxldm import pretrained
from eqxldm.models import AutoencoderKL, DiT

# DiT's scheduler, with DDIM's steps.
SCHEDULER = dict(
    _class_name="DDIMScheduler", beta_schedule="linear", beta_start=0.0001, beta_end=0.02,
    clip_sample=False,
)  # fmt: skip
CLASSES = 1000  # diffusers' pipeline takes this number for "none"


def write_dit(folder: Path) -> None:
    """The size of MNIST's DiT in this library: six blocks of width 128, 16 tokens, 32 x 32 pixels.

    Both libraries read it as they read a published DiT.
    """
    keys = jax.random.split(jax.random.key(0), 2)
    dit = DiT(
        (4, 8, 8), patch_size=2, depth=6, width=128, num_heads=4, num_classes=CLASSES,
        learn_sigma=True, key=keys[0],
    )  # fmt: skip
    vae = AutoencoderKL(
        3, 4, channels=(32, 64, 64), blocks=1, decoder_blocks=2, groups=8, attention=True,
        quant_convs=True, key=keys[1],
    ).with_latent_stats(0.0, 0.18215)  # fmt: skip
    _write(pretrained.with_diffusers_time(dit), folder / "transformer", sample_size=8)
    _write(vae, folder / "vae")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    parts = {"transformer": "DiTTransformer2DModel", "vae": "AutoencoderKL"}
    index = {name: ["diffusers", kind] for name, kind in parts.items()}
    index |= {"scheduler": ["diffusers", SCHEDULER["_class_name"]]}
    about = {"_class_name": "DiTPipeline", "id2label": {str(i): str(i) for i in range(CLASSES)}}
    (folder / "model_index.json").write_text(json.dumps(about | index))


def _write(model, folder, **config):
    """What pipelines read beside the weights goes into the record, too."""
    folder.mkdir(parents=True)
    pretrained.export(model, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
