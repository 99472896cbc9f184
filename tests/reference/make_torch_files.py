"""Writes torch_new.pth and torch_old.pth, by PyTorch: `python tests/reference/make_torch_files.py`.

Both hold the same: contiguous and transposed tensors, two that share a storage, one without
numbers, and the dtypes of weights.
"""

from collections import OrderedDict
from pathlib import Path

import torch

FOLDER = Path(__file__).parent

base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
state = OrderedDict(
    {
        "plain": base,
        "turned": base.t(),
        "part": base[1:, 2:],
        "half": base.half() + 0.5,
        "brain": base.bfloat16() / 4,
        "whole": torch.tensor([1, -2, 3]),
        "none": torch.zeros(0, 3),
        "number": torch.tensor(2.5),
        "parameter": torch.nn.Parameter(base[0] * 2),
    }
)
torch.save(state, FOLDER / "torch_new.pth")
torch.save(state, FOLDER / "torch_old.pth", _use_new_zipfile_serialization=False)
