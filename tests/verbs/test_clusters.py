"""Trainings as clusters run them, in real processes of this machine: torchrun's restarts, SLURM's tasks and queue."""

import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import slurm
import torch
from safetensors.torch import load_file
from verbs.conftest import read, rows_by_step
from verbs.test_processes import LONG, TWO, _batches, _metrics
from waiting import PATIENCE, wait_for

import kncompress
from kncompress.config import TrainerConfig
from kncompress.errors import UserError
from kncompress.runs.process import process_rank
from kncompress.training.processes import devices, processes, started_outside

WATCHED = Path(__file__).with_name("watched.py")
ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(Path(kncompress.__file__).parents[1]),
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}


def equal(one: Path, two: Path) -> None:
    """Weights and metrics of two runs, to the bit."""
    ours, theirs = (load_file(run / "model" / "model.safetensors") for run in (one, two))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    found = [
        [{k: v for k, v in row.items() if k != "train/tokens_per_second"} for row in _metrics(r)] for r in (one, two)
    ]
    assert found[0] == found[1]


def workers(process: "subprocess.Popen[str]") -> dict[int, int]:
    """``{rank: process id}`` of what torchrun has started."""
    found = {}
    for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        variables = dict(v.split("=", 1) for v in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in v)
        if "TORCHELASTIC_RUN_ID" in variables:
            found[int(variables["RANK"])] = int(pid)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "meeting", "killed"), [("ddp", "--standalone", [1]), ("fsdp", "--master-port=29537", [1, 0])]
)
def test_torchrun_starts_a_killed_training_again(
    watched: Any, small: list[str], tmp_path: Path, strategy: str, meeting: str, killed: list[int]
) -> None:
    """Each of ``killed``, a rank, gets SIGKILL, and torchrun starts both processes again, by the same words."""
    words = [*small, *LONG, f"trainer.strategy={strategy}", "trainer.devices=2", "trainer.accelerator=cpu"]
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--max-restarts={len(killed)}"]
    line += [meeting, str(WATCHED), "train", *words, "run_dir=killed", "resume=auto"]
    logs = [tmp_path / f"log{start}" for start in range(len(killed) + 1)]
    last = tmp_path / "killed" / "checkpoints" / "last.ckpt"
    with (tmp_path / "output.txt").open("w") as output:
        run = subprocess.Popen(
            line,
            cwd=tmp_path,
            env=ENVIRONMENT | {"WATCH": str(tmp_path / "log")},
            stdout=output,
            stderr=output,
            text=True,
        )
    try:
        for rank, log in zip(killed, logs, strict=False):
            wait_for(lambda log=log: last.exists() and len(_batches(log)) >= 40, run)
            os.kill(workers(run)[rank], signal.SIGKILL)
        assert run.wait(PATIENCE) == 0, (tmp_path / "output.txt").read_text()
    finally:
        run.kill()
    straight = watched(*words, "run_dir=straight", log=tmp_path / "log-straight")
    assert straight.returncode == 0, straight.stderr
    equal(tmp_path / "killed", tmp_path / "straight")
    assert rows_by_step(*logs) == rows_by_step(tmp_path / "log-straight")
    assert len(read(tmp_path / "killed", "run.json")["resumes"]) == len(killed)


NODES = ["trainer=ddp", "trainer.nodes=2", "hydra/launcher=slurm", "hydra.launcher.partition=long"]


def test_slurm_is_asked_for_two_nodes_of_eight(
    command: Any, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a machine without GPUs, from which jobs are sent to those that have them."""
    import submitit
    from hydra.core.utils import JobReturn, JobStatus

    for name, value in slurm.install(tmp_path / "slurm", held=True).items():
        monkeypatch.setenv(name, value)
    done = JobReturn(status=JobStatus.COMPLETED)
    monkeypatch.setattr(submitit.SlurmJob, "results", lambda job: [done] * 16)
    words = [*small, *NODES, "trainer.devices=8", "trainer.accelerator=gpu", "trainer.batch_tokens=512", "seed=1,2"]
    code, _, err = command("train", "-m", *words, "run_dir=sweep")
    assert code == 1, err  # no job has run
    (file,) = Path("sweep").glob(".submitit/*/*_submission.sh")
    asked = slurm.settings(file.read_text())
    assert (asked["nodes"], asked["ntasks-per-node"], asked["gpus-per-node"], asked["cpus-per-task"]) == tuple("2888")
    assert (asked["partition"], asked["time"], asked["array"]) == ("long", "1440", "0-1%2")
    assert asked["signal"] == "USR2@120"
    (start,) = [line for line in file.read_text().splitlines() if line.startswith("srun ")]
    assert f"{sys.executable} -u -m submitit.core._submit {tmp_path / 'work' / 'sweep' / '.submitit'}" in start


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["trainer.devices=auto"], "trainer.devices=auto: SLURM starts a task for each device"),
        (["trainer.devices=1,2"], "trainer.devices=1,2: the jobs of a sweep are one array of SLURM"),
        (["trainer.devices=3"], "job 0: trainer.batch_tokens=128: a batch of 4 blocks of 32 tokens cannot be shared"),
    ],
)
def test_what_slurm_cannot_start_is_told_before(command: Any, small: list[str], words: list[str], told: str) -> None:
    code, _, err = command("train", "-m", *small, *NODES, *words, "seed=1,2", "run_dir=sweep")
    assert code == 2 and told in err and not Path("sweep").exists()


@pytest.mark.slow
def test_two_nodes_of_slurm_train_as_one_machine_does(process: Any, small: list[str], tmp_path: Path) -> None:
    """Both tasks are processes of this machine. Their node is taken away once, and they go on to the same end."""
    words = [*small, *LONG, "trainer.accelerator=cpu"]
    variables = slurm.install(tmp_path / "slurm")
    sweep = process(
        "train", "-m", *words, *NODES, "hydra.launcher.gpus_per_node=null", "hydra.launcher.cpus_per_task=1",
        "trainer.devices=1", "seed=3", "run_dir=sweep", start=True, **variables,
    )  # fmt: skip
    last = tmp_path / "sweep" / "0" / "checkpoints" / "last.ckpt"
    wait_for(last.exists, sweep)
    for file in (tmp_path / "slurm").glob("*.pid"):
        os.kill(int(file.read_text()), signal.SIGUSR2)
    out, _ = sweep.communicate(timeout=PATIENCE)
    assert sweep.returncode == 0, out
    assert len(read(tmp_path / "sweep" / "0", "run.json")["resumes"]) == 1
    straight = process("train", *words, *TWO, "seed=3", "run_dir=straight")
    assert straight.returncode == 0, straight.stderr
    equal(tmp_path / "sweep" / "0", tmp_path / "straight")


SRUN = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "16", "SLURM_NTASKS_PER_NODE": "8"}
SRUN |= {"SLURM_NNODES": "2", "SLURM_PROCID": "9", "SLURM_NODEID": "1", "SLURM_LOCALID": "1"}


def test_the_variables_of_srun_are_taken_for_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    assert started_outside() == ("SLURM", 16) and process_rank() == 9
    whole = TrainerConfig(accelerator="cpu", strategy="ddp", nodes=2, devices="auto")
    assert (devices(whole), processes(whole)) == (8, 16)
    with pytest.raises(UserError, match="SLURM has started 16 processes, but devices x nodes are 4 x 2"):
        processes(replace(whole, devices=4))
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")  # a shell in an allocation, whose own variables these are
    assert started_outside() is None and process_rank() == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [["submitit_local"], ["joblib", "hydra.launcher.n_jobs=1"], ["ray", "+hydra.launcher.ray.init.num_cpus=2"]],
    ids=lambda words: words[0],
)
def test_a_launchers_own_process_starts_the_others(
    process: Any, small: list[str], tmp_path: Path, words: list[str]
) -> None:
    """By Lightning: the second process is not one more of the launcher's program."""
    if words[0] == "ray":
        pytest.importorskip("hydra_plugins.hydra_ray_launcher", reason="hydra-ray-launcher is missing")
    with tempfile.TemporaryDirectory(prefix="ray") as short:  # paths of sockets have at most 107 characters
        Path(short, "ray").mkdir()
        variables = {"RAY_TMPDIR": short, "RAY_AUTH_MODE": "disabled"}
        line = [*small, *TWO, "seed=1", f"hydra/launcher={words[0]}", *words[1:], "run_dir=sweep"]
        done = process("train", "-m", *line, **variables)
    assert done.returncode == 0, done.stderr
    assert read(tmp_path / "sweep" / "0", "result.json")["metrics"]["tokens"] == 4 * 128


@pytest.mark.slow
def test_srun_goes_on_by_the_same_line_after_sigterm(process: Any, small: list[str], tmp_path: Path) -> None:
    """Two nodes of a task each, which SLURM ends by SIGTERM, as ``scancel`` does; then the same job once more."""
    words = [*small, *LONG, "trainer=ddp", "trainer.accelerator=cpu"]
    line = ["srun", "--output", "%t.log", "--error", "%t.log", sys.executable, "-m", "kncompress", "train", *words]
    line += ["trainer.nodes=2", "trainer.devices=1", "run_dir=run", "resume=auto"]
    variables = slurm.install(tmp_path / "slurm")
    own = {"FAKE_NAME": "1", "SLURM_JOB_NAME": "train", "SLURM_NODELIST": "localhost,localhost", "SLURM_NNODES": "2"}
    environment = ENVIRONMENT | variables | own | {"SLURM_NTASKS_PER_NODE": "1"}
    first = subprocess.Popen(line, cwd=tmp_path, env=environment | {"SLURM_JOB_ID": slurm.new_job()})
    wait_for((tmp_path / "run" / "checkpoints" / "last.ckpt").exists, first)
    for file in (tmp_path / "slurm").glob("*.pid"):
        os.kill(int(file.read_text()), signal.SIGTERM)
    assert first.wait(PATIENCE) == 143
    assert read(tmp_path / "run", "run.json")["status"] == "interrupted"
    again = subprocess.run(line, cwd=tmp_path, env=environment | {"SLURM_JOB_ID": slurm.new_job()}, timeout=PATIENCE)
    assert again.returncode == 0, (tmp_path / "0.log").read_text()
    straight = process("train", *words, "trainer.devices=2", "run_dir=straight")
    assert straight.returncode == 0, straight.stderr
    equal(tmp_path / "run", tmp_path / "straight")
