"""run.json, result.json and config.yaml: right after success, failure, interruption and resume."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy
import pytest
import torch
from omegaconf import OmegaConf

from kncompress.errors import UserError
from kncompress.runs import record as records
from kncompress.runs.process import outcome, process_rank
from kncompress.runs.record import RunRecord

CONFIG = {
    "seed": 3,
    "optimizer": {"lr": 1e-5, "name": "adamw"},
    "factors": {"maps": {"layers.3.mlp.up": "1e-3"}},
}


def read(folder, name="run.json"):
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    return json.loads((folder / name).read_text(), parse_constant=refuse)


def open_run(folder, **changes):
    return RunRecord.open(folder, **({"verb": "train", "config": CONFIG, "seed": 3} | changes))


def test_who_is_refused_leaves_what_another_process_is_writing(tmp_path, monkeypatch):
    look, looks = records._before, []

    def other_runs_between_the_looks(folder, *asked):
        looks.append(folder)
        if len(looks) == 2:
            (folder / "run.json").write_text(json.dumps({"verb": "train", "status": "finished", "command": []}))
            (folder / ".hydra").mkdir()
            (folder / ".hydra" / ".overrides.yaml.77.tmp").write_text("[]")
        return look(folder, *asked)

    monkeypatch.setattr(records, "_before", other_runs_between_the_looks)
    with pytest.raises(UserError, match="holds another run"):
        open_run(tmp_path / "run")
    assert len(looks) == 2 and (tmp_path / "run" / ".hydra" / ".overrides.yaml.77.tmp").exists()


def test_finished_run(tmp_path):
    folder = tmp_path / "runs" / "one"
    with open_run(folder) as record:
        assert read(folder)["status"] == "running"
        (folder / "model").mkdir()
        time.sleep(0.01)
        record.finish("finished", {"perplexity": 12.5, "parameters": 124_439_808}, folder / "model")
    assert read(folder, "result.json") == {
        "verb": "train",
        "status": "finished",
        "metrics": {"perplexity": 12.5, "parameters": 124_439_808},
        "model": "model",
    }
    run = read(folder)
    assert (run["verb"], run["status"], run["seed"], run["error"]) == ("train", "finished", 3, None)
    assert run["command"] == sys.argv
    assert run["wall_seconds"] >= 0.01
    assert 10**7 < run["peak_memory_bytes"] < 10**12
    assert run["started"] <= run["ended"]
    assert run["versions"]["python"] == sys.version.split()[0]
    assert run["versions"]["torch"] == torch.__version__.split("+")[0] or torch.__version__ == run["versions"]["torch"]
    assert run["machine"]["cores"] >= 1 and run["machine"]["memory"] > 1e8
    assert len(run["machine"]["accelerators"]) == torch.cuda.device_count()
    assert [path.name for path in folder.iterdir() if path.name.endswith(".tmp")] == []


def test_config_is_read_back_equal(tmp_path):
    open_run(tmp_path).close()
    assert OmegaConf.to_container(OmegaConf.load(tmp_path / "config.yaml")) == CONFIG


def test_metrics_of_all_kinds_and_not_a_number(tmp_path):
    metrics = {
        "a": torch.tensor(1.5),
        "b": numpy.float32(0.5),
        "c": 7,
        "nan": float("nan"),
        "inf": float("-inf"),
    }
    with open_run(tmp_path) as record:
        record.finish("finished", metrics)
    found = read(tmp_path, "result.json")["metrics"]
    assert found == {"a": 1.5, "b": 0.5, "c": 7, "nan": None, "inf": None}
    with (
        open_run(tmp_path / "two") as record,
        pytest.raises(TypeError, match="metric name='gpt2': not a number"),
    ):
        record.finish("finished", {"name": "gpt2"})


def test_model_must_lie_in_the_folder(tmp_path):
    with open_run(tmp_path / "run") as record:
        for path in (tmp_path, "absent", "../"):
            with pytest.raises(ValueError, match="not in the run folder"):
                record.finish("finished", {}, path)


def test_a_plan_is_named_where_there_is_one(tmp_path):
    with open_run(tmp_path) as record:
        (tmp_path / "plan.yaml").write_text("maps: {}")
        record.finish("finished", {}, plan="plan.yaml")
    assert read(tmp_path, "result.json")["plan"] == "plan.yaml"
    with open_run(tmp_path / "two") as record:
        with pytest.raises(ValueError, match=r"plan=absent\.yaml: not in the run folder"):
            record.finish("finished", {}, plan="absent.yaml")
        record.finish("finished", {})
    assert "plan" not in read(tmp_path / "two", "result.json")


@pytest.mark.parametrize("error", [ValueError("bad\nmore lines"), UserError("seed=x: not a number"), SystemExit(3)])
def test_failed_run(tmp_path, error):
    with pytest.raises(type(error)), open_run(tmp_path) as record:
        record.finish("finished", {"perplexity": 9.0})
        raise error
    result = read(tmp_path, "result.json")
    assert (result["status"], result["metrics"]) == ("failed", {"perplexity": 9.0})
    text = {ValueError: "ValueError: bad", UserError: "seed=x: not a number", SystemExit: "SystemExit: 3"}
    assert read(tmp_path)["error"] == text[type(error)]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(130), SystemExit(143)])
def test_interrupted_run(tmp_path, error):
    with pytest.raises(type(error)), open_run(tmp_path):
        raise error
    assert read(tmp_path)["status"] == read(tmp_path, "result.json")["status"] == "interrupted"


def test_interrupt_is_recognised_behind_lightnings_exit(linear_task, fit):
    task = linear_task()

    def interrupt(*_):
        raise KeyboardInterrupt

    task.on_train_batch_end = interrupt
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as caught:
            fit(task, 3)
    finally:
        signal.signal(signal.SIGINT, before)
    assert caught.value.code == 1
    assert outcome(caught.value) == ("interrupted", 130)


def test_outcomes():
    assert outcome(None) == ("finished", 0)
    assert outcome(UserError("x")) == ("failed", 2)
    assert outcome(RuntimeError()) == ("failed", 1)
    assert outcome(SystemExit(143)) == ("interrupted", 143)
    assert outcome(SystemExit(0)) == outcome(SystemExit()) == ("finished", 0)
    assert outcome(SystemExit("message")) == ("failed", 1)


@pytest.mark.parametrize("trace", ["run.json", "metrics.csv", "checkpoints"])
def test_folder_of_another_run_is_refused_untouched(tmp_path, trace):
    (tmp_path / trace).write_text("old")
    with pytest.raises(UserError, match=rf"run_dir={tmp_path}: holds another run \({trace}\)"):
        open_run(tmp_path)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(trace, "old")]


def test_folder_at_work_is_refused(tmp_path):
    code = (
        "from kncompress.runs.record import RunRecord\n"
        f"record = RunRecord.open({str(tmp_path)!r}, 'train', {{}}, 0)\n"
        "print('open', flush=True); input()"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with child:
        assert child.stdout.readline() == "open\n"
        with pytest.raises(UserError, match=f"resume={tmp_path}: another process is at work"):
            open_run(tmp_path, resume=True)
        child.kill()
    assert read(tmp_path)["status"] == "running"  # a killed process cannot say so itself
    open_run(tmp_path, resume=True).close()


def test_resume_goes_on_with_the_same_run(tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt), open_run(tmp_path) as record:
        record.wandb_id = "abc123"
        raise KeyboardInterrupt
    first = read(tmp_path)
    first["wall_seconds"], first["started"] = 1000.0, "2020-01-01T00:00:00+00:00"
    (tmp_path / "run.json").write_text(json.dumps(first))
    config = CONFIG | {"optimizer": {"lr": 1e-4, "name": "adamw"}}
    monkeypatch.setattr(sys, "argv", ["kncompress", "train", "resume=here"])
    with open_run(tmp_path, config=config, resume=True) as record:
        assert record.wandb_id == "abc123"
        assert not (tmp_path / "result.json").exists()  # that of the interruption
        assert read(tmp_path)["status"] == "running"
    run = read(tmp_path)
    assert 1000.0 < run["wall_seconds"] < 1100.0
    assert run["started"] == first["started"] and run["command"] == first["command"]
    assert run["resumes"][0]["command"] == ["kncompress", "train", "resume=here"]
    assert run["resumes"][0]["changed"] == {"optimizer.lr": [1e-5, 1e-4]}
    assert (run["status"], run["error"]) == ("finished", None)
    assert OmegaConf.load(tmp_path / "config.yaml").optimizer.lr == 1e-4


def test_what_cannot_be_resumed(tmp_path):
    with pytest.raises(UserError, match=r"no run\.json"):
        open_run(tmp_path / "absent", resume=True)
    assert not (tmp_path / "absent").exists()
    with open_run(tmp_path / "done"):
        pass
    with pytest.raises(UserError, match="this run is finished"):
        open_run(tmp_path / "done", resume=True)
    open_run(tmp_path / "compressed", verb="compress").close()
    with pytest.raises(UserError, match="a run of compress, not of train"):
        open_run(tmp_path / "compressed", resume=True)
    open_run(tmp_path / "compressed", verb="compress", resume=True).close()  # a refusal leaves no lock behind


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    open_run(folder, rank=0).close()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("KNCOMPRESS_RUN_DIR", str(folder))
    with pytest.raises(ValueError), open_run(folder) as record:
        assert not record.writes
        record.wandb_id = "other"
        raise ValueError
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        ({}, 0),
        ({"RANK": "3", "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "none"}, 3),
        ({"LOCAL_RANK": "0", "NODE_RANK": "0", "KNCOMPRESS_RUN_DIR": "runs/a"}, 0),
        ({"LOCAL_RANK": "0", "NODE_RANK": "1", "KNCOMPRESS_RUN_DIR": "runs/a"}, 1),
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}, 2),
        ({"RANK": "", "TORCHELASTIC_RUN_ID": "none"}, 0),
        # Left over: no launcher is at work here.
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3"}, 0),
        ({"NODE_RANK": "1"}, 0),
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "interactive"}, 0),
        ({"SLURM_PROCID": "2"}, 0),
    ],
)
def test_rank_of_each_launcher(monkeypatch, environment, rank):
    known = ("RANK", "LOCAL_RANK", "NODE_RANK", "KNCOMPRESS_RUN_DIR", "TORCHELASTIC_RUN_ID")
    for name in (*known, *(name for name in os.environ if name.startswith("SLURM_"))):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert process_rank() == rank


def test_opening_imports_nothing_heavy(tmp_path):
    code = (
        "import sys\n"
        "from kncompress.runs.record import RunRecord\n"
        f"with RunRecord.open({str(tmp_path)!r}, 'compress', {{'a': 1}}, 0): pass\n"
        "print(sorted({'torch', 'lightning', 'transformers', 'wandb', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout == "[]\n"
    assert read(tmp_path)["machine"]["accelerators"] is None
    assert read(tmp_path)["versions"]["lightning"] is not None
