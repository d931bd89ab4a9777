"""The hub: caches are used without a network, what cannot be had is told at once, only what is needed is fetched."""

import contextlib
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import kncompress
from kncompress.errors import UserError
from kncompress.hub import check_model, local_folder

CLOSED = "http://127.0.0.1:9"
SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and a network that fails the test."""
    from huggingface_hub import constants

    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", forbidden)
    monkeypatch.setattr(socket, "getaddrinfo", forbidden)
    return tmp_path / "hub"


def snapshot(cache: Path, name: str, **files: str) -> Path:
    """A repository in the layout of the hub's cache; keyword ``a__b`` is the file ``a.b``."""
    repository = cache / f"models--{name.replace('/', '--')}"
    folder = repository / "snapshots" / SHA
    folder.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(SHA)
    for file, text in files.items():
        (folder / file.replace("__", ".")).write_text(text)
    return folder


def test_complete_snapshots_are_used_without_asking_the_network(cache: Path) -> None:
    folder = snapshot(cache, "org/name", config__json="{}", model__safetensors="", tokenizer__json="{}")
    for need in ("config", "tokenizer", "weights", "config.json"):
        assert local_folder("org/name", need) == folder
    check_model("org/name")
    index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
    files = {"config__json": "{}", "model__safetensors__index__json": index, "model-1__safetensors": ""}
    shards = snapshot(cache, "org/shards", **files)
    (shards / "model-2.safetensors").touch()
    assert local_folder("org/shards") == shards


@pytest.mark.parametrize("need", ["weights", "tokenizer", "model.gguf"])
def test_incomplete_snapshots_are_not_taken_for_whole(cache: Path, need: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
    files = {"config__json": "{}", "model__safetensors__index__json": index, "model-1__safetensors": ""}
    folder = snapshot(cache, "org/part", **files)
    assert local_folder("org/part", "config") == folder
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"org/part: no such folder, not in .*hub, and HF_HUB_OFFLINE keeps off"):
        local_folder("org/part", need)


def test_folders_are_themselves_and_other_paths_are_no_ids(cache: Path, tmp_path: Path) -> None:
    assert local_folder(tmp_path) == tmp_path
    (tmp_path / "file.txt").touch()
    with pytest.raises(UserError, match=r"model\.path=.*file\.txt: a file"):
        local_folder(tmp_path / "file.txt")
    for path in ("/no/such/folder", "./nowhere", "a/b/c"):
        with pytest.raises(UserError, match=f"model.path={path}: no such folder$"):
            local_folder(path)
    with pytest.raises(UserError, match=r"model.path=org/a--b: no such folder, not in "):  # no name for the hub
        local_folder("org/a--b")


def run(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(kncompress.__file__).parents[1])}
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        environment.pop(name, None)
    environment |= variables
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize("words", [["model=nosuchmodel"], ["model=gpt2"], ["data=wikitext2"]])
def test_an_unreachable_hub_is_told_at_once_in_one_line(words: list[str], tmp_path: Path) -> None:
    # What a text needs is checked by the verb, whose imports take seconds of their own.
    module = "kncompress.commands.evaluate" if words[0].startswith("data") else "sys"
    code = (
        f"import sys, time, {module}; from kncompress.__main__ import main\n"
        "slept, time.sleep = [], lambda seconds: slept.append(seconds)\n"
        f"code = main(['evaluate', *{words}]); print(sum(slept)); sys.exit(code)"
    )
    done = run(code, HF_ENDPOINT=CLOSED, HF_HOME=str(tmp_path), HF_DATASETS_CACHE=str(tmp_path / "datasets"))
    assert float(done.stdout) < 1  # the hub's own retries wait for more than 20 seconds
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    id_ = {"model=gpt2": "openai-community/gpt2", "data=wikitext2": "hub:Salesforce/wikitext"}.get(words[0], "nosuch")
    for part in (id_, CLOSED, str(tmp_path), "HF_HOME", "folder"):
        assert part in done.stderr


def test_a_silent_endpoint_costs_seconds_only(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes connections and never answers
        code = (
            "from kncompress import hub; hub.PROBE_SECONDS = 0.5\n"
            "try: hub.local_folder('org/name')\n"
            "except hub.UserError as error: print(error)"
        )
        done = run(code, HF_ENDPOINT=f"http://127.0.0.1:{server.getsockname()[1]}", HF_HOME=str(tmp_path))
        server.setblocking(False)
        asked = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                server.accept()[0].close()
                asked += 1
    assert "cannot be reached" in done.stdout, done
    assert asked <= 1  # by the probe; the hub's own requests wait for ten seconds each


REPOSITORIES = {
    "org/name": [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "merges.txt",
        "pytorch_model.bin", "onnx/model.safetensors", "tf_model.h5", "README.md",
    ],
    "org/pickled": ["config.json", "pytorch_model.bin"],
    "org/empty": ["README.md"],
}  # fmt: skip


class SmallHub(BaseHTTPRequestHandler):
    """As much of the hub's interface as a download uses."""

    asked: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0].strip("/")
        type(self).asked.append(path)
        parts = path.split("/")
        if parts[:2] == ["api", "models"]:
            files = REPOSITORIES.get("/".join(parts[2:4]))
            if files is None:
                self.answer(404, {}, {"X-Error-Code": "RepoNotFound"})
            elif "tree" in parts:
                self.answer(200, [{"type": "file", "path": f, "size": len(f), "oid": oid(f)} for f in files])
            else:
                self.answer(
                    200, {"id": "/".join(parts[2:4]), "sha": SHA, "siblings": [{"rfilename": f} for f in files]}
                )
        elif len(parts) > 4 and parts[2] == "resolve":
            name = "/".join(parts[4:])
            self.answer(200, name.encode(), {"ETag": f'"{oid(name)}"', "X-Repo-Commit": SHA})
        else:
            self.answer(200, b"")

    def answer(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


def oid(name: str) -> str:
    return hashlib.sha1(name.encode()).hexdigest()


@pytest.fixture
def small_hub() -> Iterator[str]:
    SmallHub.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), SmallHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_only_what_is_needed_is_fetched_and_then_found_in_the_cache(small_hub: str, tmp_path: Path) -> None:
    code = (
        "import sys; from kncompress.hub import local_folder\n"
        "for need in sys.argv[1:] or ['config', 'tokenizer', 'weights']:\n"
        "    print(sorted(f.name for f in local_folder('org/name', need).rglob('*')))"
    )
    done = run(code, HF_ENDPOINT=small_hub, HF_HOME=str(tmp_path), NO_PROXY="127.0.0.1")
    assert done.returncode == 0, done.stderr
    config, tokenizer, weights = map(eval, done.stdout.splitlines())
    assert config == ["config.json"]
    assert tokenizer == ["config.json", "merges.txt", "tokenizer.json"]
    assert weights == ["config.json", "generation_config.json", "merges.txt", "model.safetensors", "tokenizer.json"]
    SmallHub.asked = []
    again = run(code, HF_ENDPOINT=small_hub, HF_HOME=str(tmp_path))
    assert again.stdout.splitlines()[-1] == done.stdout.splitlines()[-1], again.stderr
    assert not SmallHub.asked


def test_what_the_hub_lacks_is_one_line(small_hub: str, tmp_path: Path) -> None:
    code = (
        "from kncompress import hub\n"
        "for name in ('org/nowhere', 'org/pickled', 'org/empty'):\n"
        "    try: hub.local_folder(name)\n"
        "    except hub.UserError as error: print(error)"
    )
    done = run(code, HF_ENDPOINT=small_hub, HF_HOME=str(tmp_path), NO_PROXY="127.0.0.1")
    nowhere, pickled, empty = done.stdout.splitlines()
    assert nowhere.startswith("model.path=org/nowhere: no such model on the hub")
    assert pickled.startswith("model.path=org/pickled: the repository has no safetensors, only weights that must be")
    assert empty == "model.path=org/empty: the repository on the hub has no model.safetensors"
    assert not [path for path in SmallHub.asked if path.endswith(".bin")]


@pytest.mark.hub
def test_gpt2_of_the_real_hub() -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(local_folder("openai-community/gpt2", "config"), local_files_only=True)
    assert (config.model_type, config.n_layer) == ("gpt2", 12)
