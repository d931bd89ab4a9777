"""Jobs that really run: folders, outcomes, exit codes, sweeps, resume, signals and processes of DDP."""

import csv
import errno
import json
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import probe_verb
import pytest
import torch
import yaml
from filelock import FileLock
from waiting import PATIENCE, wait_for

from kncompress.__main__ import VERBS
from kncompress.cli.engine import Engine
from kncompress.cli.job import Job
from kncompress.runs.process import disk_error
from kncompress.runs.run_folder import take

PROBE = Path(__file__).with_name("probe_verb.py")


def _result(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def _table(folder: Path) -> list[dict]:
    with (folder / "sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_run_gets_a_named_folder_with_its_record(probe, tmp_path):
    done = probe("seed=2")
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"train-mini-kngpt2-\d{8}-\d{6}", folder.name)
    assert _result(folder)["metrics"]["perplexity"] == 12.0
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["run_dir"] == str(folder) and config["seed"] == 2
    assert (folder / ".hydra" / "overrides.yaml").read_text() == "- seed=2\n"
    assert (folder / "train.log").exists()


def test_runs_of_one_second_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda form: "20260101-000000")
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda number: take(None, "train-mini"), range(16)))
    expected = {"train-mini-20260101-000000"} | {f"train-mini-20260101-000000-{n}" for n in range(2, 17)}
    assert {folder.name for folder in folders} == expected


def test_folder_in_use_is_refused_and_left_alone(probe, tmp_path):
    used = tmp_path / "used"
    used.mkdir()
    (used / "run.json").write_text("{}")
    done = probe(f"run_dir={used}")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "another run" in done.stderr
    assert [file.name for file in used.iterdir()] == ["run.json"]


def test_run_dir_may_have_any_name(probe, tmp_path):
    done = probe("run_dir=my runs/a=b (1)")
    assert done.returncode == 0, done.stderr
    assert _result(tmp_path / "my runs" / "a=b (1)")["status"] == "finished"


def test_user_error_of_check_writes_nothing(probe, tmp_path):
    done = probe("seed=13")
    assert (done.returncode, done.stderr) == (2, "kncompress: seed=13: refused by check\n")
    assert list(tmp_path.iterdir()) == []


def test_user_error_before_the_run_began_leaves_no_folder(probe, tmp_path):
    done = probe("logger.project=early", "run_dir=new")
    assert (done.returncode, done.stderr) == (2, "kncompress: data.source=gone: no such text\n")
    assert list(tmp_path.iterdir()) == []


def test_failure_tells_the_traceback_and_exits_1(probe, tmp_path):
    done = probe("logger.project=fail", "run_dir=new")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "kncompress: RuntimeError: the loss is not finite\n" in done.stderr
    assert "Traceback" in (tmp_path / "new" / "train.log").read_text()
    result = _result(tmp_path / "new")
    assert (result["status"], result["exit_code"]) == ("failed", 1)


def test_a_full_disk_is_one_line_and_the_run_goes_on(command, monkeypatch):
    monkeypatch.setitem(VERBS, "train", probe_verb.VERB)
    code, _, err = command("train", "logger.project=disk", "run_dir=new")
    folder = Path("new").absolute()
    said = f"run_dir={folder}: No space left on device; make room, then resume={folder} goes on"
    assert code == 1 and err == f"kncompress: {said}\n"
    result = _result(folder)
    assert (result["status"], result["exit_code"], result["error"]) == ("failed", 1, said)
    assert command("train", "resume=new")[0] == 0


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "x"), "No space left on device"),
        (OSError(errno.EDQUOT, "x"), "Disk quota exceeded"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "No space left on device"),
        (OSError(errno.ENOENT, "x"), None),
        (RuntimeError("the loss is not finite"), None),
    ],
)
def test_what_is_behind_an_error_is_a_disk_or_not(error, words):
    outer = RuntimeError("save")
    outer.__cause__ = error
    error.__context__ = outer  # a circle
    assert disk_error(outer) == words


def test_log_lines_appear_once(probe, tmp_path):
    done = probe("logger.project=log", "run_dir=new")
    assert (done.stdout + done.stderr).count("one line") == 1
    assert (tmp_path / "new" / "train.log").read_text().count("one line") == 1


@pytest.mark.parametrize(
    "damage",
    [
        ("run.json", '{"verb": "tra', "is damaged, not JSON"),
        ("run.json", "[]", "[]: must be an object"),
        ("config.yaml", "seed: [1", "not valid YAML"),
        ("config.yaml", "seed: &a 1\ndata: *a", "line 2: YAML aliases are not allowed"),
        ("metrics.csv", "step,loss\n1,2\n2,x\n", 'line 3: loss="x": not a number'),
    ],
)
def test_a_damaged_run_cannot_be_resumed_and_keeps_no_other_from_it(damage, command, monkeypatch):
    monkeypatch.setitem(VERBS, "train", probe_verb.VERB)
    assert command("train", "logger.project=flaky", "seed=1")[0] == 1
    (folder,) = Path("runs").iterdir()
    (folder / damage[0]).write_text(damage[1])
    code, _, err = command("train", f"resume={folder}")
    assert code == 2 and f"{folder}: {damage[0]}: {damage[2]}" in err and err.count("\n") == 1
    assert command("train", "logger.project=fine", "seed=1", "resume=auto")[0] == 0


def test_a_run_at_work_is_not_resumed_by_another(command, monkeypatch):
    monkeypatch.setitem(VERBS, "train", probe_verb.VERB)
    assert command("train", "logger.project=flaky", "run_dir=runs/train-mini-kngpt2-1")[0] == 1
    run = Path("runs/train-mini-kngpt2-1")
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*") if file.is_file()}
    with FileLock(run / ".lock"):
        code, _, err = command("train", f"resume={run}")
        assert code == 2 and f"resume={run}: another process is at work in it" in err
        # One that comes between that check and the start leaves the outcome to the other too.
        job = Job(probe_verb.VERB)
        engine, words = Engine("train"), ["hydra.output_subdir=null", f"++resume={run.absolute()}"]
        assert engine.run(job, engine.compose(words), run)["exit_code"] == 2
        assert command("train", "logger.project=flaky", "resume=auto")[0] == 1  # a new run, in a folder of its own
    now = {file: file.stat().st_mtime_ns for file in run.rglob("*") if file.is_file()}
    changed = {file.name for file in now if now[file] != before[file]}
    assert changed <= {"train.log"} and len(list(Path("runs").iterdir())) == 2


def test_auto_resumes_the_newest_of_the_unfinished_runs(command, monkeypatch):
    monkeypatch.setitem(VERBS, "train", probe_verb.VERB)
    names = [f"runs/train-mini-kngpt2-2026010{day}-000000" for day in (1, 3, 2)]
    for name in names:
        assert command("train", "logger.project=flaky", f"run_dir={name}")[0] == 1
    assert command("train", "logger.project=flaky", "resume=auto")[0] == 0
    resumed = [name for name in names if json.loads(Path(name, "run.json").read_text())["resumes"]]
    assert resumed == ["runs/train-mini-kngpt2-20260103-000000"] and len(list(Path("runs").iterdir())) == 3


def test_what_fails_after_the_record_is_closed_is_in_it_all_the_same(command, monkeypatch):
    monkeypatch.setitem(VERBS, "train", probe_verb.VERB)
    code, _, err = command("train", "logger.project=late", "run_dir=run")
    assert code == 1 and err.endswith("kncompress: RuntimeError: the process group is gone\n")
    run = json.loads(Path("run/run.json").read_text())
    assert (run["status"], run["error"]) == ("failed", "RuntimeError: the process group is gone")
    assert _result(Path("run"))["status"] == "failed"


def test_a_folder_that_cannot_be_made_is_one_line(command):
    Path("file").touch()
    code, _, err = command("inspect", "run_dir=file/run")
    assert code == 2 and "file/run: cannot be written: Not a directory" in err and err.count("\n") == 1


def test_failing_jobs_do_not_stop_the_sweep(probe, tmp_path):
    done = probe("run_dir=sweep", "-m", "logger.project=user,fail,fine", "seed=1")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "kncompress: job 0: trainer.steps=3: too few",
        "kncompress: job 1: RuntimeError: the loss is not finite",
    ]
    rows = _table(tmp_path / "sweep")
    assert [row["status"] for row in rows] == ["failed", "failed", "finished"]
    assert [row["logger.project"] for row in rows] == ["user", "fail", "fine"]
    assert rows[2]["perplexity"] == "11.0" and "seed" not in rows[0]
    assert "Traceback" in (tmp_path / "sweep" / "1" / "train.log").read_text()
    table = done.stdout.splitlines()[-5:-1]
    assert table[0].split()[:4] == ["job", "logger.project", "status", "perplexity"]
    assert table[3].split()[:4] == ["2", "fine", "finished", "11"]


@pytest.mark.parametrize(("projects", "code"), [("user,fine", 2), ("a,b", 0)])
def test_exit_code_of_a_sweep(projects, code, probe):
    assert probe("-m", f"logger.project={projects}").returncode == code


def test_bad_job_is_told_before_the_first_starts(probe, tmp_path):
    done = probe("-m", "seed=1,13", "trainer.steps=1")
    assert (done.returncode, done.stderr) == (2, "kncompress: job 1: seed=13: refused by check\n")
    assert list(tmp_path.iterdir()) == []


def test_sweep_over_factors_names_folders_and_rows_by_the_users_words(probe, tmp_path):
    (tmp_path / "my plan.yaml").write_text("mlp:\n  right: [2, 1]\n")
    done = probe("-m", "factors=dense,./my plan.yaml")
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"train-mini-\d{8}-\d{6}", folder.name)
    assert [row["factors"] for row in _table(folder)] == ["dense", "./my plan.yaml"]
    config = yaml.safe_load((folder / "1" / "config.yaml").read_text())
    assert config["factors"]["mlp"]["right"] == [2, 1] and config["run_dir"] == str(folder / "1")


def _interrupted(run: Path) -> None:
    text = (run / "run.json").read_text()
    folder = run / "config.yaml"
    (run / "run.json").write_text(text.replace('"status": "finished"', '"status": "interrupted"'))
    assert folder.exists()


def test_resume_takes_the_configuration_from_the_folder(probe, tmp_path):
    (tmp_path / "plan.yaml").write_text("mlp:\n  right: [2, 1]\n")
    probe("run_dir=first", "trainer.steps=7", "factors=./plan.yaml", "logger.project=fine")
    assert "finished" in probe("resume=first").stderr
    _interrupted(tmp_path / "first")
    (tmp_path / "plan.yaml").unlink()
    done = probe("resume=first", "trainer.steps=7")
    assert done.returncode == 0, done.stderr
    config = yaml.safe_load((tmp_path / "first" / "config.yaml").read_text())
    assert config["trainer"]["steps"] == 7 and config["factors"]["mlp"]["right"] == [2, 1]
    assert config["run_dir"] == str(tmp_path / "first")
    assert _result(tmp_path / "first")["metrics"]["steps"] == 7
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("word", ["trainer.steps=8", "factors=dense", "experiment=wikitext_ilkd"])
def test_resume_refuses_a_different_value(word, probe, tmp_path):
    probe("run_dir=first", "trainer.steps=7", "objective=logits")
    _interrupted(tmp_path / "first")
    before = {file: file.read_bytes() for file in (tmp_path / "first").rglob("*") if file.is_file()}
    done = probe("resume=first", word)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    key = {
        "trainer.steps=8": "trainer.steps=8",
        "factors=dense": "factors.",
        "experiment=wikitext_ilkd": "objective.",
    }
    assert f"kncompress: {key[word]}" in done.stderr and "the run in first has" in done.stderr
    assert before == {file: file.read_bytes() for file in (tmp_path / "first").rglob("*") if file.is_file()}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("words", [["logger.project=wait"], ["-m", "logger.project=wait,fine"]])
def test_signal_runs_finally_blocks_and_gives_its_exit_code(number, code, words, environment, tmp_path):
    job = tmp_path / "new" / ("0" if "-m" in words else "")
    process = _start(environment, tmp_path, "run_dir=new", *words)
    wait_for((job / "waiting").exists, process)
    process.send_signal(number)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == code
    assert (job / "cleaned").exists()
    assert _result(job)["status"] == "interrupted" and _result(job)["exit_code"] == code
    if "-m" in words:
        assert [row["status"] for row in _table(tmp_path / "new")] == ["interrupted", "pending"]


def test_swallowed_signal_still_gives_its_exit_code(environment, tmp_path):
    process = _start(environment, tmp_path, "run_dir=new", "logger.project=swallow")
    wait_for((tmp_path / "new" / "waiting").exists, process)
    process.terminate()
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 143
    assert _result(tmp_path / "new")["status"] == "interrupted"
    # It had written that it finished: a resume must not take it for that.
    assert json.loads((tmp_path / "new" / "run.json").read_text())["status"] == "interrupted"


def test_what_goes_wrong_after_a_signal_is_told(environment, tmp_path):
    process = _start(environment, tmp_path, "run_dir=new", "logger.project=stumble")
    wait_for((tmp_path / "new" / "waiting").exists, process)
    process.terminate()
    told = b"kncompress: interrupted; while it stopped: RuntimeError: no room for the checkpoint\n"
    assert told in process.communicate(timeout=PATIENCE)[1] and process.returncode == 143
    found = _result(tmp_path / "new")
    assert found["status"] == "interrupted" and found["error"].endswith("no room for the checkpoint")


def _start(environment: dict[str, str], cwd: Path, *words: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(PROBE), "train", *words],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_child_process_has_its_parents_folder_and_configuration(probe, tmp_path):
    (tmp_path / "my plan.yaml").write_text("mlp:\n  right: [2, 1]\n")
    done = probe("factors=./my plan.yaml", "trainer.steps=5", "logger.project=ddp", "seed=13", "seed=1")
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert (folder / "child.txt").read_text().splitlines() == ["5", "[2, 1]", str(folder), str(tmp_path)]
    assert (folder / ".hydra" / "overrides.yaml").read_text().startswith("- factors=./my plan.yaml\n")


def test_child_process_of_a_sweep_runs_its_job_alone(probe, tmp_path):
    (tmp_path / "my plan.yaml").write_text("mlp:\n  right: [2, 1]\n")
    words = ["run_dir=s 1", "-m", "factors=./my plan.yaml,dense", "trainer.steps=5,6", "logger.project=ddp"]
    done = probe(*words)
    assert done.returncode == 0, done.stderr + done.stdout
    sweep = tmp_path / "s 1"
    children = [(sweep / str(number) / "child.txt").read_text().splitlines()[:3] for number in range(4)]
    rights = ["[2, 1]", "[2, 1]", "None", "None"]
    assert children == [
        [steps, right, str(sweep / str(n))] for n, (steps, right) in enumerate(zip("5656", rights, strict=True))
    ]
    names = sorted(entry.name for entry in sweep.iterdir() if not entry.name.startswith("."))
    assert names == ["0", "1", "2", "3", "multirun.yaml", "sweep.csv", "sweep.json", "sweep.md"]


def test_other_launchers_must_give_the_folder(probe, tmp_path):
    done = probe("seed=1", RANK="1", LOCAL_RANK="1", WORLD_SIZE="2", TORCHELASTIC_RUN_ID="x")
    assert done.returncode == 2 and "run_dir" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_ddp_and_single_jobs_share_a_sweep(probe, tmp_path):
    done = probe("-m", "run_dir=s", "trainer.devices=2,1,2", "logger.project=fabric")
    assert done.returncode == 0, done.stderr
    assert [row["total"] for row in _table(tmp_path / "s")] == ["3.0", "1.0", "3.0"]
    ranks = [sorted(file.name for file in (tmp_path / "s" / str(n)).glob("rank*")) for n in range(3)]
    assert ranks == [["rank0", "rank1"], ["rank0"], ["rank0", "rank1"]]
    assert not (tmp_path / "runs").exists()


def test_jobs_by_submitit_are_jobs_like_others(probe, tmp_path):
    done = probe("-m", "run_dir=s", "hydra/launcher=submitit_local", "seed=1,2", "logger.project=user,fine")
    assert done.returncode == 2, done.stderr
    statuses = ["failed", "finished", "failed", "finished"]
    assert [row["status"] for row in _table(tmp_path / "s")] == statuses
    assert [_result(tmp_path / "s" / str(number))["status"] for number in range(4)] == statuses


def test_left_over_variables_of_a_launcher_leave_the_record(probe, tmp_path):
    done = probe("run_dir=run", RANK="1", LOCAL_RANK="1", WORLD_SIZE="2", SLURM_PROCID="3")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"
    assert "kncompress: RANK=1: left over from another launcher" in done.stderr


def test_left_over_variables_leave_every_job_of_a_sweep(probe, tmp_path):
    done = probe("-m", "run_dir=s", "seed=1,2", RANK="1", WORLD_SIZE="2")
    assert done.returncode == 0, done.stderr
    assert [json.loads((tmp_path / "s" / str(n) / "run.json").read_text())["status"] for n in (0, 1)] == [
        "finished",
        "finished",
    ]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"),
    ],
)
def test_memory_that_has_run_out_is_one_line(error, command, monkeypatch):
    def run(*_):
        raise error

    monkeypatch.setitem(VERBS, "train", probe_verb.VERB)
    monkeypatch.setattr(probe_verb, "run", run)
    code, _, err = command("train", "run_dir=new")
    said = f"take fewer tokens at once, then resume={Path('new').absolute()} goes on"
    assert code == 1 and err.startswith("kncompress: out of memory (") and err.endswith(f"{said}\n")
    assert err.count("\n") == 1


def test_resume_auto_in_a_folder_that_is_not_there_begins_a_run(command, monkeypatch):
    monkeypatch.setitem(VERBS, "train", probe_verb.VERB)
    code, _, err = command("train", "resume=auto", "run_dir=new")
    assert code == 0, err
    assert _result(Path("new"))["status"] == "finished"
