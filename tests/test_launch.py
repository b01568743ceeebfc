"""The launch scripts, with stand-ins for gcloud, for the machines it makes, and for SLURM."""

import os
import pathlib
import shutil
import signal
import subprocess
import time

import pytest

LAUNCH = pathlib.Path(__file__).parent.parent / "experiments" / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))

POD = {
    "TPU_NAME": "slice",
    "ZONE": "zone-a",
    "ACCELERATOR_TYPE": "v5litepod-16",
    "RUNTIME_VERSION": "v2-alpha-tpuv5-lite",
    "SHARE": "10.0.0.2:/share",
    "RETRY_SECONDS": "0",
}
ARGUMENTS = ["--config=c.py", "--workdir=/mnt/share/a b", "--config.label=it's"]

# The state of the slice is a file; what happens to each attempt to make it, or to train, is a line
# of another. Its one machine is a folder, in which commands run for real.
GCLOUD = """
echo "gcloud $*" >> "$CLOUD/calls"
pop() { local line; read -r line < "$CLOUD/$1" || line=; sed -i 1d "$CLOUD/$1"; echo "$line"; }
case $4 in
  describe)
    [[ -s $CLOUD/state ]] || { echo "ERROR: NOT_FOUND: slice was not found" >&2; exit 1; }
    cat "$CLOUD/state" ;;
  create)
    failure=$(pop create)
    [[ -z $failure ]] || { echo "ERROR: $failure" >&2; exit 1; }
    mkdir "$CLOUD/host"; echo READY > "$CLOUD/state" ;;
  delete) rm -rf "$CLOUD/host" "$CLOUD/state" ;;
  scp) cp "$5" "$6" "$CLOUD/host" ;;
  ssh)
    for word in "$@"; do [[ $word != --command=* ]] || command=${word#--command=}; done
    if [[ $command == *" train "* ]]; then
      outcome=$(pop train)
      case $outcome in
        preempted) echo PREEMPTED > "$CLOUD/state"; exit 255 ;;
        gcloud*) exit "${outcome#gcloud }" ;;
      esac
      export OUTCOME=$outcome
    fi
    cd "$CLOUD/host"
    HOME=$PWD bash -c "$command" ;;
esac
"""

# Also what makes the machine's environment, of which the Python is another stand-in.
PYTHON3 = """
echo "python3 $*" >> "$CLOUD/calls"
[[ $3 != venv ]] || { mkdir -p venv/bin; cp "$CLOUD/bin/training" venv/bin/python; }
"""
TRAINING = """
printf '%s\\n' "$@" > "$CLOUD/arguments"
[[ -f requirements-tpu.txt ]] || { echo "not in the repository" >&2; exit 99; }
echo "training says hello"
exit "$OUTCOME"
"""


def write_command(path, body):
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{body}")
    path.chmod(0o755)


def wait_for(path):
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.02)


def run(script, *arguments, **environment):
    """Runs a script with nothing in its environment but what is given."""
    given = {"PATH": os.environ["PATH"], "HOME": "/nowhere"} | environment
    bash = shutil.which("bash")
    return subprocess.run([bash, script, *arguments], env=given, capture_output=True, text=True)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_parse_and_can_be_run(script):
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    assert os.access(script, os.X_OK)
    assert "set -euo pipefail" in script.read_text()


# The TPU pod.


@pytest.fixture
def cloud(tmp_path):
    """The stand-ins, and a repository with the scripts in it: (folder, function that runs them)."""
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", tmp_path / "repository"]
    shutil.copytree(LAUNCH, tmp_path / "repository" / "experiments" / "launch")
    (tmp_path / "repository" / "requirements-tpu.txt").write_text("-e .\n")
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "all"]):
        subprocess.run([*git, *arguments], check=True)
    for name in ("calls", "create", "train"):
        (tmp_path / name).write_text("")
    for name, body in (
        ("gcloud", GCLOUD),
        ("python3", PYTHON3),
        ("training", TRAINING),
        ("mountpoint", "exit 1\n"),
        ("sudo", 'echo "sudo $*" >> "$CLOUD/calls"\n'),
    ):
        write_command(tmp_path / "bin" / name, body)

    def pod(*arguments, create="", train="", **environment):
        (tmp_path / "create").write_text(create)
        (tmp_path / "train").write_text(train)
        return run(
            tmp_path / "repository" / "experiments" / "launch" / "tpu_pod.sh",
            *arguments,
            CLOUD=str(tmp_path),
            PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            **environment,
        )

    return tmp_path, pod


def calls(folder, *verbs):
    """What gcloud was asked to do, without what it was asked for its state."""
    words = [line.split() for line in (folder / "calls").read_text().splitlines()]
    verbs = verbs or ("create", "delete", "ssh", "scp")
    found = [line for line in words if line[0] == "gcloud" and line[4] in verbs]
    return [line[4] for line in found]


def test_a_preempted_slice_is_made_anew_and_training_goes_on(cloud):
    folder, pod = cloud
    done = pod(
        *ARGUMENTS, **POD, create="There is no more capacity\n\n", train="preempted\n75\n143\n0\n"
    )
    assert done.returncode == 0, done.stderr
    attempt = ["scp", "ssh", "ssh"]  # copy, install, train
    assert calls(folder) == [
        *["create", "create", *attempt, "delete", "create", *attempt, *attempt, *attempt]
    ]
    assert (folder / "arguments").read_text().splitlines() == [
        "-m",
        "experiments.train",
        *ARGUMENTS,
    ]
    assert "training says hello" in done.stdout
    for said in ("no more capacity", "is PREEMPTED; deleting it", "exit code 75", "still there"):
        assert said in done.stderr, said
    assert "uncommitted" not in done.stderr
    asked = (folder / "calls").read_text()
    assert (
        "tpu-vm create slice --zone=zone-a --quiet --accelerator-type=v5litepod-16"
        " --version=v2-alpha-tpuv5-lite --spot\n"
    ) in asked
    assert asked.count("--worker=all") == 4 * 3
    assert "sudo mount -t nfs -o hard 10.0.0.2:/share /mnt/share\n" in asked
    assert "pip install --quiet --python ../venv/bin/python -r requirements-tpu.txt\n" in asked


@pytest.mark.parametrize("code", [1, 2])
def test_what_would_fail_again_is_not_tried_again(cloud, code):
    folder, pod = cloud
    (folder / "repository" / "new.py").write_text("")
    done = pod(*ARGUMENTS, **POD, train=f"{code}\n", SPOT="0", DELETE="1")
    assert done.returncode == code
    assert f"training ended with exit code {code}" in done.stderr
    assert "uncommitted changes are left out" in done.stderr
    assert calls(folder) == ["create", "scp", "ssh", "ssh", "delete"]
    assert "--spot" not in (folder / "calls").read_text()


def test_exit_codes_of_gcloud_itself_are_no_end_of_training(cloud):
    folder, pod = cloud
    done = pod(*ARGUMENTS, **POD, train="gcloud 1\ngcloud 2\n0\n")
    assert done.returncode == 0, done.stderr
    assert calls(folder, "create", "scp") == ["create", "scp", "scp", "scp"]


def test_crashes_in_a_row_and_a_slice_that_cannot_be_made_end_it(cloud):
    folder, pod = cloud
    done = pod(*ARGUMENTS, **POD, create="Invalid accelerator type\n")
    assert done.returncode == 3
    assert "Invalid accelerator type" in done.stderr
    assert calls(folder) == ["create"]
    done = pod(*ARGUMENTS, **POD, train="137\n137\n0\n", MAX_FAILURES="2")
    assert done.returncode == 3
    assert "given up after 2 crashes in a row" in done.stderr
    assert (folder / "train").read_text() == "0\n"


def test_a_host_joins_training_that_runs_already(cloud, tmp_path):
    host = tmp_path / "host"
    (host / "sparseopt_jax").mkdir(parents=True)
    (host / "venv").mkdir()
    write_command(
        host / "venv" / "bin" / "python",
        'echo begun >> ../log; until [[ -f ../go ]]; do sleep 0.05; done; echo "$*"; exit 143\n',
    )
    command = ["bash", LAUNCH / "tpu_worker.sh", "train", "--workdir=w"]
    environment = os.environ | {"HOME": str(host)}
    both = []
    for _ in range(2):
        both.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
        wait_for(host / "log")
    both[0].kill()  # the connection broke
    paths = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    done = run(LAUNCH / "tpu_worker.sh", "install", "a:/b", HOME=str(host), PATH=paths)
    assert done.returncode == 0
    assert "training is running; nothing is installed" in done.stderr
    assert (host / "sparseopt_jax").exists()
    (host / "go").write_text("")
    both[0].communicate(timeout=60)
    said, _ = both[1].communicate(timeout=60)
    assert said == "-m experiments.train --workdir=w\n"
    assert both[1].returncode == 143
    assert (host / "log").read_text() == "begun\n"


# SLURM.

SRUN = """
echo "srun $*" >> "$CLUSTER/calls"
[[ $OUTCOME == wait ]] || exit "$OUTCOME"
trap 'exit 143' TERM
echo "$$" > "$CLUSTER/new" && mv "$CLUSTER/new" "$CLUSTER/pid"
while true; do sleep 0.05; done
"""
JOB = {"SLURM_JOB_ID": "7", "SLURM_NTASKS_PER_NODE": "4", "SLURM_GPUS_ON_NODE": "4"}


@pytest.fixture
def cluster(tmp_path):
    """A function that returns the environment of a job, in which srun ends as given."""
    write_command(tmp_path / "bin" / "srun", SRUN)
    write_command(tmp_path / "bin" / "scontrol", 'echo "scontrol $*" >> "$CLUSTER/calls"\n')
    scancel = 'echo "scancel $*" >> "$CLUSTER/calls"\nkill -TERM "$(cat "$CLUSTER/pid")"\n'
    write_command(tmp_path / "bin" / "scancel", scancel)
    write_command(tmp_path / "bin" / "a python", "")

    def job(outcome, **environment):
        return JOB | {
            "CLUSTER": str(tmp_path),
            "OUTCOME": str(outcome),
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "PYTHON": str(tmp_path / "bin" / "a python"),
            **environment,
        }

    return job


@pytest.mark.parametrize(
    ("outcome", "restarts", "code", "again"),
    [
        (0, 0, 0, False),
        (1, 0, 1, False),
        (2, 0, 2, False),
        (143, 0, 143, False),
        (75, 0, 0, True),
        (137, 19, 0, True),
        (75, 20, 75, False),
    ],
)
def test_a_job_is_queued_again_after_a_crash_only(
    cluster, tmp_path, outcome, restarts, code, again
):
    environment = cluster(outcome, SLURM_RESTART_COUNT=str(restarts), SLURM_CPUS_PER_TASK="8")
    done = run(LAUNCH / "slurm.sh", *ARGUMENTS, **environment)
    assert done.returncode == code, done.stderr
    asked = (tmp_path / "calls").read_text().splitlines()
    assert asked[0] == (
        f"srun --kill-on-bad-exit=0 --cpus-per-task=8 {environment['PYTHON']}"
        f" -m experiments.train {' '.join(ARGUMENTS)}"
    )
    assert asked[1:] == ["scontrol requeue 7"] * again


def test_near_the_time_limit_training_is_asked_to_stop_and_the_job_queued_again(cluster, tmp_path):
    environment = cluster("wait", SLURM_RESTART_COUNT="1000")
    with subprocess.Popen(
        ["bash", LAUNCH / "slurm.sh", *ARGUMENTS],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    ) as job:
        wait_for(tmp_path / "pid")
        job.send_signal(signal.SIGTERM)  # the script outlives it
        time.sleep(0.1)
        assert job.poll() is None
        job.send_signal(signal.SIGUSR1)
        _, said = job.communicate(timeout=60)
    assert job.returncode == 0, said
    asked = (tmp_path / "calls").read_text().splitlines()
    assert asked[1:] == ["scancel --signal=TERM 7", "scontrol requeue 7"]
    assert "the time limit is near" in said


# What is missing.


@pytest.mark.parametrize("name", ["tpu_pod.sh", "slurm.sh"])
def test_usage_is_told(name):
    done = run(LAUNCH / name, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: ")
    assert not done.stderr


def test_what_the_pod_misses_is_named_before_anything_is_done(cloud, tmp_path):
    _, pod = cloud
    workdir = ["--workdir=w"]
    for name in POD.keys() - {"RETRY_SECONDS"}:
        done = pod(*workdir, **POD | {name: ""})
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: {name} is not set\n")
        assert "usage: " in done.stderr
    few = tmp_path / "few"  # commands, and gcloud is not among them
    few.mkdir()
    (few / "cat").symlink_to(shutil.which("cat"))
    for done, message in (
        (pod(*workdir, **POD | {"SHARE": "share"}), "SHARE=share must be SERVER:/PATH"),
        (pod("--config=c.py", **POD), "--workdir=/mnt/share/... is not among"),
        (run(LAUNCH / "tpu_pod.sh", *workdir, **POD, PATH=str(few)), "gcloud is not installed"),
    ):
        assert done.returncode == 2, message
        assert done.stderr.startswith(f"error: {message}"), done.stderr
    assert not (tmp_path / "calls").read_text()


def test_what_slurm_cannot_run_is_named_before_anything_is_done(cluster, tmp_path):
    job = cluster(0)
    workdir = "--workdir=w"
    for arguments, environment, message in (
        ([workdir], {}, "SLURM_JOB_ID is not set"),
        (["--config=c.py"], job, "--workdir is not among"),
        ([workdir], job | {"PYTHON": "no/python"}, "PYTHON=no/python is not there"),
        ([workdir], job | {"SLURM_NTASKS_PER_NODE": "1"}, "4 GPUs but 1 tasks a node; give"),
    ):
        done = run(LAUNCH / "slurm.sh", *arguments, **environment)
        assert done.returncode == 2, message
        assert done.stderr.startswith(f"error: {message}"), done.stderr
    assert not (tmp_path / "calls").exists()
