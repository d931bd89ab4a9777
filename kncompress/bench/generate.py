"""Part ``generate``: prompts and decoding with a cache, dense and factored, in each runtime; bytes and memory."""

import gc
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kncompress.anatomy.plan import Plan
from kncompress.anatomy.sites import positions_of
from kncompress.bench.child import run_child
from kncompress.bench.machine import Ceiling
from kncompress.bench.measurement import OURS, Measurement
from kncompress.bench.rivals import Unavailable
from kncompress.bench.runtimes import TRANSFORMERS, Runtime, load_runtime, runtimes_of
from kncompress.bench.setting import Setting, random_model
from kncompress.bench.writing import Texts, in_turns, texts
from kncompress.compression.compress import compress_
from kncompress.compression.inspection import inspect_config
from kncompress.errors import UserError
from kncompress.formats.onnx_decoder import cache_sizes
from kncompress.formats.onnx_dynamic import write_dynamic
from kncompress.formats.onnx_folder import GRAPH, accompany
from kncompress.formats.onnx_graph import bytes_read, write_decoder
from kncompress.formats.onnx_integers import write_integers
from kncompress.formats.pretrained import save_model

TEACHER = "dense"
_PROMPT, _START = 512, 32
"""Tokens of the prompt that is timed, and of the one before the tokens that are."""
_PROFILED = 16
"""Tokens of which a profile is taken: it keeps note of a thousand operators for each."""


@dataclass(frozen=True)
class _Pair:
    """Dense and factored model in the form that a runtime reads."""

    folders: dict[str, Path]
    read: dict[str, int]
    """Bytes of the weights that a new token reads."""
    written: dict[str, int]
    """Bytes of the files of weights."""


@dataclass(frozen=True)
class _Adds:
    """Multiply-adds of a model's maps."""

    body: int
    """For each token."""
    head: int
    """For each token whose logits are wanted."""

    def of(self, tokens: int) -> int:
        """Of a prompt, of which only the last token has logits."""
        return tokens * self.body + self.head


def measure_generation(setting: Setting, plan: Plan) -> Iterator[Measurement]:
    """``generate/<runtime>/prompt`` and ``/decoding``, with ``/batch_B`` for more than one text, ``/memory`` and
    ``/bytes``; the weights are random. Of a prompt the multiply-adds are promised, of decoding the bytes read.

    Raises:
        UserError: onnxruntime is asked for by name, and the family has an attention of its own.
    """
    names, missing = runtimes_of(setting.config, setting.device)
    with tempfile.TemporaryDirectory(prefix="kncompress-bench-") as folder:
        models = _models(setting, plan)
        if names != [TRANSFORMERS] and not cache_sizes(models[TEACHER]):
            why = f"a {setting.fields.model_type} has an attention of its own, for which there is no graph with a cache"
            if setting.config.named_runtimes:
                raise UserError(f"runtimes={next(name for name in names if name != TRANSFORMERS)}: {why}")
            missing |= {name: why for name in names if name != TRANSFORMERS}
            names = [TRANSFORMERS]
        adds = _multiply_adds(setting, plan)
        if TRANSFORMERS in names:
            pair = _folders(models, setting, Path(folder))
            rows = _measure(setting, pair, TRANSFORMERS, f"generate/{TRANSFORMERS}", adds, setting.ceiling)
            yield replace(next(rows), missing=missing)
            yield from rows
        graphs = {} if names == [TRANSFORMERS] else _graphs(models, setting, Path(folder))
        del models
        gc.collect()
        for bits, pair in graphs.items():
            for name in names:
                if name != TRANSFORMERS:
                    prefix = f"generate/{name}/{_label(bits)}"
                    yield from _measure(setting, pair, name, prefix, adds, setting.float32_ceiling)


def _label(bits: Any) -> str:
    return bits if isinstance(bits, str) else f"bits_{bits}"


def _models(setting: Setting, plan: Plan) -> dict[str, Any]:
    """In float32 on the CPU."""
    seed, cpu = setting.config.seed, torch.device("cpu")
    dense, student = (random_model(setting.fields, seed, cpu, torch.float32) for _ in range(2))
    compress_(student, plan, "random")
    return {OURS: student, TEACHER: dense}


def _multiply_adds(setting: Setting, plan: Plan) -> dict[str, _Adds]:
    found = inspect_config(setting.fields, plan)
    head = next((row for row in found.maps if row.name == "head"), None)
    sizes = {
        OURS: (found.compression.multiply_adds_after, head.multiply_adds if head else 0),
        TEACHER: (found.compression.multiply_adds_before, head.dense_multiply_adds if head else 0),
    }
    return {name: _Adds(whole - head, head) for name, (whole, head) in sizes.items()}


def _folders(models: dict[str, Any], setting: Setting, folder: Path) -> _Pair:
    """Of transformers, in the type of the benchmark."""
    setting.say("generate: folders")
    folders = {name: folder / f"folder-{name}" for name in models}
    for name, model in models.items():
        save_model(model, folders[name], dtype=setting.dtype)
    read = {name: _weights(model) * setting.number_bytes for name, model in models.items()}
    return _Pair(folders, read, {name: _bytes(made, "*.safetensors") for name, made in folders.items()})


def _graphs(models: dict[str, Any], setting: Setting, folder: Path) -> dict[Any, _Pair]:
    """{bits: folders of ONNX}; the graph is recorded once and then rounded."""
    floats = {}
    for name, model in models.items():
        setting.say(f"generate: graph, {name}")
        sizes, floats[name] = cache_sizes(model), folder / f"32-{name}"
        floats[name].mkdir()
        write_decoder(model, sizes, floats[name] / GRAPH)
        accompany(model, None, floats[name], sizes)
    made = {}
    for bits in setting.config.bits:
        folders = floats
        if bits != 32:
            folders = {name: folder / f"{bits}-{name}" for name in models}
            for name, model in models.items():
                folders[name].mkdir()
                source, target = floats[name] / GRAPH, folders[name] / GRAPH
                _ = write_dynamic(source, target) if bits == "dynamic" else write_integers(source, target, bits)
                accompany(model, None, folders[name], cache_sizes(model))
        read = {name: bytes_read(made / GRAPH) for name, made in folders.items()}
        made[bits] = _Pair(folders, read, {name: _bytes(where, f"{GRAPH}*") for name, where in folders.items()})
    return made


def _bytes(folder: Path, pattern: str) -> int:
    return sum(file.stat().st_size for file in folder.glob(pattern))


def _measure(
    setting: Setting, pair: _Pair, runtime: str, prefix: str, adds: dict[str, _Adds], ceiling: Ceiling
) -> Iterator[Measurement]:
    sizes, vocabulary = setting.sizes, setting.fields.vocab_size
    positions = positions_of(setting.fields)
    start = min(_START, positions // 2)
    new, prompt = min(sizes.new_tokens, positions - start - 1), min(_PROMPT, positions - 1)
    models = {
        name: load_runtime(runtime, folder, setting.device, setting.dtype) for name, folder in pair.folders.items()
    }
    for batch in sizes.batches:
        setting.say(f"{prefix}: {batch} x {prompt} and {new} tokens")
        yield from _times(setting, pair, models, texts(batch, prompt, start, new, vocabulary), prefix, adds, ceiling)
    del models
    gc.collect()
    setting.say(f"{prefix}: memory")
    job: dict[str, Any] = {
        "runtime": runtime,
        "device": setting.device.type,
        "dtype": str(setting.dtype).removeprefix("torch."),
    }
    job |= {"prompt": prompt, "vocabulary": vocabulary, "threads": torch.get_num_threads()}
    what = f"1 x {prompt} tokens: above what the packages take"
    try:
        found = {
            name: run_child(["-m", "kncompress.bench.writing"], job | {"folder": str(folder)})
            for name, folder in pair.folders.items()
        }
        above = {name: float(values["above"]) for name, values in found.items()}
        peaks = {f"{prefix}/memory/peak/{name}": float(values["peak"]) for name, values in found.items()}
        ratio = {TEACHER: above[TEACHER] / above[OURS]}
        yield Measurement(f"{prefix}/memory", what, above, ratio, TEACHER, unit="bytes", more=peaks)
    except Unavailable as error:
        yield Measurement(f"{prefix}/memory", what, {OURS: float("nan")}, unit="bytes", missing={runtime: str(error)})
    written = {name: float(size) for name, size in pair.written.items()}
    ratio = {TEACHER: written[TEACHER] / written[OURS]}
    yield Measurement(f"{prefix}/bytes", "files of weights", written, ratio, TEACHER, unit="bytes")


def _times(
    setting: Setting,
    pair: _Pair,
    models: dict[str, Runtime],
    given: Texts,
    prefix: str,
    adds: dict[str, _Adds],
    ceiling: Ceiling,
) -> Iterator[Measurement]:
    """Of prompts, then of decoding."""
    rounds = in_turns(models, given, setting.sizes.repeats)
    batch, tokens = given.prompt.shape
    floats = not prefix.endswith(("bits_8", "bits_4", "dynamic"))
    whole = {name: adds[name].of(tokens) for name in models}
    for kind, field, promised, flops, each in (
        ("prompt", "prompt", whole[TEACHER] / whole[OURS], 2 * batch * whole[OURS], batch * tokens),
        ("decoding", "token", pair.read[TEACHER] / pair.read[OURS], 2 * batch * adds[OURS].of(1), batch),
    ):
        name = f"{prefix}/{kind}" if batch == 1 else f"{prefix}/{kind}/batch_{batch}"
        what = f"{batch} x {tokens} tokens" if kind == "prompt" else f"a token of {batch} texts, of {given.new}"
        more = {f"{name}/tokens_per_second": each / rounds[field].median(OURS)}
        if torch.get_num_threads() == 1:  # with more, they wait for each other at full speed
            work = rounds[f"{field}_work"]
            more[f"{name}/processor_seconds"] = work.median(OURS)
            more[f"{name}/speedup_in_processor_seconds"] = work.ratio(TEACHER, OURS)
        yield Measurement(
            name,
            what,
            rounds[field].medians,
            {TEACHER: rounds[field].ratio(TEACHER, OURS)},
            TEACHER,
            promised,
            ceiling.seconds(flops if floats else 0, pair.read[OURS]),
            more=more,
            operators=_profile(setting, models[OURS], given) if kind == "decoding" and "onnx" not in prefix else {},
        )


def _profile(setting: Setting, model: Runtime, given: Texts) -> dict[str, float]:
    return setting.operators(lambda: model.write(given.start, min(given.new, _PROFILED), lambda: None))


def _weights(model: Any) -> int:
    """Numbers of the weights that a new token reads: all but tables that are only looked up."""
    looked_up = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    looked_up.append(model.get_input_embeddings())  # factored or not
    tables = {id(p) for module in looked_up for p in module.parameters()}
    head = {id(p) for p in model.get_output_embeddings().parameters()}
    return sum(p.numel() for p in model.parameters() if id(p) in head or id(p) not in tables)
