"""Sweeps: the same command runs what is missing, the tables, ``fail_fast``, launchers, and the search by Optuna."""

import csv
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import probe_verb
import pytest
from filelock import FileLock
from waiting import PATIENCE, wait_for

from kncompress.__main__ import VERBS
from kncompress.cli.engine import Engine
from kncompress.cli.job import Job
from kncompress.cli.sweep_run import _by_other_sweeper
from kncompress.runs import run_folder

PROBE = Path(probe_verb.__file__)


@pytest.fixture
def sweep(command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """``sweep(*words) -> (exit code, stdout, stderr)``: the probe verb under the name ``train``, in this process."""
    monkeypatch.setitem(VERBS, "train", probe_verb.VERB)
    return lambda *words: command("train", "-m", *words)


def rows(folder: str) -> list[dict[str, str]]:
    with Path(folder, "sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def markdown_rows(folder: str) -> list[str]:
    """The lines of the table, its columns' padding taken out."""
    return [" ".join(line.split()) for line in Path(folder, "sweep.md").read_text().splitlines()]


def started(folder: str) -> list[str]:
    return [json.loads(path.read_text())["started"] for path in sorted(Path(folder).glob("*/run.json"))]


def read(*parts: str) -> Any:
    return json.loads(Path(*parts).read_text())


def test_the_same_command_runs_only_what_is_missing(sweep: Any) -> None:
    words = ["logger.project=fine,flaky", "seed=1,2", "run_dir=s"]
    code, _, err = sweep(*words)
    assert code == 1 and err.count("no space left") == 2
    assert [row["status"] for row in rows("s")] == ["finished", "finished", "failed", "failed"]
    kept = [Path("s", n, "result.json").stat().st_mtime_ns for n in "01"]
    code, out, err = sweep(*words)
    assert code == 0, err
    assert "2 of 4 jobs missing" in out
    assert [row["status"] for row in rows("s")] == ["finished"] * 4
    assert [row["perplexity"] for row in rows("s")] == ["11.0", "12.0", "11.0", "12.0"]
    assert kept == [Path("s", n, "result.json").stat().st_mtime_ns for n in "01"]
    # Resumed in its own folder, not begun again; the words that are kept are those of the first command.
    assert len(read("s", "2", "run.json")["resumes"]) == 1 and read("s", "0", "run.json")["resumes"] == []
    assert Path("s/2/.hydra/overrides.yaml").read_text() == "- logger.project=flaky\n- seed=1\n"
    code, out, _ = sweep(*words)
    assert code == 0 and "0 of 4 jobs missing" in out and "job 0:" not in out


@pytest.mark.slow
def test_without_a_folder_the_newest_sweep_of_the_same_jobs_goes_on(sweep: Any) -> None:
    assert sweep("logger.project=fine,flaky")[0] == 1
    assert sweep("logger.project=fine,flaky")[0] == 0
    assert len(list(Path("runs").iterdir())) == 1
    assert sweep("logger.project=fine,other")[0] == 0
    assert len(list(Path("runs").iterdir())) == 2
    assert sweep("logger.project=fine,flaky", "resume=never")[0] == 1
    assert len(list(Path("runs").iterdir())) == 3


@pytest.mark.slow
def test_resume_names_a_sweep(sweep: Any, command: Any) -> None:
    assert sweep("logger.project=fine,flaky", "run_dir=s")[0] == 1
    code, _, err = command("train", "resume=s", "seed=3")
    assert code == 2 and err == "kncompress: seed=3: resume=s takes every value from the sweep there; leave it out\n"
    code, _, err = command("train", "resume=s")
    assert code == 0, err
    assert [row["status"] for row in rows("s")] == ["finished", "finished"]


def test_another_sweep_in_the_folder_is_refused(sweep: Any) -> None:
    Path("plan.yaml").write_text("mlp:\n  right: [2, 1]\n")
    assert sweep("seed=1,2", "factors=plan.yaml", "run_dir=s")[0] == 0
    before = {path: path.stat().st_mtime_ns for path in Path("s").rglob("*") if path.name != ".lock"}
    code, _, err = sweep("seed=1,3", "factors=plan.yaml", "run_dir=s")
    assert code == 2 and "run_dir=s: holds another sweep (seed=1,2 factors=plan.yaml)" in err
    Path("plan.yaml").write_text("mlp:\n  right: [4, 1]\n")
    code, _, err = sweep("seed=1,2", "factors=plan.yaml", "run_dir=s")
    assert code == 2 and "job 0 has factors.mlp.right=[2, 1], now [4, 1]" in err
    assert before == {path: path.stat().st_mtime_ns for path in Path("s").rglob("*") if path.name != ".lock"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["seed=range(5,1)", "trainer.steps=1,2"], "seed=range(5,1), trainer.steps=1,2: a key has no values"),
        (["seed=interval(1,5)"], "seed=interval(1,5): BasicSweeper does not support"),
    ],
)
def test_a_sweep_over_nothing_is_the_users_to_fix(sweep: Any, words: list[str], message: str) -> None:
    code, _, err = sweep(*words)
    assert code == 2 and message in err and err.count("\n") == 1
    assert not Path("runs").exists()


@pytest.mark.parametrize(("project", "wanted"), [("fine", 0), ("user", 2), ("fail", 1)])
def test_a_sweeper_of_another_package_ends_with_the_exit_code_of_its_jobs(
    project: str, wanted: int, tmp_path: Path
) -> None:
    job = Job(probe_verb.VERB, sweep_dir=tmp_path / "s")
    words = [f"++logger.project=fine,{project}", "++seed=1"]  # Hydra's own sweeper, called as another's would be
    assert _by_other_sweeper(Engine("train"), job, words) == wanted


def test_what_fail_fast_keeps_from_starting_has_no_say_in_the_exit_code(sweep: Any) -> None:
    assert sweep("logger.project=user,fine", "run_dir=s", "fail_fast=true")[0] == 2
    assert [row["status"] for row in rows("s")] == ["failed", "pending"]


def test_fail_fast_starts_no_further_job(sweep: Any) -> None:
    words = ["logger.project=fine,flaky,last", "run_dir=s"]
    code, _, _ = sweep(*words, "fail_fast=true")
    assert code == 1
    assert [row["status"] for row in rows("s")] == ["finished", "failed", "pending"]
    assert not Path("s/2").exists()
    code, _, err = sweep(*words)  # how a sweep runs is no part of what it computes
    assert code == 0, err
    assert [row["status"] for row in rows("s")] == ["finished"] * 3


def test_a_job_at_work_elsewhere_is_left_alone(sweep: Any) -> None:
    assert sweep("logger.project=fine,flaky", "run_dir=s")[0] == 1
    before = read("s", "1", "result.json")
    with FileLock("s/1/.lock"):
        code, out, _ = sweep("logger.project=fine,flaky", "run_dir=s")
        assert code == 1 and "0 of 2 jobs missing" in out
        # The same job out of a queue that an earlier command has filled.
        job = Job(probe_verb.VERB, sweep_dir=Path("s").absolute())
        engine = Engine("train")
        returned = engine.run(job, engine.compose(["++logger.project=flaky"]), Path("s/1"))
    assert returned == {"status": "elsewhere", "exit_code": 0}
    assert read("s", "1", "result.json") == before
    assert sweep("logger.project=fine,flaky", "run_dir=s")[0] == 0


def test_of_two_sweeps_that_begin_in_one_folder_the_later_leaves_it_alone(
    sweep: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def take(run_dir: str, name: str) -> Path:
        folder = taken(run_dir, name)
        monkeypatch.setattr(run_folder, "take", taken)
        assert sweep("seed=5,6", run_dir_word)[0] == 0  # the other comes at this moment
        return folder

    taken, run_dir_word = run_folder.take, "run_dir=s"
    monkeypatch.setattr(run_folder, "take", take)
    code, _, err = sweep("seed=1,2", run_dir_word)
    assert code == 2 and "another process has just begun a sweep in it" in err and err.count("\n") == 1
    assert [row["seed"] for row in rows("s")] == ["5", "6"] and read("s", "sweep.json")["words"][0] == "seed=5,6"


def test_a_launcher_that_is_not_there_is_named(sweep: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = sweep("hydra/launcher=joblib", "seed=1,2")
    assert code == 2 and "pip install 'kncompress[sweeps]'" in err and not Path("runs").exists()


def test_the_table_is_there_as_markdown(sweep: Any) -> None:
    sweep("logger.project=fine,user", "run_dir=s")
    head, rule, first, second = markdown_rows("s")
    assert head.startswith("| job | logger.project | status | perplexity |") and set(rule) <= set("|- ")
    assert first.startswith("| 0 | fine | finished | 10 |") and second.endswith("| trainer.steps=3: too few |")


def test_no_value_breaks_the_table(sweep: Any) -> None:
    code, out, err = sweep("logger.group='two\nlines','a|b'", "seed=1", "run_dir=s")
    assert code == 0, err
    lines = markdown_rows("s")
    assert len(lines) == 4 and lines[2].startswith("| 0 | 'two lines' | finished |")
    assert lines[3].startswith("| 1 | 'a\\|b' | finished |") and "'a|b'" in out
    assert rows("s")[0]["logger.group"] == "'two\nlines'"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_sweep_is_finished_by_the_same_command(
    number: signal.Signals, environment: dict[str, str], sweep: Any, tmp_path: Path
) -> None:
    words = ["logger.project=fine,wait,last", "run_dir=s"]
    line = [sys.executable, str(PROBE), "train", "-m", *words]
    process = subprocess.Popen(line, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for((tmp_path / "s/1/waiting").exists, process)
    assert [row["status"] for row in rows("s")] == ["finished", "pending", "pending"]
    code, _, err = sweep(*words)
    assert code == 2 and "another process is at work in it" in err
    process.send_signal(number)
    process.communicate(timeout=PATIENCE)
    kept = started("s")[0]
    code, _, err = sweep(*words)
    assert code == 0, err
    assert [row["status"] for row in rows("s")] == ["finished"] * 3
    assert started("s")[0] == kept and len(read("s", "1", "run.json")["resumes"]) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "words"),
    [("joblib", ["hydra.launcher.n_jobs=2"]), ("ray", ["+hydra.launcher.ray.init.num_cpus=2"])],
)
def test_jobs_side_by_side(
    launcher: str, words: list[str], environment: dict[str, str], tmp_path: Path, sweep: Any
) -> None:
    pytest.importorskip(f"hydra_plugins.hydra_{launcher}_launcher", reason=f"hydra-{launcher}-launcher is missing")
    given = ["run_dir=s", "seed=1,2", "logger.project=user,fine", f"hydra/launcher={launcher}", *words]
    line = [sys.executable, str(PROBE), "train", "-m", *given]
    variables = environment | {"RAY_AUTH_MODE": "disabled"}  # else Ray writes a token into the home folder
    done = subprocess.run(
        line, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 2, done.stderr
    assert [row["status"] for row in rows("s")] == ["failed", "finished", "failed", "finished"]


ONE_SHAPE = ["factors.mlp.right=[1,2]", "factors.mlp.terms=1", "factors.layers=all"]
SEARCH = ["sweep=optuna_shapes", "factors.layers=all", "factors.mlp.terms=range(1,4)"]


def test_a_search_marks_its_front_and_goes_on_in_its_study(sweep: Any) -> None:
    optuna = pytest.importorskip("optuna")
    words = [*SEARCH, "factors.mlp.right=[1,2]", "seed=1,2", "run_dir=s"]
    code, out, err = sweep(*words, "hydra.sweeper.jobs=2")
    assert code == 0, err
    assert len(rows("s")) == 2
    code, out, err = sweep(*words, "hydra.sweeper.jobs=2")
    assert code == 0 and "job 0:" not in out and len(rows("s")) == 2
    code, _, err = sweep(*words, "hydra.sweeper.jobs=30")
    assert code == 0, err
    table = rows("s")
    pairs = {(int(row["factors.mlp.terms"]), int(row["seed"])) for row in table}
    # The space has six points: each once, and the search ends when it finds no new one.
    assert len(table) == len(pairs) and len(pairs) >= 5
    front = {(int(row["factors.mlp.terms"]), int(row["seed"])) for row in table if row["front"] == "yes"}
    best = {terms: min(seed for t, seed in pairs if t == terms) for terms in {t for t, _ in pairs}}
    assert front == set(best.items())
    study = optuna.load_study(study_name="shapes", storage="sqlite:///s/study.db")
    assert {tuple(t.values) for t in study.best_trials} == {
        (float(row["perplexity/student"]), float(row["parameters/student"])) for row in table if row["front"] == "yes"
    }


def test_a_damaged_study_is_told_and_made_anew_from_the_jobs(sweep: Any) -> None:
    pytest.importorskip("optuna")
    words = [*SEARCH, "factors.mlp.right=[1,2]", "run_dir=s"]
    assert sweep(*words, "hydra.sweeper.jobs=1")[0] == 0
    study = Path("s/study.db")
    whole, before = study.read_bytes(), {file: file.read_bytes() for file in Path("s/0").rglob("*") if file.is_file()}
    for damaged in (whole[:1000], b"x" + whole[1:], whole.replace(b"CREATE TABLE", b"CREATE TABEL")):
        study.write_bytes(damaged)
        code, _, err = sweep(*words, "hydra.sweeper.jobs=2")
        assert code == 2 and "study.db is damaged" in err and err.count("\n") == 1, err
        assert len(rows("s")) == 1 and {file: file.read_bytes() for file in before} == before
    study.unlink()
    code, out, err = sweep(*words, "hydra.sweeper.jobs=2")
    assert code == 0 and "job 0:" not in out and len(rows("s")) == 2, err


def test_a_search_does_not_go_on_with_another_configuration(sweep: Any) -> None:
    pytest.importorskip("optuna")
    Path("plan.yaml").write_text("layers: all\nqkv:\n  right: [1, 2]\n")
    words = ["sweep=optuna_shapes", "factors=plan.yaml", "factors.mlp.terms=range(1,4)", "run_dir=s"]
    assert sweep(*words, "hydra.sweeper.jobs=1")[0] == 0
    assert sweep(*words, "hydra.sweeper.jobs=2")[0] == 0 and len(rows("s")) == 2
    Path("plan.yaml").write_text("layers: all\nqkv:\n  right: [2, 1]\n")
    before = {path: path.stat().st_mtime_ns for path in Path("s").rglob("*") if path.name != ".lock"}
    code, _, err = sweep(*words, "hydra.sweeper.jobs=3")
    assert code == 2 and "run_dir=s: job 0 has factors.qkv.right=[1, 2], now [2, 1]" in err and err.count("\n") == 1
    assert before == {path: path.stat().st_mtime_ns for path in Path("s").rglob("*") if path.name != ".lock"}


def test_a_search_for_what_no_job_measures_ends_after_the_first(sweep: Any) -> None:
    pytest.importorskip("optuna")
    words = [*SEARCH, "factors.mlp.right=[1,2]", "hydra.sweeper.metrics=[perplexity,size]", "run_dir=s"]
    for _ in range(2):  # the same command says the same again
        code, _, err = sweep(*words)
        assert code == 2 and "metrics=[perplexity,size]: job 0 has no size; it has perplexity, steps" in err
        assert len(rows("s")) == 1 and err.count("\n") == 1


def test_a_search_stops_at_a_failed_job(sweep: Any) -> None:
    pytest.importorskip("optuna")
    words = [*SEARCH, "factors.mlp.right=[1,2]", "logger.project=fail", "fail_fast=true", "run_dir=s"]
    for _ in range(2):
        assert sweep(*words)[0] == 1
        assert [row["status"] for row in rows("s")] == ["failed"]


def test_a_search_retries_what_failed_and_tells_its_study(sweep: Any) -> None:
    optuna = pytest.importorskip("optuna")
    words = [*SEARCH, "factors.mlp.right=[1,2]", "logger.project=flaky", "hydra.sweeper.jobs=2", "run_dir=s"]
    assert sweep(*words)[0] == 1
    code, _, err = sweep(*words)
    assert code == 0, err
    assert [row["status"] for row in rows("s")] == ["finished", "finished"]
    study = optuna.load_study(study_name="shapes", storage="sqlite:///s/study.db")
    done = [t for t in study.trials if t.state == optuna.trial.TrialState.COMPLETE and "job" in t.user_attrs]
    assert sorted(t.user_attrs["job"] for t in done) == [0, 1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["hydra.sweeper.jobs=0"], "hydra.sweeper.jobs=0: must be a whole number from 1"),
        (["factors.mlp.terms=1", "factors.mlp.right=[1,2]", "factors.layers=all"], "nothing to search"),
        (["trainer.stepss=1"], "trainer.stepss"),
        (["seed=13"], "seed=13: refused by check"),
        ([*ONE_SHAPE, "seed=1,2,13"], "seed=13: refused by check"),
        ([*ONE_SHAPE, "seed=range(12,15)"], "seed=13: refused by check"),
        ([*ONE_SHAPE, "trainer.precision=fp32,fp31"], "trainer.precision=fp31: not one of"),
        (["run_dir=r,t"], "run_dir: the jobs of a sweep share one folder"),
        (["hydra.sweeper.metrics=[]"], "hydra.sweeper.metrics=[]: must be a list of names"),
        (["hydra.sweeper.metrics=perplexity"], "hydra.sweeper.metrics=perplexity: must be a list of names"),
        (["hydra.sweeper.seed=x"], "hydra.sweeper.seed=x: must be a whole number from 0"),
        (["factors.mlp.terms=range(5,1)"], "factors.mlp.terms=range(5,1): cannot be searched: a range goes"),
        (["optimizer.lr=interval(5,1)"], "optimizer.lr=interval(5,1): cannot be searched: "),
    ],
)
def test_a_bad_search_leaves_nothing(words: list[str], message: str, sweep: Any) -> None:
    pytest.importorskip("optuna")
    code, _, err = sweep("sweep=optuna_shapes", "run_dir=s", *words)
    assert code == 2 and message in err and len(err.splitlines()) == 1
    assert list(Path().iterdir()) == []


def test_values_of_a_search_that_do_not_go_together_are_no_job(sweep: Any) -> None:
    pytest.importorskip("optuna")
    # Block-wise repair needs a start that is fitted: 8 steps of it are wrong beside the first start alone.
    words = [*ONE_SHAPE, "start=random,calibrated", "repair.passes=0,8", "hydra.sweeper.jobs=10", "run_dir=s"]
    code, _, err = sweep("sweep=optuna_shapes", *words)
    assert code == 0 and "no job: start=random repair.passes=8: " in err, err
    pairs = {(row["start"], row["repair.passes"]) for row in rows("s")}
    assert pairs == {("random", "0"), ("calibrated", "0"), ("calibrated", "8")}
    assert len(rows("s")) == 3 and {row["status"] for row in rows("s")} == {"finished"}
