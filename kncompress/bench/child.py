"""Fresh processes: a job in, a result out, both as JSON files; and how much memory a process has taken at most."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from kncompress.bench.rivals import Unavailable

_DISTRIBUTED = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def run_child(command: list[str], job: dict[str, Any]) -> dict[str, Any]:
    """The result of ``python *command JOB RESULT``.

    Raises:
        Unavailable: it failed; the last line of what it wrote.
    """
    with tempfile.TemporaryDirectory(prefix="kncompress-bench-") as folder:
        given, made = Path(folder) / "job.json", Path(folder) / "result.json"
        given.write_text(json.dumps(job))
        line = [sys.executable, *command, str(given), str(made)]
        done = subprocess.run(
            line, cwd=folder, env=child_environment(), capture_output=True, text=True, errors="replace", check=False
        )
        if done.returncode or not made.exists():
            lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
            raise Unavailable(f"failed: {lines[-1]}")
        return dict(json.loads(made.read_text()))


def child_environment() -> dict[str, str]:
    """That of this process, with the package on the path, this process's threads, and no rank."""
    package = str(Path(__file__).resolve().parents[2])
    found = {name: value for name, value in os.environ.items() if name not in _DISTRIBUTED}
    paths = [package, *filter(None, [found.get("PYTHONPATH")])]
    settings = {
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "HF_HUB_OFFLINE": "1",  # nothing is to be fetched, and a miss would be tried again for half a minute
    }
    return found | settings


def peak_memory(device: torch.device) -> int:
    """Bytes that this process has taken at most: of the GPU's memory, else its largest resident set.

    On Linux the kernel's own mark of this program: ``ru_maxrss`` starts at what the parent took.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def reset_peak(device: torch.device) -> int:
    """Bytes that this process takes now; where the system allows it, its peak counts from here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):  # not on Linux, or not allowed
        Path("/proc/self/clear_refs").write_text("5")
    return peak_memory(device)


def exchange(arguments: list[str]) -> tuple[dict[str, Any], Path]:
    """In the child: the job, and where the result belongs."""
    given, made = arguments
    return json.loads(Path(given).read_text()), Path(made)
