"""Every model against outputs of transformers and diffusers (goldens/make_models.py), without them."""

import json
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx

from digzsl_jax.models import clip, hub, unet, vae, vit

GOLDENS = np.load(pathlib.Path(__file__).parent / "goldens" / "models.npz")


def vision(model, images_bijc):
  feature_bd, out = model(images_bijc)
  return {"feature": feature_bd, "patches": out["patches"]}


def text(model, ids_bl):
  hidden_bld, out = model(ids_bl)
  return {"hidden": hidden_bld, "pooled": out["pooled"]}


def noise(model, latents_bhwz, timesteps_b, text_bld):
  return {"eps": model(latents_bhwz, timesteps_b, text_bld)}


def images(model, images_bhwc):
  mean_bhwz, logvar_bhwz = model.encode(images_bhwc)
  return {"mean": mean_bhwz, "logvar": logvar_bhwz, "decoded": model.decode(mean_bhwz)}


MODELS = {  # class, outputs from inputs in the order of the file, largest absolute difference
  "text": (clip.CLIPTextModel, text, 1e-5), "vision": (clip.CLIPVisionModel, vision, 1e-5),
  "unet_sd15": (unet.UNet2DConditionModel, noise, 1e-5), "unet_sd21": (unet.UNet2DConditionModel, noise, 1e-5),
  "vae": (vae.AutoencoderKL, images, 5e-5), "vit": (vit.ViT, vision, 1e-5)}


def section(name: str) -> dict[str, np.ndarray]:
  return {key.removeprefix(f"{name}/"): GOLDENS[key] for key in GOLDENS.files if key.startswith(f"{name}/")}


def load(kind: type, name: str) -> nnx.Module:
  """The model with the stored weights, put in as from a file."""
  config, shapes = (json.loads(str(GOLDENS[f"{name}/{key}"])) for key in ("config", "shapes"))
  ends = np.cumsum([np.prod(shape, dtype=int) for shape in shapes.values()])
  parts = np.split(GOLDENS[f"{name}/weights"], ends[:-1])
  tensors = {key: part.reshape(shape) for (key, shape), part in zip(shapes.items(), parts, strict=True)}
  return hub.fill(hub.abstract(kind, config), tensors, source=name)


@pytest.mark.parametrize("name", MODELS)
def test_golden(name):
  kind, function, bound = MODELS[name]
  graphdef, params = nnx.split(load(kind, name))
  inputs, wanted = section(f"{name}/inputs"), section(f"{name}/outputs")
  found = jax.jit(lambda params, *inputs: function(nnx.merge(graphdef, params), *inputs))(params, *inputs.values())
  assert found.keys() == wanted.keys()
  for key, want in wanted.items():
    print(f"{name} {key}: {np.abs(found[key] - want).max():.1e} of {np.abs(want).max():.1f}")
    assert np.abs(want).max() > 0.5
    np.testing.assert_allclose(found[key], want, rtol=0, atol=bound, err_msg=key)


def test_every_golden_is_compared():
  assert {key.split("/")[0] for key in GOLDENS.files} == set(MODELS)
