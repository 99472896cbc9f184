"""The two networks of a run, alike but for the causal mask, and their training."""

from typing import Any

from eqxldm.discrete import BlockDiffusion, MaskedCount, MaskedDiffusion, Masking, NextToken
from eqxldm.models import TokenTransformer
from eqxldm.nn import save_narrow
from eqxldm.training import adamw, make_loss

from ..train.methods import warmup_cosine
from ..train.stages import Stages
from .config import Config
from .corpus import Corpus

STAGES = ("masked", "twin")


def make_network(config: Config, vocabulary: int, stage: str, *, key: Any) -> TokenTransformer:
    """The network of a stage; `vocabulary` counts [MASK], which begins the twin's texts."""
    return TokenTransformer(
        vocabulary,
        depth=config.depth,
        width=config.width,
        num_heads=config.num_heads,
        max_length=config.length,
        causal=stage == "twin",
        remat=save_narrow,
        key=key,
    )


def objective_of(config: Config, mask_id: int, stage: str) -> Any:
    path = Masking(mask_id)
    if stage == "twin":
        return NextToken(mask_id)
    if config.objective == "block":
        return BlockDiffusion(path, config.block_size)
    return MaskedCount(path) if config.objective == "count" else MaskedDiffusion(path)


def train_network(config: Config, stage: str, corpus: Corpus, stages: Stages) -> TokenTransformer:
    """The averaged network of a stage, off the mesh."""
    mask_id, batch_size = corpus.vocabulary.mask_id, config.batch_size
    rate = warmup_cosine(config.learning_rate, config.steps, min(config.warmup, config.steps - 1))
    return stages.average(
        stage,
        lambda: make_network(config, mask_id + 1, stage, key=stages.key(f"{stage}/model")),
        adamw(rate, b2=0.99, weight_decay=config.weight_decay, clip_norm=1.0),
        make_loss(objective_of(config, mask_id, stage)),
        corpus.batches(config.length, batch_size, **stages.order(stage, batch_size)),
        config,
        ema_decay=config.ema_decay,
    )
