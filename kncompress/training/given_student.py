"""A student that exists already: one that was compressed or trained before, or anybody's smaller model."""

from dataclasses import replace
from typing import Any

import torch

from kncompress.anatomy.sites import family_of
from kncompress.compression.compress import CompressionTable, unique_parameters
from kncompress.config import ObjectiveConfig
from kncompress.errors import UserError
from kncompress.formats.pretrained import load_config, load_model
from kncompress.runs.past_runs import COMPRESSION
from kncompress.training.student import follow_order_, locate


def load_student(path: str, teacher: Any) -> tuple[Any, CompressionTable | None]:
    """A student that exists (float32), and the table that ``compress`` or ``train`` has kept beside it, if any.

    Where that table tells of another order of the residual coordinates, ``teacher`` gets it, in place.
    """
    folder = locate(path, key="student")
    student = load_model(folder, dtype=torch.float32).requires_grad_(True)
    file = folder.parent / COMPRESSION
    table = CompressionTable.read(file, f"student={path}") if file.is_file() else None
    if table is not None:
        known = (table.parameters_before, table.parameters_after)
        if known == (unique_parameters(teacher), unique_parameters(student)):
            follow_order_(teacher, table)
            return student, replace(table, repair=None)  # that is told by the run that did it
    return student, None


def check_student(path: str, teacher: Any, objective: ObjectiveConfig | None, key: str = "student") -> Any:
    """The transformers config of a student that exists.

    Args:
        path: its folder or hub id, the value of ``key``.
        teacher: the teacher's config.
        objective: compares the two; None: nothing does.

    Raises:
        UserError: it cannot read the teacher's tokens, or not be compared with it.
    """
    where = f"{key}={path}"
    student = load_config(locate(path, "config", key))
    if student.vocab_size != teacher.vocab_size:
        raise UserError(
            f"{where}: has {student.vocab_size} token ids and the teacher {teacher.vocab_size}; both read the "
            "teacher's tokens"
        )
    if objective is None:
        return student
    ours, theirs = family_of(student).sizes(student), family_of(teacher).sizes(teacher)
    if ours["layers"] > theirs["layers"]:
        raise UserError(f"{where}: has {ours['layers']} layers, more than the teacher's {theirs['layers']}")
    features = [name for name in ("embedding", "hidden", "feed_forward") if getattr(objective, name)]
    if features and ours["width"] != theirs["width"]:
        raise UserError(
            f"{where}: is {ours['width']} wide and the teacher {theirs['width']}; objective.{features[0]} compares "
            "equal widths, so set it and its like to 0"
        )
    if objective.attention and student.num_attention_heads != teacher.num_attention_heads:
        raise UserError(
            f"{where}: has {student.num_attention_heads} attention heads and the teacher "
            f"{teacher.num_attention_heads}; objective.attention compares equal numbers, so set it to 0"
        )
    return student
