"""Part ``generate``: new tokens a second, with a cache, by the student, its teacher and the student made dense."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from kncompress.anatomy.plan import Plan
from kncompress.bench.measurement import OURS, Measurement
from kncompress.bench.setting import Setting, random_model
from kncompress.bench.timing import alternate
from kncompress.compression.compress import compress_
from kncompress.compression.inspection import predict
from kncompress.formats.pretrained import to_dense

TEACHER, MATERIALISED = "dense", "materialised"
_PROMPT = 16
_PROFILED = 16
"""Tokens of which a profile is taken: it keeps note of a thousand operators for each."""


def measure_generation(setting: Setting, plan: Plan) -> Iterator[Measurement]:
    """``generate`` for one sequence, ``generate/batch_B`` for more; the weights are random."""
    seed, sizes = setting.config.seed, setting.sizes
    dense = random_model(setting.fields, seed, setting.device, setting.dtype)
    student = random_model(setting.fields, seed, setting.device, setting.dtype)
    compress_(student, plan, "random")
    models = {OURS: student, TEACHER: dense, MATERIALISED: to_dense(student)}
    tokens = min(sizes.new_tokens, setting.fields.max_position_embeddings - _PROMPT)
    table = predict(setting.fields, plan)
    read, dense_read = (_weights(model) * setting.number_bytes for model in (student, dense))
    for batch in sizes.batches:
        setting.say(f"generate: {batch} x {tokens} tokens")
        calls = {name: _call(model, batch, tokens) for name, model in models.items()}
        rounds = alternate(calls, sizes.long_repeats, setting.device)
        flops = 2 * batch * table.multiply_adds_after
        name = "generate" if batch == 1 else f"generate/batch_{batch}"
        yield Measurement(
            name,
            f"{batch} x {tokens} new tokens",
            rounds.medians,
            {rival: rounds.ratio(rival, OURS) for rival in (TEACHER, MATERIALISED)},
            TEACHER,
            dense_read / read if batch == 1 else None,
            tokens * setting.ceiling.seconds(flops, read),
            more={f"{name}/tokens_per_second": batch * tokens / rounds.median(OURS)},
            operators=setting.operators(_call(student, batch, min(tokens, _PROFILED))),
        )


def _weights(model: Any) -> int:
    """Numbers of the weights that a new token reads: all but tables that are only looked up."""
    looked_up = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    looked_up.append(model.get_input_embeddings())  # factored or not
    tables = {id(p) for module in looked_up for p in module.parameters()}
    head = {id(p) for p in model.get_output_embeddings().parameters()}
    return sum(p.numel() for p in model.parameters() if id(p) in head or id(p) not in tables)


def _call(model: Any, batch: int, tokens: int) -> Callable[[], object]:
    ids = torch.arange(_PROMPT, device=model.device).expand(batch, -1)
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "use_cache": True, "pad_token_id": 0}
    return lambda: model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, **options)
