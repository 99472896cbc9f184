"""A tiny Wan pipeline saved by diffusers and read by both: the same latents, the same clip."""

import contextlib
import io
import json
from unittest import mock

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
import torch
from diffusers.pipelines.wan import pipeline_wan
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from eqxldm import pipelines

from harness import BOUND, Draw, each_configuration, randomise
from helpers import relative_error

PROMPTS = ("a red fox in the snow", "two boats &amp; a bird", "snow", "")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*PROMPTS[:3], "red birds in the snow & two red boats"] * 20),
        model_writer=written, vocab_size=60, minloglevel=2, pad_id=0, eos_id=1, unk_id=2,
        bos_id=-1, hard_vocab_limit=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "spiece.model").write_bytes(written.getvalue())
    config = dict(tokenizer_class="T5Tokenizer", model_max_length=512, extra_ids=0)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return T5Tokenizer.from_pretrained(folder)


def pipeline(draw, tokenizer, folder):
    text = UMT5Config(
        vocab_size=100, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=3, out_channels=3, text_dim=8,
        ffn_dim=16, num_layers=2,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=3, dim_mult=[1, 2, 2, 2], num_res_blocks=1,
        latents_mean=draw.normal(3).tolist(), latents_std=(1 + draw.rng.random(3)).tolist(),
    )  # fmt: skip
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=draw.one(3.0, 5.0),
        solver_order=draw.one(1, 2, 2, 3),
    )
    if draw.one(True, False, False):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=draw.one(3.0, 5.0))
    pipe = diffusers.WanPipeline(
        tokenizer=tokenizer,
        text_encoder=randomise(UMT5EncoderModel(text), draw),
        transformer=randomise(transformer, draw),
        vae=randomise(vae, draw),
        scheduler=scheduler,
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder)
    return pipe


@each_configuration
def test_wan(number, tokenizer, tmp_path, record_property):
    draw = Draw("wan pipeline", number)
    pipe = pipeline(draw, tokenizer, tmp_path)
    frames, height, width = draw.one(1, 5, 9), 16 * draw.between(1, 2), 16 * draw.between(1, 2)
    prompt, negative = draw.one(*PROMPTS[:3]), draw.one(*PROMPTS)
    steps, scale = draw.between(2, 9), draw.one(1.0, 3.0, 5.0)
    noise = draw.normal(1, 3, 1 + frames // 4, height // 8, width // 8)

    unrepaired = mock.Mock(fix_text=lambda text: text)  # the package need not be there
    given = mock.patch.object(pipeline_wan, "ftfy", unrepaired, create=True)
    with given, torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):
        latents = pipe(
            prompt, negative_prompt=negative, height=height, width=width, num_frames=frames,
            num_inference_steps=steps, guidance_scale=scale, latents=torch.from_numpy(noise),
            output_type="latent",
        ).frames  # fmt: skip
        stats = (pipe.vae.config.latents_mean, pipe.vae.config.latents_std)
        mean, std = (torch.tensor(v).view(1, 3, 1, 1, 1) for v in stats)
        clip = pipe.vae.decode(latents * std + mean).sample

    ours = pipelines.load(tmp_path)
    times, cond = ours.times(steps, height, width), ours.encode([prompt])
    assert ours.noise(jax.random.split(jax.random.key(0), 1), height, width, times,
                      frames=frames).shape == noise.shape  # fmt: skip
    denoiser = ours.denoiser
    if scale > 1:
        denoiser = pipelines.GuidedDenoiser(denoiser, ours.null(negative), jnp.asarray(scale))
    run = denoiser, ours.diffusion, ours.solver, times, jnp.asarray(noise), cond
    found = pipelines.sample_latents(*run)
    errors = dict(latents=float(relative_error(found, latents)))
    errors["clip"] = float(np.max(np.abs(ours.decode(found).clip(-1, 1) - clip.numpy())))
    assert max(errors.values()) <= 20 * BOUND, (errors, steps, scale, ours.solver)
    record_property("Wan", errors)
