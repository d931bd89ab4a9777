"""The real program under faults: killed, stopped, starved, given damaged files. Nothing is lost, no traceback, the
right exit code, and after a kill the same command ends as if nothing had been.

``make test-faults`` tries all of it, the default suite a few. The seed is printed and can be given as
``KNCOMPRESS_FAULTS_SEED``; what was tried is added to the file that ``KNCOMPRESS_FAULTS_OUT`` names, a line a kind.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from faults.forks import Forks
from glue_layout import make_glue
from waiting import PATIENCE, wait_for

import kncompress

FULL = os.environ.get("HYPOTHESIS_PROFILE") == "faults"
SEED = int(os.environ.get("KNCOMPRESS_FAULTS_SEED", random.randrange(10**6) if FULL else 1))
STOPPED = (-signal.SIGKILL, 130, 143)
SENTENCE = (
    "The river runs past the old mill and down to the sea, {}. A letter came in the morning, and nobody opened it."
)


@dataclass
class Tally:
    """What came of the faults of one kind."""

    kind: str
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def note(self, outcome: str, *wrongs: str) -> None:
        """One fault; ``wrongs`` begin with ``lost``, ``traceback`` or ``exit code``."""
        self.outcomes[outcome] += 1
        self.wrong += wrongs

    def done(self) -> None:
        """Keep the counts, and fail where anything was wrong."""
        told: dict[str, Any] = {"kind": self.kind, "tried": self.outcomes.total(), "outcomes": dict(self.outcomes)}
        told |= {name: sum(w.startswith(name) for w in self.wrong) for name in ("lost", "traceback", "exit code")}
        told["seed"] = SEED
        print(json.dumps(told))
        if out := os.environ.get("KNCOMPRESS_FAULTS_OUT"):
            with Path(out).open("a") as file:
                file.write(json.dumps(told) + "\n")
        assert not self.wrong, "\n".join(self.wrong[:5])


class World:
    """A tiny model, texts, and whole runs of every verb, in ``folder``; the verbs' words."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import GPT2Config, GPT2LMHeadModel

        from kncompress.data.tokenizer import train_tokenizer

        self.folder, self.number = folder, 0
        text = folder / "text.txt"
        text.write_text("\n\n".join(SENTENCE.format(i * i % 97) for i in range(150)))
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=300, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0,
                            eos_token_id=0, initializer_range=0.3)  # fmt: skip
        GPT2LMHeadModel(config).save_pretrained(folder / "tiny")
        train_tokenizer([text.read_text()], 300, context=32).save_pretrained(folder / "tiny")
        glue = make_glue(folder / "glue", train=8, dev=6, test=3)
        model, data = "model=tiny", ["data.source=text.txt", "data.cache_dir=cache"]
        trained = [model, *data, "trainer.batch_tokens=128", "trainer.micro_batch_tokens=64", "trainer.steps=8"]
        trained += ["trainer.validate_every=4", "trainer.checkpoint_every=2", "trainer.precision=fp32", "logger=csv"]
        planned = [model, *data, "calibration.tokens=256", "harm_tokens=64", "validation_tokens=64", "precision=fp32"]
        suite = ["teacher=tiny", f"data.source={glue}", "tasks=[rte]", "data.max_length=32", "fine_tuning.epochs=1"]
        suite += ["fine_tuning.batch_size=8", "fine_tuning.precision=fp32", "fine_tuning.accelerator=cpu"]
        self.words = {
            "train": ["train", *trained, "trainer.accelerator=cpu", "samples.count=0"],
            "compress": ["compress", model, *data, "factors.mlp.right=[2,1]", "start=calibrated",
                         "calibration.tokens=256"],
            "plan": ["plan", *planned, "budget=0.6", "sums=false"],
            "export": ["export", model, "format=dense"],
            "evaluate": ["evaluate", model, *data, "tokens=512"],
            "glue": ["glue", *suite],
            "sweep": ["train", *trained, "trainer.accelerator=cpu", "samples.count=0", "-m", "seed=1,2"],
        }  # fmt: skip
        self.forks = Forks(folder)
        self.seconds: dict[str, float] = {}
        self.forks.run("inspect", model, "run_dir=first")  # until the server has imported all

    def whole(self, verb: str) -> Path:
        """An undisturbed run, made once."""
        folder = self.folder / f"whole-{verb}"
        if not folder.exists():
            began = time.monotonic()
            code, output = self.forks.run(*self.words[verb], f"run_dir={folder.name}", *self.own(verb, folder))
            assert code == 0, output
            self.seconds[verb] = time.monotonic() - began
        return folder

    def own(self, verb: str, folder: Path) -> list[str]:
        """Words that differ between runs: a suite's teachers are kept in a cache, which would save later ones."""
        resume = ["resume=auto"] if verb == "train" else []
        return [*resume, *([f"data.cache_dir={folder.name}-cache"] if verb == "glue" else [])]

    def fresh(self) -> Path:
        """A folder that is not there yet."""
        self.number += 1
        return self.folder / f"run{self.number}"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    print(f"seed {SEED}")
    found = World(tmp_path_factory.mktemp("faults"))
    yield found
    found.forks.close()


def result(verb: str, folder: Path) -> Any:
    """What the same work must give again, to the bit."""
    if verb == "sweep":
        return [result("train", folder / number) for number in ("0", "1")]
    found = json.loads((folder / "result.json").read_text())
    assert found["status"] == "finished", found
    numbers = {k: v for k, v in found["metrics"].items() if "second" not in k}
    files = {str(f.relative_to(folder)): digest(f) for f in folder.rglob("model.safetensors")}
    if verb == "plan":
        shapes = {row["name"]: row["shape"] for row in json.loads((folder / "plan.json").read_text())["maps"]}
        return shapes, found["metrics"]["parameters/student"]
    return numbers, files


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def snapshot(folder: Path) -> dict[str, str]:
    """{file: hash} of all that a refused command must leave as it is."""
    return {str(f.relative_to(folder)): digest(f) for f in folder.rglob("*") if f.is_file() and f.name != ".lock"}


def faults_of(code: int, output: str, allowed: tuple[int, ...]) -> list[str]:
    """What is wrong about how a command ended."""
    found = [f"exit code {code}, not {allowed}: {output[-1500:]}"] if code not in allowed else []
    if "Traceback (most recent call last)" in output:
        found.append(f"traceback: {output[-2500:]}")
    told = [line for line in output.splitlines() if line.startswith("kncompress: ")]
    if code == 2 and not told:
        found.append(f"exit code 2 without a line: {output[-500:]}")
    return found


KILLED = ["train", "compress", "plan", "export", "evaluate", "glue", "sweep"]
SIGNALS = {"kill": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT, "SIGSTOP": signal.SIGSTOP}


def _finished(folder: Path) -> bool:
    record = folder / "run.json"
    return record.exists() and json.loads(record.read_text())["status"] == "finished"


def stop_and_repeat(world: World, verb: str, name: str, count: int) -> None:
    """The command, stopped at a random moment, and the same once more."""
    moments, tally = random.Random(f"{SEED} {verb} {name}"), Tally(f"{name} of {verb}")
    expected = result(verb, world.whole(verb))
    length = world.seconds[verb]
    for _ in range(count):
        folder = world.fresh()
        line = [*world.words[verb], f"run_dir={folder.name}", *world.own(verb, folder)]
        code, output = world.forks.stopped(SIGNALS[name], moments.uniform(0.02, 1.0) * length, *line)
        wrong = faults_of(code, output, (0, *STOPPED))
        ended = code == 0 or (verb != "sweep" and _finished(folder))  # or killed behind its last word
        code, output = world.forks.run(*line)
        wrong += faults_of(code, output, (2,) if ended and verb != "sweep" else (0,))  # a whole sweep has nothing to do
        if not wrong and result(verb, folder) != expected:
            wrong.append(f"lost: another result: {result(verb, folder)} {expected}")
        left = [
            f for f in folder.rglob("*") if ".tmp" in f.name or ".part-" in f.name or f.name.startswith(".moments-")
        ]
        wrong += [f"lost: left over {left}"] if left else []
        tally.note("had ended; refused" if ended else "the same command finished, same result", *wrong)
        shutil.rmtree(folder, ignore_errors=True)
    tally.done()


def test_a_few_kills(world: World) -> None:
    stop_and_repeat(world, "compress", "kill", 2)


@pytest.mark.slow
@pytest.mark.parametrize("verb", KILLED)
@pytest.mark.parametrize("name", list(SIGNALS))
def test_stopped_at_random_moments(world: World, verb: str, name: str) -> None:
    stop_and_repeat(world, verb, name, 6 if name == "kill" else 2)


def _flip(content: bytes, chance: random.Random) -> bytes:
    made = bytearray(content)
    for _ in range(chance.randint(1, 3)):
        made[chance.randrange(len(made))] ^= 1 << chance.randrange(8)
    return bytes(made)


def _cut(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.randrange(len(content))]


DAMAGE: dict[str, Callable[[bytes, random.Random], bytes]] = {"flipped": _flip, "cut": _cut}
SCORED = ("data.source=text.txt", "data.cache_dir=cache", "tokens=64")
READ: dict[str, tuple[str, str, list[str]]] = {
    "weights": ("compress", "model/model.safetensors", ["evaluate", "model={}/model", *SCORED]),
    "config.json of a model": ("compress", "model/config.json", ["evaluate", "model={}/model", *SCORED]),
    "tokenizer": ("compress", "model/tokenizer.json", ["evaluate", "model={}/model", *SCORED]),
    "checkpoint": ("train", "checkpoints/last.ckpt", ["train", "resume={}"]),
    "run.json": ("train", "run.json", ["train", "resume={}"]),
    "config.yaml of a run": ("train", "config.yaml", ["train", "resume={}"]),
    "compression.json": ("train", "compression.json", ["train", "resume={}"]),
    "start.json": ("train", "start.json", ["train", "resume={}"]),
    "metrics.csv": ("train", "metrics.csv", ["train", "resume={}"]),
    "harms": ("plan", "harm.json", ["plan", "model=tiny", "harm={}", "budget=0.7"]),
    "plan": ("plan", "plan.yaml", ["inspect", "model=tiny", "factors={}/plan.yaml"]),
    "sweep.json": ("sweep", "sweep.json", ["train", "resume={}"]),
    "cell of a suite": ("glue", "cells/rte/seed0/teacher.json", ["glue", "resume={}"]),
}  # fmt: skip
CHECKED = ("weights", "checkpoint")
"""Files with a checksum: every flip must be found."""


def _move(folder: Path, whole: Path) -> None:
    """Have the copy of a run say that its folder is its own."""
    for file in [*folder.rglob("config.yaml"), *folder.glob("sweep.json")]:
        file.write_text(file.read_text().replace(str(whole), str(folder)).replace(whole.name, folder.name))


def damage(world: World, name: str, how: str, count: int) -> None:
    """A run's copy with one damaged file, read by a real command."""
    verb, place, words = READ[name]
    chance, tally = random.Random(f"{SEED} {name} {how}"), Tally(f"{how} {name}")
    whole = world.whole(verb)
    for number in range(count + 1):
        folder = world.fresh()
        shutil.copytree(whole, folder)
        if words[0] in ("train", "glue"):
            for job in [folder, *(f.parent for f in folder.glob("*/run.json"))]:
                if (job / "run.json").exists():
                    run = json.loads((job / "run.json").read_text())
                    (job / "run.json").write_text(json.dumps(run | {"status": "running"}))
            _move(folder, whole)
        line = [word.format(folder.name) for word in words]
        if line[0] not in ("train", "glue"):
            line += [f"run_dir={folder.name}-read"]
        if not number:  # what is whole is taken
            code, output = world.forks.run(*line)
            assert code == 0, output
            continue
        file = folder / place
        file.write_bytes(DAMAGE[how](file.read_bytes(), chance))
        before = snapshot(folder)
        code, output = world.forks.run(*line)
        allowed = (0, 2)
        if code == 1 and ("diverged" in output or "not finite" in output):
            allowed = (1,)  # a flipped number that is one still: a learning rate of 9e9
        wrong = faults_of(code, output, allowed)
        if code == 0 and name in CHECKED and result(verb, folder) != result(verb, whole):
            wrong.append("lost: what is checked was taken for another")  # a flip of the padding is none of the weights
        if code == 2 and snapshot(folder) != before:
            wrong.append(f"lost: a refused command changed {set(snapshot(folder).items()) ^ set(before.items())}")
        tally.note({0: "taken: still valid", 2: "refused by one line"}.get(code, "told"), *wrong)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(f"{folder}-read", ignore_errors=True)
    tally.done()


@pytest.mark.parametrize("name", ["weights", "config.json of a model"])
def test_a_few_flips(world: World, name: str) -> None:
    damage(world, name, "flipped", 2)


@pytest.mark.slow
@pytest.mark.parametrize("how", list(DAMAGE))
@pytest.mark.parametrize("name", list(READ))
def test_damaged_files(world: World, name: str, how: str) -> None:
    damage(world, name, how, 8)


def _one(world: World, kind: str, verb: str, allowed: tuple[int, ...], text: str = "", again: bool = False,
         count: int = 3, words: tuple[str, ...] = (), **options: Any) -> None:  # fmt: skip
    """A fault of the process's surroundings; with ``again`` the command once more without it, to the whole result."""
    tally = Tally(kind)
    for _ in range(count):
        folder = world.fresh()
        line = [*world.words[verb], *words, f"run_dir={folder.name}", *world.own(verb, folder)]
        code, output = world.forks.run(*line, **options)
        wrong = faults_of(code, output, allowed)
        if text not in output:
            wrong.append(f"exit code {code} without {text!r}: {output[-800:]}")
        if again and code:
            code, output = world.forks.run(*line)
            wrong += faults_of(code, output, (0,))
        if (again or code == 0) and not wrong and not words and result(verb, folder) != result(verb, world.whole(verb)):
            wrong.append("lost: another result")
        tally.note("told; the same command finished" if again else "told" if text else "finished", *wrong)
        shutil.rmtree(folder, ignore_errors=True)
    tally.done()


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["train", "compress", "export"])
def test_files_that_may_not_grow(world: World, verb: str) -> None:
    """RLIMIT_FSIZE: a write fails as on a full disk, in the middle of a file."""
    world.whole(verb)
    for most in (2_000, 9_000, 30_000):
        _one(world, f"full disk, {verb}", verb, (0, 1), again=True, count=1, limits={"RLIMIT_FSIZE": most})


@pytest.mark.slow
def test_a_folder_that_cannot_be_written(world: World) -> None:
    tally = Tally("read-only folder")
    for verb in ("train", "compress", "plan", "export", "evaluate", "glue"):
        code, output = world.forks.run(*world.words[verb], "run_dir=/sys/kernel/here")
        tally.note("refused by one line", *faults_of(code, output, (2,)))
    tally.done()


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["train", "compress", "evaluate"])
def test_two_processes_on_one_folder(world: World, verb: str) -> None:
    tally, expected = Tally(f"two processes on one folder, {verb}"), result(verb, world.whole(verb))
    for _ in range(3):
        folder = world.fresh()
        line = [*world.words[verb], f"run_dir={folder.name}", *world.own(verb, folder)]
        both = [world.forks.wait(process) for process in (world.forks.start(*line), world.forks.start(*line))]
        wrong = [w for code, output in both for w in faults_of(code, output, (0, 2))]
        if sorted(code for code, _ in both) not in ([0, 2], [0, 0]):
            wrong.append(f"exit codes of both: {both}")
        if not wrong and result(verb, folder) != expected:
            wrong.append("lost: another result")
        tally.note("one ran, the other was refused", *wrong)
    tally.done()


@pytest.mark.slow
def test_faults_inside_the_process(world: World) -> None:
    for verb in ("train", "compress", "plan", "evaluate"):
        world.whole(verb)
        _one(world, f"closed output, {verb}", verb, (0,), count=2, closed=True)
    _one(world, "clock that steps back", "train", (0,), patch="clock")
    _one(world, "NaN batch", "train", (1,), "diverged", patch="nan", again=True, count=2)
    _one(world, "out of memory", "train", (1,), "out of memory", patch="memory", again=True, count=2)


@pytest.mark.slow
def test_wandb_that_is_away(world: World) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        away = {"WANDB_BASE_URL": address, "WANDB_API_KEY": "0" * 40}
        words = ("logger=wandb", "logger.mode=online")
        _one(world, "W&B away", "train", (0,), "wandb sync", words=words, env=away, count=2)
        required = (*words, "logger.required=true")
        _one(world, "W&B away, required", "train", (2,), "W&B is not reached", words=required, env=away, count=2)


ROOT = str(Path(kncompress.__file__).parents[1])


def _program(world: World, *line: str, **variables: str) -> "subprocess.Popen[str]":
    environment = os.environ | {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | variables
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(
        [sys.executable, *line], cwd=world.folder, env=environment, start_new_session=True, **options
    )


def _children(process: int) -> list[int]:
    own = [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    return own + [below for child in own for below in _children(child)]


LONG = ["trainer.steps=100000", "trainer.validate_every=100000", "trainer=ddp", "trainer.accelerator=cpu"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_dead_rank(world: World, number: int) -> None:
    tally, folder = Tally(f"{signal.Signals(number).name} to one rank of two"), world.fresh()
    line = [*world.words["train"], *LONG, "trainer.devices=2", f"run_dir={folder.name}"]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell has it in its background
    try:
        running = _program(world, "-m", "kncompress", *line)
    finally:
        signal.signal(signal.SIGINT, before)
    wait_for(lambda: (folder / "metrics.csv").exists(), running)
    ranks = [p for p in _children(running.pid) if b"kncompress" in Path(f"/proc/{p}/cmdline").read_bytes()]
    os.kill(ranks[0], number)
    output = running.communicate(timeout=PATIENCE)[0]
    record = json.loads((folder / "run.json").read_text())
    if number == signal.SIGKILL:
        wrong = faults_of(running.returncode, output, (1,))
        if record["status"] != "failed" or f"rank 1 of this machine (process {ranks[0]})" not in record["error"]:
            wrong.append(f"lost: the record says {record['status']}, {record['error']}")
    else:
        wrong = faults_of(running.returncode, output, (143,))
        wrong += [] if record["status"] == "interrupted" else [f"lost: the record says {record['status']}"]
    tally.note("recorded", *wrong)
    tally.done()


def _node(world: World, rank: int, port: int, *words: str) -> "subprocess.Popen[str]":
    line = ["-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(rank), "--nproc-per-node", "1"]
    line += ["--master-addr", "127.0.0.1", "--master-port", str(port), "-m", "kncompress"]
    return _program(world, *line, *words, GLOO_SOCKET_IFNAME="lo")


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


@pytest.mark.slow
def test_two_nodes_train_as_one_and_a_killed_one_is_told(world: World) -> None:
    one = result("train", world.whole("train"))[0]
    nodes = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=1", "trainer.nodes=2"]
    folder, port = world.fresh(), _free_port()
    both = [_node(world, rank, port, *world.words["train"], *nodes, f"run_dir={folder.name}") for rank in (0, 1)]
    outputs = [process.communicate(timeout=PATIENCE)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    metrics = json.loads((folder / "result.json").read_text())["metrics"]
    for name in ("perplexity/student", "kl/student"):
        assert metrics[name] == pytest.approx(one[name], rel=1e-5)

    tally, folder, port = Tally("killed node of two"), world.fresh(), _free_port()
    line = [*world.words["train"], *LONG, *nodes, f"run_dir={folder.name}"]
    both = [_node(world, rank, port, *line) for rank in (0, 1)]
    wait_for(lambda: (folder / "metrics.csv").exists(), both[0])
    os.killpg(both[1].pid, signal.SIGKILL)
    for process in _children(both[1].pid) if both[1].poll() is None else []:
        os.kill(process, signal.SIGKILL)
    output = both[0].communicate(timeout=PATIENCE)[0]
    both[1].communicate(timeout=PATIENCE)
    record = json.loads((folder / "run.json").read_text())
    wrong = [] if both[0].returncode else ["exit code 0 of a node whose other is gone"]
    wrong += [] if record["status"] in ("failed", "interrupted") else [f"lost: the record says {record['status']}"]
    print(output[-1500:])
    tally.note("recorded", *wrong)
    tally.done()
