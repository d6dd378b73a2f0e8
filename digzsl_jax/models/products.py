"""Products of matrices with float32 sums.

Shapes: n rows, x y inputs and outputs, c o the same of a kernel.
"""

import jax
import jax.numpy as jnp


def dot(x: jax.Array, y: jax.Array) -> jax.Array:
  """Of two matrices, with float32 sums put out as they are: XLA:CPU has no fast code for sums put out in 16 bits."""
  return jax.lax.dot(x, y, preferred_element_type=jnp.float32)


def dot_back(x_no: jax.Array, y_co: jax.Array) -> jax.Array:
  """`dot` with the second matrix transposed as it lies."""
  return jax.lax.dot_general(x_no, y_co, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def product(inputs_nx: jax.Array, kernel_xy: jax.Array) -> jax.Array:
  """`inputs @ kernel` in the kernel's type with float32 sums, and so are its gradients."""
  low = lambda x: x.astype(kernel_xy.dtype)
  if kernel_xy.dtype == jnp.float32:
    return dot(low(inputs_nx), kernel_xy)

  @jax.custom_vjp
  def both_low(inputs_nx, kernel_xy):
    return dot(low(inputs_nx), kernel_xy)

  def backward(saved, grad_ny):
    inputs_nx, kernel_xy = saved
    grad_ny = low(grad_ny)
    return dot(grad_ny, kernel_xy.T).astype(inputs_nx.dtype), low(dot(low(inputs_nx).T, grad_ny))

  both_low.defvjp(lambda inputs_nx, kernel_xy: (both_low(inputs_nx, kernel_xy), (inputs_nx, kernel_xy)), backward)
  return both_low(inputs_nx, kernel_xy)
