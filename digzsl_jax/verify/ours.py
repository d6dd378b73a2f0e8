"""Our side of the comparison."""

import functools
import pathlib
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from digzsl_jax import checkpoint, cli, diffusion
from digzsl_jax.data import tokenizer
from digzsl_jax.models import clip, hub, stable_diffusion, unet, vae
from digzsl_jax.verify import parts


def compiled(function: Callable, model: nnx.Module) -> Callable[..., jax.Array]:
  """`function(model, *arrays)`, compiled."""
  graphdef, state = nnx.split(model)
  run = jax.jit(lambda state, *arrays: function(nnx.merge(graphdef, state), *arrays))
  return lambda *arrays: run(state, *arrays)


class Ours:
  """The parts of one folder; each loads what it needs and gives it back when it has been measured."""

  def __init__(self, folder: pathlib.Path, inputs: dict[str, np.ndarray], ids_bl: np.ndarray, dtype: str):
    self.folder, self.inputs, self.ids_bl, self.dtype = folder, inputs, ids_bl, dtype
    self.schedule = stable_diffusion.load_schedule(folder)

  def _load(self, kind: type, part: str) -> nnx.Module:
    return hub.load(kind, self.folder / part, dtype=self.dtype)

  def tokenizer(self) -> Callable:
    words = tokenizer.Tokenizer.from_folder(self.folder / "tokenizer")
    return lambda: {"ids": words(parts.TEXTS)}

  def text(self) -> Callable:
    states = compiled(lambda model, ids_bl: model(ids_bl)[0], self._load(clip.CLIPTextModel, "text_encoder"))
    return lambda: {"states": np.asarray(states(self.ids_bl))}

  def denoise(self) -> Callable:
    model = self._load(unet.UNet2DConditionModel, "unet")
    output = compiled(lambda model, *arrays: model(*arrays), model)
    t_b = np.array([parts.TIMESTEP])
    return lambda: {"output": np.asarray(output(self.inputs["latents_bhwz"], t_b, self.inputs["text_bld"]))}

  def decode(self) -> Callable:
    images = compiled(lambda model, x: model.decode(x), self._load(vae.AutoencoderKL, "vae"))
    return lambda: {"images": np.asarray(images(self.inputs["latents_bhwz"]))}

  def encode(self) -> Callable:
    mean = compiled(lambda model, x: model.encode(x)[0], self._load(vae.AutoencoderKL, "vae"))
    return lambda: {"mean": np.asarray(mean(self.inputs["images_byxc"]))}

  def token_gradient(self) -> Callable:
    sd = stable_diffusion.load(self.folder, dtype=self.dtype, remat=True)
    sampler = diffusion.make_sampler(self.schedule, None, "ddim", timesteps=[parts.TIMESTEP])
    here_l1 = (jnp.arange(self.ids_bl.shape[1]) == parts.TOKEN)[:, None]

    def loss(token_d, sd, ids_bl, x_bhwz, weights_byxc):
      embeds_bld = jnp.where(here_l1, token_d, sd.text_encoder.embed(ids_bl))
      text_bld = sd.text_encoder(ids_bl, embeds_bld)[0]
      denoise = lambda x_bhwz, t: sd.unet(x_bhwz, t[None], text_bld)
      clean_bhwz = sampler.predict_x0(denoise, sampler.start(x_bhwz), 0)
      return (sd.vae.decode(clean_bhwz / sd.vae.scaling_factor) * weights_byxc).sum()

    gradient = compiled(lambda sd, token_d, *arrays: jax.grad(loss)(token_d, sd, *arrays), sd)
    arrays = (self.inputs[name] for name in ("latents_bhwz", "weights_byxc"))
    return functools.partial(lambda *arrays: {"gradient": np.asarray(gradient(*arrays))},
                             self.inputs["token_d"], self.ids_bl[1:2], *arrays)

  def walk(self, steps: int) -> np.ndarray:
    """Latents before the first call of the checkpoint's own sampler and after each."""
    noise_bhwz = jnp.asarray(self.inputs["latents_bhwz"])
    sampler, toy = diffusion.make_sampler(self.schedule, steps), functools.partial(parts.toy, jnp.tanh)
    carries = [sampler.start(noise_bhwz)]
    with jax.disable_jit():  # each call would be compiled by itself
      for call in range(sampler.calls):
        carries.append(sampler.run(toy, carries[-1], call, call + 1, fresh_noise(noise_bhwz)))
    return np.stack([carry.x_bhwz for carry in carries])

  def trajectories(self) -> Callable:
    return lambda: {f"{steps} steps": self.walk(steps) for steps in parts.TRAJECTORIES}

  def sample(self) -> Callable:
    sd = stable_diffusion.load(self.folder, dtype=self.dtype)
    sampler = diffusion.make_sampler(self.schedule, parts.STEPS)

    def images(sd, ids_bl, noise_bhwz):
      null_bld, text_bld = sd.text(ids_bl)[:, None]
      denoise = diffusion.guide(sd.unet, text_bld, null_bld, parts.GUIDANCE)
      return sd.decode(diffusion.sample(denoise, noise_bhwz, sampler, fresh_noise(noise_bhwz)))

    made = compiled(images, sd)
    return lambda: {"images": np.asarray(made(self.ids_bl[:2], self.inputs["latents_bhwz"]))}

  def parts(self) -> dict[str, Callable]:
    return {"tokenizer": self.tokenizer, "text": self.text, "unet": self.denoise, "vae.decode": self.decode,
            "vae.encode": self.encode, "token gradient": self.token_gradient, "scheduler": self.trajectories,
            "sampling": self.sample}


def fresh_noise(noise_bhwz: jax.Array) -> diffusion.Fresh:
  """The noise that a stochastic sampler adds at each call: what `reference.fresh` gives to PyTorch."""
  return lambda call: jnp.roll(jnp.asarray(noise_bhwz), call + 1, axis=2)


def main() -> None:
  """`ours FOLDER EXCHANGE REPEATS DTYPE PART...`"""
  folder, exchange, repeats, dtype, *names = sys.argv[1:]
  cli.start()
  if dtype == "float32":
    jax.config.update("jax_default_matmul_precision", "highest")
  arrays = checkpoint.read_arrays(pathlib.Path(exchange) / "inputs.safetensors")
  found = Ours(pathlib.Path(folder), arrays, arrays.pop("ids_bl"), dtype).parts()
  parts.run("jax", ((name, found[name]) for name in names), pathlib.Path(exchange), int(repeats))


if __name__ == "__main__":
  main()
