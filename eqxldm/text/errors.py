"""What is raised for tokenizers that cannot be used, and the check for their libraries."""

from importlib import import_module
from typing import Any


class TokenizerError(ValueError):
    """A tokenizer that cannot be read, or is not one of those that are known."""


def library(name: str) -> Any:
    """The module of this name, of the extra `text`.

    **Raises** `TokenizerError` that says how to install it.

    >>> library("sentencepieces")
    Traceback (most recent call last):
    ...
    eqxldm.text.errors.TokenizerError: tokenizers need sentencepieces, which is not installed: \
pip install 'eqxldm[text]'
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise TokenizerError(
            f"tokenizers need {name}, which is not installed: pip install 'eqxldm[text]'"
        ) from error
