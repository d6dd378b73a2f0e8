"""Makes models.npz: tiny models of transformers and diffusers with random weights, inputs and outputs.

Command: python tests/goldens/make_models.py (needs torch, diffusers and transformers).

Keys: "MODEL/config" (the JSON of `config.json`), "MODEL/shapes" (JSON, by the reference's parameter names),
"MODEL/weights" (all parameters in that order, end to end: steps of 1/64, which float16 holds exactly),
"MODEL/inputs/NAME" and "MODEL/outputs/NAME" (float32, images and latents NHWC).
"""

import json
import pathlib
import tempfile

import diffusers
import numpy as np
import safetensors.numpy
import torch
import transformers

SEED = 0
TOWER = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
VISION = TOWER | dict(image_size=8, patch_size=4)
UNET = dict(sample_size=4, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=12,
            norm_num_groups=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
VAE = dict(block_out_channels=(8, 16), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2,
           up_block_types=("UpDecoderBlock2D",) * 2)


def models() -> dict[str, torch.nn.Module]:
  text = transformers.CLIPTextConfig(**TOWER, vocab_size=20, max_position_embeddings=6, bos_token_id=18,
                                     eos_token_id=19, pad_token_id=19)
  return {"text": transformers.CLIPTextModel(text),
          "vision": transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION)),
          "unet_sd15": diffusers.UNet2DConditionModel(**UNET, attention_head_dim=4),
          "unet_sd21": diffusers.UNet2DConditionModel(**UNET, attention_head_dim=[1, 2], use_linear_projection=True),
          "vae": diffusers.AutoencoderKL(**VAE),
          "vit": transformers.ViTModel(transformers.ViTConfig(**VISION), add_pooling_layer=False)}


def randomise(model: torch.nn.Module) -> None:
  """Noise on every parameter, so that none is a neutral 0 or 1, then steps of 1/64."""
  with torch.no_grad():
    for parameter in model.parameters():
      parameter += 0.1 * torch.randn_like(parameter)
      parameter.copy_((parameter * 64).round() / 64)


def saved(model: torch.nn.Module) -> tuple[str, dict[str, np.ndarray]]:
  """Config and weights as they stand in a folder: transformers has other parameter names in memory."""
  with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    [file] = pathlib.Path(folder).glob("*.safetensors")
    weights = safetensors.numpy.load_file(file)
    return (pathlib.Path(folder) / "config.json").read_text(), dict(sorted(weights.items()))


def draw(*shape: int) -> np.ndarray:
  return torch.randn(shape).numpy()


def channels_first(x_bhwc: np.ndarray) -> torch.Tensor:
  return torch.from_numpy(x_bhwc).permute(0, 3, 1, 2)


def channels_last(x_bchw: torch.Tensor) -> torch.Tensor:
  return x_bchw.permute(0, 2, 3, 1)


def run(name: str, model: torch.nn.Module) -> tuple[dict, dict]:
  """Inputs and outputs by name."""
  if name == "text":
    ids_bl = np.array([[18, 3, 7, 19, 19, 19], [18, 5, 19, 4, 0, 0]])
    out = model(torch.from_numpy(ids_bl))
    return {"ids": ids_bl}, {"hidden": out.last_hidden_state, "pooled": out.pooler_output}
  if name.startswith("unet"):
    latents_bhwz, t_b, text_bld = draw(2, 4, 6, 4), np.array([999, 17]), draw(2, 5, 12)
    eps = model(channels_first(latents_bhwz), torch.from_numpy(t_b), torch.from_numpy(text_bld)).sample
    return {"latents": latents_bhwz, "timesteps": t_b, "text": text_bld}, {"eps": channels_last(eps)}
  images_bhwc = draw(2, 8, 8, 3)
  if name == "vae":
    posterior = model.encode(channels_first(images_bhwc)).latent_dist
    outputs = {"mean": posterior.mean, "logvar": posterior.logvar, "decoded": model.decode(posterior.mean).sample}
    return {"images": images_bhwc}, {key: channels_last(value) for key, value in outputs.items()}
  out = model(channels_first(images_bhwc))
  if name == "vision":
    patches = model.post_layernorm(out.last_hidden_state)[:, 1:]
    return {"images": images_bhwc}, {"feature": out.pooler_output, "patches": patches}
  return {"images": images_bhwc}, {"feature": out.last_hidden_state[:, 0], "patches": out.last_hidden_state[:, 1:]}


def main():
  torch.manual_seed(SEED)
  arrays = {}
  for name, model in models().items():
    randomise(model.eval())
    config, weights = saved(model)
    arrays[f"{name}/config"] = np.array(config)
    arrays[f"{name}/shapes"] = np.array(json.dumps({key: value.shape for key, value in weights.items()}))
    arrays[f"{name}/weights"] = np.concatenate([value.ravel() for value in weights.values()]).astype(np.float16)
    with torch.no_grad():
      inputs, outputs = run(name, model)
    arrays |= {f"{name}/inputs/{key}": value for key, value in inputs.items()}
    arrays |= {f"{name}/outputs/{key}": value.contiguous().numpy() for key, value in outputs.items()}
  np.savez_compressed(pathlib.Path(__file__).with_name("models.npz"), **arrays)


if __name__ == "__main__":
  main()
