"""`python -m digzsl_jax.generate` on the embedded world: images, their text, resume, and what is refused."""

import pathlib
import shutil

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from digzsl_jax import diffusion, generate
from digzsl_jax import files as files_of
from digzsl_jax.data import images, textual_inversion, tokenizer
from digzsl_jax.models import stable_diffusion

SD = pathlib.Path(generate.__file__).parent / "worlds" / "scenes" / "sd"
PROMPT = "a photo of a striped crimson star"
QUICK = ("--checkpoint", str(SD), "--steps", "2", "--guidance", "4")


def paint(out, *arguments):
  generate.main([*QUICK, "--out", str(out), *arguments])
  return {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def painted(tmp_path_factory):
  out = tmp_path_factory.mktemp("painted")
  return out, paint(out, "--prompt", PROMPT, "--prompt", "a teal square", "--images", "2", "--seed", "7")


def test_files_and_what_they_say(painted):
  out, files = painted
  assert list(files) == [f"{name}/{seed:05d}.png" for name in ("a-photo-of-a-striped-crimson-star", "a-teal-square")
                         for seed in (7, 8)]
  said = images.read_text(out / "a-photo-of-a-striped-crimson-star" / "00008.png")
  assert (said["prompt"], said["seed"], said["steps"], said["guidance"]) == (PROMPT, "8", "2", "4.0")
  with Image.open(out / "a-teal-square" / "00007.png") as image:
    assert image.size == (32, 32) and np.array(image).std() > 10


def test_image_is_that_of_the_library(painted):
  out, _ = painted
  sd, schedule = stable_diffusion.load(SD), stable_diffusion.load_schedule(SD)
  words = tokenizer.Tokenizer.from_folder(SD / "tokenizer")
  text_bld, null_bld = sd.text(words([PROMPT])), sd.text(words([""]))
  noise_bhwz = generate.noise(np.array([8]), 0, sd.latent_shape)
  denoise = diffusion.guide(sd.unet, text_bld, null_bld, 4.0)
  latents_bhwz = diffusion.sample(denoise, noise_bhwz, diffusion.make_sampler(schedule, 2))
  wanted = np.round((np.asarray(sd.decode(latents_bhwz))[0] + 1) * 127.5)
  found = images.read_png(out / "a-photo-of-a-striped-crimson-star" / "00008.png")
  assert np.abs(found - wanted).max() <= 1  # a rounding may fall the other way


def test_what_is_missing_is_made_again_with_the_same_bytes(painted, capsys):
  out, files = painted
  arguments = ("--prompt", PROMPT, "--prompt", "a teal square", "--images", "2", "--seed", "7")
  (out / "a-teal-square" / "00008.png").unlink()
  assert paint(out, *arguments) == files
  assert " of 4 images made now" in capsys.readouterr().err
  assert paint(out, *arguments) == files
  assert "0 of 4 images made now" in capsys.readouterr().err


def test_seed_alone_decides_the_noise_and_batch_does_not(painted, tmp_path):
  _, files = painted
  again = paint(tmp_path, "--prompt", PROMPT, "--seed", "8", "--batch", "1")
  name = "a-photo-of-a-striped-crimson-star/00008.png"
  assert again[name] == files[name]


def test_learnt_tokens_change_the_image(painted, tmp_path):
  _, files = painted
  file = tmp_path / "bird.safetensors"
  textual_inversion.write(file, "<bird>", np.random.default_rng(0).normal(size=(2, 64)).astype(np.float32))
  made = paint(tmp_path / "out", "--prompt", "a photo of a <bird>", "--tokens", str(file),
               "--sampler", "euler_ancestral")
  assert len(made) == 1 and not set(made.values()) & set(files.values())


def test_shortcuts_change_the_image_and_are_written_into_it(painted, tmp_path):
  out, files = painted
  name = "a-photo-of-a-striped-crimson-star/00007.png"
  made = paint(tmp_path, "--prompt", PROMPT, "--seed", "7", "--cache_interval", "2", "--guidance_until", "0.9")
  said = images.read_text(tmp_path / name)
  assert (said["cache_interval"], said["cache_branch"], said["guidance_until"]) == ("2", "0", "0.9")
  assert (images.read_png(out / name) != images.read_png(tmp_path / name)).mean() > 0.1
  assert made[name] != files[name]


def test_another_denoiser(painted, tmp_path):
  _, files = painted
  name = "a-photo-of-a-striped-crimson-star/00007.png"
  same = paint(tmp_path / "same", "--prompt", PROMPT, "--seed", "7", "--unet", str(SD / "unet"))
  assert images.read_text(tmp_path / "same" / name)["unet"] == str(SD / "unet")
  painted_7 = images.read_png(painted[0] / name)
  np.testing.assert_array_equal(images.read_png(tmp_path / "same" / name), painted_7)
  assert same[name] != files[name]  # which is of what the file says
  shutil.copytree(SD / "unet", tmp_path / "unet")
  tensors = safetensors.numpy.load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
  tensors["conv_out.weight"] *= np.float16(0.5)
  safetensors.numpy.save_file(tensors, tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
  paint(tmp_path / "other", "--prompt", PROMPT, "--seed", "7", "--unet", str(tmp_path / "unet"))
  assert (images.read_png(tmp_path / "other" / name) != painted_7).mean() > 0.1


def test_denoiser_of_another_model_is_refused(tmp_path):
  shutil.copytree(SD / "unet", tmp_path / "unet")
  config = files_of.read_json(SD / "unet" / "config.json")
  for change, message in (({"cross_attention_dim": 32}, "has cross_attention_dim=32, that of .* 64: it belongs to"),
                          ({"in_channels": 9}, "has in_channels=9, that of .* 4: it belongs to another"),
                          ({"time_cond_proj_dim": 256}, "cannot be used: .*time_cond_proj_dim=256 is not supported")):
    files_of.write_json(tmp_path / "unet" / "config.json", config | change)
    with pytest.raises(SystemExit, match=message):
      paint(tmp_path / "out", "--prompt", PROMPT, "--unet", str(tmp_path / "unet"))
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments, message", [
  (("--prompt", "a", "--guidance_until", "2"), "guidance_until is 2.0; it must be between 0 and 1"),
  (("--prompt", "a", "--cache_interval", "2", "--cache_branch", "4"), "has the branches 0 to 3"),
  ((), "there is no prompt"),
  (("--prompt", "a", "--prompts", "nowhere.txt"), "nowhere.txt cannot be read"),
  (("--prompt", "a", "--width", "33"), "must be multiples of 4"),
  (("--prompt", "a", "--sampler", "heun"), "'heun' is not supported"),
  (("--prompt", "a", "--steps", "2000"), "steps=2000 must lie between 1 and"),
  (("--prompt", "a", "--tokens", "nowhere.safetensors"), "nowhere.safetensors is missing"),
  (("--prompt", "a", "--checkpoint", "./nowhere"), "nowhere"),
  (("--prompt", "a", "--vae", "./nowhere"), "nowhere"),
  (("--prompt", "a", "--unet", "./nowhere"), "nowhere"),
])
def test_refusals(tmp_path, arguments, message):
  with pytest.raises(SystemExit, match=message):
    paint(tmp_path / "out", *arguments)
  assert not (tmp_path / "out").exists()


def test_other_settings_do_not_overwrite(painted):
  out, files = painted
  with pytest.raises(SystemExit, match="was made with steps='2', now it is '3': choose another --out"):
    paint(out, "--prompt", PROMPT, "--seed", "7", "--steps", "3")
  assert {path.relative_to(out).as_posix() for path in out.rglob("*.png")} == set(files)


def test_broken_image_is_named(painted, tmp_path):
  broken = tmp_path / "a-teal-square" / "00000.png"
  broken.parent.mkdir()
  broken.write_bytes(b"no image")
  with pytest.raises(SystemExit, match="00000.png is truncated or no PNG"):
    paint(tmp_path, "--prompt", "a teal square")
