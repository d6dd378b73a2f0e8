"""What the launchers would run, and that they run it: commands of clouds are stand-ins that write down their words."""

import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import time

import pytest
import yaml

from digzsl_jax import processes

LAUNCH = pathlib.Path(__file__).parent.parent / "launch"
POD = {"TPU": "birds", "ZONE": "us-central1-a", "ACCELERATOR": "v5litepod-16", "RUNTIME": "v2-alpha-tpuv5-lite",
       "NFS": "10.0.0.2:/share"}
JOB = {"NAME": "birds", "IMAGE": "place/image", "CLAIM": "shared", "HOSTS": "4", "CHIPS": "8"}
RUN = ["--config=configs/cub.py", "--workdir=/mnt/shared/cub", "--config.models.template=it's a {name}"]


@pytest.fixture
def launch(tmp_path):
  """`launch(script, words..., **environment)`: exit status, output, errors, and the command lines that were run."""
  (tmp_path / "bin").mkdir()
  for name in ("gcloud", "sbatch", "srun", "scontrol", "kubectl", "git"):
    stand_in = tmp_path / "bin" / name
    stand_in.write_text(f'#!/bin/bash\n(printf "%q " {name} "$@"; echo) >> {tmp_path}/ran\n'
                        'if [ "$*" = "apply -f -" ]; then cat; fi\n')
    stand_in.chmod(0o755)

  def run(script, *words, **environment):
    told = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"} | environment
    done = subprocess.run([LAUNCH / script, *words], env=told, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    ran = tmp_path / "ran"
    lines = [shlex.split(line) for line in ran.read_text().splitlines()] if ran.exists() else []
    ran.unlink(missing_ok=True)
    return done.returncode, done.stdout, done.stderr, lines

  return run


def told(text):
  """The command lines of an output; a line break within a word is written as by `printf %q`."""
  return [shlex.split(line.replace("$'", "'").replace("\\n", "\n").replace("\\\\", "\\") if "$'" in line else line)
          for line in text.splitlines()]


@pytest.mark.parametrize("script", ("tpu.sh", "slurm.sh", "gke.sh"))
def test_shellcheck(script):
  if not (checker := shutil.which("shellcheck")):
    pytest.skip("shellcheck is not installed")
  done = subprocess.run([checker, LAUNCH / script], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("words, wanted", [
    (["create"], ["gcloud compute tpus queued-resources create birds --node-id=birds --zone=us-central1-a "
                  "--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite",
                  "gcloud compute tpus queued-resources describe birds --zone=us-central1-a "
                  "'--format=value(state.state)'"]),
    (["logs"], ["gcloud compute tpus tpu-vm ssh birds --zone=us-central1-a --worker=0 "
                "'--command=tail -n 100 -f digzsl_jax.log'"]),
    (["stop"], ["gcloud compute tpus queued-resources delete birds --zone=us-central1-a --force --quiet"])])
def test_a_pod_of_tpus(words, wanted, launch):
  status, out, _, ran = launch("tpu.sh", "--dry-run", *words, **POD)
  assert status == 0 and not ran and told(out) == [shlex.split(line) for line in wanted]
  status, out, _, ran = launch("tpu.sh", *words, **POD)
  assert status == 0 and ran == told(out) == [shlex.split(line) for line in wanted]


def test_a_pod_that_may_be_taken_away(launch):
  _, out, _, _ = launch("tpu.sh", "--dry-run", "create", SPOT="1", **POD)
  assert told(out)[0][-1] == "--spot"


def test_a_pod_gets_this_commit_and_runs_it_on_every_host(launch):
  status, out, _, ran = launch("tpu.sh", "--dry-run", "sync", **POD)
  assert status == 0 and not ran
  assert [line[0] for line in told(out)] == ["git", "gcloud", "rm", "gcloud", "gcloud"]
  assert all("--worker=all" in line for line in told(out) if line[0] == "gcloud")
  assert "sudo mount -t nfs 10.0.0.2:/share /mnt/shared" in told(out)[3][-1]
  status, _, _, ran = launch("tpu.sh", "run", *RUN, **POD)
  [line] = ran
  assert status == 0 and "--worker=all" in line
  remote = line[-1].removeprefix("--command=")
  assert subprocess.run(["bash", "-n", "-c", remote]).returncode == 0
  words = shlex.split(remote, comments=False)
  assert [word for word in words if word.startswith("--config") or word.startswith("--workdir")] == RUN


def submitted(*rest):
  return ["sbatch", "--nodes=4", *rest, "--time=120", "--requeue", "--signal=B:USR1@120", "--open-mode=append",
          "--job-name=digzsl_jax", "--output=slurm-%j.log"]


def test_slurm(launch):
  around = {"NODES": "4", "HOURS": "2"}
  started = ["srun", "--kill-on-bad-exit=1", "python", "-m", "digzsl_jax.main", *RUN]
  status, out, _, ran = launch("slurm.sh", "--dry-run", *RUN, **around)
  assert status == 0 and not ran
  assert told(out) == [[*submitted("--ntasks-per-node=1"), str(LAUNCH / "slurm.sh"), *RUN], started]
  _, out, _, ran = launch("slurm.sh", *RUN, GPUS="8", **around)
  assert ran == told(out) == [
      [*submitted("--ntasks-per-node=8"), "--gpus-per-node=8", str(LAUNCH / "slurm.sh"), *RUN]]
  status, _, _, ran = launch("slurm.sh", *RUN, SLURM_JOB_ID="77")
  assert status == 0 and ran == [started]


@pytest.mark.parametrize("status", (0, 1, 75, 137))
def test_the_status_of_a_job_is_that_of_its_processes(status, launch, tmp_path):
  (tmp_path / "bin" / "srun").write_text(f"#!/bin/bash\nexit {status}\n")
  assert launch("slurm.sh", *RUN, SLURM_JOB_ID="77")[0] == status


def test_a_job_whose_time_is_up_is_queued_again(launch, tmp_path):
  (tmp_path / "bin" / "srun").write_text(f"#!/bin/bash\ntouch {tmp_path}/began\nsleep 2\nexit 3\n")
  told = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "SLURM_JOB_ID": "77"}
  job = subprocess.Popen([LAUNCH / "slurm.sh", *RUN], env=told, cwd=tmp_path, stdout=subprocess.DEVNULL)
  while not (tmp_path / "began").exists():
    time.sleep(0.05)
  os.kill(job.pid, signal.SIGUSR1)
  assert job.wait(30) == 3  # SLURM ends the processes
  assert (tmp_path / "ran").read_text() == "scontrol requeue 77 \n"


@pytest.mark.parametrize("around, selected, chip", [
    ({"TPU": "tpu-v5-lite-podslice", "TOPOLOGY": "4x4", "SPOT": "1"},
     {"cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice", "cloud.google.com/gke-tpu-topology": "4x4",
      "cloud.google.com/gke-spot": "true"}, "google.com/tpu"),
    ({"GPU": "nvidia-h100-80gb"}, {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}, "nvidia.com/gpu")])
def test_gke(around, selected, chip, launch):
  status, out, _, ran = launch("gke.sh", "--dry-run", *RUN, **JOB, **around)
  assert status == 0 and not ran
  service, job = yaml.safe_load_all(out)
  assert service["spec"]["selector"] == {"job-name": "birds"} and service["spec"]["clusterIP"] == "None"
  spec = job["spec"]
  assert (spec["completions"], spec["parallelism"], spec["completionMode"]) == (4, 4, "Indexed")
  assert spec["podFailurePolicy"]["rules"][0] == {"action": "FailJob", "onExitCodes": {
      "operator": "In", "values": [1]}} and processes.AGAIN != 1
  pod = spec["template"]["spec"]
  assert pod["nodeSelector"] == selected and pod["subdomain"] == service["metadata"]["name"]
  [container] = pod["containers"]
  assert container["args"] == RUN and container["resources"]["limits"] == {chip: 8}
  env = {entry["name"]: entry.get("value") for entry in container["env"]}
  assert env == {processes.ADDRESS: "birds-0.birds:8476", processes.COUNT: "4", processes.INDEX: None}
  status, applied, _, ran = launch("gke.sh", *RUN, **JOB, **around)
  assert status == 0 and ran == [["kubectl", "apply", "-f", "-"]] and applied.count(out) == 2  # said, and applied


@pytest.mark.parametrize("script, words, around, said", [
    ("tpu.sh", [], POD, "launch/tpu.sh create"), ("tpu.sh", ["run"], POD, "launch/tpu.sh create"),
    ("tpu.sh", ["begin"], POD, "launch/tpu.sh create"), ("tpu.sh", ["logs", "-f"], POD, "launch/tpu.sh create"),
    ("tpu.sh", ["stop"], {}, "TPU: is the name of the pod"),
    ("tpu.sh", ["sync"], {"TPU": "a", "ZONE": "b"}, "NFS: is the folder that all hosts share"),
    ("slurm.sh", [], {}, "NODES=4 GPUS=8 launch/slurm.sh"), ("gke.sh", [], JOB, "launch/gke.sh --dry-run"),
    ("gke.sh", RUN, {}, "NAME: is that of the job"), ("gke.sh", RUN, JOB, "GPU: or TPU is the kind of chip"),
    ("gke.sh", RUN, JOB | {"TPU": "a"}, "TOPOLOGY: is that of the slice")])
def test_what_is_missing(script, words, around, said, launch):
  status, _, errors, ran = launch(script, *words, **around)
  assert status != 0 and said in errors and not ran
