"""What a file is: read by name and content, packed or not, refused by what it is, broken rows by their number."""

import bz2
import csv
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from kncompress.config import DataConfig
from kncompress.data import files, row_files, sources
from kncompress.data.sources import fingerprint
from kncompress.errors import UserError

TEXTS = [f'Document {i}: "quoted", a comma;\na second line\tand ünïcode.' for i in range(40)]
ROWS = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
PROSE = "\n<|endoftext|>\n".join(TEXTS)


@pytest.fixture(autouse=True)
def said_nothing_yet() -> None:
    files.tell.cache_clear()


def read(path: Path, split: str = "all", **options: Any) -> list[str]:
    return list(sources.read_split(DataConfig(source=str(path), **options), split))


def refused(path: Path, **options: Any) -> str:
    """The one line that refuses it, without the path."""
    with pytest.raises(UserError) as caught:
        read(path, **options)
    text = str(caught.value)
    assert text.startswith("data.source=") and "\n" not in text
    return text.replace(str(path), "PATH")


def table(rows: list[list[Any]], delimiter: str) -> str:
    from io import StringIO

    stream = StringIO()
    csv.writer(stream, delimiter=delimiter).writerows(rows)
    return stream.getvalue()


LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
WRITTEN: dict[str, str] = {
    "a.jsonl": LINES,
    "a.JSONL": LINES,
    "a.ndjson": LINES,
    "lines.json": LINES,
    "array.json": json.dumps(ROWS),
    "indented.json": json.dumps(ROWS, indent=1, ensure_ascii=False),
    "strings.json": json.dumps(TEXTS),
    "gaps.jsonl": LINES.replace("\n", "\n\n"),
    "lines.txt": LINES,  # what people call it does not make braces prose
    "noending": LINES,
    "a.csv": table([["id", "text"], *([str(i), t] for i, t in enumerate(TEXTS))], ","),
    "german.csv": table([["id", "text"], *([str(i), t] for i, t in enumerate(TEXTS))], ";"),
    "a.tsv": table([["text", "id"], *([t, str(i)] for i, t in enumerate(TEXTS))], "\t"),
    "a.txt": PROSE,
    "a.TXT": PROSE,
}


@pytest.mark.parametrize("packing", ["", ".gz", ".bz2", ".xz"])
@pytest.mark.parametrize("name", WRITTEN)
def test_the_same_documents_under_every_name_and_packing(name: str, packing: str, tmp_path: Path) -> None:
    pack = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[packing]
    (tmp_path / f"{name}{packing}").write_bytes(pack(WRITTEN[name].encode()))
    assert read(tmp_path / f"{name}{packing}") == TEXTS
    (tmp_path / f"other-{name}").write_bytes(pack(WRITTEN[name].encode()))  # packed, and its name does not say so
    assert read(tmp_path / f"other-{name}") == TEXTS


def test_parquet_and_both_forms_of_arrow(tmp_path: Path) -> None:
    rows = pa.table({"text": TEXTS, "id": list(range(40))})
    parquet.write_table(rows, tmp_path / "a.parquet")
    with pa.ipc.new_file(tmp_path / "file.arrow", rows.schema) as writer:
        writer.write_table(rows, max_chunksize=7)
    with pa.ipc.new_stream(tmp_path / "stream.arrow", rows.schema) as writer:
        writer.write_table(rows, max_chunksize=7)
    for name in ("a.parquet", "file.arrow", "stream.arrow"):
        assert read(tmp_path / name) == TEXTS


def test_the_splits_of_rows_and_of_prose_are_the_same(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.txt"):
        (tmp_path / name).write_text(WRITTEN[name])
    for split in ("train", "validation", "test"):
        assert read(tmp_path / "a.jsonl", split) == read(tmp_path / "a.txt", split) != []


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le-bom"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
def test_a_byte_order_mark_is_no_text(name: str, encoding: str, tmp_path: Path) -> None:
    mark = "\ufeff".encode("utf-16-le") if encoding.endswith("bom") else b""
    (tmp_path / name).write_bytes(mark + WRITTEN[name].encode(encoding.removesuffix("-bom")))
    assert read(tmp_path / name) == TEXTS


def test_another_column_is_named_and_found(tmp_path: Path) -> None:
    file = tmp_path / "content.jsonl"
    file.write_text(LINES.replace('"text"', '"content"'))
    told = "no column text; it has id, content; data.column=... names the column of the text"
    assert refused(file) == f"data.source=PATH: {told}"
    assert read(file, column="content") == TEXTS
    file.write_text(json.dumps({"text": "a", "content": "b"}))
    keys = {fingerprint(DataConfig(source=str(file), column=c), "all") for c in (None, "content")}
    assert len(keys) == 2


BROKEN: dict[str, tuple[str | bytes, str]] = {
    "syntax.jsonl": ('{"text": "a"}\n{"text": \n', "row 2: not JSON"),
    "missing.jsonl": ('{"text": "a"}\n{"body": "b"}\n', "row 2: no column text; it has body"),
    "list.jsonl": ('{"text": "a"}\n{"text": ["b"]}\n', "row 2: column text holds a list, not text"),
    "object.json": ('[{"text": "a"}, {"text": {"b": 1}}]', "row 2: column text holds an object, not text"),
    "number.json": ('[{"text": "a"}, {"text": NaN}]', "row 2: column text holds a float, not text"),
    "half.jsonl": ('{"text": "\\ud800"}\n', "row 1: column text has half a surrogate pair"),
    "open.json": ('[{"text": "a"}, {"text": "b"}', "row 3: not JSON (a comma or the closing bracket is missing)"),
    "pretty.json": ('{\n "text": "a"\n}', "one JSON object, not rows: give an object a line, or an array of them"),
    "short.csv": ("id,text\n1,a\n2\n", "row 2: 1 columns, not 2 as in the first line"),
    "quote.csv": ('id,text\n1,a\n2,"b\n3,c\n', "line 4: not a row of a table (unexpected end of data)"),
    "columns.csv": ("id;body\n1;a\n", "no column text; it has id;body"),
    "zipped.txt": (b"PK\x03\x04" + bytes(30), "a zip archive; unpack it first"),
    "zstd.jsonl": (b"\x28\xb5\x2f\xfd" + bytes(30), "packed by zstd; unpack it first"),
    "book.pdf": (b"%PDF-1.7\n", "a PDF; extract its text first"),
    "page.txt": ("<!DOCTYPE html>\n<p>x</p>", "a page of HTML or XML; extract its text first"),
    "pointer.parquet": (b"version https://git-lfs.github.com/spec/v1\n", "no parquet file"),
    "pointer.txt": (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS and not the file itself"),
    "picture.txt": (b"\x89PNG\r\n\x1a\n\x00\x00", "not text: it has bytes of 0"),
    "unmarked.txt": ("wide text".encode("utf-16-le"), "not text: it has bytes of 0"),
    "cut.txt.gz": (gzip.compress(PROSE.encode())[:-20], "its packing is damaged, or its end is missing"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_read_is_told_by_file_row_and_reason(name: str, tmp_path: Path) -> None:
    content, reason = BROKEN[name]
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    assert f"PATH: {reason}" in refused(tmp_path / name)


def test_bytes_and_lists_in_a_parquet_column_are_no_text(tmp_path: Path) -> None:
    for values, told in (([b"a"], "bytes"), ([["a"]], "a list"), ([1.5], "a float")):
        parquet.write_table(pa.table({"text": values}), tmp_path / "a.parquet")
        assert refused(tmp_path / "a.parquet").endswith(f"row 1: column text holds {told}, not text")


def test_an_array_is_never_in_memory_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_files, "LONGEST_LINE", 50)  # shorter than a row: elements lie across two reads
    file = tmp_path / "array.json"
    file.write_text("  " + json.dumps(ROWS))
    with file.open() as stream:
        rows = row_files._array(stream, "file")
        assert next(rows) == (1, ROWS[0]) and stream.tell() < 400
        assert [row for _, row in rows] == ROWS[1:]


def test_a_long_text_in_a_table_is_read_whole(tmp_path: Path) -> None:
    long = "word " * 50_000  # csv's own limit is 131,072 characters
    (tmp_path / "a.csv").write_text(table([["text"], [long]], ","))
    assert read(tmp_path / "a.csv") == [long.strip()]


def test_text_of_json_lines_can_be_had_as_it_stands(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text('{"text": "a"}\n')
    assert read(tmp_path / "a.txt") == ["a"]
    assert read(tmp_path / "a.txt", text_format="plain") == ['{"text": "a"}']


@pytest.mark.parametrize(
    "text", ["[1] A footnote.\nMore.", "{x} is a set.\nMore.", "42\nis a number.", '"So," he said.']
)
def test_prose_that_begins_like_json_is_prose(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(text)
    assert read(tmp_path / "a.txt") == [text]


def test_a_folder_of_text_and_rows_is_read_whole_and_hidden_files_are_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("prose")
    (tmp_path / "b.jsonl").write_text('{"text": "rows"}\n')
    for hidden in (".ipynb_checkpoints/a-checkpoint.txt", ".git/c.txt", "sub/.hidden.txt"):
        (tmp_path / hidden).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / hidden).write_text("a copy")
    assert read(tmp_path) == ["prose", "rows"]
    assert capsys.readouterr().err == ""  # nothing that anybody would miss
    for name in ("README.md", "figure.png", "settings.json"):
        (tmp_path / name).write_text('{\n "no": "rows"\n}')
    (tmp_path / "dataset_info.json").write_text("{}")
    assert read(tmp_path) == read(tmp_path) == ["prose", "rows"]
    told = f"kncompress: data.source={tmp_path}: reads 2 files (1 .txt, 1 .jsonl), leaves out "
    assert capsys.readouterr().err == f"{told}README.md, figure.png, settings.json\n"  # once


def test_a_folder_of_packed_rows_with_splits_by_folder(tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        (tmp_path / split).mkdir()
        rows = "".join(json.dumps({"text": f"{split} {i}"}) + "\n" for i in range(2))
        (tmp_path / split / "part-0.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    for ours, theirs in (("train", "train"), ("validation", "valid"), ("test", "test"), ("auto", "test")):
        assert read(tmp_path, ours) == [f"{theirs} 0", f"{theirs} 1"]


def test_a_named_validation_file_is_no_training_text(tmp_path: Path) -> None:
    for name in ("train", "valid"):
        (tmp_path / f"{name}.txt").write_text("\n<|endoftext|>\n".join(f"{name} {i}" for i in range(40)))
    assert read(tmp_path, "validation") == [f"valid {i}" for i in range(40)]
    train, test = read(tmp_path, "train"), read(tmp_path, "test")
    assert sorted(train + test) == sorted(f"train {i}" for i in range(40)) and test


def test_a_data_set_that_was_saved_to_disk(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    parts = {split: Dataset.from_dict({"text": [f"{split} {i}" for i in range(3)]}) for split in ("train", "test")}
    DatasetDict(parts).save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved", "test") == ["test 0", "test 1", "test 2"]


def test_a_folder_without_text_says_so(tmp_path: Path) -> None:
    (tmp_path / ".hidden.txt").write_text("a")
    (tmp_path / "empty.txt").write_text("")
    assert "the folder holds no text file (.txt," in refused(tmp_path)


@pytest.mark.parametrize("rows", [1, 2000])
def test_a_tokenizer_beside_the_data_is_left_out(tmp_path: Path, rows: int, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "row.json").write_text('{"text": "one row"}')
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "vocab": ["a word"] * rows}))
    assert read(tmp_path) == ["a", "one row"]
    assert capsys.readouterr().err.endswith("leaves out tokenizer.json\n")


def test_only_a_line_feed_ends_a_line(tmp_path: Path) -> None:
    odd = "one\u2029still\x85one\u2028and\x0con"
    (tmp_path / "a.raw").write_text(f" = T = \n{odd}\n", encoding="utf-8")
    assert read(tmp_path / "a.raw", text_format="lines") == [f" = T = \n\n\n{odd}\n"]
    assert read(tmp_path / "a.raw") == [f"T\n\n{odd}"]
