"""Calibration text: pieces from all over, of every source and form, held-out text left out."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kncompress.config import DataConfig
from kncompress.data import pieces as module
from kncompress.data.pieces import LENGTH, draw, pieces, spread_tokens
from kncompress.data.sources import read_split
from kncompress.data.tokenizer import train_tokenizer
from kncompress.errors import UserError


def article(kind: str, number: int) -> str:
    return "\n\n".join(f"{kind}{number} says {word} in part {part}." * 8 for part, word in enumerate("abcdefgh"))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer([article(kind, n) for kind in ("web", "book") for n in range(30)], 300, 64)


@pytest.fixture
def two(tmp_path: Path) -> list[str]:
    for kind, count in (("web", 200), ("book", 50)):
        (tmp_path / f"{kind}.txt").write_text("\n<|doc|>\n".join(article(kind, n) for n in range(count)))
    return [str(tmp_path / f"{kind}.txt") for kind in ("web", "book")]


def documents_in(tokens: np.ndarray, tokenizer: Any) -> list[str]:
    """The text between the end-of-text tokens."""
    return [text for text in tokenizer.decode(tokens.tolist()).split(tokenizer.eos_token) if text]


def test_every_source_of_a_list_has_its_share_and_many_articles(two: list[str], tokenizer: Any) -> None:
    tokens = spread_tokens(DataConfig(source=two), tokenizer, 12_000)
    assert tokens.shape == (12_000,) and tokens.dtype == np.int64
    found = documents_in(tokens, tokenizer)
    web = [text for text in found if text.startswith("web")]
    book = [text for text in found if text.startswith("book")]
    assert len(web) + len(book) == len(found)
    assert abs(sum(map(len, web)) - sum(map(len, book))) < 2 * LENGTH  # equal, to a piece
    # In turns, so that the first half has both too; and of many articles, not the first few.
    assert {text[:3] for text in found[:2]} == {"web", "boo"}
    assert len({text.split(" ")[0] for text in web}) > 5
    numbers = [int(text.split(" ")[0].removeprefix("web")) for text in web]
    assert max(numbers) > 100


def test_the_draw_is_by_the_seed_alone(two: list[str], tokenizer: Any) -> None:
    first, again, other = (spread_tokens(DataConfig(source=two, seed=s), tokenizer, 3000) for s in (0, 0, 1))
    assert (first == again).all() and not (first == other).all()
    # What follows for the planner's KL is other text: the same draw goes on.
    assert (spread_tokens(DataConfig(source=two), tokenizer, 6000)[:3000] == first).all()
    texts = documents_in(spread_tokens(DataConfig(source=two), tokenizer, 6000), tokenizer)
    assert len(set(texts)) == len(texts)


def test_held_out_text_is_no_calibration_text(two: list[str], tokenizer: Any) -> None:
    config = DataConfig(source=two[0])
    held_out = {text.split(" ")[0] for split in ("validation", "test") for text in read_split(config, split)}
    found = {text.split(" ")[0] for text in documents_in(spread_tokens(config, tokenizer, 10**6), tokenizer)}
    assert held_out and len(found) + len(held_out) == 200 and not found & held_out


def test_a_short_text_is_taken_whole_and_an_empty_one_is_told(tmp_path: Path, tokenizer: Any) -> None:
    for split in ("train", "test", "valid"):
        (tmp_path / f"{split}.txt").write_text(article("web", 1) if split == "train" else "other")
    tokens = spread_tokens(DataConfig(source=str(tmp_path)), tokenizer, 100_000)
    assert sorted("".join(documents_in(tokens, tokenizer)).split()) == sorted(article("web", 1).split())
    (tmp_path / "train.txt").write_text(" \n")
    with pytest.raises(UserError, match="no text in the train split"):
        spread_tokens(DataConfig(source=str(tmp_path)), tokenizer, 100)


WIKI = "".join(f" = T{n} = \n \n" + f" word{n} @-@ like , yes . \n" * 60 + " \n" for n in range(80))


def test_wikitext_is_taken_as_prose_and_as_published(tmp_path: Path, tokenizer: Any) -> None:
    for split in ("train", "valid", "test"):
        (tmp_path / f"wiki.{split}.tokens").write_text(WIKI if split == "train" else " = Held = \n \n out \n")

    def forms(**options: Any) -> tuple[float, float]:
        config = DataConfig(source=str(tmp_path), **options)
        found = documents_in(spread_tokens(config, tokenizer, 20_000), tokenizer)
        raw = [text for text in found if " @-@ " in text]
        return sum(map(len, raw)), sum(map(len, found)) - sum(map(len, raw))

    raw, prose = forms()
    assert 0.8 < raw / prose < 1.25
    assert forms(text_format="wikitext")[0] == 0 and forms(text_format="lines")[1] == 0


def test_wikitext_of_one_file_is_prose_alone_for_its_split_is_by_its_text(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "corpus.tokens").write_text(WIKI)
    config = DataConfig(source=str(tmp_path / "corpus.tokens"))
    assert " @-@ " not in tokenizer.decode(spread_tokens(config, tokenizer, 10_000).tolist())


@pytest.mark.parametrize("document", [article("web", 3), "word " * 5000, "x" * 9000, "short", "a\n\n\n\nb"])
def test_pieces_make_up_the_document(document: str) -> None:
    found = list(pieces(document))
    assert "".join("".join(found).split()) == "".join(document.split())
    assert all(len(piece) <= 3 * LENGTH for piece in found)
    assert all(len(piece) + 2 >= LENGTH for piece in found[:-1])


def test_a_large_corpus_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "READ_AT_MOST", 1000)
    read = []
    documents = (read.append(n) or f"{n} " * 50 for n in range(10**6))
    assert len(draw(documents, 5, seed=0)) == 5
    assert len(read) < 20
