"""Files that are read back: how large they may be, their syntax, and the type of every value, in one place.

A file may be damaged or somebody else's. Bounds come first, so that none takes long to refuse. Then comes the syntax,
then each value, by the fields of a dataclass. What is wrong is a UserError with the file, the key and the value.
"""

import json
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Annotated, Any, BinaryIO, TypeVar, cast

from annotated_types import Ge, Interval, Lt

from kncompress.errors import UserError

T = TypeVar("T")
Count = Annotated[int, Ge(0), Lt(2**63)]
"""A whole number from 0."""
Number = Annotated[float, Interval(gt=-math.inf, lt=math.inf)]
"""A finite number."""
Amount = Annotated[float, Interval(ge=0, lt=math.inf)]
"""A finite number from 0."""
_LONGEST = 80
"""Characters of a wrong value that an error shows."""
_CHUNK = 2**22


@dataclass(frozen=True)
class Bounds:
    """What a file may have at most."""

    size: int
    """Bytes."""
    values: int
    """Numbers, texts and names."""


JSON = Bounds(64 * 2**20, 2_000_000)
"""Records, metrics, tables of every map: the harms of a model of 300 maps are 2 MB."""
SMALL = Bounds(4 * 2**20, 100_000)
"""A model's config.json, which transformers reads once more, and what is kept beside tokens."""
YAML = Bounds(2**20, 8_000)
"""Plans and saved configurations, which are parsed in Python and copied several times: 700 maps are 1,400 values."""
_DEEPEST = 32
"""Lists and maps inside each other, of YAML; the parser of JSON has a bound of its own, 200."""


def read_bytes(file: Path, subject: str, bounds: Bounds = JSON) -> bytes:
    """A file's content. Raises UserError, which begins with ``subject``, where it cannot be read or is too large."""
    try:
        with file.open("rb") as stream:
            content = stream.read(bounds.size + 1)
    except (OSError, ValueError) as error:  # ValueError: a null character in its name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{subject}: {file.name} cannot be read ({reason})") from None
    if len(content) > bounds.size:
        raise UserError(f"{subject}: {file.name} has more than {bounds.size:,} bytes")
    return content


def read_json(file: Path, kind: type[T], subject: str, bounds: Bounds = JSON) -> T:
    """The JSON in ``file`` as a ``kind``: a dataclass, whose fields and no others it has, or a list or dict.

    Raises:
        UserError: begins with ``subject``; names the file, the key and its value.
    """
    return parse_json(read_bytes(file, subject, bounds), kind, f"{subject}: {file.name}", bounds)


def read_fields(file: Path, kind: type[Any], subject: str, bounds: Bounds = JSON) -> dict[str, Any]:
    """The JSON object in ``file``, of which the dataclass ``kind`` checks its fields; others are kept as they are.

    For records, which a later version may have written. Raises UserError as ``read_json``.
    """
    content, subject = read_bytes(file, subject, bounds), f"{subject}: {file.name}"
    parse_json(content, kind, subject, bounds, others="ignore")
    return cast(dict[str, Any], json.loads(content))


def parse_json(content: bytes, kind: type[T], subject: str, bounds: Bounds = JSON, others: str = "forbid") -> T:
    """``read_json`` of content that has been read already; ``others``: ``ignore`` passes over unknown keys."""
    from pydantic import ValidationError

    if content.count(b",") >= bounds.values:  # commas in texts count too: an upper bound that costs nothing
        raise UserError(f"{subject}: has more than {bounds.values:,} values")
    try:
        return cast(T, _adapter(cast(Any, kind)).validate_json(content, strict=True, extra=others))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise UserError(_wrong(subject, first["type"], first["loc"], first["input"], first["msg"], content)) from None


@cache
def _adapter(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _wrong(subject: str, fault: str, place: Sequence[str | int], value: Any, says: str, content: bytes) -> str:
    if fault == "json_invalid":
        return f"{subject}: is damaged, not JSON ({says.removeprefix('Invalid JSON: ')})"
    key, node = "", json.loads(content)
    for part in place:  # the name of a type among several that were tried stands there too, and is no key
        inside = part in node if isinstance(node, dict) else isinstance(node, list) and part in range(len(node))
        if not inside and not (fault.startswith("missing") and part is place[-1]):
            break
        key += f"[{part}]" if isinstance(part, int) else f".{part}" if key else part
        node = node[part] if inside else None
    key = "".join(char if char.isprintable() else "?" for char in key[:_LONGEST])
    if fault.startswith("missing"):
        return f"{subject}: has no {key or 'value'}"
    if fault == "unexpected_keyword_argument":
        return f"{subject}: {key}: unknown key"
    says = says.replace("Input should be", "must be")
    if isinstance(value, float) and not math.isfinite(value):
        says = "must be a finite number"
    return f"{subject}: {f'{key}=' if key else ''}{shown(value)}: {says}"


def shown(value: Any) -> str:
    """A wrong value in one line that is not too long."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def read_yaml(file: Path, subject: str, bounds: Bounds = YAML) -> Any:
    """OmegaConf's node of the YAML in ``file``: plain values, without aliases and tags; nothing is looked up.

    Raises:
        UserError: begins with ``subject``; names the file and the line.
    """
    content = read_bytes(file, subject, bounds)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{subject}: {file.name} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    return parse_yaml(text, f"{subject}: {file.name}", bounds)


def parse_yaml(text: str, subject: str, bounds: Bounds = YAML) -> Any:
    """``read_yaml`` of a text."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        _check_yaml(text, subject, bounds)
        return OmegaConf.create(text)
    except (YAMLError, OmegaConfBaseException, ValueError, TypeError) as error:
        # ValueError and TypeError: a number of 5,000 digits, 0x_, a key that is a list.
        raise UserError(f"{subject}: not valid YAML: {' '.join(str(error).split())[:300]}") from None


def _check_yaml(text: str, subject: str, bounds: Bounds) -> None:
    """Raises UserError for aliases, tags, and more values or levels than allowed, from the events alone."""
    import yaml

    depth = count = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        line = f"{subject}: line {event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent):
            raise UserError(f"{line}: YAML aliases are not allowed in this file")
        if getattr(event, "tag", None) is not None:
            raise UserError(f"{line}: {event.tag}: YAML tags are not allowed in this file")
        if isinstance(event, yaml.ScalarEvent) and not depth:
            raise UserError(f"{subject}: must hold keys and values, not {shown(event.value)}")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        count += isinstance(event, yaml.NodeEvent)
        if depth > _DEEPEST:
            raise UserError(f"{line}: more than {_DEEPEST} lists and maps inside each other")
        if count > bounds.values:
            raise UserError(f"{line}: more than {bounds.values:,} values")


def one_line(text: str) -> str:
    """``text`` without line breaks and other characters that are not printed, for a message or a comment."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


def checksum(file: Path) -> str:
    """CRC-32 of a file, ``crc32:`` and 8 digits: finds damage, at some 2.7 GB/s; once for each state of the file."""
    facts = file.stat()
    return _checksum(file, facts.st_size, facts.st_mtime_ns, facts.st_ino)


@lru_cache(maxsize=64)
def _checksum(file: Path, size: int, modified: int, inode: int) -> str:
    with file.open("rb") as stream:
        return checksum_text(crc32(stream))


def crc32(stream: BinaryIO) -> int:
    """CRC-32 of the rest of ``stream``."""
    value = 0
    while chunk := stream.read(_CHUNK):
        value = zlib.crc32(chunk, value)
    return value


def checksum_text(value: int) -> str:
    """How ``checksum`` writes a CRC-32."""
    return f"crc32:{value:08x}"
