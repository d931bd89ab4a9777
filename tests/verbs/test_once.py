"""A journey is straight: a job's configuration is composed once, checked once and planned once."""

import importlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl

from kncompress.cli import job as running
from kncompress.cli import sweep_jobs
from kncompress.compression import student_plan


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the real program composes (through Hydra), types, checks and plans, from now on."""
    found: Counter[str] = Counter()

    def count(owner: Any, name: str, what: str) -> None:
        real: Callable[..., Any] = getattr(owner, name)

        def counted(*args: Any, **options: Any) -> Any:
            found[what] += 1
            return real(*args, **options)

        monkeypatch.setattr(owner, name, counted)

    count(ConfigLoaderImpl, "load_configuration", "composed")
    count(sweep_jobs, "typed", "typed")
    count(running, "typed", "typed")
    count(student_plan, "plan_from_config", "planned")
    for verb in ("compress", "train"):
        count(importlib.import_module(f"kncompress.commands.{verb}"), "check", "checked")
    return found


def test_compress(command: Any, tiny: Path, text: Path, counts: Counter[str]) -> None:
    words = ["start=calibrated", f"data.source={text}", "calibration.tokens=128", "repair.passes=1", "run_dir=run"]
    code, _, err = command("compress", f"model={tiny}", *words)
    assert code == 0, err
    assert counts == {"composed": 1, "typed": 1, "checked": 1, "planned": 1}


def test_train_and_a_run_that_is_found_finished(command: Any, small: list[str], counts: Counter[str]) -> None:
    code, _, err = command("train", *small, "resume=auto", "trainer.steps=1", "samples.count=0", "run_dir=run")
    assert code == 0, err
    assert counts == {"composed": 1, "typed": 1, "checked": 1, "planned": 1}


def test_a_sweep(command: Any, tiny: Path, counts: Counter[str]) -> None:
    """The sweep itself is composed besides its jobs: it tells who lists them."""
    words = [f"model={tiny}", "factors=kngpt2,kngpt2_odd_ffn,dense", "run_dir=s"]
    code, _, err = command("compress", "-m", *words)
    assert code == 0, err
    assert counts == {"composed": 1 + 3, "typed": 3, "checked": 3, "planned": 3}
    counts.clear()
    code, _, err = command("compress", "-m", *words)  # nothing is missing
    assert code == 0, err
    assert counts["composed"] == 1 + 3 and counts["checked"] == 3
