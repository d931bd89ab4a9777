"""Memory, disk and time that a run will need, and ``compress``'s, from a config alone, before anything is written.

Sizes in bytes, for a student that is made part by part (``parts``). The constants are measured
(experiments/scaling/README.md); the terms are what is held at once: the program, a layer or the embedding in its stored
type and in float32, the numbers of the fit of its largest map, and the text's states.
"""

import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kncompress.anatomy.layerdrop import config_of_layers
from kncompress.anatomy.mapped import ONE_FILE
from kncompress.anatomy.sites import Anatomy, Site, anatomy_of
from kncompress.compression.compress import CompressionTable
from kncompress.compression.inspection import predict
from kncompress.compression.rows import ROOM
from kncompress.compression.student_plan import StudentPlan
from kncompress.compression.work import fit_cost, moment_cost
from kncompress.config import CompressConfig
from kncompress.errors import UserError
from kncompress.kron import Shape

PROGRAM = 560e6
"""Python, torch and transformers, with nothing read."""
NEAREST = 24
"""Bytes for each number of the largest map that is fitted to its weight alone, beside the layer."""
ENDS = 14
"""The same of embedding and head, with the numbers themselves."""
CALIBRATED_ENDS = 33
"""The same of an embedding that is weighed by the tokens of a text."""
SYMMETRIC = 8 * 5
"""Bytes for each number of a moment of inputs, (N, N), that is prepared: float64 five times at most."""
FELT = 8 * 6
"""The same of a moment of gradients, (M, M)."""
GRAM = 8
"""Bytes for each number of a Gram matrix, (H, H), of what is put into another order."""
TURNED_ENDS = 22
"""The same of ``ENDS`` where another order of the columns is tried."""
START_SECONDS, SECONDS_A_NUMBER = 8.0, 15e-9
"""Of the program's start, and of reading, checking, fitting to the weight alone and writing one number."""
_GB = 1e9


@dataclass(frozen=True)
class Forecast:
    """What a run will need."""

    memory: float
    """Largest resident set, bytes."""
    disk: float
    """Bytes in the run folder at most, and for the time of the run beside it."""
    operations: float
    """Multiply-adds, about."""
    numbers: int
    """Numbers of the dense model, each of which is read, checked and written a few times."""
    verb: str = "compress"
    """What is going to run."""

    def seconds(self) -> float:
        """About how long it takes here: matrix products as fast as one that takes a tenth of a second."""
        import torch

        size, began, done = 512, time.perf_counter(), 0
        one = torch.ones(size, size)
        while time.perf_counter() - began < 0.1:
            one @ one
            done += size**3
        rate = done / (time.perf_counter() - began)
        return START_SECONDS + SECONDS_A_NUMBER * self.numbers + self.operations / rate

    def line(self, seconds: float | None = None) -> str:
        """In one line; ``seconds``: as told by ``seconds()``."""
        told = "" if seconds is None else f", about {_duration(seconds)} on this machine"
        return f"needs {self.memory / _GB:.1f} GB of memory and {self.disk / _GB:.1f} GB of disk{told}"

    def check(self, folder: Path, there: int = 0) -> None:
        """Raises UserError where memory or the disk of ``folder`` is too small; ``there``: bytes written already."""
        subject = f"run_dir={folder}"
        place = next(parent for parent in [folder, *folder.parents] if parent.exists())
        free = shutil.disk_usage(place).free + there
        if free < self.disk:
            raise UserError(f"{subject}: {free / _GB:.1f} GB of disk are free there, and {self.verb} {self.line()}")
        available = available_memory()
        if available is not None and available < self.memory:
            raise UserError(f"model: {available / _GB:.1f} GB of memory are free, and {self.verb} {self.line()}")


def forecast(config: CompressConfig, fields: Any, plan: StudentPlan) -> Forecast:
    """What ``compress`` with this configuration will need.

    Args:
        config: start, text, fit and type.
        fields: transformers config of the dense model.
        plan: what becomes of it.

    Raises:
        UserError: as ``predict``.
    """
    table = predict(fields, plan.maps, plan.layers)
    anatomy = anatomy_of(fields if plan.layers is None else config_of_layers(fields, plan.layers))
    shapes = plan.maps.resolve(anatomy)
    dtype = str(getattr(fields, "dtype", None) or "float32") if config.dtype == "stored" else config.dtype
    itemsize = 4 if config.model.gguf_file or "16" not in dtype else 2
    return Forecast(
        _memory(config, anatomy, shapes, table, itemsize),
        _disk(config, anatomy, table, itemsize),
        _operations(config, anatomy, shapes),
        table.parameters_before,
    )


def _layer_numbers(anatomy: Anatomy) -> int:
    return sum(site.out_features * site.in_features for site in anatomy.sites.values() if site.layer == 0)


def _width(anatomy: Anatomy) -> int:
    return anatomy.sites["layers.0.attn.q"].in_features


def _felt(config: CompressConfig) -> bool:
    return config.start_reads_text and config.fit.sides == "both"


def _rows(config: CompressConfig, anatomy: Anatomy) -> tuple[float, float]:
    """Bytes of the states at all layers, entering and coming back, and of the rows of one layer."""
    tokens, layer = config.calibration.tokens, [site for site in anatomy.sites.values() if site.layer == 0]
    states = 4.0 * tokens * _width(anatomy)
    inputs = {(site.group, site.mirrored): site.in_features for site in layer}
    rows = 4.0 * tokens * sum(inputs.values())
    if not _felt(config):
        return 0.0, rows
    return 2 * states * anatomy.layers, rows + 4.0 * tokens * sum(site.out_features for site in layer)


def _memory(
    config: CompressConfig, anatomy: Anatomy, shapes: Mapping[str, Shape], table: CompressionTable, itemsize: int
) -> float:
    sites = [anatomy.sites[name] for name in shapes]
    ends = [site.out_features * site.in_features for site in sites if site.layer is None]
    maps = [site for site in sites if site.layer is not None]
    layer = (4 + itemsize) * _layer_numbers(anatomy)
    peaks: list[float] = [(CALIBRATED_ENDS if config.start_reads_text else ENDS) * size for size in ends]
    largest = max((site.out_features * site.in_features for site in maps), default=0)
    if not config.start_reads_text:
        peaks.append(layer + NEAREST * largest)
    else:
        tokens = config.calibration.tokens
        states = 4.0 * tokens * _width(anatomy) * (2 if config.start == "sequential" else 1)
        held, rows = _rows(config, anatomy)
        kept = min(held, ROOM) + min(rows, ROOM) + states
        for site in maps:
            moments = SYMMETRIC * site.in_features**2 + (FELT * site.out_features**2 if _felt(config) else 0)
            peaks.append(layer + kept + moments + NEAREST * site.out_features * site.in_features)
    if config.fit.symmetries:
        peaks += _arranging(config, anatomy, maps, layer, TURNED_ENDS * max(ends, default=0))
    whole = table.parameters_after * itemsize
    if whole <= ONE_FILE:
        peaks.append(whole)
    if config.repair.passes:  # the student, of which the repair comes last
        peaks = [peak + 4.0 * table.parameters_after for peak in peaks]
    if config.model.gguf_file:  # read as a whole, and then laid down in files
        peaks.append(whole_from_gguf(anatomy, table.parameters_before))
    return PROGRAM + max(peaks)


def whole_from_gguf(anatomy: Anatomy, numbers: int) -> float:
    """Bytes of a model of so many numbers while it is read: all in float32, and the embedding twice more."""
    site = anatomy.sites["embedding"]
    return 4.0 * (numbers + 2 * site.out_features * site.in_features)


def _arranging(
    config: CompressConfig, anatomy: Anatomy, maps: Sequence[Site], layer: float, ends: float
) -> Iterator[float]:
    """What the search for another order or basis holds: a layer, Gram matrices and the fits that are tried."""
    which, text = config.fit.symmetries, config.start_reads_text
    largest = NEAREST * max((site.out_features * site.in_features for site in maps), default=0)
    for site in maps:
        if site.mirrored and "hidden" in which:
            grams = GRAM * site.in_features**2 * len({other.kind for other in maps if other.group == "mlp"})
            moments = 2 * SYMMETRIC * site.in_features**2 if text else 0
            yield layer + grams + min(grams, ROOM) + 2 * GRAM * site.in_features**2 + largest + moments
    if "residual" in which:
        grams = GRAM * _width(anatomy) ** 2
        yield min((len(maps) + 1) * grams, ROOM) + 2 * grams + max(layer + largest, ends)


def _disk(config: CompressConfig, anatomy: Anatomy, table: CompressionTable, itemsize: int) -> float:
    whole = float(table.parameters_after * itemsize)
    twice = whole if whole <= ONE_FILE else 0.0  # the parts, and the file that is made of them
    held, rows = _rows(config, anatomy) if config.start_reads_text else (0.0, 0.0)
    files = max(0.0, held - ROOM) + max(0.0, rows - ROOM)
    if config.model.gguf_file:
        files += 4.0 * table.parameters_before
    if config.fit.symmetries:  # the dense weights, as they are changed
        files += table.parameters_before * (4.0 if "heads" in config.fit.symmetries else itemsize)
    return whole + max(twice, files) + 5e6


def _operations(config: CompressConfig, anatomy: Anatomy, shapes: Mapping[str, Shape]) -> float:
    tokens, total = config.calibration.tokens, 0.0
    calibrated = config.start_reads_text
    for name, shape in shapes.items():
        total += fit_cost(anatomy.sites[name], shape, calibrated, config.fit.sweeps, _felt(config))
        if calibrated and anatomy.sites[name].layer is not None:
            # In sequence the moments are of what both models read, and of how far that is apart.
            total += moment_cost([anatomy.sites[name]], tokens) * (3 if config.start == "sequential" else 1)
    if calibrated:
        passes = 6 if _felt(config) else 1
        total += passes * tokens * _layer_numbers(anatomy) * anatomy.layers
    return total


def available_memory() -> int | None:
    """Bytes that this process could still take; None where the system does not tell."""
    if sys.platform != "linux":
        return None
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return None


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
