"""Weights divided over the mesh: what is divided, equal results, and what it takes of a device's memory."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from digzsl_jax import checkpoint, fsdp, logs, mesh, workspace
from digzsl_jax.data import images
from digzsl_jax.models import cdm, layers
from digzsl_jax.runs import class_tokens, generate
from tests.test_processes import ends, main, start

P = jax.sharding.PartitionSpec


def collectives(compiled):
  """How many of each kind are in a program."""
  found = re.findall(r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(",
                     compiled.as_text())
  return {kind: found.count(kind) for kind in set(found)}


class Layers(nnx.Module):

  def __init__(self, rngs):
    self.linear = layers.linear(6, 5, dtype=jnp.float32, rngs=rngs)
    self.conv = layers.conv(2, 3, 3, dtype=jnp.float32, rngs=rngs)
    self.odd = layers.conv(1, 4, 3, dtype=jnp.float32, rngs=rngs)
    self.words = layers.embedding(8, 4, dtype=jnp.float32, rngs=rngs)


def test_rows_of_matrices_are_divided():
  model, devices = Layers(nnx.Rngs(0)), mesh.make(4, 2)
  graphdef, params = nnx.split(model)
  assert {spec for spec in jax.tree.leaves(fsdp.specs(params))} == {P()}
  placed = mesh.place_models((params, np.arange(6).reshape(2, 3)), devices)
  shapes = {jax.tree_util.keystr(path, simple=True, separator="."): leaf.addressable_shards[0].data.shape
            for path, leaf in jax.tree.leaves_with_path(placed[0])}
  assert shapes == {"conv.bias.value": (3,), "conv.kernel.value": (9, 3), "linear.bias.value": (5,),
                    "linear.kernel.value": (3, 5), "odd.bias.value": (4,), "odd.kernel.value": (3, 3, 1, 4),
                    "words.embedding.value": (4, 4)}
  assert placed[1].sharding.is_fully_replicated

  def weights(placed):
    model = nnx.merge(graphdef, placed[0])
    return model.linear.kernel[...], model.conv.kernel[...], model.words.embedding[...], model.odd.kernel[...]

  found = jax.jit(jax.shard_map(weights, mesh=devices, in_specs=(fsdp.specs(placed),), out_specs=P(),
                                check_vma=False))(placed)
  for one, kept in zip(found, (model.linear.kernel, model.conv.kernel, model.words.embedding, model.odd.kernel)):
    np.testing.assert_array_equal(one, kept[...])


def test_the_mesh():
  assert mesh.make(8).axis_names == ("class",) and mesh.by_class(mesh.make(8)).spec == P("class")
  both = mesh.make(0, 4)
  assert dict(both.shape) == {"class": 2, "fsdp": 4} and [*both.devices.flat] == jax.devices()
  rows = jax.device_put(np.arange(16), mesh.by_class(both))
  assert [shard.data.tolist() for shard in rows.addressable_shards] == np.arange(16).reshape(8, 2).tolist()


@pytest.mark.parametrize("devices, wrong", [(0, 3), (6, 4), (0, 0), (4, 8), (0, -2)])
def test_devices_that_cannot_be_grouped(devices, wrong):
  with pytest.raises(ValueError, match=rf"config.mesh.fsdp is {wrong}, but .* of the {devices or 8} devices .* \[1, 2"):
    mesh.make(devices, wrong)


def test_hosts_without_a_place_for_weights(monkeypatch):
  monkeypatch.setattr(jax, "local_devices", lambda backend: jax.devices("none of these"))
  with fsdp.on_host(mesh.make(8)):
    pass
  with pytest.raises(ValueError, match="config.mesh.fsdp loads weights by way of the host.*none of these.*\",cpu\""):
    fsdp.on_host(mesh.make(8, 2))


def made(config, folder, parts):
  """`tokens, gradient, pixels` of one update and one picture of each class, and the programs."""
  config.mesh.fsdp = parts
  config.generate.update(batch=2)
  ws = workspace.Workspace(config.to_dict(), folder, logs.Log(folder))
  ws.stage("tokens", (), class_tokens.MODELS)
  ws.stage("generate", ("tokens",), generate.MODELS)
  task, settings = ws.tasks["test"], class_tokens.Settings(**ws.config["tokens"])
  settings = dataclasses.replace(settings, slots=16, slots_per_body=1)
  learner = class_tokens.Learner(settings, ws, lambda task: cdm.CDM(ws.cdm_encoder, ws.new_cdm_head()))
  frozen, count = learner.frozen(task), len(task.unseen)
  class_c = np.where(np.arange(16) % 3 == 2, -1, np.arange(16) % count)  # neighbours of idle ones, that gather alike
  slots = mesh.place(class_tokens.fresh_slots(settings, class_c, ws.token_starts(task)), mesh.by_class(ws.mesh))
  carry = learner.prefix(frozen, slots)
  programs = [learner.prefix.lower(frozen, slots).compile(), learner.learn.lower(frozen, slots, carry).compile()]
  slots, update = learner.learn(frozen, slots, carry)
  settings = generate.Settings(**ws.config["generate"])
  paint, shared = generate.prepare(settings, ws)
  ids_kl, _ = ws.token_prompts(task)
  labels = np.arange(16) % count
  rows = mesh.place(generate.Rows(labels, np.arange(16), ids_kl[labels], ws.token_starts(task)[labels]),
                    mesh.by_class(ws.mesh))
  programs.append(paint.lower(shared, rows).compile())
  busy, gradient = class_c >= 0, slots.optimiser[1][0].mu
  return [np.asarray(leaf) for leaf in (slots.token_cnd, gradient, update.loss_c[busy], paint(shared, rows))], programs


def test_divided_weights_make_the_same(tiny_config, tmp_path):
  """The same weights and rows on every device: what may differ is how XLA fuses, so the order of some sums."""
  (tokens, gradient, loss, pixels), programs = made(tiny_config, tmp_path, 1)
  assert not any(map(collectives, programs)) and np.abs(gradient).max() > 0
  for parts in (2, 4):
    found, divided = made(tiny_config, tmp_path, parts)
    print(parts, *(np.abs(one - other).max() for one, other in zip((tokens, gradient, loss), found)),
          (found[3] != pixels).sum(), pixels.size, *map(collectives, divided))
    np.testing.assert_allclose(found[1], gradient, rtol=0, atol=1e-5 * np.abs(gradient).max())
    np.testing.assert_allclose(found[2], loss, rtol=1e-5)
    # AdamW's first step is rate * g / (|g| + 1e-8), g = 10 mu: where g is nearly nothing, its last bits show.
    bound = tiny_config.tokens.learning_rate * 10 * np.abs(found[1] - gradient).max() / 1e-8
    np.testing.assert_allclose(found[0], tokens, rtol=1e-5, atol=bound)
    assert np.abs(found[3].astype(int) - pixels).max() <= 1
    for program in divided:
      count = collectives(program)
      assert set(count) == {"all-gather", "all-reduce"} and count["all-reduce"] == 1  # of that who is busy


class Tower(nnx.Module):
  """Many layers of one size."""

  def __init__(self, rngs):
    self.layers = nnx.List([layers.linear(128, 128, dtype=jnp.float32, rngs=rngs) for _ in range(16)])

  def __call__(self, x_bd):
    for layer in self.layers:
      x_bd = jnp.tanh(layer(x_bd))
    return x_bd


def test_weights_are_gathered_where_they_are_read():
  """In every round of a sampler's loop and not before it."""
  graphdef, params = nnx.split(Tower(nnx.Rngs(0)))
  devices = mesh.make(4, 4)

  def calls(params, x_bd):
    return jax.lax.scan(lambda x_bd, t: (t * nnx.merge(graphdef, params)(x_bd), None), x_bd, jnp.arange(3.0))[0]

  rows = jax.device_put(np.zeros((4, 128), np.float32), mesh.by_class(devices))
  placed = mesh.place_models(params, devices)
  compiled = mesh.compile_chunked(calls, lambda params, x_bd: x_bd, devices, 1).lower(placed, rows).compile()
  [gathering] = [part for part in re.split(r"\n(?=\S.*\{\n)", compiled.as_text()) if " all-gather(" in part]
  assert gathering.count(" all-gather(") == 16 and " while(" not in gathering  # nor where the loop itself stands
  whole = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
  assert compiled.memory_analysis().argument_size_in_bytes < whole / 3.8


def test_no_weight_waits_for_its_next_reader():
  """A second call gathers anew and so does the way back; merged, gathers would hold all weights from first to last."""
  graphdef, params = nnx.split(Tower(nnx.Rngs(0)))
  devices = mesh.make(4, 4)

  def loss(x_bd, params):
    for _ in range(2):
      for layer in nnx.merge(graphdef, params).layers:
        x_bd = layers.call(lambda layer, x_bd: jnp.tanh(layer(x_bd)), layer, x_bd, remat=True)
    return (x_bd**2).sum()

  placed, rows = mesh.place_models(params, devices), mesh.by_class(devices)
  gradient = jax.shard_map(jax.grad(loss), mesh=devices, in_specs=(rows.spec, fsdp.specs(placed)), out_specs=rows.spec,
                           check_vma=False)
  program = jax.jit(gradient).lower(jax.device_put(np.zeros((4, 128), np.float32), rows), placed).compile().as_text()
  assert program.count(" all-gather(") == 2 * 2 * 16


@pytest.mark.slow
def test_two_processes_divide_weights_within_them_and_between_them(tiny_world, tmp_path):
  """2 x 2 devices against one process with whole weights: tokens but for last bits, images but for 1 of 255."""
  found = {}
  for name, count, parts in (("whole", 1, 1), ("within", 2, 2), ("between", 2, 4)):
    command = main(tiny_world, tmp_path / name, stages="cdm,tokens,generate", **{"mesh.fsdp": parts})
    for status, said in ends(start(command, count=count, devices=4 // count), 300):
      assert status == 0, said
    folder = tmp_path / name
    found[name] = checkpoint.read_arrays(folder / "tokens" / "learned_embeds.safetensors"), {
        path.relative_to(folder): images.read_png(path).astype(int) for path in folder.rglob("*.png")}
  tokens, pictures = found.pop("whole")
  for name, (others, painted) in found.items():
    print(name, max(np.abs(others[key] - token).max() for key, token in tokens.items()),
          max(np.abs(painted[path] - pixels).max() for path, pixels in pictures.items()))
    assert painted.keys() == pictures.keys() and others.keys() == tokens.keys()
    for key, token in tokens.items():
      np.testing.assert_allclose(others[key], token, atol=1e-4)  # beside four steps of 0.03 of AdamW
    assert max(np.abs(painted[path] - pixels).max() for path, pixels in pictures.items()) <= 1
