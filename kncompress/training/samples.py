"""Short texts that teacher and student write by themselves, to look at."""

from collections.abc import Sequence
from typing import Any

import torch

from kncompress.config import SamplesConfig
from kncompress.data.tokens import TokenStream

PROMPT, TEXT, TEACHER, STUDENT = "prompt", "text", "teacher", "student"


def prompts(stream: TokenStream, settings: SamplesConfig, positions: int) -> torch.Tensor:
    """Beginnings from evenly spaced places of ``stream``: (count, prompt_tokens), int64.

    There are fewer, or shorter ones, where the text is too short; a prompt leaves room for at least one token among
    ``positions``, the model's context length.
    """
    length = min(settings.prompt_tokens, positions - 1, len(stream))
    count = min(settings.count, len(stream) // max(1, length)) if length else 0
    step = len(stream) // max(1, count)
    rows = [torch.as_tensor(stream.tokens[n * step : n * step + length].astype("int64")) for n in range(count)]
    if stream.first is not None:
        for row in rows:
            row[0] = stream.first
    return torch.stack(rows) if rows else torch.empty(0, 0, dtype=torch.int64)


@torch.no_grad()
def greedy(model: Any, ids: torch.Tensor, tokens: int, tokenizer: Any) -> list[str]:
    """What ``model`` writes after each prompt of ``ids`` (count, T), always the likeliest token.

    At most ``tokens`` new ones, fewer where the context of the model or the text ends. Randomness is not touched.
    """
    room = min(tokens, model.config.max_position_embeddings - ids.shape[1])
    end = model.config.eos_token_id
    end = tokenizer.eos_token_id if end is None else end
    given = ids.to(model.device)
    written = model.generate(
        given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=room,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=end,
        pad_token_id=end[0] if isinstance(end, list) else end,
    )
    return list(tokenizer.batch_decode(written[:, ids.shape[1] :], skip_special_tokens=True))


def write_samples(
    teacher: Any | None, student: Any, stream: TokenStream, tokenizer: Any, settings: SamplesConfig
) -> list[dict[str, str]]:
    """A row a prompt: ``prompt``, how ``text`` really goes on, and what ``teacher`` (where there is one) and
    ``student`` write. The models are in evaluation mode."""
    ids = prompts(stream, settings, student.config.max_position_embeddings)
    if not len(ids):
        return []
    models = {TEACHER: teacher, STUDENT: student} if teacher is not None else {STUDENT: student}
    texts = {name: greedy(model, ids, settings.tokens, tokenizer) for name, model in models.items()}
    return [
        {
            PROMPT: tokenizer.decode(ids[row], skip_special_tokens=True),
            TEXT: _continuation(stream, settings, row, len(ids), ids.shape[1], tokenizer),
            **{name: written[row] for name, written in texts.items()},
        }
        for row in range(len(ids))
    ]


def _continuation(
    stream: TokenStream, settings: SamplesConfig, row: int, count: int, length: int, tokenizer: Any
) -> str:
    begin = row * (len(stream) // count) + length
    following: Sequence[int] = stream.tokens[begin : begin + settings.tokens].tolist()
    return str(tokenizer.decode(following, skip_special_tokens=True))
