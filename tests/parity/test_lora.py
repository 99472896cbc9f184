"""LoRA files written by diffusers, and in kohya's names: merged as diffusers fuses them."""

import contextlib

import diffusers
import numpy as np
import peft
import pytest
import torch
from diffusers.training_utils import _collate_lora_metadata
from peft.utils import get_peft_model_state_dict
from safetensors.numpy import save_file
from test_pipelines import WIDTH, flow_scheduler, unet, vae

from eqxldm import pretrained

from harness import Draw, each_configuration, randomise, save
from helpers import relative_error

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def sd(draw, folder):
    # Without text encoder: transformers 5 asks for a peft that is newer than the newest one.
    pipe = diffusers.StableDiffusionPipeline(
        unet=unet(draw, 4), vae=vae(draw), scheduler=diffusers.DDIMScheduler(),
        text_encoder=None, tokenizer=None, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    return pipe, {"unet": pretrained.unet}


def xl(draw, folder):
    network = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=draw.between(1, 2),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=WIDTH,
        attention_head_dim=2, norm_num_groups=4, transformer_layers_per_block=(1, 2),
        use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=4, projection_class_embeddings_input_dim=6 + 6 * 4,
    )  # fmt: skip
    pipe = diffusers.StableDiffusionXLPipeline(
        unet=randomise(network, draw), vae=vae(draw), scheduler=diffusers.EulerDiscreteScheduler(),
        **{f"{part}{n}": None for part in ("text_encoder", "tokenizer") for n in ("", "_2")},
        add_watermarker=False,
    )  # fmt: skip
    return pipe, {"unet": pretrained.unet}


def sd3(draw, folder):
    network = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=3,
        attention_head_dim=8, num_attention_heads=2, joint_attention_dim=WIDTH,
        caption_projection_dim=16, pooled_projection_dim=6, pos_embed_max_size=8,
        dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    none = {f"{p}{n}": None for p in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")}
    parts = dict(transformer=randomise(network, draw), vae=vae(draw))
    pipe = diffusers.StableDiffusion3Pipeline(**parts, scheduler=flow_scheduler(draw), **none)
    return pipe, {"transformer": pretrained.mmdit}


def flux(draw, folder):
    network = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=WIDTH, pooled_projection_dim=6,
        guidance_embeds=True, axes_dims_rope=(4, 2, 2),
    )  # fmt: skip
    none = {f"{p}{n}": None for p in ("text_encoder", "tokenizer") for n in ("", "_2")}
    parts = dict(transformer=randomise(network, draw), vae=vae(draw))
    pipe = diffusers.FluxPipeline(**parts, scheduler=flow_scheduler(draw), **none)
    return pipe, {"transformer": pretrained.flux}


PIPELINES = {"sd": sd, "xl": xl, "sd3": sd3, "flux": flux}
LAYERS = {
    "unet": ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "conv1"],
    "transformer": ["to_q", "to_v", "to_out.0", "add_k_proj", "ff.net.2", "proj_out", "proj_mlp"],
}


def peft_file(pipe, names, draw, folder):
    """As diffusers' own training scripts write it, with what peft was told in the header."""
    modules, layers = {name: getattr(pipe, name) for name in names}, {}
    for name, module in modules.items():
        rank = draw.between(1, 4)
        config = peft.LoraConfig(
            r=rank, lora_alpha=draw.one(rank, 1, 7), init_lora_weights=False,
            target_modules=LAYERS[name], use_rslora=draw.one(False, True),
        )  # fmt: skip
        module.add_adapter(config)
        layers[f"{name}_lora_layers"] = get_peft_model_state_dict(module)
    told = _collate_lora_metadata(dict(modules)) if draw.one(True, False) else {}
    pipe.save_lora_weights(folder, **layers, **told)
    for module in modules.values():
        module.delete_adapters("default")
    return folder / "pytorch_lora_weights.safetensors"


def kohya_file(pipe, names, draw, folder):
    """In the names of kohya's scripts; one alpha, as diffusers loses those of attentions."""
    tensors, alpha = {}, np.array(draw.between(1, 8), np.float32)
    for name in names:
        for layer, module in getattr(pipe, name).named_modules():
            wanted = layer.endswith(tuple(LAYERS[name]))
            if not wanted or not isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                continue
            rank, shape = draw.between(1, 4), tuple(module.weight.shape)
            start = f"lora_unet_{layer.replace('.', '_')}"
            one = (1,) * (len(shape) - 2)
            tensors |= {
                f"{start}.lora_down.weight": draw.normal(rank, *shape[1:]),
                f"{start}.lora_up.weight": draw.normal(shape[0], rank, *one),
                f"{start}.alpha": alpha,
            }
    save_file(tensors, folder / "kohya.safetensors")
    return folder / "kohya.safetensors"


@each_configuration
def test_merged_as_diffusers_fuses(number, tmp_path, record_property):
    draw = Draw("lora", number)
    kind = [*PIPELINES][number % len(PIPELINES)]
    pipe, layouts = PIPELINES[kind](draw, tmp_path)
    form = kohya_file if kind in ("sd", "xl") and number // 4 % 2 else peft_file
    models = {}
    for name in layouts:  # before peft renames what is in them
        save(getattr(pipe, name), tmp_path / name, "float32")
        models[name] = pretrained.load(tmp_path / name)
    path = form(pipe, tuple(layouts), draw, tmp_path)
    scale, worst = float(draw.one(1.0, 0.6, -0.5)), 0.0
    with contextlib.redirect_stdout(None):
        pipe.load_lora_weights(str(path.parent), weight_name=path.name)
        pipe.fuse_lora(components=list(layouts), lora_scale=scale)
        pipe.unload_lora_weights()
    for name, module in layouts.items():
        merged = pretrained.merge_lora(models[name], path, scale)
        layout = module.diffusers_layout
        ours, before = (pretrained.to_state(m, layout) for m in (merged, models[name]))
        theirs = {k: v.numpy() for k, v in getattr(pipe, name).state_dict().items()}
        changed = [k for k in before if k in theirs and not np.array_equal(before[k], theirs[k])]
        assert len(changed) > 3, (kind, name)
        for key in before:
            if key in theirs:
                worst = max(worst, float(relative_error(ours[key], theirs[key])))
    assert worst < 2e-6, (kind, form.__name__, scale, worst)
    record_property(f"LoRA, {kind}", {"weights": worst})
