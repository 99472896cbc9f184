"""A server for images and for text: requests that differ in everything share the network's calls.

- `text`: the same for masked diffusion of tokens.
- `Generator`: what is served, as functions; `from_pipeline` makes one of a diffusers folder.
- `Engine`: the queue and the slots, a thread that draws. It needs no HTTP.
- `save_bundle`, `load_bundle`: a model as one file, which JAX alone runs; `from_bundle` serves it.
- `serve`: the HTTP server with the page, which needs the extra "serve".

The programs are compiled when the engine starts, and none afterwards.
"""

from typing import TYPE_CHECKING, Any

from .generator import MAP as MAP, Defaults as Defaults, Generator as Generator

if TYPE_CHECKING:
    from .app import make_app as make_app
    from .bundled import from_bundle as from_bundle
    from .engine import Engine as Engine
    from .events import (
        Failure as Failure,
        Forward as Forward,
        Picture as Picture,
        Preview as Preview,
        QueueFull as QueueFull,
    )
    from .export import (
        Bundle as Bundle,
        BundleError as BundleError,
        Exportable as Exportable,
        load_bundle as load_bundle,
        save_bundle as save_bundle,
    )
    from .pipeline import from_pipeline as from_pipeline
    from .programs import Programs as Programs
    from .requests import Limits as Limits, Request as Request, RequestError as RequestError
    from .server import serve as serve

# Imported when they are first named: FastAPI and uvicorn are an extra.
_LAZY = {
    "Bundle": "export",
    "BundleError": "export",
    "Engine": "engine",
    "Exportable": "export",
    "Failure": "events",
    "Forward": "events",
    "Limits": "requests",
    "Picture": "events",
    "Preview": "events",
    "Programs": "programs",
    "QueueFull": "events",
    "Request": "requests",
    "RequestError": "requests",
    "from_bundle": "bundled",
    "from_pipeline": "pipeline",
    "load_bundle": "export",
    "make_app": "app",
    "save_bundle": "export",
    "serve": "server",
}


def __getattr__(name: str) -> Any:
    import importlib

    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
