"""Products of matrices with float32 sums.

Shapes: n rows, x y inputs and outputs, c o the same of a kernel.
"""

import jax
import jax.numpy as jnp

from digzsl_jax.models import platforms

ROWS = 2048  # of inputs, from which on a kernel's gradient may be computed transposed on a CPU


def dot(x: jax.Array, y: jax.Array) -> jax.Array:
  """Of two matrices, with float32 sums put out as they are: XLA:CPU has no fast code for sums put out in 16 bits."""
  return jax.lax.dot(x, y, preferred_element_type=jnp.float32)


def dot_back(x_no: jax.Array, y_co: jax.Array) -> jax.Array:
  """`dot` with the second matrix transposed as it lies."""
  return jax.lax.dot_general(x_no, y_co, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def product(inputs_nx: jax.Array, kernel_xy: jax.Array) -> jax.Array:
  """`inputs @ kernel` in the kernel's type with float32 sums, and so are its gradients."""
  low, turned = lambda x: x.astype(kernel_xy.dtype), _is_turned(inputs_nx, kernel_xy)
  if kernel_xy.dtype == jnp.float32 and not turned:
    return dot(low(inputs_nx), kernel_xy)

  @jax.custom_vjp
  def both_low(inputs_nx, kernel_xy):
    return dot(low(inputs_nx), kernel_xy)

  def backward(saved, grad_ny):
    inputs_nx, kernel_xy = saved
    grad_ny = low(grad_ny)
    if turned:  # and kept so by the barrier
      grad_xy = jax.lax.optimization_barrier(dot(grad_ny.T, low(inputs_nx))).T
    else:
      grad_xy = low(dot(low(inputs_nx).T, grad_ny))
    return dot(grad_ny, kernel_xy.T).astype(inputs_nx.dtype), grad_xy

  both_low.defvjp(lambda inputs_nx, kernel_xy: (both_low(inputs_nx, kernel_xy), (inputs_nx, kernel_xy)), backward)
  return both_low(inputs_nx, kernel_xy)


def _is_turned(inputs_nx: jax.Array, kernel_xy: jax.Array) -> bool:
  """Whether the kernel's gradient is computed transposed: up to twice as quick on XLA:CPU for few outputs."""
  (n, x), y = inputs_nx.shape, kernel_xy.shape[1]
  return platforms.platform() == "cpu" and kernel_xy.dtype == jnp.float32 and n >= ROWS and 3 * y <= x
