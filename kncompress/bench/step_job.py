"""A training step as both sides of the benchmark take it: same models, tokens, loss terms, batch and precision."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kncompress.anatomy.plan import Plan
from kncompress.bench.setting import random_model
from kncompress.compression.compress import compress_
from kncompress.config import ObjectiveConfig
from kncompress.data.tokens import Blocks, TokenStream
from kncompress.kron import parse_shape

WARM_UP = 2
"""Steps before the timed ones."""


@dataclass(frozen=True)
class StepJob:
    """What a process trains. Everything is plain data, to be sent to it."""

    architecture: dict[str, Any]
    """Of the transformers config, ``model_type`` among it."""
    maps: dict[str, str]
    """{map: shape} of the student."""
    sequence: int
    batch: int
    """Sequences in a step."""
    steps: int
    """Timed steps."""
    precision: str
    """``bf16`` (autocast) or ``fp32``."""
    device: str
    """``cpu`` or ``cuda``."""
    seed: int
    lr: float = 1e-4
    keep_memory: bool = False
    """Whether the plain script has the allocator keep what is freed, as ``train`` does."""

    @property
    def all_steps(self) -> int:
        """Those that warm up too."""
        return self.steps + WARM_UP

    @property
    def tokens(self) -> int:
        """Of one step."""
        return self.batch * self.sequence

    def models(self, attention: str = "sdpa") -> tuple[Any, Any]:
        """Teacher and student, float32 on the CPU: random weights and the factors nearest to them."""
        from transformers import AutoConfig

        values = dict(self.architecture)
        fields = AutoConfig.for_model(values.pop("model_type"), **values)
        fields._attn_implementation = attention
        teacher = random_model(fields, self.seed, torch.device("cpu"), torch.float32)
        student = copy.deepcopy(teacher)
        compress_(student, Plan({name: parse_shape(shape) for name, shape in self.maps.items()}), "nearest")
        return teacher.requires_grad_(False), student.requires_grad_(True)

    def blocks(self, folder: Path) -> Blocks:
        """Random tokens in a file, read as training reads its own."""
        count = self.tokens * self.all_steps
        vocabulary = self.architecture["vocab_size"]
        tokens = np.random.default_rng(self.seed).integers(0, vocabulary, count, np.uint32)
        file = folder / "tokens.bin"
        file.write_bytes(tokens.tobytes())
        return Blocks(TokenStream(np.memmap(file, np.uint32, mode="r"), 1, count), self.sequence)


OBJECTIVE = ObjectiveConfig(embedding=1.0, attention=1.0, feed_forward=1.0, logits=1.0, cross_entropy=1.0)
"""KnGPT2's terms and the logits, as in ``objective=ilkd``."""
