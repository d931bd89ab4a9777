"""What runs models in part ``generate``: each token is noted, and what is lacking is named."""

from pathlib import Path

import pytest
import torch
from tiny_models import config_of, random_model

from kncompress.anatomy.plan import Plan, RightFactor
from kncompress.bench.generate import measure_generation
from kncompress.bench.runtimes import load_runtime, runtimes_of
from kncompress.bench.setting import Setting, setting_of
from kncompress.bench.writing import in_turns, texts, timed
from kncompress.compression.compress import compress_
from kncompress.config import BenchConfig
from kncompress.config.measurement import RUNTIMES
from kncompress.errors import UserError
from kncompress.formats.onnx_decoder import cache_sizes
from kncompress.formats.onnx_folder import GRAPH, accompany
from kncompress.formats.onnx_graph import bytes_read, write_decoder
from kncompress.formats.onnx_integers import write_integers
from kncompress.formats.pretrained import save_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A factored model for each runtime."""
    model, folder = random_model(config_of("llama")), tmp_path_factory.mktemp("runtimes")
    compress_(model, Plan({"layers.*": RightFactor((2, 1))}))
    save_model(model, folder / "transformers")
    (folder / "onnx").mkdir()
    write_decoder(model, cache_sizes(model), folder / "onnx" / GRAPH)
    accompany(model, None, folder / "onnx", cache_sizes(model))
    return {name: folder / ("transformers" if name == "transformers" else "onnx") for name in RUNTIMES}


@pytest.mark.parametrize("name", RUNTIMES)
def test_each_token_is_noted_when_it_is_known(name: str, folders: dict[str, Path]) -> None:
    if name == "onnxruntime-genai":
        pytest.importorskip("onnxruntime_genai")
    runtime, ticks = load_runtime(name, folders[name], CPU, torch.float32), list[int]()
    runtime.write(torch.arange(12).view(2, 6), 5, lambda: ticks.append(0))
    assert len(ticks) == 5
    seconds = timed(runtime, texts(2, 9, 3, 4, 96))
    assert seconds.token > 0 and seconds.prompt > 0 and seconds.token_work >= 0


def test_a_slow_prompt_does_not_count_for_the_tokens_after_it() -> None:
    class Slow:
        def write(self, ids: torch.Tensor, new: int, tick: object) -> None:
            import time

            for number in range(new):
                time.sleep(0.05 if number == 0 else 0.002)
                tick()  # type: ignore[operator]

    rounds = in_turns({"a": Slow(), "b": Slow()}, texts(1, 4, 2, 5, 96), 2)
    assert rounds["prompt"].median("a") > 0.05 and rounds["token"].median("a") < 0.03
    assert len(rounds["token"].seconds["b"]) == 2


def test_bytes_read_are_those_of_all_but_looked_up_tables(folders: dict[str, Path], tmp_path: Path) -> None:
    """A tied table is read by the head; one of its own is not."""
    for kind, tied in (("llama", True), ("gpt_neox.untied", False)):
        model = random_model(config_of(kind))
        assert model.config.tie_word_embeddings == tied
        write_decoder(model, cache_sizes(model), tmp_path / GRAPH)
        table = 0 if tied else model.get_input_embeddings().weight.numel()
        expected = 4 * (sum(parameter.numel() for parameter in model.parameters()) - table)
        assert expected <= bytes_read(tmp_path / GRAPH) < expected + 2500  # angles, shapes
        write_integers(tmp_path / GRAPH, tmp_path / "integers.onnx", 8)
        assert bytes_read(tmp_path / "integers.onnx") < bytes_read(tmp_path / GRAPH)


def setting_for(**values: object) -> Setting:
    return setting_of(BenchConfig(size="small", accelerator="cpu", precision="fp32", **values))  # type: ignore[arg-type]


def test_a_runtime_that_is_not_installed_is_named_or_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    there = __import__("importlib.util").util.find_spec
    absent = {"onnxruntime_genai"}
    monkeypatch.setattr("kncompress.bench.runtimes.find_spec", lambda name: None if name in absent else there(name))
    names, missing = runtimes_of(setting_for().config, CPU)
    assert (
        names == ["transformers", "onnxruntime"] and "pip install 'kncompress[genai]'" in missing["onnxruntime-genai"]
    )
    with pytest.raises(UserError, match="runtimes=onnxruntime-genai: needs the package onnxruntime_genai: pip install"):
        runtimes_of(setting_for(runtimes="onnxruntime-genai").config, CPU)
    assert runtimes_of(setting_for(runtimes=["transformers"]).config, CPU) == (["transformers"], {})
    with pytest.raises(UserError, match="runtimes=onnxruntime: runs on the CPU here"):
        runtimes_of(setting_for(runtimes="onnxruntime").config, torch.device("cuda"))


def test_a_family_without_a_graph_with_a_cache_is_one_line(tmp_path: Path) -> None:
    from kncompress.config import ModelConfig

    config_of("gptj").save_pretrained(tmp_path)
    values = {"model": ModelConfig(path=str(tmp_path)), "accelerator": "cpu", "precision": "fp32", "repeats": 1}
    asked = setting_of(BenchConfig(**values, runtimes=["onnxruntime"]))
    with pytest.raises(UserError, match="runtimes=onnxruntime: a gptj has an attention of its own"):
        next(measure_generation(asked, Plan({})))
