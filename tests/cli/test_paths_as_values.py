"""Paths and hub ids in a preset's place, and paths with characters that Hydra's grammar does not take."""

import pytest

PLAN = "layers: odd\nmlp:\n  right: [2, 1]\n  terms: 3\n"


@pytest.mark.parametrize("name", ["plan.yaml", "my plan.yaml", "a=b.yaml", "a,b.yaml", "2024.yaml", "kngpt2.yaml"])
def test_factors_from_a_file(name, shown, tmp_path):
    (tmp_path / name).write_text(PLAN)
    (config,) = shown("train", f"factors=./{name}", "factors.mlp.terms=2")
    assert config["factors"]["mlp"] == {"right": [2, 1], "terms": 2, "layers": None}
    assert config["factors"]["embedding"] is None


def test_swept_factors_mix_presets_and_files(shown, tmp_path):
    (tmp_path / "my plan.yaml").write_text(PLAN)
    (tmp_path / "x,y.yaml").write_text(PLAN.replace("3", "4"))
    configs = shown("train", "-m", "factors=kngpt2,./my plan.yaml,'x,y.yaml',x,y.yaml,dense")
    mlps = [config["factors"]["mlp"] for config in configs]
    assert [mlp["terms"] if mlp else None for mlp in mlps] == [1, 3, 4, 4, None]


def test_two_files_of_one_name_stay_apart(shown, tmp_path):
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "plan.yaml").write_text(PLAN.replace("3", str(number + 4)))
    configs = shown("compress", "-m", "factors=1/plan.yaml,2/plan.yaml")
    assert [config["factors"]["mlp"]["terms"] for config in configs] == [5, 6]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("mlp:\n  right: ${oc.env:HOME}\n", "is not allowed"),
        ("_target_: os.system\n", "_target_"),
        ("maps:\n  _target_: os.system\n", "_target_"),
        ("defaults:\n  - /model: mini\n", "defaults: unknown key"),
        ("mpl:\n  terms: 1\n", "nearest: mlp"),
        ("mlp: &a\n  terms: 1\nqkv: *a\n", "aliases"),
        ("- 1\n", "keys and values"),
        ("mlp: [\n", "not valid YAML"),
    ],
)
def test_factors_file_is_data_and_nothing_else(text, reason, command, tmp_path):
    (tmp_path / "plan.yaml").write_text(text)
    code, _, err = command("train", "factors=plan.yaml", "--show")
    assert code == 2
    assert "plan.yaml" in err and reason in err and err.count("\n") == 1


def test_missing_file_names_the_nearest(command, tmp_path):
    (tmp_path / "plan.yaml").write_text(PLAN)
    code, _, err = command("train", "factors=./plam.yaml")
    assert code == 2
    assert "nearest: ./plan.yaml" in err


@pytest.mark.parametrize("name", ["student", "my model", "a=b,c", "7"])
def test_model_folder_becomes_absolute(name, shown, tmp_path):
    (tmp_path / name).mkdir()
    (config,) = shown("evaluate", f"model={name}")
    assert config["model"]["path"] == str(tmp_path / name)


@pytest.mark.parametrize("hub_id", ["distilgpt2", "openai-community/gpt2", "asset:mini"])
def test_hub_id_stays_as_it_is(hub_id, shown):
    (config,) = shown("evaluate", f"model={hub_id}")
    assert config["model"]["path"] == hub_id


def test_missing_folder_below_an_existing_one_is_no_hub_id(command, tmp_path):
    (tmp_path / "runs").mkdir()
    code, _, err = command("evaluate", "model=runs/firts")
    assert code == 2 and "model=runs/firts: no such" in err


@pytest.mark.parametrize("name", ["with=equals.txt", "with space (1).txt", "with,comma.txt", "it's.txt", "a&b#c.txt"])
def test_awkward_path_is_quoted(name, shown, tmp_path):
    (tmp_path / name).touch()
    (config,) = shown("train", f"data.source={tmp_path / name}")
    assert config["data"]["source"] == str(tmp_path / name)


def test_awkward_paths_in_lists_and_sweeps(shown, tmp_path):
    first, second = tmp_path / "a=1.txt", tmp_path / "b,c.txt"
    first.touch(), second.touch()
    (config,) = shown("train", f"data.source=[{first},{tmp_path}/d.txt]")
    assert config["data"]["source"] == [str(first), f"{tmp_path}/d.txt"]
    configs = shown("train", "-m", f"data.source={first},{second},[{second},x]")
    assert [config["data"]["source"] for config in configs] == [str(first), str(second), [str(second), "x"]]
    configs = shown("train", "-m", f"data.source={second},x")
    assert [config["data"]["source"] for config in configs] == [str(second), "x"]


def test_flag_may_stand_anywhere_and_lists_are_swept(shown):
    words = ["seed=1", "factors.mlp.right=[1,2],[2,1],[2,2]", "factors.mlp.terms=1,2"]
    for position in range(4):
        configs = shown("train", *words[:position], "-m", *words[position:])
        mlps = [(config["factors"]["mlp"]["right"], config["factors"]["mlp"]["terms"]) for config in configs]
        assert mlps == [([a, b], n) for a, b in ((1, 2), (2, 1), (2, 2)) for n in (1, 2)]
        assert {config["seed"] for config in configs} == {1}


@pytest.mark.parametrize(
    "words",
    [
        ("inspect", "run_dir=~nosuchuser/x"),
        ("inspect", "model=~nosuchuser/x"),
        ("inspect", "model.path=~nosuchuser/x"),
        ("inspect", "factors=~nosuchuser/x.yaml"),
        ("train", "resume=~nosuchuser/x"),
        ("train", "data.source=[a.txt,~nosuchuser/x.txt]"),
        ("generate", "prompt=~tilde", "prompts=~nosuchuser/x.txt", "prompt=null"),
        ("glue", "+baselines.small=~nosuchuser/x"),
    ],
)
def test_a_home_folder_of_nobody_is_one_line(words, command, tmp_path):
    code, _, err = command(*words)
    assert code == 2 and err.count("\n") == 1 and "~nosuchuser" in err, err
    assert list(tmp_path.iterdir()) == []


def test_prose_may_begin_with_a_tilde(shown):
    (config,) = shown("generate", "prompt=~nosuchuser is no path")
    assert config["prompt"] == "~nosuchuser is no path"
