"""Options that are functions, written down by their names."""

from typing import Any

import jax

from ..models.dit import save_narrow
from ..nn.attention import attend, cudnn_attend
from ..nn.embeddings import LabelEmbedding
from .layout import WeightsError

ATTENTION = {"attend": attend, "cudnn_attend": cudnn_attend}


def policies() -> dict[str | None, Any]:
    """`{name: policy}` of `jax.checkpoint_policies`, and `save_narrow`; None keeps everything.

    >>> policies()["everything_saveable"] is jax.checkpoint_policies.everything_saveable
    True
    """
    return {None: None, "save_narrow": save_narrow, **vars(jax.checkpoint_policies)}


def name_of(function: Any, table: dict[Any, Any], option: str) -> str | None:
    """The name of a function in a table.

    **Raises** `WeightsError` for a function that has none, with the `option` it was given for.

    >>> name_of(attend, ATTENTION, "DiT: attention")
    'attend'
    """
    names = [name for name, known in table.items() if known is function]
    if not names:
        raise WeightsError(
            f"{option} = {function!r} cannot be written down. Known: {list(table)}; "
            "change it for the saving, and set it on the model that is loaded."
        )
    return names[0]


def label_table(embedding: Any, model: str) -> LabelEmbedding | None:
    """The table of labels, or None for a network without.

    **Raises** `WeightsError` for any other `embed_cond`.

    >>> label_table(None, "DiT") is None
    True
    """
    if isinstance(embedding, LabelEmbedding) or embedding is None:
        return embedding
    raise WeightsError(
        f"{model}: embed_cond = {embedding!r} cannot be written down. Save its arrays with "
        "equinox.tree_serialise_leaves, and make the model again from your code."
    )
