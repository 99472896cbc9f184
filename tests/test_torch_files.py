"""PyTorch's files and NumPy's pickles without either's reader: what is read, what is refused."""

import os
import pickle
import shutil
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from eqxldm.pretrained import WeightsError
from eqxldm.pretrained.pickle_data import Call, Global, read_pickle
from eqxldm.pretrained.torch_files import open_arrays, open_torch

REFERENCE = Path(__file__).parent / "reference"

BASE = np.arange(12, dtype=np.float32).reshape(3, 4)
EXPECTED = {
    "plain": BASE,
    "turned": BASE.T,
    "part": BASE[1:, 2:],
    "half": (BASE + 0.5).astype(np.float16),
    "brain": (BASE / 4).astype(ml_dtypes.bfloat16),
    "whole": np.array([1, -2, 3]),
    "none": np.zeros((0, 3), np.float32),
    "number": np.float32(2.5),
    "parameter": 2 * BASE[0],
}
each_form = pytest.mark.parametrize("form", ["new", "old"])


@each_form
def test_a_state_dict_is_read_as_torch_wrote_it(form):
    found = open_torch(REFERENCE / f"torch_{form}.pth")
    assert list(found) == list(EXPECTED)
    for name, tensor in found.items():
        values = tensor.read()
        assert values.dtype == EXPECTED[name].dtype, name
        assert tensor.shape == EXPECTED[name].shape
        assert tensor.floating == (name != "whole")
        np.testing.assert_array_equal(values, EXPECTED[name], name)


@each_form
def test_a_file_that_is_cut_anywhere_is_refused_and_nothing_else_happens(form, tmp_path):
    content, path = (REFERENCE / f"torch_{form}.pth").read_bytes(), tmp_path / "a.pth"
    for size in [*range(0, len(content), 97), len(content) - 1]:
        path.write_bytes(content[:size])
        with pytest.raises(WeightsError):
            for tensor in open_torch(path).values():
                tensor.read()


@each_form
def test_bytes_that_were_changed_give_numbers_or_an_error(form, tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "a.pth"
    content = np.frombuffer((REFERENCE / f"torch_{form}.pth").read_bytes(), np.uint8)
    for _ in range(150):
        damaged = content.copy()
        damaged[rng.integers(len(content), size=3)] = rng.integers(256, size=3)
        path.write_bytes(damaged.tobytes())
        try:
            for tensor in open_torch(path).values():
                tensor.read()
        except WeightsError:
            pass


class Hostile:
    def __reduce__(self):
        return os.mkdir, (os.environ["HOSTILE"],)


@pytest.mark.parametrize("protocol", range(2, 6))
def test_nothing_in_a_pickle_is_called(protocol, tmp_path, monkeypatch):
    monkeypatch.setenv("HOSTILE", str(tmp_path / "made"))
    content = pickle.dumps({"w": Hostile()}, protocol)
    call = read_pickle(content, "here")["w"]
    assert isinstance(call, Call) and call.function == Global(os.mkdir.__module__, "mkdir")
    (tmp_path / "a.ckpt").write_bytes(content)
    with pytest.raises(WeightsError, match=r"a.ckpt: w is no NumPy array of numbers; nothing"):
        open_arrays(tmp_path / "a.ckpt")
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as file:
        file.writestr("a/data.pkl", content)
    with pytest.raises(WeightsError, match=r"a.pth: w is no tensor .* nothing of the file was run"):
        open_torch(tmp_path / "a.pth")
    assert not (tmp_path / "made").exists()
    pickle.loads(content)
    assert (tmp_path / "made").exists()


@pytest.mark.parametrize("protocol", (3, 4))
def test_arrays_of_any_protocol_and_order(protocol, tmp_path):
    arrays = {"a": {"w": BASE, "t": np.asfortranarray(BASE)}, "n": np.array([1, 2], np.int32)}
    (tmp_path / "a.ckpt").write_bytes(pickle.dumps(arrays, protocol))
    found = open_arrays(tmp_path / "a.ckpt")
    np.testing.assert_array_equal(found["a/w"].read(), BASE)
    np.testing.assert_array_equal(found["a/t"].read(), BASE)
    assert not found["n"].floating
    for wrong in ({"w": "text"}, {"w": np.array([None])}, [BASE]):
        (tmp_path / "a.ckpt").write_bytes(pickle.dumps(wrong, protocol))
        with pytest.raises(WeightsError, match="no NumPy array of numbers"):
            open_arrays(tmp_path / "a.ckpt")


def test_files_of_another_kind_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*absent.pth"):
        open_torch(tmp_path / "absent.pth")
    (tmp_path / "a.pth").write_bytes(pickle.dumps(3))
    with pytest.raises(WeightsError, match="is no PyTorch file"):
        open_torch(tmp_path / "a.pth")
    shutil.copy(REFERENCE / "lpips.npz", tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=r"a zip without one data.pkl"):
        open_torch(tmp_path / "a.pth")
    with pytest.raises(WeightsError, match="damaged"):
        read_pickle(b"\x80\x02]K\x01s.", "here")
    with pytest.raises(WeightsError, match="the instruction EXT1"):
        read_pickle(b"\x80\x02\x82\x01.", "here")
