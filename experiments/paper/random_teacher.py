"""What a dry run reads in the place of the hub: GPT-2 small and DistilGPT2's sizes with random weights, passages.

Usage: python experiments/paper/random_teacher.py TEACHER_FOLDER DISTILLED_FOLDER PASSAGES_FILE
The models have the mini teacher's tokenizer and GPT-2's 50,257 rows of the embedding.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

import kncompress


def main(teacher: Path, distilled: Path, passages: Path) -> None:
    """Write both models and the passages, the last of them last."""
    tokenizer = AutoTokenizer.from_pretrained(Path(kncompress.__file__).parent / "assets" / "mini")
    for folder, layers in ((distilled, 6), (teacher, 12)):
        torch.manual_seed(layers)
        GPT2LMHeadModel(GPT2Config(n_layer=layers)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    passages.write_text("The cat sat on the mat\nIt was a dark and stormy night\n")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
