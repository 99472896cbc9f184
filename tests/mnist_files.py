"""Small files of MNIST's format, what they hold, and where they come from."""

import functools
import gzip
import hashlib
import http.client
import http.server
import struct
import threading

import numpy as np

from eqxldm.data import (
    DATASETS,
    ImageSource,
    MnistSpec,
    open_mnist,
)
from eqxldm.data.download import (
    Mirror,
    PublishedFile,
)

NAMES = [file.name for file in DATASETS["mnist"].files]


def idx(array):
    array = np.asarray(array, np.uint8)
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def arrays(train=6, test=3, size=4):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (n, size, size)) for n in (train, test)]
    labels = [np.arange(n) % 10 for n in (train, test)]
    return dict(zip(NAMES, (images[0], labels[0], images[1], labels[1]), strict=True))


def md5(content):
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def pack(content):
    return gzip.compress(content, mtime=0)


CONTENTS = {name: idx(array) for name, array in arrays().items()}
PACKED = {f"{name}.gz": pack(content) for name, content in CONTENTS.items()}
FILES = tuple(
    PublishedFile(n, md5(PACKED[f"{n}.gz"]), md5(c), hashlib.sha256(c).hexdigest())
    for n, c in CONTENTS.items()
)


def spec(*sources):
    return MnistSpec("tiny", FILES, sources, tuple("0123456789"))


def fill(folder, contents):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return folder


def splits(*args, **options):
    return [open_mnist(*args, split=split, **options) for split in ("train", "test")]


def check(found):
    expected = arrays()
    for source, names in zip(found, (NAMES[:2], NAMES[2:]), strict=True):
        assert isinstance(source, ImageSource) and source.images.dtype == np.uint8
        np.testing.assert_array_equal(source.images[..., 0], expected[names[0]])
        assert source.labels.dtype == np.int32
        np.testing.assert_array_equal(source.labels, expected[names[1]])


def files_below(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


CACHED = ["tiny", *sorted(f"tiny/{name}" for name in NAMES)]


def mirrors(tmp_path):
    """A fixture that starts mirrors: `mirror(contents)` is a `Mirror` and the requested paths."""
    servers = []

    def start(contents):
        folder, requests = fill(tmp_path / f"mirror{len(servers)}", contents), []

        class Handler(http.server.SimpleHTTPRequestHandler):
            def log_message(self, format, *args):
                pass

            def do_GET(self):
                requests.append(self.path)
                super().do_GET()

        handler = functools.partial(Handler, directory=str(folder))
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = False  # server_close then waits for the handlers
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return Mirror(f"http://127.0.0.1:{server.server_port}/"), requests

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
