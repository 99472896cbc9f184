"""A model's configuration as JSON and back; functions are written by their names."""

import dataclasses
from typing import Any

import equinox as eqx
import jax

from .. import models, nn
from .layout import WeightsError

CONFIGS: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        models.AlexLPIPSConfig,
        models.AutoencoderConfig,
        models.BERTConfig,
        models.ByteTextConfig,
        models.CaptionEncoderConfig,
        models.CausalVideoAutoencoderConfig,
        models.CLIPTextConfig,
        models.DiscriminatorConfig,
        models.CLIPImageConfig,
        models.DINOv2Config,
        models.DiTConfig,
        models.EncodedCaptionConfig,
        models.FluxConfig,
        models.InceptionConfig,
        models.LPIPSConfig,
        models.MMDiTConfig,
        models.SentenceEncoderConfig,
        models.SoundAutoencoderConfig,
        models.T5Config,
        models.TinyAutoencoderConfig,
        models.TokenTransformerConfig,
        models.TwoTowersConfig,
        models.UNetConfig,
        models.WanConfig,
        nn.Labels,
        nn.RoPE,
        nn.Sinusoid,
        nn.Vector,
    )
}


def functions() -> dict[str, Any]:
    """The functions and classes that a configuration may hold, by name.

    >>> functions()["attend"] is nn.attend
    True
    """
    known = (nn.attend, nn.attend_in_blocks, nn.cudnn_attend, nn.flash_attend)
    known += (nn.RMSNorm, nn.LayerNorm, nn.Conv, nn.SpectralConv)
    known += (nn.gelu, nn.gelu_tanh, nn.quick_gelu)
    known += (models.DiTBlock, models.CrossAttentionDiTBlock, eqx.nn.Identity)
    known += (models.LlamaBlock, models.AdaptiveTokenBlock)
    known += (models.mean_token, models.first_token)
    named = {function.__name__: function for function in known}
    return vars(jax.checkpoint_policies) | named | {"save_narrow": nn.save_narrow}


def to_json(record: Any) -> dict[str, Any]:
    """The fields of a record that differ from its defaults, and `class`: its kind.

    **Raises** `WeightsError` for a function without a name here, and for a part that has no record.

    >>> to_json(nn.Sinusoid(scale=1.0))
    {'class': 'Sinusoid', 'scale': 1.0}
    """
    kind = type(record)
    written = {"class": kind.__name__}
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if field.default is dataclasses.MISSING or value != field.default:
            written[field.name] = _written(value, f"{kind.__name__}: {field.name}")
    return written


def from_json(written: Any) -> Any:
    """The record that `to_json` has written.

    **Raises** `WeightsError` for a class, a function or a field that is not known.

    >>> from_json({"class": "Sinusoid", "scale": 1})
    Sinusoid(scale=1, offset=-1.0, size=256, freq_shift=0, sin_first=False)
    """
    name = written.get("class") if isinstance(written, dict) else None
    if not isinstance(name, str) or name not in CONFIGS:
        raise WeightsError(f"unknown configuration {name!r}; known are {', '.join(CONFIGS)}.")
    values = {field: _read(value) for field, value in written.items() if field != "class"}
    try:
        return CONFIGS[name](**values)
    except TypeError as error:  # a field of another version, or none where one is needed
        raise WeightsError(f"no {name} can be made: {error}".splitlines()[0]) from error


def _written(value: Any, where: str) -> Any:
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, tuple):
        return [_written(item, where) for item in value]
    if type(value).__name__ in CONFIGS:
        return to_json(value)
    names = [name for name, known in functions().items() if known is value]
    if not names:
        raise WeightsError(
            f"{where} = {value} cannot be written down: only numbers, records such as "
            f"nn.Sinusoid and these functions can: {', '.join(sorted(functions()))}. Write the "
            "arrays with equinox.tree_serialise_leaves, and make the model again from your code."
        )
    return names[0]


def _read(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_read(item) for item in value)
    if isinstance(value, dict):
        return from_json(value)
    if isinstance(value, str):
        if value not in functions():
            raise WeightsError(f"unknown function {value!r}.")
        return functions()[value]
    return value
