"""Real verbs on a tiny model and a small text, in this process or in one of its own."""

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from waiting import PATIENCE

import kncompress
from kncompress.__main__ import main

SENTENCES = [
    "The river runs past the old mill and down to the sea.",
    "A letter came in the morning, and nobody wished to open it.",
    "Seven engineers counted the bridges, twice, and found eight.",
    "Snow lay on the hills until the wind turned in the spring.",
]


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of some 24,000 characters."""
    file = tmp_path_factory.mktemp("text") / "story.txt"
    paragraphs = [" ".join(SENTENCES[(i + j * j) % 4] for j in range(4)) for i in range(100)]
    file.write_text("\n\n".join(paragraphs))
    return file


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """Folder of a GPT-2 of 2 layers, 16 wide, context 32, with a tokenizer of 300."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from kncompress.data.tokenizer import train_tokenizer

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    # Weights far larger than fresh ones usually are, so that factoring them does visible harm.
    config = GPT2Config(
        vocab_size=300,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=32,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.3,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    train_tokenizer([text.read_text()], 300, context=32).save_pretrained(folder)
    return folder


@pytest.fixture
def small(tiny: Path, text: Path, tmp_path: Path) -> list[str]:
    """Overrides that make ``train`` a matter of seconds."""
    return [
        f"model={tiny}",
        f"data.source={text}",
        f"data.cache_dir={tmp_path / 'cache'}",
        "trainer.batch_tokens=128",
        "trainer.micro_batch_tokens=64",
        "trainer.steps=4",
        "trainer.validate_every=2",
        "trainer.precision=fp32",
        "logger=csv",
    ]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """``command(*words) -> (exit code, stdout, stderr)``, in an empty folder."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    def run(*words: str) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main(words)
        out, err = capfd.readouterr()
        return code, out, err

    return run


@pytest.fixture
def process(tmp_path: Path) -> Callable[..., Any]:
    """``process(*words)``: the same by ``python -m kncompress``; ``start=True`` gives the running process."""
    parent = str(Path(kncompress.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": parent, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def run(*words: str, start: bool = False, **variables: str) -> Any:
        line = [sys.executable, "-m", "kncompress", *words]
        options: dict[str, Any] = {"cwd": tmp_path, "env": environment | variables, "text": True}
        if start:
            # A shell that starts this in the background has SIGINT ignored, which children inherit.
            options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
            return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
        return subprocess.run(line, capture_output=True, timeout=PATIENCE, check=False, **options)

    return run


@pytest.fixture
def watched(tmp_path: Path) -> Any:
    """``watched(*words, log=..., start=False, **variables)``: ``train`` in a process of its own."""
    parent = str(Path(kncompress.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": parent, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def run(*words: str, log: Path, start: bool = False, **variables: str) -> Any:
        line = [sys.executable, str(Path(__file__).with_name("watched.py")), "train", *words]
        options: dict[str, Any] = {"cwd": tmp_path, "env": environment | {"WATCH": str(log)} | variables, "text": True}
        if start:
            with (tmp_path / "output.txt").open("a") as output:
                return subprocess.Popen(line, stdout=output, stderr=output, **options)
        return subprocess.run(line, capture_output=True, timeout=PATIENCE, check=False, **options)

    return run


def rows_by_step(*logs: Path) -> dict[int, list[str]]:
    """``{optimiser step: digests of the rows that the weights have seen in it, sorted}``, from logs of ``watched``.

    ``logs``: of the parts of one training, in their order; the steps that a part has repeated count once.
    """
    found: dict[int, list[str]] = {}
    for log in logs:
        part: dict[int, list[str]] = {}
        text = log.read_text()
        for line in text[: text.rfind("\n") + 1].splitlines():  # a kill may have cut the last one
            step, _, rows = line.split()
            part.setdefault(int(step), []).extend(rows.split(","))
        first = min(part, default=0)
        found = {step: rows for step, rows in found.items() if step < first} | part
    return {step: sorted(rows) for step, rows in found.items()}


def read(folder: Path, name: str) -> Any:
    """A JSON file of a run folder."""
    return json.loads((folder / name).read_text())


@contextmanager
def interrupted_when(ready: Callable[[], bool]) -> Iterator[None]:
    """Sends this process SIGINT, as Ctrl-C does, once ``ready()`` is true; needs the fixture ``interruptible``."""
    over = threading.Event()

    def watch() -> None:
        while not ready():
            if over.wait(0.02):  # it has ended by itself
                return
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    with warnings.catch_warnings():
        # The interrupt may fall between a file's opening and its `with`: such a file is closed when it is collected.
        warnings.simplefilter("ignore", ResourceWarning)
        try:
            yield
        finally:
            over.set()
            thread.join()
            gc.collect()


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A shell that starts the tests in the background has SIGINT ignored, which they inherit."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
