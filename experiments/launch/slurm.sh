#!/usr/bin/env bash
# Trains on GPUs under SLURM: one task a GPU, on any number of nodes. Before the time limit it has
# training save a checkpoint and queues itself again; the same job then goes on where it was.
#
# What stands here can be given to sbatch instead: sbatch --nodes=2 --time=12:00:00 slurm.sh ...
#SBATCH --job-name=sparseopt_jax
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# --signal: USR1 to this script, 300 seconds (SLURM may make it 360) before the limit.
# --requeue: after a preemption or the loss of a node SLURM itself queues the job again.
set -euo pipefail

usage() {
  cat <<'END'
usage: sbatch [--nodes=N --gpus-per-node=G --ntasks-per-node=G ...] experiments/launch/slurm.sh \
         ARGUMENTS...

ARGUMENTS are those of `python -m experiments.train`; --workdir is a folder that all nodes share. To
be submitted from the repository.

optional variables
  PYTHON=.venv/bin/python  the Python that has .[experiments] and a jax for these GPUs
  MAX_RESTARTS=20          after a crash, start again so long as the job has not been queued again
                           more often than that; reaching the time limit is no crash

exit code: 0 finished; 1 the loss diverged or data is damaged; 2 a wrong setting; others: stopped
END
}

say() { printf '%s slurm.sh: %s\n' "$(date +%H:%M:%S)" "$*" >&2; }
wrong() { printf 'error: %s\n\n' "$*" >&2; usage >&2; exit 2; }

[[ ${1:-} != --help && ${1:-} != -h ]] || { usage; exit 0; }
[[ -n ${SLURM_JOB_ID:-} ]] || wrong "SLURM_JOB_ID is not set: this is for sbatch"
[[ " $*" == *' --workdir'* ]] || wrong "--workdir is not among the arguments"
python=${PYTHON:-.venv/bin/python}
command -v "$python" >/dev/null || wrong "PYTHON=$python is not there; submit from the repository"
tasks=${SLURM_NTASKS_PER_NODE:-1}
gpus=${SLURM_GPUS_ON_NODE:-$tasks}
# JAX gives a task the one GPU of its number: the others of a node would do nothing.
[[ $gpus == "$tasks" ]] || wrong "$gpus GPUs but $tasks tasks a node; give --ntasks-per-node=$gpus"

# Only the limit's signal queues the job again; scancel is meant to end it.
limit=0
trap 'limit=1; say "the time limit is near"; scancel --signal=TERM "$SLURM_JOB_ID" || true' USR1
# SLURM sends SIGTERM to the tasks itself. The script has to outlive them.
trap 'say "SIGTERM"' TERM

# The exit codes of all tasks count, so none is killed because another one has failed.
srun --kill-on-bad-exit=0 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
  "$python" -m experiments.train "$@" &
step=$!
# A signal interrupts `wait`.
while kill -0 "$step" 2>/dev/null; do wait "$step" || true; done
code=0
wait "$step" || code=$?

restarts=${SLURM_RESTART_COUNT:-0}
case $code in
  0) say "training is finished"; exit 0 ;;
  1 | 2) say "training ended with exit code $code; it is not started again"; exit "$code" ;;
esac
if ((limit)); then
  say "queued again, to go on"
elif ((code == 143)); then
  say "stopped from outside"
  exit "$code"
elif ((restarts < ${MAX_RESTARTS:-20})); then
  say "exit code $code; queued again, after $restarts restarts"
else
  say "exit code $code after $restarts restarts; given up"
  exit "$code"
fi
scontrol requeue "$SLURM_JOB_ID"
