"""The three archives of emoji, of 40 objects of two categories."""

import io
import json
import tarfile

import numpy as np
from PIL import Image

from eqxldm.data import emoji

# 40 objects of two categories, of which the hash holds out some in each style.
OBJECTS = [(f"thing {i}", ("Food & Drink", "Objects")[i % 2]) for i in range(40)]
BYTE_PAIRS = "#version: 0.2\nt h\nth i\nthi n\nthin g</w>\nn o\nno t\nnot o</w>\nb o\n"
COLOURS = {"noto": (250, 0, 0, 255), "fluent": (0, 0, 250, 255)}


def packed(contents, mode="w:gz"):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as tar:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


def picture(colour, side=64, kind="PNG"):
    pixels = np.zeros((side, side, 4), np.uint8)
    pixels[: side // 2] = colour  # what is below can be seen through
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return file.getvalue()


def write_archives(base):
    """The archives of two styles, one of larger pictures; the second lacks the last object."""
    names = [
        dict(name=name.upper(), unified=f"1F{i:03X}-FE0F", category=category)
        for i, (name, category) in enumerate(OBJECTS)
    ]
    names.append(dict(name="TONE", unified="1F3FB", category="Component"))
    keys = [each["unified"].lower() for each in names]
    small, large = picture(COLOURS["noto"]), picture(COLOURS["fluent"], 256, "WEBP")
    noto = {"package/emoji.json": json.dumps(names).encode()}
    noto |= {f"package/img/google/64/{key}.png": small for key in keys}
    noto |= {"package/img/google/sheets/64.png": b"not read"}
    fluent = {f"package/assets/{key}.webp": large for key in keys if key != keys[39]}
    (base / emoji.EMOJI[0].file.name).write_bytes(packed(noto))
    (base / emoji.EMOJI[1].file.name).write_bytes(
        packed({f"package/img/twitter/64/{key}.png": small for key in keys})
    )
    (base / emoji.EMOJI[2].file.name).write_bytes(packed(fluent))
    return base
