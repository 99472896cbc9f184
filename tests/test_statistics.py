"""What evaluators compute of features: merged moments, kernels, scores, reference files."""

import numpy as np
import pytest

from eqxldm import metrics
from eqxldm.metrics.reference import Gaussian

RNG = np.random.default_rng(0)
X = RNG.standard_normal((60, 5)) * [1, 2, 3, 0, 1] + 100
Y = RNG.standard_normal((40, 5)) + 101


@pytest.mark.parametrize("size", [1, 7, 60])
def test_moments_do_not_depend_on_how_features_come(size):
    whole = metrics.moments_of(X)
    found = metrics.stream_moments(X[i : i + size] for i in range(0, len(X), size))
    assert found.n == 60
    np.testing.assert_allclose(found.mean, X.mean(0), rtol=1e-14)
    np.testing.assert_allclose(found.covariance, np.cov(X.T), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found.scatter, whole.scatter, rtol=1e-12, atol=1e-10)


def test_shards_merge_in_any_order_and_an_empty_one_changes_nothing():
    a, b, c = (metrics.moments_of(part) for part in np.split(X, [11, 30]))
    merge = metrics.merge_moments
    one, other = merge(merge(a, b), c), merge(c, merge(b, a))
    np.testing.assert_allclose(one.scatter, other.scatter, rtol=1e-12, atol=1e-10)
    empty = metrics.moments_of(X[:0])
    for both in (merge(a, empty), merge(empty, a)):
        np.testing.assert_array_equal(both.mean, a.mean)
        np.testing.assert_array_equal(both.scatter, a.scatter)
    assert merge(empty, empty).n == 0


def test_the_scatter_of_far_features_keeps_its_digits():
    """Where the mean square minus the squared mean has none left."""
    far = 1e9 + np.arange(8.0)[:, None]
    parts = metrics.stream_moments(far[i : i + 3] for i in range(0, 8, 3))
    assert parts.covariance[0, 0] == pytest.approx(6.0, rel=1e-9)


def test_too_few_samples_are_said():
    one = metrics.moments_of(X[:1])
    with pytest.raises(ValueError, match="need at least 2 examples, got 1"):
        _ = one.covariance
    with pytest.raises(ValueError, match="d = 5 as in x"):
        metrics.frechet_distance(X, Y[:, :4])
    with pytest.raises(ValueError, match="not finite"):
        metrics.frechet_distance(X, np.where(Y > 101, np.nan, Y))
    with pytest.raises(ValueError, match="subsets of 50, of 60 real and 40 fake"):
        metrics.kid(X, Y, subset_size=50)
    with pytest.raises(ValueError, match="3 samples cannot be divided into 10"):
        metrics.inception_score(X[:3], splits=10)
    with pytest.raises(ValueError, match="a set of features is empty"):
        metrics.cmmd(X, Y[:0])
    with pytest.raises(ValueError, match="k_density must be 1 or more and below both counts"):
        metrics.manifold_scores(X, Y[:4], k=3)


def test_a_gaussian_distance_is_of_the_moments_alone():
    x, y = metrics.gaussian_moments(X), metrics.gaussian_moments(Y)
    assert metrics.gaussian_distance(*x, *y) == metrics.frechet_distance(X, Y)
    assert metrics.gaussian_distance(*x, *x) < 1e-6


def test_kid_of_whole_sets_is_its_formula():
    kernel = lambda a, b: (a @ b / len(a) + 1) ** 3
    pairs = lambda s: [kernel(a, b) for i, a in enumerate(s) for j, b in enumerate(s) if i != j]
    x, y = X[:12] - 100, Y[:12] - 100
    between = [kernel(a, b) for a in x for b in y]
    expected = np.mean(pairs(x)) + np.mean(pairs(y)) - 2 * np.mean(between)
    found = metrics.kid(x, y, subsets=3, subset_size=12)
    assert found.mean == pytest.approx(expected, rel=1e-10) and found.std < 1e-10 * expected


def test_kid_is_unbiased_and_its_error_is_of_the_subsets():
    x = RNG.standard_normal((400, 4)).astype(np.float32)
    found = metrics.kid(x[:200], x[200:], subsets=50, subset_size=50)
    assert abs(found.mean) < 3 * found.std and found.std > 0
    assert metrics.kid(x[:200], x[200:] + 1, subsets=50, subset_size=50).mean > 10 * found.std


@pytest.mark.parametrize("block", [7, 2048])
def test_cmmd_is_its_formula(block):
    unit = lambda f: f / np.linalg.norm(f, axis=1, keepdims=True)
    x, y = unit(X - 100), unit(Y - 101)
    mean = lambda a, b: np.mean(np.exp(-((a[:, None] - b[None]) ** 2).sum(-1) / (2 * 0.25)))
    expected = 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))
    found = metrics.cmmd(3 * x, y / 2, sigma=0.5, block=block)
    assert found == pytest.approx(expected, rel=1e-10) and found > 0


def test_the_inception_score_is_its_formula_in_parts_of_either_kind():
    logits = 2 * RNG.standard_normal((25, 6)).astype(np.float32)
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(1, keepdims=True)
    score = lambda q: np.exp(np.mean(np.sum(q * np.log(q / q.mean(0)), 1)))
    parts = [score(p[i : i + 10]) for i in (0, 10, 20)]
    found = metrics.inception_score(logits, part=10)
    assert found == pytest.approx((np.mean(parts), np.std(parts)), rel=1e-9)
    splits = [score(p[i * 25 // 4 : (i + 1) * 25 // 4]) for i in range(4)]
    assert metrics.inception_score(logits, splits=4).mean == pytest.approx(np.mean(splits))
    shuffled = metrics.inception_score(logits, rng=np.random.default_rng(1))
    assert shuffled.mean == pytest.approx(score(p))
    huge = metrics.inception_score(1000 * logits)
    assert 1 < huge.mean <= 6


def test_density_and_coverage_are_their_formulas():
    real, fake, k = X[:, :3] - 100, 0.7 * (Y[:, :3] - 101), 4
    distance = lambda a, b: np.linalg.norm(a[:, None] - b[None], axis=-1)
    radii = np.sort(distance(real, real), 1)[:, k]
    held = distance(real, fake) < radii[:, None]
    expected = (held.sum() / (k * len(fake)), held.any(1).mean())
    for block in (7, 1024):
        found = metrics.density_coverage(real, fake, k=k, block=block)
        assert found == pytest.approx(expected)
    same = metrics.manifold_scores(real, real)
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)


def test_distances_in_half_precision_are_near_and_go_to_float32_beyond_its_range():
    x, y = (RNG.standard_normal((80, 16)) + a for a in (0, 0.3))
    whole, half = (metrics.manifold_scores(x, y, half=half) for half in (False, True))
    assert np.allclose(whole, half, atol=0.1)
    # Distances of more than 65504: without the way out all would be infinite, and 1.
    large = metrics.manifold_scores(300 * x, 300 * y, half=True)
    assert large == pytest.approx(whole, abs=1e-6)


def test_reference_files_are_those_of_adm(tmp_path):
    path = tmp_path / "ref.npz"
    pooled, spatial = (Gaussian(*metrics.gaussian_moments(f)) for f in (X, Y[:, :2]))
    metrics.write_reference(path, pooled, spatial)
    with np.load(path) as file:
        assert set(file.files) == {"mu", "sigma", "mu_s", "sigma_s"}
        np.testing.assert_array_equal(file["sigma_s"], spatial.covariance)
    found = metrics.read_reference(path)
    assert not found.has_images and found.pooled is not None and found.spatial is not None
    np.testing.assert_array_equal(found.pooled.mean, pooled.mean)
    np.savez(path, arr_0=np.zeros((3, 4, 4, 3), np.uint8), mu=X[0].astype("f4"), sigma=np.eye(5))
    found = metrics.read_reference(path)
    assert found.has_images and found.spatial is None


@pytest.mark.parametrize(
    "arrays, message",
    [
        (dict(mu=np.zeros(3)), r"need mu \(d,\) and sigma \(d, d\), got mu \(3,\)"),
        (dict(mu=np.zeros(3), sigma=np.eye(2)), r"got mu \(3,\), sigma \(2, 2\)"),
        (dict(mu=np.zeros(2, int), sigma=np.eye(2)), "must be floats"),
        (dict(mu=np.array([{}, 1]), sigma=np.eye(2)), "no npz of arrays"),
    ],
)
def test_a_wrong_reference_is_named(tmp_path, arrays, message):
    np.savez(tmp_path / "ref.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        metrics.read_reference(tmp_path / "ref.npz")
    (tmp_path / "ref.npz").write_bytes(b"PK\x03\x04 no zip")
    with pytest.raises(ValueError, match="no npz"):
        metrics.read_reference(tmp_path / "ref.npz")
