"""bfloat16 where the machine has nothing for it."""

import pytest
import torch

from kncompress.config import TrainerConfig
from kncompress.training.trainer import slow_bf16


@pytest.mark.parametrize(
    ("found", "given", "named"),
    [
        ({"avx512_bf16": False, "amx_bf16": False}, {"teacher": "bf16"}, "trainer.teacher=bf16"),
        ({"avx512_bf16": False, "amx_bf16": False}, {"precision": "bf16"}, "trainer.precision=bf16"),
        ({"avx512_bf16": False, "amx_bf16": False}, {}, None),
        ({"avx512_bf16": True, "amx_bf16": False}, {"teacher": "bf16", "precision": "bf16"}, None),
        ({}, {"teacher": "bf16"}, None),  # an older torch, which does not tell
    ],
)
def test_a_warning_where_it_would_be_slow(found, given, named, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    told = slow_bf16(TrainerConfig(accelerator="cpu", **given))
    assert told is None if named is None else told is not None and told.startswith(f"{named}: this CPU has no")
