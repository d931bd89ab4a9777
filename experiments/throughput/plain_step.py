"""Distillation as one would write it with transformers alone: full logits, attention maps, HF's Trainer.

The other side of part ``step`` of ``python -m kncompress bench``: the same student modules, tokens, batch, precision
and loss terms (KnGPT2's and the logits) as in ``train``; a process of its own, for its memory.

Usage: python experiments/throughput/plain_step.py JOB.json RESULT.json
"""

import json
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from kncompress.anatomy.sites import anatomy_of
from kncompress.bench.child import exchange, peak_memory
from kncompress.bench.step_job import WARM_UP, StepJob
from kncompress.bench.timing import synchronize
from kncompress.training.trainer import keep_freed_memory


class FeedForward:
    """The outputs of a model's feed-forward blocks."""

    def __init__(self, model: Any) -> None:
        family = anatomy_of(model).family
        self.outputs: list[Tensor] = []
        for layer in model.base_model.get_submodule(family.layers):
            layer.get_submodule(family.feed_forward).register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.outputs.append(output)

    def taken(self) -> list[Tensor]:
        """Those of the last forward pass."""
        outputs, self.outputs = self.outputs, []
        return outputs


class Distiller(Trainer):
    """HF's Trainer with a teacher."""

    def __init__(self, teacher: nn.Module, student: nn.Module, batch: int, **options: Any) -> None:
        super().__init__(model=student, **options)
        self.teacher, self.batch = teacher.to(self.args.device), batch
        self.of_student, self.of_teacher = FeedForward(student), FeedForward(teacher)
        self.losses: list[float] = []

    def get_train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_dataset, batch_size=self.batch)  # in order, as on the other side

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any) -> Any:
        ids, labels = inputs["input_ids"], inputs["labels"]
        asked = {"output_hidden_states": True, "output_attentions": True, "use_cache": False}
        ours = model(input_ids=ids, **asked)
        with torch.no_grad():
            theirs = self.teacher(input_ids=ids, **asked)
        attention = torch.stack([
            F.kl_div((student.float() + 1e-9).log(), teacher.float(), reduction="sum") / student[..., 0].numel()
            for student, teacher in zip(ours.attentions, theirs.attentions, strict=True)
        ]).mean()  # fmt: skip
        # KL(p || q) = sum p log p - p log q; kl_div takes p as it is and leaves terms of p = 0 out.
        feed_forward = torch.stack([
            F.mse_loss(student.float(), teacher.float())
            for student, teacher in zip(self.of_student.taken(), self.of_teacher.taken(), strict=True)
        ]).mean()  # fmt: skip
        embedding = F.mse_loss(ours.hidden_states[0].float(), theirs.hidden_states[0].float())
        logits = F.kl_div(
            ours.logits.float().log_softmax(-1), theirs.logits.float().log_softmax(-1), log_target=True, reduction="sum"
        ) / labels.numel()  # fmt: skip
        text = F.cross_entropy(ours.logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())
        loss = embedding + attention + feed_forward + logits + text
        self.losses.append(float(loss.detach()))
        return (loss, ours) if return_outputs else loss


class Clock(TrainerCallback):
    """When each step ended."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.ends = device, []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        synchronize(self.device)
        self.ends.append(time.perf_counter())


def main(job: StepJob) -> dict[str, Any]:
    """Seconds of the timed steps, the first loss, and the peak of memory."""
    if job.keep_memory:
        keep_freed_memory()
    teacher, student = job.models(attention="eager")  # fused attention returns no maps
    device = torch.device(job.device)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=job.all_steps, per_device_train_batch_size=job.batch, learning_rate=job.lr,
            adam_beta2=0.95, weight_decay=0.1, max_grad_norm=1.0, lr_scheduler_type="cosine",
            bf16=job.precision == "bf16", use_cpu=job.device == "cpu", report_to=[], save_strategy="no",
            logging_strategy="no", disable_tqdm=True, remove_unused_columns=False,
        )  # fmt: skip
        clock = Clock(device)
        blocks = job.blocks(Path(folder))
        trainer = Distiller(teacher, student, job.batch, args=arguments, train_dataset=blocks, callbacks=[clock])
        trainer.train()
    timed = clock.ends[WARM_UP - 1 :]
    seconds = [end - start for start, end in pairwise(timed)]
    return {"seconds": seconds, "waits": [], "loss": trainer.losses[0], "peak": peak_memory(device)}


if __name__ == "__main__":
    values, made = exchange(sys.argv[1:])
    made.write_text(json.dumps(main(StepJob(**values))))
