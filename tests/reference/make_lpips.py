# Run where torch is installed: python tests/reference/make_lpips.py
"""Writes lpips.npz: LPIPS of narrow random VGG16s, in plain torch after the paper.

The file holds the weights under the published names (float16: the model has exactly these), two
images `x` and `y` in [-1, 1], their `distance`, its five terms, and its gradients `grad.x` and
`grad.y`. All is computed in float64. Made with torch 2.13.0.
"""

from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import conv2d, max_pool2d, relu

WIDTHS = (6, 6, 8, 8, 10)
# torchvision's numbering of the layers of VGG16: convolutions with a ReLU after each, and poolings.
FEATURES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
SHIFT = torch.tensor([-0.030, -0.088, -0.188], dtype=torch.float64)
SCALE = torch.tensor([0.458, 0.448, 0.450], dtype=torch.float64)


def random_weights():
    tensors, width = {}, 3
    for i, (out, layers) in enumerate(zip(WIDTHS, FEATURES, strict=True)):
        for n in layers:
            std = (2 / (9 * width)) ** 0.5
            tensors[f"features.{n}.weight"] = std * torch.randn(out, width, 3, 3)
            tensors[f"features.{n}.bias"] = 0.3 * torch.rand(out)
            width = out
        tensors[f"lin{i}.model.1.weight"] = torch.rand(1, out, 1, 1)
    return {name: tensor.half().double() for name, tensor in tensors.items()}


def features(tensors, image):
    y = (image - SHIFT[:, None, None]) / SCALE[:, None, None]
    for i, layers in enumerate(FEATURES):
        if i:
            y = max_pool2d(y, 2)
        for n in layers:
            weight, bias = tensors[f"features.{n}.weight"], tensors[f"features.{n}.bias"]
            y = relu(conv2d(y, weight, bias, padding=1))
        yield y


def terms(tensors, x, y):
    """The paper's equation 1, a term a layer."""
    for i, (f, g) in enumerate(zip(features(tensors, x), features(tensors, y), strict=True)):
        f, g = (a / (a.norm(dim=1, keepdim=True) + 1e-10) for a in (f, g))
        yield conv2d((f - g) ** 2, tensors[f"lin{i}.model.1.weight"]).mean()


torch.manual_seed(0)
tensors = random_weights()
# Sizes odd and even when they are halved: 19, 9, 4, 2, 1 and 34, 17, 8, 4, 2.
x, y = (2 * torch.rand(2, 1, 3, 19, 34) - 1).double()
x.requires_grad_(True)
y.requires_grad_(True)
values = torch.stack(list(terms(tensors, x, y)))
values.sum().backward()
arrays = {name: tensor.numpy().astype(np.float16) for name, tensor in tensors.items()}
arrays |= {"distance": values.sum().item(), "terms": values.detach().numpy()}
for name, image in dict(x=x, y=y).items():
    arrays[name] = image.detach().numpy()[0].astype(np.float32)
    arrays[f"grad.{name}"] = image.grad.numpy()[0].astype(np.float32)
assert all(np.isfinite(array).all() for array in arrays.values())
smallest = min(f.norm(dim=1).min().item() for image in (x, y) for f in features(tensors, image))
path = Path(__file__).with_name("lpips.npz")
np.savez_compressed(path, **arrays)
print(path, path.stat().st_size, values, "smallest norm", smallest)
