import jax.numpy as jnp
import numpy as np
import pytest

from eqxldm import metrics

RNG = np.random.default_rng(0)


def with_moments(n, mean, covariance):
    """Features whose sample mean and unbiased covariance are exactly these."""
    d = len(mean)
    x = RNG.standard_normal((n, d))
    x -= x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T).reshape(d, d))).T
    values, vectors = np.linalg.eigh(covariance)
    return np.asarray(mean) + x @ (vectors * np.sqrt(np.maximum(values, 0))).T


def random_covariance(d, rank=None):
    a = RNG.standard_normal((d, d if rank is None else rank))
    return a @ a.T


def test_moments_are_exact():
    covariance = random_covariance(3)
    mean, found = metrics.gaussian_moments(with_moments(50, [1.0, 2.0, 3.0], covariance))
    np.testing.assert_allclose(mean, [1, 2, 3], rtol=1e-12)
    np.testing.assert_allclose(found, covariance, rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="need at least 2 examples, got 1"):
        metrics.gaussian_moments(np.ones((1, 3)))


def test_frechet_of_commuting_covariances():
    a, b = np.array([1.0, 4.0, 9.0]), np.array([4.0, 1.0, 0.25])
    q, _ = np.linalg.qr(RNG.standard_normal((3, 3)))
    x = with_moments(60, np.zeros(3), q @ np.diag(a) @ q.T)
    y = with_moments(40, [1.0, -2.0, 0.5], q @ np.diag(b) @ q.T)
    expected = 1 + 4 + 0.25 + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
    assert metrics.frechet_distance(x, y) == pytest.approx(expected, rel=1e-10)


def test_frechet_of_general_covariances_equals_the_matrix_root():
    from scipy.linalg import sqrtm

    a, b = random_covariance(4), random_covariance(4)
    x, y = with_moments(60, np.zeros(4), a), with_moments(60, np.ones(4), b)
    expected = 4 + np.trace(a + b - 2 * np.real(sqrtm(a @ b)))
    assert metrics.frechet_distance(x, y) == pytest.approx(expected, rel=1e-8)


def test_frechet_of_singular_covariances():
    a, b = np.diag([4.0, 0.0, 1.0, 0.0]), np.diag([1.0, 0.0, 0.0, 9.0])
    x, y = with_moments(60, np.zeros(4), a), with_moments(60, np.zeros(4), b)
    # Roots of rounding: sqrt(1e-15) is the accuracy.
    assert metrics.frechet_distance(x, y) == pytest.approx(1 + 1 + 9, abs=1e-6)
    low_rank = with_moments(60, np.zeros(4), random_covariance(4, rank=2))
    assert metrics.frechet_distance(low_rank, low_rank) == pytest.approx(0, abs=1e-6)


def test_frechet_is_symmetric_zero_on_itself_and_takes_float32():
    x = RNG.standard_normal((50, 4)).astype(np.float32)
    y = (2 * RNG.standard_normal((30, 4)) + 1).astype(np.float32)
    there, back = metrics.frechet_distance(x, y), metrics.frechet_distance(y, x)
    assert there == pytest.approx(back, rel=1e-8) and there > 1
    assert 0 <= metrics.frechet_distance(x, x) < 1e-6


def test_frechet_ignores_rotations_and_scales_as_a_square():
    x, y = RNG.standard_normal((50, 4)), RNG.standard_normal((40, 4)) + 1
    q, _ = np.linalg.qr(RNG.standard_normal((4, 4)))
    plain = metrics.frechet_distance(x, y)
    assert metrics.frechet_distance(x @ q, y @ q) == pytest.approx(plain, rel=1e-8)
    assert metrics.frechet_distance(3 * x, 3 * y) == pytest.approx(9 * plain, rel=1e-8)


IMAGES = RNG.random((2, 3, 2, 14, 13)).astype(np.float32)


def test_psnr_equals_its_formula():
    x, y = IMAGES
    expected = -10 * np.log10(np.mean((x.astype(np.float64) - y) ** 2, axis=(1, 2, 3)))
    np.testing.assert_allclose(metrics.psnr(jnp.asarray(x), jnp.asarray(y)), expected, rtol=1e-5)
    assert np.all(np.isposinf(metrics.psnr(jnp.asarray(x), jnp.asarray(x))))


def direct_ssim(x, y):
    """Window by window, in float64."""
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2 = 0.01**2, 0.03**2
    values = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
            ma, mb = np.sum(window * a), np.sum(window * b)
            va, vb = np.sum(window * (a - ma) ** 2), np.sum(window * (b - mb) ** 2)
            cov = np.sum(window * (a - ma) * (b - mb))
            values.append(
                (2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))
            )
    return np.mean(values)


@pytest.mark.parametrize("noise", [1.0, 0.05])
def test_ssim_equals_its_definition(noise):
    x, other = IMAGES.astype(np.float64)
    y = (1 - noise) * x + noise * other
    expected = [
        np.mean([direct_ssim(a, b) for a, b in zip(*p, strict=True)])
        for p in zip(x, y, strict=True)
    ]
    arrays = (jnp.asarray(v, jnp.float32) for v in (x, y))
    np.testing.assert_allclose(metrics.ssim(*arrays), expected, atol=1e-5)


def test_ssim_is_symmetric_and_one_on_equal_images():
    x, y = (jnp.asarray(v) for v in IMAGES)
    np.testing.assert_allclose(metrics.ssim(x, y), metrics.ssim(y, x), rtol=1e-5)
    np.testing.assert_allclose(metrics.ssim(x, x), 1, atol=1e-6)
    with pytest.raises(ValueError, match=r"at least 11 x 11, got \(10, 12\)"):
        metrics.ssim(jnp.ones((1, 1, 10, 12)), jnp.ones((1, 1, 10, 12)))


def brute_force(real, fake, k):
    def share(queries, points):
        inside = 0
        for query in queries:
            for i, point in enumerate(points):
                others = sorted(np.linalg.norm(point - o) for j, o in enumerate(points) if j != i)
                if np.linalg.norm(query - point) <= others[k - 1]:
                    inside += 1
                    break
        return inside / len(queries)

    return share(fake, real), share(real, fake)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("block", [7, 1024])
def test_precision_and_recall_equal_brute_force(k, block):
    real, fake = RNG.standard_normal((30, 3)), 0.5 * RNG.standard_normal((25, 3)) + 0.5
    expected = brute_force(real, fake, k)
    assert metrics.precision_recall(real, fake, k=k, block=block) == pytest.approx(expected)
    assert 0 < expected[0] <= 1 and 0 < expected[1] < 1


def test_precision_and_recall_of_equal_far_and_collapsed_sets():
    x = RNG.standard_normal((30, 3)).astype(np.float32)
    assert metrics.precision_recall(x, x) == (1.0, 1.0)
    assert metrics.precision_recall(x, x + 100) == (0.0, 0.0)
    one_mode = np.concatenate([x[:1]] * 10)
    assert metrics.precision_recall(x, one_mode) == (1.0, pytest.approx(1 / 30))
    swapped = metrics.precision_recall(x + 1, x)
    assert metrics.precision_recall(x, x + 1) == swapped[::-1]


@pytest.mark.parametrize("k", [0, 5])
def test_a_wrong_k_is_refused(k):
    with pytest.raises(ValueError, match=f"k must be 1 or more and below both counts, got {k}"):
        metrics.precision_recall(np.ones((8, 2)), np.ones((5, 2)), k=k)
