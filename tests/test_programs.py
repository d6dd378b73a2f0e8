"""Steps that a second start reads in place of tracing them."""

from typing import NamedTuple

import jax
import numpy as np
import pytest

from digzsl_jax import mesh, programs


class Pair(NamedTuple):
  """A tree that JAX has no name for."""

  sum_b: jax.Array
  part_b: dict[str, jax.Array]


class Step:
  """`make()` is a fresh step, as another process would make it; `traced` counts."""

  def __init__(self, folder, devices=8, power=2):
    self.folder, self.devices, self.power, self.traced = folder, mesh.make(devices), power, 0

  def make(self):
    def work(scale, pair):
      self.traced += 1
      return Pair(scale * (pair.sum_b + pair.part_b["x"].sum(1)) ** self.power, pair.part_b)

    return mesh.compile_chunked(work, lambda scale, pair: pair, self.devices, 1, keep=self.folder)

  def args(self, rows=16):
    pair = Pair(np.arange(rows, dtype=np.float32), {"x": np.random.default_rng(0).random((rows, 3), np.float32)})
    return (mesh.place_models(np.float32(3), self.devices), mesh.place(pair, mesh.by_class(self.devices)))

  def found(self):
    return sorted(path.name for path in self.folder.iterdir())


def test_a_second_start_reads(tmp_path):
  step = Step(tmp_path / "programs")
  first, again = step.make(), step.make()
  made = [first(*step.args()), first(*step.args())]
  assert step.traced == 1
  [name] = step.found()
  assert name.startswith("work-") and name.endswith(".jax")
  made.append(again(*step.args()))
  assert step.traced == 1 and step.found() == [name]
  plain = mesh.compile_chunked(lambda scale, pair: Pair(scale * (pair.sum_b + pair.part_b["x"].sum(1)) ** 2,
                                                        pair.part_b), lambda scale, pair: pair, step.devices, 1)
  expected = plain(*step.args())
  for one in made:
    assert jax.tree.structure(one) == jax.tree.structure(expected)
    assert one.sum_b.sharding.is_equivalent_to(expected.sum_b.sharding, 1)
    jax.tree.map(np.testing.assert_array_equal, one, expected)
  assert again.lower(*step.args()).out_info.sum_b.shape == (16,)


@pytest.mark.parametrize("damage", [lambda whole: whole[:-5], lambda whole: b"", lambda whole: b"?" + whole[1:],
                                    lambda whole: whole[:40] + b"??" + whole[42:]])
def test_a_damaged_one_is_written_again(damage, tmp_path):
  step = Step(tmp_path)
  expected = step.make()(*step.args())
  [file] = tmp_path.iterdir()
  file.write_bytes(damage(file.read_bytes()))
  jax.tree.map(np.testing.assert_array_equal, step.make()(*step.args()), expected)
  assert step.traced == 2
  step.make()(*step.args())
  assert step.traced == 2


def test_one_of_other_shapes_devices_flags_or_code_is_not_taken(tmp_path, monkeypatch):
  step = Step(tmp_path)
  keys = []

  def one(step, rows=16):
    step.make()(*step.args(rows))
    keys.extend(step.found())
    assert len(step.found()) == 1, "the one before is gone"

  one(step)
  one(step, rows=8)
  one(Step(tmp_path, devices=4))
  before = jax.config.jax_default_matmul_precision
  try:
    jax.config.update("jax_default_matmul_precision", "highest" if before != "highest" else "high")
    one(step)
  finally:
    jax.config.update("jax_default_matmul_precision", before)
  monkeypatch.setattr(programs, "__file__", str(tmp_path / "elsewhere" / "programs.py"))
  one(step)
  monkeypatch.setattr(jax, "__version__", "0.0.1")
  one(step)
  assert len(set(keys)) == len(keys) == 6


@pytest.mark.parametrize("error", [ImportError("flatbuffers"), ValueError("no guarantee"), NotImplementedError()])
def test_where_none_can_be_written(error, tmp_path, monkeypatch):
  step = Step(tmp_path / "programs")

  def refuse(*args, **settings):
    raise error

  monkeypatch.setattr(programs.export, "export", refuse)
  result = step.make()(*step.args())
  assert float(result.sum_b[0]) > 0 and not step.folder.exists()


def test_a_full_disk_costs_a_program_alone(tmp_path):
  step = Step(tmp_path / "file" / "programs")
  (tmp_path / "file").write_text("in the place of a folder")
  assert float(step.make()(*step.args()).sum_b[0]) > 0
