"""Tokens per second in transformers itself, on the CPU: its cache that grows, its static one, and that one compiled.

GPT-2 small's sizes with random weights, dense and with the shapes of kngpt2, batch 1, 64 tokens after a prompt of
32, in turns. ``transformers_ways.py [rounds]``; to compile takes a C++ compiler.
"""

import copy
import statistics
import sys
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPT2Config

from kncompress.anatomy.plan import Plan, RightFactor
from kncompress.compression.compress import compress_

NEW = 64
WAYS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "static cache": {"cache_implementation": "static"},
    "static cache, compiled": {"cache_implementation": "static"},
}
OUT, IN = RightFactor((2, 1)), RightFactor((1, 2))
SHAPES = {"attn.q": OUT, "attn.k": OUT, "attn.v": OUT, "attn.o": IN, "mlp.*": OUT}
ODD = {f"layers.{layer}.{site}": shape for layer in range(1, 12, 2) for site, shape in SHAPES.items()}


def main(rounds: int) -> None:
    """Print a line for each way."""
    torch.manual_seed(0)
    dense = AutoModelForCausalLM.from_config(GPT2Config()).eval()
    student = copy.deepcopy(dense)
    compress_(student, Plan(ODD | {"embedding": IN}), "random")
    prompt = torch.randint(0, 50_000, (1, 32))
    models = {"dense": dense, "student": student}
    seconds: dict[tuple[str, str], list[float]] = {}
    for way, words in WAYS.items():
        for model in models.values():
            if "compiled" in way:
                model.forward = torch.compile(model.forward, dynamic=False)
            began = time.perf_counter()
            write(model, prompt, words)
            print(f"{way}: the first time {time.perf_counter() - began:.1f} s", flush=True)
        for _ in range(rounds):
            for name, model in models.items():
                began = time.perf_counter()
                write(model, prompt, words)
                seconds.setdefault((way, name), []).append(time.perf_counter() - began)
        speeds = {name: NEW / statistics.median(seconds[way, name]) for name in models}
        ratio = speeds["student"] / speeds["dense"]
        print(f"{way}: dense {speeds['dense']:.1f}, student {speeds['student']:.1f} tokens/s, {ratio:.2f}", flush=True)


def write(model: Any, prompt: torch.Tensor, words: dict[str, Any]) -> None:
    """The prompt and the tokens after it."""
    with torch.no_grad():
        model.generate(prompt, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0, **words)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
