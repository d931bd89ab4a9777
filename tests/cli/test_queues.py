"""Jobs of a sweep in the queues of clusters, whose machines are taken away: started again, they go on."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import slurm
from cli.conftest import PROBE
from cli.test_sweeps import read, rows
from waiting import PATIENCE, wait_for

ONE = ["trainer.accelerator=cpu", "hydra.launcher.partition=long"]


@pytest.fixture
def queue(tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """``queue(*words)``: the running command of a sweep by SLURM, of the probe verb, in the folder ``s``."""
    monkeypatch.chdir(tmp_path)
    variables = environment | slurm.install(tmp_path / "slurm") | {"PYTHONPATH": environment["PYTHONPATH"]}
    started: list[subprocess.Popen[str]] = []

    def start(*words: str) -> "subprocess.Popen[str]":
        line = [sys.executable, str(PROBE), "train", "-m", "run_dir=s", "hydra/launcher=slurm", *ONE, *words]
        with Path("out.txt").open("w") as out:
            started.append(subprocess.Popen(line, env=variables, stdout=out, stderr=out, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()


def test_a_job_that_loses_its_machine_goes_on_when_slurm_starts_it_again(queue: Any) -> None:
    """SLURM sends SIGUSR2 before it takes a machine away; submitit then puts the job back into the queue."""
    command = queue("logger.project=fine,wait")
    wait_for(Path("s/1/waiting").exists, command)
    (task,) = Path("slurm").glob("*_1.0.pid")
    os.kill(int(task.read_text()), signal.SIGUSR2)
    assert command.wait(PATIENCE) == 0, Path("out.txt").read_text()
    assert [row["status"] for row in rows("s")] == ["finished"] * 2
    assert [len(read("s", str(job), "run.json")["resumes"]) for job in range(2)] == [0, 1]


@pytest.fixture
def ray_cluster(tmp_path: Path, environment: dict[str, str]) -> Iterator[tuple[str, list[int], dict[str, str]]]:
    """Address of a cluster of two machines of one processor, their raylets, and variables for what connects to it."""
    pytest.importorskip("hydra_plugins.hydra_ray_launcher", reason="hydra-ray-launcher is missing")
    with tempfile.TemporaryDirectory(prefix="ray") as short:  # paths of sockets have at most 107 characters
        Path(short, "ray").mkdir()
        # Without the mode Ray writes a token into the home folder.
        variables = environment | {"RAY_TMPDIR": short, "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
        line = [sys.executable, str(Path(slurm.__file__).with_name("ray_cluster.py"))]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        with subprocess.Popen(line, env=variables, cwd=tmp_path, text=True, **pipes) as cluster:
            assert cluster.stdin is not None and cluster.stdout is not None
            address, *raylets = cluster.stdout.readline().split()
            yield address, [int(raylet) for raylet in raylets], variables
            cluster.stdin.close()


def holder(folder: Path) -> int:
    """The process that is at work in a run folder: it holds its lock."""
    for file in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            if file.readlink() == folder.absolute() / ".lock":
                return int(file.parts[2])
    raise AssertionError(f"nobody is at work in {folder}")


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["worker", "machine"])
def test_a_job_that_loses_its_worker_goes_on_when_ray_starts_it_again(
    lost: str, ray_cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    address, raylets, variables = ray_cluster
    line = [sys.executable, str(PROBE), "train", "-m", "run_dir=s", "logger.project=wait,fine"]
    line += ["hydra/launcher=ray_cluster", f"hydra.launcher.ray.init.address={address}"]
    with Path("out.txt").open("w") as out:
        command = subprocess.Popen(line, env=variables, stdout=out, stderr=out)
    try:
        wait_for(Path("s/0/waiting").exists, command)
        wait_for(Path("s/1/result.json").exists, command)
        worker = holder(Path("s/0"))
        parent = int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])
        assert parent in raylets
        for process in [worker] if lost == "worker" else [parent, worker]:
            os.kill(process, signal.SIGKILL)
        assert command.wait(PATIENCE) == 0, Path("out.txt").read_text()
    finally:
        command.kill()
    assert [row["status"] for row in rows("s")] == ["finished"] * 2
    assert [len(read("s", str(job), "run.json")["resumes"]) for job in range(2)] == [1, 0]


@pytest.mark.slow
def test_a_job_that_ray_gives_up_is_told(ray_cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    address, _, variables = ray_cluster
    line = [sys.executable, str(PROBE), "train", "-m", "run_dir=s", "logger.project=fine,wait"]
    line += ["hydra/launcher=ray_cluster", f"hydra.launcher.ray.init.address={address}"]
    with Path("out.txt").open("w") as out:
        command = subprocess.Popen(
            [*line, "hydra.launcher.ray.remote.max_retries=0"], env=variables, stdout=out, stderr=out
        )
    try:
        wait_for(Path("s/1/waiting").exists, command)
        os.kill(holder(Path("s/1")), signal.SIGKILL)
        assert command.wait(PATIENCE) == 1
    finally:
        command.kill()
    told = [text for text in Path("out.txt").read_text().splitlines() if text.startswith("kncompress: ")]
    assert len(told) == 1 and told[0].startswith("kncompress: RayLauncher: WorkerCrashedError: ")
    assert told[0].endswith("; the same command runs what is missing")
    assert [row["status"] for row in rows("s")] == ["finished", "running"]
    done = subprocess.run(line, env=variables, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    assert [row["status"] for row in rows("s")] == ["finished"] * 2
