"""What factoring a model saves and costs: a row for each map, and the totals."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kncompress.errors import UserError
from kncompress.reading import parse_json, read_json
from kncompress.terminal import text_table


@dataclass(frozen=True)
class MapRow:
    """One factored map. Multiply-adds are per token."""

    name: str
    shape: str
    parameters: int
    """Numbers in the factors, without bias; 0 for a head that shares the embedding's."""
    dense_parameters: int
    multiply_adds: int
    dense_multiply_adds: int
    error: float | None
    """||W - W_hat|| / ||W||, Frobenius; None for a random start."""
    weighted: float | None = None
    """Relative error of the outputs on the calibration text; of the embedding: of its rows and of what a tied head
    makes of them. None for a start without calibration."""


@dataclass(frozen=True)
class RepairErrors:
    """What block-wise repair did to the hidden states, on text that no step has seen, where there is enough.

    Errors: mean over tokens of |h - h_dense|^2 / |h_dense|^2 after each block, from the first that is not as it was.
    The errors of single maps are those of the fit before it.
    """

    before: tuple[float, ...]
    """Of the model as it was fitted."""
    after: tuple[float, ...]
    """Of the repaired one."""
    seconds: float

    def as_metrics(self) -> dict[str, float]:
        """Mean errors over the blocks and the time, as they stand in ``result.json``."""
        count = max(1, len(self.before))
        return {
            "blocks/before": sum(self.before) / count,
            "blocks/after": sum(self.after) / count,
            "seconds/repair": self.seconds,
        }


@dataclass(frozen=True)
class Arrangement:
    """Exact changes of the dense weights that were made before the fit: ``fit.symmetries``."""

    hidden: tuple[int, ...] = ()
    """Layers whose hidden units have another order."""
    values: tuple[int, ...] = ()
    """Layers whose values have another basis in each head."""
    queries: tuple[int, ...] = ()
    """Layers whose queries and keys have another basis in each head."""
    residual: tuple[int, ...] | None = None
    """Coordinate of the given model that each coordinate of the residual stream was; None: as they were."""


@dataclass(frozen=True)
class CompressionTable:
    """What ``compress_`` did: a row for each factored map, and totals of the whole model.

    Before is the model that ``compress_`` was given, with all its layers.
    """

    rows: tuple[MapRow, ...]
    parameters_before: int
    """Unique parameters of the whole model, biases and norms included, tied ones once."""
    parameters_after: int
    multiply_adds_before: int
    """Multiply-adds of all maps, dense ones included, per token; without attention itself."""
    multiply_adds_after: int
    layers: tuple[int, ...] | None = None
    """Layers of the given model that were kept, counted from 0; None: all of them."""
    seconds_moments: float = 0.0
    """Time that went into running the model on the calibration text and taking moments."""
    repair: RepairErrors | None = None
    """Block-wise reconstruction; None where there was none."""
    arrangement: Arrangement | None = None
    """None: no changes were asked for."""

    @property
    def mean_error(self) -> float | None:
        """Mean relative error over the factored weights, a tied head not counted again; None without any."""
        errors = [row.error for row in self.rows if row.error is not None and row.parameters]
        return sum(errors) / len(errors) if errors else None

    @property
    def weighted_error(self) -> float | None:
        """Mean relative error of the outputs on the calibration text, counted as ``mean_error``."""
        errors = [row.weighted for row in self.rows if row.weighted is not None and row.parameters]
        return sum(errors) / len(errors) if errors else None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, JSON-ready."""
        totals = {key: value for key, value in asdict(self).items() if key != "rows"}
        means = {"mean_error": self.mean_error, "weighted_error": self.weighted_error}
        return {**totals, **means, "rows": [asdict(row) for row in self.rows]}

    def as_json(self) -> str:
        """``as_dict`` as text."""
        return json.dumps(self.as_dict(), indent=2) + "\n"

    @classmethod
    def read(cls, file: Path, subject: str) -> "CompressionTable":
        """What ``as_json`` has written. Raises UserError, which begins with ``subject``, where it is damaged."""
        values = read_json(file, dict[str, Any], subject)
        own = json.dumps({key: value for key, value in values.items() if key not in ("mean_error", "weighted_error")})
        found = parse_json(own.encode(), cls, f"{subject}: {file.name}")
        order = None if found.arrangement is None else found.arrangement.residual
        if order is not None and sorted(order) != list(range(len(order))):
            raise UserError(f"{subject}: {file.name}: arrangement.residual: is no order of {len(order)} coordinates")
        return found

    def text(self) -> str:
        """A text table, one line a map, and the totals; after it the layers kept, where some were dropped, and what
        repair did, where there was any."""
        head = ("map", "shape", "parameters", "of", "multiply-adds", "of", "error", "on inputs")
        rows = [_cells(row) for row in self.rows]
        rows.append(
            ("model", "", f"{self.parameters_after:,}", f"{self.parameters_before:,}",
             f"{self.multiply_adds_after:,}", f"{self.multiply_adds_before:,}", _number(self.mean_error),
             _number(self.weighted_error))
        )  # fmt: skip
        text = [text_table(head, rows, "<<>>>>>>")]
        if self.layers is not None:
            text.append(f"layers kept: {', '.join(map(str, self.layers))}")
        if self.repair is not None:
            found = self.repair.as_metrics()
            text.append(
                f"repair of blocks: error {found['blocks/before']:.4f} before, {found['blocks/after']:.4f} after, "
                f"{self.repair.seconds:.0f} s"
            )
        return "\n".join(text)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _cells(row: MapRow) -> tuple[str, ...]:
    counts = (row.parameters, row.dense_parameters, row.multiply_adds, row.dense_multiply_adds)
    return (row.name, row.shape, *(f"{count:,}" for count in counts), _number(row.error), _number(row.weighted))
