"""Class tokens: equal on every mesh, compiled once, and what happens to the classes in their slots."""

import functools
import os
import re
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from configs import quickstart
from digzsl_jax import base_workspace, checkpoint, logs, losses, mesh, workspace
from digzsl_jax import main as command
from digzsl_jax.data import prompts, textual_inversion
from digzsl_jax.models import cdm, hub, vit
from digzsl_jax.runs import class_tokens
from digzsl_jax.workspace import TOKENS

COLLECTIVE = re.compile(r"all-reduce|all-gather|all-to-all|collective-|reduce-scatter")
START = np.array([[1.0, -1.0]], np.float32)
STEPS = ("prefix", "learn")


def learn(config, folder):
  """Runs the first two stages; the tokens of both tasks."""
  config.stages = ("cdm", "tokens")
  command.METHODS["dig_zsl"](config.to_dict(), folder, logs.Log(folder), False)
  return {(task, name): vector for task, file in TOKENS.items()
          for name, vector in checkpoint.read_arrays(folder / "tokens" / file).items()}


@pytest.mark.slow
def test_tokens_on_meshes(tiny_config, tmp_path, monkeypatch, caplog):
  learners, found = [], {}

  class Recorded(class_tokens.Learner):

    def __init__(self, *arguments):
      super().__init__(*arguments)
      learners.append(self)

  monkeypatch.setattr(class_tokens, "Learner", Recorded)
  jit, usual = jax.jit, {"xla_backend_optimization_level": 3}
  if "xla_cpu_use_fusion_emitters" in os.environ["XLA_FLAGS"]:
    usual["xla_cpu_use_fusion_emitters"] = True
  monkeypatch.setattr(jax, "jit", lambda function, **options: jit(function, **options | (
      {"compiler_options": usual} if function.__name__ in STEPS else {})))  # the steps as when not testing
  for devices in (1, 2, 4, 8):
    tiny_config.mesh.devices = devices
    if devices > 1:  # the CDM is trained on one device, whatever the mesh
      shutil.copytree(tmp_path / "1" / "cdm", tmp_path / str(devices) / "cdm")
    caplog.clear()
    with jax.log_compiles():
      found[devices] = learn(tiny_config, tmp_path / str(devices))
    for step in STEPS:
      assert sum(f"Finished XLA compilation of jit({step})" in message for message in caplog.messages) == 1
  assert len(found[1]) == 24 and all(np.abs(vector).max() > 0 for vector in found[1].values())
  for devices in (2, 4, 8):
    for key, vector in found[1].items():
      np.testing.assert_array_equal(vector, found[devices][key], err_msg=f"{key} on {devices} devices")
  for name, text in compiled(learners[-1]).items():
    assert "while" in text and not COLLECTIVE.findall(text), name


def compiled(learner):
  """The optimised programs of both steps."""
  settings, ws = learner.settings, learner.ws
  slots = class_tokens.fresh_slots(settings, np.zeros(settings.slots), ws.token_starts(ws.tasks["test"]))
  slots, frozen = jax.device_put(slots, mesh.by_class(ws.mesh)), learner.frozen(ws.tasks["test"])
  return {"prefix": learner.prefix.lower(frozen, slots).compile().as_text(),
          "learn": learner.learn.lower(frozen, slots, learner.prefix(frozen, slots)).compile().as_text()}


class Script:
  """A learner whose losses and accuracies are written down: `losses[k][u]` of class k at update u."""

  def __init__(self, settings, losses, accuracies=None):
    self.update = jax.jit(functools.partial(class_tokens.update, settings, class_tokens.optimiser(settings)))
    self.losses_ku = jnp.array(losses, jnp.float32)
    self.accuracies_ku = jnp.zeros_like(self.losses_ku) if accuracies is None else jnp.array(accuracies)
    self.calls = 0

  def frozen(self, task):
    return None

  def prefix(self, frozen, slots):
    return None

  def learn(self, frozen, slots, carry):
    self.calls += 1
    at = slots.class_c, slots.step_c
    loss_c, accuracy_c = self.losses_ku[at], self.accuracies_ku[at]
    grad_cnd = jnp.where(jnp.isfinite(loss_c), 1.0, jnp.nan)[:, None, None] * jnp.ones_like(slots.token_cnd)
    made_c = class_tokens.live(slots)
    return self.update(slots, grad_cnd, loss_c, accuracy_c), class_tokens.Update(made_c, loss_c, accuracy_c)


@pytest.fixture
def play(tmp_path, capsys):
  """`play(losses, accuracies, **settings) -> (outcome, script, printed)`."""
  def play(losses, accuracies=None, **changes):
    defaults = dict(slots=1, slots_per_body=1, check_every=2, max_updates=5, patience=5, stop_accuracy=1.0)
    settings = class_tokens.Settings(**(quickstart.get_config().tokens.to_dict() | defaults | changes))
    names = [f"class {k}" for k in range(len(losses))]
    ws = types.SimpleNamespace(token_starts=lambda task: np.tile(START, (len(names), 1, 1)), log=logs.Log(tmp_path),
                               mesh=mesh.make(1), dataset=types.SimpleNamespace(names=names))
    task = types.SimpleNamespace(name="test", unseen=tuple(range(len(names))))
    script = Script(settings, losses, accuracies)
    outcome = class_tokens.learn_task(settings, ws, task, script, tmp_path / str(len(names)))
    return outcome, script, capsys.readouterr().err
  return play


def reasons(outcome):
  return [class_tokens.REASONS[reason] for reason in outcome.reason_k]


def test_a_class_keeps_its_best_token(play):
  outcome, _, _ = play([[3, 2, 1, 4, 5]], learning_rate=0.1)
  assert reasons(outcome) == ["cap"] and outcome.best_step_k.tolist() == [2]
  # Two updates of AdamW with a constant gradient, each of the learning rate's size, came before it.
  np.testing.assert_allclose(outcome.token_knd[0], START - 0.2, rtol=1e-5)
  np.testing.assert_array_equal(outcome.loss_ku[0], [3, 2, 1, 4, 5])


def test_patience_counts_updates_without_improvement(play):
  outcome, _, _ = play([[3, 2, 2, 2, 1]], patience=1)
  assert reasons(outcome) == ["patience"] and outcome.best_step_k.tolist() == [1]
  np.testing.assert_array_equal(outcome.loss_ku[0], [3, 2, 2, 2, np.nan])


def test_a_class_that_is_recognised_stops(play):
  outcome, _, _ = play([[3, 2, 1, 1, 1]], [[0, 0.5, 1, 1, 1]], stop_accuracy=0.6)
  assert reasons(outcome) == ["accuracy"] and np.isfinite(outcome.loss_ku[0]).sum() == 3


def test_nan_ends_one_class_with_its_best_token(play):
  bad, good = [3, 2, np.nan, 1, 1], [5, 4, 3, 2, 1]
  outcome, _, printed = play([bad, good, bad], slots=3)
  assert reasons(outcome) == ["nan", "cap", "nan"] and np.isfinite(outcome.token_knd).all()
  alone, _, _ = play([good], slots=1, max_updates=5)
  np.testing.assert_array_equal(outcome.token_knd[1], alone.token_knd[0])
  assert printed.count("loss or gradient was not finite at update") == 2 and "'class 2'" in printed


def test_slots_are_refilled_and_idle_ones_cost_no_class(play):
  losses = [[k + 5, k + 4, k + 3, k + 2, k + 1] for k in range(5)]
  accuracies = [[k in (0, 3)] * 5 for k in range(5)]
  outcome, script, _ = play(losses, accuracies, slots=2, stop_accuracy=0.5)
  assert reasons(outcome) == ["accuracy", "cap", "cap", "accuracy", "cap"]
  assert np.isfinite(outcome.loss_ku).sum(1).tolist() == [1, 5, 5, 1, 5]
  # A slot waits for the next look, every second update: 0 | 2 2 2 | idle and 1 1 1 | 3 | 4 4 4.
  assert script.calls == 2 * 7
  np.testing.assert_array_equal(outcome.loss_ku[2], losses[2])


def test_vectors_of_a_token_are_one():
  settings = class_tokens.Settings(**quickstart.get_config().tokens.to_dict() | dict(vectors=2, clip_norm=1.0))
  start_knd = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
  slots = class_tokens.fresh_slots(settings, np.array([1, 0]), start_knd)
  np.testing.assert_array_equal(slots.token_cnd, start_knd[::-1])
  grad_snd = jnp.array([[[0, 3, 0], [4, 0, 0]], [[1, 1, 1], [1, jnp.nan, 1]]], jnp.float32)
  new = class_tokens.update(settings, class_tokens.optimiser(settings), slots, grad_snd, jnp.ones(2), jnp.zeros(2))
  assert [class_tokens.REASONS[reason] for reason in new.reason_c] == ["running", "nan"]
  np.testing.assert_allclose(optax.tree.get(new.optimiser, "mu")[0] / 0.1, grad_snd[0] / 5, rtol=1e-5)
  assert (new.token_cnd != slots.token_cnd).tolist()[0] == (grad_snd != 0).tolist()[0]
  np.testing.assert_array_equal(new.token_cnd[1], slots.token_cnd[1])


@pytest.fixture
def two_vectors(tiny_config):
  tiny_config.tokens.update(vectors=2, images=1, slots=4, slots_per_body=4, learning_rate=0.03)
  tiny_config.mesh.devices = 1
  return tiny_config


def arrays(folder, task="test"):
  return checkpoint.read_arrays(folder / "tokens" / TOKENS[task])


@pytest.mark.slow
def test_several_vectors(two_vectors, steps_once, tmp_path, monkeypatch, capsys):
  tokens = learn(two_vectors, tmp_path / "whole")
  for other in ("cut", "next"):
    shutil.copytree(tmp_path / "whole" / "cdm", tmp_path / other / "cdm")
  ws = workspace.Workspace(two_vectors.to_dict(), tmp_path, logs.Log(tmp_path))
  assert len(tokens) == 24 and all(token_nd.shape == (2, 32) for token_nd in tokens.values())
  moved = np.stack([token_nd - ws.initial_token for token_nd in tokens.values()])
  assert (np.abs(moved).max(-1) > 0).all(1).any() and not np.allclose(moved[:, 0], moved[:, 1])
  for name, token_nd in arrays(tmp_path / "whole").items():
    slug = prompts.slug(name)
    [(token, read_nd)] = textual_inversion.read(
        tmp_path / "whole" / "tokens" / "textual_inversion" / f"{slug}.safetensors").items()
    assert token == f"<{slug}>"
    np.testing.assert_array_equal(read_nd, token_nd)

  saved, save = [0], checkpoint.save_state

  def save_and_die(*arguments):
    save(*arguments)
    saved[0] += 1
    if saved[0] == 2:
      raise KeyboardInterrupt

  monkeypatch.setattr(class_tokens.checkpoint, "save_state", save_and_die)
  with pytest.raises(KeyboardInterrupt):
    learn(two_vectors, tmp_path / "cut")
  again = learn(two_vectors, tmp_path / "cut")
  assert saved[0] == 2 * 6  # three rounds of classes in each task, two looks a round: none was made twice
  for key, token_nd in tokens.items():
    np.testing.assert_array_equal(again[key], token_nd)

  file, first = tmp_path / "whole" / "tokens" / TOKENS["test"], arrays(tmp_path / "whole")
  two_vectors.tokens.update(initial_file=str(file), max_updates=1)  # so that the first token is the best one
  capsys.readouterr()
  learn(two_vectors, tmp_path / "next")
  for name, token_nd in arrays(tmp_path / "next").items():
    np.testing.assert_array_equal(token_nd, first[name])
  assert re.search(r"tokens \(validation\): \[.*\] are not in .*/learned_embeds.safetensors and start from 'a'",
                   capsys.readouterr().err)
  checkpoint.write_arrays(file, {name: token_nd + 1 for name, token_nd in first.items()})
  with pytest.raises(ValueError, match="tokens was made from other settings .models.initial_file: '.*' -> '.*'."):
    learn(two_vectors, tmp_path / "next")


def test_starts_of_tokens(two_vectors, tmp_path):
  def starts(task="test"):
    ws = workspace.Workspace(two_vectors.to_dict(), tmp_path, logs.Log(tmp_path))
    task = ws.tasks[task]
    return dict(zip((ws.dataset.names[label] for label in task.unseen), ws.token_starts(task))), ws

  found, ws = starts()
  word_nd = np.tile(ws.initial_token, (2, 1))
  assert len(found) == 12 and all((start_nd == word_nd).all() for start_nd in found.values())
  rng = np.random.default_rng(0)
  own = {name: rng.normal(size=(2, 32)).astype(np.float32) for name in found}
  two_vectors.tokens.initial_file = str(tmp_path / "own.safetensors")
  checkpoint.write_arrays(tmp_path / "own.safetensors", own)
  for name, start_nd in starts()[0].items():
    np.testing.assert_array_equal(start_nd, own[name])
  assert all((start_nd == word_nd).all() for start_nd in starts("validation")[0].values())

  two_vectors.tokens.initial_file = str(tmp_path / "one.safetensors")
  textual_inversion.write(tmp_path / "one.safetensors", "<star>", own["plain crimson circle"])
  for task in ("test", "validation"):
    assert all((start_nd == own["plain crimson circle"]).all() for start_nd in starts(task)[0].values())


def first_losses(config, folder, discriminator):
  """Of the first update of two classes: loss and accuracy, the same from the pictures' CLIP embeddings, workspace."""
  config.mesh.devices = 1
  config.tokens.update(slots=2, slots_per_body=2)
  ws = workspace.Workspace(config.to_dict(), folder, logs.Log(folder))
  ws.stage("tokens", (), class_tokens.MODELS)
  settings = base_workspace.parse(class_tokens.Settings, ws.config["tokens"], "tokens")
  learner = class_tokens.Learner(settings, ws, lambda task: discriminator(ws))
  task = ws.tasks["test"]
  frozen, slots = learner.frozen(task), class_tokens.fresh_slots(settings, np.arange(2), ws.token_starts(task))
  carry = learner.prefix(frozen, slots)
  _, made = learner.learn(frozen, slots, carry)

  path, class_b = class_tokens.gradient_path(settings, ws.schedule), jnp.repeat(jnp.arange(2), settings.images)

  @jax.jit
  def cosines():
    denoise = class_tokens.denoiser(settings, ws.sd, frozen.classes, class_b, slots.token_cnd[class_b])
    pictures_bijc = ws.sd.decode(path.finish(denoise, carry))
    preprocess = cdm.Preprocess.from_folder(ws.model_paths["clip"], ws.clip.vision_model.image_size)
    embeds_bd = losses.normalise(ws.clip.encode_image(preprocess(pictures_bijc))[0])
    return embeds_bd @ ws.text_prototypes_kd[list(task.unseen)].T

  log_bk = jax.nn.log_softmax(cosines() / settings.temperature)
  means = lambda values_b: np.asarray(values_b).reshape(2, -1).mean(1)
  direct = means(-log_bk[jnp.arange(len(class_b)), class_b]), means(log_bk.argmax(-1) == class_b)
  return (made.loss_c, made.accuracy_c), direct, ws


def test_clip_as_guide_is_zero_shot_clip_whatever_encoder_and_prototypes(tiny_config, tmp_path):
  shape = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=8,
               patch_size=4)
  hub.save(vit.ViT.from_json(shape, rngs=nnx.Rngs(3)), tmp_path / "vit", shape, dtype=np.float32)
  tiny_config.cdm.update(encoder=str(tmp_path / "vit"), kind="mlp")
  names = workspace.Workspace(tiny_config.to_dict(), tmp_path, logs.Log(tmp_path)).dataset.names
  np.savez(tmp_path / "own.npz", names=np.array(names), prototypes=np.tile(np.eye(5), (len(names), 1))[:len(names)])
  tiny_config.models.prototypes = str(tmp_path / "own.npz")
  tiny_config.tokens.guide = "clip"
  found, direct, _ = first_losses(tiny_config, tmp_path, lambda ws: pytest.fail("asked for the CDM"))
  for value_c, direct_c in zip(found, direct):
    np.testing.assert_allclose(value_c, direct_c, rtol=1e-4)


def test_a_trained_guide_is_another(tiny_config, tmp_path):
  def trained(ws):
    head = ws.new_cdm_head()
    head.fc2.kernel[...] = jax.random.normal(jax.random.key(0), head.fc2.kernel.shape)
    return cdm.CDM(ws.cdm_encoder, head)

  (loss_c, _), (direct_c, _), ws = first_losses(tiny_config, tmp_path, trained)
  assert (np.abs(loss_c - direct_c) > 0.01).all()
  other = workspace.Workspace({**ws.config, "tokens": {**ws.config["tokens"], "guide": "clip"}}, tmp_path, ws.log)
  stages = [where.stage("tokens", (), class_tokens.MODELS).fingerprint for where in (ws, other)]
  assert stages[0] != stages[1]


def test_a_guide_that_is_none_is_refused():
  section = quickstart.get_config().tokens.to_dict() | {"guide": "judge"}
  with pytest.raises(ValueError, match="config.tokens.guide is 'judge'; it must be one of .'cdm', 'clip'."):
    base_workspace.parse(class_tokens.Settings, section, "tokens")
