"""metrics.csv across resumes, and real offline W&B runs read back from their logs."""

import csv
import json
import os
import re
import socket
from pathlib import Path

import pytest
from lightning.pytorch.loggers import WandbLogger
from wandb_log import offline_log, values

from kncompress.config import LoggerConfig
from kncompress.errors import UserError
from kncompress.runs.metrics_file import MetricsFile
from kncompress.runs.record import RunRecord
from kncompress.training.checkpoints import checkpoint_callbacks
from kncompress.training.loggers import CsvLogger, RewindMetrics, build_loggers, finish_loggers, log_facts

CONFIG = {"seed": 3, "optimizer": {"lr": 0.001}}


@pytest.fixture(autouse=True)
def no_wandb_variables(monkeypatch):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_metrics_file_has_one_row_a_step_and_takes_late_columns(tmp_path):
    path = tmp_path / "metrics.csv"
    file = MetricsFile(path)
    file.add(0, {"loss": 3.0})
    file.add(1, {"loss": 2.0})
    file.add(1, {"validation": 9.0})
    file.add(2, {"loss": 1.0})
    file.add(2, {"validation": 8.0, "loss": 0.5})
    assert path.read_text() == "step,loss,validation\n0,3.0,\n1,2.0,9.0\n2,0.5,8.0\n"


def test_metrics_file_goes_on_after_a_kill(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,loss\n0,3.0\n1,2.0\n2,1.")  # the last row has been cut short
    file = MetricsFile(path)
    assert file.last_step == 1
    file.add(1, {"loss": 2.5})
    file.add(2, {"loss": 1.0})
    assert path.read_text() == "step,loss\n0,3.0\n1,2.5\n2,1.0\n"


def test_rewind_keeps_columns_and_drops_later_steps(tmp_path):
    path = tmp_path / "metrics.csv"
    file = MetricsFile(path)
    for step in range(4):
        file.add(step, {"loss": float(step)})
    file.rewind(1)
    file.add(2, {"loss": 7.0})
    assert path.read_text() == "step,loss\n0,0.0\n1,1.0\n2,7.0\n"
    file.rewind(-1)
    assert path.read_text() == "step,loss\n"


def test_resumed_training_has_every_step_once(tmp_path, fit, linear_task):
    def callbacks():
        return [*checkpoint_callbacks(tmp_path, every=8), RewindMetrics()]

    class Dying(linear_task):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if self.global_step == 14:
                raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        fit(Dying(), 16, 4, logger=[CsvLogger(tmp_path)], callbacks=callbacks())
    assert [int(row["step"]) for row in rows(tmp_path / "metrics.csv")] == list(range(13))
    last = tmp_path / "checkpoints/last.ckpt"
    fit(linear_task(), 16, 4, ckpt_path=last, logger=[CsvLogger(tmp_path)], callbacks=callbacks())
    found = rows(tmp_path / "metrics.csv")
    assert [int(row["step"]) for row in found] == list(range(16))
    (tmp_path / "whole").mkdir()
    fit(linear_task(), 16, 4, logger=[CsvLogger(tmp_path / "whole")])
    whole = rows(tmp_path / "whole/metrics.csv")
    assert [row["train/loss"] for row in found] == [row["train/loss"] for row in whole]
    assert [bool(row["validation/loss"]) for row in found] == [False, False, False, True] * 4


def run_job(folder, code, **config):
    with RunRecord.open(folder, "train", CONFIG, 3) as record:
        settings = LoggerConfig(**config)
        loggers = build_loggers(settings, folder, record, CONFIG, "job-1", sweep="sweep-7")
        log_facts(loggers, {"compression/parameters": 81})
        for step in range(3):
            for logger in loggers:
                logger.log_metrics({"train/loss": 3.0 - step}, step)
        finish_loggers(loggers, record, code, {"student/perplexity": 12.5})
    return record


def test_offline_run_read_back(tmp_path, capfd):
    record = run_job(tmp_path, 143, tags=["a", "b"])
    assert capfd.readouterr() == ("", "")  # no banner
    log = offline_log(tmp_path)
    (run,) = [entry.run for entry in log if entry.WhichOneof("record_type") == "run"]
    assert run.run_id == record.wandb_id == json.loads((tmp_path / "run.json").read_text())["wandb_id"]
    assert (run.project, run.run_group, run.display_name, list(run.tags)) == (
        "kncompress",
        "sweep-7",
        "job-1",
        ["a", "b"],
    )
    configured = values(run.config.update)
    for entry in log:
        if entry.WhichOneof("record_type") == "config":
            configured |= values(entry.config.update)
    assert configured["optimizer"] == {"lr": 0.001} and configured["seed"] == 3
    assert configured["compression/parameters"] == 81
    history = [values(entry.history.item) for entry in log if entry.WhichOneof("record_type") == "history"]
    assert [(row["trainer/global_step"], row["train/loss"]) for row in history] == [
        (0, 3.0),
        (1, 2.0),
        (2, 1.0),
    ]
    summary = {}
    for entry in log:
        if entry.WhichOneof("record_type") == "summary":
            summary |= values(entry.summary.update)
    assert summary["student/perplexity"] == 12.5
    (end,) = [entry.exit for entry in log if entry.WhichOneof("record_type") == "exit"]
    assert end.exit_code == 143
    assert not [entry for entry in log if entry.WhichOneof("record_type") == "artifact"]
    assert [row["train/loss"] for row in rows(tmp_path / "metrics.csv")] == ["3.0", "2.0", "1.0"]


def test_each_job_of_a_sweep_has_its_own_run_and_exit_code(tmp_path):
    ids, codes = set(), []
    for number, code in enumerate((0, 1)):
        run_job(tmp_path / str(number), code, group="mine")
        log = offline_log(tmp_path / str(number))
        ids |= {entry.run.run_id for entry in log if entry.WhichOneof("record_type") == "run"}
        assert {entry.run.run_group for entry in log if entry.WhichOneof("record_type") == "run"} == {"mine"}
        codes += [entry.exit.exit_code for entry in log if entry.WhichOneof("record_type") == "exit"]
    assert len(ids) == 2 and codes == [0, 1]


def test_an_id_in_the_environment_is_that_of_one_run_and_never_of_a_sweep(tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_RUN_ID", "abc123")
    asked, begin = [], wandb.init
    monkeypatch.setattr(wandb, "init", lambda **options: asked.append(options["id"]) or begin(**options))
    for job, sweep in (("0", "sweep"), ("1", "sweep"), ("alone", None)):
        with RunRecord.open(tmp_path / job, "train", CONFIG, 0) as record:
            loggers = build_loggers(LoggerConfig(), tmp_path / job, record, CONFIG, job, sweep)
            finish_loggers(loggers, record, 0)
            assert record.wandb_id == asked[-1]  # given, or W&B would take the one of the environment
    assert len(set(asked)) == 3 and asked[2] == "abc123"


def test_what_wandb_does_not_take_in_the_end_is_a_warning(tmp_path, capfd):
    with RunRecord.open(tmp_path, "train", CONFIG, 3) as record:
        loggers = build_loggers(LoggerConfig(), tmp_path, record, CONFIG, "job")
        loggers[1].experiment.finish()  # whoever ends it: it takes no summary now
        finish_loggers(loggers, record, 0, {"perplexity": 2.0})
        record.finish("finished", {"perplexity": 2.0})
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["status"] == "finished" and run["warnings"][0].startswith("W&B summary: UsageError: ")
    assert capfd.readouterr().err == f"kncompress: warning: {run['warnings'][0]}\n"


def test_job_left_open_does_not_swallow_the_next(tmp_path):
    with RunRecord.open(tmp_path / "0", "train", CONFIG, 3) as first:
        build_loggers(LoggerConfig(), tmp_path / "0", first, CONFIG, "job-0")
    second = run_job(tmp_path / "1", 0)
    assert first.wandb_id != second.wandb_id
    assert [entry.exit.exit_code for entry in offline_log(tmp_path / "0") if entry.HasField("exit")] == [1]


def test_resume_keeps_the_run_id_group_and_tags(tmp_path):
    with pytest.raises(KeyboardInterrupt), RunRecord.open(tmp_path, "train", CONFIG, 3) as record:
        loggers = build_loggers(LoggerConfig(tags=["a"]), tmp_path, record, CONFIG, "job", "sweep-7", ["kngpt2"])
        finish_loggers(loggers, record, 130)
        raise KeyboardInterrupt
    with RunRecord.open(tmp_path, "train", CONFIG, 3, resume=True) as again:
        loggers = build_loggers(LoggerConfig(), tmp_path, again, CONFIG, "job")
        run = loggers[1].experiment
        assert run.id == record.wandb_id == again.wandb_id
        assert (run.group, run.tags) == ("sweep-7", ("a", "kngpt2"))
        finish_loggers(loggers, again, 0)


def test_lightning_logs_through_both(tmp_path, fit, linear_task):
    with RunRecord.open(tmp_path, "train", CONFIG, 3) as record:
        loggers = build_loggers(LoggerConfig(), tmp_path, record, CONFIG, "job")
        fit(linear_task(), 4, 2, logger=loggers, callbacks=list(checkpoint_callbacks(tmp_path)))
        finish_loggers(loggers, record, 0)
    history = [values(entry.history.item) for entry in offline_log(tmp_path) if entry.HasField("history")]
    logged = {row["trainer/global_step"]: row["train/loss"] for row in history if "train/loss" in row}
    assert logged == {int(row["step"]): float(row["train/loss"]) for row in rows(tmp_path / "metrics.csv")}
    assert len(logged) == 4
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {".lock", "config.yaml", "run.json", "result.json", "metrics.csv", "checkpoints", "wandb"}


@pytest.mark.parametrize(
    ("config", "environment", "kinds"),
    [
        ({"name": "none"}, None, []),
        ({"name": "csv"}, "online", [CsvLogger]),
        ({"name": "wandb"}, "disabled", [CsvLogger]),
        ({"name": "wandb", "mode": "disabled"}, None, [CsvLogger]),
        ({"name": "wandb", "mode": "online"}, "dryrun", [CsvLogger, WandbLogger]),
    ],
)
def test_which_loggers(tmp_path, monkeypatch, config, environment, kinds):
    if environment:
        monkeypatch.setenv("WANDB_MODE", environment)
    with RunRecord.open(tmp_path, "train", CONFIG, 3) as record:
        loggers = build_loggers(LoggerConfig(**config), tmp_path, record, CONFIG, "job")
        finish_loggers(loggers, record, 0)
    assert [type(logger) for logger in loggers] == kinds
    assert (tmp_path / "wandb").exists() == (WandbLogger in kinds)
    assert os.environ.get("WANDB_MODE") == environment  # the next job's is not touched


@pytest.fixture
def silent_port():
    """Address of a server that takes connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_wandb_that_is_not_reached_is_logged_offline_unless_it_is_required(tmp_path, monkeypatch, silent_port, capfd):
    monkeypatch.setattr("kncompress.training.loggers._PROBE_SECONDS", 0.3)
    monkeypatch.setenv("WANDB_BASE_URL", silent_port)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    with (
        RunRecord.open(tmp_path / "a", "train", CONFIG, 3) as record,
        pytest.raises(
            UserError, match=rf"logger\.mode=online: W&B is not reached \({silent_port}: .*(no answer|timed out)"
        ),
    ):
        build_loggers(LoggerConfig(mode="online", required=True), tmp_path / "a", record, CONFIG, "job")
    run_job(tmp_path / "b", 0, mode="online")
    (warning,) = json.loads((tmp_path / "b/run.json").read_text())["warnings"]
    assert warning in capfd.readouterr().err
    folder = re.search("`wandb sync (.*)` uploads it later", warning)[1]
    assert Path(folder).is_dir() and list(Path(folder).glob("run-*.wandb"))
    assert any(entry.WhichOneof("record_type") == "history" for entry in offline_log(tmp_path / "b"))


def test_other_ranks_start_no_wandb_run(tmp_path):
    with RunRecord.open(tmp_path, "train", CONFIG, 3, rank=1) as record:
        assert [type(logger) for logger in build_loggers(LoggerConfig(), tmp_path, record, CONFIG, "job")] == [
            CsvLogger
        ]
    assert list(tmp_path.iterdir()) == []


def test_wrong_mode_and_missing_key_are_the_users_to_fix(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "of")
    with (
        RunRecord.open(tmp_path / "a", "train", CONFIG, 3) as record,
        pytest.raises(UserError, match="WANDB_MODE=of"),
    ):
        build_loggers(LoggerConfig(), tmp_path / "a", record, CONFIG, "job")
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", str(tmp_path))  # no key in ~/.netrc
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with (
        RunRecord.open(tmp_path / "b", "train", CONFIG, 3) as record,
        pytest.raises(UserError, match=r"logger\.mode=online: No API key configured"),
    ):
        build_loggers(LoggerConfig(), tmp_path / "b", record, CONFIG, "job")
