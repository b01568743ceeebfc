#!/usr/bin/env bash
# Trains on a Cloud TPU slice, one host or a pod, until training is finished: makes the slice,
# installs this commit on every host, trains on all of them, and after a preemption or a crash makes
# the slice anew where it must and gives the same command again, which goes on where it was.
set -euo pipefail

usage() {
  cat <<'END'
usage: VARIABLE=VALUE ... experiments/launch/tpu_pod.sh ARGUMENTS...

ARGUMENTS are those of `python -m experiments.train`; --workdir and data belong into /mnt/share.

required variables
  TPU_NAME          the slice; made where there is none of that name
  ZONE              e.g. us-west4-a
  ACCELERATOR_TYPE  e.g. v5litepod-16, v6e-8, v5p-32, v4-32
  RUNTIME_VERSION   v2-alpha-tpuv5-lite for v5e, v2-alpha-tpuv6e for v6e, v2-alpha-tpuv5 for v5p,
                    tpu-ubuntu2204-base for v4
  SHARE             an NFS share that all hosts reach, e.g. a Filestore's 10.0.0.2:/share; mounted
                    at /mnt/share, because a slice that is preempted loses its own disks

optional variables
  SPOT=1            spot machines, cheaper and preemptible; 0: on demand
  DELETE=0          1: delete the slice when training has ended, finished or with an error
  RETRY_SECONDS=60  between two attempts to get a slice, or to train
  MAX_FAILURES=5    give up after so many crashes in a row within ten minutes of the start

gcloud has to be logged in and to have a project, and for a slice of several hosts the key has to be
known: ssh-add ~/.ssh/google_compute_engine. Run it where it can stay, e.g. in tmux on a small
machine. Ctrl-C stops watching, not training; the same command again watches on.

exit code: 0 finished; 1 the loss diverged or data is damaged; 2 a wrong setting; 3 gave up
END
}

say() { printf '%s tpu_pod: %s\n' "$(date +%H:%M:%S)" "$*" >&2; }
give_up() { say "$*"; exit 3; }
wrong() { printf 'error: %s\n\n' "$*" >&2; usage >&2; exit 2; }

[[ ${1:-} != --help && ${1:-} != -h ]] || { usage; exit 0; }
for name in TPU_NAME ZONE ACCELERATOR_TYPE RUNTIME_VERSION SHARE; do
  [[ -n ${!name:-} ]] || wrong "$name is not set"
done
[[ $SHARE == *:/* ]] || wrong "SHARE=$SHARE must be SERVER:/PATH"
[[ " $*" == *' --workdir'* ]] || wrong "--workdir=/mnt/share/... is not among the arguments"
command -v gcloud >/dev/null || wrong "gcloud is not installed: see cloud.google.com/sdk"

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
files=$(mktemp -d)
trap 'rm -rf "$files"' EXIT
trap 'say "no longer watching; training, where it has begun, goes on"; exit 130' INT

tpu() { gcloud compute tpus tpu-vm "$1" "$TPU_NAME" --zone="$ZONE" --quiet "${@:2}"; }

state() {  # READY, CREATING, PREEMPTED, ...; ABSENT where there is no such slice
  if ! tpu describe --format='value(state)' 2>"$files/errors"; then
    grep -qi 'not_found\|not found' "$files/errors" || { cat "$files/errors" >&2; return 1; }
    echo ABSENT
  fi
}

create() {
  local spot=()
  [[ ${SPOT:-1} == 0 ]] || spot=(--spot)
  say "making $TPU_NAME, $ACCELERATOR_TYPE in $ZONE ${spot[*]-}"
  if ! tpu create --accelerator-type="$ACCELERATOR_TYPE" --version="$RUNTIME_VERSION" \
    ${spot[@]+"${spot[@]}"} 2>"$files/errors"; then
    cat "$files/errors" >&2
    return 1
  fi
}

made=0
bring_up() {  # returns once the slice is READY
  local now
  while true; do
    now=$(state) || now=UNKNOWN
    case $now in
      READY) made=1; return ;;
      ABSENT)
        if create; then continue; fi
        # Without capacity it is a matter of waiting. Anything else is a wrong setting, unless the
        # same settings have worked before.
        ((made)) || grep -qi 'capacity' "$files/errors" || give_up "the slice cannot be made" ;;
      PREEMPTED | TERMINATED) say "$TPU_NAME is $now; deleting it"; tpu delete || true; continue ;;
      STOPPED) give_up "$TPU_NAME is stopped; start or delete it" ;;
      UNKNOWN) ((made)) || give_up "gcloud does not answer" ;;
    esac
    say "$TPU_NAME is $now; again in ${RETRY_SECONDS:-60} s"
    sleep "${RETRY_SECONDS:-60}"
  done
}

on_all_hosts() {  # a host that is gone is noticed within two minutes
  tpu ssh --worker=all --ssh-flag='-o ServerAliveInterval=30' \
    --ssh-flag='-o ServerAliveCountMax=4' --command="$1"
}

train() {
  git -C "$repository" bundle create --quiet "$files/sparseopt_jax.bundle" HEAD || return
  gcloud compute tpus tpu-vm scp "$files/sparseopt_jax.bundle" \
    "$repository/experiments/launch/tpu_worker.sh" "$TPU_NAME:" \
    --zone="$ZONE" --quiet --worker=all || return
  on_all_hosts "bash tpu_worker.sh install $(printf '%q' "$SHARE")" || return
  on_all_hosts "bash tpu_worker.sh train $(printf '%q ' "$@")"
}

finish() {  # exit code
  if [[ ${DELETE:-0} == 1 ]]; then
    tpu delete || say "$TPU_NAME could not be deleted"
  else
    say "$TPU_NAME is still there and costs; gcloud compute tpus tpu-vm delete removes it"
  fi
  exit "$1"
}

[[ -z $(git -C "$repository" status --porcelain) ]] || say "uncommitted changes are left out"
failures=0
while true; do
  bring_up
  began=$SECONDS
  code=0
  train "$@" || code=$?
  case $code in
    0) say "training is finished"; finish 0 ;;
    # 100 plus training's own code, which gcloud's 1 and 2 are not mistaken for.
    101 | 102)
      say "training ended with exit code $((code - 100)); it is not started again"
      finish $((code - 100)) ;;
  esac
  now=$(state) || now=UNKNOWN
  say "training was interrupted (exit code $code); $TPU_NAME is $now"
  if [[ $now == READY ]] && ((SECONDS - began < 600)); then
    failures=$((failures + 1))
  else
    failures=0
  fi
  if ((failures >= ${MAX_FAILURES:-5})); then
    say "given up after $failures crashes in a row"
    finish 3
  fi
  sleep "${RETRY_SECONDS:-60}"
done
