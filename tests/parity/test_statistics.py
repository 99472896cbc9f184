"""FID, KID, Inception score, precision and recall against torch-fidelity's of equal features."""

import sys
from functools import cache
from importlib import import_module
from unittest import mock

import numpy as np
import pytest
import torch

from eqxldm import metrics

from harness import Draw, each_configuration

BOUND = 1e-6


@cache
def fidelity(name):
    """A module of torch-fidelity, without the torchvision that only its data sets need."""
    absent = {
        name: mock.MagicMock()
        for name in (
            "torchvision",
            "torchvision.datasets",
            "torchvision.transforms",
            "torchvision.transforms.functional",
        )
    }
    with mock.patch.dict(sys.modules, {} if "torchvision" in sys.modules else absent):
        for module in ("torch_fidelity", f"torch_fidelity.{name}"):
            found = import_module(module)
    return found


@each_configuration
def test_features_have_the_same_statistics(number, record_property):
    draw = Draw("statistics", number)
    width, n, m = draw.between(2, 24), draw.between(40, 120), draw.between(40, 120)
    mix = draw.normal(width, width)
    real, fake = draw.normal(n, width) @ mix, (draw.normal(m, width) + 0.3) @ mix
    # Rounded to float32 as features are, and given in float64: what is compared are the formulas.
    real, fake = real.astype(np.float64), fake.astype(np.float64)
    x, y = torch.from_numpy(real), torch.from_numpy(fake)

    fid = fidelity("metric_fid")
    statistics = (fid.fid_features_to_statistics(f) for f in (y, x))
    expected = {"fid": fid.fid_statistics_to_metric(*statistics, False)[fid.KEY_METRIC_FID]}
    found = {"fid": metrics.frechet_distance(real, fake)}

    kid, size = fidelity("metric_kid"), draw.between(10, 40)
    options = dict(kid_subsets=7, kid_subset_size=size, rng_seed=2020, verbose=False)
    theirs = kid.kid_features_to_metric(y, x, **options)
    expected["kid"], expected["kid std"] = theirs.values()
    rng = np.random.RandomState(2020)
    found["kid"], found["kid std"] = metrics.kid(real, fake, subsets=7, subset_size=size, rng=rng)

    isc, splits = fidelity("metric_isc"), draw.between(1, 10)
    theirs = isc.isc_features_to_metric(y, splits=splits, shuffle=True, rng_seed=2020)
    expected["score"], expected["score std"] = theirs.values()
    rng = np.random.RandomState(2020)
    found["score"], found["score std"] = metrics.inception_score(fake, splits=splits, rng=rng)

    prc, k = fidelity("metric_prc"), draw.between(1, 5)
    options = dict(prc_neighborhood=k, prc_batch_size=37, save_cpu_ram=draw.one(True, False))
    theirs = prc.prc_features_to_metric(y, x, **options, verbose=False)
    expected["precision"], expected["recall"], _ = theirs.values()
    found["precision"], found["recall"] = metrics.precision_recall(real, fake, k=k)

    errors = {
        name: abs(found[name] - value) / max(abs(value), 1e-2) for name, value in expected.items()
    }
    record_property("statistics", errors)
    wrong = {name: (found[name], expected[name]) for name in errors if not errors[name] <= BOUND}
    assert not wrong


def test_few_samples_of_many_features():
    """Where covariances are singular their eigenvalues of a product are no better than 1e-4."""
    draw = Draw("few samples", 0)
    real, fake = (draw.normal(20, 40).astype(np.float64) + a for a in (0, 1))
    fid = fidelity("metric_fid")
    statistics = (fid.fid_features_to_statistics(torch.from_numpy(f)) for f in (real, fake))
    expected = fid.fid_statistics_to_metric(*statistics, False)[fid.KEY_METRIC_FID]
    assert metrics.frechet_distance(real, fake) == pytest.approx(expected, rel=1e-4)
