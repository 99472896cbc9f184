"""LLaDA's network against transformers' LLaMA without its causal mask."""

import equinox as eqx
import jax
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from eqxldm import pretrained
from eqxldm.models import TokenTransformer

from harness import COUNT
from helpers import relative_error

# LLaDA's names of LLaMA's tensors; those of a block after its number.
OUTSIDE = {
    "model.embed_tokens.weight": "model.transformer.wte.weight",
    "model.norm.weight": "model.transformer.ln_f.weight",
    "lm_head.weight": "model.transformer.ff_out.weight",
}
INSIDE = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ff_norm",
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
}


def renamed(name):
    if name in OUTSIDE:
        return OUTSIDE[name]
    _, _, number, rest = name.split(".", 3)
    return f"model.transformer.blocks.{number}.{INSIDE[rest.removesuffix('.weight')]}.weight"


@pytest.mark.parametrize("number", range(min(COUNT, 20)))
def test_llada_is_llama_without_a_causal_mask(number):
    rng = np.random.default_rng(number)
    heads, depth, n = int(rng.integers(1, 4)), int(rng.integers(1, 4)), int(rng.integers(1, 12))
    width, hidden = heads * 2 * int(rng.integers(4, 9)), int(rng.integers(8, 40))
    causal, theta = bool(number % 2), float(rng.choice([1e4, 5e5]))
    config = LlamaConfig(
        vocab_size=19, hidden_size=width, intermediate_size=hidden, num_hidden_layers=depth,
        num_attention_heads=heads, num_key_value_heads=heads, rms_norm_eps=1e-5,
        max_position_embeddings=16, rope_theta=theta, attn_implementation="eager",
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )  # fmt: skip
    torch.manual_seed(number)
    theirs = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(parameter + 0.2 * torch.randn_like(parameter))
    state = {renamed(name): value.numpy() for name, value in theirs.state_dict().items()}
    made = TokenTransformer(
        19, depth=depth, width=width, num_heads=heads, hidden=hidden, max_length=16,
        rope_theta=theta, causal=causal, remat=None, key=jax.random.key(0),
    )  # fmt: skip
    ours = pretrained.load_state(made, state)
    ids = rng.integers(0, 19, n)
    # An additive mask of zeros: every token sees every other.
    mask = None if causal else torch.zeros(1, 1, n, n)
    with torch.no_grad():
        expected = theirs(torch.tensor(ids[None]), attention_mask=mask).logits[0].numpy()
    assert relative_error(np.asarray(eqx.filter_jit(ours)(ids)), expected) < 2e-5
    back = pretrained.to_state(ours, pretrained.llada.llada_layout)
    assert all(np.array_equal(back[name], value) for name, value in state.items())
