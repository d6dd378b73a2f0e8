"""Losses and their gradients against PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from digzsl_jax import losses

TYPES = {"float32": (torch.float32, jnp.float32), "bfloat16": (torch.bfloat16, jnp.bfloat16)}


def reference(logits, targets, gamma_negative, gamma_positive, margin):
  """The formulas of arXiv 2009.14119, weights detached; `targets` are 1 and 0."""
  p = torch.sigmoid(logits.float())
  shifted = (p - margin).clamp(min=0)
  present = (1 - p).detach()**gamma_positive * torch.log(p.clamp(min=1e-8))
  absent = shifted.detach()**gamma_negative * torch.log((1 - shifted).clamp(min=1e-8))
  return -(targets * present + (1 - targets) * absent).sum()


@pytest.mark.parametrize("gammas_and_margin", [(4, 0, 0.05), (4, 1, 0.05), (2, 1, 0.0)], ids=str)
@pytest.mark.parametrize("kind", TYPES)
def test_asymmetric(kind, gammas_and_margin):
  their_type, our_type = TYPES[kind]
  rng = np.random.default_rng(0)
  logits = torch.tensor(rng.normal(0, 4, (16, 40)), dtype=their_type, requires_grad=True)
  targets_bk = rng.integers(0, 2, (16, 40)).astype(np.int8)
  theirs = reference(logits, torch.from_numpy(targets_bk), *gammas_and_margin)
  theirs.backward()
  loss = lambda logits_bk: losses.asymmetric(
      logits_bk, targets_bk, **dict(zip(("gamma_negative", "gamma_positive", "margin"), gammas_and_margin)))
  value, grad_bk = jax.jit(jax.value_and_grad(loss))(jnp.asarray(logits.detach().float().numpy(), our_type))
  assert grad_bk.dtype == our_type
  assert value == pytest.approx(theirs.item(), rel=1e-6)
  tolerance = {"float32": 1e-6, "bfloat16": 2**-7}[kind]  # the gradient itself is rounded to bfloat16
  np.testing.assert_allclose(np.asarray(grad_bk, np.float32), logits.grad.float().numpy(), rtol=tolerance, atol=1e-6)


def test_contrastive_with_its_temperature():
  """CLIP-Decoder's: the scale is `exp(t)`, and t has a gradient."""
  rng = np.random.default_rng(0)
  images, texts = (torch.tensor(rng.normal(size=(8, 6)), dtype=torch.float32, requires_grad=True) for _ in range(2))
  t = torch.tensor(0.1, requires_grad=True)
  unit = torch.nn.functional.normalize
  logits, own = t.exp() * unit(images) @ unit(texts).T, torch.arange(8)
  theirs = (torch.nn.functional.cross_entropy(logits, own) + torch.nn.functional.cross_entropy(logits.T, own)) / 2
  theirs.backward()

  def loss(images_bd, texts_bd, t):
    return losses.clip(images_bd, texts_bd, jnp.exp(t))[0]
  inputs = [jnp.asarray(x.detach().numpy()) for x in (images, texts, t)]
  value, grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*inputs)
  assert value == pytest.approx(theirs.item(), rel=1e-6)
  for ours, x in zip(grads, (images, texts, t)):
    np.testing.assert_allclose(ours, x.grad.numpy(), rtol=1e-5, atol=1e-7)
  assert abs(t.grad.item()) > 1e-3
