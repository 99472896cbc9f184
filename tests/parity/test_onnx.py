"""The denoiser and the decoder as ONNX, run by ONNX Runtime on batches of two sizes."""

import jax
import numpy as np
import onnxruntime
import pytest

from eqxldm.models import AutoencoderKL, DiT
from experiments.export.onnx import save_onnx

from helpers import filled, relative_error

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def test_onnx_runtime_gives_the_same(tmp_path, record_property):
    sizes = dict(patch_size=2, depth=2, width=16, num_heads=2, num_classes=3)
    dit = filled(lambda: DiT((4, 4, 4), **sizes, key=jax.random.key(0)))
    vae = dict(channels=(4, 8), blocks=1, groups=2, attention=True)
    vae = filled(lambda: AutoencoderKL(1, 4, **vae, key=jax.random.key(0)))
    paths = save_onnx(dit, vae, (4, 4, 4), np.int32(0), tmp_path)
    rng, found = np.random.default_rng(0), {}
    for n in (1, 5):
        x, t = rng.normal(size=(n, 4, 4, 4)).astype(np.float32), np.full(n, 0.3, np.float32)
        labels = np.arange(n, dtype=np.int32) % 4
        for path, given, expected in (
            (paths[0], dict(x_t=x, t=t, cond=labels), jax.vmap(dit)(x, t, labels)),
            (paths[1], dict(z=x), jax.vmap(vae.decode)(x)),
        ):
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            (out,) = session.run(None, given)
            error = float(relative_error(out, expected))
            assert error < 2e-5, (path.name, n, error)
            found[path.stem] = max(error, found.get(path.stem, 0.0))
    record_property("ONNX", found)
