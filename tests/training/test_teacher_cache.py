"""Draws on disk: made once, read by all, drawn again where they were damaged, refused where they are of another."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kncompress.config import GlueConfig, ObjectiveConfig
from kncompress.errors import UserError
from kncompress.training.teacher_cache import SUMS, TOKENS, Facts, TeacherCache

FACTS = Facts("teacher", "tokenizer", "text", 4, 6, 50, 3, 1.0, 0)
CPU = torch.device("cpu")


class Teacher:
    """Logits of blocks, and which were asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def of(self, blocks: list[int]):
        def logits(places: torch.Tensor) -> torch.Tensor:
            self.asked += [blocks[place] for place in places.tolist()]
            rows = [torch.randn(4, 50, generator=torch.Generator().manual_seed(blocks[p])) for p in places.tolist()]
            return torch.stack(rows)

        return logits


def read(cache: TeacherCache, teacher: Teacher, *blocks: int):
    return cache.draws(torch.tensor(blocks), teacher.of(list(blocks)), CPU)


def test_each_block_is_drawn_once(tmp_path: Path) -> None:
    teacher, cache = Teacher(), TeacherCache(tmp_path / "cache", FACTS)
    first = read(cache, teacher, 2, 5)
    assert teacher.asked == [2, 5] and first.tokens.shape == (2, 4, 3) and first.entropy.shape == (2, 4)
    again = read(TeacherCache(tmp_path / "cache", FACTS), teacher, 5, 1, 2)
    assert teacher.asked == [2, 5, 1]
    assert torch.equal(again.tokens[[2, 0]], first.tokens) and torch.equal(again.entropy[[2, 0]], first.entropy)
    assert "3 of 6 blocks are drawn" in cache.outlook() and "8 bytes a token" in cache.outlook()
    other = read(TeacherCache(tmp_path / "other", FACTS), Teacher(), 1, 2)  # draws depend on the block alone
    assert torch.equal(other.tokens, again.tokens[[1, 2]])


def test_a_process_that_lacks_nothing_asks_with_the_others(tmp_path: Path) -> None:
    teacher, cache = Teacher(), TeacherCache(tmp_path, FACTS)
    first, told = read(cache, teacher, 2, 5), []
    for others_lack in (True, False):
        logits, blocks = teacher.of([2, 5]), torch.tensor([2, 5])
        again = cache.draws(blocks, logits, CPU, lambda lacks, any=others_lack: told.append(lacks) or any)
        assert torch.equal(again.tokens, first.tokens)
    assert told == [False, False] and teacher.asked == [2, 5, 2]


def test_what_is_damaged_or_half_written_is_drawn_again(tmp_path: Path) -> None:
    teacher, cache = Teacher(), TeacherCache(tmp_path, FACTS)
    whole = read(cache, teacher, 0, 1, 2)
    del cache
    content = bytearray((tmp_path / TOKENS).read_bytes())
    content[24 + 5] ^= 4  # of block 1
    (tmp_path / TOKENS).write_bytes(content)
    sums = bytearray((tmp_path / SUMS).read_bytes())
    sums[8:12] = bytes(4)  # block 2: killed before its sum
    (tmp_path / SUMS).write_bytes(sums)
    again = read(TeacherCache(tmp_path, FACTS), teacher, 0, 1, 2)
    assert teacher.asked == [0, 1, 2, 1, 2] and torch.equal(again.tokens, whole.tokens)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"teacher": "x"}, "its draws are of another teacher; give another folder"),
        ({"text": "x"}, "of another text;"),
        ({"context": 8, "blocks": 3}, "of another context (4, not 8);"),
        ({"samples": 4}, "of another samples (3, not 4);"),
        ({"temperature": 2.0}, "of another temperature (1, not 2);"),
        ({"seed": 1}, "of another seed (0, not 1);"),
    ],
)
def test_draws_of_something_else_are_refused(tmp_path: Path, values: dict[str, object], told: str) -> None:
    TeacherCache(tmp_path, FACTS)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(UserError) as caught:
        TeacherCache(tmp_path, replace(FACTS, **values))
    assert str(caught.value).startswith(f"objective.cache={tmp_path}: ") and told in str(caught.value)
    assert before == {file.name: file.read_bytes() for file in tmp_path.iterdir()}


def test_a_folder_of_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files"):
        TeacherCache(tmp_path, FACTS)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
    (tmp_path / "notes.txt").rename(tmp_path / "facts.json")
    with pytest.raises(UserError, match=r"facts\.json"):
        TeacherCache(tmp_path, FACTS)


def test_what_needs_the_teacher_itself_is_refused() -> None:
    with pytest.raises(UserError, match=r"objective.cache=c: keeps its logits alone, and objective.hidden=1 needs"):
        ObjectiveConfig(cache="c", logits=1.0, hidden=1.0)
    with pytest.raises(UserError, match=r"objective.cache=c: stands for the teacher's logits; objective.logits is 0"):
        ObjectiveConfig(cache="c")
    with pytest.raises(UserError, match=r"objective.cache=c: is for train"):
        GlueConfig(objective=ObjectiveConfig(cache="c", logits=1.0))
