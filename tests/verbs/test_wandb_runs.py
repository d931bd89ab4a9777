"""What real runs of ``train`` leave in W&B, read back from their offline logs field by field."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from verbs.conftest import read
from wandb_log import history, merged, of_kind, offline_log


@pytest.fixture
def wandb_words(small: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return [word for word in small if word != "logger=csv"]


def _table(folder: Path, path: str) -> list[dict[str, Any]]:
    """A logged table, by the file that its history row names."""
    (file,) = folder.glob(f"wandb/offline-run-*/files/{path}")
    content = json.loads(file.read_text())
    return [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]


def test_every_field_of_the_jobs_of_a_sweep(command: Any, wandb_words: list[str]) -> None:
    words = [*wandb_words, "factors.mlp.right=[1,2],[2,2]", "factors.mlp.terms=2", "factors.layers=all"]
    code, _, err = command("train", "-m", *words, "run_dir=shapes", "logger.project=p", "logger.tags=[mine]")
    assert code == 0, err
    logs = [offline_log(Path("shapes", number)) for number in "01"]
    starts = [of_kind(log, "run")[0] for log in logs]
    assert len({start.run_id for start in starts}) == 2
    for number, (log, start) in enumerate(zip(logs, starts, strict=True)):
        folder = Path("shapes", str(number))
        result = read(folder, "result.json")["metrics"]
        assert (start.project, start.run_group, start.display_name) == ("p", "shapes", str(number))
        assert list(start.tags) == ["mine", "kngpt2"]

        config = merged(log, "config")
        saved = yaml.safe_load((folder / "config.yaml").read_text())
        for key in ("factors", "objective", "optimizer", "trainer", "data", "seed", "start"):
            assert config[key] == saved[key], key
        assert config["parameters/student"] == result["parameters/student"]
        assert config["compression/ratio"] == result["parameters/student"] / result["parameters/teacher"]
        assert config["compression/factors"] == ["1x2 1x2*2 2x1 2x1*2", "1x2 2x1 2x2*2"][number]
        assert config["compression/terms"] == 2 and config["compression/start"] == "nearest"
        assert config["compression/calibration_tokens"] == 0

        rows = history(log)
        terms = [row for row in rows if "train/loss" in row]
        with (folder / "metrics.csv").open(newline="") as file:
            steps = [step for step in csv.DictReader(file) if step["train/loss"]]
        assert len(terms) == len(steps) == 4
        for name in ("loss", "embedding", "attention", "feed_forward", "logits", "cross_entropy"):
            key = f"train/{name}"
            if saved["objective"].get(name, 1.0) > 0:
                assert [row[key] for row in terms] == [float(step[key]) for step in steps], key
        assert any(row.get("validation/perplexity", 0) > 1 for row in rows)
        assert merged(log, "summary")["perplexity/student"] == result["perplexity/student"]

        (maps,) = [row for row in rows if "maps/path" in row]
        fitted = read(folder, "compression.json")["rows"]
        table = _table(folder, maps["maps/path"])
        assert [(row["name"], row["shape"], row["error"]) for row in table] == [
            (row["name"], row["shape"], row["error"]) for row in fitted
        ]
        (picture,) = folder.glob(f"wandb/offline-run-*/files/{maps['maps_picture/path']}")
        drawn = [
            value for line in json.loads(picture.read_text())["data"][0]["z"] for value in line if value is not None
        ]
        assert sorted(drawn) == sorted(row["error"] for row in fitted)

        (samples,) = [row for row in rows if "samples/path" in row]
        assert _table(folder, samples["samples/path"]) == read(folder, "samples.json")

        (artifact,) = [entry for entry in of_kind(log, "artifact") if entry.type == "model"]
        plan = json.loads(artifact.metadata)["plan"]
        assert plan == {row["name"]: row["shape"] for row in fitted}
        names = {entry.path for entry in artifact.manifest.contents}
        assert {"model.safetensors", "config.json", "tokenizer.json", "compression.json"} <= names
        weights = next(entry for entry in artifact.manifest.contents if entry.path == "model.safetensors")
        assert Path(weights.local_path).samefile(folder / "model" / "model.safetensors")  # not copied
        assert [record.exit_code for record in of_kind(log, "exit")] == [0] and not of_kind(log, "alert")
    _dashboards_find_what_they_show(logs[0], set(saved["objective"]) - {n for n, w in saved["objective"].items() if w})


def _dashboards_find_what_they_show(log: list[Any], without_weight: set[str]) -> None:
    """Every name in the panels of ``dashboard`` is one that the run has logged."""
    pytest.importorskip("wandb_workspaces", reason="wandb-workspaces is not installed (extra dashboard)")
    from kncompress.reports.dashboard import as_json, workspace

    panels = as_json(workspace("team", "p", "Compression"))
    config, summary, logged = merged(log, "config"), merged(log, "summary"), set().union(*history(log))
    shown = {kind: set(re.findall(rf'"{kind}:([^".]+)(?:\.value[^"]*)?"', panels)) for kind in ("config", "summary")}
    assert len(shown["config"]) >= 5 and shown["config"] <= set(config)
    assert shown["summary"] == {"parameters/student", "perplexity/student"} <= set(summary)
    series = set(re.findall(r'"((?:train|validation)/[a-z_]+)"', panels)) - {f"train/{n}" for n in without_weight}
    assert len(series) >= 5 and series <= logged
    assert {"maps_picture/path", "maps/path", "samples/path"} <= logged


def test_divergence_alerts_and_ends_as_failed(command: Any, wandb_words: list[str]) -> None:
    words = [*wandb_words, "optimizer.lr=1e30", "optimizer.warmup=0", "trainer.gradient_clip=0", "trainer.steps=20"]
    code, _, _ = command("train", *words, "run_dir=run", "logger.artifact=false", "samples.count=0")
    assert code == 1
    log = offline_log(Path("run"))
    (told,) = of_kind(log, "alert")
    assert told.title == "training diverged" and "is not finite" in told.text and told.level == "ERROR"
    assert [record.exit_code for record in of_kind(log, "exit")] == [1]
    assert not [entry for entry in of_kind(log, "artifact") if entry.type == "model"]
    assert not Path("run/samples.json").exists()


def test_a_failure_before_the_first_step_ends_the_run_there_too(
    command: Any, wandb_words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no device")

    monkeypatch.setattr("kncompress.commands.train.build_trainer", fail)
    code, _, err = command("train", *wandb_words, "run_dir=run")
    assert code == 1 and err.endswith("kncompress: RuntimeError: no device\n")
    assert [record.exit_code for record in of_kind(offline_log(Path("run")), "exit")] == [1]
    assert read(Path("run"), "run.json")["status"] == read(Path("run"), "result.json")["status"] == "failed"
