"""The text that factors are fitted on, and the progress that is shown meanwhile."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from kncompress.compression.layerwise import CalibrationText
from kncompress.compression.work import Progress as FitProgress
from kncompress.config import CalibrationConfig, DataConfig
from kncompress.data.pieces import spread_tokens
from kncompress.data.sources import sources_of, without_own
from kncompress.data.tokenizer import first_token
from kncompress.errors import UserError
from kncompress.terminal import Progress

LONGEST = 1024
"""Tokens in a block where neither ``calibration.context`` nor ``data.context`` says."""


def check_calibration(data: DataConfig, calibration: CalibrationConfig, fields: Any) -> None:
    """Cheap checks of the text: the source is there, the blocks fit the model (its config: ``fields``).

    Raises UserError.
    """
    sources_of(without_own(data))
    _context(data, calibration, fields)


def _context(data: DataConfig, calibration: CalibrationConfig, fields: Any) -> int:
    positions = fields.max_position_embeddings
    given = calibration.context
    if given is not None and given > positions:
        raise UserError(f"calibration.context={given}: the model has {positions} positions")
    return given or data.context or min(positions, LONGEST)


def calibration_text(
    data: DataConfig, calibration: CalibrationConfig, fields: Any, tokenizer: Any, more: int = 0
) -> CalibrationText:
    """Tokens from all over the training split and its sources, as blocks (``spread_tokens``).

    Args:
        data: names the text.
        calibration: number of tokens, context, and where moments are kept.
        fields: transformers config of the model.
        tokenizer: the model's.
        more: tokens after those of ``calibration``.

    Raises:
        UserError: there is no text.
    """
    tokens = spread_tokens(data, tokenizer, calibration.tokens + more)
    context = _context(data, calibration, fields)
    return CalibrationText(tokens, context, moments=calibration.moments, first=first_token(tokenizer))


@contextmanager
def fit_progress(stream: TextIO | None = None) -> Iterator[FitProgress]:
    """A bar with the time left on a terminal, else a line now and then; on ``stream``, standard error.

    Processes other than the first of a run show nothing.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        yield lambda what, share: None
        return
    began = time.monotonic()
    with Progress("fitting", stream=stream) as progress:

        def tell(what: str, share: float) -> None:
            if progress.due:
                left = f"about {(time.monotonic() - began) * (1 - share) / share:.0f} s left  " if share > 0 else ""
                progress.show(share, f"{share:.0%}  {left}{what}")

        yield tell
