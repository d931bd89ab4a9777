"""A model goes on with a text, one token after the other; several models can do so in step."""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kncompress.anatomy.sites import positions_of
from kncompress.config import GenerateConfig
from kncompress.evaluation.scoring import input_device


@dataclass(frozen=True)
class Writer:
    """A model, its tokenizer, and the name that it is shown under."""

    name: str
    model: Any
    tokenizer: Any


@dataclass
class Continuation:
    """A text as it grows."""

    text: str = ""
    """What follows the prompt, as far as it is certain."""
    tokens: int = 0
    stopped: str = ""
    """Why it ended: ``end`` (the model's end of text), ``tokens`` (as many as asked for) or ``context`` (the model has
    no further positions)."""


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """The prompt's tokens; of an empty one the beginning of a text."""
    ids: list[int] = tokenizer(prompt, verbose=False)["input_ids"]
    return ids or [tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id]


def continuation(writer: Writer, prompt: str, config: GenerateConfig, seed: int) -> Iterator[Continuation]:
    """What a model writes after ``prompt``: one object, yielded again after each token.

    Random numbers depend on ``seed`` alone: one for each token, drawn on the CPU. So two similar models with the same
    seed write similar texts.

    Args:
        writer: a model that predicts the next token, with positions left after the prompt.
        config: tokens, temperature (0: the likeliest token) and the like.
    """
    start = prompt_ids(writer.tokenizer, prompt)
    prefix = writer.tokenizer.decode(start, skip_special_tokens=True)
    ends = _end_tokens(writer)
    found, new = Continuation(), list[int]()
    for token in _tokens(writer.model, start, config, seed):
        found.tokens += 1
        if token in ends:
            found.stopped = "end"
            break
        new.append(token)
        text = writer.tokenizer.decode(start + new, skip_special_tokens=True).removeprefix(prefix)
        if not text.endswith("\ufffd") and text.startswith(found.text):  # else a character's further bytes follow
            found.text = text
        yield found
        if found.tokens == config.tokens:
            found.stopped = "tokens"
            break
    found.stopped = found.stopped or "context"
    found.text = writer.tokenizer.decode(start + new, skip_special_tokens=True).removeprefix(prefix)
    yield found


def _end_tokens(writer: Writer) -> set[int]:
    ends = writer.model.generation_config.eos_token_id
    return {writer.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}


def _tokens(model: Any, start: list[int], config: GenerateConfig, seed: int) -> Iterator[int]:
    """Tokens without end, up to the model's last position."""
    process = _processors(config)
    generator = torch.Generator().manual_seed(seed)
    ids, cache = torch.tensor([start], device=input_device(model)), None
    known = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
    if "past_key_values" in known:  # models without such a cache read everything anew
        options["use_cache"] = True
    while ids.shape[1] <= positions_of(model.config):
        with torch.inference_mode():
            earlier: dict[str, Any] = {} if cache is None else {"past_key_values": cache}
            output = model(input_ids=ids if cache is None else ids[:, -1:], **options, **earlier)
            cache = getattr(output, "past_key_values", None) if "past_key_values" in known else None
            scores = process(ids, output.logits[:, -1].float())
        token = _drawn(scores[0].cpu(), config.temperature, generator)
        yield token
        ids = torch.cat([ids, ids.new_tensor([[token]])], dim=1)


def _processors(config: GenerateConfig) -> LogitsProcessorList:
    """transformers' own, in its order."""
    process = LogitsProcessorList()
    if config.repetition_penalty != 1:
        process.append(RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    if config.temperature > 0:
        process.append(TemperatureLogitsWarper(config.temperature))
        if config.top_k is not None:
            process.append(TopKLogitsWarper(config.top_k))
        if config.top_p < 1:
            process.append(TopPLogitsWarper(config.top_p))
    return process


def _drawn(scores: Tensor, temperature: float, generator: torch.Generator) -> int:
    """The likeliest token, or the one at which the cumulated probability passes a number drawn from [0, 1)."""
    if temperature == 0:
        return int(scores.argmax())
    share = torch.rand((), generator=generator, dtype=torch.float64)
    order = scores.argsort(descending=True, stable=True)
    cumulated = scores[order].double().softmax(-1).cumsum(-1)
    last = int(torch.isfinite(scores).sum()) - 1
    return int(order[min(int(torch.searchsorted(cumulated, share, right=True)), last)])
