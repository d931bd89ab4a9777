"""What people type comes through as they mean it: text with ``${``, a lone value of a list, Hydra's names, paths."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from kncompress.cli.overrides import hydras_folders
from kncompress.cli.saved_paths import with_absolute_paths
from kncompress.config import DataConfig, EvaluateConfig, TrainConfig
from kncompress.runs.config_file import literal, read_config, write_config
from kncompress.runs.process import tell

CODE = [
    "echo ${PATH}",
    "Price: $5 ${x",
    "${model.path}",
    "my home is ${oc.env:HOME}",
    "a \\${b} \\\\${c} $${d}",
    "it's ${a}, [b]",
    "${",
]


@pytest.mark.parametrize("text", CODE)
def test_a_prompt_is_text_and_nothing_in_it_is_looked_up(text, command):
    code, out, err = command("generate", f"prompt={text}", "--show")
    assert code == 0, err
    assert OmegaConf.to_container(OmegaConf.create(out), resolve=True)["prompt"] == text


def test_a_list_of_prompts_and_a_sweep_over_prompts(shown):
    (config,) = shown("generate", "prompt=['${a}', 'b ${c']")
    assert config["prompt"] == ["\\${a}", "b \\${c"]
    assert [one["prompt"] for one in shown("generate", "-m", "prompt='${a}','b ${c'")] == ["\\${a}", "b \\${c"]


@pytest.mark.parametrize("text", CODE)
def test_a_saved_text_is_read_back_as_it_was(text, tmp_path):
    write_config(tmp_path / "config.yaml", {"prompt": text, "list": [text], "lr": "1e-3"})
    assert read_config(tmp_path / "config.yaml") == {"prompt": text, "list": [text], "lr": "1e-3"}
    assert OmegaConf.create({"a": literal(text)}).a == text


def test_interpolations_of_other_keys_still_work(shown, monkeypatch):
    monkeypatch.setenv("TEXTS", "/texts")
    (config,) = shown("train", "data.source=${oc.env:TEXTS}/a.txt", "logger.project=${model.path}")
    assert config["data"]["source"] == "/texts/a.txt" and config["logger"]["project"] == "asset:mini"


@pytest.mark.parametrize(
    ("word", "section", "key", "wanted"),
    [
        ("fit.symmetries=hidden", "fit", "symmetries", ["hidden"]),
        ("logger.tags=x", "logger", "tags", ["x"]),
        ("logger.tags=7", "logger", "tags", ["7"]),
        ("logger.tags=[x,y]", "logger", "tags", ["x", "y"]),
    ],
)
def test_a_lone_text_is_a_list_of_one(word, section, key, wanted, shown):
    (config,) = shown("train", word)
    assert config[section][key] == wanted


def test_a_lone_value_of_another_list_is_told_how_to_write_it(command):
    code, _, err = command("train", "factors=kngpt2", "factors.mlp.right=2", "--show")
    assert (code, err) == (2, "kncompress: factors.mlp.right=2: a list; factors.mlp.right=[2]\n")


@pytest.mark.parametrize("word", ["evaluate data.source", "generate model", "evaluate model"])
def test_a_word_that_no_file_can_be_called_is_one_line(word, command):
    verb, key = word.split()
    code, _, err = command(verb, f"{key}={'x' * 5000}")
    assert code == 2 and "longer than the name of a file may be" in err and "Traceback" not in err


def test_tasks_and_trainings_take_one(shown, tmp_path):
    (tmp_path / "mine.yaml").touch()
    assert shown("evaluate", "tasks=mine.yaml")[0]["tasks"] == ["mine.yaml"]
    assert shown("glue", "training=plain")[0]["training"] == ["plain"]


def test_a_folder_with_the_name_of_a_preset_is_told(command, tmp_path):
    tell.cache_clear()
    (tmp_path / "mini").mkdir()
    code, out, err = command("inspect", "model=mini", "--show")
    assert code == 0 and "path: asset:mini" in out
    assert err == "kncompress: model=mini: the preset; the folder or file of that name here is model=./mini\n"
    code, out, err = command("inspect", "model=./mini", "--show")
    assert f"path: {tmp_path / 'mini'}" in out and err == ""
    assert command("inspect", "--show")[2] == ""  # nobody named it


def test_hydras_names_of_the_folder(shown):
    assert shown("train", "hydra.run.dir=out/a")[0]["run_dir"] == "out/a"
    assert shown("train", "-m", "seed=1,2", "hydra.sweep.dir=out/b")[1]["run_dir"] == "out/b"
    assert hydras_folders(["hydra.sweep.dir=a", "seed=1"], multirun=False) == ["seed=1"]
    assert hydras_folders(["hydra.run.dir=a", "++hydra.sweep.dir=b"], multirun=True) == ["run_dir=b"]


def test_a_run_goes_where_hydras_name_says(command, tmp_path):
    code, _, err = command("inspect", "hydra.run.dir=here")
    assert code == 0, err
    assert (tmp_path / "here" / "run.json").is_file()


def test_no_lock_is_offered_as_a_name(command, tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / "lock.txt").touch()
    for word in ("resume=./lock", "model=./lock", "factors=./lok"):
        code, _, err = command("train", word)
        assert code == 2 and ".lock" not in err


def test_paths_of_a_saved_run_are_absolute_and_other_words_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "sample", "sub"):
        (tmp_path / name).mkdir() if name == "sub" else (tmp_path / name).touch()
    config = TrainConfig(data=DataConfig(["a.txt", "sub/../a.txt", "sample", "hub:a/b:c"], validation="~/x.txt"))
    config.calibration.moments = "later"
    found = with_absolute_paths(config)
    file = str(tmp_path / "a.txt")
    assert found.data.source == [file, file, "sample", "hub:a/b:c"]
    assert found.data.validation == str(Path("~/x.txt").expanduser())
    assert found.calibration.moments == str(tmp_path / "later") and found.data.test is None
    assert config.data.source[0] == "a.txt"  # what a message shows is what was typed
    assert with_absolute_paths(EvaluateConfig(tasks=["arc_easy"])).tasks == ["arc_easy"]


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("factors.maps={a:[]}", "factors.maps.a=[]: must be a text or a number"),
        ("factors.maps={a:null}", "factors.maps.a=null: must be a text or a number"),
        ("logger.tags=[[1]]", "logger.tags[0]=[1]: must be a text or a number"),
        ("fit.symmetries=[{a:1}]", "fit.symmetries[0]={'a': 1}: must be a text or a number"),
    ],
)
def test_a_list_where_a_text_belongs_is_told(command: Callable[..., Any], word: str, told: str) -> None:
    code, _, err = command("train", word, "--show")
    assert code == 2 and err == f"kncompress: {told}\n"
