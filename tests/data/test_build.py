"""Building a token cache: bounded memory, one builder, and a killed build that goes on where it stopped."""

import gc
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from filelock import FileLock
from waiting import PATIENCE, wait_for

import kncompress
from kncompress.config import DataConfig
from kncompress.data import build, sources, tokens
from kncompress.data.build import batches, encode
from kncompress.data.sources import Reading
from kncompress.data.tokenizer import train_tokenizer
from kncompress.data.tokens import token_stream
from kncompress.errors import UserError

DOCUMENTS = 400
# One build, slowed down so that a signal meets it half-way, which records its state after every batch. It encodes so
# many documents and then waits for the signal: however late that comes, the build is not finished.
PROGRAM = """
import sys, time
from kncompress.config import DataConfig
from kncompress.data import build
from kncompress.data.tokenizer import load_tokenizer
from kncompress.data.tokens import token_stream
build.SAVE_SECONDS, build.DOCUMENTS_AT_ONCE = 0, 3
real = build.encode
left = int(sys.argv[4])
def slow(documents, *rest):
    global left
    left -= len(documents)
    time.sleep(0.01 if left > 0 else 86400)
    return real(documents, *rest)
build.encode = slow
token_stream(DataConfig(source=sys.argv[1], cache_dir=sys.argv[2]), "all", load_tokenizer(sys.argv[3]))
"""


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(["The cat sat on the mat, and the dog ran after it. " * 50], 280, context=32)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "many.txt"
    draw = random.Random(0)
    texts = [
        " ".join(draw.choices(["the", "cat", "sat", "on", "a", "mat", "and", "dogs", "ran"], k=draw.randint(1, 60)))
        for _ in range(DOCUMENTS)
    ]
    file.write_text("\n<|doc|>\n".join(f"{number} {text}" for number, text in enumerate(texts)))
    return str(file)


def contents(cache: Path) -> dict[str, bytes]:
    (facts,) = cache.rglob("facts.json")
    return {file.name: file.read_bytes() for file in facts.parent.iterdir()}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_build_goes_on_and_ends_byte_equal(
    source: str, tokenizer: Any, tmp_path: Path, number: signal.Signals
) -> None:
    token_stream(DataConfig(source=source, cache_dir=str(tmp_path / "straight")), "all", tokenizer)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    cache = tmp_path / "killed"
    done_before = 0
    draw = random.Random(number)
    for _ in range(2):
        process = start(source, cache, tmp_path / "tokenizer", DOCUMENTS - done_before)
        target = done_before + draw.randint(1, DOCUMENTS // 3)
        wait_for(lambda target=target: recorded(cache) >= target, process)
        process.send_signal(number)
        process.wait(PATIENCE)
        assert process.returncode != 0 and done_before < recorded(cache) < DOCUMENTS
        done_before = recorded(cache)
        assert not list(cache.rglob("facts.json"))
    # What a kill leaves behind the recorded length is cut off.
    (partial,) = cache.rglob("tokens.bin")
    with partial.open("ab") as stream:
        stream.write(b"\xff" * 7)
    config = DataConfig(source=source, cache_dir=str(cache))
    encoded = []
    real = build.encode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "encode", lambda d, *rest: (encoded.extend(d), real(d, *rest))[1])
        stream = token_stream(config, "all", tokenizer)
    assert len(encoded) == DOCUMENTS - done_before
    assert stream.documents == DOCUMENTS
    assert contents(cache) == contents(tmp_path / "straight")
    assert not list(cache.rglob("*.partial"))


def start(source: str, cache: Path, tokenizer: Path, most: int) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": str(Path(kncompress.__file__).parents[1]), "HF_HUB_OFFLINE": "1"}
    line = [sys.executable, "-c", PROGRAM, source, str(cache), str(tokenizer), str(most)]
    return subprocess.Popen(
        line, env=environment, stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


def recorded(cache: Path) -> int:
    states = list(cache.rglob("progress.json"))
    return int(json.loads(states[0].read_text())["documents"]) if states else 0


@pytest.mark.parametrize("damage", ["short", "garbage"])
def test_a_partial_build_that_cannot_be_trusted_is_begun_anew(
    source: str, tokenizer: Any, tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DataConfig(source=source, cache_dir=str(tmp_path / "cache"))
    monkeypatch.setattr(build, "DOCUMENTS_AT_ONCE", 50)
    real = build.encode
    calls = iter(range(100))
    monkeypatch.setattr(build, "encode", lambda *a: real(*a) if next(calls) < 3 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        token_stream(config, "all", tokenizer)
    assert recorded(tmp_path) == 150
    monkeypatch.undo()
    (partial,) = tmp_path.rglob("*.partial")
    if damage == "short":
        (partial / "tokens.bin").write_bytes(b"12")
    else:
        (partial / "progress.json").write_text("[1, 2]")
    stream = token_stream(config, "all", tokenizer)
    whole = np.concatenate(encode(list(sources.read_split(config, "all")), tokenizer))
    assert np.array_equal(stream.tokens, whole)


class Live(str):
    """A document that counts how many of its kind are alive."""

    alive: ClassVar[int] = 0
    most: ClassVar[int] = 0

    def __init__(self, *_: Any) -> None:
        type(self).alive += 1
        type(self).most = max(self.most, self.alive)

    def __del__(self) -> None:
        type(self).alive -= 1


def test_few_documents_are_alive_at_a_time(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 5000

    def endless(*_: Any) -> Iterator[str]:
        return (Live(f"document {number} of a corpus") for number in range(count))

    monkeypatch.setattr(sources, "read_split", endless)
    monkeypatch.setattr(build, "DOCUMENTS_AT_ONCE", 64)
    Live.most = 0
    (tmp_path / "text.txt").write_text("for the fingerprint")
    config = DataConfig(source=str(tmp_path / "text.txt"), cache_dir=str(tmp_path / "cache"))
    assert token_stream(config, "all", tokenizer).documents == count
    gc.collect()
    assert Live.alive == 0
    assert Live.most <= 2 * 64 + 1


def test_batches_end_by_number_and_by_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "DOCUMENTS_AT_ONCE", 3)
    monkeypatch.setattr(build, "CHARACTERS_AT_ONCE", 10)
    assert list(batches(["a"] * 4 + ["b" * 10, "c"])) == [["a"] * 3, ["a", "b" * 10], ["c"]]


def test_text_that_is_wrong_leaves_nothing(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"good\n<|doc|>\n" * 10 + b"caf\xe9")
    config = DataConfig(source=str(tmp_path / "bad.txt"), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match="not UTF-8 text"):
        token_stream(config, "all", tokenizer)
    assert [path.suffix for path in (tmp_path / "cache" / "tokens").iterdir()] == [".lock"]


def test_who_waits_for_another_builder_says_so(
    source: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = DataConfig(source=source, cache_dir=str(tmp_path))
    length = len(token_stream(config, "all", tokenizer))
    (folder,) = (facts.parent for facts in tmp_path.rglob("facts.json"))
    aside = folder.with_name("aside")
    folder.rename(aside)
    monkeypatch.setattr(tokens, "WAIT_SECONDS", 0.1)
    other = FileLock(folder.with_suffix(".lock"), thread_local=False)
    other.acquire()
    real = sys.stderr.write

    def finish(text: str) -> int:  # the other process ends as soon as this one has said that it waits
        if "waiting for another process" in text:
            aside.rename(folder)
            other.release()
        return real(text)

    monkeypatch.setattr(sys.stderr, "write", finish)
    assert len(token_stream(config, "all", tokenizer)) == length
    assert "waiting for another process that tokenises the all text" in capsys.readouterr().err


def test_short_texts_show_nothing_and_long_ones_lines(
    source: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    token_stream(DataConfig(source=source, cache_dir=str(tmp_path / "a")), "all", tokenizer)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("kncompress.terminal.LINE_SECONDS", 0)
    monkeypatch.setattr(build, "DOCUMENTS_AT_ONCE", 100)
    token_stream(DataConfig(source=source, cache_dir=str(tmp_path / "b")), "all", tokenizer)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert all(line.startswith("tokenising the all text  ") and " left" in line for line in lines)
    assert " 100 documents" in lines[0] and " 400 documents" in lines[-1]


def test_reading_counts_what_a_split_leaves_out_of_a_large_file(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "IN_MEMORY", 1000)
    reading = Reading()
    text = sum(map(len, sources.read_split(DataConfig(source=source), "train", reading)))
    assert reading.done == text
    assert 0.8 < reading.done / reading.total < 1.2
