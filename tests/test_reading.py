"""Files that are read back: bounds, syntax and types are checked in one place, and what is wrong is one line."""

import json
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from kncompress.errors import UserError
from kncompress.reading import (
    Amount,
    Bounds,
    Count,
    Number,
    checksum,
    one_line,
    parse_json,
    parse_yaml,
    read_fields,
    read_json,
    read_yaml,
)


@dataclass(frozen=True)
class Part:
    size: Count
    error: Amount = 0.0


@dataclass(frozen=True)
class Whole:
    name: str
    parts: tuple[Part, ...]
    kind: Literal["a", "b"] = "a"
    scores: dict[str, Number | None] = field(default_factory=dict)


GOOD = {"name": "x", "parts": [{"size": 3}, {"size": 4, "error": 1}], "scores": {"loss": None, "kl": 1}}


def told(values: Any) -> str:
    with pytest.raises(UserError) as caught:
        parse_json(values if isinstance(values, bytes) else json.dumps(values).encode(), Whole, "runs=r: f.json")
    assert str(caught.value).startswith("runs=r: f.json: ") and len(str(caught.value).splitlines()) == 1
    return str(caught.value).removeprefix("runs=r: f.json: ")


def test_what_fits_is_a_dataclass() -> None:
    found = parse_json(json.dumps(GOOD).encode(), Whole, "f.json")
    assert found == Whole("x", (Part(3), Part(4, 1.0)), "a", {"loss": None, "kl": 1.0})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (GOOD | {"name": 3}, "name=3: must be a valid string"),
        (GOOD | {"parts": [{"size": 3}, {"size": -4}]}, "parts[1].size=-4: must be greater than or equal to 0"),
        (GOOD | {"parts": [{"size": True}]}, "parts[0].size=true: must be a valid integer"),
        (GOOD | {"parts": [{"size": "3"}]}, 'parts[0].size="3": must be a valid integer'),
        (GOOD | {"parts": [{"size": 2**64}]}, f"parts[0].size={2**64}: must be less than {2**63}"),
        (GOOD | {"parts": [{}]}, "has no parts[0].size"),
        (GOOD | {"parts": [{"size": 1, "other": 2}]}, "parts[0].other: unknown key"),
        (GOOD | {"parts": None}, "parts=null: must be a valid array"),
        (GOOD | {"kind": "c"}, "kind=\"c\": must be 'a' or 'b'"),
        (GOOD | {"scores": {"a\nb": "x"}}, 'scores.a?b="x": must be a valid number'),
        (GOOD | {"scores": {"kl": float("inf")}}, "scores.kl=Infinity: must be a finite number"),
        (GOOD | {"parts": [{"size": 3, "error": float("nan")}]}, "parts[0].error=NaN: must be a finite number"),
        ([], "[]: must be an object"),
        ("x" * 200, f'"{"x" * 79}...: must be an object'),
        (b"{", "is damaged, not JSON (EOF while parsing an object at line 1 column 1)"),
        (b"\xff", "is damaged, not JSON ("),
        (b"", "is damaged, not JSON ("),
        (b'{"name": "\\ud800"}', "is damaged, not JSON ("),
        (b"[" * 100_000, "is damaged, not JSON (recursion limit exceeded"),
    ],
)
def test_what_does_not_fit_names_key_and_value(values: Any, words: str) -> None:
    assert told(values).startswith(words)


def test_others_are_kept_of_a_record(tmp_path: Path) -> None:
    values = {"size": 3, "later": [1]}
    (tmp_path / "f.json").write_text(json.dumps(values))
    assert read_fields(tmp_path / "f.json", Part, "runs=r") == values
    with pytest.raises(UserError, match="later: unknown key"):
        read_json(tmp_path / "f.json", Part, "runs=r")
    (tmp_path / "f.json").write_text(json.dumps(values | {"size": None}))
    with pytest.raises(UserError, match=r"^runs=r: f\.json: size=null: must be a valid integer"):
        read_fields(tmp_path / "f.json", Part, "runs=r")


@pytest.mark.parametrize("name", ["absent.json", "folder", "a\0b", "x" * 300])
def test_what_cannot_be_read_is_told(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"^runs=r: .* cannot be read"):
        read_json(tmp_path / name, Part, "runs=r")


BOMBS: dict[str, Callable[[], str]] = {
    "YAML aliases are not allowed": lambda: "a: &a [x, x]\n" + "".join(
        f"b{i}: &b{i} [*{'a' if not i else f'b{i - 1}'}, *{'a' if not i else f'b{i - 1}'}]\n" for i in range(40)
    ),
    "YAML tags are not allowed": lambda: "a: !!python/object/apply:os.system [ls]",
    "more than 32 lists and maps inside each other": lambda: "a: " + "[" * 20_000,
    "line 41: more than 32 lists": lambda: "".join(f"{' ' * i}a:\n" for i in range(60)).replace("a:", "a:", 1),
    "more than 8,000 values": lambda: "a: [" + "1, " * 300_000 + "1]",
    "has more than 1,048,576 bytes": lambda: "maps:\n" + "".join(f"  m{i}: keep\n" for i in range(200_000)),
    "not valid YAML": lambda: "a: [1",
    "not valid YAML: Exceeds the limit": lambda: "a: " + "1" * 5000,
    "not UTF-8 text": lambda: "a: \udcff",
}  # fmt: skip


@pytest.mark.parametrize("words", BOMBS)
def test_no_yaml_takes_long_to_refuse(words: str, tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_bytes(BOMBS[words]().encode(errors="surrogateescape"))
    since = time.process_time()
    with pytest.raises(UserError, match=words.removeprefix("line 41: ")) as caught:
        read_yaml(tmp_path / "f.yaml", "factors=f.yaml")
    assert time.process_time() - since < 2
    assert str(caught.value).startswith("factors=f.yaml: f.yaml") and len(str(caught.value).splitlines()) == 1


def test_yaml_is_read_as_a_configuration_is() -> None:
    assert parse_yaml("a: 1e-3\nb: [yes, '${c}']", "f.yaml") == {"a": 1e-3, "b": [True, "${c}"]}


@pytest.mark.parametrize("content", [b"[" + b"1," * 5 + b"1]", b" " * 200])
def test_json_has_bounds(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "f.json").write_bytes(content)
    with pytest.raises(UserError, match=r"f\.json:? has more than (5 values|100 bytes)"):
        read_json(tmp_path / "f.json", list[int], "runs=r", Bounds(100, 5))


def test_a_flipped_bit_changes_the_checksum(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes(bytes(10_000_000))
    before = checksum(file)
    assert before == f"crc32:{zlib.crc32(bytes(10_000_000)):08x}"
    with file.open("r+b") as stream:
        stream.seek(9_999_999)
        stream.write(b"\1")
    assert checksum(file) != before


def test_a_comment_stays_in_its_line() -> None:
    assert one_line("a\nb\r c\x85d\u2028e\0f\ttie") == "a b c d e f tie"
