"""``doctor`` on this machine, beside real servers that answer, fail and hang, and with things that are broken."""

import importlib.util
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from verbs.conftest import read
from waiting import PATIENCE

import kncompress
from kncompress.diagnosis import installation
from kncompress.diagnosis.installation import check_extra, check_packages, check_python
from kncompress.diagnosis.network import answer, check_hub, check_wandb
from kncompress.diagnosis.storage import check_folder, check_storage, hub_cache, hub_home

NETWORK = (
    "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "HF_TOKEN",
    "WANDB_MODE",
    "WANDB_API_KEY",
    "http_proxy",
    "HTTP_PROXY",
)


class _Answers(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_response(int(self.path.strip("/") or 200))
        self.end_headers()

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def server() -> Iterator[str]:
    """A server on this machine that answers with the code that its path names."""
    with HTTPServer(("127.0.0.1", 0), _Answers) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings of whoever runs the tests, and nothing asked outside this machine."""
    for name in NETWORK:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("KNCOMPRESS_CACHE", str(tmp_path / "cache"))


def by_name(folder: str) -> dict[str, dict[str, str]]:
    return {f"{item['area']}/{item['name']}": item for item in read(Path(folder), "doctor.json")}


def test_this_installation_works_without_a_network(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, out, err = command("doctor", "network=false", "run_dir=run")
    assert code == 0 and err == "", err
    found, result = by_name("run"), read(Path("run"), "result.json")
    assert result["status"] == "finished" and result["metrics"]["broken"] == 0
    assert sum(result["metrics"].values()) == len(found)
    for name in ("Python", "packages", "Kronecker layers", "transformers", "bundled teacher"):
        assert found[f"installation/{name}"]["level"] == "ok"
    assert "torch " in found["installation/packages"]["text"]
    assert found["Hugging Face hub/server"]["text"] == "not asked: HF_HUB_OFFLINE keeps off the network"
    assert "network=false" in found["Weights & Biases/server"]["text"]
    assert {"devices/CPU", "devices/bf16", "devices/torch.compile", "disk/runs", "disk/cache"} <= set(found)
    assert all(item["todo"] for item in found.values() if item["level"] == "broken")
    assert out.rstrip().endswith("0 broken") and (Path("run") / "doctor.txt").read_text().rstrip() in out


def test_what_is_broken_is_told_with_exit_code_1(command: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KNCOMPRESS_CACHE", str(tmp_path / "file" / "cache"))
    code, out, err = command("doctor", "network=false", "run_dir=run")
    assert code == 1 and err == "kncompress: doctor: broken: cache; what to do is said above\n"
    assert "do: give another: KNCOMPRESS_CACHE=<folder>" in out
    result = read(Path("run"), "result.json")
    assert result["status"] == "failed" and result["metrics"]["broken"] == 1
    assert by_name("run")["disk/cache"]["level"] == "broken"


def test_packages_are_held_against_their_ranges() -> None:
    good, old, missing = check_packages(map(Requirement, ["torch>=2", "numpy>=99", "no-such-package>=1,<2"]))
    assert good.level == "ok" and good.text.startswith("torch ")
    assert old.level == "broken" and "outside the range" in old.text and old.todo == "pip install 'numpy>=99'"
    assert missing.text == "missing (<2,>=1)" and missing.todo == "pip install 'no-such-package<2,>=1'"
    extra = check_extra("gguf", [Requirement("no-such-package>=1")])
    assert extra.level == "note" and "pip install 'kncompress[gguf]'" in extra.todo
    assert check_extra("gguf", [Requirement("torch")]).level == "ok"
    assert check_python(">=3.11", "3.11.0").level == "ok"
    assert check_python(">=3.11", "3.10.4").level == "broken"


def test_the_metadata_of_a_wheel_tells_the_same_as_the_checkout(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    python, groups = installation.declared()
    info = tmp_path / "kncompress-0.1.0.dist-info"
    info.mkdir()
    lines = ["Metadata-Version: 2.4", "Name: kncompress", "Version: 0.1.0", f"Requires-Python: {python}"]
    for name, wanted in groups.items():
        lines += [f"Provides-Extra: {name}"] if name else []
        lines += [f"Requires-Dist: {item}" + (f"; extra == '{name}'" if name else "") for item in wanted]
    (info / "METADATA").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(installation, "__file__", str(tmp_path / "kncompress" / "diagnosis" / "installation.py"))
    found_python, found = installation.declared()
    assert found_python == python
    strings = {name: {f"{item.name}{item.specifier}" for item in wanted} for name, wanted in groups.items()}
    assert {name: {f"{i.name}{i.specifier}" for i in wanted} for name, wanted in found.items()} == strings


def test_servers_that_answer_fail_refuse_and_hang(server: str) -> None:
    assert answer(server, PATIENCE) == "" and answer(f"{server}/401", PATIENCE) == ""
    assert answer(f"{server}/503", PATIENCE) == "HTTP 503"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        refused = f"http://127.0.0.1:{free.getsockname()[1]}"
        assert "refused" in answer(refused, PATIENCE)
        free.listen()
        assert answer(refused, 0.3) in ("no answer in 0.3 seconds", "timed out")


def test_hub_and_wandb_tell_server_and_key_but_never_the_key(
    server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server)
    monkeypatch.setenv("WANDB_BASE_URL", f"{server}/503")
    hub, token = check_hub(True, PATIENCE)
    assert (hub.level, hub.text) == ("ok", f"{server} answers") and token.level == "note"
    wandb, key, _ = check_wandb(True, PATIENCE)
    assert wandb.level == "note" and "HTTP 503" in wandb.text and "logger.mode=offline" in wandb.todo
    assert key.level == "note" and "wandb login" in key.todo
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login user password s3cret\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("HF_TOKEN", "s3cret")
    monkeypatch.setenv("WANDB_MODE", "offline")
    findings = [*check_hub(True, PATIENCE), *check_wandb(True, PATIENCE)]
    assert [f.level for f in findings] == ["ok", "ok", "note", "ok", "ok"]
    assert "WANDB_MODE=offline keeps off" in findings[2].text
    assert not any("s3cret" in f"{f.text}{f.todo}" for f in findings)


def test_a_disk_with_little_room_is_noted(tmp_path: Path) -> None:
    assert check_folder("cache", tmp_path / "not" / "yet", "X=<folder>", 0).level == "ok"
    assert not (tmp_path / "not").exists() and list(tmp_path.iterdir()) == []
    full = check_folder("cache", tmp_path, "X=<folder>", 1e9)
    assert full.level == "note" and full.todo == "make room, or give another: X=<folder>"


@pytest.mark.parametrize(
    "variables",
    [
        {"HF_HOME": "here"},
        {"XDG_CACHE_HOME": "cache"},
        {"HF_HUB_CACHE": "models", "HF_HOME": "here"},
        {"HUGGINGFACE_HUB_CACHE": "$HOME/models"},
        {},
    ],
)
def test_the_hubs_folders_are_those_that_its_own_package_uses(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("HF_HOME", "XDG_CACHE_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    spec = importlib.util.find_spec("huggingface_hub.constants")
    assert spec is not None and spec.loader is not None
    constants = importlib.util.module_from_spec(spec)  # a fresh one, which reads the variables of now
    spec.loader.exec_module(constants)
    assert str(hub_cache()) == constants.HF_HUB_CACHE and str(hub_home()) == constants.HF_HOME
    (found,) = [finding for finding in check_storage(tmp_path, 1e9) if finding.name == "hub cache"]
    variable = next((name for name in variables if "HUB_CACHE" in name), "HF_HOME")
    assert found.text.startswith(f"{hub_cache()}, ") and found.todo.endswith(f"give another: {variable}=<folder>")


def test_a_home_folder_of_nobody_is_a_finding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HOME", "~nosuchuser/hub")
    monkeypatch.setenv("KNCOMPRESS_CACHE", "~nosuchuser/cache")
    levels = {finding.name: finding.level for finding in check_storage(tmp_path, 0)}
    assert levels["cache"] == levels["hub cache"] == "broken" and levels["runs"] == "ok"
    assert check_hub(False, 1)[1].name == "token"


def test_a_folder_that_cannot_be_looked_at_is_a_finding(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 300)  # too long a name: as where a folder may not be entered, the question itself fails
    found = check_folder("cache", folder, "X=<folder>", 0)
    assert found.level == "broken" and "cannot be written" in found.text and found.todo == "give another: X=<folder>"
    assert check_folder("hub cache", folder, "X=<folder>", 0).level == "note"


def test_a_missing_package_of_the_command_line_is_one_line(tmp_path: Path) -> None:
    code = "import sys; sys.modules['hydra'] = None; from kncompress.__main__ import main; sys.exit(main(['doctor']))"
    environment = os.environ | {"PYTHONPATH": str(Path(kncompress.__file__).parents[1])}
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("kncompress: hydra") and "this package is missing" in done.stderr


@pytest.mark.parametrize("word", ["timeout=0", "free=-1", "compile=perhaps"])
def test_bad_input_is_one_line(command: Any, word: str) -> None:
    code, _, err = command("doctor", word)
    assert code == 2 and word in err and err.count("\n") == 1 and list(Path().iterdir()) == []
