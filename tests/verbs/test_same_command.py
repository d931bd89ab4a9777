"""The same command again, after it was stopped: it finishes the work, and takes nothing that is not its own."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from glue_layout import make_glue
from safetensors.torch import load_file, save_file
from verbs.conftest import read

from kncompress.compression.parts import Parts
from kncompress.errors import UserError
from kncompress.planner.budget import MapHarms, Reference
from kncompress.planner.candidates import Option, packed
from kncompress.planner.harm import HarmMeter
from kncompress.planner.kept_harms import KeptHarms
from kncompress.runs.lock import held


def stop(folder: Path, *keep: str) -> None:
    """Make the run in ``folder`` look as after a kill: without its end and its outputs, but for those of ``keep``."""
    run = read(folder, "run.json") | {"status": "running", "ended": None}
    (folder / "run.json").write_text(json.dumps(run))
    for name in {"result.json", "compression.json", "plan.yaml", "inspect.json"} - set(keep):
        (folder / name).unlink(missing_ok=True)


@pytest.fixture
def lines(tiny: Path, text: Path, tmp_path: Path) -> dict[str, list[str]]:
    """{verb: words} that make it small."""
    data = [f"data.source={text}", f"data.cache_dir={tmp_path / 'cache'}"]
    return {
        "compress": [f"model={tiny}", "factors.mlp.right=[2,1]", "start=nearest"],
        "export": [f"model={tiny}", "format=dense"],
        "evaluate": [f"model={tiny}", *data, "tokens=64"],
        "inspect": [f"model={tiny}"],
    }


@pytest.mark.parametrize("verb", ["compress", "export", "evaluate", "inspect"])
def test_a_stopped_run_is_begun_again(command: Any, lines: dict[str, list[str]], verb: str) -> None:
    words = [verb, *lines[verb], "run_dir=run"]
    assert command(*words)[0] == 0
    before = read(Path("run"), "result.json")
    assert command(*words)[:1] == (2,)  # it is finished
    stop(Path("run"))
    code, _, err = command(*words, "seed=3")
    assert code == 2 and "seed=3: the run in" in err and "has seed=0" in err and err.count("\n") == 1
    assert read(Path("run"), "run.json")["status"] == "running" and not Path("run/result.json").exists()
    code, _, err = command(*words)
    assert code == 0, err
    after, record = read(Path("run"), "result.json"), read(Path("run"), "run.json")
    assert after["status"] == record["status"] == "finished" and len(record["resumes"]) == 1
    assert {k: v for k, v in after["metrics"].items() if "seconds" not in k} == {
        k: v for k, v in before["metrics"].items() if "seconds" not in k
    }


@pytest.mark.parametrize("start", ["nearest", "calibrated"])
def test_a_stopped_compress_keeps_its_layers(
    command: Any, tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: str
) -> None:
    """No model until it is whole; another text, plan or model is refused; the folder has the same bits."""
    own = tmp_path / "own.txt"
    own.write_text(text.read_text() if text.is_file() else next(text.glob("*.txt")).read_text())
    shutil.copytree(tiny, "mine")
    words = ["compress", "model=mine", "factors=kngpt2", f"start={start}", f"data.source={own}"]
    words += ["calibration.tokens=256", f"data.cache_dir={tmp_path / 'cache'}"]
    assert command(*words, "run_dir=whole")[0] == 0
    keep = Parts.keep

    def stopped(self: Parts, stage: str, errors: Any) -> None:
        if len(list(self.folder.glob("*.json"))) == 2:
            raise KeyboardInterrupt
        keep(self, stage, errors)

    monkeypatch.setattr(Parts, "keep", stopped)
    assert command(*words, "run_dir=cut")[0] == 130
    monkeypatch.setattr(Parts, "keep", keep)
    parts = {file.name: file.stat().st_mtime_ns for file in Path("cut/parts").iterdir()}
    assert len(parts) == 4 and not Path("cut/model").exists()
    code, _, err = command(*words, "run_dir=cut", "factors.mlp.terms=2")
    assert code == 2 and "factors.mlp.terms=2: the run in" in err and err.count("\n") == 1
    content = own.read_text()
    own.write_text(content + " more")
    if start == "calibrated":
        code, _, err = command(*words, "run_dir=cut")
        assert code == 2 and "is not what the run began with" in err and err.count("\n") == 1
    own.write_text(content)
    shutil.copytree("mine", "other")
    code, _, err = command(*words, "model=other", "run_dir=cut")
    assert code == 2 and "other: the run in" in err and err.count("\n") == 1
    weights = load_file("mine/model.safetensors")
    weights["transformer.h.1.mlp.c_fc.weight"][0, 0] += 1
    save_file(weights, "mine/model.safetensors", {"format": "pt"})
    code, _, err = command(*words, "run_dir=cut")
    assert code == 2 and "is not what the run began with" in err and err.count("\n") == 1
    shutil.copy("other/model.safetensors", "mine/model.safetensors")
    with held(Path("cut")):
        code, _, err = command(*words, "run_dir=cut")
        assert code == 2 and err.endswith("cut: another process is at work in it; wait or name another folder\n")
        assert err.count("\n") == 1
    assert {file.name: file.stat().st_mtime_ns for file in Path("cut/parts").iterdir()} == parts
    code, _, err = command(*words, "run_dir=cut")
    assert code == 0, err
    assert not Path("cut/parts").exists()
    names = sorted(file.name for file in Path("whole/model").iterdir())
    assert names == sorted(file.name for file in Path("cut/model").iterdir())
    for name in set(names) - {"README.md"}:  # which tells the seconds
        assert Path("whole/model", name).read_bytes() == Path("cut/model", name).read_bytes(), name


@pytest.mark.parametrize("short", ["memory", "disk"])
def test_too_little_room_is_told_before_anything_is_written(
    command: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch, short: str
) -> None:
    if short == "memory":
        monkeypatch.setattr("kncompress.compression.forecast.available_memory", lambda: 10**8)
    else:
        monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10**5))
    code, _, err = command("compress", f"model={tiny}", "run_dir=run")
    assert code == 2 and f" GB of {short} are free" in err and err.count("\n") == 1
    assert not Path("run").exists()


@pytest.mark.parametrize("trace", ["model", "result.json"])
def test_a_folder_without_a_record_is_not_taken(command: Any, lines: dict[str, list[str]], trace: str) -> None:
    Path("run").mkdir()
    Path("run", trace).write_text("{}")
    code, _, err = command("compress", *lines["compress"], "run_dir=run")
    assert code == 2 and f"holds another run ({trace})" in err and [p.name for p in Path("run").iterdir()] == [trace]


def test_what_a_kill_before_the_record_leaves_is_taken_again(command: Any, lines: dict[str, list[str]]) -> None:
    words = ["inspect", *lines["inspect"], "run_dir=run"]
    assert command(*words)[0] == 0
    for file in Path("run").iterdir():
        if file.name not in (".hydra", "config.yaml", "inspect.log"):
            file.unlink()
    (Path("run") / ".run.json.123.tmp").write_text("{")
    code, _, err = command(*words)
    assert code == 0, err
    for file in [*Path("run").rglob("*")]:  # a kill while Hydra writes
        if file.is_file() and file.name != "inspect.log" and file != Path("run/.hydra/config.yaml"):
            file.unlink()
    assert command(*words)[0] == 0
    (Path("run") / "mine.log").write_text("the user's")
    Path("run/run.json").unlink()
    assert command(*words)[0] == 2 and Path("run/mine.log").read_text() == "the user's"


def test_harms_are_kept_to_the_last_digit_and_measured_once(tmp_path: Path) -> None:
    harms = MapHarms("mlp.up", 6, 6, (Option("keep", 6, 6, 0.0),), (Reference(0.1, 1 / 3),))
    kinds: dict[str, Any] = {"mlp.up": [[packed(8, 6, 2)]]}
    kept = KeptHarms(tmp_path / "harms")
    assert kept.harms("mlp.up", lambda: harms) == harms and kept.kinds(lambda: kinds) == kinds

    def again() -> Any:
        raise AssertionError("measured twice")

    assert KeptHarms(tmp_path / "harms").harms("mlp.up", again) == harms
    assert KeptHarms(tmp_path / "harms").kinds(again) == kinds
    (tmp_path / "harms" / "mlp.up.json").write_text("{")
    with pytest.raises(UserError, match=rf"run_dir={tmp_path}: mlp\.up\.json: is damaged"):
        kept.harms("mlp.up", again)
    (tmp_path / "harms" / "mine").touch()
    kept.remove(["mlp.up"])
    assert [file.name for file in (tmp_path / "harms").iterdir()] == ["mine"]


@pytest.mark.slow
def test_a_plan_keeps_its_harms_as_they_come(
    command: Any, tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["plan", f"model={tiny}", f"data.source={text}", f"data.cache_dir={tmp_path / 'cache'}", "budget=0.6"]
    words += ["calibration.tokens=512", "harm_tokens=64", "validation_tokens=64", "precision=fp32", "sums=false"]
    measure: Callable[..., float] = HarmMeter.kl
    asked: list[list[str]] = []

    def limited(limit: int) -> Callable[..., float]:
        def kl(self: HarmMeter, weights: Any) -> float:
            asked.append(list(weights))
            if len(asked) > limit:
                raise KeyboardInterrupt
            return measure(self, weights)

        return kl

    monkeypatch.setattr(HarmMeter, "kl", limited(10**6))
    assert command(*words, "run_dir=whole")[0] == 0
    every = len(asked)
    asked.clear()
    monkeypatch.setattr(HarmMeter, "kl", limited(every // 2))
    assert command(*words, "run_dir=run")[0] == 130
    kept = {file.name for file in Path("run/harms").iterdir()}
    assert "kinds.json" in kept and len(kept) > 2 and not Path("run/harm.json").exists()
    asked.clear()
    monkeypatch.setattr(HarmMeter, "kl", limited(10**6))
    code, _, err = command(*words, "run_dir=run")
    assert code == 0, err
    assert len(asked) <= every // 2 + 3 and not Path("run/harms").exists()
    ours, theirs = read(Path("run"), "harm.json"), read(Path("whole"), "harm.json")
    assert ours["maps"] == theirs["maps"] and len(ours["together"]) == len(theirs["together"])
    for one, other in zip(ours["together"], theirs["together"], strict=True):
        assert one == pytest.approx(other, rel=1e-6)  # its weights are decomposed once more
    rows = [{row["name"]: row["shape"] for row in read(Path(run), "plan.json")["maps"]} for run in ("run", "whole")]
    assert rows[0] == rows[1]
    stop(Path("run"))
    asked.clear()
    assert command(*words, "run_dir=run")[0] == 0 and not asked  # the harms were whole
    stop(Path("run"))
    text_now = text.read_text()
    try:
        text.write_text(text_now + "More.")
        code, _, err = command(*words, "run_dir=run")
    finally:
        text.write_text(text_now)
    assert code == 2 and f"data.source={text}" in err and "its content has changed" in err


def test_a_suite_goes_on_with_its_cells(command: Any, tiny: Path, tmp_path: Path) -> None:
    glue = make_glue(tmp_path / "glue", train=8, dev=6, test=3)
    words = ["glue", f"teacher={tiny}", f"data.source={glue}", f"data.cache_dir={tmp_path / 'cache'}", "tasks=[rte]"]
    words += ["data.max_length=32", "fine_tuning.epochs=1", "fine_tuning.batch_size=8", "fine_tuning.precision=fp32"]
    words += ["fine_tuning.accelerator=cpu", "run_dir=run"]
    assert command(*words)[0] == 0
    cells = {file: file.stat().st_mtime_ns for file in Path("run/cells").rglob("*.json")}
    lost = next(file for file in cells if file.stem == "student")
    lost.unlink()
    stop(Path("run"))
    code, out, err = command(*words)
    assert code == 0 and f"{len(cells) - 1} of them finished" in out, err
    again = {file: file.stat().st_mtime_ns for file in Path("run/cells").rglob("*.json")}
    assert again.keys() == cells.keys() and {file for file in cells if cells[file] != again[file]} == {lost}
    code, _, err = command(*words)
    assert code == 2 and "holds another run" in err
