"""Part ``tokens``: text to blocks of tokens, by the token cache and by ``datasets.map``; one text, one tokenizer."""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from kncompress.bench.measurement import OURS, Measurement
from kncompress.bench.setting import Setting
from kncompress.bench.timing import alternate
from kncompress.config import DataConfig
from kncompress.data.sources import read_split
from kncompress.data.tokenizer import load_tokenizer
from kncompress.data.tokens import Blocks, token_stream
from kncompress.training.student import locate

MAP = "datasets.map"
_CONTEXT = 128


def measure_tokens(setting: Setting) -> Iterator[Measurement]:
    """Seconds of the training split of ``data``: read, tokenised and cut into blocks of 128."""
    setting.say("tokens")
    name = setting.config.model.tokenizer or setting.config.model.path or "asset:mini"
    tokenizer = load_tokenizer(locate(name, "tokenizer", "model.tokenizer"))
    with tempfile.TemporaryDirectory(prefix="kncompress-bench-") as folder:
        data = _data(setting, Path(folder))
        ours, theirs = _by_cache(data, tokenizer, Path(folder)), _by_map(data, tokenizer)
        blocks, rows = ours(), theirs()
        if blocks != rows:
            raise RuntimeError(f"tokens: {blocks} blocks here, {rows} by datasets.map")
        rounds = alternate({OURS: ours, MAP: theirs}, setting.sizes.long_repeats, setting.device)
        seconds = rounds.median(OURS)
        yield Measurement(
            "tokens",
            f"{blocks:,} blocks of {_CONTEXT}",
            rounds.medians,
            {MAP: rounds.ratio(MAP, OURS)},
            MAP,
            more={"tokens/tokens_per_second": blocks * _CONTEXT / seconds},
        )


def _data(setting: Setting, folder: Path) -> DataConfig:
    """The text, its first characters alone where the size says so."""
    data, most = setting.config.data, setting.sizes.characters
    if most is None:
        return data
    kept, total = [], 0
    for document in read_split(data, "train"):
        kept.append(document[: most - total])
        total += len(kept[-1])
        if total >= most:
            break
    file = folder / "train.txt"
    file.write_text("\n\n".join(kept))
    (folder / "test.txt").write_text("none")
    return replace(data, source=str(file), validation=str(folder / "test.txt"), test=str(folder / "test.txt"))


def _by_cache(data: DataConfig, tokenizer: Any, folder: Path) -> Callable[[], int]:
    numbers = iter(range(10**9))

    def run() -> int:
        fresh = replace(data, cache_dir=str(folder / f"cache-{next(numbers)}"))
        return len(Blocks(token_stream(fresh, "train", tokenizer), _CONTEXT))

    return run


def _by_map(data: DataConfig, tokenizer: Any) -> Callable[[], int]:
    """As in transformers' own scripts: a batched fast tokenizer, then all tokens in a row and cut; kept in memory."""
    import datasets

    datasets.disable_progress_bars()
    end = [tokenizer.eos_token_id] if data.text_format != "lines" else []

    def encode(batch: dict[str, list[str]]) -> dict[str, Any]:
        rows = tokenizer(batch["text"], add_special_tokens=False, verbose=False)["input_ids"]
        return {"input_ids": [row + end for row in rows]}

    def pack(batch: dict[str, list[list[int]]]) -> dict[str, Any]:
        ids = list(chain.from_iterable(batch["input_ids"]))
        return {"input_ids": [ids[i : i + _CONTEXT] for i in range(0, len(ids) // _CONTEXT * _CONTEXT, _CONTEXT)]}

    def run() -> int:
        text = datasets.Dataset.from_dict({"text": list(read_split(data, "train"))})
        options: dict[str, Any] = {"batched": True, "keep_in_memory": True, "load_from_cache_file": False}
        tokens = text.map(encode, remove_columns=["text"], **options)
        # One batch: a rest at the end of each would be lost, and with it the equality of the two.
        return len(tokens.map(pack, batch_size=None, **options))

    return run
