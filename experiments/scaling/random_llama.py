"""Writes a folder with a Llama of random weights in bfloat16, a file a layer: random_llama.py 1.1B <folder>."""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

SIZES = {
    "0.3B": (24, 1024, 2816, 16),
    "1.1B": (22, 2048, 5632, 32),
    "3B": (26, 3200, 8640, 32),
    "7B": (32, 4096, 11008, 32),
    "70B": (80, 8192, 28672, 64),
}
"""Layers, width, hidden width of the feed-forward, heads: of queries, four to one of keys and values."""
VOCABULARY = 32000


def config_of(name: str, layers: int | None = None) -> LlamaConfig:
    """Of a size; ``layers``: so many instead of the size's own."""
    all_layers, width, hidden, heads = SIZES[name]
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers or all_layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )


def main(name: str, folder: Path, layers: int | None = None) -> None:
    """Draw every tensor from its own seed and write a file a layer."""
    config = config_of(name, layers)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    files: dict[str, list[str]] = {}
    for key in model.state_dict():
        layer = key.split(".")[2] if ".layers." in key else "ends"
        files.setdefault(f"model-{layer}.safetensors", []).append(key)
    for file, keys in files.items():
        tensors = {}
        for key in keys:
            shape = model.state_dict()[key].shape
            draw = torch.Generator().manual_seed(hash_of(key))
            fresh = torch.ones(shape) if len(shape) == 1 else 0.02 * torch.randn(shape, generator=draw)
            tensors[key] = fresh.bfloat16()
        save_file(tensors, folder / file, {"format": "pt"})
    weights = {key: file for file, keys in files.items() for key in keys}
    total = 2 * sum(p.numel() for p in model.parameters())
    index = {"metadata": {"total_size": total}, "weight_map": weights}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    print(f"{name}: {total / 2e9:.3f} billion parameters in {folder}")


def hash_of(key: str) -> int:
    """A seed for each tensor."""
    return sum(ord(char) * 31**place for place, char in enumerate(key)) % 2**31


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:]))
