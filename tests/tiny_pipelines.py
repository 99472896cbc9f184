"""Tiny diffusers folders with random weights, written by the library's own export."""

import json

import jax

from eqxldm import pretrained
from eqxldm.models import AutoencoderKL, DiT, UNet

from helpers import filled

STABLE = dict(
    _class_name="DDIMScheduler", beta_schedule="scaled_linear", beta_start=0.00085,
    beta_end=0.012, steps_offset=1, set_alpha_to_one=False, clip_sample=False,
)  # fmt: skip


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_index(folder, class_name, scheduler=STABLE, **more):
    libraries = {"tokenizer": "transformers", "text_encoder": "transformers"}
    parts = {
        part.name: json.loads((part / "config.json").read_text()).get("_class_name")
        or json.loads((part / "config.json").read_text())["architectures"][0]
        for part in folder.iterdir()
        if (part / "config.json").is_file()
    }
    parts |= {part.name: "CLIPTokenizer" for part in folder.glob("tokenizer*")}
    parts["scheduler"] = scheduler["_class_name"]
    index = {name: [libraries.get(name, "diffusers"), kind] for name, kind in parts.items()}
    write_json(folder / "model_index.json", {"_class_name": class_name} | index | more)
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)


def tiny_vae():
    def make():
        vae = AutoencoderKL(
            3, 4, channels=(4, 4), blocks=1, decoder_blocks=2, groups=2, attention=True,
            quant_convs=True, key=jax.random.key(0),
        )  # fmt: skip
        return vae.with_latent_stats(0.0, 0.18215)

    return filled(make, seed=1)


def export(model, folder, **config):
    """As `pretrained.export`, with what only pipelines read (`sample_size`)."""
    folder.mkdir(parents=True, exist_ok=True)
    pretrained.export(model, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


def write_dit(folder):
    make = lambda: DiT(
        (4, 4, 4), patch_size=2, depth=1, width=16, num_heads=2, num_classes=3,
        learn_sigma=True, key=jax.random.key(0),
    )  # fmt: skip
    export(
        pretrained.with_diffusers_time(filled(make, seed=2)), folder / "transformer", sample_size=4
    )
    export(tiny_vae(), folder / "vae")
    write_index(folder, "DiTPipeline", id2label={"0": "tench, Tinca tinca", "1": "goldfish"})


def tiny_unet(in_channels=4, context_size=8):
    make = lambda: UNet(
        in_channels, channels=(4, 8), blocks=1, attention_levels=(False, True), num_heads=2,
        context_size=context_size, out_channels=4, groups=2, key=jax.random.key(2),
    )  # fmt: skip
    return filled(make, seed=3)


def write_tokenizer(folder):
    """CLIP's with the 256 bytes alone, no merges."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in plain] + [chr(256 + i) for i in range(256 - len(plain))]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    write_json(folder / "vocab.json", {word: i for i, word in enumerate(words)})
    (folder / "merges.txt").write_text("#version: 0.2\n")
    write_json(folder / "tokenizer_config.json", dict(tokenizer_class="CLIPTokenizer"))


def write_stable_diffusion(folder, in_channels=4, scheduler=STABLE, **more):
    from eqxldm.models import CLIPText

    write_tokenizer(folder / "tokenizer")
    make = lambda: CLIPText(8, 1, 2, vocabulary=514, end_id=513, key=jax.random.key(0))
    export(filled(make, seed=4), folder / "text_encoder")
    export(tiny_unet(in_channels), folder / "unet", sample_size=4)
    export(tiny_vae(), folder / "vae")
    write_index(folder, "StableDiffusionPipeline", scheduler, **more)


FLOW_UNIPC = dict(
    _class_name="UniPCMultistepScheduler", prediction_type="flow_prediction",
    use_flow_sigmas=True, flow_shift=3.0, solver_order=2, timestep_spacing="linspace",
)  # fmt: skip


def write_wan(folder, **more):
    """One of Wan 2.1's form, with clips of 4 x 4 x 4 to a latent's pixel."""
    import tokenizers

    from eqxldm.models import CausalVideoAutoencoder, T5Encoder, WanTransformer

    letters = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("\u2581", -1.0)]
    letters += [(letter, -2.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    core = tokenizers.Tokenizer(tokenizers.models.Unigram(letters, unk_id=2))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    write_json(folder / "tokenizer" / "tokenizer_config.json", dict(tokenizer_class="T5Tokenizer"))
    core.save(str(folder / "tokenizer" / "tokenizer.json"))
    key = jax.random.key(0)
    text = lambda: T5Encoder(
        8, 1, 2, 12, head_size=4, vocabulary=30, shared_bias=False, key=key
    )  # fmt: skip
    export(filled(text, seed=5), folder / "text_encoder")
    wan = lambda: WanTransformer(
        2, depth=1, width=16, num_heads=2, context_size=8, hidden=8, key=key
    )  # fmt: skip
    export(filled(wan, seed=6), folder / "transformer")
    vae = lambda: CausalVideoAutoencoder(
        3, 2, channels=(4, 4, 4), blocks=1, decoder_blocks=2, key=key
    )  # fmt: skip
    export(filled(vae, seed=7), folder / "vae")
    write_index(folder, "WanPipeline", FLOW_UNIPC, **more)
