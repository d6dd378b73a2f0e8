"""Features of unseen classes without any image: Gaussians whose parameters are regressed from class prototypes.

After Verma and Rai, "A Simple Exponential Family Framework for Zero-Shot Learning" (ECML PKDD 2017, arXiv 1707.08040),
in its inductive form with a linear kernel. How strongly the regressions are regularised is chosen by leaving out one
seen class after another, so nothing is left to set.

Shapes: n image, k seen class, u unseen class, f feature, p prototype, m row of a class.
"""

import numpy as np

STRENGTHS = np.logspace(-4, 4, 33)  # of the regularisation, in units of the kernel's mean eigenvalue
FLOOR = 1e-6  # added to variances, in units of their mean


def draw(features_nf: np.ndarray, labels_n: np.ndarray, seen_kp: np.ndarray, unseen_up: np.ndarray, count: int,
         seed: int) -> np.ndarray:
  """`count` feature rows of every unseen class, `[u, m, f]`, float32.

  Mean and logarithm of the variance of each feature in a class are functions of the class's prototype, fitted on the
  seen classes.

  Args:
    features_nf: of images of seen classes.
    labels_n: rows of `seen_kp`; each class has images.
    seen_kp: prototypes of the seen classes.
    unseen_up: of the unseen ones.
  """
  rows = [np.asarray(features_nf[labels_n == label], np.float64) for label in range(len(seen_kp))]
  mean_kf = np.stack([rows_nf.mean(0) for rows_nf in rows])
  # A class of one image has the variance of its neighbours, not none.
  pooled_f = np.mean([rows_nf.var(0) for rows_nf in rows], axis=0)
  var_kf = np.stack([rows_nf.var(0) if len(rows_nf) > 1 else pooled_f for rows_nf in rows])
  log_kf = np.log(var_kf + max(FLOOR * pooled_f.mean(), np.finfo(np.float32).tiny))
  mean_uf, log_uf = (regress(seen_kp, values_kf, unseen_up) for values_kf in (mean_kf, log_kf))
  noise_umf = np.random.default_rng(seed).standard_normal((len(unseen_up), count, mean_kf.shape[1]))
  return (mean_uf[:, None] + noise_umf * np.exp(log_uf / 2)[:, None]).astype(np.float32)


def regress(seen_kp: np.ndarray, values_kf: np.ndarray, unseen_up: np.ndarray) -> np.ndarray:
  """`[u, f]`: kernel ridge regression of centred values, regularised as serves a left-out seen class best.

  But for the centring, the error of a class that is left out has a closed form, `(K + s I)^-1 Y` over the diagonal of
  `(K + s I)^-1`.
  """
  centre_p, centre_f = seen_kp.mean(0, dtype=np.float64), values_kf.mean(0)
  seen_kp, unseen_up, values_kf = seen_kp - centre_p, unseen_up - centre_p, values_kf - centre_f
  eigen_k, vectors_kk = np.linalg.eigh(seen_kp @ seen_kp.T)
  turned_kf = vectors_kk.T @ values_kf
  unit = max(eigen_k.mean(), np.finfo(float).tiny)

  def solved(strength: float) -> tuple[np.ndarray, np.ndarray]:
    inverse_k = 1 / (np.maximum(eigen_k, 0) + strength * unit)
    return (vectors_kk * inverse_k) @ turned_kf, (vectors_kk**2) @ inverse_k

  def left_out_error(strength: float) -> float:
    dual_kf, diagonal_k = solved(strength)
    return float(np.sum((dual_kf / diagonal_k[:, None])**2))

  dual_kf, _ = solved(min(STRENGTHS, key=left_out_error))
  return unseen_up @ seen_kp.T @ dual_kf + centre_f
