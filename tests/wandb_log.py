"""The log of an offline W&B run, read back."""

import json
import struct
from pathlib import Path
from typing import Any


def offline_log(folder: Path) -> list[Any]:
    """Return the records of the one .wandb file under ``folder``: a LevelDB log of protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    data, records, parts = path.read_bytes(), [], b""
    position = 7  # the file's own header
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:  # no header fits into the rest of a block
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        if kind == 0:
            break
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(Record.FromString(parts))
            parts = b""
    return records


def values(items: Any) -> dict[str, Any]:
    """The items of a config, history or summary record."""
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def of_kind(log: list[Any], kind: str) -> list[Any]:
    """The records of one kind: run, config, history, summary, alert, artifact, exit, ..."""
    return [getattr(record, kind) for record in log if record.WhichOneof("record_type") == kind]


def merged(log: list[Any], kind: str) -> dict[str, Any]:
    """What all records of a kind that updates (config, summary) say in the end."""
    found: dict[str, Any] = {}
    for run in of_kind(log, "run") if kind == "config" else []:
        found |= values(run.config.update)
    for record in of_kind(log, kind):
        found |= values(record.update)
    return found


def history(log: list[Any]) -> list[dict[str, Any]]:
    """The rows that were logged."""
    return [values(record.item) for record in of_kind(log, "history")]
