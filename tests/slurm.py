"""SLURM's commands for a machine that has no SLURM: ``sbatch``, ``srun``, ``sacct`` and ``scontrol requeue``.

They take what submitit writes and start its tasks here, with the variables that SLURM sets; nodes are processes of this
machine. ``install`` puts them into a folder, to be the first in ``PATH``. The same folder holds what they know:
``<job>.state``, ``<job>.requeue``, and ``<job>.<rank>.pid`` of each task, which tests kill and send signals to.
"""

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

COMMANDS = ("sbatch", "srun", "sacct", "scontrol")
HOME = Path(os.environ.get("FAKE_SLURM", "."))


def install(folder: Path, held: bool = False) -> dict[str, str]:
    """Make the commands in ``folder``; returns the variables with which they are found.

    ``held``: jobs stay in the queue.
    """
    folder.mkdir(parents=True)
    for name in COMMANDS:
        file = folder / name
        file.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{Path(__file__).resolve()}" {name} "$@"\n')
        file.chmod(0o755)
    return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "FAKE_SLURM": str(folder)} | (
        {"FAKE_HELD": "1"} if held else {}
    )


def settings(text: str) -> dict[str, str]:
    """``{name: value}`` of the lines ``#SBATCH --name=value``."""
    return {name: value.strip("'") for name, value in re.findall(r"^#SBATCH --([\w-]+)=(.*)$", text, re.MULTILINE)}


def new_job() -> str:
    """A number; Lightning makes a port of its last four digits, which is free."""
    while True:
        job = random.randint(4_000_000, 4_999_999)
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", 15_000 + job % 10_000)):
                return str(job)


def sbatch(file: str) -> None:
    """Take a job, or the jobs of an array, and start them one after the other beside this process."""
    job = new_job()
    print(f"Submitted batch job {job}", flush=True)
    if "FAKE_HELD" in os.environ:
        return
    with (HOME / "queue.log").open("a") as log:
        line = [sys.executable, __file__, "queue", file, job]
        subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)


def queue(file: str, job: str) -> None:
    """The jobs of ``file``, again as often as they are requeued."""
    asked = settings(Path(file).read_text())
    nodes, tasks = int(asked.get("nodes", 1)), int(asked.get("ntasks-per-node", 1))
    count = int(asked["array"].partition("%")[0].partition("-")[2]) + 1 if "array" in asked else None
    for element in range(count or 1):
        name = job if count is None else f"{job}_{element}"
        own = {} if count is None else {"SLURM_ARRAY_JOB_ID": job, "SLURM_ARRAY_TASK_ID": str(element)}
        own |= {"SLURM_JOB_ID": str(int(job) + element), "SLURM_JOB_NAME": asked["job-name"], "FAKE_NAME": name}
        own |= {"SLURM_NODELIST": ",".join(["localhost"] * nodes), "SLURM_NTASKS_PER_NODE": str(tasks)}
        own |= {"SLURM_JOB_NUM_NODES": str(nodes), "SLURM_NNODES": str(nodes)}
        requeue = HOME / f"{name}.requeue"
        while True:
            (HOME / f"{name}.state").write_text("RUNNING")
            with Path(asked["error"].replace("%j", name).replace("%A_%a", name)).open("a") as log:
                code = subprocess.run(
                    ["bash", file], env=os.environ | own, stdout=log, stderr=log, check=False
                ).returncode
            if not requeue.exists():
                break
            requeue.unlink()
        (HOME / f"{name}.state").write_text("FAILED" if code else "COMPLETED")


def srun(*words: str) -> int:
    """Start the tasks and wait for them. A failed one ends the others, and so does a requeue."""
    rest, files = list(words), {}
    while rest[0].startswith("--"):
        option = rest.pop(0)
        if option in ("--output", "--error"):
            files[option] = rest.pop(0)
    name, nodes = os.environ["FAKE_NAME"], int(os.environ["SLURM_NNODES"])
    each = int(os.environ["SLURM_NTASKS_PER_NODE"])
    running = []
    for rank in range(nodes * each):
        own = {"SLURM_PROCID": rank, "SLURM_NODEID": rank // each, "SLURM_LOCALID": rank % each}
        own |= {"SLURM_NTASKS": nodes * each}
        logs = []
        for option in ("--output", "--error"):
            path = files[option].replace("%j", name).replace("%A_%a", name).replace("%t", str(rank))
            logs.append(Path(path).open("a"))  # noqa: SIM115
        env = os.environ | {key: str(value) for key, value in own.items()}
        running.append(subprocess.Popen(rest, env=env, stdout=logs[0], stderr=logs[1]))
        (HOME / f"{name}.{rank}.pid").write_text(str(running[-1].pid))
    ends = float("inf")
    while any(task.poll() is None for task in running):
        requeued = (HOME / f"{name}.requeue").exists()
        if requeued or any(task.poll() for task in running):
            ends = min(ends, time.monotonic() + (1.0 if requeued else 20.0))
        if time.monotonic() > ends:
            for number in (signal.SIGTERM, signal.SIGKILL):
                for task in running:
                    if task.poll() is None:
                        task.send_signal(number)
                time.sleep(1.0)
        time.sleep(0.1)
    return max(abs(task.returncode) for task in running)


def sacct(*_: str) -> None:
    """State of every job."""
    print("JobID|State|NodeList")
    for file in HOME.glob("*.state"):
        print(f"{file.stem}|{file.read_text()}|localhost")


def scontrol(_: str, job: str) -> None:
    """``scontrol requeue <job>``."""
    (HOME / f"{job}.requeue").touch()


if __name__ == "__main__":
    sys.exit({f.__name__: f for f in (sbatch, queue, srun, sacct, scontrol)}[sys.argv[1]](*sys.argv[2:]))
