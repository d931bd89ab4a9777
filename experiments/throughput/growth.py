"""How time and memory grow with tokens, width, terms, sequence length and batch; the slopes, beside the formulas'.

Usage: python experiments/throughput/growth.py RESULTS.csv [small]
"""

import csv
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from transformers import GPT2Config

from kncompress.config import FactorConfig, FactorsConfig
from kncompress.evaluation.child import run_child
from kncompress.evaluation.step_job import StepJob
from kncompress.evaluation.timing import alternate
from kncompress.kron import KroneckerLinear, KroneckerShape
from kncompress.models.plan import plan_from_config
from kncompress.tasks.training import keep_freed_memory

Row = tuple[str, int, float, float, float]
"""What grows, its size, seconds, bytes (0: not measured), cost by the formulas in any unit."""
CPU = torch.device("cpu")


def products(tokens: int, width: int, terms: int) -> tuple[float, float]:
    """(seconds, multiply-adds) of the forward pass of a map of (4 width, width), right factors 4x1."""
    shape = KroneckerShape.fit(4 * width, width, [4, 1], terms)
    layer, x = KroneckerLinear(shape), torch.randn(tokens, width)
    with torch.no_grad():
        rounds = alternate({"": lambda: layer(x)}, 5, CPU)
    return rounds.median(""), float(tokens * shape.multiply_adds)


def job(sequence: int, batch: int, width: int, layers: int) -> StepJob:
    """A training step in float32 of a GPT-2 with half of every map."""
    fields = GPT2Config(n_embd=width, n_layer=layers, n_head=max(1, width // 64), vocab_size=8192, resid_pdrop=0.0,
                        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0)  # fmt: skip
    half, wide = FactorConfig(), FactorConfig(right=[2, 1])
    plan = plan_from_config(FactorsConfig(embedding=half, qkv=wide, o=half, mlp=wide), fields)
    maps = {name: str(shape) for name, shape in plan.resolve(fields).items()}
    return StepJob(fields.to_dict(), maps, sequence, batch, 3, "fp32", "cpu", 0)


def step(given: StepJob) -> tuple[float, float, float]:
    """(seconds, peak bytes, cost): maps 12 D^2 and head V D a token, a whole pass and 3 of half; attention T D."""
    found = run_child(["-m", "kncompress.evaluation.step_process"], asdict(given))
    seconds = sorted(found["seconds"])[len(found["seconds"]) // 2]
    width, layers = given.architecture["n_embd"], given.architecture["n_layer"]
    maps = 2.5 * (12 * layers * width**2 + given.architecture["vocab_size"] * width)
    return seconds, float(found["peak"]), given.tokens * (maps + 6 * layers * given.sequence * width)


def rows(small: bool) -> Iterator[Row]:
    """All curves."""
    tokens, width, layers = (64, 64, 2) if small else (2048, 768, 4)
    for count in (tokens // 4, tokens // 2, tokens, 2 * tokens):
        yield "product, tokens", count, *_timed(products(count, width, 1))
    for side in (width // 2, width, 2 * width):
        yield "product, width", side, *_timed(products(tokens, side, 1))
    for terms in (1, 2, 3, 4):
        yield "product, terms", terms, *_timed(products(tokens, width, terms))
    given = job(tokens // 16, 4, width, layers)
    for times in (1, 2, 4):
        yield "step, sequence", times * given.sequence, *step(replace(given, sequence=times * given.sequence))
    for times in (1, 2, 4):
        yield "step, batch", 4 * times, *step(replace(given, batch=4 * times))
    for side in (width // 2, width):
        yield "step, width", side, *step(job(given.sequence, 4, side, layers))


def _timed(found: tuple[float, float]) -> tuple[float, float, float]:
    seconds, cost = found
    return seconds, 0.0, cost


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Power of ``sizes`` by which ``values`` grow: of the first and the last."""
    return math.log(values[-1] / values[0]) / math.log(sizes[-1] / sizes[0])


def main(file: Path, small: bool) -> None:
    """Write the CSV, print the slopes."""
    keep_freed_memory()
    found = list(rows(small))
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows([("curve", "size", "seconds", "bytes", "cost"), *found])
    for curve in dict.fromkeys(row[0] for row in found):
        sizes, seconds, peaks, costs = zip(*(row[1:] for row in found if row[0] == curve), strict=True)
        line = f"{curve:<16} seconds ~ size^{slope(sizes, seconds):.2f}, formulas size^{slope(sizes, costs):.2f}"
        print(line + (f", peak ~ size^{slope(sizes, peaks):.2f}" if peaks[0] else ""))


if __name__ == "__main__":
    main(Path(sys.argv[1]), "small" in sys.argv[2:])
