"""Several processes, and processes that are killed: the same training comes out."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from verbs.conftest import read
from waiting import PATIENCE, wait_for

import kncompress

TWO = ["trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu"]


def _batches(log: Path) -> list[tuple[int, str]]:
    """(step, digest) in the order of the file; a line that was cut short by a kill is none."""
    text = log.read_text() if log.exists() else ""
    lines = [line.split() for line in text[: text.rfind("\n") + 1].splitlines()]
    return [(int(step), digest) for step, _, digest in lines]


def _by_step(batches: list[tuple[int, str]]) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for step, digest in batches:
        found.setdefault(step, []).append(digest)
    return found


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder / "model").state_dict())


def _metrics(folder: Path) -> list[dict[str, float]]:
    with (folder / "metrics.csv").open() as stream:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(stream)]


def test_two_processes_train_as_one(process: Any, command: Any, small: list[str], tmp_path: Path) -> None:
    # 24 validation blocks and a test text that two processes cannot share evenly.
    words = [*small, "trainer.validation_tokens=416"]
    assert command("train", *words, f"run_dir={tmp_path / 'one'}")[0] == 0
    done = process("train", *words, *TWO, "run_dir=two")
    assert done.returncode == 0, done.stderr
    one, two = read(tmp_path / "one", "result.json")["metrics"], read(tmp_path / "two", "result.json")["metrics"]
    assert one.keys() == two.keys()
    for name in one.keys() - {"tokens_per_second"}:
        assert two[name] == pytest.approx(one[name], rel=1e-5), name
    for first, second in zip(_metrics(tmp_path / "one"), _metrics(tmp_path / "two"), strict=True):
        assert first.keys() == second.keys()
        for name in first.keys() - {"train/tokens_per_second"}:
            assert second[name] == pytest.approx(first[name], rel=1e-4), name
    ours, theirs = _weights(tmp_path / "one"), _weights(tmp_path / "two")
    # The bias of the keys has no gradient but rounding, which Adam turns into steps of the learning rate.
    keyless = [key for key in ours if not key.endswith("c_attn.bias") and ".k." not in key]
    assert all(torch.allclose(ours[key], theirs[key], atol=1e-4) for key in keyless)


def test_a_sweep_mixes_processes_and_survives_a_failing_one(watched: Any, small: list[str], tmp_path: Path) -> None:
    words = [*small, "trainer.steps=2", "trainer.accelerator=cpu", "-m", "trainer.devices=2,1", "seed=1,2"]
    # Rank 1 alone fails: the main process must neither hang nor be killed with the sweep.
    done = watched(*words, "run_dir=sweep", log=tmp_path / "log", FAIL="2 1")
    assert done.returncode == 1, done.stderr
    results = [read(tmp_path / "sweep" / str(job), "result.json") for job in range(4)]
    assert [result["status"] for result in results] == ["finished", "failed", "finished", "finished"]
    assert results[0]["metrics"]["perplexity/student"] == pytest.approx(
        results[2]["metrics"]["perplexity/student"], rel=1e-5
    )
    with (tmp_path / "sweep" / "sweep.csv").open() as stream:
        assert [row["status"] for row in csv.DictReader(stream)] == [result["status"] for result in results]


@pytest.mark.slow
def test_torchrun_starts_the_processes(small: list[str], tmp_path: Path) -> None:
    parent = str(Path(kncompress.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": parent, "OMP_NUM_THREADS": "1"}

    def torchrun(*words: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29531"]
        return subprocess.run(
            [*line, "-m", "kncompress", "train", *small, *words],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False,
        )  # fmt: skip

    done = torchrun("trainer=ddp", "trainer.accelerator=cpu", "run_dir=run")
    assert done.returncode == 0, done.stderr
    assert read(tmp_path / "run", "result.json")["metrics"]["tokens"] == 4 * 128
    for words, message in (
        (["run_dir=other", "trainer.accelerator=cpu"], "trainer.devices=1: torchrun has started 2 processes"),
        (["trainer=ddp", "trainer.accelerator=cpu"], "give run_dir=<folder> where torchrun or srun starts"),
    ):
        done = torchrun(*words)
        assert done.returncode != 0 and message in done.stderr


def _kill_and_resume(
    watched: Any, words: list[str], tmp_path: Path, numbers: list[int], steps: int
) -> dict[int, list[str]]:
    """Run ``words`` with ``resume=auto``, stopped by each signal of ``numbers`` at a random moment.

    Returns the batches by step that the weights have seen.
    """
    moments = random.Random(7)
    line = [*words, "resume=auto", f"run_dir={tmp_path / 'killed'}"]
    seen: dict[int, list[str]] = {}
    for attempt, number in enumerate([*numbers, None]):
        log = tmp_path / f"log{attempt}"
        if number is not None:
            stopped = watched(*line, log=log, start=True)
            wanted = moments.randint(1, 2 * steps // (len(numbers) + 1))
            wait_for(lambda log=log, wanted=wanted: len(_batches(log)) >= wanted, stopped)
            os.kill(stopped.pid, number)
            stopped.wait(PATIENCE)
            if number == signal.SIGTERM:
                assert stopped.returncode == 143
        else:
            done = watched(*line, log=log)
            assert done.returncode == 0, done.stderr
        again = _by_step(_batches(log))
        seen = {step: digests for step, digests in seen.items() if step < min(again, default=0)} | again
    return seen


def _compare(watched: Any, words: list[str], tmp_path: Path, seen: dict[int, list[str]]) -> None:
    done = watched(*words, f"run_dir={tmp_path / 'straight'}", log=tmp_path / "log")
    assert done.returncode == 0, done.stderr
    straight = _by_step(_batches(tmp_path / "log"))
    assert {step: sorted(digests) for step, digests in seen.items()} == {
        step: sorted(digests) for step, digests in straight.items()
    }
    ours, theirs = _weights(tmp_path / "killed"), _weights(tmp_path / "straight")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    metrics = [
        {k: v for k, v in row.items() if k != "train/tokens_per_second"} for row in _metrics(tmp_path / "straight")
    ]
    assert [
        {k: v for k, v in row.items() if k != "train/tokens_per_second"} for row in _metrics(tmp_path / "killed")
    ] == metrics


# Dropout draws from the random states that the checkpoints hold.
LONG = ["trainer.steps=120", "trainer.validate_every=10", "trainer.checkpoint_every=4", "trainer.dropout=true"]


KILL, TERMINATE = signal.SIGKILL, signal.SIGTERM


@pytest.mark.parametrize(
    ("numbers", "processes"),
    [
        ([TERMINATE, KILL], []),
        pytest.param([KILL] * 5, [], marks=pytest.mark.slow),
        pytest.param([KILL, TERMINATE], TWO, marks=pytest.mark.slow),
        pytest.param([KILL, TERMINATE], [*TWO, "trainer.strategy=fsdp"], marks=pytest.mark.slow),
    ],
    ids=["one", "one, five times", "ddp", "fsdp"],
)
def test_stopped_runs_end_with_the_same_weights(
    watched: Any, small: list[str], tmp_path: Path, numbers: list[int], processes: list[str]
) -> None:
    words = [*small, *LONG, *processes]
    seen = _kill_and_resume(watched, words, tmp_path, numbers, 60)
    _compare(watched, words, tmp_path, seen)


def test_sigterm_saves_the_step_it_came_in(watched: Any, small: list[str], tmp_path: Path) -> None:
    words = [*small, "trainer.steps=5000", "trainer.validate_every=5000", "logger=wandb"]
    running = watched(*words, "run_dir=run", log=tmp_path / "log", start=True)
    wait_for(lambda: len(_batches(tmp_path / "log")) >= 20, running)
    running.terminate()
    assert running.wait(PATIENCE) == 143
    steps = [step for step, _ in _batches(tmp_path / "log")]
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == steps[-1] + 1
    assert checkpoint["tokens_seen"] == 128 * (steps[-1] + 1)
    state = next(value for key, value in checkpoint["callbacks"].items() if key == "RunState")
    assert state["wandb_id"] == read(tmp_path / "run", "run.json")["wandb_id"] and state["random"].shape[0] == 1


class TestResume:
    """``resume=auto|never|<folder>``."""

    def test_auto_starts_anew_and_refuses_a_finished_or_another_run(self, command: Any, small: list[str]) -> None:
        words = [*small, "run_dir=run", "resume=auto"]
        assert command("train", *words)[0] == 0
        code, _, err = command("train", *words)
        assert code == 2 and "this run is finished" in err
        code, _, err = command("train", *words[:-1], "resume=never")
        assert code == 2 and "holds another run" in err

    def test_auto_names_every_key_that_differs(self, command: Any, small: list[str]) -> None:
        _interrupt(command, small)
        before = {file: file.read_bytes() for file in Path("run").rglob("*") if file.is_file()}
        line = [*small, "run_dir=run", "resume=auto", "seed=3", "optimizer.lr=0.5"]
        code, _, err = command("train", *line)
        assert code == 2 and len(err.strip().splitlines()) == 1
        assert "seed=3, optimizer.lr=0.5: the run in" in err and "has seed=0, optimizer.lr=0.001" in err
        code, _, err = command("train", "resume=run", "seed=3", "optimizer.lr=0.5")
        assert code == 2 and "seed=3, optimizer.lr=0.5: the run in run has seed=0, optimizer.lr=0.001" in err
        assert before == {file: file.read_bytes() for file in Path("run").rglob("*") if file.is_file()}

    def test_auto_without_a_folder_finds_the_run_with_this_configuration(self, command: Any, small: list[str]) -> None:
        assert command("train", *small)[0] == 0
        (folder,) = Path("runs").iterdir()
        _mark_unfinished(folder)
        code, out, err = command("train", *small, "resume=auto", "seed=3")
        assert code == 0 and not out.splitlines()[0].endswith(str(folder.absolute())), err
        code, out, err = command("train", *small, "resume=auto")
        assert code == 0 and out.splitlines()[0].endswith(str(folder.absolute())), err
        assert read(folder, "run.json")["resumes"] and read(folder, "result.json")["status"] == "finished"

    def test_a_checkpoint_that_is_cut_short(self, command: Any, small: list[str]) -> None:
        _interrupt(command, small)
        last = Path("run/checkpoints/last.ckpt")
        last.write_bytes(last.read_bytes()[:-500])
        before = {file: file.read_bytes() for file in Path("run").rglob("*") if file.is_file()}
        code, _, err = command("train", "resume=run")
        assert code == 2 and len(err.strip().splitlines()) == 1
        assert "checkpoints/last.ckpt is damaged" in err and "delete it" in err
        assert before == {file: file.read_bytes() for file in Path("run").rglob("*") if file.is_file()}


def _interrupt(command: Any, small: list[str]) -> None:
    """A run in ``run`` that looks as after a kill."""
    assert command("train", *small, "run_dir=run")[0] == 0
    _mark_unfinished(Path("run"))


def _mark_unfinished(folder: Path) -> None:
    run = read(folder, "run.json") | {"status": "running"}
    (folder / "run.json").write_text(json.dumps(run))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trainer.devices=3", "trainer.accelerator=cpu"], "cannot be shared evenly by 3 processes"),
        (["trainer.devices=0"], "trainer.devices=0: must be auto or a whole number from 1"),
        (["trainer=fsdp", "trainer.accelerator=gpu"], "trainer.accelerator=gpu: there is no GPU here"),
        (["trainer=fsdp", "trainer.devices=3"], "cannot be shared evenly by 3 processes"),
        (["trainer.nodes=2", "trainer.accelerator=cpu"], "trainer.nodes=2: several machines are started by torchrun"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="these GPUs would do")
def test_impossible_processes_are_one_line(command: Any, small: list[str], words: list[str], message: str) -> None:
    code, _, err = command("train", *small, *words, "run_dir=run")
    assert code == 2 and message in err
    assert len(err.strip().splitlines()) == 1, err
    assert not Path("run").exists()
