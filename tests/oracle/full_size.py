"""Writes Stable Diffusion 1.5 and 2.1 at full size with random weights, as PyTorch saves them.

  python -m tests.oracle.full_size sd15 FOLDER
  python -m digzsl_jax.verify --checkpoint FOLDER

About 4.3 GB (sd15) and 5.2 GB (sd21) on disk, and as much memory while it writes.
"""

import pathlib
import sys

import diffusers
import torch
import transformers

from digzsl_jax.data import tokenizer

SCHEDULE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
VAE = dict(block_out_channels=[128, 256, 512, 512], layers_per_block=2, down_block_types=["DownEncoderBlock2D"] * 4,
           up_block_types=["UpDecoderBlock2D"] * 4, sample_size=512)
# The public checkpoints' own numbers; what is not said is diffusers' and transformers' default.
FAMILIES = {
  "sd15": (dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
           dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12),
           diffusers.PNDMScheduler(**SCHEDULE, skip_prk_steps=True)),
  "sd21": (dict(sample_size=96, cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20],
                use_linear_projection=True),
           dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16,
                hidden_act="gelu"),
           diffusers.DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False,
                                   prediction_type="v_prediction")),
}
WORDS = "a an of photo picture painting bird red blue small large with wings in the snow".split()


def write(family: str, folder: pathlib.Path) -> None:
  """Random weights, perturbed so that no parameter is a neutral 0 or 1."""
  unet, text, scheduler = FAMILIES[family]
  parts = {"unet": lambda: diffusers.UNet2DConditionModel(**unet), "vae": lambda: diffusers.AutoencoderKL(**VAE),
           "text_encoder": lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**text))}
  for name, make in parts.items():
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
      for parameter in model.parameters():
        parameter += 0.01 * torch.randn_like(parameter)
    model.save_pretrained(folder / name, max_shard_size="20GB")
  scheduler.save_pretrained(folder / "scheduler")
  tokenizer.train_bpe(WORDS, folder / "tokenizer")


if __name__ == "__main__":
  write(sys.argv[1], pathlib.Path(sys.argv[2]))
