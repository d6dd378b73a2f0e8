"""Writes tensors of diffusers folders under the names of single files, for tests of the way back."""

import re

import numpy as np

VAE = dict(block_out_channels=(8, 16, 24), layers_per_block=1, norm_num_groups=4, latent_channels=4,
           down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3)
UNET = dict(block_out_channels=(8, 16, 24), norm_num_groups=4, attention_head_dim=2, sample_size=8,
            down_block_types=("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2)
TEXT = dict(vocab_size=642, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=6, eos_token_id=19, bos_token_id=18)
SCHEDULER = {"prediction_type": "epsilon"}
TINY = {  # configs by part, as in `single_file.CONFIGS`
  "sd15": dict(unet=UNET | dict(layers_per_block=2, cross_attention_dim=12), vae=VAE, scheduler=SCHEDULER,
               text_encoder=TEXT | dict(hidden_size=12, hidden_act="quick_gelu")),
  "sd21": dict(unet=UNET | dict(layers_per_block=1, cross_attention_dim=16, use_linear_projection=True), vae=VAE,
               scheduler=SCHEDULER, text_encoder=TEXT | dict(hidden_size=16, hidden_act="gelu"))}

SCHEDULE = ("betas", "alphas_cumprod", "sqrt_alphas_cumprod", "posterior_mean_coef2", "log_one_minus_alphas_cumprod")
_RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
           "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
_UNET = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
         "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
_PIXELS = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
              "self_attn.out_proj": "attn.out_proj"}


def unet(tensors: dict, per_level: int) -> dict:
  """`per_level` resnets on the way down."""
  attends = {key.split(".")[1] for key in tensors if re.match(r"up_blocks\.\d+\.attentions", key)}

  def rename(path):
    if path in _UNET:
      return _UNET[path]
    side, *words = path.split(".")
    if side == "mid_block":
      kind, n, *rest = words
      return f"middle_block.1.{'.'.join(rest)}" if kind == "attentions" else f"middle_block.{2 * int(n)}.{resnet(rest)}"
    level, kind, n, *rest = words
    way, first = ("input", 1) if side == "down_blocks" else ("output", 0)
    place = first + int(level) * (per_level + 1) + (per_level if "samplers" in kind else int(n))
    if kind == "downsamplers":
      return f"input_blocks.{place}.0.op"
    if kind == "upsamplers":
      return f"output_blocks.{place}.{2 if level in attends else 1}.conv"
    inner = f"1.{'.'.join(rest)}" if kind == "attentions" else f"0.{resnet(rest)}"
    return f"{way}_blocks.{place}.{inner}"

  resnet = lambda words: _RESNET[".".join(words)]
  return {"model.diffusion_model." + ".".join((rename(path), leaf)): tensor
          for (path, _, leaf), tensor in zip((key.rpartition(".") for key in tensors), tensors.values())}


def vae(tensors: dict, levels: int) -> dict:
  """Attention becomes convolution."""
  def rename(key):
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    key = re.sub(r"mid_block\.attentions\.0\.(.+)\.", lambda m: f"mid.attn_1.{_PIXELS[m[1]]}.", key)
    key = re.sub(r"up_blocks\.(\d)", lambda m: f"up.{levels - 1 - int(m[1])}", key).replace("down_blocks.", "down.")
    key = re.sub(r"\.resnets\.", ".block.", key).replace("conv_shortcut", "nin_shortcut")
    return re.sub(r"(up|down)samplers\.0", r"\1sample", key).replace("conv_norm_out", "norm_out")

  def whole(key, tensor):
    return tensor[:, :, None, None] if ".attentions." in key and tensor.ndim == 2 else tensor
  return {f"first_stage_model.{rename(key)}": whole(key, tensor) for key, tensor in tensors.items()}


def clip(tensors: dict) -> dict:
  """The text tower of 1.x; keys with or without `text_model.`"""
  named = {f"cond_stage_model.transformer.text_model.{key.removeprefix('text_model.')}": tensor
           for key, tensor in tensors.items()}
  return named | {"cond_stage_model.transformer.text_model.embeddings.position_ids": np.arange(77)[None]}


def open_clip(tensors: dict) -> dict:
  """The text tower of 2.x, with one more layer and a projection, which are not used."""
  tensors = {key.removeprefix("text_model."): tensor for key, tensor in tensors.items()}
  named = {"positional_embedding": tensors["embeddings.position_embedding.weight"],
           "token_embedding.weight": tensors["embeddings.token_embedding.weight"],
           "ln_final.weight": tensors["final_layer_norm.weight"], "ln_final.bias": tensors["final_layer_norm.bias"],
           "text_projection": tensors["final_layer_norm.weight"][:, None], "logit_scale": np.float32(1)}
  count = 1 + max(int(key.split(".")[2]) for key in tensors if key.startswith("encoder.layers."))
  for n in range(count + 1):
    old, new = f"encoder.layers.{min(n, count - 1)}.", f"transformer.resblocks.{n}."
    for leaf in "weight", "bias":
      named |= {f"{new}{_OPEN_CLIP[layer]}.{leaf}": tensors[f"{old}{layer}.{leaf}"] for layer in _OPEN_CLIP}
      named[f"{new}attn.in_proj_{leaf}"] = np.concatenate([tensors[f"{old}self_attn.{x}_proj.{leaf}"] for x in "qkv"])
  return {f"cond_stage_model.model.{key}": tensor for key, tensor in named.items()}


def whole(parts: dict, configs: dict, release: str) -> dict:
  """A single file from the tensors of "unet", "vae" and "text_encoder"."""
  text = clip if release == "sd15" else open_clip
  return (unet(parts["unet"], configs["unet"]["layers_per_block"])
          | vae(parts["vae"], len(configs["vae"]["block_out_channels"])) | text(parts["text_encoder"]))


def training_state() -> dict:
  """What a file that was not pruned holds besides."""
  return {name: np.zeros(1000, np.float32) for name in SCHEDULE} | {
    "model_ema.decay": np.float32(0.9999), "model_ema.num_updates": np.int32(5),
    "model_ema.diffusion_modelout2bias": np.zeros(4, np.float32)}
