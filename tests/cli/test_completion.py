"""Shell completion: bash's function called as bash calls it, and TAB pressed in a terminal of bash and of zsh."""

import os
import pty
import select
import shutil
import subprocess
import sys
import time

import pytest
from waiting import PATIENCE

from kncompress.__main__ import VERBS
from kncompress.cli.completion import candidates
from kncompress.cli.presets import groups, options
from kncompress.cli.schema import keys

BASH = shutil.which("bash")
pytestmark = pytest.mark.skipif(BASH is None, reason="no bash on this machine")
HEAVY = ("torch", "transformers", "hydra", "omegaconf", "numpy")


@pytest.fixture
def shell(tmp_path, environment):
    """Environment in which ``kncompress`` and ``python`` are those of this test."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, words in (("kncompress", "-m kncompress"), ("python", "")):
        (folder / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n')
        (folder / name).chmod(0o755)
    return environment | {"PATH": f"{folder}:{os.environ['PATH']}"}


SCRIPT = """
source <(kncompress completion bash) || exit 9
COMP_LINE=$1
COMP_POINT=${#COMP_LINE}
_kncompress
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture
def complete(shell, tmp_path):
    """``complete(line)``: what bash's completion function offers at the end of the line."""

    def run(line: str, before: str = "") -> list[str]:
        words = [BASH, "--norc", "--noprofile", "-c", before + SCRIPT, "bash", line]
        done = subprocess.run(words, cwd=tmp_path, env=shell, capture_output=True, text=True, check=False)
        assert done.returncode == 0 and done.stderr == "", done.stderr
        return [word for word in done.stdout.split("\n") if word]

    return run


def test_verbs_groups_keys_and_values(complete):
    assert complete("kncompress tra") == ["train"]
    assert set(complete("kncompress ")) == {*VERBS, "completion", "--help", "--version"}
    assert complete("kncompress train trainer.st") == ["trainer.steps=", "trainer.strategy="]
    # bash breaks words at =, so it gets what follows it.
    assert complete("kncompress train factors=kngpt2_") == ["kngpt2_odd_ffn"]
    assert complete("kncompress train -m factors=dense,kronypt_8") == ["dense,kronypt_80m", "dense,kronypt_81m"]
    assert complete("kncompress export format=") == ["dense", "int8", "merged", "onnx"]
    assert complete("kncompress train --mu") == ["--multirun"]
    assert complete("kncompress no-such-verb ") == []


def test_python_m_and_other_breaks(complete):
    assert complete("python -m kncompress compress start=ca") == ["calibrated"]
    assert complete("python -m json.tool ") == []
    assert complete("python -m kncompress") == []
    assert complete("kncompress export format=in", "COMP_WORDBREAKS=${COMP_WORDBREAKS//=}\n") == ["format=int8"]


STARTS = {
    "bash": ["bash", "--norc", "--noprofile", "-i"],
    "zsh": ["zsh", "-d", "-i"],
}


@pytest.mark.parametrize("name", STARTS)
def test_tab_in_a_terminal(name, shell, tmp_path):
    """The line is completed; names of files complete a model."""
    program = shutil.which(name)
    if program is None:
        pytest.skip(f"no {name} on this machine")
    (tmp_path / "my_model").mkdir()
    (tmp_path / ".zshrc").write_text("autoload -U compinit\ncompinit -u -D\n")
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(tmp_path)
        os.execve(program, STARTS[name], shell | {"TERM": "dumb", "PS1": "> ", "ZDOTDIR": str(tmp_path)})

    def until(text: str) -> None:
        seen, end = "", time.monotonic() + PATIENCE
        while text not in seen and time.monotonic() < end:
            if select.select([terminal], [], [], 0.2)[0]:
                seen += os.read(terminal, 65536).decode(errors="replace").replace("\a", "")
        assert text in seen, seen

    try:
        until("> ")
        os.write(terminal, f"source <(kncompress completion {name}); echo rea''dy\n".encode())
        until("\nready")
        os.write(terminal, b"kncompress insp\t")
        until("inspect ")
        os.write(terminal, b"factors=kngpt2_\t")
        until("kngpt2_odd_ffn ")
        os.write(terminal, b"model=my_\t")
        until("my_model")
        os.write(terminal, b"\x15python -m kncompress export format=me\t")
        until("merged ")
        os.write(terminal, b"\x15echo do''ne; exit\n")  # the line is dropped
        until("done")
    finally:
        os.close(terminal)
        os.waitpid(child, 0)


def test_candidates_are_keys_and_presets_that_exist():
    for name, verb in VERBS.items():
        paths = {key.path for key in keys(verb.config)}
        offered = candidates([name], "", VERBS).words
        for word in offered:
            root = verb.canonical(f"{word.rstrip('=.')}=null").partition("=")[0]
            known = (
                root in groups()
                or root == "hydra/launcher"
                or any(p == root or p.startswith(f"{root}.") for p in paths)
            )
            assert known, word
            if word.endswith("."):
                assert candidates([name], word, VERBS).words, word
    assert [word.partition("=")[2] for word in candidates(["train"], "data=", VERBS).words] == options("data")
    assert candidates(["glue"], "teacher=mi", VERBS).words == ["teacher=mini", "teacher=mini_scratch"]
    assert candidates(["generate"], "prompt=", VERBS).words == ["prompt=null"]
    assert candidates(["glue"], "teacher.pa", VERBS).words == ["teacher.path="]
    assert candidates(["train"], "++trainer.dropout=", VERBS).words == [
        "++trainer.dropout=false",
        "++trainer.dropout=true",
    ]
    assert candidates(["train"], "trainer.precision=", VERBS).words == [
        f"trainer.precision={name}" for name in ("auto", "bf16", "fp32")
    ]
    assert candidates(["export"], "dtype=", VERBS).words == [
        f"dtype={name}" for name in ("bfloat16", "float16", "float32", "stored")
    ]
    assert candidates(["train"], "model=", VERBS).files and not candidates(["train"], "trainer=", VERBS).files


def test_a_tab_imports_nothing_heavy(environment):
    words = ["completion", "query", "train", "trainer."]
    code = f"import sys, kncompress.__main__ as m; code = m.main({words}); print(*sys.modules); sys.exit(code)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not set(HEAVY) & set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "words", [["completion"], ["completion", "tcsh"], ["completion", "bash", "x"], ["completion", "query.bash"]]
)
def test_another_shell_is_refused(words, command):
    code, out, err = command(*words)
    assert code == 2 and out == "" and "name a shell: bash, zsh" in err and err.count("\n") == 1
