"""Every way of convolving gives the same, forwards and backwards, and each is taken where it is meant to be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from digzsl_jax.models import convolution

SAME = convolution.PADDING


def plain(x_bijc, kernel_uvco, strides=(1, 1), padding=SAME):
  return jax.lax.conv_general_dilated(x_bijc, kernel_uvco, strides, padding,
                                      dimension_numbers=("NHWC", "HWIO", "NHWC"))


def results(way, x_bijc, kernel_uvco):
  """Outputs, and the gradients by image and kernel of a weighted sum of them."""
  def weighted(x_bijc, kernel_uvco):
    out_bijo = way(x_bijc, kernel_uvco)
    weights = np.random.default_rng(2).normal(size=out_bijo.shape).astype(np.float32)
    return (weights * out_bijo.astype(jnp.float32)).sum(), out_bijo

  grads, out_bijo = jax.jit(jax.grad(weighted, (0, 1), has_aux=True))(x_bijc, kernel_uvco)
  return [np.asarray(each, np.float32) for each in (out_bijo, *grads)]


def inputs(shape, outputs, taps=3, dtype=jnp.float32):
  rng = np.random.default_rng(0)
  return (jnp.asarray(rng.normal(size=shape), dtype),
          jnp.asarray(rng.normal(size=(taps, taps, shape[-1], outputs)) / taps / shape[-1]**0.5, dtype))


def agree(way, wanted, given, tolerance):
  for ours, theirs in zip(results(way, *given), results(wanted, *(x.astype(jnp.float32) for x in given)), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


@pytest.mark.parametrize("band", [8, 1024])
@pytest.mark.parametrize("shape, outputs", [((2, 4, 4, 5), 7), ((1, 8, 12, 3), 4), ((3, 12, 6, 8), 2)])
@pytest.mark.parametrize("way", [convolution.by_shifts, convolution.winograd])
def test_bands_of_shifts_and_tiles_equal_the_plain_one(monkeypatch, way, shape, outputs, band):
  monkeypatch.setattr(convolution, "BAND", band)
  agree(way, plain, inputs(shape, outputs), 2e-6)


@pytest.mark.parametrize("taps, strides, padding", [
    (3, (1, 1), SAME), (3, (2, 2), SAME), (3, (2, 2), ((0, 1), (0, 1))), (1, (1, 1), ((0, 0), (0, 0)))])
def test_patches_equal_the_plain_one(taps, strides, padding):
  for size in ((2, 4, 6, 5), (1, 7, 5, 3)):
    agree(lambda x, kernel: convolution.by_patches(x, kernel, strides, padding),
          lambda x, kernel: plain(x, kernel, strides, padding), inputs(size, 4, taps), 2e-6)


@pytest.mark.parametrize("way", [
    convolution.by_shifts, lambda x, kernel: convolution.by_patches(x, kernel, (1, 1), SAME)])
def test_sixteen_bits_round_once(way):
  # half of 2**-8 of inputs of the way back, and of what is put out
  agree(way, plain, inputs((2, 6, 6, 16), 8, dtype=jnp.bfloat16), 2**-7)


def test_odd_images_too(monkeypatch):
  monkeypatch.setattr(convolution, "BAND", 8)
  agree(convolution.by_shifts, plain, inputs((2, 5, 7, 3), 4), 2e-6)


def test_choice():
  wide = (3, 3, 640, 640)

  def named(platform, dtype, side, kernel, is_unit=True):
    return convolution.choose(platform, dtype, side * side, (side, side), kernel, is_unit)

  assert named("cpu", jnp.float32, 32, wide) == "winograd"
  assert named("cpu", jnp.float32, 33, wide) == "plain"
  assert named("cpu", jnp.bfloat16, 33, wide) == named("cpu", jnp.bfloat16, 32, wide) == "shifts"
  assert named("cpu", jnp.float32, 8, wide) == named("cpu", jnp.bfloat16, 8, wide, False) == "patches"
  assert named("cpu", jnp.float32, 64, (1, 1, 320, 320)) == "patches"
  assert named("cpu", jnp.float32, 64, (3, 3, 320, 4)) == named("cpu", jnp.float32, 64, (3, 3, 88, 88)) == "plain"
  assert named("cpu", jnp.bfloat16, 32, wide, False) == "patches"
  assert named("cpu", jnp.bfloat16, 256, wide, False) == "plain"
  assert named("cpu", jnp.float32, 64, wide, False) == named("cpu", jnp.float32, 64, (5, 5, 640, 640)) == "plain"
  assert named("gpu", jnp.bfloat16, 8, wide) == named("tpu", jnp.bfloat16, 32, wide) == "plain"


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("strides, side", [((1, 1), 4), ((1, 1), 24), ((2, 2), 8)])
def test_convolve_is_the_plain_one_where_it_chooses(strides, side, dtype):
  x_bijc, kernel_uvco = inputs((1, side, side, 256), 256, dtype=dtype)
  options = dict(dimension_numbers=("NHWC", "HWIO", "NHWC"))
  agree(lambda x, kernel: convolution.convolve(x, kernel, strides, SAME, **options),
        lambda x, kernel: plain(x, kernel, strides), (x_bijc, kernel_uvco), 4e-6 if dtype == jnp.float32 else 2**-7)


def test_tiles_of_kernels_wait_for_their_image():
  """Else those of all layers are there at once."""
  def temporary(layers):
    def run(x_bijc, kernels):
      for kernel in kernels:
        x_bijc = convolution.winograd(x_bijc, kernel)
      return x_bijc

    x_bijc, kernel_uvco = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 8, 8, 64), (3, 3, 64, 64)))
    return jax.jit(run).lower(x_bijc, [kernel_uvco] * layers).compile().memory_analysis().temp_size_in_bytes

  assert temporary(6) < 1.5 * temporary(2)
