"""GLUE's data: the official files and their counts, tiny ones of every layout, the hub, and what is refused."""

import os
import shutil
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Value, load_dataset
from glue_layout import make_glue, sentences, write

from kncompress.data import rows
from kncompress.errors import UserError
from kncompress.glue.files import Example, read_examples
from kncompress.glue.readers import HUB_ID, FolderSource, HubSource, PolaritySource, find_source, first_examples
from kncompress.glue.tasks import TASKS, find_tasks

OFFICIAL = {"cola": (8551, 1043), "sst2": (67349, 872), "mrpc": (3668, 408), "stsb": (5749, 1500), "rte": (2490, 277)}
DATA = os.environ.get("KNCOMPRESS_DATA")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_glue(tmp_path_factory.mktemp("glue"))


def source(folder: Path) -> FolderSource:
    found = find_source(str(folder))
    assert isinstance(found, FolderSource)
    return found


@pytest.mark.skipif(DATA is None, reason="needs KNCOMPRESS_DATA")
@pytest.mark.parametrize("task", OFFICIAL)
def test_official_counts(task: str) -> None:
    glue = source(Path(str(DATA)) / "glue")
    train, dev = glue.train(TASKS[task]), glue.dev(TASKS[task])[""]
    assert (len(train), len(dev)) == OFFICIAL[task]
    labels = {example.label for example in train}
    assert labels == {0, 1} if task != "stsb" else min(labels) == 0.0 and max(labels) == 5.0
    assert all(text.strip() for example in train + dev for text in example.texts)


@pytest.mark.skipif(DATA is None, reason="needs KNCOMPRESS_DATA")
def test_majorities_of_the_official_dev_sets() -> None:
    """Label numbers are not swapped: acceptable, positive, equivalent and entailment are what they should be."""
    glue = source(Path(str(DATA)) / "glue")
    ones = {t: sum(e.label for e in glue.dev(TASKS[t])[""]) for t in ("cola", "sst2", "mrpc", "rte")}
    assert ones == {"cola": 721, "sst2": 444, "mrpc": 279, "rte": 131}


def test_every_layout_is_read(folder: Path) -> None:
    glue = source(folder)
    assert glue.tasks() == ["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli", "ax"]
    text = sentences(24)
    for name in glue.tasks()[:-1]:
        task = TASKS[name]
        glue.check(task)
        train = glue.train(task)
        assert [len(train), *map(len, glue.dev(task).values())] == [12, *[6] * len(task.dev)], name
        wanted = (text[0],) if len(task.texts) == 1 else (text[0], text[12])
        assert tuple(t.strip() for t in train[0].texts) == wanted, name
        assert train[1].texts[0].strip() == text[1], name  # a lone quotation mark swallows nothing
        values = [e.label for e in train[:4]]
        assert values == {"stsb": [0.0, 0.9, 1.8, 2.7], "mnli": [0, 1, 2, 0]}.get(name, [0, 1, 0, 1]), name
    assert list(glue.dev(TASKS["mnli"])) == ["matched", "mismatched"]


def test_test_sets_have_no_labels(folder: Path) -> None:
    glue = source(folder)
    found = {name: glue.test(TASKS[name]) for name in glue.tasks()}
    files = {name: list(sets) for name, sets in found.items() if sets}
    assert files == {
        "cola": ["CoLA"], "stsb": ["STS-B"], "qqp": ["QQP"], "mnli": ["MNLI-m", "MNLI-mm"], "ax": ["AX"],
    }  # fmt: skip
    text = sentences(8)
    assert found["cola"]["CoLA"][2] == Example((text[2],), None)
    for name in ("stsb", "qqp", "mnli", "ax"):
        for examples in found[name].values():
            assert [e.texts for e in examples] == list(zip(text[:4], text[4:], strict=True))


def test_tasks_by_name(folder: Path) -> None:
    has = source(folder).tasks()
    assert [t.id for t in find_tasks(["rte", "cola"], has, "x")] == ["cola", "rte"]
    assert [t.id for t in find_tasks("sst2", has, "x")] == ["sst2"]
    assert [t.id for t in find_tasks("all", has, "x")] == has
    assert [t.id for t in find_tasks("all", ["rte", "ax"], "x")] == ["rte"]  # without mnli nothing answers ax
    for value, message in (
        (["colla"], "tasks=colla: no such task; tasks: cola, sst2"),
        (["polarity"], "tasks=polarity: not in data.source=x; it has cola"),
        (["ax"], "tasks=ax: has no training set, the model of mnli answers it; add mnli"),
        ([], "tasks=\\[\\]: give all, or some of cola"),
    ):
        with pytest.raises(UserError, match=message):
            find_tasks(value, has, "x")


HEAD = "index\tsentence1\tsentence2\tlabel"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ["index\tsentence1\tsentence\tlabel", "0\ta\tb\tentailment"],
            "RTE/train.tsv: no column sentence2; it has index",
        ),
        ([HEAD, "0\ta\tb\tentailment", "1\ta\tb\tmaybe"], "line 3: label=maybe: not one of entailment, not_entailment"),
        ([HEAD, "0\ta\tentailment"], "RTE/train.tsv, line 2: 3 columns, not 4"),
        ([HEAD], "RTE/train.tsv: no examples in it"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, lines: list[str], message: str) -> None:
    write(tmp_path / "RTE" / "train.tsv", *lines)
    write(tmp_path / "RTE" / "dev.tsv", HEAD, "0\ta\tb\tentailment")
    with pytest.raises(UserError, match=f"data.source={tmp_path}: RTE.*{message.removeprefix('RTE')}"):
        source(tmp_path).check(TASKS["rte"])


def test_missing_files_and_odd_scores(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder; give hub, sample, or a folder"):
        find_source(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="holds no task; it should have some of the folders CoLA, SST-2"):
        find_source(str(tmp_path))
    write(tmp_path / "CoLA" / "train.tsv", "a\t1\t\tHe ran.")
    with pytest.raises(UserError, match=r"no file CoLA/dev\.tsv in it"):
        source(tmp_path).check(TASKS["cola"])
    write(tmp_path / "CoLA" / "dev.tsv", "a\t1\t\tCaf\xe9.", encoding="latin-1")
    with pytest.raises(UserError, match=r"CoLA/dev\.tsv: not UTF-8 text"):
        source(tmp_path).check(TASKS["cola"])
    for value in ("5.1", "-0.1", "high", "nan"):
        write(tmp_path / "STS-B" / "train.tsv", "sentence1\tsentence2\tscore", f"a\tb\t{value}")
        with pytest.raises(UserError, match=f"line 2: score={value}: must be a number from 0 to 5"):
            list(read_examples(TASKS["stsb"], tmp_path / "STS-B" / "train.tsv", "x"))


def test_polarity_is_split_evenly_and_for_good() -> None:
    glue = PolaritySource()
    train, dev = glue.train(TASKS["polarity"]), glue.dev(TASKS["polarity"])[""]
    assert [sum(e.label == label for e in part) for part in (train, dev) for label in (0, 1)] == [75, 75, 25, 25]
    assert not set(train) & set(dev) and dev == PolaritySource().dev(TASKS["polarity"])[""]
    assert Example(("simplistic , silly and tedious .",), 0) in train + dev


def test_a_cap_on_examples_grows_with_its_number() -> None:
    examples = [Example((text,), 0) for text in sentences(50)]
    few, more = first_examples(examples, 10), first_examples(examples, 20)
    assert len(few) == 10 and set(few) < set(more) and more == [e for e in examples if e in more]
    assert first_examples(examples, None) == first_examples(examples, 99) == examples


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of ``datasets`` of its own, and a hub that is out of reach."""
    from huggingface_hub import constants

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    rows._load.cache_clear()
    return tmp_path / "datasets"


def test_the_hub_s_version_equals_the_files(folder: Path, hub_cache: Path, tmp_path: Path) -> None:
    """RTE and MNLI as ``datasets`` leaves them in its cache: class labels as numbers, -1 in test sets."""
    local, repository = source(folder), tmp_path / "glue"
    card = ["---", "configs:"]
    for name in ("mnli", "stsb"):
        task = TASKS[name]
        label = Value("float32") if task.is_regression else ClassLabel(names=list(task.labels))
        features = Features({c: Value("string") for c in task.hub_texts} | {"label": label, "idx": Value("int32")})
        sets = {"train": local.train(task), **dict(zip(task.hub_dev.values(), local.dev(task).values(), strict=True))}
        sets |= dict(zip(["test_matched", "test_mismatched"], local.test(task).values(), strict=False))
        card += [f"- config_name: {name}", "  data_files:"]
        for split, examples in sets.items():
            columns = {c: [e.texts[i] for e in examples] for i, c in enumerate(task.hub_texts)}
            labels = [-1 if e.label is None else e.label for e in examples]
            (repository / name).mkdir(parents=True, exist_ok=True)
            Dataset.from_dict(
                columns | {"label": labels, "idx": list(range(len(examples)))}, features=features
            ).to_parquet(repository / name / f"{split}-0.parquet")
            card += [f"  - split: {split}", f"    path: {name}/{split}-*"]
    (repository / "README.md").write_text("\n".join([*card, "---", ""]))
    for name in ("mnli", "stsb"):
        load_dataset(str(repository), name, cache_dir=str(hub_cache))
    owner, repo = HUB_ID.split("/")
    (hub_cache / "glue").rename(hub_cache / f"{owner}___{repo}")
    shutil.rmtree(repository)

    hub = HubSource()
    hub.check(TASKS["mnli"])
    assert hub.train(TASKS["mnli"]) == local.train(TASKS["mnli"])
    assert hub.dev(TASKS["mnli"]) == local.dev(TASKS["mnli"])
    assert hub.test(TASKS["mnli"]) == local.test(TASKS["mnli"])
    scores = [e.label for e in hub.train(TASKS["stsb"])]
    assert scores == pytest.approx([e.label for e in local.train(TASKS["stsb"])])
    with pytest.raises(UserError, match=r"hub:nyu-mll/glue:rte: not in .*datasets, and HF_HUB_OFFLINE"):
        hub.check(TASKS["rte"])


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_empty_lines_and_every_line_end(tmp_path: Path, end: str) -> None:
    rows = ["sentence\tlabel", "one\t0", "", "two\t1", "", ""]
    file = tmp_path / "SST-2" / "train.tsv"
    file.parent.mkdir()
    file.write_bytes(end.join(rows).encode())
    assert list(read_examples(TASKS["sst2"], file, "x")) == [Example(("one",), 0), Example(("two",), 1)]


def test_a_message_about_columns_is_short_whatever_the_file_holds(tmp_path: Path) -> None:
    file = tmp_path / "SST-2" / "train.tsv"
    file.parent.mkdir()
    file.write_text("\t".join(f"a long name of the column {i}" for i in range(2000)))
    with pytest.raises(UserError, match=r"no column sentence; it has a long name of the .* and 1992 more$") as caught:
        list(read_examples(TASKS["sst2"], file, "x"))
    assert len(str(caught.value)) < 300
