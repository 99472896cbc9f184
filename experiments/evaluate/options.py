"""The options of `make evaluate SAMPLES=... REFERENCE=...`, and what is refused of them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from ..train.options import Batch, Range, Side
from ..train.terminal import UserError

FeatureName = Literal["inception", "lpips-vgg", "own", "dinov2", "clip"]
# What each kind of features is read from.
WEIGHTS = {
    "inception": "pt_inception-2015-12-05-6726825d.pth of pytorch-fid",
    "lpips-vgg": "a folder with LPIPS's files (see pretrained.load_lpips)",
    "own": "a finished run's folder, or a Python file with features(images)",
    "dinov2": "a folder of transformers, such as facebook/dinov2-large",
    "clip": "a folder of transformers, such as openai/clip-vit-large-patch14-336",
}


@dataclass(frozen=True)
class Evaluate:
    """Measures samples against a reference by the features of a network."""

    # An npz with uint8 images as arr_0, or images as for training: a folder, tars, parquet.
    samples: Path | None = None
    # The same; or an npz with ADM's moments mu, sigma, mu_s, sigma_s, with images or without.
    reference: Path | None = None
    features: FeatureName = "inception"  # The network whose features are compared.
    weights: Path | None = None  # Its file or folder.
    # How images come to Inception's 299 pixels; FIDs of different ones do not compare.
    resizing: Literal["tf1", "pytorch-fid", "clean-fid"] = "tf1"
    side: Side | None = None  # Pixels that other networks see; by default 224, CLIP's its own.
    size: Side | None = None  # Cut images of a folder by ADM's centre crop to this side.
    n: Annotated[int, Range(2, 10**8)] | None = None  # The first N samples; by default all.
    batch: Batch = 64  # Images in the network at once, on all devices together.
    half: bool = False  # Distances of precision and recall in float16, as ADM's evaluator.
    splits: Annotated[int, Range(1, 1000)] | None = (
        None  # Of the Inception score; else parts of 5000.
    )
    kid_subset: Annotated[int, Range(2, 10**6)] = 1000  # Images in each of KID's 100 subsets.
    # Where features are kept, so that a second call or an interrupted one computes none again.
    cache: Path | None = None
    out: Path | None = None  # The JSON; by default beside the samples.
    save_reference: Path | None = None  # Write the reference's moments as ADM's file.


def check(options: Evaluate) -> None:
    """Refuses what is missing, before anything is read."""
    for name in ("samples", "reference"):
        path = getattr(options, name)
        if path is None:
            raise UserError(f"--{name} (make: {name.upper()}=...) is needed: an npz or a folder.")
        if not path.exists():
            raise UserError(f"--{name}: there is no file or folder {path}.")
    if options.weights is None:
        raise UserError(
            f"--weights (make: WEIGHTS=...) is needed: for {options.features}, "
            f"{WEIGHTS[options.features]}."
        )
    if not options.weights.exists():
        raise UserError(
            f"--weights: there is no {options.weights}. For {options.features} it is "
            f"{WEIGHTS[options.features]}."
        )
    if options.save_reference is not None and options.features != "inception":
        raise UserError(
            f"--save-reference: ADM's file is of Inception's moments, not of {options.features}'s; "
            "the features themselves stay in --cache."
        )
    if options.resizing != "tf1" and options.features != "inception":
        raise UserError("--resizing is for --features inception.")
    if options.side is not None and options.features in ("inception", "own"):
        raise UserError(f"--side: {options.features} has a side of its own.")
