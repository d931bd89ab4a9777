"""How time and memory grow with tokens, width, terms, sequence length and batch; the slopes, beside the formulas'.

Usage: python experiments/throughput/growth.py RESULTS.csv [small]; the picture beside it needs the extra ``reports``.
"""

import csv
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import matplotlib
import torch
from transformers import GPT2Config

matplotlib.use("svg")
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator

from kncompress.anatomy.plan import plan_from_config
from kncompress.bench.child import run_child
from kncompress.bench.step_job import StepJob
from kncompress.bench.timing import alternate
from kncompress.config import FactorConfig, FactorsConfig
from kncompress.kron import KroneckerLinear, KroneckerShape
from kncompress.training.trainer import keep_freed_memory

Row = tuple[str, int, float, float, float]
"""What grows, its size, seconds, bytes (0: not measured), cost by the formulas in any unit."""
CPU = torch.device("cpu")
_ROUNDS = 3
"""Of each training step; a round takes all sizes of a curve in turn, so that a slow minute slows them alike."""


def products(curve: str, sizes: Mapping[int, tuple[int, int, int]]) -> Iterator[Row]:
    """The forward pass of maps of (4 width, width), right factors 4x1, for each size's (tokens, width, terms)."""
    calls: dict[str, Callable[[], object]] = {}
    costs: dict[str, float] = {}
    for size, (tokens, width, terms) in sizes.items():
        shape = KroneckerShape.fit(4 * width, width, [4, 1], terms)
        layer, x = KroneckerLinear(shape).requires_grad_(False), torch.randn(tokens, width)
        calls[str(size)] = partial(layer, x)
        costs[str(size)] = float(tokens * shape.multiply_adds)
    rounds = alternate(calls, 9, CPU)
    for name, cost in costs.items():
        yield curve, int(name), rounds.median(name), 0.0, cost


def job(sequence: int, batch: int, width: int, layers: int) -> StepJob:
    """A training step in float32 of a GPT-2 with half of every map."""
    fields = GPT2Config(n_embd=width, n_layer=layers, n_head=max(1, width // 64), vocab_size=8192, resid_pdrop=0.0,
                        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0)  # fmt: skip
    half, wide = FactorConfig(), FactorConfig(right=[2, 1])
    plan = plan_from_config(FactorsConfig(embedding=half, qkv=wide, o=half, mlp=wide), fields)
    maps = {name: str(shape) for name, shape in plan.resolve(fields).items()}
    return StepJob(fields.to_dict(), maps, sequence, batch, 3, "fp32", "cpu", 0)


def steps(curve: str, sizes: Mapping[int, StepJob]) -> Iterator[Row]:
    """Training steps, each in a process of its own; cost of a token: maps 12 D^2 and head V D, attention T D a layer.

    The teacher goes forward through all of it, the student forward and backward (three times as much) through half.
    """
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    peaks: dict[int, float] = {}
    for _ in range(_ROUNDS):
        for size, given in sizes.items():
            found = run_child(["-m", "kncompress.bench.step_process"], asdict(given))
            seconds[size] += found["seconds"]
            peaks[size] = float(found["peak"])
    for size, given in sizes.items():
        width, layers = given.architecture["n_embd"], given.architecture["n_layer"]
        maps = 2.5 * (12 * layers * width**2 + given.architecture["vocab_size"] * width)
        cost = given.tokens * (maps + 6 * layers * given.sequence * width)
        yield curve, size, statistics.median(seconds[size]), peaks[size], float(cost)


def rows(small: bool) -> Iterator[Row]:
    """All curves."""
    tokens, width, layers = (64, 64, 2) if small else (2048, 768, 4)
    counts = (tokens // 4, tokens // 2, tokens, 2 * tokens)
    yield from products("product, tokens", {count: (count, width, 1) for count in counts})
    yield from products("product, width", {side: (tokens, side, 1) for side in (width // 2, width, 2 * width)})
    yield from products("product, terms", {terms: (tokens, width, terms) for terms in (1, 2, 3, 4)})
    given = job(tokens // 16, 4, width, layers)
    longer = (given.sequence, 2 * given.sequence, 4 * given.sequence)
    yield from steps("step, sequence", {length: replace(given, sequence=length) for length in longer})
    yield from steps("step, batch", {batch: replace(given, batch=batch) for batch in (4, 8, 16)})
    wider = (width // 2, width, width * 3 // 2)
    yield from steps("step, width", {side: job(given.sequence, 4, side, layers) for side in wider})


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Power of ``sizes`` by which ``values`` grow: of the first and the last."""
    return math.log(values[-1] / values[0]) / math.log(sizes[-1] / sizes[0])


def draw(found: Sequence[Row], file: Path) -> None:
    """A panel for each curve: measured, and the formula's line through its largest size."""
    plt.rcParams["svg.hashsalt"] = "kncompress"
    names = list(dict.fromkeys(row[0] for row in found))
    figure, panels = plt.subplots(2, (len(names) + 1) // 2, figsize=(9, 5.5), squeeze=False)
    for name, axes in zip(names, panels.flat, strict=False):
        _, sizes, seconds, peaks, costs = zip(*(row for row in found if row[0] == name), strict=True)
        axes.plot(sizes, seconds, marker="o", label="seconds")
        axes.plot(sizes, [seconds[-1] * cost / costs[-1] for cost in costs], "--", color="grey", label="formula")
        if peaks[0]:
            axes.plot(sizes, [peak / 1e9 for peak in peaks], marker="s", label="peak, GB")
        axes.set(title=name, xscale="log", yscale="log")
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.grid(visible=True, alpha=0.3)
        axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})


def main(file: Path, small: bool) -> None:
    """Write the CSV and the picture, print the slopes."""
    keep_freed_memory()
    found = list(rows(small))
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows([("curve", "size", "seconds", "bytes", "cost"), *found])
    draw(found, file.with_suffix(".svg"))
    for curve in dict.fromkeys(row[0] for row in found):
        sizes, seconds, peaks, costs = zip(*(row[1:] for row in found if row[0] == curve), strict=True)
        line = f"{curve:<16} seconds ~ size^{slope(sizes, seconds):.2f}, formulas size^{slope(sizes, costs):.2f}"
        print(line + (f", peak ~ size^{slope(sizes, peaks):.2f}" if peaks[0] else ""))


if __name__ == "__main__":
    main(Path(sys.argv[1]), "small" in sys.argv[2:])
