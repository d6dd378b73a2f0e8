"""Several processes, on one host or many, that make one run: how they find, tell and await each other, and end.

Process 0, "the first", decides and writes what all share; every process does its part of what is divided. On its own a
process is the first, and nothing here takes time. What is told goes through the coordination service of
`jax.distributed`, on no device: it costs milliseconds, and may wait for hours where a collective would give up.

An error in one process ends all of them within seconds. One that is killed or cut off is missed after `HEARTBEAT`
seconds at the latest, and JAX ends the others then.
"""

import contextlib
import itertools
import json
import logging
import os
import pathlib
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import jax
from jax._src import distributed  # the service has no public name
from jax._src.clusters import ClusterEnv  # nor has the question whether there is a cluster

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
JOIN = 300  # seconds in which all processes of a run have to start
HEARTBEAT = 100  # seconds without a sign of life after which a process is given up
WAIT = 24 * 3600  # the longest that processes wait for one that lives
LAG = 120  # seconds after which every host sees what another wrote
AGAIN = 75  # exit status where the same command may well succeed; 1 is that of what would fail again
POLL = 0.5  # seconds between looks for an error elsewhere
_numbers = itertools.count()  # of what is told and awaited: all processes do so in one order


def join() -> None:
  """Finds the other processes of this run, if there are any; before anything else asks JAX for devices.

  The environment names them (`JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES`, `JAX_PROCESS_ID`), or JAX finds a TPU
  pod, a step of SLURM, an indexed job of Kubernetes or Open MPI around it. `JAX_NUM_PROCESSES=1` looks for none.

  Raises:
    ValueError: the environment is incomplete, or the others did not come.
  """
  told = {name: os.environ[name] for name in (ADDRESS, COUNT, INDEX) if os.environ.get(name)}
  if told.get(COUNT) == "1":
    return
  arguments = {}
  if COUNT in told or INDEX in told:
    try:
      arguments = {"coordinator_address": told[ADDRESS], "num_processes": int(told[COUNT]),
                   "process_id": int(told[INDEX]), "cluster_detection_method": "deactivate"}
    except (KeyError, ValueError) as error:
      raise ValueError(f"the environment has {told}; several processes need all of {ADDRESS} (host:port of process 0), "
                       f"{COUNT} and {INDEX} (counted from 0)") from error
  elif cluster_size() == 1:
    return
  # Its handler would swallow SIGTERM. States are saved as they come, so a run may as well end at once.
  jax.config.update("jax_enable_preemption_service", False)
  logging.getLogger("jax._src.distributed").setLevel(logging.WARNING)
  alone = threading.Timer(JOIN, _give_up)
  alone.daemon = True
  alone.start()
  try:
    jax.distributed.initialize(**arguments, initialization_timeout=JOIN + 60, heartbeat_timeout_seconds=HEARTBEAT)
  except (RuntimeError, ValueError) as error:
    raise ValueError(f"the processes of this run did not come together: {str(error).splitlines()[0]}; {COUNT}=1 runs "
                     "alone") from error
  finally:
    alone.cancel()


def _give_up() -> NoReturn:
  """Before JAX does, which answers with the trace of a crash."""
  print(f"error: the processes of this run did not come together within {JOIN} s; start as many as there are to be, "
        f"with one {ADDRESS} that all can reach. {COUNT}=1 runs alone", file=sys.stderr, flush=True)
  os._exit(AGAIN)


def cluster_size() -> int:
  """How many processes the cluster around this one starts, by JAX's own detection; 1 without a cluster."""
  if os.environ.get("SLURM_STEP_NUM_TASKS") == "1":  # a single task of a larger job, as `srun --pty bash`
    return 1
  for kind in ClusterEnv._cluster_types:
    lone_pod = kind.__name__ == "K8sCluster" and "JOB_COMPLETION_INDEX" not in os.environ  # of no indexed job
    if not kind.opt_in_only_method and not lone_pod and kind.is_env_present():
      return kind.get_process_count()
  return 1


def count() -> int:
  return jax.process_count() if jax.distributed.is_initialized() else 1


def index() -> int:
  return jax.process_index() if jax.distributed.is_initialized() else 0


def is_first() -> bool:
  """Whether this process decides for all and writes what they share."""
  return index() == 0


def told(make: Callable[[], Any]) -> Any:
  """The JSON-like value that the first process makes, in every process; `make` is called in no other."""
  if count() == 1:
    return make()
  service, key, here = distributed.global_state.client, f"digzsl/value/{next(_numbers)}", _caller()
  if is_first():
    service.key_value_set(key, json.dumps([here, make()]))
  there, value = json.loads(service.blocking_key_value_get(key, 1000 * WAIT))
  if there != here:  # they would wait for each other for ever
    raise RuntimeError(f"process {index()} is at {here}, process 0 at {there}")
  return value


def _caller() -> str:
  """File and line of who calls this module."""
  frame = sys._getframe(1)
  while frame.f_code.co_filename == __file__:
    frame = frame.f_back
  return f"{pathlib.Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def meet() -> None:
  """Waits until every process is here."""
  if count() > 1:
    told(lambda: None)  # or it is another meeting
    number = next(_numbers)
    distributed.global_state.client.wait_at_barrier(f"digzsl/meeting/{number}", 1000 * WAIT)


def check_same(what: str, fields: Mapping[str, Any]) -> None:
  """Raises ValueError if values of `fields`, JSON-like, are not those of the first process."""
  if count() == 1:
    return
  own = json.loads(json.dumps(fields, default=str))
  first = told(lambda: own)
  if other := [f"{name}: {own.get(name)!r}, there {first.get(name)!r}" for name in sorted(own.keys() | first.keys())
               if own.get(name) != first.get(name)]:
    raise ValueError(f"{what} is not the same in processes {index()} and 0 ({'; '.join(other)}); start all processes "
                     "by the same command, with the same code, data and checkpoints")


def await_file(path: pathlib.Path, good: Callable[[pathlib.Path], bool] = pathlib.Path.exists) -> None:
  """Waits for a file that another host wrote, which a network's file system may show late.

  Raises:
    ValueError: it does not come; processes have to share the folder.
  """
  end = time.monotonic() + LAG
  while not good(path):
    if time.monotonic() > end:
      raise ValueError(f"process {index()} does not see {path}, which another process of this run wrote {LAG} s ago; "
                       "--workdir must be a folder that all hosts share, as of NFS or a mounted bucket")
    time.sleep(0.1)


def written(path: pathlib.Path) -> None:
  """Waits until every process is here and sees what the first one wrote last."""
  meet()
  await_file(path)


def check_shared(folder: pathlib.Path) -> None:
  """Raises ValueError in a process that does not see what the first one writes to `folder`."""
  if count() == 1:
    return
  probe = folder / told(lambda: f".shared.{uuid.uuid4().hex}")
  if is_first():
    folder.mkdir(parents=True, exist_ok=True)
    probe.touch()
  written(probe)
  meet()
  if is_first():
    probe.unlink()


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
  """Ends every process of the run when one of them fails within, each with a line that says where and why."""
  if count() == 1:
    yield
    return
  finished = threading.Event()
  watcher = threading.Thread(target=_watch, args=(finished,), daemon=True, name="errors of other processes")
  watcher.start()
  try:
    yield
  except BaseException as error:
    finished.set()  # what others make of this is not news
    watcher.join()
    _end(error)
  finished.set()
  watcher.join()


def _end(error: BaseException) -> NoReturn:
  """Says what happened, here and to the others, and leaves without waiting for them, as JAX does at a usual end."""
  others_fault = isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error)
  if others_fault:
    text = (f"error: {str(error).splitlines()[0]} (JAX, among {count()} processes: most likely another one was killed "
            "or cut off). Finished work is kept: start all of them again by the same command")
    if os.environ.get("DIGZSL_TRACEBACK"):
      traceback.print_exc()
  elif isinstance(error, SystemExit):
    text = str(error.code)
  else:
    traceback.print_exc()
    text = f"error: {type(error).__name__}: {error}"
  status = AGAIN if others_fault else 1
  print(f"process {index()} of {count()}: {text}", file=sys.stderr, flush=True)
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    distributed.global_state.client.key_value_set(f"digzsl/error/{index()}", json.dumps([status, text]))
    time.sleep(4 * POLL if is_first() else 0)  # the first process holds the service that the others ask
  os._exit(status)


def _watch(finished: threading.Event) -> None:
  """Ends this process, wherever it is, once another has told of an error."""
  while not finished.wait(POLL):
    try:
      found = distributed.global_state.client.key_value_dir_get("digzsl/error/")
    except jax.errors.JaxRuntimeError:  # the service is gone, for which JAX ends this process
      continue
    if others := [(key.rpartition("/")[2], *json.loads(said)) for key, said in found]:
      number, status, text = others[0]
      text = text.partition("\n")[0]
      print(f"process {index()} of {count()}: stops, as process {number} did with {text}", file=sys.stderr, flush=True)
      time.sleep(4 * POLL if is_first() else 0)
      os._exit(status)
