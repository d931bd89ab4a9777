"""Every parser of files and words from outside, on random inputs: each is taken, or refused by one line, and soon.

``make test-faults`` gives each its full number of inputs; the default suite a few. The seed is printed, and can be
given as ``KNCOMPRESS_FAULTS_SEED``. What was tried is added to the file that ``KNCOMPRESS_FAULTS_OUT`` names, a line of
JSON for each parser.
"""

import json
import os
import time
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.damage import altered, damaged, texts, values
from hypothesis import HealthCheck, given, note, seed, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from tiny_models import config_of, random_model

from kncompress.__main__ import VERBS
from kncompress.anatomy.plan import plan_from_config
from kncompress.anatomy.sites import anatomy_of
from kncompress.cli.overrides import split_flags, to_hydra
from kncompress.cli.presets import References, defaults_of, read_preset
from kncompress.cli.resume import plain
from kncompress.cli.streams import message
from kncompress.cli.sweep_folder import read_sweep, refuse_code
from kncompress.cli.typed_config import typed
from kncompress.config import CompressConfig
from kncompress.data.sources import find_sources
from kncompress.data.tokens import open_stream
from kncompress.errors import UserError
from kncompress.formats import gguf
from kncompress.formats.pretrained import load_config
from kncompress.formats.stored import check_weights
from kncompress.glue.files import read_examples
from kncompress.glue.tasks import TASKS
from kncompress.kron import ShapeError, parse_shape
from kncompress.planner.budget import spend
from kncompress.planner.ladder import unmeasured_table
from kncompress.planner.planning import read_harms
from kncompress.reading import checksum_text
from kncompress.runs.config_file import literal, read_config
from kncompress.runs.past_runs import read_runs
from kncompress.runs.run_folder import unfinished_run
from kncompress.training.checkpoints import read_checkpoint

FULL = os.environ.get("HYPOTHESIS_PROFILE") == "faults" or settings.get_current_profile_name() == "faults"
SEED = int(os.environ.get("KNCOMPRESS_FAULTS_SEED") or (time.time_ns() % 2**32 if FULL else 0))
SECONDS = 5.0
"""Of the processor, for one input."""


@dataclass(frozen=True)
class Parser:
    """One parser, and what it is given."""

    read: Callable[[Any, Path], object]
    good: Callable[[], Any]
    inputs: Callable[[], st.SearchStrategy[Any]]
    count: int
    """Inputs in ``make test-faults``."""
    sample: int = 40
    """Inputs in the default suite."""


RECORD: dict[str, Any] = {
    "verb": "train", "status": "running", "command": ["k", "train", "seed=1"], "seed": 1, "started": "2026-01-01",
    "ended": None, "wall_seconds": 3.5, "wandb_id": None, "wandb_group": "g", "wandb_tags": ["a"], "error": None,
    "git": {"sha": "ab", "dirty": False}, "versions": {"torch": "2"}, "machine": {"cores": 2}, "warnings": ["w"],
    "peak_memory_bytes": 7, "resumes": [{"at": "now", "command": [], "changed": {}}], "contents": {"data.source": "f0"},
}  # fmt: skip
RESULT: dict[str, Any] = {
    "verb": "train", "status": "finished", "metrics": {"perplexity/student": 3.0, "parameters/student": 10},
    "model": "model", "plan": None, "texts": [{"a": 1}], "exit_code": 0, "error": None,
}  # fmt: skip
ROW = {"name": "layers.0.attn.q", "shape": "2x2(x)2x2", "parameters": 8, "error": 0.5, "weighted": None}
SWEEP = {"verb": "train", "words": ["seed=1,2"], "overrides": ["++seed=1,2"], "metrics": [],
         "jobs": [["++seed=1"], ["++seed=2"]], "job_words": [["seed=1"], ["seed=2"]]}  # fmt: skip
FACTS = {"dtype": "uint16", "documents": 1, "tokens": 4, "text_bytes": 9, "text": "t", "tokenizer": "v",
         "checksum": checksum_text(zlib.crc32(bytes(8)))}  # fmt: skip
SHAPES = ["768x768(x)4x1*2", "s*12x3(x)4x4", "p*576x1(x)1x1536*20", "576x1(x)1x1536*8 + 288x1536(x)2x1", "keep"]
PLAN = """\
made_for:
  start: sequential
  fit: {sides: both, sweeps: 3}
mlp: {right: [2, 1], terms: 2}
qkv: null
layers: odd
scalars: true
maps:
  layers.*.attn.q: 12x12(x)2x2
  layers.0.attn.o: keep  # a note
"""
PLAN_VALUES = {"maps": {"*": "keep"}, "mlp": {"right": [1, 2]}}
CONFIG = """\
seed: 3
model:
  path: asset:mini
trainer:
  steps: 4
  keep: best
factors:
  maps: {}
data:
  source: sample
"""
TSV = "sentence\tlabel\nA fine film.\t1\nA dull one.\t0\n"
WORDS = [
    "train",
    "seed=3",
    "-m",
    "--show",
    "model=mini",
    "factors.maps={a: 2x2(x)1x1}",
    "data.source=[a,b]",
    "x='${y}'",
    "+experiment=wikitext_ilkd",
    "optimizer.lr=1e-3,2e-3",
    "hydra/launcher=joblib",
    "~logger",
    "trainer.steps=range(1,9)",
]


def _file(folder: Path, name: str, content: bytes) -> Path:
    file = folder / name
    file.write_bytes(content)
    return file


def _bytes(text: str) -> bytes:
    return text.encode(errors="surrogatepass")


def _shape(text: str, folder: Path) -> None:
    shape = parse_shape(text)
    assert parse_shape(str(shape)) == shape and shape.parameters > 0


def _plan(content: bytes, folder: Path) -> None:
    values = read_preset("factors", _file(folder, "plan.yaml", content))
    config = typed(CompressConfig, OmegaConf.create({"factors": values}))
    plan_from_config(config.factors, config_of("gpt2"))


def _harms(content: bytes, folder: Path) -> None:
    _file(folder, "harm.json", content)
    spend(read_harms(folder), 1.0)


def _record(content: bytes, folder: Path) -> None:
    for name in ("result.json", "metrics.csv", "compression.json", "samples.json"):
        (folder / name).unlink(missing_ok=True)
    _file(folder, "run.json", content)
    unfinished_run(folder, "train")


def _report(named: tuple[str, bytes], folder: Path) -> None:
    _file(folder, "run.json", json.dumps(RECORD).encode())
    _file(folder, *named)
    try:
        (run,) = read_runs([str(folder)])
        assert run.point is None or len(run.point) == 2
    finally:
        (folder / named[0]).unlink()


def _saved(content: bytes, folder: Path) -> None:
    values = read_config(_file(folder, "config.yaml", content + b"\n...\n"), f"resume={folder}")
    plain(VERBS["train"], OmegaConf.create(literal(values)))


def _sweep(content: bytes, folder: Path) -> None:
    _file(folder, "sweep.json", content)
    found = read_sweep(folder)
    assert found is not None
    refuse_code(folder, found)


def _words(words: list[str], folder: Path) -> None:
    line = split_flags(words)
    to_hydra(line.words, defaults_of("train"), References(), line.multirun)


def _tsv(content: bytes, folder: Path) -> None:
    task = TASKS["sst2"]
    for example in read_examples(task, _file(folder, "train.tsv", content), "g"):
        assert example.label in (0, 1)


def _rows(named: tuple[str, bytes], folder: Path) -> None:
    file = _file(folder, *named)
    (source,) = find_sources(str(file), "data.source")
    for text in source.documents("all"):
        text.encode()


def _facts(content: bytes, folder: Path) -> None:
    _file(folder, "tokens.bin", bytes(8))
    _file(folder, "facts.json", content)
    stream = open_stream(folder, "t", "v")
    assert len(stream) == 4 and stream.tokens[3] == 0


def _settings(content: bytes, folder: Path) -> None:
    _file(folder, "config.json", content)
    anatomy_of(load_config(folder))


def _weights(content: bytes, folder: Path) -> None:
    _file(folder, "model.safetensors", content)
    check_weights(folder, folder)


def _index(content: bytes, folder: Path) -> None:
    _file(folder, "model.safetensors.index.json", content)
    _file(folder, "b.safetensors", _safetensors())
    (folder / "model.safetensors").unlink(missing_ok=True)
    check_weights(folder, folder)


def _gguf(content: bytes, folder: Path) -> None:
    _file(folder, "tiny.gguf", content)
    load_config(folder, "tiny.gguf")
    gguf._read_config.cache_clear()


def _checkpoint(content: bytes, folder: Path) -> None:
    values = read_checkpoint(_file(folder, "last.ckpt", content))
    assert torch.equal(values["state_dict"]["w"], torch.arange(6.0))


@cache
def _scratch() -> Path:
    import tempfile

    return Path(tempfile.mkdtemp(prefix="kncompress-fuzz-"))


@cache
def _table() -> Any:
    table = unmeasured_table(anatomy_of(config_of("gpt2")), 40_000)
    values = json.loads(json.dumps(table.as_dict()))
    for row in values["maps"]:
        row["options"] = row["options"][:3]
        row["references"] = [{"error": 0.1, "kl": 0.2}, {"error": 0.3, "kl": 0.9}]
    values["maps"] = values["maps"][:4]
    return values | {"together": [[1.0, 1.1], [2.0, 2.5]], "made_for": {"start": "nearest"}}


@cache
def _safetensors() -> bytes:
    random_model(config_of("gpt2")).save_pretrained(_scratch() / "m")
    return (_scratch() / "m" / "model.safetensors").read_bytes()


@cache
def _gguf_bytes() -> bytes:
    import gguf as package

    writer = package.GGUFWriter(_scratch() / "tiny.gguf", "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(4)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b", "c", "d"])
    writer.add_tensor("token_embd.weight", torch.zeros(4, 32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return (_scratch() / "tiny.gguf").read_bytes()


@cache
def _checkpoint_bytes() -> bytes:
    values: dict[str, Any] = {"optimizer_states": [], "lr_schedulers": [], "loops": {}, "callbacks": {}}
    values |= {"epoch": 0, "global_step": 4, "state_dict": {"w": torch.arange(6.0)}}
    torch.save(values, _scratch() / "last.ckpt")
    return (_scratch() / "last.ckpt").read_bytes()


def _reported() -> st.SearchStrategy[tuple[str, bytes]]:
    csv = b"step,loss,kl\n0,1.5,\n1,nan,2e-3\n"
    return st.one_of(
        st.tuples(st.just("result.json"), _json(RESULT)["inputs"]()),
        st.tuples(st.just("compression.json"), _json({"rows": [ROW, ROW]})["inputs"]()),
        st.tuples(st.just("samples.json"), _json([{"prompt": "a", "text": "b"}])["inputs"]()),
        st.tuples(st.just("metrics.csv"), damaged([csv])),
        st.tuples(st.just("config.yaml"), damaged([CONFIG.encode()]) | values().map(lambda v: json.dumps(v).encode())),
    )


def _row_files() -> st.SearchStrategy[tuple[str, bytes]]:
    lines = b'{"text": "One."}\n{"text": "Two \\u00e9", "id": 3}\n'
    nested = b'{"text": ' + b"[" * 5000
    return st.one_of(
        st.tuples(st.just("a.jsonl"), damaged([lines, nested])),
        st.tuples(st.just("a.json"), damaged([b"[" + lines.replace(b"}\n{", b"},\n{") + b"]", b"[" * 5000])),
        st.tuples(st.just("a.csv"), damaged([b'text,id\n"One, two",3\nThree,4\n'])),
        st.tuples(st.just("a.txt"), damaged([b"One.\n\n = Two = \n\nThree."])),
    )


def _command_lines() -> st.SearchStrategy[list[str]]:
    word = st.sampled_from(WORDS) | damaged([w.encode() for w in WORDS]).map(lambda b: b.decode(errors="replace"))
    pair = st.tuples(st.sampled_from(["seed", "model", "factors", "data.source", "hydra.x", "a.b"]), texts())
    return st.lists(word | pair.map("=".join) | texts(), min_size=1, max_size=3)


def _of(contents: Callable[[], list[bytes]], *more: st.SearchStrategy[bytes]) -> dict[str, Callable[[], Any]]:
    """A good input, and damaged ones."""
    return {"good": lambda: contents()[0], "inputs": lambda: st.one_of(damaged(contents()), *more)}


def _json(*documents: Any) -> dict[str, Callable[[], Any]]:
    """A good input, and such with altered values or damaged bytes."""
    whole = [json.dumps(document, indent=1).encode() for document in documents]
    return {"good": lambda: whole[0], "inputs": lambda: altered(documents) | damaged(whole)}


def _settings_of(*kinds: str) -> dict[str, Callable[[], Any]]:
    return _json(*(json.loads(config_of(kind).to_json_string(use_diff=False)) for kind in kinds))


_AS_TEXT = {"good": lambda: SHAPES[0], "inputs": lambda: (
    texts("0123456789x()+*sp .\n٣", 40)
    | damaged([s.encode() for s in SHAPES]).map(lambda b: b.decode(errors="replace"))
)}  # fmt: skip

PARSERS = {
    "shapes": Parser(_shape, **_AS_TEXT, count=30_000, sample=200),
    "plans": Parser(_plan, **_of(lambda: [PLAN.encode()], altered([PLAN_VALUES])), count=4_000),
    "harms": Parser(_harms, lambda: _json(_table())["good"](), lambda: _json(_table())["inputs"](), 10_000),
    "run records": Parser(_record, **_json(RECORD), count=15_000, sample=100),
    "other records": Parser(_report, lambda: ("result.json", json.dumps(RESULT).encode()), _reported, 10_000, 100),
    "saved configurations": Parser(
        _saved, **_of(lambda: [CONFIG.encode()], altered([OmegaConf.to_container(OmegaConf.create(CONFIG))])),
        count=2_500, sample=20,
    ),
    "sweep files": Parser(_sweep, **_json(SWEEP), count=10_000),
    "overrides": Parser(_words, lambda: WORDS[1:2], _command_lines, 8_000),
    "TSV": Parser(_tsv, **_of(lambda: [TSV.encode()], texts().map(_bytes)), count=8_000),
    "rows of text": Parser(_rows, lambda: ("a.jsonl", b'{"text": "a"}\n'), _row_files, 6_000),
    "token cache facts": Parser(_facts, **_json(FACTS), count=8_000),
    "model settings": Parser(
        _settings, lambda: _settings_of("gpt2", "llama")["good"](), lambda: _settings_of("gpt2", "llama")["inputs"](),
        3_000, 15,
    ),
    "safetensors headers": Parser(_weights, **_of(lambda: [_safetensors(), _safetensors()[:9_000]]), count=6_000),
    "safetensors indexes": Parser(
        _index, **_json({"metadata": {}, "weight_map": {"transformer.wpe.weight": "b.safetensors"}}), count=3_000
    ),
    "GGUF headers": Parser(_gguf, **_of(lambda: [_gguf_bytes()]), count=2_000, sample=10),
    "checkpoints": Parser(_checkpoint, **_of(lambda: [_checkpoint_bytes()]), count=4_000),
}  # fmt: skip
"""What is read from outside, each with the number of its inputs in ``make test-faults`` and in the default suite."""


@pytest.mark.parametrize("name", PARSERS)
def test_random_inputs_are_taken_or_refused_by_one_line(name: str, tmp_path: Path) -> None:
    parser = PARSERS[name]
    tried = refused = 0
    slowest = 0.0

    @seed(SEED)
    @settings(
        max_examples=parser.count if FULL else parser.sample,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(parser.inputs())
    def check(content: Any) -> None:
        nonlocal tried, refused, slowest
        tried += 1
        note(repr(content)[:2000])
        since = time.process_time()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                parser.read(content, tmp_path)
        except (UserError, ShapeError) as error:
            refused += 1
            told = message(f"kncompress: {error}")
            assert told.isprintable() and len(told) <= 1000
        spent = time.process_time() - since
        slowest = max(slowest, spent)
        assert spent < SECONDS

    parser.read(parser.good(), tmp_path)  # without a fault it is taken
    began, passed = time.monotonic(), False
    try:
        check()
        passed = True
    finally:
        told = {"kind": "fuzz", "what": name, "tried": tried, "refused": refused, "passed": passed, "seed": SEED}
        told |= {"slowest": round(slowest, 3), "seconds": round(time.monotonic() - began, 1)}
        print(json.dumps(told))
        if out := os.environ.get("KNCOMPRESS_FAULTS_OUT"):
            with Path(out).open("a") as file:
                file.write(json.dumps(told) + "\n")


def test_in_all_there_are_a_hundred_thousand() -> None:
    assert sum(parser.count for parser in PARSERS.values()) >= 100_000
