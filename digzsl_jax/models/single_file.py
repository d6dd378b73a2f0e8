"""Stable Diffusion 1.x and 2.x in one `.safetensors` file, in the names of their first releases.

The denoiser has the names of the latent-diffusion code (`model.diffusion_model.`), and so has the autoencoder
(`first_stage_model.`); the text tower has those of transformers in 1.x (`cond_stage_model.transformer.`) and of
OpenCLIP in 2.x (`cond_stage_model.model.`). Here they become the names of a diffusers folder.
"""

import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping

import jax.numpy as jnp
import numpy as np
from flax import nnx

from digzsl_jax.models import hub
from digzsl_jax.models.variants import VARIANTS

PREFIXES = {"model.diffusion_model.": "unet", "first_stage_model.": "vae",
            "cond_stage_model.transformer.": "text_encoder", "cond_stage_model.model.": "text_encoder"}
WHAT = {"unet": "denoiser", "vae": "autoencoder", "text_encoder": "text encoder"}
# What else such files hold: the training's noise schedule, and a slow average of the denoiser's weights.
UNUSED = {"alphas_cumprod", "alphas_cumprod_prev", "betas", "log_one_minus_alphas_cumprod", "logvar",
          "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2", "posterior_variance",
          "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod",
          "sqrt_recipm1_alphas_cumprod", "cond_stage_model.model.logit_scale", "cond_stage_model.model.text_projection"}
UNUSED_PREFIX = "model_ema."
CONTEXT = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"  # its inputs are the text's

_SCHEDULER = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000,
              "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "prediction_type": "epsilon"}
_PNDM = _SCHEDULER | {"_class_name": "PNDMScheduler", "skip_prk_steps": True}
_DDIM_V = _SCHEDULER | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}


def _release(family: str, unet: str, scheduler: Mapping) -> dict[str, Mapping]:
  parts = {"unet": unet, "vae": "sd.vae", "text_encoder": f"{family}.text_encoder"}
  return {part: VARIANTS[name].config for part, name in parts.items()} | {"scheduler": scheduler}


# Configs of the releases by part; `scheduler` is the shipped `scheduler_config.json`.
CONFIGS = {"sd15": _release("sd15", "sd15.unet", _PNDM), "sd21_base": _release("sd21", "sd21.unet", _PNDM),
           "sd21": _release("sd21", "sd21-768.unet", _DDIM_V)}
_PREDICTION = {"epsilon": "epsilon", "v": "v_prediction"}  # of the metadata field modelspec.prediction_type

_UNET_LAYERS = {"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
                "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out"}
_UNET_RESNET = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj",
                "out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "conv_shortcut"}
_VAE_TOP = {"conv_in": "conv_in", "conv_out": "conv_out", "norm_out": "conv_norm_out"}
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_OPEN_CLIP = {"token_embedding": "embeddings.token_embedding", "ln_final": "final_layer_norm"}
_OPEN_CLIP_LAYER = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
                    "attn.out_proj": "self_attn.out_proj"}

Sources = list[tuple[str, Callable[[np.ndarray], np.ndarray]]]  # names that a tensor gives, and the piece for each


def _whole(tensor: np.ndarray) -> np.ndarray:
  return tensor


def _linear(tensor: np.ndarray) -> np.ndarray:
  """The autoencoder's attention is written as convolutions over single pixels."""
  return tensor[:, :, 0, 0] if tensor.shape[2:] == (1, 1) else tensor


def _third(number: int) -> Callable[[np.ndarray], np.ndarray]:
  """Queries, keys or values of OpenCLIP's joint projection."""
  return lambda tensor: tensor[number * (len(tensor) // 3):(number + 1) * (len(tensor) // 3)]


def _unet(key: str, config: Mapping) -> Sources:
  path, _, leaf = key.rpartition(".")
  if path in _UNET_LAYERS:
    return [(f"{_UNET_LAYERS[path]}.{leaf}", _whole)]
  found = re.fullmatch(r"(?:(input|output)_blocks\.(\d+)|middle_block)\.(\d)\.(.+)", path)
  if not found:
    return []
  side, number, place, layer = found.groups()
  if side is None:
    block, index = "mid_block", int(place) // 2
  else:  # a level is its resnets and a change of size downwards, one more resnet upwards; conv_in counts too
    level, index = divmod(int(number) - (side == "input"), config["layers_per_block"] + 1)
    block = f"{'down' if side == 'input' else 'up'}_blocks.{level}"
  if layer in ("op", "conv"):
    layer = f"{'downsamplers' if layer == 'op' else 'upsamplers'}.0.conv"
  elif layer in _UNET_RESNET:
    layer = f"resnets.{index}.{_UNET_RESNET[layer]}"
  else:
    layer = f"attentions.{index}.{layer}"
  return [(f"{block}.{layer}.{leaf}", _whole)]


def _vae(key: str, config: Mapping) -> Sources:
  path, _, leaf = key.rpartition(".")
  if path in ("quant_conv", "post_quant_conv"):
    return [(key, _whole)]
  side, _, path = path.partition(".")
  if side not in ("encoder", "decoder"):
    return []
  if path in _VAE_TOP:
    return [(f"{side}.{_VAE_TOP[path]}.{leaf}", _whole)]
  if found := re.fullmatch(r"mid\.attn_1\.(\w+)", path):
    layer = _VAE_ATTENTION.get(found[1])
    return [(f"{side}.mid_block.attentions.0.{layer}.{leaf}", _linear)] if layer else []
  if found := re.fullmatch(r"mid\.block_([12])\.(\w+)", path):
    block, layer = f"mid_block.resnets.{int(found[1]) - 1}", found[2]
  elif found := re.fullmatch(r"(down|up)\.(\d+)\.(?:block\.(\d+)\.(\w+)|(?:down|up)sample\.conv)", path):
    way, level, number, layer = found.groups()
    if way == "up":  # counted from the image inwards
      level = len(config["block_out_channels"]) - 1 - int(level)
    block = f"{way}_blocks.{level}." + (f"resnets.{number}" if layer else f"{way}samplers.0")
    layer = layer or "conv"
  else:
    return []
  return [(f"{side}.{block}.{'conv_shortcut' if layer == 'nin_shortcut' else layer}.{leaf}", _whole)]


def _text(key: str, config: Mapping) -> Sources:
  return [(key, _whole)]


def _open_clip(key: str, config: Mapping) -> Sources:
  path, _, leaf = key.rpartition(".")
  if key == "positional_embedding":
    return [("text_model.embeddings.position_embedding.weight", _whole)]
  if path in _OPEN_CLIP:
    return [(f"text_model.{_OPEN_CLIP[path]}.{leaf}", _whole)]
  found = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", path)
  if not found:
    return []
  layer = f"text_model.encoder.layers.{found[1]}"
  if found[2] in _OPEN_CLIP_LAYER:
    return [(f"{layer}.{_OPEN_CLIP_LAYER[found[2]]}.{leaf}", _whole)]
  if found[2] == "attn" and leaf.startswith("in_proj_"):
    leaf = leaf.removeprefix("in_proj_")
    return [(f"{layer}.self_attn.{name}_proj.{leaf}", _third(number)) for number, name in enumerate("qkv")]
  return []


_RENAME = dict(zip(PREFIXES, (_unet, _vae, _text, _open_clip)))


class Renamed(Mapping):
  """Tensors under other names, each read when it is asked for."""

  def __init__(self, tensors: Mapping[str, np.ndarray]):
    self._tensors, self._sources = tensors, {}

  def add(self, name: str, key: str, piece: Callable[[np.ndarray], np.ndarray]) -> bool:
    """Whether `name` is new, which is `piece` of the tensor `key`."""
    return self._sources.setdefault(name, (key, piece)) == (key, piece)

  def __getitem__(self, name: str) -> np.ndarray:
    key, piece = self._sources[name]
    return piece(self._tensors[key])

  def __iter__(self) -> Iterator[str]:
    return iter(self._sources)

  def __len__(self) -> int:
    return len(self._sources)


def split(tensors: Mapping[str, np.ndarray], configs: Mapping[str, Mapping]) -> dict[str, Renamed]:
  """The tensors of each part under the names of a diffusers folder; `UNUSED` ones are left out.

  Args:
    tensors: of a single file, under its names.
    configs: an entry of `CONFIGS`.

  Raises:
    ValueError: one message with the names that belong to no part, or to a parameter that is already there.
  """
  parts = {part: Renamed(tensors) for part in WHAT}
  last = f"cond_stage_model.model.transformer.resblocks.{configs['text_encoder']['num_hidden_layers']}."
  unknown = []
  for key in tensors:
    # Stable Diffusion 2 reads the states before OpenCLIP's last layer.
    if key in UNUSED or key.startswith((UNUSED_PREFIX, last)):
      continue
    prefix = next((prefix for prefix in PREFIXES if key.startswith(prefix)), None)
    part = PREFIXES.get(prefix)
    sources = _RENAME[prefix](key.removeprefix(prefix), configs[part]) if prefix else []
    if not sources or not all(parts[part].add(name, key, piece) for name, piece in sources):
      unknown.append(key)
  if unknown:
    raise ValueError(f"{len(unknown)} tensors belong to no part of Stable Diffusion 1.x or 2.x: "
                     f"{', '.join(sorted(unknown)[:8])}{', ...' * (len(unknown) > 8)}")
  return parts


class SingleFile:
  """Such a file, and beside it the folders `tokenizer` and, where it is needed, `scheduler` of its repository.

  Attributes:
    configs: what is known of its release, an entry of `CONFIGS`, with its own scheduler if there is one.
  """

  def __init__(self, path: os.PathLike):
    """Reads names, and one tensor to tell the release.

    Raises:
      CheckpointError: the file is absent, damaged or of another model, or its release cannot be told.
    """
    self._path = pathlib.Path(path)
    self._file = hub.Tensors([self._path])
    scheduler = self._path.parent / "scheduler" / "scheduler_config.json"
    own = hub.read_json(scheduler) if scheduler.is_file() else None
    stated = _PREDICTION.get(self._file.metadata.get("modelspec.prediction_type"))
    try:
      release = _release(self._file, own.get("prediction_type", "epsilon") if own else stated)
      shipped = CONFIGS[release]["scheduler"] | ({"prediction_type": stated} if stated else {})
      self.configs = CONFIGS[release] | {"scheduler": own or shipped}
      self._parts = split(self._file, self.configs)
    except ValueError as error:
      raise hub.CheckpointError(f"{self._path}: {error}") from error

  def load(self, model_type: type, part: str, *, dtype=jnp.float32, **switches) -> nnx.Module:
    """The model of a part, "text_encoder", "unet" or "vae"; arguments and errors as `hub.load`."""
    tensors = self._parts[part]
    if not tensors:
      raise hub.CheckpointError(f"{self._path} holds no {WHAT[part]}: take a file with all of Stable Diffusion, "
                                "or the diffusers folder")
    model = hub.abstract(model_type, self.configs[part], dtype=dtype, **switches)
    return hub.fill(model, tensors, source=f"{self._path} ({WHAT[part]})")


def is_single(path: os.PathLike) -> bool:
  """Whether `path` names a single file and not a folder.

  Raises:
    CheckpointError: it is a file of another kind.
  """
  path = pathlib.Path(path)
  if path.suffix != ".safetensors" and path.is_file():
    raise hub.CheckpointError(f"{path} is no safetensors file; where PyTorch is installed, pickled weights are "
                              f"converted by: python -m digzsl_jax.convert {path} {path.with_suffix('.safetensors')}")
  return path.suffix == ".safetensors"


def _release(tensors: Mapping[str, np.ndarray], prediction: str | None) -> str:
  """The key of `CONFIGS` that fits the width of the text and what the denoiser predicts."""
  if CONTEXT not in tensors:
    raise ValueError(f"no {CONTEXT}, so this is no Stable Diffusion in a single file; one part of a diffusers "
                     "folder belongs into that folder")
  width = tensors[CONTEXT].shape[-1]
  fitting = {name: configs["scheduler"]["prediction_type"] for name, configs in CONFIGS.items()
             if configs["unet"]["cross_attention_dim"] == width}
  if not fitting:
    raise ValueError(f"its denoiser takes text of width {width}, which is neither Stable Diffusion 1.x nor 2.x")
  if len(fitting) > 1:
    fitting = {name: kind for name, kind in fitting.items() if kind == prediction}
  if not fitting:
    raise ValueError("neither weights nor metadata tell whether this Stable Diffusion 2 predicts noise (epsilon, 512 "
                     "pixels) or velocity (v_prediction, 768 pixels): put the folder scheduler/, with "
                     "scheduler_config.json, of the model's repository beside the file")
  return next(iter(fitting))
