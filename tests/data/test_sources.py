"""Sources: what is read from which file, and which document falls into which split."""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

from kncompress.config import DataConfig
from kncompress.data import files, sample, sources, wikitext
from kncompress.data.files import text_lines
from kncompress.data.prose import documents_of, split_documents
from kncompress.data.sources import find_sources, fingerprint, split_name
from kncompress.data.split import carve, chosen, place
from kncompress.errors import UserError


def read_split(config: DataConfig, split: str) -> list[str]:
    return list(sources.read_split(config, split))


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
    assert [wikitext.to_prose(article) for article in wikitext.articles([text])] == [
        "One\n\na\n\nPart\n\nb",
        "Two\n\nc",
    ]


@pytest.mark.skipif("KNCOMPRESS_DATA" not in os.environ, reason="KNCOMPRESS_DATA is not set")
def test_wikitext_test_set_has_its_62_articles_and_no_marks() -> None:
    # 60 articles, two of which contain a line in the form of a top-level heading.
    text = (Path(os.environ["KNCOMPRESS_DATA"]) / "wikitext2" / "wiki.test.raw").read_text(encoding="utf-8")
    found = [wikitext.to_prose(article) for article in wikitext.articles([text])]
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
    assert split("a\n<|endoftext|>\nb\n<|doc|>\nc") == ["a", "b", "c"]
    extracted = '\n<doc id="1" title="x">\nx\n\nbody\n</doc>\n<doc id="2">\ny\n</doc>\n'
    assert split(extracted) == ["x\n\nbody", "y"]


def split(text: str, cut: int | None = None) -> list[str]:
    return list(split_documents(text.splitlines(keepends=True), cut))


def test_long_plain_documents_are_cut_at_paragraphs_where_asked() -> None:
    text = "\n\n".join(f"Paragraph {i}. " * 10 for i in range(100))
    pieces = split(text, cut=1000)
    assert [piece.strip() for piece in pieces] == pieces and len(pieces) > 10
    assert "".join("".join(pieces).split()) == "".join(text.split())
    assert all(1000 <= len(piece) + 2 < 1200 for piece in pieces[:-1])
    assert max(map(len, split("no paragraph here\n" * 1000, cut=1000))) < 2100


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
    files = (str(tmp_path / f"{name}.txt") for name in ("a", "b", "c"))
    config = DataConfig(**dict(zip(("source", "validation", "test"), files, strict=True)))
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
    for value in (None, 1.5, True, {"a": 1}, [None], ["sample", 3]):
        with pytest.raises(UserError, match=r"^data\.source=.*: must be a text or a list of texts"):
            find_sources(value, "data.source")
    with pytest.raises(UserError, match="no text in the train split"):
        read_split(DataConfig(source=str(tmp_path / "blank.txt")), "train")
    with pytest.raises(UserError, match=r"not UTF-8 text \(byte 3\)"):
        read_split(DataConfig(source=str(tmp_path / "latin.txt")), "all")


def test_lines_are_read_one_by_one_with_any_line_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("één\r\nzwei\rtrois\n".encode())
    assert list(text_lines(file)) == ["één\n", "zwei\n", "trois\n"]
    monkeypatch.setattr(files, "LONGEST_LINE", 3)
    assert "".join(documents_of(text_lines(file), "plain")) == "één\nzwei\ntrois"


def test_bad_bytes_are_found_far_into_a_file(tmp_path: Path) -> None:
    file = tmp_path / "far.txt"
    file.write_bytes("é\n".encode() * 50_000 + b"caf\xe9\n")
    with pytest.raises(UserError, match=r"far\.txt: not UTF-8 text \(byte 150003\)"):
        read_split(DataConfig(source=str(file)), "all")


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file of 2,000 documents that counts as too large for memory."""
    monkeypatch.setattr(sources, "IN_MEMORY", 1000)
    file = tmp_path / "large.txt"
    file.write_text("\n<|doc|>\n".join(f"document {i} of the corpus " * 5 for i in range(2000)))
    return str(file)


def test_a_large_file_is_split_document_by_document(large: str) -> None:
    parts = {s: read_split(DataConfig(source=large), s) for s in ("train", "validation", "test", "all")}
    assert sorted(parts["train"] + parts["validation"] + parts["test"]) == sorted(parts["all"])
    for name in ("validation", "test"):
        assert 70 < len(parts[name]) < 130  # 5% of 2,000, give or take three standard deviations
        assert all(place(document, ("test", "validation"), 0) == name for document in parts[name])
    # A split that has a source of its own is not taken out of the training text.
    own = DataConfig(source=large, validation=large)
    assert len(read_split(own, "train")) == 2000 - len(parts["test"])


def test_a_fraction_takes_its_share_the_same_each_time_and_others_by_another_seed(large: str) -> None:
    def train(seed: int = 0, fraction: float = 0.1) -> list[str]:
        return read_split(DataConfig(source=large, seed=seed, fraction=fraction), "train")

    whole, tenth = train(fraction=1.0), train()
    assert 140 < len(tenth) < 220
    assert tenth == train() and set(tenth) < set(whole)
    assert tenth == [document for document in whole if chosen(document, 0.1, 0)]
    assert len(set(train(seed=1)) & set(tenth)) < 40
    # More of it keeps what there was: the choice is by a threshold.
    assert set(tenth) < set(train(fraction=0.2))
    keys = {fingerprint(DataConfig(source=large, fraction=f), "train") for f in (0.1, 0.2, 1.0)}
    assert len(keys) == 3
    assert len({fingerprint(DataConfig(source=large, fraction=f), "test") for f in (0.1, 1.0)}) == 1


def test_a_fraction_that_leaves_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("a single document")
    (tmp_path / "test.txt").write_text("another one")
    with pytest.raises(UserError, match=r"no text in the train split \(data\.fraction=1e-09\)"):
        read_split(DataConfig(source=str(tmp_path), fraction=1e-9), "train")
    with pytest.raises(UserError, match=r"data\.fraction=0"):
        DataConfig(fraction=0)
    with pytest.raises(UserError, match=r"data\.fraction=1\.5: must lie between 0 and 1"):
        DataConfig(fraction=1.5)


def test_contents_are_hashed_again_only_where_a_file_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "text.txt"
    file.write_text("one")
    before = fingerprint(DataConfig(source=str(file)), "all")
    monkeypatch.setattr(files.hashlib, "file_digest", lambda *_: pytest.fail("hashed again"))
    assert fingerprint(DataConfig(source=str(file)), "all") == before
    monkeypatch.undo()
    file.write_text("two")
    os.utime(file, ns=(0, 0))
    assert fingerprint(DataConfig(source=str(file)), "all") != before


def test_reading_a_file_takes_little_memory(tmp_path: Path) -> None:
    import tracemalloc

    file = tmp_path / "long.txt"
    file.write_text(("some words of an article " * 40 + "\n<|doc|>\n") * 5000)
    source = find_sources(str(file), "data.source")[0]
    tracemalloc.start()
    try:
        count = sum(1 for _ in source.documents("all"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 5000
    assert peak < 500_000 < file.stat().st_size
