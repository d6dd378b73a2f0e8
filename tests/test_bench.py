"""Benches at the smallest size: what a line says, how it is timed, and the table."""

import functools
import json
import math

import jax
import pytest

from configs import base
from digzsl_jax import flops, logs, mesh, report
from digzsl_jax import main as command
from digzsl_jax.base_workspace import parse
from digzsl_jax.bench import __main__ as plain
from digzsl_jax.bench import measure, peers, sizes, steps
from digzsl_jax.bench import run as bench

TOWER = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2)
UNET = dict(sample_size=4, in_channels=4, out_channels=4, block_out_channels=(8,), layers_per_block=1,
            norm_num_groups=4, cross_attention_dim=16, attention_head_dim=2,
            down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",))
VAE = dict(in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8, 8), layers_per_block=1,
           norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
MODEL = dict(text_config=dict(TOWER, vocab_size=40, max_position_embeddings=8),
             vision_config=dict(TOWER, image_size=8, patch_size=4), projection_dim=12)
BATCH = dict(tokens=2, generate=2, features=4, head=8, classifier=2, tagclip=2, fid=40, unet=2)
KEYS = {"bench", "size", "implementation", "versions", "device", "device_count", "dtype", "batch", "steps",
        "repetitions", "p10_ms", "p50_ms", "p90_ms", "cpu_p50_ms", "images_per_second_per_chip", "tflop",
        "mfu_datasheet", "mfu_measured", "compile_seconds", "first_call_seconds", "first_call_seconds_warm",
        "peak_memory_gib", "peak_memory_source", "load1", "flags", "git", "relative_error"}


def smallest():
  return sizes.SIZES["tiny"]()._replace(
      text=dict(MODEL["text_config"]), unet=UNET, vae=VAE, clip=MODEL, batch=BATCH, classes=(3, 4),
      head=("residual", 6), rows=40, picture=(16, 24), labels=(5, 2), width=6, rules=(1, 1))


@pytest.fixture
def small(monkeypatch):
  """In place of "tiny"."""
  size = smallest()
  monkeypatch.setitem(sizes.SIZES, "tiny", lambda: size)
  monkeypatch.setattr(measure, "PRODUCTS", {"cpu": 64})
  return size


def place(size, **changes):
  return sizes.Place(**dict(size=size, models=sizes.Models(size, "float32"), devices=mesh.make(1), batch=0,
                            steps=2) | changes)


def config(**changes):
  new = base.bench()
  new.mesh.devices = 1
  new.bench.update(dict(repetitions=2, steps=2, second_start=False) | changes)
  return new.to_dict()


def test_every_bench_leaves_a_line(small, tmp_path, capsys):
  before = jax.config.jax_compilation_cache_dir
  command.METHODS["bench"](config(), tmp_path, logs.Log(tmp_path), False)
  printed = capsys.readouterr().out.splitlines()
  lines = [json.loads(line) for line in (tmp_path / "bench.jsonl").read_text().splitlines()]
  assert [json.loads(line) for line in printed] == lines
  assert [line["bench"] for line in lines] == list(steps.BENCHES)
  for line in lines:
    assert KEYS <= set(line)
    assert line["implementation"] == "digzsl_jax" and line["repetitions"] == 2 and line["device_count"] == 1
    assert 0 < line["p10_ms"] <= line["p50_ms"] <= line["p90_ms"]
    assert line["images_per_second_per_chip"] == pytest.approx(1000 * line["images"] / line["p50_ms"], rel=1e-3)
    assert line["batch"] == BATCH[line["bench"]] and line["mfu_datasheet"] is None
    if line["bench"] != "fid":
      assert 0 < line["compile_seconds"] < line["first_call_seconds"]
      speed = 1000 * line["tflop"] / line["p50_ms"]
      assert line["mfu_measured"] == pytest.approx(speed / line["product_tflops"], rel=1e-3)
  with_memory = {line["bench"] for line in lines if line["peak_memory_source"]}
  assert with_memory == {"tokens", "generate", "head", "classifier", "unet"}
  assert jax.config.jax_compilation_cache_dir == before

  assert report.main(["--bench", str(tmp_path / "bench.jsonl")]) == 0
  table = capsys.readouterr().out
  assert "### 1 x cpu, float32" in table and f"jax {jax.__version__}" in table
  rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")]
  assert [row[0] for row in rows] == ["| bench", *(f"| {name}" for name in steps.BENCHES)]
  assert "MFU sheet %" not in rows[0] and "times as fast" not in rows[0]


def test_operations_of_a_token_update(small):
  """By hand from the parts; tiny's x0 path differentiates its last call alone."""
  timed = steps.tokens(place(small))
  unet = functools.partial(flops.unet, small.unet_config, 4, 4, 8)
  judged = steps.decoder_work(small) + steps.vision_work(small)
  picture = (2 * 2 * unet().forward + flops.unet_backward(small.unet_config, 4, 4, 8, latents=False)
             + judged.forward + judged.backward)
  text = flops.text(steps.text_config(small), 8)
  assert timed.flop(None) == 2 * (small.tokens.images * picture + text.forward + text.backward)
  assert (timed.images, timed.batch, timed.steps) == (6, 2, 2)


def test_batch_and_steps_are_those_asked_for(small):
  timed = steps.generated(place(small, batch=3, steps=4))
  assert (timed.images, timed.batch, timed.steps) == (3, 3, 4)
  fewer = steps.generated(place(small, batch=3, steps=2))
  assert timed.flop(None) - fewer.flop(None) == 3 * 2 * 2 * steps.denoiser_flop(small)  # images, calls, halves


def test_weights_are_the_same_in_every_process(small):
  leaves = [jax.tree.leaves(sizes.nnx.state(sizes.Models(small, "float32").clip)) for _ in range(2)]
  assert all((a == b).all() for a, b in zip(*leaves))
  assert all(float(abs(leaf).max()) > 0 for leaf in leaves[0])


def test_calls_take_turns_until_the_time_is_up():
  said = []
  call = lambda name, seconds: lambda: (said.append(name), (seconds, seconds / 2))[1]
  ours, theirs = measure.repeat([call("a", 1.0), call("b", 2.0)], 3, math.inf)
  assert said == ["a", "b"] * 3 and (ours.wall, theirs.cpu) == ([1.0] * 3, [1.0] * 3)
  [once] = measure.repeat([call("a", 1.0)], 3, 0.0)
  assert once.wall == [1.0]


def test_answers_that_differ_are_refused():
  a, b = {"x": sizes.np.ones(4)}, {"x": sizes.np.ones(4) * 1.01}
  assert peers.agreement("unet", a, b, "bfloat16") == pytest.approx(0.01 / 1.01)
  with pytest.raises(ValueError, match="bench unet: x differs from PyTorch's by 0.0099"):
    peers.agreement("unet", a, b, "float32")
  with pytest.raises(ValueError, match="differs"):
    peers.agreement("unet", {"x": sizes.np.array([float("nan")])}, {"x": sizes.np.ones(1)}, "bfloat16")
  with pytest.raises(ValueError, match="PyTorch's"):
    peers.agreement("unet", a, {"y": sizes.np.ones(4)}, "float32")


@pytest.mark.parametrize("changes, said", [
  ({"sizes": ("tiny,huge",)}, "config.bench.sizes is 'huge'"), ({"dtype": "float16"}, "config.bench.dtype"),
  ({"compare": "jax"}, "config.bench.compare"), ({"repetitions": 0}, "config.bench.repetitions"),
  ({"seconds": 0.0}, "config.bench.seconds"), ({"steps": -1}, "batch or steps")])
def test_impossible_settings(changes, said):
  with pytest.raises(ValueError, match=said):
    parse(bench.Settings, config(**changes)["bench"], "bench")


def test_a_peer_has_no_mixed_precision():
  with pytest.raises(ValueError, match="no dtype 'mixed'"):
    peers.check("torch", "mixed")


def test_full_is_both_families():
  assert bench.Settings(sizes=("tiny,full", "sd15")).expanded == ["tiny", "sd15", "sd21"]


def test_the_plain_command_line_has_the_defaults_of_the_config():
  given = base.bench().to_dict()
  assert parse(bench.Settings, given["bench"], "bench") == bench.Settings()
  flags = vars(plain.parser().parse_args([]))
  assert tuple(flags["stages"]) == given["stages"] == tuple(steps.BENCHES)
  assert all(flags[name] == value for name, value in given["bench"].items())


def test_dry_run_makes_nothing(small, tmp_path, capsys):
  asked = config() | {"stages": ("head", "fid")}
  command.METHODS["bench"](asked, tmp_path / "run", logs.Log(None), True)
  printed = capsys.readouterr().out
  assert "head tiny: batch 8, steps 2, 16 images" in printed and "MiB temporary" in printed
  assert not (tmp_path / "run").exists()


def test_a_second_start(tmp_path, capsys):
  command.METHODS["bench"](config(second_start=True) | {"stages": ("fid",)}, tmp_path, logs.Log(tmp_path), False)
  assert json.loads(capsys.readouterr().out)["first_call_seconds_warm"] > 0


def test_table_of_lines_that_are_damaged(tmp_path, capsys):
  good = {"bench": "unet", "size": "tiny", "implementation": "torch", "device": "cpu", "device_count": 2,
          "dtype": "float32", "p50_ms": 1234.5, "p10_ms": 1.0, "p90_ms": 2.0, "mfu_measured": 0.5}
  one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
  one.write_text(json.dumps(good) + "\n{\n" + json.dumps({"bench": "unet"}) + "\n")
  two.write_text(json.dumps(good | {"device": "NVIDIA H200", "mfu_datasheet": 0.25}) + "\n")
  assert report.main(["--bench", str(one), str(two), str(tmp_path / "absent")]) == 1
  printed, said = capsys.readouterr()
  assert "| 1,234 | 1\u20132 |" in printed and "| 50 |" in printed
  assert "### 2 x NVIDIA H200, float32" in printed and "MFU sheet %" in printed and str(two) in printed
  assert f"{one}, line 2: " in said and f"{one}, line 3: not a line of a bench (no size" in said and "absent" in said
