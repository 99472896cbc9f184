"""diffusers' own pipeline behind FastAPI, to compare with: one request at a time, on the CPU.

It needs torch, diffusers and FastAPI, and no JAX: `make bench-serve WITH_DIFFUSERS=1` runs it by
the Python of `make test-parity`.
"""

import io
import sys
import time
from typing import Any

from .one_at_a_time import serve_one_at_a_time


def main(path: str, steps: str, guidance: str) -> None:
    """Serves a folder on a free port, and says which."""
    begun = time.monotonic()
    import torch  # pyright: ignore[reportMissingImports]
    from diffusers import DiffusionPipeline  # pyright: ignore[reportMissingImports]

    pipe: Any = DiffusionPipeline.from_pretrained(path)
    if getattr(pipe, "safety_checker", None) is not None:
        pipe.safety_checker = None  # which our server has none of either
    pipe.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": int(steps), "guidance_scale": float(guidance)}
    labels = "DiT" in type(pipe).__name__

    def make(body):
        generator = torch.Generator().manual_seed(body.get("seed", 0))
        what: dict[str, Any] = {"prompt": body.get("prompt") or ""}
        if labels:
            what = {"class_labels": [body.get("label", 0)]}
        buffer = io.BytesIO()
        pipe(**what, **given, generator=generator).images[0].save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()

    serve_one_at_a_time(make, begun)


if __name__ == "__main__":
    main(*sys.argv[1:])
