"""Latent consistency distillation: what it starts from, what it writes, and that it lowers its loss."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from digzsl_jax import checkpoint, consistency, diffusion, files, logs, loop
from digzsl_jax.models import hub, stable_diffusion, unet
from digzsl_jax.runs import pretrain
from digzsl_jax.workspace import Workspace

CONFIG = dict(_class_name="DDIMScheduler", beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
              clip_sample=False)


def test_plan_is_of_the_times_that_the_sampler_visits():
  schedule = diffusion.Schedule.from_config(CONFIG)
  plan = consistency.plan(schedule)
  assert (plan.times_n[:2].tolist(), plan.times_n[-2:].tolist(), len(plan.times_n)) == ([999, 979], [19, 0], 51)
  assert plan.jumps_n2[-1].tolist() == [1, 0]  # at time 0 x0 is the latent
  assert len(plan.steps_n2) == 50
  sampler = diffusion.make_sampler(schedule, 4, "lcm")
  places = [plan.times_n.tolist().index(t) for t in sampler.timesteps]
  np.testing.assert_array_equal(plan.jumps_n2[places], sampler.x0)


def test_skipping_steps_end_where_short_ones_end():
  """On a path of known noise, of which DDIM's steps are exact, whatever their length."""
  schedule = diffusion.Schedule.from_config(CONFIG)
  plan = consistency.plan(schedule, 7)
  x0, noise = np.random.default_rng(0).normal(size=(2, 50, 1, 1, 4)).astype(np.float32)
  ends = plan.times_n[np.minimum(np.arange(50) + 7, 50)]
  here, there = (diffusion.add_noise(schedule, x0, noise, times) for times in (plan.times_n[:-1], ends))
  np.testing.assert_allclose(consistency._mix(plan.steps_n2, here, noise), there, atol=2e-5)


def test_a_file_may_say_how_many_times():
  schedule = diffusion.Schedule.from_config(CONFIG | {"original_inference_steps": 10})
  assert len(consistency.plan(schedule).times_n) == 11


def test_first_loss_is_that_of_the_teacher_as_its_own_student(tiny_world):
  """The student is the teacher at first, and unguided the two differ by their steps alone."""
  sd, schedule = stable_diffusion.load(tiny_world / "sd"), stable_diffusion.load_schedule(tiny_world / "sd")
  (text, text_params), (teacher, params) = nnx.split(sd.text_encoder), nnx.split(sd.unet)
  ids_bl, latents = jnp.ones((4, 16), jnp.int32), jax.random.normal(jax.random.key(1), (4, 8, 8, 4))
  loss = jax.jit(lambda guidance: consistency.loss(schedule, 1, guidance, text, teacher, sd.unet, (
    text_params, params, ids_bl[0]), (latents, ids_bl), jax.random.key(0))[0], static_argnums=0)
  np.testing.assert_allclose(loss(1), loss(3.0), rtol=1e-5)  # captions are the empty prompt, so guidance does nothing


@pytest.fixture
def distil(tiny_pretraining, tiny_world, tmp_path, monkeypatch):
  """`distil(sd=..., folder=...)`: the folder of a distillation by twelve updates."""
  monkeypatch.setattr(loop, "HELD_OUT", 32)

  def run(sd=tiny_world / "sd", folder="run", train=None):
    config = tiny_pretraining.copy_and_resolve_references()
    config.stages = ("lcm",)
    config.corpus.images = 96
    config.lcm.sd = str(sd)
    config.lcm.skip = 50  # all the way to 0: what is learnt then does not move while it is learnt
    config.lcm.training.update(steps=12, batch=8, learning_rate=3e-4, average=0.5)
    with monkeypatch.context() as patch:
      if train:
        patch.setattr(loop.Loop, "run", train)
      pretrain.run(config.to_dict(), tmp_path / folder, logs.Log(tmp_path / folder), False)
    return tmp_path / folder / "lcm"
  return run


def as_it_was(training, folder, log):
  return training.model, {}


def test_updates_lower_the_loss_and_leave_the_teacher_alone(distil, tiny_world):
  before, frozen, run = {}, {}, loop.Loop.run

  def train(training, folder, log):
    before.update(training.held_out(training.start()))
    found = run(training, folder, log)
    frozen.update(enumerate(jax.tree.leaves(training.frozen[1])))
    return found

  folder = distil(train=train)
  assert files.read_json(folder / "done.json")["held_out_loss"] < 0.9 * before["held_out_loss"]
  student, teacher = (jax.tree.leaves(nnx.state(hub.load(unet.UNet2DConditionModel, path)))
                      for path in (folder / "unet", tiny_world / "sd" / "unet"))
  assert max(float(jnp.abs(a - b).max()) for a, b in zip(student, teacher)) > 1e-3
  for row, leaf in enumerate(teacher):
    np.testing.assert_array_equal(frozen[row], leaf)
  written = files.read_json(folder / "scheduler" / "scheduler_config.json")
  assert diffusion.Schedule.from_config(written).kind == "lcm"
  assert written["prediction_type"] == stable_diffusion.load_schedule(tiny_world / "sd").prediction_type


def test_another_teacher_is_another_stage(distil, tiny_world, tmp_path):
  folder = distil(train=as_it_was)
  done = (folder / "done.json").read_bytes()
  distil(train=None)  # nothing is left to train
  assert (folder / "done.json").read_bytes() == done
  shutil.copytree(tiny_world / "sd", tmp_path / "sd")
  with pytest.raises(ValueError, match=r"made from other settings \(lcm.sd: [^;]*\)"):
    distil(sd=tmp_path / "sd")
  files.write_json(tmp_path / "sd" / "unet" / "config.json",
                   files.read_json(tmp_path / "sd" / "unet" / "config.json") | {"_diffusers_version": "0"})
  with pytest.raises(ValueError, match=r"made from other settings \(lcm.sd: .*; teacher: "):
    distil(sd=tmp_path / "sd")


@pytest.mark.parametrize("sd, message", [
  ("nowhere", "config.lcm.sd is 'nowhere', but there is no folder"),
  ("file", "config.lcm.sd is .*sd.safetensors', a single file; distil from a folder"),
  ("", "stage tokenizer has not finished")])
def test_refusals(distil, tmp_path, sd, message):
  if sd == "file":
    sd = tmp_path / "sd.safetensors"
    checkpoint.write_arrays(sd, {"model.diffusion_model.out.2.weight": np.zeros(1, np.float32)})
  with pytest.raises(ValueError, match=message):
    distil(sd=sd)
  assert not (tmp_path / "run" / "lcm").exists()


def test_pictures_of_another_size_are_refused(distil, monkeypatch):
  monkeypatch.setattr(stable_diffusion.StableDiffusion, "image_shape", (64, 64, 3))
  with pytest.raises(ValueError, match=r"paints pictures of \(64, 64, 3\); those of the corpus are \(32, 32, 3\)"):
    distil()


def test_images_are_painted_with_it_and_tokens_are_not(distil, tiny_config, tmp_path):
  def workspace(denoiser):
    tiny_config.generate.unet = str(denoiser)
    return Workspace(tiny_config.to_dict(), tmp_path / "images", logs.Log(tmp_path / "images"))

  def moved(training, folder, log):
    graphdef, params = nnx.split(training.model)
    return nnx.merge(graphdef, jax.tree.map(lambda leaf: 2 * leaf, params)), {}

  plain = workspace("")
  assert plain.painter is plain.sd and plain.model_fingerprints["unet"] is None
  folders = [distil(folder=name, train=train) / "unet" for name, train in (("same", as_it_was), ("moved", moved))]
  found = [workspace(folder).model_fingerprints["unet"] for folder in folders]
  assert None not in found and len(set(found)) == 2
  ws, kernel = workspace(folders[1]), plain.sd.unet.conv_out.kernel[...]
  np.testing.assert_array_equal(ws.painter.unet.conv_out.kernel[...], 2 * kernel)
  np.testing.assert_array_equal(ws.sd.unet.conv_out.kernel[...], kernel)
