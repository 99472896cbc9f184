"""The two networks of a run, alike but for the causal mask, and their training."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from eqxldm.discrete import BlockDiffusion, MaskedCount, MaskedDiffusion, Masking, NextToken
from eqxldm.distributed import all_gather
from eqxldm.models import TokenTransformer
from eqxldm.sharding import build_placed, own_rows
from eqxldm.training import adamw, exponential, init_state, make_loss, make_train_step

from ..train.loop import Settings, run_stage
from ..train.methods import warmup_cosine
from ..train.run import RunFolder
from ..train.streams import stream_key, stream_seed
from ..train.telemetry import Telemetry
from ..train.terminal import Signals
from .config import Config, Train
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
        remat=None,  # so small a network keeps what its backward pass needs
        key=key,
    )


def objective_of(config: Config, mask_id: int, stage: str) -> Any:
    path = Masking(mask_id)
    if stage == "twin":
        return NextToken(mask_id)
    if config.objective == "block":
        return BlockDiffusion(path, config.block_size)
    return MaskedCount(path) if config.objective == "count" else MaskedDiffusion(path)


def train_network(
    command: Train, stage: str, corpus: Corpus, run: RunFolder, mesh: Mesh, signals: Signals
) -> tuple[TokenTransformer, dict[str, float]]:
    """The averaged network of a stage on the host, and how long it took."""
    config, mask_id = command.config, corpus.vocabulary.mask_id
    rate = warmup_cosine(config.learning_rate, config.steps, min(config.warmup, config.steps - 1))
    optimizer = adamw(rate, b2=0.99, weight_decay=config.weight_decay, clip_norm=1.0)
    key = stream_key(config.seed, f"{stage}/model")
    build = lambda: init_state(
        make_network(config, mask_id + 1, stage, key=key), optimizer, num_emas=1
    )
    _, static = eqx.filter_eval_shape(build)
    state = build_placed(lambda: build()[0], mesh)
    loss = make_loss(objective_of(config, mask_id, stage))
    step = make_train_step(loss, static, optimizer, ema_decays=(exponential(config.ema_decay),))
    batches = corpus.batches(
        config.length,
        config.batch_size,
        seed=stream_seed(config.seed, f"{stage}/data"),
        rows=own_rows(config.batch_size, mesh),
    )
    settings = Settings(config.batch_size, command.checkpoint_every, unit="windows")
    with Telemetry(run, command.log) as telemetry:
        state, timings = run_stage(
            stage,
            [(config.steps, step)],
            state,
            batches,
            settings,
            key=stream_key(config.seed, f"{stage}/step"),
            mesh=mesh,
            run=run,
            signals=signals,
            telemetry=telemetry,
        )
    average = jax.device_get(all_gather(state.ema[0], mesh))  # off the mesh, for what follows
    return eqx.combine(jax.tree.map(jnp.asarray, average), static), timings
