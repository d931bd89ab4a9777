"""``glue``: teacher, student and baseline over tasks and seeds; tables, predictions, the cache, resuming, bad input."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from glue_layout import make_glue, write
from transformers import AutoModelForSequenceClassification
from verbs.conftest import interrupted_when, read

CELLS = ("teacher", "student", "student_ilkd", "half_ilkd")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_glue(tmp_path_factory.mktemp("glue"), train=8, dev=6, test=3)


@pytest.fixture
def quick(tiny: Path, folder: Path, tmp_path: Path) -> list[str]:
    """Overrides that make a cell a matter of tenths of a second."""
    return [
        f"teacher={tiny}",
        f"data.source={folder}",
        f"data.cache_dir={tmp_path / 'cache'}",
        "data.max_length=32",
        "fine_tuning.epochs=1",
        "fine_tuning.batch_size=8",
        "fine_tuning.precision=fp32",
        "fine_tuning.accelerator=cpu",
    ]


def times(run: Path) -> dict[str, int]:
    return {str(file.relative_to(run)): file.stat().st_mtime_ns for file in run.glob("cells/**/*.json")}


def test_a_suite_leaves_cells_tables_and_predictions(command: Any, quick: list[str]) -> None:
    words = [*quick, "tasks=[mnli,ax,stsb]", "seeds=2", "baselines.half=layerdrop", "run_dir=run"]
    code, out, err = command("glue", *words)
    assert code == 0, err
    run = Path("run")
    for seed in (0, 1):
        for task in ("mnli", "stsb"):
            assert {file.stem for file in (run / "cells" / task / f"seed{seed}").iterdir()} == set(CELLS)
    result = read(run, "result.json")
    metrics = result["metrics"]
    assert result["status"] == "finished" and result["verb"] == "glue"
    cells = [read(run / "cells" / "mnli" / f"seed{seed}", "student_ilkd.json") for seed in (0, 1)]
    values = [cell["scores"]["accuracy_matched"] for cell in cells]
    assert metrics["glue/mnli/accuracy_matched/student_ilkd"] == pytest.approx(sum(values) / 2)
    assert metrics["glue/mnli/accuracy_matched/student_ilkd/std"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    assert (metrics["glue/mnli/dev_examples"], metrics["glue/stsb/dev_examples"]) == (12, 6)
    assert metrics["parameters/half_ilkd"] < metrics["parameters/teacher"] > metrics["parameters/student"]
    for who in CELLS:
        mnli = [metrics[f"glue/mnli/accuracy_{name}/{who}"] for name in ("matched", "mismatched")]
        stsb = [metrics[f"glue/stsb/{name}/{who}"] for name in ("pearson", "spearman")]
        assert metrics[f"glue/average/{who}"] == pytest.approx((sum(mnli) / 2 + sum(stsb) / 2) / 2)
        made = {file.name: file.read_text().splitlines() for file in (run / "predictions" / who / "seed1").iterdir()}
        assert set(made) == {"MNLI-m.tsv", "MNLI-mm.tsv", "AX.tsv", "STS-B.tsv"}
        for name, lines in made.items():
            assert lines[0] == "index\tprediction" and [line.split("\t")[0] for line in lines[1:]] == ["0", "1", "2"]
            answers = [line.split("\t")[1] for line in lines[1:]]
            if name == "STS-B.tsv":
                assert all(0 <= float(answer) <= 5 for answer in answers)
            else:
                assert set(answers) <= {"entailment", "neutral", "contradiction"}
    table = (run / "table.md").read_text()
    assert table in out and "| half_ilkd" in table and "stsb 8 / 6; mnli 8 / 12" in table and "±" in table
    assert len(read(run, "table.json")["cells"]) == 2 * 2 * 4
    assert "16/16 mnli seed 1 half_ilkd: epoch 1/1" in err


@pytest.mark.usefixtures("interruptible")
def test_a_stopped_suite_goes_on_and_repeats_nothing(command: Any, quick: list[str]) -> None:
    words = [*quick, "tasks=[cola,rte]", "training=[ilkd]", "save_models=true"]
    run = Path("run").absolute()
    with interrupted_when(lambda: len(times(run)) >= 3):
        code, _, err = command("glue", *words, "seeds=99", f"run_dir={run}")
    assert code == 130, err
    assert read(run, "result.json")["status"] == "interrupted"
    done = times(run)
    assert 3 <= len(done) < 99 and all(json.loads((run / name).read_text())["scores"] for name in done)
    # As if it had been asked for two seeds: what is left is little.
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("seeds: 99", "seeds: 2"))
    code, out, err = command("glue", f"resume={run}")
    assert code == 0, err
    assert f"{len(done)} of them finished" in out
    after = times(run)
    assert {name: after[name] for name in done} == done
    whos = ("teacher", "student_ilkd")
    assert {f"cells/{t}/seed{s}/{w}.json" for t in ("cola", "rte") for s in (0, 1) for w in whos} <= set(after)
    model = AutoModelForSequenceClassification.from_pretrained(run / "models" / "rte" / "seed1" / "student_ilkd")
    assert model.config.id2label == {0: "entailment", 1: "not_entailment"}


def test_a_fine_tuned_teacher_is_used_again(command: Any, quick: list[str], tmp_path: Path) -> None:
    words = [*quick, "tasks=rte", "training=[ilkd]"]
    assert command("glue", *words, "run_dir=first")[0] == 0
    (made,) = [path for path in (tmp_path / "cache" / "glue").iterdir() if path.is_dir()]
    before = {file: file.stat().st_mtime_ns for file in made.iterdir()}
    code, _, err = command("glue", *words, "run_dir=second", "objective.hidden=0.5")
    assert code == 0 and "teacher: epoch" not in err
    assert {file: file.stat().st_mtime_ns for file in made.iterdir()} == before
    cells = [read(Path(run) / "cells" / "rte" / "seed0", "teacher.json") for run in ("first", "second")]
    assert [(cell.pop("checksum") > 0, cell.pop("cached")) for cell in cells] == [(True, False), (True, True)]
    assert cells[0] == cells[1]
    # Anything that matters makes another teacher.
    for number, word in enumerate(("optimizer.lr=1e-5", "data.train_examples=4")):
        code, _, err = command("glue", *words, word, f"run_dir=other{number}")
        assert code == 0 and "teacher: epoch" in err
    assert len([path for path in (tmp_path / "cache" / "glue").iterdir() if path.is_dir()]) == 3


def test_a_student_from_a_folder(command: Any, quick: list[str], tiny: Path) -> None:
    assert command("compress", f"model={tiny}", "factors=kngpt2", "run_dir=student")[0] == 0
    words = [*quick, "tasks=cola", "training=[plain]", "predictions=false"]
    found = {}
    for name, word in (("folder", "student=student/model"), ("factors", "factors=kngpt2")):
        code, _, err = command("glue", *words, word, f"run_dir={name}")
        assert code == 0, err
        found[name] = read(Path(name) / "cells" / "cola" / "seed0", "student.json")
        assert not (Path(name) / "predictions").exists()
    assert found["folder"]["history"] == found["factors"]["history"]
    assert found["folder"]["parameters"] == found["factors"]["parameters"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tasks=[colla]"], "tasks=colla: no such task; tasks: cola, sst2"),
        (["tasks=[polarity]"], "tasks=polarity: not in data.source="),
        (["tasks=[ax]"], "the model of mnli answers it"),
        (["data.source=nowhere"], "data.source=nowhere: no such folder"),
        (["data.max_length=64"], "data.max_length=64: the model has 32 positions"),
        (["data.train_examples=0"], "data.train_examples=0: must be greater than 0"),
        (["seeds=0"], "seeds=0: must be a number from 1"),
        (["seeds=[1,1]"], "seeds=[1, 1]: names a seed twice"),
        (["training=[quick]"], "training=quick: not one of plain, ilkd"),
        (["objective=cross_entropy"], "objective: compares with no teacher"),
        (["student=nowhere/at/all"], "student=nowhere/at/all: no such folder"),
        (["baselines.half=layerdorp"], "baselines.half=layerdorp: no such folder, hub id, YAML file or preset"),
        (["baselines.teacher=layerdrop"], "baselines.teacher=layerdrop: teacher is taken"),
        (["factors.mlp.right=[7,1]"], "factors.mlp.right=[7, 1]: 7 does not divide 64"),
        (["teacher=nowhere/at/all"], "nowhere/at/all"),
        (["predictions=true", "tasks=[rte]"], "has no test set of rte"),
        (["fine_tuning.epoch=3"], "fine_tuning.epoch"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    command: Any, quick: list[str], words: list[str], message: str
) -> None:
    replaced = {word.partition("=")[0] for word in words}
    kept = [word for word in quick if word.partition("=")[0] not in replaced]
    code, _, err = command("glue", *kept, *words, "run_dir=run")
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1, err
    assert not Path("run").exists()


def test_wrong_data_and_models_are_told_before_anything_is_written(
    command: Any, quick: list[str], tiny: Path, tmp_path: Path
) -> None:
    def refused(*words: str) -> str:
        kept = [word for word in quick if word.partition("=")[0] not in {w.partition("=")[0] for w in words}]
        code, _, err = command("glue", *kept, *words, "run_dir=run")
        assert code == 2 and not Path("run").exists() and len(err.strip().splitlines()) == 1, err
        return str(err)

    data = tmp_path / "data"
    write(data / "RTE" / "train.tsv", "index\tsentence1\tsentence2\tlabel", "0\ta\tb\tperhaps")
    write(data / "RTE" / "dev.tsv", "index\tsentence1\tsentence2\tlabel", "0\ta\tb\tentailment")
    assert "RTE/train.tsv, line 2: label=perhaps: not one of entailment" in refused(f"data.source={data}")
    (data / "RTE" / "dev.tsv").unlink()
    assert "no file RTE/dev.tsv in it" in refused(f"data.source={data}")
    (tmp_path / "half.yaml").write_text("mlp: {terms: many}\n")
    assert "half.yaml: mlp.terms: Value 'many'" in refused(f"baselines.half={tmp_path / 'half.yaml'}")

    bare = shutil.copytree(tiny, tmp_path / "bare")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (bare / name).exists():
            fields = json.loads((bare / name).read_text())
            (bare / name).write_text(
                json.dumps({k: v for k, v in fields.items() if k not in ("eos_token", "pad_token")})
            )
    assert "has neither a pad nor an end-of-text token" in refused(f"teacher={bare}")

    other = shutil.copytree(tiny, tmp_path / "other")
    fields = json.loads((other / "config.json").read_text())
    for key, value, message in (
        ("vocab_size", 301, "has 301 token ids and the teacher 300"),
        ("n_embd", 32, "is 32 wide and the teacher 16"),
        ("n_head", 4, "has 4 attention heads and the teacher 2"),
        ("n_layer", 3, "has 3 layers, more than the teacher's 2"),
    ):
        (other / "config.json").write_text(json.dumps(fields | {key: value}))
        assert message in refused(f"student={other}")
