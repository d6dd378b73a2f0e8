"""Full-size folders load strictly: names and shapes of the PyTorch models, on the meta device, are ours."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from transformers.core_model_loading import revert_weight_conversion

from digzsl_jax.models import clip, dinov2, hub, siglip, taesd, unet, vae, vit
from digzsl_jax.models.variants import VARIANTS


def _vit(config):
  theirs = transformers.ViTForImageClassification if "id2label" in config else transformers.ViTModel
  return theirs(transformers.ViTConfig(**config))


REFERENCES = {
    unet.UNet2DConditionModel: lambda config: diffusers.UNet2DConditionModel(**config),
    vae.AutoencoderKL: lambda config: diffusers.AutoencoderKL(**config),
    taesd.AutoencoderTiny: lambda config: diffusers.AutoencoderTiny(**config),
    clip.CLIPTextModel: lambda config: transformers.CLIPTextModel(transformers.CLIPTextConfig(**config)),
    clip.CLIPModel: lambda config: transformers.CLIPModel(transformers.CLIPConfig(**config)),
    vit.ViT: _vit,
    dinov2.Dinov2Model: lambda config: transformers.Dinov2Model(transformers.Dinov2Config(**config)),
    siglip.SiglipModel: lambda config: transformers.SiglipModel(transformers.SiglipConfig(**config)),
}


def in_file(variant):
  """`{key: shape}` of the file that the reference writes, without memory for any tensor."""
  with torch.device("meta"):
    model = REFERENCES[variant.model](variant.config)
  tensors = model.state_dict()
  if isinstance(model, transformers.PreTrainedModel):  # it renames some of its parameters in files
    tensors = revert_weight_conversion(model, tensors)
  assert all(tensor.is_meta and tensor.is_floating_point() for tensor in tensors.values())
  return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


@pytest.mark.parametrize("name", VARIANTS)
def test_names_and_shapes_of_the_file(name):
  variant, keys = VARIANTS[name], in_file(VARIANTS[name])
  model = hub.abstract(variant.model, variant.config, **variant.switches)
  canonical_name = getattr(model, "canonical_name", lambda key: key)
  theirs = {canonical_name(key): shape for key, shape in keys.items() if canonical_name(key) is not None}
  ours = {}
  for path, (_, variable, is_kernel) in hub._variables(model).items():
    shape = np.broadcast_to(False, variable.shape)
    ours[path] = (hub._to_torch(shape) if is_kernel else shape).shape
  assert ours == theirs
  left_out = [key for key in keys if canonical_name(key) is None]
  assert len(theirs) + len(left_out) == len(keys), "two keys are one parameter"
  assert sum(np.prod(keys[key], dtype=int) for key in left_out) == variant.left_out
