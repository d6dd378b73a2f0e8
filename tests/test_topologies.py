"""Programs compiled without weights, here for the CPU's own devices; for TPUs where their compiler is there.

The latter, which takes two cores ten minutes and 8 GiB:

  pip install "jax[tpu]" && python -m pytest tests/test_topologies.py -m slow -n 0
"""

import json
import os
import subprocess
import sys

import jax
import pytest

from digzsl_jax.bench import ahead, sizes, topologies
from digzsl_jax.models import platforms
from tests.test_bench import BATCH, smallest

REFUSED = [
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.38G of 15.75G "
    "hbm. Exceeded hbm capacity by 4.63G.",
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (20.38G) exceeds "
    "available HBM (15.75G)."]


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_program_leaves_a_line(monkeypatch, tmp_path, capsys):
  size = smallest()
  monkeypatch.setitem(sizes.SIZES, "tiny", lambda: size)
  monkeypatch.setattr(sizes, "filled", None)  # nothing has weights
  out = tmp_path / "new" / "lines.jsonl"
  topologies.main(["--topology", "cpu", "--size", "tiny", "--out", str(out)])
  found = lines(out)
  assert [(line["stage"], line["program"]) for line in found] == [
      ("tokens", "prefix"), ("tokens", "learn"), ("generate", "sample"), ("features", "encode"),
      ("classifier", "train")]
  for line in found:
    assert line["fits"] and line["chips"] == jax.device_count() and line["device"] == "cpu"
    assert line["collectives"] == 0 and line["dtype"] == "bfloat16"
    assert line["total_gib"] >= line["argument_gib"] > 0 and line["temp_gib"] > 0 and line["compile_seconds"] > 0
  assert [line["images_per_chip"] for line in found[2:4]] == [BATCH["generate"], BATCH["features"]]
  said = capsys.readouterr()
  assert [json.loads(line) for line in said.out.splitlines()] == found
  assert said.err.count("0 collectives") == len(found)


def test_batches_and_programs_are_chosen(monkeypatch, tmp_path):
  asked = []

  def stage(place):
    asked.append(place.batch)
    return [ahead.Program(name, place.batch, lambda: jax.jit(lambda x: x).lower(ahead.array(2)))
            for name in ("first", "second")]

  monkeypatch.setitem(ahead.PROGRAMS, "tokens", stage)
  topologies.main(["--topology", "cpu", "--size", "tiny", "--stages", "tokens", "--only", "second", "--batch", "2", "4",
                   "--out", str(tmp_path / "lines.jsonl")])
  assert asked == [2, 4]
  assert [(line["program"], line["images_per_chip"]) for line in lines(tmp_path / "lines.jsonl")] == [
      ("second", 2), ("second", 4)]


class Refused:
  """Lowered, but not to be compiled."""

  def __init__(self, message):
    self.message = message

  def compile(self):
    raise jax.errors.JaxRuntimeError(self.message)


@pytest.mark.parametrize("message", REFUSED)
def test_a_program_that_does_not_fit_is_a_line_too(message):
  traced = []
  program = ahead.Program("sample", 64, lambda: traced.append(platforms.platform()) or Refused(message))
  line = topologies.compile_for(program, topologies.chips("cpu"))
  assert not line["fits"] and line["needed_gib"] == 20.38 and line["limit_gib"] == 15.75 and traced == ["cpu"]
  assert topologies.said("v5e:4x4", line).startswith("v5e:4x4 sample, 64 images: DOES NOT FIT, 20.38 of 15.75 GiB")
  with pytest.raises(jax.errors.JaxRuntimeError, match="another"):
    topologies.compile_for(program._replace(lower=lambda: Refused("INTERNAL: another")), topologies.chips("cpu"))


def test_an_unknown_topology_is_answered_in_one_line(tmp_path):
  with pytest.raises(SystemExit, match="--topology is 'v5e:three': .*v5e:4x4"):
    topologies.main(["--topology", "v5e:three", "--out", str(tmp_path / "lines.jsonl")])
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("size, topology, chips", [
    ("tiny", "v5e:4x4", 16), ("tiny", "v6e:4x4", 16), ("tiny", "v5p:2x2x2", 8), ("sd15", "v5e:16x16", 256)])
def test_programs_of_a_tpu_fit_and_are_silent(size, topology, chips, tmp_path):
  pytest.importorskip("libtpu", reason="no compiler for TPUs: pip install jax[tpu]")
  # In a process of its own: the tests' flags and exact products would make other programs.
  environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  subprocess.run([sys.executable, "-m", "digzsl_jax.bench.topologies", "--topology", topology, "--size", size,
                  "--effort=-1", "--stages", "tokens", "generate", "--out", str(tmp_path / "lines.jsonl")],
                 env=environment, check=True)
  found = lines(tmp_path / "lines.jsonl")
  assert [line["program"] for line in found] == ["prefix", "learn", "sample"]
  for line in found:
    assert line["chips"] == chips and line["fits"] and line["effort"] == -1 and line["collectives"] == 0, line
    assert line["total_gib"] < line["memory_gib"]
