#!/usr/bin/env bash
# Runs an experiment as an indexed job of Kubernetes, on GKE with TPUs or GPUs, one process on each host.
#
#   export NAME=birds IMAGE=REGION-docker.pkg.dev/PROJECT/REPOSITORY/digzsl_jax CLAIM=shared HOSTS=4
#   export TPU=tpu-v5-lite-podslice TOPOLOGY=4x4 CHIPS=4        # or GPU=nvidia-h100-80gb CHIPS=8
#   launch/gke.sh --dry-run --config=configs/cub.py --workdir=/mnt/shared/cub > birds.yaml
#   launch/gke.sh --config=configs/cub.py --workdir=/mnt/shared/cub
#   kubectl logs -f -l job-name=birds,batch.kubernetes.io/job-completion-index=0
#   kubectl delete job,service birds
#
# IMAGE has Python and this package; CLAIM is a PersistentVolumeClaim that all hosts may write (ReadWriteMany, as of
# Filestore), mounted at /mnt/shared; CHIPS are those of a host; SPOT=1 allows nodes that may be taken away.
# --dry-run prints what would be applied and applies nothing.
#
# Pods that lose their node, or a process elsewhere, are started again, and the run goes on where it was. An error that
# would come again (exit status 1) ends the job.
set -euo pipefail

dry=
if [[ ${1:-} == --dry-run ]]; then dry=1; shift; fi
if [[ $# -eq 0 ]]; then
  sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" >&2
  exit 2
fi
: "${NAME:?is that of the job}" "${IMAGE:?has this package}" "${CLAIM:?is a volume that hosts share}"
: "${HOSTS:?is their number}" "${CHIPS:?are those of a host}"

selectors() {
  if [[ -n ${TPU:-} ]]; then
    printf '        cloud.google.com/gke-tpu-accelerator: %s\n' "$TPU"
    printf '        cloud.google.com/gke-tpu-topology: %s\n' "${TOPOLOGY:?is that of the slice, as 4x4}"
  else
    printf '        cloud.google.com/gke-accelerator: %s\n' "${GPU:?or TPU is the kind of chip}"
  fi
  if [[ -n ${SPOT:-} ]]; then printf '        cloud.google.com/gke-spot: "true"\n'; fi
}

arguments() {  # each as a string of YAML between single quotes
  local argument
  for argument in "$@"; do printf "        - '%s'\n" "${argument//\'/\'\'}"; done
}

chip=$([[ -n ${TPU:-} ]] && echo google.com/tpu || echo nvidia.com/gpu)
selected=$(selectors)  # not in the text below, where a missing setting would end nothing
manifest=$(cat << END
apiVersion: v1
kind: Service
metadata:
  name: $NAME
spec:
  clusterIP: None
  publishNotReadyAddresses: true
  selector:
    job-name: $NAME
---
apiVersion: batch/v1
kind: Job
metadata:
  name: $NAME
spec:
  completionMode: Indexed
  completions: $HOSTS
  parallelism: $HOSTS
  backoffLimit: 1000
  podFailurePolicy:
    rules:
    - action: FailJob
      onExitCodes:
        operator: In
        values: [1]
    - action: Ignore
      onPodConditions:
      - type: DisruptionTarget
  template:
    spec:
      subdomain: $NAME
      restartPolicy: Never
      nodeSelector:
$selected
      containers:
      - name: main
        image: $IMAGE
        command: [python, -m, digzsl_jax.main]
        args:
$(arguments "$@")
        env:
        - name: JAX_COORDINATOR_ADDRESS
          value: $NAME-0.$NAME:8476
        - name: JAX_NUM_PROCESSES
          value: "$HOSTS"
        - name: JAX_PROCESS_ID
          valueFrom:
            fieldRef:
              fieldPath: metadata.annotations['batch.kubernetes.io/job-completion-index']
        resources:
          limits:
            $chip: $CHIPS
        volumeMounts:
        - name: shared
          mountPath: /mnt/shared
      volumes:
      - name: shared
        persistentVolumeClaim:
          claimName: $CLAIM
END
)
if [[ -n $dry ]]; then
  printf '%s\n' "$manifest"
else
  printf 'kubectl apply -f -\n%s\n' "$manifest"
  kubectl apply -f - <<< "$manifest"
fi
