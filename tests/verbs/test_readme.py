"""The commands of README and ``docs/``: each composes, and those that need neither hub nor GPU run, on small stand-ins.

A comment before a block of commands makes them run: ``<!-- runs: key=value ... -->``, with overrides that make them
small. A command gets those of them whose keys its verb has; ``train:key=value`` is for that verb alone. With
``runs slowly:`` the block is left to the tests marked slow, as every sweep is. Where a command has ``<...>``,
``STAND_INS`` says what the reader is meant to put there. A command that stands on two pages is tested once.
"""

import re
import shlex
import shutil
import tomllib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from glue_layout import make_glue
from verbs.conftest import read

import kncompress
from kncompress.__main__ import VERBS, main
from kncompress.cli.presets import defaults_of
from kncompress.cli.schema import sections

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PACKAGE = Path(kncompress.__file__).parent
BLOCK = re.compile(r"(?:<!-- (runs|runs slowly):([^>]*)-->\n+)?```(\w*)\n(.*?)```", re.DOTALL)
OPTIONAL = re.compile(r"(?<=\s)\[(\w+=\S+)\]")
LAUNCHERS = re.compile(r"^(torchrun|srun)\b.*?-m kncompress ")
STAND_INS = {
    "<folder or hub id>": "model",
    "<the same>": "model",
    "<folder>": "student",
    "<text>": "story.txt",
    "<another text>": "story.txt",
    "<file or folder>": "story.txt",
    "<run folder>": "block0",
    "<new folder>": "draws",
    "<folder with CoLA/train.tsv ...>": "glue",
    "<partition>": "long",
}


@dataclass(frozen=True)
class Command:
    """One command of a page behind ``kncompress``, its placeholders filled."""

    place: str
    """Page and line."""
    words: tuple[str, ...]
    small: tuple[str, ...] | None
    """Overrides that make it small; None: it is not run."""
    slow: bool

    @property
    def verb(self) -> str:
        return self.words[0]

    def __str__(self) -> str:
        return f"{self.place}: {' '.join(self.words)}"


@dataclass(frozen=True)
class Block:
    """A block of code between fences."""

    page: str
    start: int
    """Its first line on the page."""
    language: str
    text: str
    mark: str
    """``runs``, ``runs slowly`` or nothing."""
    small: str
    """The overrides behind the mark."""


def _blocks() -> list[Block]:
    """Every block of every page."""
    pages = [(page.relative_to(ROOT), page.read_text()) for page in PAGES]
    return [
        Block(str(page), text.count("\n", 0, f.start(4)) + 1, f[3], f[4], f[1] or "", f[2] or "")
        for page, text in pages
        for f in BLOCK.finditer(text)
    ]


def _commands(block: Block) -> list[Command]:
    found: list[Command] = []
    line, begins = "", block.start
    for number, part in enumerate([] if block.language else block.text.splitlines(), block.start):
        begins, line = (begins, line + part) if line else (number, part)
        if line.endswith("\\"):
            line = line[:-1]
            continue
        whole, line = LAUNCHERS.sub("python -m kncompress ", line), ""
        if not whole.startswith(("python -m kncompress ", "kncompress ")):
            continue
        for placeholder, stand_in in STAND_INS.items():
            whole = whole.replace(placeholder, stand_in)
        words = shlex.split(OPTIONAL.sub(r"\1", whole), comments=True)
        place = f"{block.page} line {begins}"
        assert not any("<" in word for word in words), f"{place}: nothing in STAND_INS for {whole}"
        words = words[words.index("kncompress") + 1 :]
        alone = not {"trainer=ddp", "trainer=fsdp", "hydra/launcher=slurm"} & set(words)
        run = tuple(_small(block.small, words)) if block.mark and alone else None
        found.append(Command(place, tuple(words), run, block.mark == "runs slowly" or "-m" in words))
    return found


def _small(small: str, words: list[str]) -> Iterator[str]:
    """The overrides of a block that are for this command."""
    verb = VERBS.get(words[0])
    if verb is None:
        return
    known = {*sections(verb.config), *defaults_of(verb.name), *verb.aliases}
    for word in shlex.split(small):
        only, _, rest = word.partition(":")
        if only in VERBS and only != verb.name:
            continue
        word = rest if only in VERBS else word
        if word.split("=")[0].split(".")[0] in known:
            yield word


BLOCKS = [commands for commands in map(_commands, _blocks()) if commands]
COMMANDS = list({command.words: command for commands in BLOCKS for command in commands}.values())
RUN = [commands for commands in BLOCKS if any(c.small is not None and not c.slow for c in commands)]
RUN_SLOWLY = [commands for commands in BLOCKS if any(c.small is not None and c.slow for c in commands)]


def _name(commands: list[Command]) -> str:
    return f"{commands[0].place}: {' '.join(dict.fromkeys(c.verb for c in commands))}"


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A folder with everything that ``STAND_INS`` names, and the plan file that a page shows."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from kncompress.data.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("reader")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=300, n_positions=1024, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(folder / "model")
    train_tokenizer([text.read_text()], 300, context=1024).save_pretrained(folder / "model")
    (folder / "story.txt").write_text(text.read_text())
    make_glue(folder / "glue")
    shutil.copytree(PACKAGE / "assets" / "mini", folder / "student")
    (plan,) = (block.text for block in _blocks() if block.language == "yaml")
    (folder / "my_plan.yaml").write_text(plan)
    (folder / "block0").mkdir()
    (folder / "block0" / "plan.yaml").write_text("mlp: {right: [2, 1]}\n")
    return folder


@pytest.fixture
def at_home(reader: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The reader's folder, as the working directory of an own copy."""
    for entry in reader.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    (tmp_path / "block0").unlink()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KNCOMPRESS_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_the_pages_have_commands_that_run() -> None:
    assert len(COMMANDS) > 30 and len(RUN) >= 8
    assert set(VERBS) <= {command.verb for command in COMMANDS}


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_it_composes(command: Command, reader: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Its verb, presets, keys, types and values are those of this version; nothing is started."""
    monkeypatch.chdir(reader)
    show = [] if command.verb == "completion" else ["--show"]
    code = main([*command.words, *show])
    out, err = capsys.readouterr()
    assert code == 0 and out, err
    assert not (reader / "runs").exists()


def _run(commands: list[Command], slow: bool, capfd: Any) -> None:
    """Runs a block in order: a later command may name the run folder of the first."""
    for number, command in enumerate(commands):
        if command.small is None or (command.slow and not slow):
            continue
        if command.verb == "completion":
            assert main(command.words) == 0
            continue
        code = main([*command.words, *command.small, f"run_dir=block{number}"])
        assert code == 0, capfd.readouterr().err
        if "-m" in command.words:
            results = [read(folder, "result.json") for folder in Path(f"block{number}").iterdir() if folder.is_dir()]
            assert results and all(result["status"] == "finished" for result in results)
        else:
            assert read(Path(f"block{number}"), "result.json")["status"] == "finished"


@pytest.mark.parametrize("commands", RUN, ids=_name)
def test_it_runs(commands: list[Command], at_home: Path, capfd: Any) -> None:
    _run(commands, slow=False, capfd=capfd)


@pytest.mark.slow
@pytest.mark.parametrize("commands", RUN_SLOWLY, ids=_name)
def test_it_runs_slowly(commands: list[Command], at_home: Path, capfd: Any) -> None:
    _run(commands, slow=True, capfd=capfd)


def test_the_python_of_the_pages_runs(at_home: Path, capsys: Any) -> None:
    assert main(["compress", "model=model", "factors.mlp.right=[1,2]", "run_dir=runs/first"]) == 0
    # Those of an exported graph stand on its card too, and test_export.py runs them from there.
    found = [block for block in _blocks() if block.language == "python" and "onnxruntime" not in block.text]
    assert found
    for block in found:
        code = block.text
        assert "runs/.../model" in code
        with warnings.catch_warnings():  # peft tells that GPT-2's own maps lie the other way round, and copes
            warnings.simplefilter("ignore", UserWarning)
            exec(compile(code.replace("runs/.../model", "runs/first/model"), block.page, "exec"), {})
    assert "The history of" in capsys.readouterr().out


def test_make_targets_and_extras_exist() -> None:
    text = "\n".join(block.text for block in _blocks() if not block.language)
    targets = set(re.findall(r"^make ([a-z-]+)", text, re.MULTILINE))
    assert {"demo", "test"} <= targets
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {
        name
        for group in re.findall(r"\.\[([\w,-]+)\]'|kncompress\[([\w,-]+)\]", text)
        for name in "".join(group).split(",")
    }
    assert named and named <= set(extras)
    whole = (ROOT / "docs" / "install.md").read_text()
    paragraph = whole[whole.index("Extras:") : whole.index("\n\n", whole.index("Extras:"))]
    assert set(re.findall(r"`([\w-]+)`", paragraph)) == set(extras)
