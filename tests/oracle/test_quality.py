"""FID, KID and CMMD against SciPy's matrix root, scikit-learn's kernels and PyTorch, on correlated features."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pairwise = pytest.importorskip("sklearn.metrics.pairwise")
linalg = pytest.importorskip("scipy.linalg")

from digzsl_jax import quality


def correlated(count, width, seed, shift=0.0):
  """float32 rows, all but a few directions of little variance, some of them skew as after a ReLU."""
  basis = np.random.default_rng(99).normal(size=(width, width)) * np.geomspace(1, 1e-3, width)[:, None]
  rows_nd = (1 + shift) * np.random.default_rng(seed).normal(size=(count, width)) @ basis + shift + 0.4
  rows_nd[:, ::2] = np.maximum(rows_nd[:, ::2], 0)
  return rows_nd.astype(np.float32)


def frechet(a_nd, b_md):
  """pytorch-fid's formula: means, unbiased covariances, root of their product."""
  (mean_a, cov_a), (mean_b, cov_b) = ((rows.mean(0), np.cov(rows, rowvar=False))
                                      for rows in (a_nd.astype(np.float64), b_md.astype(np.float64)))
  root = linalg.sqrtm(cov_a @ cov_b)
  return np.sum((mean_a - mean_b)**2) + np.trace(cov_a) + np.trace(cov_b) - 2 * np.trace(root).real


@pytest.mark.parametrize("count, other, width, tolerance", [
    (400, 300, 24, 1e-9), (2000, 1500, 128, 1e-9), (129, 500, 128, 1e-8),
    (100, 60, 128, 2e-6), (50, 700, 128, 2e-6), (2, 3, 16, 1e-6)])
def test_frechet_distance(count, other, width, tolerance):
  """Of the last three the product is singular, and SciPy's root is off by 1e-7; tests/test_quality.py has such cases of
  known distance to 1e-10."""
  a_nd, b_md = correlated(count, width, 0), correlated(other, width, 1, 0.1)
  ours = quality.frechet_distance(*(quality.Moments(width).update(rows) for rows in (a_nd, b_md)))
  theirs = frechet(a_nd, b_md)
  print(f"{ours:.6f}: {abs(ours - theirs) / theirs:.1e} relative")
  assert theirs > 0.05 and ours == pytest.approx(theirs, rel=tolerance)


def kid(a_nd, b_md, subsets, size, seed):
  """torch-fidelity's loop, the kernel by scikit-learn."""
  rng, values = np.random.RandomState(seed), []
  for _ in range(subsets):
    x = a_nd[rng.choice(len(a_nd), size, replace=False)].astype(np.float64)
    y = b_md[rng.choice(len(b_md), size, replace=False)].astype(np.float64)
    xx, yy, xy = (pairwise.polynomial_kernel(*pair, degree=3, gamma=None, coef0=1) for pair in ((x, x), (y, y), (x, y)))
    others = ~np.eye(size, dtype=bool)
    values.append(xx[others].mean() + yy[others].mean() - 2 * xy.mean())
  return np.mean(values), np.std(values)


@pytest.mark.parametrize("count, other, subsets, size", [(200, 150, 20, 100), (300, 900, 3, 50), (40, 40, 1, 40)])
def test_kernel_distance(monkeypatch, count, other, subsets, size):
  """The kernel of all images, of each subset, and in blocks."""
  monkeypatch.setattr(quality, "BLOCK", 64)
  a_nd, b_md = correlated(count, 32, 0), correlated(other, 32, 1, 0.05)
  ours = quality.kernel_distance(a_nd, b_md, subsets=subsets, size=size, seed=7)
  mean, std = kid(a_nd, b_md, subsets, size, 7)
  print(f"{ours}: {abs(ours.mean - mean) / abs(mean):.1e} relative")
  assert abs(mean) > 1e-3
  assert ours.mean == pytest.approx(mean, rel=1e-9) and ours.std == pytest.approx(std, rel=1e-9, abs=1e-12)


def test_cmmd(monkeypatch):
  monkeypatch.setattr(quality, "BLOCK", 64)
  a_nd, b_md = (torch.nn.functional.normalize(torch.from_numpy(rows).double(), dim=1)
                for rows in (correlated(150, 48, 0), correlated(210, 48, 1, 0.2)))
  kernel = lambda x, y: torch.exp(-torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")**2 / 200).mean()
  theirs = 1000 * (kernel(a_nd, a_nd) + kernel(b_md, b_md) - 2 * kernel(a_nd, b_md)).item()
  ours = quality.cmmd(a_nd.numpy(), b_md.numpy())
  print(f"{ours:.6f}: {abs(ours - theirs) / theirs:.1e} relative")
  assert theirs > 0.05 and ours == pytest.approx(theirs, rel=1e-8)
