"""Training on GPUs: the same losses as on the CPU, by one device, ddp and fsdp; checkpoints that go from one to the
others. Needs a CUDA device."""

from pathlib import Path
from typing import Any

import pytest
import torch
from verbs.conftest import read
from verbs.test_sharded import MORE, same

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("strategy", ["auto", "ddp", "fsdp"])
def test_losses_are_those_of_the_cpu(process: Any, small: list[str], tmp_path: Path, strategy: str) -> None:
    devices = 1 if strategy == "auto" else torch.cuda.device_count()
    gpu = ["trainer.accelerator=gpu", f"trainer.strategy={strategy}", f"trainer.devices={devices}"]
    words = [*small, "trainer.batch_tokens=256", "trainer.steps=12"]
    results = []
    for name, more in (("cpu", ["trainer=cpu"]), ("gpu", gpu)):
        done = process("train", *words, *more, f"run_dir={tmp_path / name}")
        assert done.returncode == 0, done.stderr
        results.append(read(tmp_path / name, "result.json")["metrics"])
    cpu, cuda = results
    for key in ("parameters/student", "steps", "tokens"):
        assert cpu[key] == cuda[key]
    for key in ("perplexity/teacher", "perplexity/start", "perplexity/student", "kl/student"):
        assert cuda[key] == pytest.approx(cpu[key], rel=2e-2), key


def test_shards_train_as_one_gpu(process: Any, small: list[str], tmp_path: Path) -> None:
    """What ``test_sharded.py`` compares on CPUs."""
    words = [*small, *MORE, "trainer.accelerator=gpu", f"trainer.batch_tokens={128 * torch.cuda.device_count()}"]
    for name, more in (("one", []), ("shards", ["trainer.strategy=fsdp", "trainer.devices=auto"])):
        done = process("train", *words, *more, f"run_dir={name}")
        assert done.returncode == 0, done.stderr
    same(tmp_path / "one", tmp_path / "shards", 1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("strategy", "goes_on"), [("auto", "auto"), ("fsdp", "fsdp"), ("fsdp", "auto"), ("auto", "fsdp")]
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_interrupted_run_goes_on(
    process: Any, small: list[str], tmp_path: Path, strategy: str, goes_on: str, precision: str
) -> None:
    words = [*small, "trainer.accelerator=gpu", f"trainer.strategy={strategy}", "trainer.steps=8", "run_dir=run"]
    words.append(f"trainer.precision={precision}")
    first = process("train", *words)
    assert first.returncode == 0, first.stderr
    perplexity = read(tmp_path / "run", "result.json")["metrics"]["perplexity/student"]
    run = (tmp_path / "run" / "run.json").read_text()
    (tmp_path / "run" / "run.json").write_text(run.replace('"status": "finished"', '"status": "running"'))
    again = process("train", "resume=run", f"trainer.strategy={goes_on}")
    assert again.returncode == 0, again.stderr
    resumed = read(tmp_path / "run", "result.json")["metrics"]["perplexity/student"]
    assert resumed == pytest.approx(perplexity, rel=1e-3)
