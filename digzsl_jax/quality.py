"""How near generated images are to real ones, by the distributions of their features.

  FID   Frechet distance of Gaussians fitted to Inception's features (arXiv 1706.08500)
  KID   squared maximum mean discrepancy of Inception's features, polynomial kernel (arXiv 1801.01401)
  CMMD  the same of CLIP's unit image embeddings, Gaussian kernel (arXiv 2401.09603)

Inception's features come from `models/inception.py`, CLIP's from `models/cdm.py`, whose `streamed` runs either over
many images. FID of few images is far too high (its bias falls with one over their number, and the covariance wants more
images than the 2048 features), so it is for ten thousand images and not for one class; KID has no bias, and CMMD's is
small from about a hundred images on, so these serve for single classes.

Everything here is computed in float64 on the host.

Shapes: n m image, d feature, s subset, r row, k class.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

CMMD_SIGMA, CMMD_SCALE = 10, 1000
BLOCK = 2048  # rows of a kernel's matrix at a time


class Moments:
  """Count, mean and covariance of feature rows that come in batches.

  The covariance is kept as a factor, `covariance = factor.T @ factor / (count - 1)`: the centred rows themselves, or
  a triangle when they are many. So fewer images than features are no special case, only less work.

  Attributes:
    count: rows so far.
    mean_d: their mean.
  """

  def __init__(self, width: int):
    """`width`: d."""
    self.count, self.mean_d = 0, np.zeros(width)
    self._rows = [np.zeros((0, width))]

  def update(self, features_nd: np.ndarray) -> "Moments":
    """Adds a batch; returns itself.

    Raises:
      ValueError: another width, or values that are not finite.
    """
    features_nd = _checked(features_nd)
    if count := len(features_nd):
      self._same_width(features_nd.shape[1])
      mean_d = features_nd.mean(0)
      self._add(count, mean_d, [features_nd - mean_d])
    return self

  def merge(self, other: "Moments") -> "Moments":
    """Adds the rows that `other` has seen; returns itself.

    Raises:
      ValueError: another width.
    """
    if other.count:
      self._same_width(len(other.mean_d))
      self._add(other.count, other.mean_d, other._rows)
    return self

  def factor(self) -> np.ndarray:
    """`[r, d]`, of as many rows as there were, or d where those are fewer."""
    self._compress(len(self.mean_d))
    return np.concatenate(self._rows)

  @property
  def covariance_dd(self) -> np.ndarray:
    """Unbiased.

    Raises:
      ValueError: fewer than two rows.
    """
    _enough(self.count, 2)
    factor_rd = self.factor()
    return factor_rd.T @ factor_rd / (self.count - 1)

  def _same_width(self, width: int) -> None:
    if width != len(self.mean_d):
      raise ValueError(f"features of width {width} where {len(self.mean_d)} are expected: compute all of them with the "
                       "same model")

  def _add(self, count: int, mean_d: np.ndarray, rows: list[np.ndarray]) -> None:
    """Chan, Golub and LeVeque (1979): what the two means differ by is one more row."""
    total, step_d = self.count + count, mean_d - self.mean_d
    between_1d = math.sqrt(self.count * count / total) * step_d[None]
    self._rows = [*self._rows, *rows, *([between_1d] if self.count else [])]
    self.count, self.mean_d = total, self.mean_d + step_d * (count / total)
    self._compress(3 * len(self.mean_d))  # seldom: products of few rows are slow

  def _compress(self, most: int) -> None:
    if sum(map(len, self._rows)) > most:
      self._rows = [_triangle(np.concatenate(self._rows))]


def _triangle(rows_rd: np.ndarray) -> np.ndarray:
  """`[d, d]`: a factor of `rows.T @ rows`."""
  try:
    return np.linalg.cholesky(rows_rd.T @ rows_rd).T
  except np.linalg.LinAlgError:  # the rows leave a direction out; ten times slower
    return np.linalg.qr(rows_rd, mode="r")


def frechet_distance(a: Moments, b: Moments) -> float:
  """`|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2))` of covariances A and B (Dowson and Landau, 1982).

  With `A = F^T F` and `B = G^T G` the trace of the root is the sum of the singular values of `F G^T`: no root of a
  matrix is needed, and nothing is added to a singular covariance.

  Raises:
    ValueError: fewer than two images on a side, or different widths.
  """
  a._same_width(len(b.mean_d))
  (factor_a, trace_a), (factor_b, trace_b) = _scaled_factor(a), _scaled_factor(b)
  root = np.linalg.svd(factor_a @ factor_b.T, compute_uv=False).sum()
  distance = np.sum((a.mean_d - b.mean_d)**2) + trace_a + trace_b - 2 * root
  return max(float(distance), 0.0)  # equal moments leave a rounding error of either sign


def _scaled_factor(moments: Moments) -> tuple[np.ndarray, float]:
  _enough(moments.count, 2)
  factor_rd = moments.factor() / math.sqrt(moments.count - 1)
  return factor_rd, np.sum(factor_rd**2)


class KernelDistance(NamedTuple):
  """Of the subsets; `mean` is KID."""

  mean: float
  std: float


def kernel_distance(real_nd: np.ndarray, generated_md: np.ndarray, *, subsets: int = 100, size: int = 1000,
                    seed: int = 2020) -> KernelDistance:
  """Kernel inception distance: the unbiased squared MMD with the kernel `(x . y / d + 1)^3`, over random subsets.

  The same subsets as torch-fidelity for the same seed (its default is 2020), so the same numbers. Subsets have as
  many images as the smaller side where that has fewer than `size`; of two sides of one size there is then but one
  subset, and `std` is 0. KID can be below 0.

  Args:
    subsets: how many are drawn.
    size: images in each, of either side.

  Raises:
    ValueError: fewer than two images on a side, different widths, or values that are not finite.
  """
  real_nd, generated_md = _checked_pair(real_nd, generated_md, least=2)
  sides = real_nd, generated_md
  size = min(size, *map(len, sides))
  if size == len(real_nd) == len(generated_md):
    subsets = 1
  rng = np.random.RandomState(seed)
  drawn = [[rng.choice(len(side), size, replace=False) for side in sides] for _ in range(subsets)]
  if len(real_nd) * len(generated_md) <= subsets * size**2:  # one kernel of all images is less work than all subsets'
    values = _unbiased_mmd(*sides, *(_members(len(side), rows) for side, rows in zip(sides, zip(*drawn))))
  else:
    every = np.ones((size, 1))
    values = np.concatenate([_unbiased_mmd(*(side[rows_r] for side, rows_r in zip(sides, rows)), every, every)
                             for rows in drawn])
  return KernelDistance(float(np.mean(values)), float(np.std(values)))


def cmmd(real_nd: np.ndarray, generated_md: np.ndarray) -> float:
  """CLIP maximum mean discrepancy: 1000 times the biased squared MMD with `exp(-|x - y|^2 / (2 * 10^2))`.

  Args:
    real_nd: unit image embeddings; the paper's are of CLIP ViT-L/14 at 336 pixels. Numbers of other encoders do not
      compare with the paper's.
    generated_md: of the same encoder.

  Raises:
    ValueError: no images on a side, different widths, values that are not finite, or rows that are no unit vectors.
  """
  real_nd, generated_md = _checked_pair(real_nd, generated_md, least=1)
  for rows in real_nd, generated_md:
    if (off := np.abs(np.linalg.norm(rows, axis=1) - 1).max()) > 1e-3:
      raise ValueError(f"CMMD is of unit embeddings, and a row's norm is {off:.3g} away from 1: divide each row by its "
                       "norm")
  mean = lambda a, b: _kernel_sums(_gaussian_less_one, a, b, *(np.full((len(x), 1), 1 / len(x)) for x in (a, b)))[0]
  return CMMD_SCALE * float(mean(real_nd, real_nd) + mean(generated_md, generated_md) - 2 * mean(real_nd, generated_md))


def scores(real: Mapping[str, np.ndarray], generated: Mapping[str, np.ndarray]) -> dict[str, float]:
  """All that the features allow: `fid`, `kid` and `kid_std` of "inception", `cmmd` of "clip".

  Args:
    real: feature rows of real images by these names, one or both.
    generated: the same of generated images.

  Raises:
    ValueError: other names, or not the same on both sides; and as the distances.
  """
  known = {"inception", "clip"}
  if real.keys() != generated.keys() or not real or real.keys() - known:
    raise ValueError(f"features of real images are {sorted(real)}, of generated ones {sorted(generated)}: both must "
                     f"be the same of {sorted(known)}")
  out = {}
  if "inception" in real:
    sides = _checked_pair(real["inception"], generated["inception"], least=2)
    kid = kernel_distance(*sides)
    fid = frechet_distance(*(Moments(side.shape[1]).update(side) for side in sides))
    out |= {"fid": fid, "kid": kid.mean, "kid_std": kid.std}
  return out | ({"cmmd": cmmd(real["clip"], generated["clip"])} if "clip" in real else {})


def by_class(distance: Callable[[np.ndarray, np.ndarray], float], real_nd: np.ndarray, labels_n: np.ndarray,
             generated_md: np.ndarray, labels_m: np.ndarray, names_k: Sequence[str]) -> dict[str, float]:
  """`distance` of the real and generated images of every class; `cmmd`, or the mean of `kernel_distance`, not FID.

  Args:
    labels_n: positions in `names_k` of the real images' classes.
    labels_m: of the generated images'.

  Raises:
    ValueError: as `distance`, and the message names the class.
  """
  out = {}
  for label, name in enumerate(names_k):
    try:
      out[name] = distance(real_nd[labels_n == label], generated_md[labels_m == label])
    except ValueError as error:
      raise ValueError(f"class {name}: {error}") from error
  return out


def _members(rows: int, subsets: Sequence[np.ndarray]) -> np.ndarray:
  """`[rows, s]`: 1 where a row is in a subset."""
  members_ns = np.zeros((rows, len(subsets)))
  for subset, rows_r in enumerate(subsets):
    members_ns[rows_r, subset] = 1
  return members_ns


def _unbiased_mmd(x_nd: np.ndarray, y_md: np.ndarray, in_ns: np.ndarray, in_ms: np.ndarray) -> np.ndarray:
  """The unbiased squared MMD `[s]` of subsets (arXiv 1801.01401, equation 4), all of one size."""
  size = in_ns[:, 0].sum()
  within = 0
  for rows_nd, members_ns in (x_nd, in_ns), (y_md, in_ms):
    of_itself_n = (np.einsum("nd,nd->n", rows_nd, rows_nd) / rows_nd.shape[1] + 1)**3
    within += _kernel_sums(_cubic, rows_nd, rows_nd, members_ns, members_ns) - of_itself_n @ members_ns
  return within / (size * (size - 1)) - 2 * _kernel_sums(_cubic, x_nd, y_md, in_ns, in_ms) / size**2


def _cubic(x_nd: np.ndarray, y_md: np.ndarray) -> np.ndarray:
  kernel_nm = x_nd @ y_md.T
  kernel_nm /= x_nd.shape[1]
  kernel_nm += 1
  return kernel_nm * kernel_nm * kernel_nm  # NumPy's power of 3 takes ten times as long


def _gaussian_less_one(x_nd: np.ndarray, y_md: np.ndarray) -> np.ndarray:
  """The 1 cancels in the discrepancy, whose digits it would take."""
  squares_n, squares_m = (np.einsum("nd,nd->n", rows, rows) for rows in (x_nd, y_md))
  return np.expm1((2 * x_nd @ y_md.T - squares_n[:, None] - squares_m) / (2 * CMMD_SIGMA**2))


def _kernel_sums(kernel: Callable, x_nd: np.ndarray, y_md: np.ndarray, weights_ns: np.ndarray,
                 weights_ms: np.ndarray) -> np.ndarray:
  """`sum_nm weights_ns kernel(x_n, y_m) weights_ms` for every s, in blocks of rows.

  Of `x_nd` with itself only half of the kernel is computed.
  """
  total_s, symmetric = 0, x_nd is y_md
  for start in range(0, len(x_nd), BLOCK):
    rows, rest = slice(start, start + BLOCK), slice(start if symmetric else 0, None)
    kernel_nm = kernel(x_nd[rows], y_md[rest])
    if symmetric:
      kernel_nm[:, BLOCK:] *= 2
    total_s += np.sum(weights_ns[rows] * (kernel_nm @ weights_ms[rest]), axis=0)
  return total_s


def _checked(features_nd: np.ndarray) -> np.ndarray:
  """In float64.

  Raises:
    ValueError: not rows of finite numbers.
  """
  features_nd = np.asarray(features_nd, np.float64)
  if features_nd.ndim != 2:
    raise ValueError(f"features are rows [n, d], not {list(features_nd.shape)}")
  if not np.isfinite(features_nd).all():
    row = int(np.flatnonzero(~np.isfinite(features_nd).all(1))[0])
    raise ValueError(f"features of image {row} are not finite: look at that image, or compute them in float32")
  return features_nd


def _checked_pair(real_nd: np.ndarray, generated_md: np.ndarray, *, least: int) -> tuple[np.ndarray, np.ndarray]:
  real_nd, generated_md = _checked(real_nd), _checked(generated_md)
  if real_nd.shape[1] != generated_md.shape[1]:
    raise ValueError(f"features of width {real_nd.shape[1]} and {generated_md.shape[1]}: compute both with the same "
                     "model")
  for rows in real_nd, generated_md:
    _enough(len(rows), least)
  return real_nd, generated_md


def _enough(count: int, least: int) -> None:
  if count < least:
    raise ValueError(f"{count} images, but the distance needs at least {least} real and {least} generated ones: add "
                     "images")
