"""PyTorch's side of the comparison: `diffusers` and `transformers` on the same folder."""

import pathlib
import sys
import unittest.mock
from collections.abc import Callable, Iterator

# transformers and diffusers take it where it is installed, and PyPI's build does not load beside PyTorch for the CPU.
sys.modules["torchvision"] = None

import diffusers
import numpy as np
import torch
import transformers

from digzsl_jax import checkpoint, files
from digzsl_jax.verify import parts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def to_torch(x_bhwc: np.ndarray) -> torch.Tensor:
  return torch.from_numpy(np.moveaxis(x_bhwc, -1, 1).copy()).to(DEVICE)


def to_numpy(x: torch.Tensor) -> np.ndarray:
  array = x.detach().float().cpu().numpy()
  return np.moveaxis(array, 1, -1) if array.ndim == 4 else array


class Reference:
  """The parts of one folder; each loads what it needs and gives it back when it has been measured."""

  def __init__(self, folder: pathlib.Path, inputs: dict[str, np.ndarray], ids_bl: np.ndarray):
    self.folder, self.inputs, self.ids_bl = folder, inputs, ids_bl

  def _load(self, kind: type, part: str):
    model = kind.from_pretrained(self.folder / part, torch_dtype=torch.float32, local_files_only=True)
    return model.eval().requires_grad_(False).to(DEVICE)

  text_encoder = property(lambda self: self._load(transformers.CLIPTextModel, "text_encoder"))
  unet = property(lambda self: self._load(diffusers.UNet2DConditionModel, "unet"))
  vae = property(lambda self: self._load(diffusers.AutoencoderKL, "vae"))

  @property
  def scheduler(self):
    config = files.read_json(self.folder / "scheduler" / "scheduler_config.json")
    return getattr(diffusers, config["_class_name"]).from_config(config)

  def tokenizer(self) -> Callable:
    words = transformers.AutoTokenizer.from_pretrained(self.folder / "tokenizer")
    return lambda: {"ids": np.array(words(list(parts.TEXTS), padding="max_length", truncation=True,
                                          max_length=self.ids_bl.shape[1]).input_ids)}

  def text(self) -> Callable:
    model, ids_bl = self.text_encoder, torch.from_numpy(self.ids_bl).long().to(DEVICE)
    return no_grad(lambda: {"states": to_numpy(model(ids_bl)[0])})

  def denoise(self) -> Callable:
    model = self.unet
    x, text_bld = to_torch(self.inputs["latents_bhwz"]), torch.from_numpy(self.inputs["text_bld"]).to(DEVICE)
    return no_grad(lambda: {"output": to_numpy(model(x, parts.TIMESTEP, text_bld).sample)})

  def decode(self) -> Callable:
    model, x = self.vae, to_torch(self.inputs["latents_bhwz"])
    return no_grad(lambda: {"images": to_numpy(model.decode(x).sample)})

  def encode(self) -> Callable:
    model, x = self.vae, to_torch(self.inputs["images_byxc"])
    return no_grad(lambda: {"mean": to_numpy(model.encode(x).latent_dist.mean)})

  def token_gradient(self) -> Callable:
    """Of a weighted sum of the image that one call predicts, by the embedding of one of a prompt's tokens."""
    text_encoder, unet, vae, scheduler = self.text_encoder, self.unet, self.vae, self.scheduler
    unet.enable_gradient_checkpointing()
    vae.enable_gradient_checkpointing()
    unet.train(), vae.train()  # else the switch has no effect; neither has dropout
    ids_l = torch.from_numpy(self.ids_bl[1]).long().to(DEVICE)
    x, weights = to_torch(self.inputs["latents_bhwz"]), to_torch(self.inputs["weights_byxc"])
    is_token_l1 = (torch.arange(len(ids_l), device=DEVICE) == parts.TOKEN)[:, None]

    def call():
      token_d = torch.nn.Parameter(torch.from_numpy(self.inputs["token_d"]).to(DEVICE))
      put_in = lambda table, ids_bl, embeds_bld: torch.where(is_token_l1, token_d, embeds_bld)
      hook = text_encoder.get_input_embeddings().register_forward_hook(put_in)
      output = unet(x, parts.TIMESTEP, text_encoder(ids_l[None])[0]).sample
      hook.remove()
      alpha = scheduler.alphas_cumprod[parts.TIMESTEP].to(DEVICE)
      clean = (alpha.sqrt() * x - (1 - alpha).sqrt() * output if scheduler.config.prediction_type == "v_prediction"
               else (x - (1 - alpha).sqrt() * output) / alpha.sqrt())
      images = vae.decode(clean / vae.config.scaling_factor).sample
      (images * weights).sum().backward()
      return {"gradient": to_numpy(token_d.grad)}
    return call

  def walk(self, denoise: Callable, steps: int, noise: torch.Tensor,
           fresh: Iterator[torch.Tensor]) -> list[torch.Tensor]:
    """Latents before the first call and after each, as a pipeline makes them."""
    scheduler = self.scheduler
    scheduler.set_timesteps(steps)
    latents = [noise * scheduler.init_noise_sigma]
    module = sys.modules[type(scheduler).__module__]
    with unittest.mock.patch.object(module, "randn_tensor", lambda *_, **__: next(fresh), create=True):
      for t in scheduler.timesteps:
        output = denoise(scheduler.scale_model_input(latents[-1], t), t)
        latents.append(scheduler.step(output, t, latents[-1]).prev_sample)
    return latents

  def schedule(self) -> Callable:
    noise = to_torch(self.inputs["latents_bhwz"]).cpu()

    def call():
      walks = {steps: self.walk(lambda x, t: parts.toy(torch.tanh, x, t.float()), steps, noise, fresh(noise))
               for steps in parts.TRAJECTORIES}
      return {f"{steps} steps": np.stack([to_numpy(x) for x in walk]) for steps, walk in walks.items()}
    return call

  def sample(self) -> Callable:
    unet, vae, noise = self.unet, self.vae, to_torch(self.inputs["latents_bhwz"])
    with torch.no_grad():
      null_bld, text_bld = self.text_encoder(torch.from_numpy(self.ids_bl[:2]).long().to(DEVICE))[0][:, None]
    both_bld = torch.cat([null_bld, text_bld])

    def denoise(x, t):
      null, text = unet(torch.cat([x, x]), t, both_bld).sample.chunk(2)
      return null + parts.GUIDANCE * (text - null)

    def call():
      latents = self.walk(denoise, parts.STEPS, noise, fresh(noise))[-1]
      return {"images": to_numpy(vae.decode(latents / vae.config.scaling_factor).sample.clamp(-1, 1))}
    return no_grad(call)

  def parts(self) -> dict[str, Callable]:
    return {"tokenizer": self.tokenizer, "text": self.text, "unet": self.denoise, "vae.decode": self.decode,
            "vae.encode": self.encode, "token gradient": self.token_gradient, "scheduler": self.schedule,
            "sampling": self.sample}


def no_grad(call: Callable) -> Callable:
  return torch.no_grad()(call)


def fresh(noise: torch.Tensor) -> Iterator[torch.Tensor]:
  """The noise that a stochastic sampler adds at each call: what `ours.fresh` gives to ours."""
  for call in range(1000):
    yield torch.roll(noise, call + 1, dims=-1)


def main() -> None:
  """`reference FOLDER EXCHANGE REPEATS PART...`"""
  folder, exchange, repeats, *names = sys.argv[1:]
  torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
  arrays = checkpoint.read_arrays(pathlib.Path(exchange) / "inputs.safetensors")
  found = Reference(pathlib.Path(folder), arrays, arrays.pop("ids_bl")).parts()
  parts.run("torch", ((name, found[name]) for name in names), pathlib.Path(exchange), int(repeats))


if __name__ == "__main__":
  main()
