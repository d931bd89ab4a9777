"""Sources: what is read from which file, and which document falls into which split."""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

from kncompress.config import DataConfig
from kncompress.data import sample, wikitext
from kncompress.data.sources import carve, find_sources, fingerprint, read_split, split_documents, split_name
from kncompress.errors import UserError

needs_gensim = pytest.mark.skipif(find_spec("gensim") is None, reason="the sample needs gensim")


def test_wikitext_marks_and_spacing_are_undone() -> None:
    lines = [
        " = York City F.C. = ",
        " ",
        ' The club \'s " first " 17 @-@ match run ( 1 @,@ 500 fans , $ 5 ) ended in 2013 – 14 . ',
        " = = Later <unk> = = ",
    ]
    assert wikitext.to_prose(lines) == (
        'York City F.C.\n\nThe club\'s "first" 17-match run (1,500 fans, $5) ended in 2013–14.\n\nLater <unk>'
    )


def test_wikitext_articles_begin_at_top_level_headings() -> None:
    text = "\n = One = \n\n a \n = = Part = = \n b \n\n = Two = \n\n c \n"
    assert [wikitext.to_prose(article) for article in wikitext.articles(text)] == [
        "One\n\na\n\nPart\n\nb",
        "Two\n\nc",
    ]


@pytest.mark.skipif("KNCOMPRESS_DATA" not in os.environ, reason="KNCOMPRESS_DATA is not set")
def test_wikitext_test_set_has_its_62_articles_and_no_marks() -> None:
    # 60 articles, two of which contain a line in the form of a top-level heading.
    text = (Path(os.environ["KNCOMPRESS_DATA"]) / "wikitext2" / "wiki.test.raw").read_text(encoding="utf-8")
    found = [wikitext.to_prose(article) for article in wikitext.articles(text)]
    assert len(found) == 62
    assert not any("@-@" in article or "@,@" in article for article in found)


@needs_gensim
def test_sample_is_split_by_article_with_allah_in_training() -> None:
    split = sample.split_of()
    assert len(split) == 101
    assert split["Allah"] == "train"
    sizes = {name: sum(len(d) for d in sample.documents(name)) for name in ("train", "validation", "test", "all")}
    assert sizes["train"] + sizes["validation"] + sizes["test"] == sizes["all"]
    assert 0.05 < sizes["validation"] / sizes["all"] < 0.1
    assert 0.08 < sizes["test"] / sizes["all"] < 0.12


@needs_gensim
def test_sample_is_prose() -> None:
    text = "\n".join(sample.documents("all"))
    for mark in ("{{", "[[", "'''", "==", "<ref", "\n* "):
        assert mark not in text, mark


def test_plain_text_is_split_at_separators_and_doc_elements() -> None:
    assert list(split_documents("a\n<|endoftext|>\nb\n<|doc|>\nc")) == ["a", "b", "c"]
    extracted = '<doc id="1" title="x">\nx\n\nbody\n</doc>\n<doc id="2">\ny\n</doc>\n'
    assert list(split_documents(extracted)) == ["x\n\nbody", "y"]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("wiki.valid.tokens", "validation"),
        ("test.txt", "test"),
        ("my-train-1.txt", "train"),
        ("latest.txt", None),
    ],
)
def test_split_of_a_file_by_its_name(name: str, split: str | None) -> None:
    assert split_name(Path(name)) == split


def test_carving_is_a_partition_and_does_not_depend_on_order() -> None:
    documents = [f"document {i} " * 20 for i in range(100)]
    parts = carve(documents, ("test", "validation"), seed=3)
    assert sorted(d for part in parts.values() for d in part) == sorted(documents)
    assert 4 <= len(parts["test"]) <= 7
    again = carve(documents[::-1], ("test", "validation"), seed=3)
    assert set(again["test"]) == set(parts["test"])
    assert set(carve(documents, ("test",), seed=4)["test"]) != set(parts["test"])


def test_one_document_is_carved_at_paragraphs() -> None:
    text = "\n\n".join(f"Paragraph {i}. " * 10 for i in range(200))
    parts = carve([text], ("test", "validation"), seed=0)
    assert "\n\n".join(parts["train"]) == text[: len("\n\n".join(parts["train"]))]
    assert all(parts[name] for name in ("train", "validation", "test"))


def test_folder_with_named_splits(tmp_path: Path) -> None:
    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.txt").write_text(name)
    config = DataConfig(source=str(tmp_path))
    assert {s: read_split(config, s) for s in ("train", "validation", "test", "auto")} == {
        "train": ["train"],
        "validation": ["valid"],
        "test": ["test"],
        "auto": ["test"],
    }


def test_auto_takes_the_whole_of_a_file_without_splits(tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    file.write_text("All of it.")
    assert read_split(DataConfig(source=str(file)), "auto") == ["All of it."]


def test_explicit_validation_leaves_the_source_whole(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text(name * 100)
    config = DataConfig(*(str(tmp_path / f"{name}.txt") for name in ("a", "b", "c")))
    assert read_split(config, "train") == ["a" * 100]
    assert read_split(config, "validation") == ["b" * 100]


def test_lines_are_rows_as_published_joined_by_a_blank_line(tmp_path: Path) -> None:
    file = tmp_path / "wiki.test.raw"
    file.write_text(" \n = A = \n \n x @-@ y \n")
    config = DataConfig(source=str(file), text_format="lines")
    assert read_split(config, "auto") == ["\n\n = A = \n\n\n\n\n x @-@ y \n"]


def test_fingerprint_follows_content_and_not_the_name(tmp_path: Path) -> None:
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_text("same")
    two.write_text("same")
    first = fingerprint(DataConfig(source=str(one)), "train")
    assert fingerprint(DataConfig(source=str(two)), "train") == first
    assert fingerprint(DataConfig(source=str(one)), "test") != first
    two.write_text("other")
    assert fingerprint(DataConfig(source=str(two)), "train") != first


def test_bad_sources_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text("  \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"data\.source=.*nowhere.*no such file or folder"):
        find_sources(str(tmp_path / "nowhere"), "data.source")
    with pytest.raises(UserError, match="holds no text file"):
        find_sources(str(tmp_path / "empty"), "data.source")
    with pytest.raises(UserError, match=r"data\.source=\[\]"):
        find_sources([], "data.source")
    with pytest.raises(UserError, match="no text in the train split"):
        read_split(DataConfig(source=str(tmp_path / "blank.txt")), "train")
    with pytest.raises(UserError, match=r"not UTF-8 text \(byte 3\)"):
        read_split(DataConfig(source=str(tmp_path / "latin.txt")), "all")
