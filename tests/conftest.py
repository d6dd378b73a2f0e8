"""Every test runs on eight virtual CPU devices with exact float32 products."""

import os
import pathlib
from importlib import metadata

# Before jax is imported anywhere: it reads them only once. What the environment says goes first.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the tests' time is compiling; the level is of machine code alone. XLA ends the process for a flag that it does
# not know, as that of jaxlib 0.10, where half of the rest goes into the emitters of fusions.
QUICK = "--xla_backend_optimization_level=0"
if metadata.version("jaxlib").startswith("0.10."):
  QUICK += " --xla_cpu_use_fusion_emitters=false"
XLA_FLAGS = ("--xla_force_host_platform_device_count=8", QUICK)
told = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join([told, *(flag for flag in XLA_FLAGS if flag.partition("=")[0] not in told)])

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

jax.config.update("jax_default_matmul_precision", "highest")


def pytest_configure(config):
  # Most of the time goes into compiling; what was compiled stays in this checkout's .pytest_cache.
  if hasattr(config, "cache") and not jax.config.jax_compilation_cache_dir:
    jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("jax")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)


def pytest_collection_modifyitems(items):
  # Files go to processes whole (--dist=loadfile): the long ones first, so that none is left alone at the end.
  slow = {item.path for item in items if item.get_closest_marker("slow")}
  items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def real_data_if_any():
  """Folder of photographs and published weights, which are no part of the repository, or None."""
  beside = pathlib.Path(__file__).parent.parent.parent / "shared" / "data"
  folder = pathlib.Path(os.environ.get("DIGZSL_DATA", beside))
  return folder if folder.is_dir() else None


@pytest.fixture(scope="session")
def real_data(real_data_if_any):
  """The same for a test that is nothing without it."""
  return real_data_if_any or pytest.skip("real data is absent: set DIGZSL_DATA to its folder")


@pytest.fixture(scope="session")
def tiny_pretraining():
  """Pre-training of the smallest models of useful size."""
  from configs import pretrain_scenes
  config = pretrain_scenes.get_config()
  config.corpus.images = 600
  config.vae.model.block_out_channels = (8, 8, 8)
  config.clip.vision.update(hidden_size=32, intermediate_size=32, num_hidden_layers=1, patch_size=8)
  config.clip.text.update(hidden_size=32, intermediate_size=32, num_hidden_layers=1)
  config.sd.unet.update(block_out_channels=(16,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
  config.judge.model.width = 8
  return config


def random_model(model_type, config, seed):
  """In place of `loop.build`: compiling JAX's initialisers would take most of a minute."""
  from digzsl_jax.models import hub
  graphdef, state = nnx.split(hub.abstract(model_type, config))
  rng = np.random.default_rng(seed)

  def fill(path, leaf):
    weights = rng.normal(size=leaf.shape) / np.sqrt(max(np.prod(leaf.shape[:-1]), 1))
    return jnp.asarray(1 + 0.1 * weights if "scale" in jax.tree_util.keystr(path) else weights, leaf.dtype)
  return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(fill, state))


@pytest.fixture
def quick_build(monkeypatch):
  from digzsl_jax import loop
  monkeypatch.setattr(loop, "build", random_model)


@pytest.fixture(scope="session")
def tiny_world(tiny_pretraining, tmp_path_factory):
  """A folder with untrained `clip`, `sd` and `judge` of `tiny_pretraining`, as `runs/pretrain.py` writes them."""
  from digzsl_jax import logs, loop, world_export
  from digzsl_jax.runs import pretrain
  monkeypatch = pytest.MonkeyPatch()
  monkeypatch.setattr(loop, "build", random_model)
  monkeypatch.setattr(loop.Loop, "run", lambda training, *arguments: (training.model, {}))
  monkeypatch.setattr(world_export, "plain_agreement",
                      lambda *arguments: {"plain_exact_agreement": 0.0, "plain_pair_agreement": 0.0})
  config = tiny_pretraining.copy_and_resolve_references()
  folder = tmp_path_factory.mktemp("world")
  config.export.folder = str(folder / "models")
  pretrain.run(config.to_dict(), folder / "run", logs.Log(folder / "run"), False)
  monkeypatch.undo()
  return folder / "models"


@pytest.fixture
def steps_once(monkeypatch):
  """Runs of a test with the same models share the steps of token learning, traced and compiled once."""
  from digzsl_jax.runs import class_tokens
  made, compile_steps = {}, class_tokens.compile_steps

  def shared(settings, seed, path, graphdef, devices, keep):
    if (key := (settings, seed, devices)) not in made:
      made[key] = compile_steps(settings, seed, path, graphdef, devices)
    return made[key]

  monkeypatch.setattr(class_tokens, "compile_steps", shared)


@pytest.fixture
def tiny_config(tiny_world):
  """The quickstart on `tiny_world`: seconds to run, its numbers mean nothing."""
  from configs import quickstart
  config = quickstart.get_config()
  config.data.update(train_per_class=8, test_per_class=4)
  config.models.update(clip=str(tiny_world / "clip"), sd=str(tiny_world / "sd"), judge=str(tiny_world / "judge"))
  config.cdm.update(hidden=16, steps=20, batch=32, cache="")
  config.tokens.update(images=2, steps=2, slots=8, slots_per_body=1, check_every=2, max_updates=4)
  config.generate.update(images=2, steps=2, batch=8)
  config.classifier.update(images=2, steps=10)
  return config
