"""``data.source=model``: the text that the model itself writes, for where no text is at hand.

Documents are drawn from the model's own distribution, in batches, and kept as rows in the cache. Their key is all that
decides them: weights, tokenizer, settings and seed. A batch is a file that is written whole, so a drawing that was
killed goes on where it stopped, and more tokens later are further batches.
"""

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from kncompress.compression.moments import weights_digest
from kncompress.config import DataConfig
from kncompress.data.sources import OWN, entries
from kncompress.data.tokenizer import first_token
from kncompress.data.tokens import cache_root, tokenizer_fingerprint
from kncompress.errors import UserError
from kncompress.runs.whole_file import write_text
from kncompress.terminal import Progress


def with_own_text(data: DataConfig, model: Any, tokenizer: Any) -> DataConfig:
    """``data`` with the entry ``model`` of its sources replaced by files of text that ``model`` writes.

    Args:
        data: what it asks for; where it does not name the model's text it is returned as it is.
        model: causal model of transformers, on any device.
        tokenizer: the model's.

    Raises:
        UserError: the cache cannot be written, or the model ends every text at once.
    """
    named = entries(data.source)
    if OWN not in named:
        return data
    files = draw(data, model, tokenizer)
    return replace(data, source=[path for name in named for path in (files if name == OWN else [name])])


def draw(data: DataConfig, model: Any, tokenizer: Any) -> list[str]:
    """Files of rows with ``data.own.tokens`` tokens or a little more, those of the cache first."""
    settings = {key: value for key, value in asdict(data.own).items() if key != "tokens"}
    decides = json.dumps([settings, data.seed, tokenizer_fingerprint(tokenizer), weights_digest(model)], sort_keys=True)
    root = cache_root(data.cache_dir)
    folder = root / "own" / hashlib.sha256(decides.encode()).hexdigest()[:32]
    files: list[str] = []
    tokens = 0
    with Progress("drawing the model's own text") as progress:
        while tokens < data.own.tokens:
            file = folder / f"batch-{len(files):05}.jsonl"
            if not file.is_file():
                rows = _batch(model, tokenizer, data, len(files))
                try:
                    folder.mkdir(parents=True, exist_ok=True)
                    write_text(file, "".join(json.dumps(row) + "\n" for row in rows))
                except OSError as error:
                    raise UserError(f"data.cache_dir={root}: cannot be written ({error.strerror or error})") from error
            found = _tokens(file)
            if not found:
                raise UserError("data.source=model: the model ends every text at once; give a text")
            tokens += found
            files.append(str(file))
            progress.show(min(1.0, tokens / data.own.tokens), f"{tokens:,} of {data.own.tokens:,} tokens")
    return files


def _tokens(file: Path) -> int:
    return sum(int(json.loads(line)["tokens"]) for line in file.read_text().splitlines())


@torch.no_grad()
def _batch(model: Any, tokenizer: Any, data: DataConfig, number: int) -> list[dict[str, Any]]:
    """Documents of one batch: {"text", "tokens"}. The state of torch's random numbers is left as it was."""
    own, device = data.own, next(model.parameters()).device
    first = first_token(tokenizer)
    begin = tokenizer.eos_token_id if first is None else first
    ids = torch.full((own.batch, 1), begin, device=device)
    length = min(own.length, model.config.max_position_embeddings - 1)
    was_training = model.training
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed((data.seed << 20) + number)
        written = model.eval().generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=own.temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=length,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )[:, 1:]
    model.train(was_training)
    rows = []
    for row in written.tolist():
        row = row[: row.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in row else row
        text = tokenizer.decode(row, skip_special_tokens=True)
        if text.strip():
            rows.append({"text": text, "tokens": len(row)})
    return rows
