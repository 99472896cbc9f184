"""What `make evaluate SAMPLES=... REFERENCE=...` does."""

import time
from pathlib import Path
from typing import Any

from eqxldm import metrics
from eqxldm.data import cache_dir
from eqxldm.durable import check_is_file, replacing
from eqxldm.metrics.reference import Reference

from ..train.checks import check_writable
from ..train.options import check as check_ranges
from ..train.run import versions, write_json
from ..train.terminal import Signals, UserError, say
from .networks import make_extractor
from .options import Evaluate, check
from .pictures import Pictures, label_balance, open_pictures
from .scores import Side, check_moments, protocol, scores
from .store import stored_features


def evaluate(options: Evaluate) -> dict[str, Any]:
    """Measures, prints, and writes the JSON, which it returns."""
    check_ranges(options)
    check(options)
    Signals()
    assert options.samples is not None and options.reference is not None
    begin = time.monotonic()
    moments = _moments(options.reference)
    if wrong := check_moments(moments, options):
        raise UserError(f"--reference {options.reference}: {wrong}.")
    samples = open_pictures(options.samples, options.size)
    has_images = moments is None or moments.has_images
    reference = open_pictures(options.reference, options.size) if has_images else None
    count = min(options.n or len(samples), len(samples))
    if options.n is not None and options.n > len(samples):
        raise UserError(f"--n {options.n}: there are {len(samples)} samples.")
    if count < 2:
        raise UserError(f"--samples: {count} image; at least 2 are needed to measure anything.")
    out = options.out or beside(options.samples)
    check_writable(out, "--out")
    if options.save_reference is not None:
        check_writable(options.save_reference, "--save-reference")
    extractor = make_extractor(options)
    cache = options.cache or cache_dir() / "features"

    def side(name: str, pictures: Pictures | None, n: int, given: Reference | None) -> Side:
        if pictures is None:
            return Side(None, given, 0)
        stored = stored_features(name, pictures, extractor, n, options.batch, cache)
        return Side(stored, given, n)

    ours = side("samples", samples, count, None)
    theirs = side("reference", reference, 0 if reference is None else len(reference), moments)
    found, notes = scores(ours, theirs, options)
    notes += missing_classes(samples, count)
    if options.save_reference is not None:
        _save_reference(options.save_reference, theirs)
    file = lambda path, pictures: {
        "path": str(path),
        "digest": None if pictures is None else pictures.digest(),
    }
    counted = lambda pictures, n: {
        "images": n,
        "labels": None if pictures is None else label_balance(pictures.labels, n),
    }
    given = {"moments": moments is not None and moments.pooled is not None}
    sides = {
        "samples": counted(samples, count),
        "reference": counted(reference, theirs.count) | given,
    }
    result = {
        "scores": found,
        "notes": notes,
        "protocol": protocol(options, extractor.about) | sides,
        "samples": file(options.samples, samples),
        "reference": file(options.reference, reference),
        "versions": versions(),
        "seconds": time.monotonic() - begin,
    }
    write_json(out, result)
    for name, value in found.items():
        say(f"{name:20} {value:.6g}")
    for note in notes:
        say(f"note: {note}")
    say(f"{out} has them with the protocol.")
    return result


def missing_classes(samples: Pictures, count: int) -> list[str]:
    """What is to be said where the first samples lack classes, as those of class folders do."""
    part, whole = (label_balance(samples.labels, n) for n in (count, None))
    if part is None or whole is None or part["classes"] == whole["classes"]:
        return []
    return [
        f"--n {count}: the first samples are of {part['classes']} of {whole['classes']} classes: "
        "give them all, or samples in mixed order."
    ]


def beside(samples: Path) -> Path:
    """Where the scores of samples go: beside a file, also of a folder named by dots.

    >>> beside(Path("a/b.npz")).as_posix()
    'a/b.metrics.json'
    """
    samples = samples if samples.name.strip(".") else samples.resolve()
    return samples.with_name(f"{samples.stem}.metrics.json")


def _moments(path: Path) -> Reference | None:
    """Those of a reference file; None where it has none, or is a folder."""
    if path.suffix.lower() != ".npz":
        return None
    try:
        check_is_file(path)
        found = metrics.read_reference(path)
    except ValueError as error:
        raise UserError(f"--reference: {error}") from None
    except OSError as error:
        raise UserError(f"--reference {path}: {error.strerror or error}.") from None
    if found.pooled is None and not found.has_images:
        raise UserError(
            f"--reference {path}: has neither images (arr_0) nor moments (mu and sigma)."
        )
    return found if found.pooled is not None or found.spatial is not None else None


def _save_reference(path: Path, side: Side) -> None:
    pooled = side.gaussian("pooled")
    if pooled is None:
        raise UserError("--save-reference: the reference has too few images for moments.")
    with replacing(path) as temporary:
        metrics.write_reference(temporary, pooled, side.gaussian("spatial"))
    say(f"{path} has the reference's moments.")
