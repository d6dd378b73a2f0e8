"""FID, KID and CMMD where the answer is known without another implementation."""

import numpy as np
import pytest

from digzsl_jax import quality


def rows(count, width=6, seed=0):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(count, width)) @ rng.normal(size=(width, width)) + rng.normal(size=width)


def with_moments(mean_d, std_d, turn_dd, count=500):
  """Rows of exactly this mean and the covariance `turn diag(std^2) turn^T`."""
  free_nd = rows(count, len(mean_d))
  free_nd -= free_nd.mean(0)
  white_nd = free_nd @ np.linalg.inv(np.linalg.cholesky(np.cov(free_nd, rowvar=False))).T
  return white_nd * std_d @ turn_dd.T + mean_d


def moments(*batches):
  out = quality.Moments(batches[0].shape[1])
  for batch in batches:
    out.update(batch)
  return out


@pytest.mark.parametrize("count", [3, 6, 7, 18, 19, 200])  # fewer than d, d, up to what is kept, and more
@pytest.mark.parametrize("batch", [1, 5, 200])
def test_moments_of_batches(count, batch):
  rows_nd = rows(count)
  batches = [rows_nd[start:start + batch] for start in range(0, count, batch)]
  half = len(batches) // 2
  merged = moments(rows_nd[:0], *batches[:half]).merge(moments(rows_nd[:0], *batches[half:]))
  for got in moments(*batches), merged:
    assert got.count == count
    np.testing.assert_allclose(got.mean_d, rows_nd.mean(0), rtol=1e-12)
    np.testing.assert_allclose(got.covariance_dd, np.cov(rows_nd, rowvar=False), rtol=1e-9, atol=1e-12)
    assert len(got.factor()) <= max(6, count)


def test_moments_of_features_that_are_constant_or_far_from_zero():
  """Dead features make the covariance singular; the variance of large ones survives."""
  rows_nd = np.concatenate([rows(100), np.full((100, 2), 3.0)], axis=1) + 1e6
  np.testing.assert_allclose(moments(*np.split(rows_nd, 10)).covariance_dd, np.cov(rows_nd, rowvar=False), atol=1e-7)


@pytest.mark.parametrize("std_b", [[2, 1, 0.1, 0.5], [2, 0, 0.1, 0]])
@pytest.mark.parametrize("std_a", [[1, 2, 3, 0.5], [0, 0, 3, 0.5]])
def test_frechet_distance_of_known_gaussians(std_a, std_b):
  """With covariances that commute, singular or not, it is the distance of means and of standard deviations."""
  mean_a, mean_b, std_a, std_b = np.array([[1, 2, 0, -1], [0, 2, 1, 1], std_a, std_b], float)
  turn_dd = np.linalg.qr(rows(4, 4))[0]
  a, b = moments(with_moments(mean_a, std_a, turn_dd)), moments(with_moments(mean_b, std_b, turn_dd))
  want = np.sum((mean_a - mean_b)**2) + np.sum((std_a - std_b)**2)
  assert quality.frechet_distance(a, b) == pytest.approx(want, rel=1e-10)
  assert quality.frechet_distance(b, a) == pytest.approx(want, rel=1e-10)


@pytest.mark.parametrize("count", [4, 300])
def test_frechet_distance_of_equal_sets_is_zero(count):
  a, b = moments(rows(count)), moments(*np.array_split(rows(count)[::-1], 3))
  assert 0 <= quality.frechet_distance(a, b) < 1e-11


def test_kernel_distance_by_hand():
  """x is 0 and 1, y is 2 and 3: kernels are (1 + x y)^3."""
  real, generated = np.array([[0.0], [1.0]]), np.array([[2.0], [3.0]])
  got = quality.kernel_distance(real, generated)
  assert got.mean == pytest.approx(1 + 7**3 - 2 * (1 + 1 + 3**3 + 4**3) / 4) and got.std == 0


def test_kernel_distance_has_no_bias():
  """Of two halves of one set it is about 0, below and above; of other sets it is far more."""
  values = [quality.kernel_distance(rows(400)[::2], rows(400)[1::2], subsets=1, size=50, seed=seed).mean
            for seed in range(30)]
  far = quality.kernel_distance(rows(200), 1.5 * rows(200), size=50).mean
  assert min(values) < 0 < max(values) and abs(np.mean(values)) < far / 20


@pytest.mark.parametrize("block", [1, 7, 2048])
def test_blocks_change_nothing(monkeypatch, block):
  a_nd, b_md = rows(40), rows(30, seed=1)
  a_nd, b_md = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a_nd, b_md))
  kernel = lambda x, y: np.exp(-((x[:, None] - y)**2).sum(-1) / 200).mean()
  monkeypatch.setattr(quality, "BLOCK", block)
  want = 1000 * (kernel(a_nd, a_nd) + kernel(b_md, b_md) - 2 * kernel(a_nd, b_md))
  assert quality.cmmd(a_nd, b_md) == pytest.approx(want, rel=1e-8)
  assert quality.cmmd(a_nd, a_nd[::-1]) == pytest.approx(0, abs=1e-10)


def test_scores_and_classes():
  real, generated = rows(80), rows(60, seed=1)
  unit = {name: x / np.linalg.norm(x, axis=1, keepdims=True) for name, x in (("real", real), ("generated", generated))}
  got = quality.scores({"inception": real, "clip": unit["real"]}, {"inception": generated, "clip": unit["generated"]})
  assert got == {"fid": quality.frechet_distance(moments(real), moments(generated)),
                 "kid": quality.kernel_distance(real, generated).mean,
                 "kid_std": quality.kernel_distance(real, generated).std,
                 "cmmd": quality.cmmd(unit["real"], unit["generated"])}
  assert list(quality.scores({"clip": unit["real"]}, {"clip": unit["generated"]})) == ["cmmd"]
  labels_n, labels_m = np.arange(80) % 2, np.arange(60) % 2
  by_class = quality.by_class(quality.cmmd, unit["real"], labels_n, unit["generated"], labels_m, ["cat", "dog"])
  assert by_class == {"cat": quality.cmmd(unit["real"][::2], unit["generated"][::2]),
                      "dog": quality.cmmd(unit["real"][1::2], unit["generated"][1::2])}


def broken(rows_nd, value=np.nan):
  rows_nd[3, 1] = value
  return rows_nd


@pytest.mark.parametrize("call, said", [
    (lambda: quality.frechet_distance(moments(rows(1)), moments(rows(9))), "1 images, .* at least 2 real"),
    (lambda: quality.frechet_distance(moments(rows(9)), moments(rows(9, 5))), "width 5 where 6"),
    (lambda: moments(rows(9), rows(9, 5)), "width 5 where 6"),
    (lambda: moments(rows(9)).merge(moments(rows(9, 5))), "width 5 where 6"),
    (lambda: moments(broken(rows(9))), "image 3 are not finite"),
    (lambda: quality.Moments(6).covariance_dd, "0 images"),
    (lambda: quality.kernel_distance(rows(9), rows(1)), "1 images"),
    (lambda: quality.kernel_distance(rows(9), broken(rows(9), np.inf)), "image 3 are not finite"),
    (lambda: quality.kernel_distance(rows(9), rows(9, 5)), "width 6 and 5"),
    (lambda: quality.kernel_distance(rows(9)[0], rows(9)), r"rows \[n, d\], not \[6\]"),
    (lambda: quality.cmmd(rows(9), rows(9)), "unit embeddings"),
    (lambda: quality.cmmd(rows(0), rows(9)), "0 images"),
    (lambda: quality.scores({"inception": rows(9)}, {"clip": rows(9)}), "must be the same"),
    (lambda: quality.scores({"vit": rows(9)}, {"vit": rows(9)}), "must be the same"),
    (lambda: quality.by_class(quality.cmmd, np.eye(6), np.zeros(6), np.eye(6), np.ones(6), ["cat"]), "class cat: 0 im"),
])
def test_mistakes(call, said):
  with pytest.raises(ValueError, match=said):
    call()
