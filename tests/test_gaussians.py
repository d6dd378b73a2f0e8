"""Features drawn for classes without images."""

import numpy as np
import pytest
from sklearn.kernel_ridge import KernelRidge

from digzsl_jax import gaussians


def planted(seen=30, unseen=5, each=40, width=12, p=6, noise=0.5, seed=0):
  """Prototypes, and features whose mean is linear in them; the variance of each feature is that of noise."""
  rng = np.random.default_rng(seed)
  prototypes_kp = rng.normal(size=(seen + unseen, p))
  mean_kf = prototypes_kp @ rng.normal(size=(p, width)) + 3
  labels_n = np.repeat(np.arange(seen), each)
  return prototypes_kp, mean_kf, mean_kf[labels_n] + noise * rng.normal(size=(len(labels_n), width)), labels_n


def test_means_and_variances_of_unseen_classes_are_recovered():
  prototypes_kp, mean_kf, features_nf, labels_n = planted()
  drawn_umf = gaussians.draw(features_nf, labels_n, prototypes_kp[:30], prototypes_kp[30:], 4000, seed=1)
  assert drawn_umf.shape == (5, 4000, 12) and drawn_umf.dtype == np.float32
  np.testing.assert_allclose(drawn_umf.mean(1), mean_kf[30:], atol=0.25)
  np.testing.assert_allclose(drawn_umf.std(1), 0.5, atol=0.1)


def test_regression_equals_scikit_learns_at_the_strength_that_leaves_out_best():
  prototypes_kp, mean_kf, _, _ = planted(noise=0)
  values_kf = mean_kf[:30] + np.random.default_rng(2).normal(size=(30, 12))
  centre_p, centre_f = prototypes_kp[:30].mean(0), values_kf.mean(0)
  kernel_kk = (prototypes_kp[:30] - centre_p) @ (prototypes_kp[:30] - centre_p).T
  unit = np.linalg.eigvalsh(kernel_kk).mean()

  def fitted(strength, rows):
    model = KernelRidge(alpha=strength * unit, kernel="linear")
    return model.fit(prototypes_kp[:30][rows] - centre_p, values_kf[rows] - centre_f)

  def left_out(strength):
    errors = [fitted(strength, np.arange(30) != k).predict(prototypes_kp[k:k + 1] - centre_p) + centre_f - values_kf[k]
              for k in range(30)]
    return np.sum(np.square(errors))

  best = min(gaussians.STRENGTHS, key=left_out)
  assert gaussians.STRENGTHS[0] < best < gaussians.STRENGTHS[-1]  # it matters here
  wanted_uf = fitted(best, slice(None)).predict(prototypes_kp[30:] - centre_p) + centre_f
  np.testing.assert_allclose(gaussians.regress(prototypes_kp[:30], values_kf, prototypes_kp[30:]), wanted_uf, atol=1e-9)


@pytest.mark.parametrize("each", [1, 2])
def test_few_images_of_a_class_are_enough(each):
  prototypes_kp, _, features_nf, labels_n = planted(each=each)
  drawn_umf = gaussians.draw(features_nf, labels_n, prototypes_kp[:30], prototypes_kp[30:], 3, seed=0)
  assert np.isfinite(drawn_umf).all()


def test_seed():
  prototypes_kp, _, features_nf, labels_n = planted()
  drawn = [gaussians.draw(features_nf, labels_n, prototypes_kp[:30], prototypes_kp[30:], 3, seed) for seed in (0, 0, 1)]
  np.testing.assert_array_equal(drawn[0], drawn[1])
  assert (drawn[0] != drawn[2]).all()
