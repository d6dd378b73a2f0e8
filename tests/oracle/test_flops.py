"""FLOPs by arithmetic equal PyTorch's count, forward and backward, on small models of every kind."""

import diffusers
import pytest
import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from digzsl_jax import flops
from digzsl_jax.models import clip, ml_decoder, unet, vae, vit
from tests.oracle import fid_inception, torch_ml_decoder

TOWER = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2)
UNETS = {
  "first": dict(sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
                cross_attention_dim=24, attention_head_dim=2,
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")),
  "second": dict(sample_size=8, block_out_channels=(8, 16, 16), layers_per_block=2, norm_num_groups=8,
                 cross_attention_dim=20, attention_head_dim=(1, 2, 4), use_linear_projection=True,
                 down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
                 up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"))}


def counted(call, *to):
  """FLOPs forward, and with tensors backward to them."""
  with sdpa_kernel(SDPBackend.MATH):  # of products that are counted one by one
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(bool(to)):
      out = call()
    if not to:
      return counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
      out.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", UNETS)
@pytest.mark.parametrize("side", [8, 12])
def test_unet(name, side):
  model = diffusers.UNet2DConditionModel(**UNETS[name]).eval().requires_grad_(False)
  config = unet.UNetConfig.from_json(dict(model.config))
  x, text = torch.randn(1, 4, side, side), torch.randn(1, 7, config.cross_attention_dim)
  call = lambda: model(x, 500, text).sample
  assert flops.unet(config, side, side, 7).forward == counted(call)
  text.requires_grad_()
  assert flops.unet_backward(config, side, side, 7, latents=False) == counted(call, text)
  x.requires_grad_()
  assert flops.unet_backward(config, side, side, 7, latents=True) == counted(call, x, text)


@pytest.mark.parametrize("layers", [1, 2])
def test_vae(layers):
  model = diffusers.AutoencoderKL(block_out_channels=(8, 16, 24), layers_per_block=layers, norm_num_groups=8,
                                  down_block_types=("DownEncoderBlock2D",) * 3,
                                  up_block_types=("UpDecoderBlock2D",) * 3).eval().requires_grad_(False)
  config = vae.VAEConfig.from_json(dict(model.config))
  z, images = torch.randn(1, 4, 6, 10), torch.randn(1, 3, 24, 40)
  work = flops.vae_decoder(config, 6, 10)
  assert work.forward == counted(lambda: model.decode(z).sample)
  z.requires_grad_()
  assert work.backward == counted(lambda: model.decode(z).sample, z)
  assert flops.vae_encoder(config, 24, 40).forward == counted(lambda: model.encode(images).latent_dist.mean)


def test_text():
  model = transformers.CLIPTextModel(transformers.CLIPTextConfig(vocab_size=50, **TOWER)).eval().requires_grad_(False)
  config = clip.TextConfig.from_json(model.config.to_dict())
  assert flops.text(config, 11).forward == counted(lambda: model(torch.arange(11)[None])[0])


@pytest.mark.parametrize("kind", ["clip", "vit"])
def test_vision(kind):
  sizes = dict(TOWER, image_size=24, patch_size=4)
  images = torch.randn(1, 3, 24, 24)
  if kind == "clip":
    model = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(projection_dim=14, **sizes))
    work = flops.vision(clip.VisionConfig(**sizes), 24, 14)
    call = lambda: model(images).image_embeds
  else:
    model = transformers.ViTModel(transformers.ViTConfig(**sizes), add_pooling_layer=False)
    work = flops.vision(vit.ViTConfig(**sizes), 24)
    call = lambda: model(images).last_hidden_state
  model.eval().requires_grad_(False)
  assert work.forward == counted(call)
  images.requires_grad_()
  # The class position alone is judged, but PyTorch goes back through all of the last layer.
  assert work.backward == counted(call, images)


def test_inception():
  model = fid_inception.Inception().eval().requires_grad_(False)
  assert flops.inception_v3().forward == counted(lambda: model(torch.randn(1, 3, 299, 299)))


@pytest.mark.parametrize("classes", [5, 30])
def test_ml_decoder(classes):
  model = torch_ml_decoder.fixed(classes, 12, inputs=48, width=64)  # training: evaluation takes uncounted short cuts
  inner = model.decoder.layers[0].linear1.out_features
  config = ml_decoder.MLDecoderConfig(classes=classes, groups=12, inputs=48, width=64, feed_forward=inner)
  assert flops.ml_decoder(config, 15, 0).forward == counted(lambda: model(torch.randn(1, 48, 3, 5)))
