"""Generation: every draw of noise has an address, whatever the batch and the mesh."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from digzsl_jax import diffusion, mesh, shortcuts
from digzsl_jax.base_workspace import parse
from digzsl_jax.models import stable_diffusion
from digzsl_jax.runs import generate

ADDRESSES = [(3, 0), (3, 1), (5, 0), (40, 7)]  # class, index


@pytest.fixture
def paint(tiny_world, monkeypatch):
  """`paint(addresses, devices)`: images of one prompt by the ancestral Euler sampler, in three calls."""
  sd, schedule = stable_diffusion.load(tiny_world / "sd"), stable_diffusion.load_schedule(tiny_world / "sd")
  graphdef, params = nnx.split(sd)
  monkeypatch.setattr(stable_diffusion.StableDiffusion, "text", lambda sd, ids_bl, *others: jnp.ones(
    (len(ids_bl), ids_bl.shape[1], sd.unet.config.cross_attention_dim)))
  sampler = diffusion.make_sampler(schedule, 3, "euler_ancestral")
  settings = parse(generate.Settings, dict(images=1, sampler="", steps=3, guidance=4.0, batch=2, unet="",
                                           guidance_until=1.0, cache_interval=1, cache_branch=0), "generate")

  def images(addresses, devices=1):
    compiled = generate.compile_sampler(settings, 0, sampler, graphdef, mesh.make(devices))
    words = [np.zeros((len(addresses), 4), np.int32)] * (len(generate.Rows._fields) - 2)  # not read
    found = compiled((params, jnp.zeros(4, jnp.int32)), generate.Rows(*np.array(addresses).T, *words))
    return dict(zip(addresses, np.asarray(found)))
  return images


def test_stochastic_sampling_does_not_depend_on_batch_or_mesh(paint):
  images = paint(ADDRESSES)
  assert all((one != other).any() for one, other in itertools.combinations(images.values(), 2))
  for other in (paint(ADDRESSES[::-1]), paint(ADDRESSES[::-1], devices=2)):
    for address in ADDRESSES:
      np.testing.assert_array_equal(other[address], images[address])


def test_first_noise_and_new_noise_of_each_call_are_apart(paint, monkeypatch):
  def shown(sd, latents_bhwz):  # in a corner of the image, which has three channels and is larger
    b, h, w, _ = latents_bhwz.shape
    return jnp.zeros((b, *sd.image_shape)).at[:, :h, :w].set(jnp.tanh(latents_bhwz[..., :3]))
  monkeypatch.setattr(stable_diffusion.StableDiffusion, "decode", shown)
  drawn = []
  for choose in (lambda noise, fresh: noise, lambda noise, fresh: fresh(jnp.int32(0)),
                 lambda noise, fresh: fresh(jnp.int32(1))):
    monkeypatch.setattr(shortcuts, "sample", lambda unet, text, null, scale, noise, sampler, fresh, shortcuts,
                        choose=choose: choose(noise, fresh))
    drawn += [image[:8, :8] for image in paint(ADDRESSES).values()]
  assert len(drawn) == 3 * len(ADDRESSES)
  assert all((one != other).mean() > 0.9 for one, other in itertools.combinations(drawn, 2))
  root = jax.random.fold_in(jax.random.key(0), generate.NOISE_STREAM)
  noise = jax.random.normal(jax.random.fold_in(jax.random.fold_in(root, 3), 1), (8, 8, 4))[..., :3]
  np.testing.assert_array_equal(drawn[1], jnp.round((jnp.tanh(noise) + 1) * 127.5).astype(np.uint8))
