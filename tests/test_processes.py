"""Several processes make what one makes, and end together; what they find around them.

Processes are CPUs that `NPROC` gives thread pools of one size: XLA:CPU divides sums among as many threads as there are
cores or, if these are more, devices of the process, and another division gives other last bits.
"""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from digzsl_jax import checkpoint, files, logs, mesh, processes

ROOT = pathlib.Path(__file__).parent.parent
SETTINGS = {"data.train_per_class": 8, "data.test_per_class": 4, "cdm.hidden": 16, "cdm.steps": 20, "cdm.batch": 32,
            "cdm.cache": "", "tokens.images": 1, "tokens.steps": 2, "tokens.slots": 8, "tokens.slots_per_body": 1,
            "tokens.check_every": 1, "tokens.max_updates": 4, "tokens.learning_rate": 0.03, "generate.images": 2,
            "generate.steps": 2, "generate.batch": 4, "classifier.images": 2, "classifier.steps": 10}
AROUND = ("JAX_", "SLURM_", "OMPI_", "KUBERNETES_", "JOB_COMPLETION_INDEX", "TPU_", "XLA_FLAGS")


def environment(devices):
  """Of a process with so many devices; what was compiled in other tests is shared."""
  told = {name: value for name, value in os.environ.items() if not name.startswith(AROUND)}
  flags = " ".join(flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag)
  cache = {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
           "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05"} if jax.config.jax_compilation_cache_dir else {}
  return told | cache | {"JAX_PLATFORMS": "cpu", "NPROC": "4", "JAX_NUM_CPU_DEVICES": str(devices), "XLA_FLAGS": flags}


def start(*commands, devices=1, count=None):
  """Starts each command line as one process of a run, or `count` times the only one."""
  commands = commands * (count or 1)
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  started = []
  for index, command in enumerate(commands):
    told = {processes.ADDRESS: address, processes.COUNT: str(len(commands)), processes.INDEX: str(index)}
    told = environment(devices) | (told if len(commands) > 1 else {})
    started.append(subprocess.Popen([sys.executable, *command], cwd=ROOT, env=told, text=True, stdout=subprocess.PIPE,
                                    stderr=subprocess.PIPE))
  return started


def ends(started, within=60):
  """`[(exit status, stderr)]` of all processes."""
  try:
    return [(process.wait(within), process.communicate()[1]) for process in started]
  finally:
    for process in started:
      process.kill()


def main(world, workdir, **settings):
  """The command line of a tiny run on the models of `world`."""
  models = {f"models.{name}": world / name for name in ("clip", "sd", "judge")}
  return ["-m", "digzsl_jax.main", "--config=configs/quickstart.py", f"--workdir={workdir}",
          *(f"--config.{name}={value}" for name, value in (models | SETTINGS | settings).items())]


def products(folder):
  """Bytes of all arrays and pictures, and the results without times."""
  found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
           if path.suffix in (".png", ".safetensors")}
  results = json.loads((folder / "results.json").read_text())
  results.pop("seconds")
  return found, results


def times_of_programs(folder):
  """When each traced step was written."""
  return {path.relative_to(folder): path.stat().st_mtime_ns for path in folder.rglob("*.jax")}


def await_path(path, within=120):
  end = time.monotonic() + within
  while not path.exists():
    assert time.monotonic() < end, f"{path} does not come"
    time.sleep(0.05)


@pytest.mark.slow
def test_many_processes_make_what_one_makes(tiny_world, tmp_path):
  """Four devices of one process, of two of which one is killed on the way, and of four."""
  for name, count, devices in (("one", 1, 4), ("four", 4, 1)):
    for status, said in ends(start(main(tiny_world, tmp_path / name), count=count, devices=devices), 500):
      assert status == 0, said
  cut = main(tiny_world, tmp_path / "cut")
  started = start(cut, count=2, devices=2)
  await_path(tmp_path / "cut" / "tokens" / "test_state.safetensors")
  started[1].send_signal(signal.SIGKILL)
  (status, said), (killed, _) = ends(started)
  assert killed == -signal.SIGKILL and status == processes.AGAIN
  assert "most likely another one was killed or cut off). Finished work is kept: start all" in said
  assert not (tmp_path / "cut" / "tokens" / "done.json").exists()
  traced = times_of_programs(tmp_path / "cut")
  assert {(path.parts[0], path.name.partition("-")[0]) for path in traced} == {("tokens", "prefix"),
                                                                               ("tokens", "learn")}
  said = [said for _, said in ends(start(cut, count=2, devices=2), 500)]
  assert "cdm: already there" in said[0] and "evaluate: " in said[0]
  assert not [line for line in said[1].splitlines() if not line.startswith("[Gloo]")]
  assert traced.items() <= times_of_programs(tmp_path / "cut").items(), "traced again"
  files, results = products(tmp_path / "one")
  assert len([name for name in files if name.endswith(".png")]) == 2 * 2 * 12 * 2
  for name in ("four", "cut"):
    others, found = products(tmp_path / name)
    assert others.keys() == files.keys() and found == results
    assert not [file for file in files if others[file] != files[file]]
    lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
    if name == "four":
      assert [json.loads(line) for line in lines] == [
          json.loads(line) for line in (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_two_processes_train_a_decoder(tiny_world, tmp_path):
  """To what one makes but for the order of sums over a batch, which are divided among devices."""
  small = ["data.train=60", "data.test=40", "train.width=16", "train.heads=2", "train.feed_forward=16",
           "train.shared=8", "train.epochs=2", "train.batch=16", f"models.clip={tiny_world / 'clip'}"]
  scores, results = [], []
  for count, devices in ((1, 4), (2, 2)):
    command = ["-m", "digzsl_jax.main", "--config=configs/quickstart_clip_decoder.py",
               f"--workdir={tmp_path / str(count)}", *(f"--config.{setting}" for setting in small)]
    for status, said in ends(start(command, count=count, devices=devices), 300):
      assert status == 0, said
    scores.append(checkpoint.read_arrays(tmp_path / str(count) / "evaluate" / "scores.safetensors")["clip_decoder"])
    results.append(files.read_json(tmp_path / str(count) / "results.json"))
  np.testing.assert_allclose(*scores, atol=1e-5)
  assert results[0]["zsl"].keys() == results[1]["zsl"].keys()
  np.testing.assert_allclose(*(found["gzsl"]["mAP"] for found in results), atol=0.1)


@pytest.mark.slow
def test_a_dry_run_is_printed_once_and_no_step_of_tokens_has_collectives(tiny_world, tmp_path):
  started = start([*main(tiny_world, tmp_path / "run"), "--dry_run", "--config.stages=tokens"], count=2)
  printed = [process.communicate(timeout=100) for process in started]
  assert [process.returncode for process in started] == [0, 0], printed
  lines = [line for line in printed[0][0].splitlines() if line.startswith(("  prefix: ", "  learn: "))]
  assert len(lines) == 2 and all(line.endswith(" MiB arguments, 0 collectives") for line in lines)
  assert not printed[1][0] and not list((tmp_path / "run").iterdir())


def test_processes_with_other_settings_end_before_anything_is_made(tiny_world, tmp_path):
  commands = [main(tiny_world, tmp_path / "run", **{"stages": "cdm", "cdm.steps": steps}) for steps in (20, 21)]
  for number, (status, said) in enumerate(ends(start(*commands), 100)):
    [line] = [line for line in said.splitlines() if f"process {number} of 2: " in line]
    assert status == 1 and "what stage cdm is made from is not the same in processes 1 and 0" in line
    assert "(cdm.steps: 21, there 20)" in line
  assert not (tmp_path / "run" / "cdm" / "features.safetensors").exists()


def test_a_method_of_one_process_says_so(tmp_path):
  command = ["-m", "digzsl_jax.main", "--config=configs/quickstart_tagclip.py", f"--workdir={tmp_path}"]
  for status, said in ends(start(command, count=2)):
    assert status == 1 and "error: config.method 'tagclip' runs in one process, here are 2" in said


def script(body, **constants):
  """A program whose `body` may use `processes`, `index` and, in processes that joined, their errors' way."""
  lines = ["import os, pathlib, sys, time", "import jax", "from digzsl_jax import cli, processes",
           *(f"processes.{name} = {value}" for name, value in constants.items()),
           "with cli.answer_in_one_line('-'):", "  processes.join()",
           "index = processes.index()", "with processes.ending_together(), cli.answer_in_one_line('-'):",
           *(f"  {line}" for line in body.splitlines())]
  return ["-c", "\n".join(lines)]


def test_what_is_told_and_met(tmp_path):
  body = f"""
folder = pathlib.Path({str(tmp_path)!r})
assert processes.told(lambda: [index, None, "ä"]) == [0, None, "ä"]
if index == 0:
  time.sleep(1)
  (folder / "done").touch()
processes.written(folder / "done")
processes.check_shared(folder / "new" / "folder")
processes.check_same("it", {{"a": (1, 2)}})
(folder / str(index)).touch()
processes.meet()
assert {{path.name for path in folder.iterdir()}} == {{"done", "new", "0", "1", "2"}}
assert not list((folder / "new" / "folder").iterdir()) or index
"""
  assert ends(start(script(body), count=3)) == [(0, "")] * 3


@pytest.mark.parametrize("wrong", (0, 1))
def test_an_error_in_one_ends_all(wrong):
  body = f"""
if index == {wrong}:
  raise ValueError("picture 7 is damaged")
processes.meet()
"""
  began = time.monotonic()
  both = ends(start(script(body), count=2))
  assert time.monotonic() - began < 30
  own, other = both[wrong], both[1 - wrong]
  assert own[0] == other[0] == 1
  assert own[1].startswith(f"process {wrong} of 2: error: picture 7 is damaged\n(set DIGZSL_TRACEBACK=1")
  assert f"process {1 - wrong} of 2: stops, as process {wrong} did with error: picture 7 is damaged\n" in other[1]


def test_a_mistake_in_the_program_shows_where():
  (status, said), _ = ends(start(script("if index == 0:\n  1 / 0\nprocesses.meet()"), count=2))
  assert status == 1 and "Traceback" in said and "process 0 of 2: error: ZeroDivisionError: division by zero" in said


def test_processes_that_go_apart_do_not_wait_for_each_other():
  """One asks what the others do not."""
  body = "if index == 0:\n  processes.told(lambda: 1)\nprocesses.meet()"
  for status, said in ends(start(script(body), count=2)):
    assert status == 1 and "error: RuntimeError: process 1 is at <string>:10, process 0 at <string>:9" in said


def test_folders_that_are_not_shared(tmp_path):
  body = f"""
import functools
folder = pathlib.Path({str(tmp_path)!r}) / str(index)
folder.mkdir()
processes.check_shared(folder)
"""
  for status, said in ends(start(script(body, LAG=1), count=2)):
    assert status == 1 and "--workdir must be a folder that all hosts share, as of NFS or a mounted bucket" in said


def test_one_that_comes_alone_gives_up():
  lonely = start(script("pass", JOIN=2), count=2)
  lonely[0].kill()
  began = time.monotonic()
  status, said = ends(lonely)[1]
  assert status == processes.AGAIN and time.monotonic() - began < 30
  assert said.startswith("error: the processes of this run did not come together within 2 s; start as many")


@pytest.mark.parametrize("told", [
    {processes.COUNT: "2"}, {processes.INDEX: "0"}, {processes.ADDRESS: "a:1", processes.COUNT: "2"},
    {processes.ADDRESS: "a:1", processes.COUNT: "2", processes.INDEX: "one"}])
def test_an_environment_in_part(told, around, monkeypatch):
  around(**told)
  monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: pytest.fail("called"))
  with pytest.raises(ValueError, match=f"the environment has .*{[*told][-1]}.*several processes need all of"):
    processes.join()


@pytest.fixture
def around(monkeypatch):
  """Sets the environment that says what a cluster is, and nothing else of it."""
  def told(**variables):
    for name in [*os.environ]:
      if name.startswith(AROUND):
        monkeypatch.delenv(name)
    for name, value in variables.items():
      monkeypatch.setenv(name, value)
  return told


STEP = {"SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "n[01-02]", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}


@pytest.mark.parametrize("told, size", [
    ({}, 1), (STEP | {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"}, 4),
    (STEP | {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"}, 1),  # a shell within a job
    ({"SLURM_JOB_ID": "77", "SLURM_NTASKS": "4"}, 1),  # the script of a job, outside of its steps
    ({"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911", "OMPI_COMM_WORLD_SIZE": "3"}, 3),
    ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, 1)])  # a pod of no job
def test_clusters(told, size, around, monkeypatch):
  around(**told)
  assert processes.cluster_size() == size
  began, asked = [], []
  monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: asked.append(arguments))
  monkeypatch.setattr(jax.config, "update", lambda *setting: began.append(setting))
  processes.join()
  assert len(asked) == (size > 1) and began == [("jax_enable_preemption_service", False)] * (size > 1)
  assert not any("num_processes" in arguments for arguments in asked)
  monkeypatch.setenv(processes.COUNT, "1")
  processes.join()
  assert len(asked) == (size > 1)


def test_a_pod_of_tpus(around, monkeypatch):
  from jax._src.clusters import cloud_tpu_cluster
  monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
  around(TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="a,b,c,d", TPU_WORKER_ID="2", MEGASCALE_NUM_SLICES="2")
  assert processes.cluster_size() == 8
  around(TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost", TPU_WORKER_ID="0", MEGASCALE_NUM_SLICES="1")
  assert processes.cluster_size() == 1


class Device:
  def __init__(self, host):
    self.process_index = host


@pytest.mark.parametrize("hosts, devices, taken", [
    ((0, 0, 1, 1), 0, (0, 1, 2, 3)), ((0, 0, 1, 1), 2, (0, 2)), ((0, 1, 0, 1), 0, (0, 2, 1, 3)),
    ((0, 0, 1, 1), 1, None), ((0, 0, 1), 2, None), ((0, 0, 1), 0, None)])
def test_every_process_gives_as_many_devices(hosts, devices, taken, monkeypatch):
  found = [Device(host) for host in hosts]
  monkeypatch.setattr(jax, "devices", lambda: found)
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(jax.sharding, "Mesh", lambda chosen, *names, **rest: [found.index(one) for one in chosen])
  if taken is None:
    with pytest.raises(ValueError, match=f"config.mesh.devices is {devices}, but 2 processes with .* equally many"):
      mesh.make(devices)
  else:
    assert mesh.make(devices) == [*taken]


def test_others_write_and_say_nothing_but_warnings(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(processes, "index", lambda: 3)
  log = logs.Log(tmp_path)
  log.say("hello")
  log.metrics("stage", 1, loss=0.5)
  logs.write_provenance(tmp_path, {})
  with log.progress(5, "bar") as bar:
    bar.update(5)
  assert not capsys.readouterr().err and not list(tmp_path.iterdir())
  log.warn("picture 7 is damaged")
  assert capsys.readouterr().err.endswith("warning of process 3: picture 7 is damaged\n")
