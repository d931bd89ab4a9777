"""Where GLUE comes from: the hub, a folder in the official layout, or the sentences inside gensim."""

import hashlib
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol

from kncompress.data.files import content_hash
from kncompress.data.rows import HUB, RowSource, hub_source
from kncompress.errors import UserError
from kncompress.glue.files import Example, parse_label, read_examples
from kncompress.glue.tasks import SMOKE, TASKS, GlueTask, hub_split

HUB_ID = "nyu-mll/glue"
_POLARITY = "test/test_data/pang_lee_polarity.cor"
_PREFIX = "__label__"
_POLARITY_DEV = 25
"""Dev sentences of each of the two labels."""
_AX_PLACES = ("AX/AX.tsv", "AX/test.tsv", "diagnostic/diagnostic.tsv")


class GlueSource(Protocol):
    """A source of tasks; ``name`` is what the user wrote."""

    @property
    def name(self) -> str: ...

    def tasks(self) -> list[str]:
        """Ids of the tasks that it has."""

    def check(self, task: GlueTask) -> None:
        """Raises UserError where the training or dev set is missing or wrong."""

    def train(self, task: GlueTask) -> list[Example]:
        """The training set."""

    def dev(self, task: GlueTask) -> dict[str, list[Example]]:
        """{suffix of the metrics' names: dev set}."""

    def test(self, task: GlueTask) -> dict[str, list[Example]]:
        """{name of the prediction file: test set without labels}; empty where there is none."""


def find_source(value: str) -> GlueSource:
    """``hub``, ``sample`` or a folder. Raises UserError for anything else, and for a folder without a task."""
    if value == "sample":
        return PolaritySource()
    if value == "hub":
        return HubSource()
    folder = Path(value).expanduser()
    if not folder.is_dir():
        raise UserError(f"data.source={value}: no such folder; give hub, sample, or a folder of <TASK>/train.tsv")
    source = FolderSource(value, folder)
    if not source.tasks():
        names = ", ".join(task.folder for task in TASKS.values() if task.id not in (SMOKE, "ax"))
        raise UserError(f"data.source={value}: holds no task; it should have some of the folders {names}")
    return source


@dataclass(frozen=True)
class FolderSource:
    """The official download: ``<folder>/CoLA/train.tsv`` and so on, named as there."""

    name: str
    folder: Path

    def tasks(self) -> list[str]:
        return [task.id for task in TASKS.values() if task.id != SMOKE and self._has(task)]

    def check(self, task: GlueTask) -> None:
        if task.trained_as is None:
            for file in [self._file(task, "train.tsv"), *(self._file(task, file) for file in task.dev.values())]:
                facts = file.stat()
                _checked(task.id, file, self.name, facts.st_size, facts.st_mtime_ns)

    def train(self, task: GlueTask) -> list[Example]:
        return list(read_examples(task, self._file(task, "train.tsv"), self.name))

    def dev(self, task: GlueTask) -> dict[str, list[Example]]:
        files = {suffix: self._file(task, name) for suffix, name in task.dev.items()}
        return {suffix: list(read_examples(task, file, self.name)) for suffix, file in files.items()}

    def test(self, task: GlueTask) -> dict[str, list[Example]]:
        files = {name: self.folder / task.folder / file for name, file in task.test.items()}
        if task.id == "ax":
            files = dict.fromkeys(task.test, self._diagnostic()[0])
        return {
            name: list(read_examples(task, file, self.name, labelled=False))
            for name, file in files.items()
            if file.is_file()
        }

    def _has(self, task: GlueTask) -> bool:
        return bool(self._diagnostic()) if task.id == "ax" else (self.folder / task.folder).is_dir()

    def _diagnostic(self) -> list[Path]:
        return [self.folder / place for place in _AX_PLACES if (self.folder / place).is_file()][:1]

    def _file(self, task: GlueTask, name: str) -> Path:
        file = self.folder / task.folder / name
        if not file.is_file():
            raise UserError(f"data.source={self.name}: no file {task.folder}/{name} in it")
        return file


def source_content(source: GlueSource, tasks: Sequence[GlueTask]) -> str:
    """Changes with the files of these tasks; the same for what is published, or carried by a package."""
    if not isinstance(source, FolderSource):
        return source.name
    files = [file for task in tasks for file in sorted((source.folder / task.folder).glob("*.tsv"))]
    return hashlib.sha256("|".join(f"{file.name}:{content_hash(file)}" for file in files).encode()).hexdigest()


@lru_cache(maxsize=256)
def _checked(task: str, file: Path, source: str, size: int, modified: int) -> None:
    """Reads every row once a process for each state of the file. Raises UserError."""
    for _ in read_examples(TASKS[task], file, source):
        pass


@dataclass(frozen=True)
class HubSource:
    """The data set ``nyu-mll/glue`` of the Hugging Face hub, one configuration a task."""

    name: str = "hub"

    def tasks(self) -> list[str]:
        return [name for name in TASKS if name != SMOKE]

    def check(self, task: GlueTask) -> None:
        self._rows(task)

    def train(self, task: GlueTask) -> list[Example]:
        return list(self._read(task, "train"))

    def dev(self, task: GlueTask) -> dict[str, list[Example]]:
        return {suffix: list(self._read(task, split)) for suffix, split in task.hub_dev.items()}

    def test(self, task: GlueTask) -> dict[str, list[Example]]:
        return {name: list(self._read(task, hub_split(file), False)) for name, file in task.test.items()}

    def _rows(self, task: GlueTask) -> RowSource:
        """Raises UserError where the task is neither in the cache nor within reach; loads nothing."""
        return hub_source(f"{HUB}{HUB_ID}:{task.id}", "data.source", "plain")

    def _read(self, task: GlueTask, split: str, labelled: bool = True) -> Iterator[Example]:
        tables = self._rows(task).published()
        where = f"data.source=hub: {HUB_ID}:{task.id}"
        if split not in tables:
            raise UserError(f"{where}: no split {split}; it has {', '.join(tables)}")
        table = tables[split]
        for name in (*task.hub_texts, *(["label"] if labelled else [])):
            if name not in table.column_names:
                raise UserError(f"{where}: no column {name}; it has {', '.join(table.column_names)}")
        for number, row in enumerate(table):
            label = _hub_label(task, row["label"], f"{where}, {split}, row {number}") if labelled else None
            yield Example(tuple(str(row[name]) for name in task.hub_texts), label)


def _hub_label(task: GlueTask, value: Any, where: str) -> int | float:
    if task.is_regression:
        return parse_label(task, str(value), where)
    if value not in range(len(task.labels)):
        raise UserError(f"{where}: label={value}: not one of 0 to {len(task.labels) - 1}")
    return int(value)


@dataclass(frozen=True)
class PolaritySource:
    """Task ``polarity``: 200 labelled sentences of film reviews (Pang & Lee 2005) that gensim carries.

    Of each label the 25 sentences with the lowest hash are the dev set, the others the training set: enough to see
    that everything runs, far too few to compare models by.
    """

    name: str = "sample"

    def tasks(self) -> list[str]:
        return [SMOKE]

    def check(self, task: GlueTask) -> None:
        self._splits  # noqa: B018 - reads and checks the file

    def train(self, task: GlueTask) -> list[Example]:
        return self._splits[0]

    def dev(self, task: GlueTask) -> dict[str, list[Example]]:
        return {"": self._splits[1]}

    def test(self, task: GlueTask) -> dict[str, list[Example]]:
        return {}

    @cached_property
    def _splits(self) -> tuple[list[Example], list[Example]]:
        spec = importlib.util.find_spec("gensim")
        if spec is None or spec.origin is None:
            raise UserError(
                "data.source=sample: the sentences are carried by gensim, which is not installed; install it by "
                "`pip install 'kncompress[sample]'` or give data.source=hub or a folder"
            )
        file = Path(spec.origin).parent / _POLARITY
        found = []
        for number, line in enumerate(file.read_text(encoding="cp1252").split("\n")[:-1], 1):
            label, _, text = line.removeprefix(_PREFIX).partition(" ")
            found.append(Example((text.strip(),), parse_label(TASKS[SMOKE], label, f"{file}, line {number}")))
        ranked = sorted(found, key=lambda example: hashlib.sha256(example.texts[0].encode()).digest())
        dev = {id(e) for label in (0, 1) for e in [e for e in ranked if e.label == label][:_POLARITY_DEV]}
        return [e for e in found if id(e) not in dev], [e for e in found if id(e) in dev]


def first_examples(examples: list[Example], count: int | None) -> list[Example]:
    """``count`` of the examples, chosen by a hash of their texts, in their order; all where ``count`` is None.

    The choice does not depend on the seed of a run, and a larger one holds every smaller one.
    """
    if count is None or count >= len(examples):
        return examples
    keys = [(hashlib.sha256("\t".join(e.texts).encode()).digest(), number) for number, e in enumerate(examples)]
    kept = {number for _, number in sorted(keys)[:count]}
    return [example for number, example in enumerate(examples) if number in kept]


def fingerprint(examples: list[Example]) -> str:
    """Changes with any text, label or their order."""
    digest = hashlib.sha256()
    for texts, label in examples:
        digest.update("\t".join((*texts, str(label), "\n")).encode())
    return digest.hexdigest()
