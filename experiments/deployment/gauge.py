"""Which numbers of a packed map bear 4 bits: perplexity of a model whose maps and tables are rounded, in four ways.

    python experiments/deployment/gauge.py <folder of a model with packed maps> <text> <text> ...

Rounded as MatMulNBits has it: groups of 32 neighbours along the inputs share a scale and a zero.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kncompress.evaluation import perplexity
from kncompress.formats.pretrained import load_model
from kncompress.kron import PackedLinear
from kncompress.kron.packed import Packed, packed_weight

BITS, GROUP = 4, 32
TOKENS, WINDOW = 2048, 512
WAYS = ("not rounded", "packed", "packed, combinations fitted again", "outer products of the singular vectors")


def rounded(rows: Tensor) -> Tensor:
    """(rows, inputs) to the nearest of 16 values of each group."""
    width = rows.shape[1]
    groups = F.pad(rows, (0, -width % GROUP)).reshape(-1, GROUP)
    low, high = groups.amin(1, keepdim=True).clamp(max=0), groups.amax(1, keepdim=True).clamp(min=0)
    scale = ((high - low) / (2**BITS - 1)).clamp(min=1e-12)
    zero = torch.round(-low / scale)
    made = (torch.clamp(torch.round(groups / scale) + zero, 0, 2**BITS - 1) - zero) * scale
    return made.reshape(len(rows), -1)[:, :width]


def weight_of(layer: PackedLinear, way: str) -> Tensor:
    """(M, N): the map with its numbers rounded in this way."""
    if way == WAYS[3]:
        made = layer.unpacked()
        if isinstance(made, nn.Linear):
            return rounded(made.weight)
        return rounded(made.left[:, :, 0].T) @ rounded(made.right[:, 0])
    kept, mix, by_rows = layer.kept.data, layer.mix.data, layer.shape.side == "out"
    pivots = rounded(kept) if by_rows else rounded(kept.T).T
    if way == WAYS[2]:
        mix = torch.linalg.lstsq(pivots.double().T, (mix.T @ kept).double().T).solution.float()
    mix = rounded(mix.T).T if by_rows else rounded(mix)
    return packed_weight(Packed(pivots.contiguous(), mix.contiguous(), layer.order), layer.shape.side)


@torch.no_grad()
def main(folder: str, texts: list[str]) -> None:
    """Print a line for each way."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    parts = [Path(text).read_text(encoding="utf-8")[: 8 * TOKENS] for text in texts]
    tokens = [tokenizer(part, return_tensors="np")["input_ids"][0] for part in parts]
    for way in WAYS:
        model, errors = load_model(folder, dtype=torch.float32).eval(), [0.0]
        for parent in [*model.modules()] if way != WAYS[0] else []:
            for name, child in parent.named_children():
                if isinstance(child, PackedLinear):
                    dense, found = child.to_dense(), weight_of(child, way)
                    errors.append(float((found - dense.weight).norm() / dense.weight.norm()))
                    dense.weight.copy_(found)
                    setattr(parent, name, dense)
                elif isinstance(child, nn.Linear | nn.Embedding) and child is not model.get_output_embeddings():
                    child.weight.copy_(rounded(child.weight))
        scores = [perplexity(model, ids, WINDOW, batch_tokens=WINDOW, limit=TOKENS).perplexity for ids in tokens]
        error = sum(errors) / max(1, len(errors) - 1)
        print(f"{way}: error {error:.3f}, perplexity {' / '.join(f'{score:,.2f}' for score in scores)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
