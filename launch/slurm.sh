#!/usr/bin/env bash
# Runs an experiment as a SLURM job, one process for each GPU, or for each node without any.
#
#   NODES=4 GPUS=8 launch/slurm.sh --config=configs/cub.py --workdir=/shared/runs/cub
#
# NODES (1), GPUS of a node (0), HOURS (24), PYTHON (python); SBATCH_PARTITION, SBATCH_ACCOUNT and the like are sbatch's
# own. As the first argument, --dry-run prints what is submitted and what the job then starts, and does neither.
#
# A preempted job, one whose node fails and one whose time is up come back to the queue and go on where they were. One
# that ends by an error stays ended.
set -euo pipefail

submit() {
  local request=(sbatch "--nodes=${NODES:-1}" "--ntasks-per-node=$(( ${GPUS:-0} > 1 ? GPUS : 1 ))"
                 "--time=$(( ${HOURS:-24} * 60 ))" --requeue --signal=B:USR1@120 --open-mode=append
                 --job-name=digzsl_jax --output=slurm-%j.log)
  # Of a node, not of a task: JAX gives each process the GPU of its number among those that it sees.
  if [[ ${GPUS:-0} -gt 0 ]]; then request+=("--gpus-per-node=$GPUS"); fi
  say_and_do "${request[@]}" "$(realpath "$0")" "$@"
}

work() {
  # Two minutes before the end of its time; what was saved last counts, so nobody has to be told.
  trap 'say_and_do scontrol requeue "$SLURM_JOB_ID"' USR1
  say_and_do srun --kill-on-bad-exit=1 "${PYTHON:-python}" -m digzsl_jax.main "$@" &
  while true; do
    status=0
    wait $! || status=$?
    if [[ $status -le 128 ]] || ! kill -0 $! 2> /dev/null; then exit "$status"; fi  # else the signal ended the wait
  done
}

say_and_do() {
  printf '%q ' "$@"
  printf '\n'
  if [[ -z $dry ]]; then "$@"; fi
}

dry=
if [[ ${1:-} == --dry-run ]]; then dry=1; shift; fi
if [[ $# -eq 0 ]]; then
  sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" >&2
  exit 2
fi
if [[ -n $dry ]]; then
  submit "$@"
  work "$@"
elif [[ -n ${SLURM_JOB_ID:-} ]]; then
  work "$@"
else
  submit "$@"
fi
