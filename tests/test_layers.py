"""Layers whose computation is not JAX's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from digzsl_jax.models import layers, products

DIMENSIONS = jax.lax.conv_dimension_numbers((1, 1, 1, 1), (1, 1, 1, 1), ("NHWC", "HWIO", "NHWC"))


def both(size, stride, pads):
  """Gradients by (input, kernel) of ours and of JAX's convolution."""
  rng = np.random.default_rng(0)
  x_bijc, kernel = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 7, 6, 3), (size, size, 3, 5)))

  def gradients(convolve):
    def loss(x_bijc, kernel):
      return jnp.sin(convolve(x_bijc, kernel, (stride, stride), pads, dimension_numbers=DIMENSIONS)).sum()
    return jax.grad(loss, (0, 1))(x_bijc, kernel)

  return gradients(layers.convolve), gradients(jax.lax.conv_general_dilated)


@pytest.mark.parametrize("size, stride, pads", [
  (3, 1, ((1, 1), (1, 1))), (1, 1, ((0, 0), (0, 0))), (3, 1, ((0, 1), (2, 0))), (3, 2, ((0, 1), (0, 1)))])
def test_gradients_of_a_convolution(size, stride, pads):
  for ours, theirs in zip(*both(size, stride, pads)):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_gradient_in_a_loop_keeps_the_kernel_in_the_fast_layout():
  def compiled(convolve):
    def loop(x_bijc, kernel, turns):
      out = lambda x_bijc: convolve(x_bijc, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=DIMENSIONS)
      loss = lambda x_bijc: jnp.sin(out(x_bijc)).sum()
      return jax.lax.fori_loop(0, turns, lambda turn, x_bijc: jax.grad(loss)(x_bijc), x_bijc)
    return jax.jit(loop).lower(jnp.zeros((2, 8, 8, 4)), jnp.zeros((3, 3, 4, 4)), jnp.int32(1)).compile().as_text()

  ours, theirs = compiled(layers.convolve), compiled(jax.lax.conv_general_dilated)
  assert ours.count(" convolution(") == 2 and "01io" in ours and "01oi" not in ours
  assert "01oi" in theirs, "JAX's own gradient has become fast: layers.convolve may go"


@pytest.mark.parametrize("rows, is_turned", [(products.ROWS, True), (products.ROWS - 1, False)])
def test_gradient_by_a_kernel_of_few_outputs(rows, is_turned):
  rng = np.random.default_rng(0)
  x_nx, kernel_xy = rng.normal(size=(rows, 12)).astype(np.float32), rng.normal(size=(12, 4)).astype(np.float32)
  gradients = jax.jit(jax.grad(lambda x_nx, kernel_xy: jnp.sin(products.product(x_nx, kernel_xy)).sum(), (0, 1)))
  grad_ny = np.cos(x_nx.astype(np.float64) @ kernel_xy)
  for ours, wanted in zip(gradients(x_nx, kernel_xy), (grad_ny @ kernel_xy.T, x_nx.T @ grad_ny)):
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())
  compiled = gradients.lower(x_nx, kernel_xy).compile().as_text()
  assert any(dot in compiled for dot in ("f32[4,12]{1,0} dot(", "f32[12,4]{0,1} dot(")) == is_turned
