"""FLOPs by arithmetic, against PyTorch's FlopCounterMode on the full-size models (torch 2.13, meta tensors)."""

import dataclasses

import pytest

from digzsl_jax import flops
from digzsl_jax.models import clip, ml_decoder, unet, vae, vit
from digzsl_jax.models.variants import VARIANTS


def config(name):
  return VARIANTS[name].config


UNET_1, UNET_2 = (unet.UNetConfig.from_json(config(f"{name}.unet")) for name in ("sd15", "sd21"))
VAE = vae.VAEConfig.from_json(config("sd.vae"))


def text(name):
  return flops.text(clip.TextConfig.from_json(config(f"{name}.text_encoder")), 77).forward


def vision(name, side):
  found = clip.CLIPConfig.from_json(config(name))
  return flops.vision(found.vision_config, side, found.projection_dim).forward


def decoder(classes, labels=0):
  return flops.ml_decoder(ml_decoder.MLDecoderConfig(classes=classes, inputs=2432), 196, labels).forward


@pytest.mark.parametrize("counted, ours", [
  (803, flops.unet(UNET_1, 64, 64, 77).forward), (804, flops.unet(UNET_2, 64, 64, 77).forward),
  (866, flops.unet_backward(UNET_1, 64, 64, 77, latents=False)),
  (929, flops.unet_backward(UNET_1, 64, 64, 77, latents=True)),
  (2515, flops.vae_decoder(VAE, 64, 64).forward), (2549, flops.vae_decoder(VAE, 64, 64).backward),
  (13.3, text("sd15")), (45.1, text("sd21")), (35.1, vision("clip-vit-b16", 224)),
  (162, vision("clip-vit-l14", 224)), (382, vision("clip-vit-l14-336", 336)),
  (123, flops.vision(vit.ViTConfig.from_json(config("vit-l16")), 224).forward), (11.4, flops.inception_v3().forward),
  (1.94, decoder(81)), (2.12, decoder(925)), (1.98, decoder(0, 81)), (10.2, decoder(0, 925)), (11.0, decoder(0, 1006))])
def test_full_size(counted, ours):
  assert ours == pytest.approx(counted * 1e9, rel=0.01)


def test_kinds_of_work():
  work = flops.unet(UNET_1, 64, 64, 77)
  assert [round(part / 1e9) for part in work] == [444, 233, 126]


def test_a_layer_by_hand():
  assert flops.linear(3, 5, 7).forward == 2 * 3 * 5 * 7
  assert flops.convolution(4, 5, 7).forward == 2 * 4 * 9 * 5 * 7
  assert flops.attention(3, 4, 8) == flops.Work(attention=2 * 2 * 3 * 4 * 8)
  assert flops.attention(3, 4, 8).backward == 2 * flops.attention(3, 4, 8).forward
  assert flops.head("mlp", 5, 7, 3).forward == 2 * (5 * 7 + 7 * 3)
  assert flops.head("residual", 5, 7, 3).forward == 2 * (3 * 7 + 7 * 3)
  assert flops.classifier(5, 0, 3).forward == 2 * 5 * 3


def test_odd_latents():
  """13 positions become 7 and 13 again, not 14."""
  narrow = dataclasses.replace(UNET_1, block_out_channels=(32, 32), down_block_types=("DownBlock2D",) * 2,
                               up_block_types=("UpBlock2D",) * 2, heads=(1, 1))
  at = lambda side: flops.unet(narrow, side, side, 77).convolution
  assert at(12) < at(13) < at(14)


def test_tagclip_is_a_tower_and_more():
  tower = clip.CLIPConfig.from_json(config("clip-vit-b16")).vision_config
  whole = flops.vision(tower, 224, 512).forward
  assert whole < flops.tagclip_first(tower, 14, 14, 512, 103).forward < 1.1 * whole
  crop = flops.tagclip_second(tower, 512, 103).forward
  layer = (whole - flops.convolution(196, 3, 768, 16).forward) / 12
  assert whole - layer < crop < whole
