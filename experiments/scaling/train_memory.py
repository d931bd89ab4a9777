"""Memory and processor seconds of a training step by option: a GPT-2 of random weights and its student.

The student has factors in place of the feed-forward maps and the embedding. ``train_memory.py`` writes train_memory.csv
anew, ``train_memory.py ROW ...`` adds rows to it. LAYERS, WIDTH, CONTEXT, BLOCKS (of a step) and STEPS in the
environment change the sizes. Of several processes the memory is that of the first, the seconds are their sum.
"""

import copy
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("train_memory.csv")
FIELDS = ("row", "layers", "width", "tokens", "processes", "before_gb", "peak_gb", "cpu_seconds_a_step", "loss")
SHARDS = {"strategy": "fsdp", "devices": 2}
ROWS: dict[str, dict[str, Any]] = {
    "plain": {},
    "recompute": {"recompute": True},
    "teacher bf16": {"teacher": "bf16"},
    "both": {"recompute": True, "teacher": "bf16"},
    "logits alone": {"inner": False},
    "logits alone, recompute": {"inner": False, "recompute": True},
    "no teacher": {"inner": False, "alone": True},
    "ddp, two processes": {"strategy": "ddp", "devices": 2},
    "fsdp, two processes": SHARDS,
    "fsdp, two processes, both": SHARDS | {"recompute": True, "teacher": "bf16"},
}
LAYERS, WIDTH, CONTEXT, BLOCKS, STEPS = (
    int(os.environ.get(name, value))
    for name, value in (("LAYERS", 12), ("WIDTH", 768), ("CONTEXT", 256), ("BLOCKS", 4), ("STEPS", 3))
)
VOCABULARY = 8192


def train(row: str) -> None:
    """Train, and print what was measured; Lightning starts this program again for the other processes."""
    import lightning as L
    import torch
    from lightning.pytorch.callbacks import Checkpoint
    from torch.utils.data import DataLoader
    from transformers import GPT2Config, GPT2LMHeadModel

    from kncompress.anatomy.plan import Plan, RightFactor
    from kncompress.bench.child import peak_memory
    from kncompress.compression.compress import compress_
    from kncompress.config import ObjectiveConfig, OptimizerConfig, TrainerConfig
    from kncompress.training.batches import BatchPlan
    from kncompress.training.checkpoints import WholeFileCheckpointIO
    from kncompress.training.pretraining import ILKDPretraining
    from kncompress.training.trainer import build_trainer, keep_freed_memory, quiet_lightning

    class Watch(Checkpoint):
        """As a ``Checkpoint`` it keeps Lightning from saving."""

        seconds = loss = 0.0

        def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, *_: Any) -> None:
            self.loss = float(outputs["loss"])
            if trainer.global_step == 1:  # the first step warms up
                self.seconds = -time.process_time()
            if trainer.global_step == STEPS:
                mine = torch.tensor(self.seconds + time.process_time())
                self.seconds = float(trainer.strategy.reduce(mine, reduce_op="sum")) / (STEPS - 1)

    quiet_lightning()
    keep_freed_memory()
    given = dict(ROWS[row])
    inner, alone = float(given.pop("inner", True)), given.pop("alone", False)
    config = TrainerConfig(accelerator="cpu", precision="fp32", validate_every=STEPS + 1, **given)
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "n_positions": CONTEXT, "n_embd": WIDTH, "n_layer": LAYERS}
    fields = GPT2Config(n_head=WIDTH // 64, bos_token_id=0, eos_token_id=0, **sizes)
    teacher: Any = GPT2LMHeadModel(fields)
    student = copy.deepcopy(teacher)
    plan = {"layers.*.mlp.*": RightFactor((2, 1)), "embedding": RightFactor((1, 2))}
    compress_(student, Plan(plan), "random")
    student.requires_grad_(True)
    if config.teacher == "bf16":
        teacher.to(torch.bfloat16)
    objective = ObjectiveConfig(
        embedding=inner, attention=inner, feed_forward=inner, logits=float(not alone), cross_entropy=1.0
    )
    module = ILKDPretraining(
        student, None if alone else teacher, objective, OptimizerConfig(lr=1e-4), STEPS, recompute=config.recompute
    )
    del teacher
    ids = torch.randint(0, VOCABULARY, (BLOCKS * STEPS, CONTEXT))
    blocks: Any = [{"input_ids": row, "labels": row} for row in ids]
    processes = int(config.devices)
    own = BLOCKS // processes
    share: Any = [blocks[n] for n in range(len(blocks)) if n % processes == int(os.environ.get("LOCAL_RANK", 0))]
    watch, before = Watch(), peak_memory(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        plan_of_batches = BatchPlan(CONTEXT, BLOCKS, own, 1, STEPS)
        trainer = build_trainer(config, plan_of_batches, Path(folder), [watch], [], WholeFileCheckpointIO())
        trainer.fit(module, DataLoader(share, batch_size=own))
        if trainer.is_global_zero:
            peak = peak_memory(torch.device("cpu"))
            tokens = BLOCKS * CONTEXT
            values = [row, LAYERS, WIDTH, tokens, processes, round(before / 1e9, 2), round(peak / 1e9, 2)]
            print("measured", json.dumps([*values, round(watch.seconds, 1), round(watch.loss, 4)]), flush=True)


def main(rows: list[str]) -> None:
    """A process for each row."""
    fresh = not rows or not RESULTS.exists()
    with RESULTS.open("w" if fresh else "a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if fresh:
            writer.writerow(FIELDS)
        for row in rows or ROWS:
            line = [sys.executable, __file__, "in", row]
            done = subprocess.run(line, capture_output=True, text=True, check=False)
            found = [text for text in done.stdout.splitlines() if text.startswith("measured ")]
            if not found:
                raise SystemExit(f"{row}: {done.stderr.strip()}")
            writer.writerow(json.loads(found[0].removeprefix("measured ")))
            file.flush()


if __name__ == "__main__":
    if sys.argv[1:2] == ["in"]:
        train(sys.argv[2])
    else:
        main(sys.argv[1:])
