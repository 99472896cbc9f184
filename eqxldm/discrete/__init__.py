"""Diffusion of tokens by masking: paths, bounds, block diffusion and samplers."""

from .blocks import (
    BlockDiffusion as BlockDiffusion,
    block_mask as block_mask,
    exact_block_bound as exact_block_bound,
    one_pass as one_pass,
    training_mask as training_mask,
)
from .drawing import (
    draw_tokens as draw_tokens,
    draw_tokens_at as draw_tokens_at,
    nucleus as nucleus,
)
from .masking import (
    Masking as Masking,
    Schedule as Schedule,
    cosine_masking as cosine_masking,
    is_masked as is_masked,
    linear_masking as linear_masking,
    log_probabilities as log_probabilities,
    mask_exactly as mask_exactly,
    polynomial_masking as polynomial_masking,
    subs as subs,
    token_losses as token_losses,
)
from .objectives import (
    MaskedCount as MaskedCount,
    MaskedDiffusion as MaskedDiffusion,
    NextToken as NextToken,
    TokenDenoiser as TokenDenoiser,
    exact_bound as exact_bound,
    masked_sum as masked_sum,
    moved as moved,
    time_of as time_of,
)
from .samplers import (
    AbstractTokenSampler as AbstractTokenSampler,
    Ancestral as Ancestral,
    EntropyBounded as EntropyBounded,
    InBlocks as InBlocks,
    Ordered as Ordered,
    Score as Score,
    Threshold as Threshold,
    TokenPlan as TokenPlan,
    at_random as at_random,
    certainty as certainty,
    drawn as drawn,
    likeliest as likeliest,
    margin as margin,
    padded_plan as padded_plan,
)
from .sampling import (
    TokenSamples as TokenSamples,
    guide_prompt as guide_prompt,
    sample_blocks as sample_blocks,
    sample_next_tokens as sample_next_tokens,
    sample_tokens as sample_tokens,
    step_keys as step_keys,
)
