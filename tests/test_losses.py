"""The asymmetric loss: its formula, what is not judged, and the ends of the range; the loss of patches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from digzsl_jax import losses


@pytest.fixture(scope="module")
def value_and_grad():
  return jax.jit(jax.value_and_grad(losses.asymmetric))


def by_hand(logit, target, gammas=(4, 0), margin=0.05):
  p = 1 / (1 + np.exp(-logit))
  shifted = max(p - margin, 0)
  return -((1 - p)**gammas[1] * np.log(p) if target else shifted**gammas[0] * np.log(1 - shifted))


def test_it_is_the_sum_of_the_published_terms(value_and_grad):
  logits_bk, targets_bk = np.random.default_rng(0).normal(0, 2, (3, 4)), np.arange(12).reshape(3, 4) % 2
  value, _ = value_and_grad(logits_bk.astype(np.float32), targets_bk)
  assert value == pytest.approx(sum(map(by_hand, logits_bk.flat, targets_bk.flat)), rel=1e-5)
  got = losses.asymmetric(jnp.float32(logits_bk), targets_bk, gamma_negative=2, gamma_positive=1, margin=0.2)
  want = sum(by_hand(*pair, gammas=(2, 1), margin=0.2) for pair in zip(logits_bk.flat, targets_bk.flat))
  assert got == pytest.approx(want, rel=1e-5)


def test_the_weight_takes_no_part_in_the_gradient(value_and_grad):
  _, grad_bk = value_and_grad(jnp.array([[1.0, 1.0]]), np.array([[1, 0]]))
  p = 1 / (1 + np.exp(-1.0))
  absent = (p - 0.05)**4 * p * (1 - p) / (1 - p + 0.05)
  np.testing.assert_allclose(grad_bk, [[p - 1, absent]], rtol=1e-5)


def test_what_is_not_judged_adds_nothing(value_and_grad):
  logits_bk = jnp.array([[0.3, 1e4, -2.0], [5.0, -1e4, 1.0]])
  targets_bk = np.array([[1, -1, 0], [-1, -1, 1]], np.int8)
  value, grad_bk = value_and_grad(logits_bk, targets_bk)
  judged = targets_bk >= 0
  assert value == pytest.approx(sum(map(by_hand, np.asarray(logits_bk)[judged], targets_bk[judged])), rel=1e-5)
  assert (np.asarray(grad_bk)[~judged] == 0).all() and (np.asarray(grad_bk)[judged] != 0).all()
  again, _ = value_and_grad(logits_bk, targets_bk.astype(np.float32))
  assert again == value


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_logits_far_out_give_the_bounds_of_the_logarithm(value_and_grad, dtype):
  logits_bk = jnp.array([[-1e4, 1e4, 1e4, -1e4, 30.0, -30.0]], dtype)
  value, grad_bk = value_and_grad(logits_bk, np.array([[1, 1, 0, 0, 0, 1]], np.int8))
  assert value.dtype == jnp.float32 and grad_bk.dtype == dtype
  wrong = 0.95**4 * -np.log(0.05)  # an absent class at probability 1
  assert value == pytest.approx(2 * -np.log(1e-8) + 2 * wrong, rel=1e-5)
  np.testing.assert_allclose(np.asarray(grad_bk, np.float32), 0, atol=1e-6)


def test_a_text_is_compared_with_the_patches_that_it_weighs():
  rng = np.random.default_rng(2)
  patches_bld, texts_bd, scale = rng.normal(size=(3, 5, 4)), rng.normal(size=(3, 4)), 6.0
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
  logits = np.empty((3, 3))
  for b, patches_ld in enumerate(unit(patches_bld)):
    for t, text_d in enumerate(unit(texts_bd)):
      weights_l = np.exp(scale * patches_ld @ text_d)
      logits[b, t] = scale * unit(weights_l @ patches_ld) @ text_d
  rows, columns = (np.log(np.exp(x).sum(1)) - np.diag(x) for x in (logits, logits.T))
  loss, accuracy = losses.patch_clip(jnp.float32(patches_bld), jnp.float32(texts_bd), scale)
  assert loss == pytest.approx((rows.mean() + columns.mean()) / 2, rel=1e-5)
  assert accuracy == (logits.argmax(1) == np.arange(3)).mean()
