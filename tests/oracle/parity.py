"""What several parity tests need: weights that are not neutral, the other layout of images, and comparisons."""

import jax
import numpy as np
import torch
from flax import nnx


def perturbed(model, noise=0.1):
  """`model` with noise on every parameter, so that none is a neutral 0 or 1."""
  generator = torch.Generator().manual_seed(1)
  with torch.no_grad():
    for parameter in model.parameters():
      parameter += noise * torch.randn(parameter.shape, generator=generator)
  return model.eval()


def to_torch(x_bhwc):
  return torch.from_numpy(np.moveaxis(np.asarray(x_bhwc), -1, 1).copy())


def to_numpy(x_bchw):
  return x_bchw.detach().permute(0, 2, 3, 1).numpy()


def close(ours, theirs):
  """Answers of towers: within 1e-5 of PyTorch's, which are not all nothing."""
  ours, theirs = np.asarray(ours), theirs.detach().numpy()
  assert ours.shape == theirs.shape
  assert np.abs(theirs).max() > 0.01
  print(f"{np.abs(ours - theirs).max():.1e} of {np.abs(theirs).max():.1f}")
  assert np.abs(ours - theirs).max() <= 1e-5


def same_gradient_of_latents(theirs, ours, side):
  """Of the mean square of what two autoencoders decode, from latents of `side` x `side`: within 1e-4 of its size."""
  graphdef, state = nnx.split(ours)
  latents_bhwz = np.random.default_rng(1).normal(size=(2, side, side, 4)).astype(np.float32)
  latents = to_torch(latents_bhwz).requires_grad_()
  (theirs.decode(latents).sample ** 2).mean().backward()
  want_bhwz = to_numpy(latents.grad)

  def loss(latents_bhwz, state):
    return (nnx.merge(graphdef, state).decode(latents_bhwz) ** 2).mean()

  grad_bhwz = jax.jit(jax.grad(loss))(latents_bhwz, state)
  error = np.abs(grad_bhwz - want_bhwz).max() / np.abs(want_bhwz).max()
  print(f"gradient: {error:.1e} relative")
  assert error < 1e-4
