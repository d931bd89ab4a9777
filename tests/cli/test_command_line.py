"""What the command line answers without starting a job: help, errors, composed configurations."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import kncompress
from kncompress.cli.presets import config_folder, defaults_of, groups, options

HEAVY = ("torch", "transformers", "lightning", "wandb", "hydra", "omegaconf", "datasets", "numpy")


@pytest.mark.parametrize("words", [["--help"], [], ["--version"], ["train", "--help"], ["-h"]])
def test_help_imports_nothing_heavy(words, environment):
    code = f"import sys, kncompress.__main__ as m; code = m.main({words}); print(*sys.modules); sys.exit(code)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not set(HEAVY) & set(done.stdout.splitlines()[-1].split())


def test_config_error_imports_no_torch(environment, tmp_path):
    code = "import sys, kncompress.__main__ as m; code = m.main(['train', 'trainer.stepz=1']);"
    done = subprocess.run(
        [sys.executable, "-c", code + "print(*sys.modules); sys.exit(code)"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert not {"torch", "transformers", "lightning", "wandb"} & set(done.stdout.split())
    assert list(tmp_path.iterdir()) == []


def test_help_of_a_verb_lists_groups_keys_and_meanings(command):
    _, out, _ = command("train", "--help")
    assert "kngpt2 (default)" in out and "kronypt_81m" in out and "wikitext_ilkd" in out
    assert "trainer.steps: int | null = null" in out
    assert "Optimiser steps in all; overrides tokens." in out
    _, out, _ = command("evaluate", "--help")
    assert "stride: int | null = null" in out and "optimizer" not in out


ERRORS = [
    (["trian"], ["trian", "nearest: train"]),
    (["train", "trainer.stepz=1"], ["trainer.stepz: unknown key", "nearest: trainer.steps"]),
    (["train", "++modle.lr=3"], ["modle: unknown key", "nearest: model"]),
    (["train", "+model.foo=1"], ["model.foo: unknown key"]),
    (["train", "lr=3"], ["lr: unknown key", "nearest: repair.lr or optimizer.lr"]),
    (["train", "factors.mlp.rigth=[1,2]"], ["factors.mlp.rigth", "nearest: factors.mlp.right"]),
    (["train", "trainer.steps=abc"], ["trainer.steps=abc", "Integer"]),
    (["train", "factors.mlp.right=[1,x]"], ["factors.mlp.right[1]=x"]),
    (["train", "factors.mlp.right=2"], ["factors.mlp.right=2: a list; factors.mlp.right=[2]"]),
    (["train", "++trainer=3"], ["trainer=3"]),
    (["train", "optimizer.lr=-1"], ["optimizer.lr=-1", "greater than 0"]),
    (["train", "factors=kngpt3"], ["factors=kngpt3", "nearest: kngpt2", "dense"]),
    (["train", "objective=ilk"], ["objective=ilk", "nearest: ilkd"]),
    (["train", "experiment=wikitext_ikld"], ["experiment=wikitext_ikld", "nearest: wikitext_ilkd"]),
    (["train", "-m", "objective=ilkd,logit"], ["objective=logit", "nearest: logits"]),
    (["train", "-m", "factors=kngpt2,dens"], ["factors=dens", "nearest: dense"]),
    (["train", "model=mimi"], ["model=mimi", "nearest: mini"]),
    (["train", "model=./absent"], ["model=./absent: no such"]),
    (["train", "trainer.steps=1,2"], ["trainer.steps=1,2", "-m"]),
    (["train", "factors=kngpt2,dense"], ["factors=kngpt2,dense", "-m"]),
    (["train", "trainer.tokens=[1,2"], ["trainer.tokens=[1,2: not a valid override"]),
    (["train", "steps"], ["steps: not an override"]),
    (["train", "--trainer.steps=3"], ["no dashes: trainer.steps=3"]),
    (["train", "--multirn"], ["--multirn", "nearest: --multirun"]),
    (["train", "hydra.sweep.subdir=x"], ["run_dir="]),
    (["train", "resume=absent"], ["resume=absent: no such run folder"]),
    (["train", "data.source=${oc.env:KNCOMPRESS_UNSET}"], ["data.source", "'KNCOMPRESS_UNSET' not found"]),
    (["train", "data.source=${unknown:1}"], ["data.source", "unknown"]),
    (["train", "-m", "run_dir=a,b"], ["run_dir"]),
    (["evaluate", "factors=dense"], ["factors: unknown key"]),
]


@pytest.mark.parametrize(("words", "fragments"), ERRORS, ids=[" ".join(words) for words, _ in ERRORS])
def test_error_is_one_line_exit_2_and_writes_nothing(words, fragments, command, tmp_path):
    code, out, err = command(*words)
    assert code == 2
    assert err.count("\n") == 1 and err.startswith("kncompress: ")
    assert all(fragment in err for fragment in fragments), err
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def test_every_bad_job_of_a_sweep_is_told(command):
    code, _, err = command("train", "trainer.steps=1,x", "-m", "optimizer.lr=1,-1")
    assert code == 2
    numbers = [line.split()[2] for line in err.splitlines()]
    assert numbers == ["1:", "2:", "3:"]


def test_typo_in_a_preset_names_the_file(command, monkeypatch, tmp_path):
    folder = tmp_path / "conf"
    shutil.copytree(config_folder(), folder)
    (folder / "experiment" / "typo.yaml").write_text("# @package _global_\ntrainer:\n  stepz: 3\n")
    (folder / "trainer" / "wrong.yaml").write_text("steps: many\n")
    (folder / "trainer" / "broken.yaml").write_text("steps: [1\n")
    for module in ("presets", "engine"):
        monkeypatch.setattr(f"kncompress.cli.{module}.config_folder", lambda: folder)
    _, _, err = command("train", "experiment=typo")
    assert "trainer.stepz" in err and "conf/experiment/typo.yaml" in err and "nearest: trainer.steps" in err
    _, _, err = command("train", "trainer=wrong")
    assert "trainer.steps=many" in err and "conf/trainer/wrong.yaml" in err
    code, _, err = command("train", "trainer=broken")
    assert code == 2 and "broken.yaml" in err and err.count("\n") == 1


def test_defaults_are_those_of_the_dataclasses(shown):
    (config,) = shown("train")
    assert config["model"]["path"] == "asset:mini"
    assert config["trainer"]["batch_tokens"] == 8192 and config["trainer"]["steps"] is None
    assert config["objective"]["attention"] == 1.0 and config["optimizer"]["name"] == "adamw"


def test_plain_plus_and_force_mean_the_same(shown):
    configs = [shown("train", f"{sign}trainer.steps=3")[0] for sign in ("", "+", "++")]
    assert configs[0] == configs[1] == configs[2]
    assert configs[0]["trainer"]["steps"] == 3


def test_environment_variable_in_a_value(shown, monkeypatch):
    monkeypatch.setenv("KNCOMPRESS_DATA", "/texts")
    (config,) = shown("train", "data.source=${oc.env:KNCOMPRESS_DATA}/a.txt")
    assert config["data"]["source"] == "/texts/a.txt"


def _verb_of(group: str, option: str) -> str:
    if group == "experiment" and option.startswith("glue"):
        return "glue"
    anywhere = ("experiment", "sweep")
    return next(verb for verb in ("train", "compress", "evaluate") if group in (*defaults_of(verb), *anywhere))


@pytest.mark.parametrize(("group", "option"), [(group, name) for group in groups() for name in options(group)])
def test_every_preset_composes(group, option, shown, monkeypatch):
    monkeypatch.setenv("KNCOMPRESS_DATA", "/texts")
    (config,) = shown(_verb_of(group, option), f"{group}={option}")
    assert "model" in config


def test_an_experiment_is_a_short_list_of_differences():
    for file in (config_folder() / "experiment").glob("*.yaml"):
        assert len(file.read_text().splitlines()) <= 18, file.name


def test_configs_are_found_inside_an_installed_package(tmp_path, environment):
    package = tmp_path / "site" / "kncompress"
    shutil.copytree(Path(kncompress.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__", "assets"))
    shutil.copytree(config_folder(), package / "conf")
    done = subprocess.run(
        [sys.executable, "-m", "kncompress", "train", "factors=dense", "--show"],
        env=environment | {"PYTHONPATH": str(package.parent)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "asset:mini" in done.stdout


def test_slurm_starts_a_task_for_each_process():
    from kncompress.cli.engine import Engine

    words = ["hydra/launcher=slurm", "++trainer.devices=4", "++trainer.nodes=2", "hydra.launcher.partition=long"]
    launcher = Engine("train").compose(words, sweep=True).hydra.launcher
    assert (launcher.tasks_per_node, launcher.nodes, launcher.gpus_per_node) == (4, 2, 4)
    assert launcher.partition == "long" and launcher._target_.endswith("SlurmLauncher")


def test_trainers_compose(shown):
    for preset, strategy, devices in (
        ("cpu", "auto", 1),
        ("gpu", "auto", 1),
        ("ddp", "ddp", "auto"),
        ("fsdp", "fsdp", "auto"),
    ):
        (config,) = shown("train", f"trainer={preset}")
        assert (config["trainer"]["strategy"], config["trainer"]["devices"]) == (strategy, devices)
    (config,) = shown("train", "trainer=fsdp", "trainer.devices=4", "trainer.nodes=2", "trainer.precision=bf16")
    assert (config["trainer"]["devices"], config["trainer"]["nodes"]) == (4, 2)


def test_a_signal_that_a_library_makes_another_error_of_is_a_signal(command, monkeypatch):
    def compose(*_):
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            raise AttributeError("'NoneType' object has no attribute '_invalidate_flags_cache'")  # OmegaConf's

    monkeypatch.setattr("kncompress.cli.dispatch._dispatch", compose)
    assert command("train") == (143, "", "")
