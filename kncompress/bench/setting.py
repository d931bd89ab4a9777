"""What a benchmark runs on: device, type of numbers, sizes, the model's configuration, the machine's ceiling."""

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from kncompress.anatomy.plan import Plan
from kncompress.bench.machine import Ceiling, measure_ceiling
from kncompress.bench.operators import time_by_operator
from kncompress.compression.student_plan import StudentPlan
from kncompress.config import BenchConfig
from kncompress.errors import UserError
from kncompress.training.processes import accelerator
from kncompress.training.student import model_config
from kncompress.training.trainer import takes_bf16


@dataclass(frozen=True)
class Sizes:
    """How much each part measures."""

    tokens: int
    """Rows of a product; tokens of a training step."""
    sequence: int
    """Tokens in one sequence of a step."""
    repeats: int
    """Rounds of products, and of texts that are generated."""
    long_repeats: int
    """Rounds of what takes seconds: fits, tokenising, start-up."""
    processes: int
    """Training processes of each side."""
    steps: int
    """Timed training steps of a process, after two that warm up."""
    new_tokens: int
    batches: tuple[int, ...]
    """Sequences generated together."""
    side: int
    """Of the matrices whose product is the ceiling."""
    copied: int
    """Bytes of the copy that is the other."""
    characters: int | None
    """Of text that is tokenised; None: all."""


SIZES = {
    "full": Sizes(2048, 512, 7, 3, 2, 4, 64, (1, 8), 4096, 2**29, None),
    "small": Sizes(32, 16, 2, 1, 1, 2, 4, (1, 2), 128, 2**20, 20_000),
}
# The student of ``train`` has no dropout: the plain script's would be another loss.
_DROPOUTS = (
    *("resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout", "activation_dropout", "hidden_dropout"),
    *("dropout", "layerdrop"),
)
_SMALL_MODEL = {"n_layer": 2, "n_embd": 48, "n_head": 3, "vocab_size": 2048, "n_positions": 64}


@dataclass(frozen=True)
class Setting:
    """A benchmark's device, numbers and sizes."""

    config: BenchConfig
    fields: Any
    """transformers config of the model whose sizes are measured; its weights are random, without dropout."""
    sizes: Sizes
    device: torch.device
    dtype: torch.dtype

    @cached_property
    def ceiling(self) -> Ceiling:
        """Measured once."""
        return measure_ceiling(self.device, self.dtype, self.sizes.side, self.sizes.copied)

    @cached_property
    def float32_ceiling(self) -> Ceiling:
        """The same for float32."""
        if self.dtype == torch.float32:
            return self.ceiling
        return measure_ceiling(self.device, torch.float32, self.sizes.side, self.sizes.copied)

    @cached_property
    def plan(self) -> Plan:
        """Which map of the student becomes which Kronecker sum. Raises UserError where the factors do not fit."""
        return StudentPlan.of(self.config.factors, self.fields).maps

    @property
    def precision(self) -> str:
        """``bf16`` or ``fp32``."""
        return "bf16" if self.dtype == torch.bfloat16 else "fp32"

    @property
    def number_bytes(self) -> int:
        """Of one number."""
        return self.dtype.itemsize

    def operators(self, call: Callable[[], object]) -> dict[str, float]:
        """``time_by_operator`` where the configuration asks for it, else nothing."""
        return time_by_operator(call, self.device) if self.config.profile else {}

    def say(self, what: str) -> None:
        """Tell on standard error what is measured now."""
        print(f"bench: {what}", file=sys.stderr, flush=True)


def setting_of(config: BenchConfig) -> Setting:
    """The setting that a configuration asks for.

    Raises:
        UserError: no such model, or no GPU.
    """
    if config.accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError("accelerator=gpu: there is no GPU here; accelerator=cpu needs none")
    device = torch.device("cuda" if accelerator(config.accelerator) == "gpu" else "cpu")
    dtype = torch.bfloat16 if takes_bf16(config.precision, config.accelerator) else torch.float32
    sizes = SIZES[config.size]
    if config.tokens is not None:
        sizes = replace(sizes, tokens=config.tokens, sequence=min(sizes.sequence, config.tokens))
    if config.repeats is not None:
        sizes = replace(sizes, repeats=config.repeats, long_repeats=min(config.repeats, sizes.long_repeats))
        sizes = replace(sizes, processes=min(config.repeats, sizes.processes))
    return Setting(config, _fields(config), sizes, device, dtype)


def _fields(config: BenchConfig) -> Any:
    if config.size == "small":
        from transformers import GPT2Config

        fields = GPT2Config(**_SMALL_MODEL, bos_token_id=0, eos_token_id=0)
    else:
        fields = copy.deepcopy(model_config(config.model))
    for name in _DROPOUTS:
        if hasattr(fields, name):
            setattr(fields, name, 0.0)
    return fields


def random_model(fields: Any, seed: int, device: torch.device, dtype: torch.dtype) -> Any:
    """A causal language model with random weights, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    fields = copy.deepcopy(fields)  # compression writes into it
    return AutoModelForCausalLM.from_config(fields).to(device=device, dtype=dtype).eval()
