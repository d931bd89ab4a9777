"""What a run shows in W&B beside its metrics: facts to group by, every map, samples, the model, and alerts.

All of it is for the loggers of one run; those that are not W&B's are passed over, and a run without them does not
import ``wandb``.
"""

from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger

from kncompress.config import FactoringConfig
from kncompress.reports.figures import maps_figure
from kncompress.runs.logged_names import MAPS, MAPS_PICTURE, SAMPLES

_MAP_COLUMNS = ("name", "shape", "parameters", "dense_parameters", "error", "weighted")
_SAMPLE_COLUMNS = ("prompt", "text", "teacher", "student")


def compression_facts(
    config: FactoringConfig, facts: Mapping[str, float], maps: Sequence[Mapping[str, Any]]
) -> dict[str, float | int | str]:
    """Plain scalars of one compression for the W&B config, so that dashboards can group, sort and filter by them.

    Args:
        facts: ``parameters/student`` and, where there is a teacher, ``parameters/teacher``, among others.
        maps: rows of the compression table.

    Returns:
        ``facts`` and ``compression/`` ``ratio`` (parameters, student to teacher), ``factors`` (right factors, e.g.
        ``1x2 2x1*2``), ``terms`` (most of any map), ``maps`` (factored ones), ``start`` and ``calibration_tokens``.
    """
    shapes = [str(row["shape"]) for row in maps]
    rights = [" + ".join(part.partition("(x)")[2].strip() for part in shape.split("+")) for shape in shapes]
    found: dict[str, float | int | str] = {
        **facts,
        "compression/factors": " ".join(sorted(set(rights))) or "dense",
        "compression/terms": max((_terms(shape) for shape in shapes), default=0),
        "compression/maps": len(maps),
        "compression/start": config.start,
        "compression/calibration_tokens": config.calibration.tokens if config.needs_text else 0,
    }
    if "parameters/teacher" in facts:
        found["compression/ratio"] = facts["parameters/student"] / facts["parameters/teacher"]
    return found


def _terms(shape: str) -> int:
    """Summed products of a shape: ``8x8(x)2x2*3 + 16x1(x)1x16`` has four."""
    return sum(int(part.rpartition("*")[2]) if "*" in part.partition("(x)")[2] else 1 for part in shape.split("+"))


def log_maps(loggers: Sequence[Logger], maps: Sequence[Mapping[str, Any]]) -> None:
    """Every factored map: a table ``maps`` of shapes, parameters and errors, and ``maps_picture``, a heat map of the
    errors where plotly is installed, else W&B's own bar chart."""
    for run in _runs(loggers) if maps else ():
        import wandb

        cells: list[Any] = [[row.get(name) for name in _MAP_COLUMNS] for row in maps]
        table = wandb.Table(columns=list(_MAP_COLUMNS), data=cells)
        picture: Any
        if find_spec("plotly") is not None:
            picture = wandb.Plotly(maps_figure({"maps": maps}))
        else:
            picture = wandb.plot.bar(table, "name", "error", title="relative error of the maps")
        run.log({MAPS: table, MAPS_PICTURE: picture})


def log_samples(loggers: Sequence[Logger], rows: Sequence[Mapping[str, str]]) -> None:
    """The texts of ``samples.json`` as a table, a row a prompt."""
    columns = [name for name in _SAMPLE_COLUMNS if rows and name in rows[0]]
    for run in _runs(loggers) if columns else ():
        import wandb

        cells: list[Any] = [[row[name] for name in columns] for row in rows]
        run.log({SAMPLES: wandb.Table(columns=list(columns), data=cells)})


def log_model(
    loggers: Sequence[Logger], folder: Path, table: Path, maps: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any]
) -> None:
    """The model folder as an artifact ``model-<run id>``, with its plan (shape of every map) and metrics as metadata,
    and the compression table, where there is one, beside the weights.

    Files are named where they lie, not copied: of an offline run they are there until ``wandb sync`` uploads them.
    """
    for run in _runs(loggers):
        import wandb

        plan = {str(row["name"]): str(row["shape"]) for row in maps}
        artifact = wandb.Artifact(f"model-{run.id}", type="model", metadata={"plan": plan, "metrics": dict(metrics)})
        artifact.add_dir(str(folder), skip_cache=True, policy="immutable")
        if table.is_file():
            artifact.add_file(str(table), table.name, skip_cache=True, policy="immutable")
        run.log_artifact(artifact)


def alert(loggers: Sequence[Logger], title: str, text: str) -> None:
    """Tell whoever watches the project, by the ways that they have chosen in W&B."""
    for run in _runs(loggers):
        run.alert(title, text, level="ERROR")


def _runs(loggers: Sequence[Logger]) -> Iterator[Any]:
    return (logger.experiment for logger in loggers if isinstance(logger, WandbLogger))
