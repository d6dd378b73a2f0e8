"""The worlds that ship with the package, opened unchanged by diffusers and transformers: equal in every number."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

import safetensors.torch

from digzsl_jax import checkpoint, diffusion
from digzsl_jax.base_workspace import WORLDS
from digzsl_jax.data import scenes, tokenizer
from digzsl_jax.models import clip, hub, stable_diffusion

STEPS, GUIDANCE = 4, 4.0
PROMPTS = ["a photo of a striped crimson star", "a shirt, two cats & THE teal ring"]
FULL = dict(torch_dtype=torch.float32)  # of the reference: the files are float16

# Without a shipped world there is still one of random weights, made the same way.
NAMES = ["tiny", *sorted(path.name for path in WORLDS.glob("*/"))]
each_world = pytest.mark.parametrize("world", NAMES)
each_that_paints = pytest.mark.parametrize("world", [name for name in NAMES
                                                     if name == "tiny" or (WORLDS / name / "sd").is_dir()])


@pytest.fixture
def folder(world, tiny_world):
  return tiny_world if world == "tiny" else WORLDS / world


@functools.cache
def opened(folder):
  """The reference's pipeline, our modules, schedule and tokenizer."""
  pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder / "sd", safety_checker=None, **FULL)
  pipe.set_progress_bar_config(disable=True)
  sd, schedule = stable_diffusion.load(folder / "sd"), stable_diffusion.load_schedule(folder / "sd")
  return pipe, sd, schedule, tokenizer.Tokenizer.from_folder(folder / "sd" / "tokenizer")


@each_world
def test_every_key_is_expected(folder):
  parts = [(transformers.CLIPModel, "clip"), (transformers.CLIPTextModel, "sd/text_encoder"),
           (diffusers.UNet2DConditionModel, "sd/unet"), (diffusers.AutoencoderKL, "sd/vae")]
  for kind, part in parts if (folder / "sd").is_dir() else parts[:1]:
    _, report = kind.from_pretrained(folder / part, output_loading_info=True, **FULL)
    assert not any(report.values()), (part, report)


@each_world
def test_tokenizers(folder):
  texts = [*PROMPTS, "", *(f"a photo of a {name}" for name in scenes.NAMES), "supercalifragilistic " * 9]
  for part in ("clip", "sd/tokenizer") if (folder / "sd").is_dir() else ("clip",):
    ours = tokenizer.Tokenizer.from_folder(folder / part)
    theirs = transformers.CLIPTokenizer.from_pretrained(folder / part)
    assert ours(texts).tolist() == theirs(texts, padding="max_length", truncation=True).input_ids


@each_world
def test_clip_embeddings(folder):
  theirs = transformers.CLIPModel.from_pretrained(folder / "clip", **FULL).eval()
  graphdef, params = nnx.split(hub.load(clip.CLIPModel, folder / "clip"))
  ids_bl = tokenizer.Tokenizer.from_folder(folder / "clip")(PROMPTS)
  size = theirs.config.vision_config.image_size
  images_bhwc = np.random.default_rng(0).uniform(-1, 1, (2, size, size, 3)).astype(np.float32)

  def embeds(params, ids_bl, images_bhwc):
    model = nnx.merge(graphdef, params)
    return model.encode_text(ids_bl)[0], model.encode_image(images_bhwc)[0]

  text_bd, image_bd = jax.jit(embeds)(params, ids_bl, images_bhwc)
  with torch.no_grad():
    want_text = theirs.get_text_features(torch.from_numpy(ids_bl)).pooler_output.numpy()
    want_image = theirs.get_image_features(torch.from_numpy(images_bhwc).permute(0, 3, 1, 2)).pooler_output.numpy()
  print(f"text {np.abs(text_bd - want_text).max():.1e} of {np.abs(want_text).max():.1f}, "
        f"image {np.abs(image_bd - want_image).max():.1e} of {np.abs(want_image).max():.1f}")
  np.testing.assert_allclose(text_bd, want_text, rtol=0, atol=1e-5)
  np.testing.assert_allclose(image_bd, want_image, rtol=0, atol=1e-5)


@each_that_paints
def test_sampled_images(folder):
  pipe, sd, schedule, words = opened(folder)
  noise_bhwz = np.random.default_rng(0).normal(size=(2, *sd.latent_shape)).astype(np.float32)
  latents = torch.from_numpy(np.moveaxis(noise_bhwz, -1, 1).copy())
  want = [pipe(PROMPTS, latents=latents, num_inference_steps=STEPS, guidance_scale=GUIDANCE,
               output_type=kind).images for kind in ("latent", "np")]
  want_bhwz, want_bhwc = want[0].permute(0, 2, 3, 1).numpy(), 2 * want[1] - 1

  graphdef, params = nnx.split(sd)
  sampler = diffusion.make_sampler(schedule, STEPS)

  def sample(params, ids_bl, null_l, noise_bhwz):
    sd = nnx.merge(graphdef, params)
    denoise = diffusion.guide(sd.unet, sd.text(ids_bl), sd.text(null_l), GUIDANCE)
    latents_bhwz = diffusion.sample(denoise, noise_bhwz, sampler)
    return latents_bhwz, sd.decode(latents_bhwz)

  latents_bhwz, images_bhwc = jax.jit(sample)(params, words(PROMPTS), words([""]), noise_bhwz)
  print(f"latents {np.abs(latents_bhwz - want_bhwz).max():.1e} of {np.abs(want_bhwz).max():.1f}, "
        f"images {np.abs(images_bhwc - want_bhwc).max():.1e} of {np.abs(want_bhwc).max():.1f}")
  assert np.abs(want_bhwz[0] - want_bhwz[1]).max() > 0.1
  np.testing.assert_allclose(latents_bhwz, want_bhwz, rtol=0, atol=2e-5)
  np.testing.assert_allclose(images_bhwc, want_bhwc, rtol=0, atol=5e-5)


@each_that_paints
def test_learnt_tokens_are_textual_inversions(folder, tmp_path):
  pipe, sd, _, words = opened(folder)
  names = ["striped crimson star", "shirt"]
  tokens_kd = np.random.default_rng(0).normal(size=(2, sd.text_encoder.embed(jnp.array([0])).shape[-1]))
  file = tmp_path / "learned_embeds.safetensors"
  checkpoint.write_arrays(file, dict(zip(names, tokens_kd.astype(np.float32))))
  for name, vector in safetensors.torch.load_file(file).items():
    pipe.load_textual_inversion({name: vector}, token=f"<{name}>")
  for name, token_d in zip(names, tokens_kd.astype(np.float32)):
    ids_l, place = words.encode_with_slot("a photo of {token} {name}", name, "a")
    ids_l[place] = words.vocab_size
    ours_bld = sd.text(jnp.asarray(ids_l[None]), jnp.asarray(token_d[None]))
    theirs_bld = pipe.encode_prompt(f"a photo of <{name}> {name}", "cpu", 1, False)[0]
    print(f"{name}: {np.abs(ours_bld - theirs_bld.detach().numpy()).max():.1e}")
    np.testing.assert_allclose(ours_bld, theirs_bld.detach().numpy(), rtol=0, atol=1e-5)
