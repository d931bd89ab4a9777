"""How long runtimes take to read a prompt and to write tokens, in turns; and, as a process of its own, the memory.

Usage: python -m kncompress.bench.writing JOB.json RESULT.json
"""

import json
import statistics
import sys
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kncompress.bench.child import exchange, peak_memory, reset_peak
from kncompress.bench.runtimes import Runtime, import_packages, load_runtime
from kncompress.bench.timing import Rounds

_MOST_SECONDS, _LEAST_ROUNDS = 40.0, 3
"""Most seconds for the rounds of one batch, and the fewest rounds even if they take longer."""
_WARM_UP = 2
"""Tokens."""


class Texts(NamedTuple):
    """What each model reads and writes in a round; token ids (B, T), int64."""

    prompt: Tensor
    """Timed up to the first new token."""
    start: Tensor
    """Read before the tokens that are timed by themselves."""
    new: int
    """Those tokens, one at a time in each row."""


class Seconds(NamedTuple):
    """Of one round of one model."""

    prompt: float
    """To the first token after the prompt."""
    token: float
    """Of one further token in each row: median."""
    prompt_work: float
    """The same in seconds of the processor, all threads together: what other jobs of the machine do not add to."""
    token_work: float
    """Mean."""


def texts(batch: int, prompt: int, start: int, new: int, vocabulary: int) -> Texts:
    """Any tokens: speed does not depend on which."""
    ids = (1000 + 7 * torch.arange(batch * max(prompt, start))).remainder(vocabulary).view(batch, -1)
    return Texts(ids[:, :prompt], ids[:, :start], new)


def timed(model: Runtime, given: Texts) -> Seconds:
    """One round."""
    first, first_work = _marks(model, given.prompt, 1)[1]
    marks = _marks(model, given.start, given.new + 1)[1:]
    steps = [after[0] - before[0] for before, after in pairwise(marks)]
    return Seconds(first, statistics.median(steps), first_work, (marks[-1][1] - marks[0][1]) / given.new)


def _marks(model: Runtime, ids: Tensor, new: int) -> list[tuple[float, float]]:
    """Seconds and processor seconds since the start: 0, and at each new token."""
    began, worked = time.perf_counter(), time.process_time()
    marks = [(0.0, 0.0)]
    model.write(ids, new, lambda: marks.append((time.perf_counter() - began, time.process_time() - worked)))
    return marks


def in_turns(models: Mapping[str, Runtime], given: Texts, repeats: int) -> dict[str, Rounds]:
    """{a field of ``Seconds``: its rounds}. The first model of one round is the last of the next."""
    for model in models.values():
        model.write(given.start, _WARM_UP, lambda: None)
    found: dict[str, list[Seconds]] = {name: [] for name in models}
    order, began = list(models), time.perf_counter()
    for number in range(repeats):
        if number >= _LEAST_ROUNDS and time.perf_counter() - began > _MOST_SECONDS:
            break
        for name in order:
            found[name].append(timed(models[name], given))
        order = order[1:] + order[:1]
    return {
        field: Rounds({name: [getattr(one, field) for one in rounds] for name, rounds in found.items()})
        for field in Seconds._fields
    }


def main(job: dict[str, Any]) -> dict[str, int]:
    """In the child: its peak of resident memory, and how much of that is above what its packages take."""
    torch.set_num_threads(job["threads"])
    device, dtype = torch.device(job["device"]), getattr(torch, job["dtype"])
    import_packages(job["runtime"])
    before = reset_peak(device)
    model = load_runtime(job["runtime"], Path(job["folder"]), device, dtype)
    model.write(texts(1, job["prompt"], 1, 1, job["vocabulary"]).prompt, 1, lambda: None)
    peak = peak_memory(device)
    return {"peak": peak, "above": max(1, peak - before)}


if __name__ == "__main__":
    values, made = exchange(sys.argv[1:])
    made.write_text(json.dumps(main(values)))
