"""The processes that Lightning starts beside the main one on this node: one that is lost ends the run in order.

Lightning's own observer kills the main process, so that nothing tells or records what has happened. Here the main
process gets some seconds to fail by itself, since its connection to the lost one is broken, and the error that it ends
with names the lost one. Where it hangs in a collective instead, which no exception reaches, the run's end is recorded
from beside it, and the process left.
"""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from kncompress.errors import CheckFailed
from kncompress.training import signals
from kncompress.training.processes import connect_again

_EVERY = 0.5
PATIENCE = 10.0
"""Seconds for the main process to fail by itself."""


class LostProcess(CheckFailed):
    """A process of a distributed run ended before the others did."""


def lost(processes: list["subprocess.Popen[Any]"]) -> LostProcess | None:
    """The error that names the first of these, ranks 1, 2, ... of this node, that has failed; None: none has."""
    for rank, process in enumerate(processes, 1):
        code = process.poll()
        if code:
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            advice = "; perhaps for lack of memory" if code == -signal.SIGKILL else ""
            text = f"rank {rank} of this machine (process {process.pid}) {how}{advice}"
            return LostProcess(f"{text}; resume=<the run's folder> goes on from the last checkpoint")
    return None


class Launcher(_SubprocessScriptLauncher):
    """Lightning's, with ``watch`` in the place of the observer that kills."""

    give_up: Callable[[LostProcess], None] | None = None
    """Records the end of the run, from another thread than the main one."""

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **options: Any) -> Any:
        """Start the other processes, and go on as the first."""
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            self._call_children_scripts()
            threading.Thread(target=self.watch, daemon=True, name="ranks").start()
            signals.before_giving_up.append(self._kill_all)
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **options)

    def watch(self) -> None:
        """Until all have ended well, or ``procs`` is empty: the main process is through with them."""
        while self.procs and any(process.poll() != 0 for process in self.procs):
            error = lost(self.procs)
            if error is not None:
                end = time.monotonic() + PATIENCE
                while self.procs and time.monotonic() < end:
                    time.sleep(_EVERY)
                if self.procs:
                    self._abandon(error)
                return
            time.sleep(_EVERY)

    def _abandon(self, error: LostProcess) -> None:
        """End this process and the others although the main thread hangs."""
        self._kill_all()
        try:
            if self.give_up is not None:
                self.give_up(error)
        finally:
            os._exit(1)

    def _kill_all(self) -> None:
        for process in self.procs:
            process.kill()


class Watched:
    """A strategy whose processes ``Launcher`` starts, or torchrun, perhaps again."""

    def setup_environment(self) -> None:
        """Connect the processes."""
        strategy: Any = self
        strategy.accelerator.setup_device(strategy.root_device)  # NCCL wants to know it before
        connect_again(strategy._get_process_group_backend())
        super().setup_environment()  # type: ignore[misc]

    def _configure_launcher(self) -> None:
        super()._configure_launcher()  # type: ignore[misc]
        launcher = getattr(self, "_launcher", None)
        if isinstance(launcher, _SubprocessScriptLauncher):
            self._launcher = Launcher(launcher.cluster_environment, launcher.num_processes, launcher.num_nodes)


class WatchedDDP(Watched, DDPStrategy):  # type: ignore[misc]
    """DDP whose processes ``Launcher`` starts."""
