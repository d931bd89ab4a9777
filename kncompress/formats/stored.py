"""What a model folder holds, told by its small files and the headers of its weights, before a model is made of it.

Where config.json and the weights contradict each other, the weights count, because they were trained.
"""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from kncompress.anatomy.families import FAMILIES
from kncompress.anatomy.mark import METHOD
from kncompress.anatomy.sites import positions_of
from kncompress.errors import UserError
from kncompress.hub import CHECKSUMS, missing_weights, only_pickled, shards, weight_map
from kncompress.reading import SMALL, checksum, read_json, shown
from kncompress.runs.process import tell

ADAPTER = "adapter_config.json"
CONSTANT = re.compile(r"(^|\.)(attn|attention)(\.attention)?\.(masked_)?bias$|rotary_emb\.inv_freq$|\.position_ids$")
"""Buffers that older versions of transformers wrote beside the weights: causal masks, their fill, positions."""
_NUMBERS, _FLOATS = (".weight", ".bias"), ("F64", "F32", "F16", "BF16")
"""Ends of the names of weights, and their types that can be read."""
_LONGEST = 240
"""Characters of a reason of transformers' own that are shown."""
_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Types of weights as safetensors and torch name them."""
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in")
"""What families call theirs."""
_INSTALLED = ("eager", "sdpa", "flex_attention")
"""Implementations of attention that need no package but torch."""


def reason_of(error: BaseException) -> str:
    """An error's text in one line: transformers' checks tell what is wrong in the second or third."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def check_config(folder: Path, path: str | Path) -> dict[str, Any]:
    """The fields of config.json. Raises UserError where they are not those of a model in plain numbers."""
    file = folder / "config.json"
    if not file.is_file():
        if (folder / ADAPTER).is_file():
            base = _fields(folder / ADAPTER, path).get("base_model_name_or_path") or "an unnamed model"
            raise UserError(
                f"model.path={path}: a LoRA adapter of {base}, not a model; merge it into that model (peft: "
                "merge_and_unload, save_pretrained) and give that folder"
            )
        others = ", ".join(sorted(f.name for f in folder.glob("*.gguf")))
        hint = f"; it has {others}: name it by model.gguf_file" if others else ""
        raise UserError(f"model.path={path}: no model there (no config.json){hint}")
    fields = _fields(file, path)
    if (folder / ADAPTER).is_file():
        raise UserError(
            f"model.path={path}: the folder holds an adapter beside the model; merge it (peft: merge_and_unload, "
            f"save_pretrained into another folder), or take {ADAPTER} out to have the model alone"
        )
    quantised = fields.get("quantization_config") or fields.get("compression_config")
    method = quantised.get("quant_method", "bitsandbytes") if isinstance(quantised, dict) else None
    if method not in (None, METHOD):
        raise UserError(
            f"model.path={path}: its weights are quantised ({method}); give the model that they were made of, in "
            "floating point, or save it dequantised (transformers: model.dequantize())"
        )
    maps = quantised.get("maps", {}) if isinstance(quantised, dict) else {}
    if not isinstance(maps, dict) or not all(isinstance(shape, str) for shape in maps.values()):
        where = f"model.path={path}: config.json: quantization_config"
        raise UserError(f"{where}.maps={shown(maps)}: must be names and shapes")
    return fields


def _fields(file: Path, path: str | Path) -> dict[str, Any]:
    return read_json(file, dict[str, Any], f"model.path={path}", SMALL)


def check_weights(folder: Path, path: str | Path) -> None:
    """Reads the header of each safetensors file, which also tells its length, and where we have written the folder the
    checksums. Raises UserError, also where the index tells of weights that its files have not."""
    from safetensors import SafetensorError, safe_open

    missing = missing_weights(folder)
    if missing and only_pickled([file.name for file in folder.iterdir()]):
        raise UserError(
            f"model.path={path}: no safetensors, only weights that must be unpickled, which is never done; "
            "convert them to model.safetensors"
        )
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"model.path={path}: the folder lacks its weights: {missing[0]}{more}")
    single = (folder / "model.safetensors").is_file()
    told = {} if single else weight_map(folder, f"model.path={path}")
    for file in _files(folder):
        try:
            with safe_open(file, framework="pt") as opened:
                kinds = {name: str(opened.get_slice(name).get_dtype()) for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"model.path={path}: {file.name} is damaged ({reason_of(error)})") from error
        subject = f"model.path={path}: {file.name}"
        for name in (name for name, place in told.items() if place == file.name and name not in kinds):
            index = "model.safetensors.index.json"
            raise UserError(f"model.path={path}: the folder lacks weights: {name}, which {index} has in {file.name}")
        for name, kind in kinds.items():
            if name.endswith(_NUMBERS) and kind not in _FLOATS and not CONSTANT.search(name):
                raise UserError(f"{subject}: {name} is of type {kind}; weights must be floats of 16 bits or more")
    check_checksums(folder, _files(folder), path)


def check_checksums(folder: Path, files: list[Path], path: str | Path) -> None:
    """Raises UserError where one of ``files`` is not what ``write_checksums`` saw in ``folder``."""
    if (folder / CHECKSUMS).is_file():
        known = read_json(folder / CHECKSUMS, dict[str, str], f"model.path={path}", SMALL)
        for file in files:
            if known.get(file.name, checksum(file)) != checksum(file):
                raise UserError(
                    f"model.path={path}: {file.name} is not as it was written, it is damaged or another's; "
                    f"if you have changed it yourself, remove {CHECKSUMS}"
                )


def stored_type(folder: Path) -> str | None:
    """The type of all floating-point weights of a folder, as ``bfloat16``; None where there are several, or others."""
    from safetensors import safe_open

    kinds: set[str] = set()
    for file in _files(folder):
        with safe_open(file, framework="pt") as opened:
            kinds |= {str(opened.get_slice(name).get_dtype()) for name in opened.keys()}  # noqa: SIM118
    kinds = {kind for kind in kinds if not kind.startswith(("I", "U", "BOOL"))}
    return _TYPES.get(kinds.pop()) if len(kinds) == 1 else None


def write_checksums(folder: Path, pattern: str = "*.safetensors") -> None:
    """Write a file that tells ``check_weights`` what the weights of this folder are, and them alone."""
    sums = {file.name: checksum(file) for file in sorted(folder.glob(pattern))}
    (folder / CHECKSUMS).write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")


def _files(folder: Path) -> list[Path]:
    """The single file, or those that the index names: others beside them are no part of the model."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file() or not index.is_file():
        return [single] if single.is_file() else []
    return [folder / name for name in shards(folder, f"model.path={folder}") if (folder / name).is_file()]


def settle(config: Any, folder: Path, path: str | Path) -> None:
    """Has a transformers config say what the folder's weights and this machine's packages make of it, in place.

    Families that name their positions otherwise, or not at all, have them under the common name afterwards.
    """
    if getattr(config, "tie_word_embeddings", False) and _has_other_head(config, folder):
        config.tie_word_embeddings = False
        says = "config.json says tie_word_embeddings=true, and the folder has a head of its own; kept"
        tell(f"warning: model.path={path}: {says}")
    if getattr(config, "sliding_window", None) == 0:  # some write 0 for none; as a window it fails in transformers
        config.sliding_window = None
    try:
        config.max_position_embeddings = positions_of(config)  # what every verb asks
    except NotImplementedError as error:  # XLNet's config takes no number
        raise UserError(f"model.path={path}: model_type={config.model_type}: {error}") from error
    wanted = getattr(config, "_attn_implementation", None)
    if wanted is not None and wanted not in _INSTALLED and not _available(wanted):
        config._attn_implementation = None
        tell(f"warning: model.path={path}: attn_implementation={wanted} is not installed; sdpa is used")


def _available(attention: str) -> bool:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    needs = {"flash_attention_2": is_flash_attn_2_available, "flash_attention_3": is_flash_attn_3_available}
    return needs[attention]() if attention in needs else attention in ALL_ATTENTION_FUNCTIONS


def _has_other_head(config: Any, folder: Path) -> bool:
    """Whether the files hold a head, and an embedding that it is not equal to."""
    family = FAMILIES.get(config.model_type)
    head = f"{family.head if family else 'lm_head'}.weight"
    places = _places(folder)
    if head not in places:
        return False
    names = (family.embedding,) if family else _EMBEDDINGS
    table = next((place for place in places if f".{place}".endswith(tuple(f".{name}.weight" for name in names))), None)
    return table is not None and not _equal(*((str(places[n]), places[n].stat().st_mtime_ns, n) for n in (head, table)))


def _places(folder: Path) -> dict[str, Path]:
    """{tensor: its file}."""
    from safetensors import SafetensorError, safe_open

    found: dict[str, Path] = {}
    for file in _files(folder):
        try:
            with safe_open(file, framework="pt") as opened:
                found |= dict.fromkeys(opened.keys(), file)
        except (SafetensorError, OSError, ValueError):  # told when the weights are wanted
            return {}
    return found


@cache
def _equal(one: tuple[str, int, str], other: tuple[str, int, str]) -> bool:
    """Whether two tensors, each a file, its time of change and a name, hold the same numbers."""
    import torch
    from safetensors import safe_open

    found = []
    for file, _, name in (one, other):
        with safe_open(file, framework="pt") as opened:
            found.append(opened.get_tensor(name))
    return torch.equal(*found)
