"""Tasks of EleutherAI's lm-evaluation-harness, in this process, on a model that is loaded already.

A task is one of the harness's own, whose data come from the Hugging Face hub or its cache, or a YAML file in the
harness's format, whose data may lie beside it.
"""

import re
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kncompress.errors import UserError
from kncompress.evaluation.scoring import input_device
from kncompress.terminal import silenced

_YAML = (".yaml", ".yml")
_BOOTSTRAP = 1000
"""Bootstrap draws for the standard error of a metric that is not a mean."""


def check_tasks(names: Sequence[str], allow_code: bool = False) -> None:
    """Cheap checks: the harness is installed, files are there, and run no code where that is not allowed.

    Raises UserError.
    """
    if find_spec("lm_eval") is None:
        raise UserError(f"tasks={list(names)}: needs lm-eval: pip install 'kncompress[eval]'")
    for name in names:
        if name.endswith(_YAML) and not Path(name).expanduser().is_file():
            raise UserError(f"tasks={name}: no such file")
        if name.endswith(_YAML) and not allow_code:
            _refuse_code(name, Path(name).expanduser())


def _refuse_code(name: str, file: Path) -> None:
    """Raises UserError where a task's file, or one that it includes, names a function of a Python file beside it."""
    pending, seen = [file], set()
    while pending:
        path = pending.pop().resolve()
        if path in seen or not path.is_file():
            continue
        seen.add(path)
        text = path.read_text(encoding="utf-8", errors="replace")
        if "!function" in text:
            raise UserError(
                f"tasks={name}: {path.name} has !function, which runs the Python code beside it; read that code, then "
                "give allow_code=true"
            )
        included = re.findall(r"^include:\s*['\"]?([^'\"#\n]+)", text, re.MULTILINE)
        pending += [path.parent / Path(each.strip()).expanduser() for each in included]


def load_tasks(names: Sequence[str], shots: int | None, seed: int) -> dict[str, Any]:
    """The tasks with their data, as the harness's ``evaluate`` takes them.

    Args:
        names: the harness's names of tasks, groups or tags, and YAML files.
        shots: worked examples before each item; None: as the task says. A task that says 0 keeps to it.
        seed: chooses those examples.

    Raises:
        UserError: no such task, a file that is no task, or data that cannot be had.
    """
    from lm_eval.tasks import TaskManager

    found = [str(Path(name).expanduser()) if name.endswith(_YAML) else name for name in names]
    own = [name for name in found if not name.endswith(_YAML)]
    with silenced("lm_eval"):  # its lines about a model that is loaded already
        manager = TaskManager(include_defaults=bool(own))
        for name in own:
            if name not in manager.all_tasks:
                raise UserError(
                    f"tasks={name}: lm-evaluation-harness has no such task; `lm-eval ls tasks` lists them; a task of "
                    "your own is a .yaml file"
                )
        try:
            loaded: dict[str, Any] = manager.load(found)
        except Exception as error:  # whatever a task's file, its code and its data's readers raise
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"tasks={','.join(names)}: cannot be loaded: {reason}") from error
    for task in loaded["tasks"].values():
        written = task.get_config("num_fewshot")
        if shots is not None and written != 0:
            task.set_config(key="num_fewshot", value=shots)
        elif written is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=seed)
    return loaded


Items = dict[str, dict[tuple[Any, str], bool]]
"""{task: {(item, filter): whether the model was right}}, for tasks with a metric that is right or wrong."""


def score_tasks(
    model: Any, tokenizer: Any, tasks: dict[str, Any], window: int, batch: int, limit: int | None
) -> tuple[dict[str, float], Items]:
    """``{task/metric: value}`` with ``task/metric_stderr`` where the harness has one, and ``task/items``; single items.

    Args:
        model: causal language model, in evaluation mode.
        tasks: from ``load_tasks``.
        window: most tokens of an item; a longer one loses its beginning.
        batch: sequences in one forward pass.
        limit: only the first items of each task; None: all.
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    with silenced("lm_eval"):  # its lines about a model that is loaded already
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, max_length=window, batch_size=batch)
        wrapped._device = input_device(model)  # the harness asks the first weight, which may be away
        found = evaluate(lm=wrapped, task_dict=tasks, limit=limit, bootstrap_iters=_BOOTSTRAP, log_samples=True)
    metrics: dict[str, float] = {}
    for task, values in found["results"].items():
        for key, value in values.items():
            name, _, kept = key.partition(",")  # metric and filter
            if kept and isinstance(value, int | float):
                metrics[f"{task}/{name}" if kept == "none" else f"{task}/{name}/{kept}"] = value
        if task in found["n-samples"]:
            metrics[f"{task}/items"] = found["n-samples"][task]["effective"]
    items = {task: dict(_right(samples)) for task, samples in found["samples"].items()}
    return metrics, {task: found for task, found in items.items() if found}


def _right(samples: list[dict[str, Any]]) -> Iterator[tuple[tuple[Any, str], bool]]:
    """For each item, whether the model was right, by the first of its metrics that is 0 or 1."""
    for sample in samples:
        scores = [sample.get(name) for name in sample["metrics"]]
        right = next((score for score in scores if isinstance(score, int | float) and score in (0, 1)), None)
        if right is not None:
            yield (sample["doc_id"], sample["filter"]), bool(right)


def flips(first: Items, second: Items) -> dict[str, float]:
    """``{compare/task/flips: share}``: items that one model has right and the other has not, in percent."""
    shares = {}
    for task in first.keys() & second.keys():
        both = first[task].keys() & second[task].keys()
        if both:
            flipped = sum(first[task][item] != second[task][item] for item in both)
            shares[f"compare/{task}/flips"] = 100 * flipped / len(both)
    return dict(sorted(shares.items()))
