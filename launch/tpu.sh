#!/usr/bin/env bash
# Runs an experiment on a TPU pod (Cloud TPU, queued resources), one process on each of its hosts.
#
#   export TPU=birds ZONE=us-central1-a ACCELERATOR=v5litepod-16 RUNTIME=v2-alpha-tpuv5-lite NFS=10.0.0.2:/share
#   launch/tpu.sh create                          # ask for the pod; SPOT=1 for one that may be taken away
#   launch/tpu.sh sync                            # this commit, its packages and the shared folder, on every host
#   launch/tpu.sh run --config=configs/cub.py --workdir=/mnt/shared/cub
#   launch/tpu.sh logs                            # of process 0, which speaks for all
#   launch/tpu.sh stop                            # ends the run and gives the pod back
#
# Before the subcommand, --dry-run prints every command and runs none. A pod that was taken away: stop, create, sync and
# the same run again, which goes on where it was. NFS, as of Filestore, is mounted at /mnt/shared.
set -euo pipefail

usage() {
  sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" >&2
  exit 2
}

say_and_do() {
  printf '%q ' "$@"
  printf '\n'
  if [[ -z $dry ]]; then "$@"; fi
}

on_hosts() {  # worker, command
  say_and_do gcloud compute tpus tpu-vm ssh "$TPU" "--zone=$ZONE" "--worker=$1" "--command=$2"
}

dry=
if [[ ${1:-} == --dry-run ]]; then dry=1; shift; fi
[[ $# -ge 1 ]] || usage
what=$1
shift
[[ $what == run || $# -eq 0 ]] || usage
: "${TPU:?is the name of the pod}" "${ZONE:?is its zone}"

case $what in
  create)
    : "${ACCELERATOR:?is its type, as v5litepod-16}" "${RUNTIME:?is its software, as v2-alpha-tpuv5-lite}"
    spot=()
    if [[ -n ${SPOT:-} ]]; then spot=(--spot); fi
    say_and_do gcloud compute tpus queued-resources create "$TPU" "--node-id=$TPU" "--zone=$ZONE" \
      "--accelerator-type=$ACCELERATOR" "--runtime-version=$RUNTIME" "${spot[@]}"
    say_and_do gcloud compute tpus queued-resources describe "$TPU" "--zone=$ZONE" "--format=value(state.state)"
    ;;
  sync)
    : "${NFS:?is the folder that all hosts share, as 10.0.0.2:/share}"
    say_and_do git archive --format=tar.gz --output=digzsl_jax.tar.gz HEAD
    say_and_do gcloud compute tpus tpu-vm scp digzsl_jax.tar.gz "$TPU:" "--zone=$ZONE" --worker=all
    say_and_do rm -f digzsl_jax.tar.gz
    on_hosts all "sudo apt-get install -y nfs-common && sudo mkdir -p /mnt/shared && \
(mountpoint -q /mnt/shared || sudo mount -t nfs $(printf %q "$NFS") /mnt/shared)"
    on_hosts all 'rm -rf digzsl_jax && mkdir digzsl_jax && tar -xzf digzsl_jax.tar.gz -C digzsl_jax && cd digzsl_jax && \
python3 -m pip install --user uv && ~/.local/bin/uv venv --clear --python 3.12 && \
~/.local/bin/uv pip install -e ".[tpu]"'
    ;;
  run)
    [[ $# -ge 1 ]] || usage
    # It outlives the connection; the lock keeps a second run off this host's chips.
    on_hosts all "cd digzsl_jax && (setsid nohup flock -n ../digzsl_jax.lock .venv/bin/python -m digzsl_jax.main \
$(printf '%q ' "$@")> ../digzsl_jax.log 2>&1 < /dev/null &)"
    ;;
  logs) on_hosts 0 "tail -n 100 -f digzsl_jax.log" ;;
  stop) say_and_do gcloud compute tpus queued-resources delete "$TPU" "--zone=$ZONE" --force --quiet ;;
  *) usage ;;
esac
