"""The real program many times over: a server that has imported everything forks a process for each command.

A command costs a tenth of what it takes to start Python anew, and its process can be killed, stopped and limited as any
other. The server itself never computes, for a process that has can fork none that trains.
"""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import kncompress


class Forks:
    """The server's client. Commands run in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.number = folder, 0
        root = str(Path(kncompress.__file__).parents[1])
        environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
        environment |= {"PYTHONPATH": root, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
        line = [sys.executable, str(Path(__file__))]
        self.server = subprocess.Popen(
            line, cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def _ask(self, **request: Any) -> Any:
        assert self.server.stdin is not None and self.server.stdout is not None
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(self, *words: str, **options: Any) -> int:
        """Start a command; returns its process. Options: ``limits`` {name of resource: bytes}, ``env``, ``patch``."""
        self.number += 1
        return int(self._ask(words=words, number=self.number, **options))

    def wait(self, process: int) -> tuple[int, str]:
        """(exit code, minus the signal that ended it; what it has printed)."""
        code, output = self._ask(wait=process)
        return int(code), str(output)

    def run(self, *words: str, **options: Any) -> tuple[int, str]:
        """Start and wait."""
        return self.wait(self.start(*words, **options))

    def stopped(self, number: int, after: float, *words: str, **options: Any) -> tuple[int, str]:
        """Start, send a signal after so many seconds, and wait."""
        process = self.start(*words, **options)
        time.sleep(after)
        for send in (number,) if number != signal.SIGSTOP else (number, signal.SIGCONT):
            os.kill(process, send)  # not reaped before it is waited for, so the number is nobody else's
            time.sleep(0.2)
        return self.wait(process)

    def close(self) -> None:
        """End the server."""
        with self.server:  # closes both pipes and waits
            pass


def _patch(name: str) -> None:
    """Faults that only the process itself can have."""
    import torch

    if name == "clock":  # steps back by an hour, now and then
        real = time.time
        time.time = lambda: real() - 3600 * (int(real() * 2) % 2)
    else:
        from kncompress.training.pretraining import ILKDPretraining

        step = ILKDPretraining.training_step

        def faulty(self: Any, batch: Any, number: int) -> Any:
            loss = step(self, batch, number)
            if number < 2:
                return loss
            if name == "memory":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
            return loss * float("nan")

        ILKDPretraining.training_step = faulty  # type: ignore[method-assign]


def _child(request: dict[str, Any], output: str) -> int:
    os.setsid()
    null, out = os.open(os.devnull, os.O_RDONLY), os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(null, 0)
    closed = request.get("closed")
    if closed:
        read, write = os.pipe()
        os.close(read)
        os.dup2(write, 1)
        os.dup2(out, 2)
    else:
        os.dup2(out, 1)
        os.dup2(out, 2)
    os.environ.update(request.get("env", {}))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name, most in request.get("limits", {}).items():
        resource.setrlimit(getattr(resource, name), (most, most))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if request.get("patch"):
        _patch(request["patch"])
    from kncompress.__main__ import main

    sys.argv = ["kncompress", *request["words"]]
    try:
        code = main(request["words"])
    except BaseException as error:
        traceback.print_exception(error)
        code = 99
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    return code


def _serve() -> None:
    import kncompress.cli.dispatch
    import kncompress.commands.compress
    import kncompress.commands.evaluate
    import kncompress.commands.export
    import kncompress.commands.glue
    import kncompress.commands.inspect
    import kncompress.commands.plan
    import kncompress.commands.train  # noqa: F401

    outputs: dict[int, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for line in sys.stdin:
            request = json.loads(line)
            if "wait" in request:
                _, status = os.waitpid(request["wait"], 0)
                output = Path(outputs.pop(request["wait"])).read_text(errors="replace")
                print(json.dumps([os.waitstatus_to_exitcode(status), output]), flush=True)
                continue
            output = f"{folder}/{request['number']}"
            Path(output).touch()
            process = os.fork()
            if process == 0:
                code = 97
                try:
                    code = _child(request, output)
                finally:
                    os._exit(code)
            outputs[process] = output
            print(json.dumps(process), flush=True)


if __name__ == "__main__":
    _serve()
