"""What the paper's tables take: tokens, floating-point operations, and hours and money on one GPU and on eight.

Usage: python experiments/paper/costs.py [--peak TFLOPS] [--share OF_PEAK] [--price OF_A_GPU_HOUR]
The operations of a token are counted by torch.utils.flop_counter in real steps of GPT-2 small's sizes. Hours follow
from the peak of the GPU (an H100 in bfloat16: 990 TFLOP/s) and the share of it that is reached, which is assumed: less
for GLUE, whose batches of 32 short examples keep a GPU waiting.
"""

import argparse
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

from kncompress.cli.presets import read_factors
from kncompress.compression.student_plan import StudentPlan
from kncompress.config import ObjectiveConfig, OptimizerConfig
from kncompress.training.pretraining import ILKDPretraining
from kncompress.training.student import make_student

CONTEXT = 1024
OPENWEBTEXT, WIKITEXT103 = 0.1 * 9.04e9, 118e6
"""Training tokens of GPT-2's tokenizer: a tenth of the corpus (nanoGPT counts 9.04 billion), and the training split."""
GLUE_EXAMPLES = 8_551 + 67_349 + 3_668 + 363_846 + 5_749 + 392_702 + 104_743 + 2_490 + 635
"""Training examples of the nine tasks, CoLA first; as the data sets say."""
GLUE_LENGTH, GLUE_EPOCHS = 48, 3
"""Tokens of an example with its padding in a batch, assumed; epochs."""
FACTORS = Path(__file__).parents[2] / "conf" / "factors" / "kngpt2.yaml"
ILKD = {"embedding": 1.0, "attention": 1.0, "feed_forward": 1.0}


def operations(objective: ObjectiveConfig, teacher: bool, factored: bool) -> float:
    """Floating-point operations of a training step, for each of its tokens."""
    config = GPT2Config()
    dense = GPT2LMHeadModel(config)
    student = dense
    if factored:
        student, _ = make_student(dense, StudentPlan.of(read_factors(FACTORS), config), "random")
    module = ILKDPretraining(student, dense if teacher else None, objective, OptimizerConfig(), 1)
    ids = torch.randint(config.vocab_size, (1, CONTEXT))
    with FlopCounterMode(display=False) as counter:
        module.objective(*module.outputs(input_ids=ids), ids).total.backward()
    return counter.get_total_flops() / CONTEXT


def main(peak: float, share: float, glue_share: float, price: float, seeds: int) -> None:
    """Print a row for each part: tokens, operations, hours, money."""
    distilled = operations(ObjectiveConfig(**ILKD), teacher=True, factored=True)
    plain = operations(ObjectiveConfig(), teacher=False, factored=True)
    dense = operations(ObjectiveConfig(), teacher=False, factored=False)
    glue = seeds * GLUE_EXAMPLES * GLUE_LENGTH * GLUE_EPOCHS
    parts = [
        (4, "light pre-training of a student", OPENWEBTEXT, distilled, share),
        (6, "fine-tuning of a model on WikiText-103", WIKITEXT103, plain, share),
        (4, f"GLUE of a student, {seeds} seeds, plain", glue, plain, glue_share),
        (4, f"GLUE of a student, {seeds} seeds, ILKD", glue, distilled, glue_share),
        (1, f"GLUE of the teacher, {seeds} seeds", glue, dense, glue_share),
    ]
    print("| times | part | tokens of one | GFLOP a token | hours on 1 GPU, all | on 8 | money |")
    print("|---|---|---|---|---|---|---|")
    total = 0.0
    for count, name, tokens, each, reached in parts:
        hours = count * tokens * each / (peak * 1e12 * reached) / 3600
        total += hours
        row = (count, name, f"{tokens / 1e6:,.0f}M", f"{each / 1e9:.2f}", f"{hours:.1f}", f"{hours / 8:.1f}")
        print(f"| {' | '.join(map(str, row))} | {hours * price:,.0f} |")
    print(f"| | all of it | | | {total:.1f} | {total / 8:.1f} | {total * price:,.0f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="What the paper's tables take.")
    parser.add_argument("--peak", type=float, default=990.0, help="TFLOP/s of the GPU in bfloat16")
    parser.add_argument("--share", type=float, default=0.35, help="of the peak that is reached in long sequences")
    parser.add_argument("--glue-share", type=float, default=0.05, help="of the peak that is reached in GLUE")
    parser.add_argument("--price", type=float, default=3.0, help="of a GPU for an hour")
    parser.add_argument("--seeds", type=int, default=5, help="of GLUE")
    main(**vars(parser.parse_args()))
