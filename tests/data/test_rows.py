"""Data sets of the library ``datasets``: published splits, rows as lines or documents, caches without a network."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, load_dataset
from pyarrow.parquet import ParquetFile

from kncompress.config import DataConfig
from kncompress.data import row_files, rows, sources
from kncompress.data.rows import RowSource
from kncompress.data.sources import Reading, find_sources, fingerprint
from kncompress.data.split import place
from kncompress.data.tokenizer import train_tokenizer
from kncompress.data.tokens import token_stream
from kncompress.errors import UserError

WIKI = {
    split: f" \n = {split} one = \n \n A @-@ b , <unk> . \n \n = = Part = = \n c \n \n = {split} two = \n \n d \n"
    for split in ("train", "validation", "test")
}
CARD = """---
configs:
- config_name: wikitext-2-raw-v1
  data_files:
  - split: test
    path: wikitext-2-raw-v1/test-*
  - split: train
    path: wikitext-2-raw-v1/train-*
  - split: validation
    path: wikitext-2-raw-v1/validation-*
---
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of ``datasets`` of its own, and a hub that fails the test."""
    from huggingface_hub import constants

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    rows._load.cache_clear()
    return tmp_path / "datasets"


def hub_rows(text: str) -> list[str]:
    """Lines as the hub has them: blank ones without anything."""
    return [line if line.strip() else "" for line in text.splitlines(keepends=True)]


@pytest.fixture
def wikitext(tmp_path: Path) -> Path:
    """A folder laid out like the repository Salesforce/wikitext."""
    folder = tmp_path / "wikitext" / "wikitext-2-raw-v1"
    folder.mkdir(parents=True)
    for split, text in WIKI.items():
        Dataset.from_dict({"text": hub_rows(text)}).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    (folder.parent / "README.md").write_text(CARD)
    return folder.parent


@pytest.fixture
def cached_wikitext(wikitext: Path, cache: Path) -> str:
    """The same as ``datasets`` leaves it in its cache after a download: ``hub:Salesforce/wikitext:...``."""
    load_dataset(str(wikitext), "wikitext-2-raw-v1", cache_dir=str(cache))
    (cache / "wikitext").rename(cache / "Salesforce___wikitext")
    shutil.rmtree(wikitext)
    return "hub:Salesforce/wikitext:wikitext-2-raw-v1"


@pytest.mark.parametrize("text_format", ["auto", "wikitext", "lines"])
def test_wikitext_of_the_hub_is_the_published_file(cached_wikitext: str, tmp_path: Path, text_format: str) -> None:
    config = DataConfig(source=cached_wikitext, text_format=text_format)
    for split, text in WIKI.items():
        file = tmp_path / f"wiki.{split}.raw"
        file.write_text(text)
        local = DataConfig(source=str(file), text_format=text_format)
        assert list(sources.read_split(config, split)) == list(sources.read_split(local, "all"))
    assert list(sources.read_split(config, "auto")) == list(sources.read_split(config, "test"))
    everything = list(sources.read_split(config, "all"))
    assert len(everything) == (3 if text_format == "lines" else 6)


def test_wikitext_of_the_hub_as_articles(cached_wikitext: str) -> None:
    documents = list(sources.read_split(DataConfig(source=cached_wikitext), "test"))
    assert documents == ["test one\n\nA-b, <unk>.\n\nPart\n\nc", "test two\n\nd"]


def test_the_fingerprint_of_a_cached_data_set_is_its_revision(cached_wikitext: str, cache: Path) -> None:
    first = fingerprint(DataConfig(source=cached_wikitext), "train")
    assert fingerprint(DataConfig(source=cached_wikitext), "test") != first
    assert fingerprint(DataConfig(source=cached_wikitext, text_format="lines"), "train") != first
    rows._load.cache_clear()
    assert fingerprint(DataConfig(source=cached_wikitext), "train") == first
    (revision,) = (cache / "Salesforce___wikitext" / "wikitext-2-raw-v1" / "0.0.0").glob("*[0-9a-f]/")
    revision.rename(revision.with_name("1" * 16))
    rows._load.cache_clear()
    assert fingerprint(DataConfig(source=cached_wikitext), "train") != first


@pytest.fixture
def web(tmp_path: Path) -> str:
    """A folder of documents in two parquet files without splits."""
    folder = tmp_path / "web"
    folder.mkdir()
    for part in range(2):
        texts = [f"document {i}\n\nof part {part} " * 3 for i in range(1500)]
        Dataset.from_dict({"text": [*texts, "", None], "url": [""] * 1502}).to_parquet(folder / f"{part}.parquet")
    return str(folder)


def test_rows_are_documents_and_held_out_by_their_hash(web: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "IN_MEMORY", 1000)
    config = DataConfig(source=web)
    parts = {s: list(sources.read_split(config, s)) for s in ("train", "validation", "test", "all")}
    assert len(parts["all"]) == 3000 and parts["all"][0] == ("document 0\n\nof part 0 " * 3).strip()
    assert sorted(parts["train"] + parts["validation"] + parts["test"]) == sorted(parts["all"])
    for name in ("validation", "test"):
        assert 110 < len(parts[name]) < 190
        assert {place(document, ("test", "validation"), 0) for document in parts[name]} == {name}
    assert set(sources.read_split(DataConfig(source=web, seed=1), "test")) != set(parts["test"])
    assert list(sources.read_split(config, "auto")) == parts["all"]


def test_a_tenth_of_a_data_set_becomes_a_token_cache(web: str, tmp_path: Path) -> None:
    config = DataConfig(source=web, fraction=0.1, cache_dir=str(tmp_path / "cache"))
    tokenizer = train_tokenizer(["document of part 0123456789 " * 20], 280, context=32)
    stream = token_stream(config, "train", tokenizer)
    assert 220 < stream.documents < 320  # a tenth of the 90% that are for training
    again = token_stream(config, "train", tokenizer)
    assert again.tokens.tobytes() == stream.tokens.tobytes()


def test_a_part_that_is_not_published_is_taken_from_training(tmp_path: Path) -> None:
    folder = tmp_path / "pair"
    folder.mkdir()
    for split in ("train", "test"):
        texts = [f"{split} {number}" for number in range(400)]
        Dataset.from_dict({"text": texts}).to_parquet(folder / f"{split}.parquet")
    parts = {s: set(sources.read_split(DataConfig(source=str(folder)), s)) for s in ("train", "validation", "test")}
    assert parts["test"] == {f"test {number}" for number in range(400)}
    assert parts["validation"] and parts["train"].isdisjoint(parts["validation"])
    assert parts["train"] | parts["validation"] == {f"train {number}" for number in range(400)}


def test_single_files_of_rows(tmp_path: Path) -> None:
    table = Dataset.from_dict({"text": ["one", "two"]})
    table.to_parquet(tmp_path / "a.parquet")
    table.to_json(tmp_path / "a.jsonl")
    for suffix in ("parquet", "jsonl"):
        assert list(sources.read_split(DataConfig(source=str(tmp_path / f"a.{suffix}")), "all")) == ["one", "two"]


def test_rows_are_read_in_batches(web: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_files, "_AT_ONCE", 100)
    taken = []
    real = ParquetFile.iter_batches
    monkeypatch.setattr(
        ParquetFile,
        "iter_batches",
        lambda self, size, columns: (taken.append((len(b), columns)) or b for b in real(self, size, columns=columns)),
    )
    reading = Reading()
    documents = sources.read_split(DataConfig(source=web), "all", reading)
    assert len([next(documents) for _ in range(150)]) == 150
    assert taken == [(100, ["text"])] * 2 and reading.done > 0 and reading.total > 0


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("hub:", "not hub:ID or hub:ID:CONFIGURATION"),
        ("hub:a/b/c", "not hub:ID or hub:ID:CONFIGURATION"),
        ("hub:nosuch/dataset", "not in .*datasets, and HF_HUB_OFFLINE keeps off the network"),
    ],
)
def test_data_sets_that_cannot_be_had_are_one_line(source: str, reason: str) -> None:
    with pytest.raises(UserError, match=rf"data\.source={source}: {reason}") as caught:
        find_sources(source, "data.source")
    assert "\n" not in str(caught.value)


def test_bad_data_sets_are_named(tmp_path: Path, cached_wikitext: str) -> None:
    def failure(source: str) -> str:
        with pytest.raises(UserError) as caught:
            list(sources.read_split(DataConfig(source=source), "train"))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    Dataset.from_dict({"body": ["one"]}).to_parquet(tmp_path / "columns.parquet")
    assert failure(str(tmp_path / "columns.parquet")).endswith(
        "no column text; it has body; data.column=... names the column of the text"
    )
    (tmp_path / "broken.parquet").write_bytes(b"no parquet")
    assert "broken.parquet: no parquet file" in failure(str(tmp_path / "broken.parquet"))
    assert "hub:Salesforce/wikitext:other: not in" in failure("hub:Salesforce/wikitext:other")


def test_configurations_of_the_cache_are_told_apart(cached_wikitext: str) -> None:
    source: Any = find_sources(cached_wikitext, "data.source")[0]
    assert isinstance(source, RowSource) and source.configuration == "wikitext-2-raw-v1"
    assert rows._cached("Salesforce/wikitext", "wikitext-2-raw-v1") is not None
    assert rows._cached("Salesforce/wikitext", "wikitext-103-raw-v1") is None
    assert rows._snake_case("OpenWebText") == "open_web_text"


@pytest.mark.hub
def test_wikitext2_of_the_real_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    config = DataConfig(source="hub:Salesforce/wikitext:wikitext-2-raw-v1")
    assert len(list(sources.read_split(config, "test"))) == 62
