"""Weights in and out: diffusers' folders, the official DiT files, and our own safetensors."""

from . import (
    autoencoder as autoencoder,
    bert as bert,
    clip_text as clip_text,
    dit as dit,
    flux as flux,
    image_encoders as image_encoders,
    inception as inception,
    llada as llada,
    lora as lora,
    lpips as lpips,
    mmdit as mmdit,
    sentence_encoder as sentence_encoder,
    t5 as t5,
    tiny_autoencoder as tiny_autoencoder,
    unet as unet,
    video_autoencoder as video_autoencoder,
    wan as wan,
)
from .dit import (
    diffusers_layout as diffusers_layout,
    official_layout as official_layout,
    with_diffusers_time as with_diffusers_time,
)
from .image_encoders import load_clip_image as load_clip_image
from .inception import load_inception as load_inception
from .io import (
    export as export,
    load as load,
    load_into as load_into,
    load_state as load_state,
    save as save,
    to_state as to_state,
)
from .layout import Layout as Layout, Part as Part, WeightsError as WeightsError
from .llada import load_llada as load_llada
from .lora import merge_lora as merge_lora
from .lpips import load_lpips as load_lpips, load_lpips_package as load_lpips_package
from .sentence_encoder import (
    export_sentence_encoder as export_sentence_encoder,
    load_sentence_encoder as load_sentence_encoder,
)
from .tiny_autoencoder import load_tiny_autoencoder as load_tiny_autoencoder
