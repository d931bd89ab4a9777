"""The Hugging Face hub: a model id becomes a folder on this machine, here and nowhere else.

A complete snapshot in the local cache is used without asking the network. Otherwise one short probe decides
whether the hub can be reached at all, since the hub's own client repeats a failed request for half a minute.
"""

import re
import threading
from dataclasses import dataclass
from pathlib import Path

from kncompress.errors import UserError
from kncompress.reading import read_fields, shown
from kncompress.terminal import named_line

PROBE_SECONDS = 4.0
"""The longest wait for an answer of the hub before it counts as out of reach."""

CHECKSUMS = "kncompress-checksums.json"
"""Of the weights in a folder that ``save_model`` has written: {file: its CRC-32}."""
CONFIG = ("config.json",)
TOKENIZER = (
    "config.json",
    "tokenizer*.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
)
WEIGHTS = ("config.json", "generation_config.json", "model*.safetensors", "model*.safetensors.index.json", CHECKSUMS)
_PATTERNS = {"config": CONFIG, "tokenizer": TOKENIZER, "weights": WEIGHTS}
_INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"[^/\\\0]{1,200}\.safetensors")
_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")


@dataclass
class _Index:
    weight_map: dict[str, str]


_answered: set[str] = set()


def local_folder(path: str | Path, need: str = "weights", key: str = "model.path") -> Path:
    """The folder of a model: ``path`` itself where it is one, else the snapshot of that hub id.

    Args:
        path: a folder or a hub id.
        need: ``config`` (config.json alone), ``tokenizer``, ``weights`` (config and safetensors), or the name of one
            file. Only that is looked for and, where the cache lacks it, downloaded.
        key: what an error names.

    Raises:
        UserError: no such folder or id, the hub is out of reach, or the weights there would have to be unpickled.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    name = str(path)
    if folder.exists():
        raise UserError(f"{key}={name}: a file; give the folder of the model or a hub id")
    if not _ID.fullmatch(name):
        raise UserError(f"{key}={name}: no such folder")
    cached = _cached(name, need)
    if cached is not None:
        return cached
    require(f"{key}={name}: no such folder", _cache_folder(), f"{key}=<folder>")
    return _download(name, need, key)


def check_model(path: str | None, gguf_file: str | None = None) -> None:
    """Raises UserError where a folder or hub id cannot be had; imports nothing heavy. ``asset:`` and the like pass."""
    if path is not None and ":" not in path:
        local_folder(path, gguf_file or "config")


def require(subject: str, cache: Path, instead: str, offline: str = "") -> None:
    """Raises UserError, soon and in one line, where the hub cannot be asked.

    Args:
        subject: ``key=value`` that needs the hub.
        cache: folder in which it was looked for.
        instead: what to give on a machine without a network.
        offline: the variable that forbids the network, where it is not HF_HUB_OFFLINE.
    """
    from huggingface_hub import constants

    subject = f"{subject}, not in {cache}" if ": " in subject else f"{subject}: not in {cache}"
    advice = f"set HF_HOME to a cache that has it, or give {instead}"
    if offline or constants.HF_HUB_OFFLINE:
        raise UserError(f"{subject}, and {offline or 'HF_HUB_OFFLINE'} keeps off the network; {advice}")
    reason = _probe(constants.ENDPOINT)
    if reason:
        raise UserError(
            f"{subject}, and the hub at {constants.ENDPOINT} cannot be reached ({reason}); "
            f"connect to the network, {advice}"
        )


def _probe(endpoint: str) -> str:
    """Why ``endpoint`` does not answer, or nothing. In a thread, since looking up a name has no time limit."""
    if endpoint in _answered:
        return ""
    outcome: list[str] = []

    def ask() -> None:
        from huggingface_hub.utils import get_session

        try:
            status = get_session().head(endpoint, timeout=PROBE_SECONDS).status_code
            outcome.append(f"HTTP {status}" if status >= 500 else "")
        except Exception as error:
            outcome.append(named_line(error))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    reason = outcome[0] if outcome else f"no answer in {PROBE_SECONDS:.0f} seconds"
    if not reason:
        _answered.add(endpoint)
    return reason


def _cache_folder() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _cached(name: str, need: str) -> Path | None:
    """The snapshot of ``main`` in the local cache, where it holds all that is needed."""
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = _snapshot(name, need, local=True)
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return folder if has(folder, need) else None


def _snapshot(name: str, need: str, local: bool) -> Path:
    """What is needed of a repository, downloaded if it is missing; with ``local`` an error then.

    The listing of a former download tells which files a snapshot still lacks.
    """
    from huggingface_hub import snapshot_download

    found = snapshot_download(
        name, allow_patterns=patterns(need), ignore_patterns=["*/*"], cache_dir=_cache_folder(), local_files_only=local
    )
    return Path(found)


def patterns(need: str) -> list[str]:
    """File names of a repository that ``need`` stands for."""
    return list(_PATTERNS.get(need, (need,)))


def has(folder: Path, need: str) -> bool:
    """Whether a folder holds what ``need`` stands for; of weights in several files, each."""
    match need:
        case "config":
            return (folder / "config.json").is_file()
        case "tokenizer":
            return any(
                (folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
            )
        case "weights":
            return (folder / "config.json").is_file() and not missing_weights(folder)
        case _:
            return (folder / need).is_file()


def missing_weights(folder: Path) -> list[str]:
    """Names of the safetensors files that a model folder ought to have and has not."""
    if (folder / "model.safetensors").is_file():
        return []
    if not (folder / _INDEX).is_file():
        return ["model.safetensors"]
    return [shard for shard in shards(folder, str(folder)) if not (folder / shard).is_file()]


def shards(folder: Path, subject: str) -> list[str]:
    """Names of the files that the index of a model in several files has. Raises UserError where it is damaged."""
    return sorted(set(weight_map(folder, subject).values()))


def weight_map(folder: Path, subject: str) -> dict[str, str]:
    """{weight: its file} as that index says; nothing where there is none. Raises UserError where it is damaged."""
    if not (folder / _INDEX).is_file():
        return {}
    weights: dict[str, str] = read_fields(folder / _INDEX, _Index, subject)["weight_map"]
    for name, file in weights.items():
        if not _SHARD.fullmatch(file):
            where = f"{subject}: {_INDEX}: weight_map.{name[:80]}"
            raise UserError(f"{where}={shown(file)}: not the name of a file in the folder")
    return weights


def only_pickled(names: list[str]) -> bool:
    """Whether weights are there, but only in files that must be unpickled or are not PyTorch's."""
    return not any(name.endswith(".safetensors") for name in names) and any(n.endswith(_PICKLED) for n in names)


def _download(name: str, need: str, key: str) -> Path:
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        if need == "weights":
            siblings = HfApi().model_info(name, timeout=30).siblings or []
            names = [file.rfilename for file in siblings if "/" not in file.rfilename]
            if only_pickled(names):
                raise UserError(
                    f"{key}={name}: the repository has no safetensors, only weights that must be unpickled, which "
                    "is never done; choose a repository with model.safetensors"
                )
        folder = _snapshot(name, need, local=False)
    except UserError:
        raise
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, RepositoryNotFoundError) or status in (401, 403, 404):
            raise UserError(
                f"{key}={name}: no such model on the hub ({constants.ENDPOINT}), or one that needs a login "
                "(`hf auth login`); no such folder either"
            ) from error
        raise UserError(f"{key}={name}: the download failed ({named_line(error)})") from error
    if not has(folder, need):
        wanted = {"weights": "model.safetensors", "tokenizer": "tokenizer.json"}.get(need, patterns(need)[0])
        raise UserError(f"{key}={name}: the repository on the hub has no {wanted}")
    return folder
