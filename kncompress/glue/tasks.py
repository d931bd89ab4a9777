"""The GLUE tasks (Wang et al. 2019, arXiv 1804.07461) as one table: files, columns, labels, official metrics.

Ids are those of the Hugging Face hub; folders, files and columns those of the official download. ``polarity`` is no
GLUE task but the smoke run on a machine without data.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from kncompress.errors import UserError


@dataclass(frozen=True)
class GlueTask:
    """One task. Labels are numbered as on the hub, in the order of ``labels``."""

    id: str
    folder: str
    """Folder of the official download."""
    texts: tuple[str, ...]
    """Columns of the sentence, or of the two, in the files."""
    label: str
    """Column of the label."""
    codes: tuple[str, ...]
    """How the files write the labels; empty for a score."""
    labels: tuple[str, ...]
    """What the labels mean; empty for a score."""
    metrics: tuple[str, ...]
    """Official metrics: some of matthews, accuracy, f1, pearson, spearman."""
    hub_texts: tuple[str, ...]
    """Columns of the texts on the hub, where the label is ``label``."""
    bare_columns: tuple[str, ...] = ()
    """Columns of training and dev files that have no header."""
    dev: Mapping[str, str] = field(default_factory=lambda: {"": "dev.tsv"})
    """{suffix of the metrics' names: dev file}."""
    test: Mapping[str, str] = field(default_factory=dict)
    """{name of the prediction file: test file}."""
    skips_broken_rows: bool = False
    """The official file has rows with too few columns, which the hub's version leaves out as well."""
    trained_as: str | None = None
    """The task whose model answers this one, which has no training set."""

    @property
    def is_regression(self) -> bool:
        """Whether the label is a score."""
        return not self.codes

    @property
    def outputs(self) -> int:
        """Outputs of the head."""
        return max(1, len(self.codes))

    @property
    def hub_dev(self) -> dict[str, str]:
        """{suffix: split on the hub}."""
        return {suffix: hub_split(file) for suffix, file in self.dev.items()}


LOWEST, HIGHEST = 0.0, 5.0
"""Range of the scores of STS-B."""

_NLI = ("entailment", "neutral", "contradiction")
_RTE = ("entailment", "not_entailment")
_PAIR = ("sentence1", "sentence2")
_BINARY = ("0", "1")

TASKS: dict[str, GlueTask] = {
    task.id: task
    for task in (
        GlueTask(
            "cola", "CoLA", ("sentence",), "label", _BINARY, ("unacceptable", "acceptable"), ("matthews",),
            ("sentence",), bare_columns=("source", "label", "mark", "sentence"), test={"CoLA": "test.tsv"},
        ),
        GlueTask(
            "sst2", "SST-2", ("sentence",), "label", _BINARY, ("negative", "positive"), ("accuracy",),
            ("sentence",), test={"SST-2": "test.tsv"},
        ),
        GlueTask(
            "mrpc", "MRPC", ("#1 String", "#2 String"), "Quality", _BINARY, ("not_equivalent", "equivalent"),
            ("f1", "accuracy"), _PAIR, test={"MRPC": "test.tsv"},
        ),
        GlueTask(
            "stsb", "STS-B", _PAIR, "score", (), (), ("pearson", "spearman"), _PAIR, test={"STS-B": "test.tsv"},
        ),
        GlueTask(
            "qqp", "QQP", ("question1", "question2"), "is_duplicate", _BINARY, ("not_duplicate", "duplicate"),
            ("f1", "accuracy"), ("question1", "question2"), test={"QQP": "test.tsv"}, skips_broken_rows=True,
        ),
        GlueTask(
            "mnli", "MNLI", _PAIR, "gold_label", _NLI, _NLI, ("accuracy",), ("premise", "hypothesis"),
            dev={"matched": "dev_matched.tsv", "mismatched": "dev_mismatched.tsv"},
            test={"MNLI-m": "test_matched.tsv", "MNLI-mm": "test_mismatched.tsv"},
        ),
        GlueTask(
            "qnli", "QNLI", ("question", "sentence"), "label", _RTE, _RTE, ("accuracy",), ("question", "sentence"),
            test={"QNLI": "test.tsv"},
        ),
        GlueTask("rte", "RTE", _PAIR, "label", _RTE, _RTE, ("accuracy",), _PAIR, test={"RTE": "test.tsv"}),
        GlueTask(
            "wnli", "WNLI", _PAIR, "label", _BINARY, ("not_entailment", "entailment"), ("accuracy",), _PAIR,
            test={"WNLI": "test.tsv"},
        ),
        GlueTask(
            "ax", "AX", _PAIR, "label", _NLI, _NLI, (), ("premise", "hypothesis"), dev={}, test={"AX": "AX.tsv"},
            trained_as="mnli",
        ),
        GlueTask(
            "polarity", "polarity", ("sentence",), "label", ("neg", "pos"), ("negative", "positive"), ("accuracy",),
            ("sentence",),
        ),
    )
}  # fmt: skip
"""Every task by id, in the order of the benchmark's own table."""

SMOKE = "polarity"
"""The task of the bundled sample."""


def hub_split(file: str) -> str:
    """``dev_matched.tsv`` -> ``validation_matched``: the split on the hub that a file became."""
    return "test" if file == "AX.tsv" else file.removesuffix(".tsv").replace("dev", "validation")


def find_tasks(value: object, available: Iterable[str], source: str) -> list[GlueTask]:
    """The tasks that ``tasks`` names; ``all``: every one that the source has, a single id: that one.

    Raises:
        UserError: a name that is no task, one that the source has not, or ``ax`` without ``mnli``.
    """
    available = list(available)
    if value == "all":
        found = [name for name in available if TASKS[name].trained_as in (None, *available)]
    else:
        found = [str(name) for name in value] if isinstance(value, list | tuple) else [str(value)]
    if not found:
        raise UserError(f"tasks=[]: give all, or some of {', '.join(available)}")
    for name in found:
        if name not in TASKS:
            raise UserError(f"tasks={name}: no such task; tasks: {', '.join(TASKS)}")
        if name not in available:
            raise UserError(f"tasks={name}: not in data.source={source}; it has {', '.join(available)}")
        owner = TASKS[name].trained_as
        if owner is not None and owner not in found:
            raise UserError(f"tasks={name}: has no training set, the model of {owner} answers it; add {owner}")
    return [task for task in TASKS.values() if task.id in found]
