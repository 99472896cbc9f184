"""The denoiser and the decoder as ONNX, run by ONNX Runtime on batches of two sizes."""

from types import SimpleNamespace

import jax
import numpy as np
import onnx
import pytest

from eqxldm.models import AutoencoderKL, DiT, UNet
from experiments.export.onnx import named_inputs, quantize_onnx, save_onnx, session
from experiments.export.states import SHOWN, States
from experiments.train.conditions import Labels
from experiments.train.config import Config, DiffusionConfig, SamplingConfig
from experiments.train.methods import make_method
from experiments.train.sampling import Trained
from experiments.train.terminal import UserError

from helpers import filled, relative_error

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
SHAPE = (4, 4, 4)
PIXELS = SimpleNamespace(decode=lambda z: 0.5 * z)


@pytest.fixture(scope="module")
def vae():
    sizes = dict(channels=(4, 8), blocks=1, groups=2, attention=True)
    return filled(lambda: AutoencoderKL(1, 4, **sizes, key=jax.random.key(0)))


def test_onnx_runtime_gives_the_same(vae, tmp_path, record_property):
    sizes = dict(patch_size=2, depth=2, width=16, num_heads=2, num_classes=3)
    dit = filled(lambda: DiT(SHAPE, **sizes, key=jax.random.key(0)))
    paths = save_onnx(dit, vae, SHAPE, np.int32(0), tmp_path)
    rng, found = np.random.default_rng(0), {}
    for n in (1, 5):
        x, t = rng.normal(size=(n, *SHAPE)).astype(np.float32), np.full(n, 0.3, np.float32)
        labels = np.arange(n, dtype=np.int32) % 4
        for path, given, expected in (
            (paths[0], named_inputs(x, t, labels), jax.vmap(dit)(x, t, labels)),
            (paths[1], dict(z=x), jax.vmap(vae.decode)(x)),
        ):
            (out,) = session(path).run(None, given)
            error = float(relative_error(out, expected))
            assert error < 2e-5, (path.name, n, error)
            found[path.stem] = max(error, found.get(path.stem, 0.0))
    record_property("ONNX", found)
    with pytest.raises(UserError, match="this network has none but its ends"):
        quantize_onnx(tmp_path, [])


def test_convolutions_of_integers_are_nearly_the_same(tmp_path, record_property):
    sizes = dict(channels=(8,), blocks=1, attention_levels=(False,), groups=4, num_classes=3)
    unet = filled(lambda: UNet(4, **sizes, key=jax.random.key(0)))
    method = make_method(Config(diffusion=DiffusionConfig(learned_range=False)))
    condition = Labels(3, 3)
    trained = Trained(PIXELS, unet, SHAPE, condition.null)
    states = States.of(method, SamplingConfig(steps=10), trained, condition)
    assert states.x.shape[:1] == states.t.shape == (10,) and set(states.cond) == {0, 1, 2, 3}
    whole = save_onnx(unet, PIXELS, SHAPE, np.int32(0), tmp_path)[0]
    small = quantize_onnx(tmp_path, states.calibration())
    rows = states.table(method, {"float32": whole, "int8": small}).splitlines()
    off = [float(cell) for cell in rows[3].split("|")[3 : 3 + len(SHOWN)]]
    assert rows[2].split("|")[3].strip() == "0.0000" and 0 < max(off) < 0.1, rows
    graph = onnx.load(small).graph
    convolutions = sum(node.op_type == "Conv" for node in graph.node)
    integers = [i for i in graph.initializer if i.data_type == onnx.TensorProto.INT8]
    assert sum(len(i.dims) == 4 for i in integers) == convolutions - 2 > 0  # all but both ends
    record_property("ONNX, int8", {"eps": max(off)})
