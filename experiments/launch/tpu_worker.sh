#!/usr/bin/env bash
# What tpu_pod.sh runs on every host of a slice, in the home folder.
#
#   tpu_worker.sh install SERVER:/PATH    mounts the share, installs what sparseopt_jax.bundle holds
#   tpu_worker.sh train ARGUMENTS...      trains, or joins training that runs already
#
# exit code of train: 0 finished; 101, 102 training's own 1 and 2, not to be tried again; others as
# they are.
set -euo pipefail
cd
exec 9>>train.lock  # whoever trains holds it

install() {
  if ! flock --nonblock 9; then
    echo "training is running; nothing is installed" >&2
    return
  fi
  if ! mountpoint --quiet /mnt/share; then
    command -v mount.nfs >/dev/null || sudo apt-get install --yes --quiet nfs-common
    sudo mkdir -p /mnt/share
    sudo mount -t nfs -o hard "$1" /mnt/share
    [[ -w /mnt/share ]] || sudo chmod a+rwx /mnt/share
  fi
  rm -rf sparseopt_jax
  git -c advice.detachedHead=false clone --quiet sparseopt_jax.bundle sparseopt_jax
  # The images come with Python 3.10 and training needs 3.11, which uv brings.
  PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
  [[ -x venv/bin/python ]] || python3 -m uv venv --quiet --python 3.11 venv
  cd sparseopt_jax
  python3 -m uv pip install --quiet --python ../venv/bin/python -r requirements-tpu.txt
}

# gcloud gives a command again when the connection breaks, and a broken connection must not end
# training: it runs in a session of its own, and this only watches.
train() {
  local lines=20 code=137  # killed, unless it says otherwise
  if flock --nonblock 9; then
    lines=+1
    rm -f train.exit
    : > train.log
    setsid bash -c '
      cd sparseopt_jax
      code=0
      ../venv/bin/python -m experiments.train "$@" || code=$?
      echo "$code" > ../train.exit
    ' training "$@" >> train.log 2>&1 < /dev/null &
    echo "$!" > train.pid
  fi
  exec 9>&-
  tail --lines="$lines" --follow --sleep-interval=0.1 --pid="$(cat train.pid)" train.log
  [[ ! -s train.exit ]] || code=$(cat train.exit)
  case $code in
    1 | 2) exit $((100 + code)) ;;
    *) exit "$code" ;;
  esac
}

case ${1:-} in
  install) [[ $# == 2 ]] || { echo "usage: tpu_worker.sh install SERVER:/PATH" >&2; exit 2; } ;;
  train) ;;
  *) echo "usage: tpu_worker.sh install SERVER:/PATH | train ARGUMENTS..." >&2; exit 2 ;;
esac
"$@"
