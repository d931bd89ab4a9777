"""Token streams, blocks, the sampler and the datamodule."""

import itertools
import json
import multiprocessing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from waiting import PATIENCE

from kncompress.config import DataConfig
from kncompress.data import sources
from kncompress.data.build import Build
from kncompress.data.module import TextDataModule
from kncompress.data.sampler import EndlessSampler
from kncompress.data.tokenizer import check_fit, ignored_token, train_tokenizer
from kncompress.data.tokens import Blocks, TokenStream, token_stream
from kncompress.errors import UserError

TEXTS = ["The cat sat on the mat. " * 30, "A dog, <unk> by name, ran after the cat. " * 30]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(TEXTS, 280, context=32)


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    for number, text in enumerate(TEXTS):
        (tmp_path / "text").mkdir(exist_ok=True)
        (tmp_path / "text" / f"{number}.txt").write_text(text)
    return DataConfig(source=str(tmp_path / "text"), cache_dir=str(tmp_path / "cache"))


def test_stream_is_the_documents_with_end_of_text_between(config: DataConfig, tokenizer: Any) -> None:
    stream = token_stream(config, "all", tokenizer)
    documents = tokenizer.decode(stream.tokens.tolist()).split("<|endoftext|>")
    assert documents[-1] == ""
    assert [d.replace(" <unk>", "<unk>") for d in documents[:-1]] == [
        t.strip().replace(" <unk>", "<unk>") for t in TEXTS
    ]
    assert stream.documents == 2
    assert stream.text_bytes == sum(len(t.strip().encode()) for t in TEXTS)
    assert stream.tokens.dtype == np.uint16


def test_cache_is_used_until_text_or_tokenizer_change(
    config: DataConfig, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    token_stream(config, "all", tokenizer)
    builds = []
    real = Build.run
    monkeypatch.setattr(Build, "run", lambda *a: (builds.append(1), real(*a)))
    tokenizer(["this leaves a truncation behind"], truncation=True, max_length=2)
    token_stream(config, "all", tokenizer)
    assert not builds
    token_stream(config, "all", train_tokenizer(TEXTS, 270, context=32))
    assert len(builds) == 1
    (Path(config.source) / "0.txt").write_text("Other text.")
    token_stream(config, "all", tokenizer)
    assert len(builds) == 2


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / "facts.json").write_text("{"), "damaged"),
        (lambda folder: (folder / "facts.json").unlink(), "damaged"),
        (lambda folder: (folder / "tokens.bin").unlink(), "damaged: tokens.bin cannot be read"),
        (lambda folder: (folder / "tokens.bin").write_bytes(b"123456"), "damaged: tokens.bin is not as it was written"),
        (lambda folder: flip(folder / "tokens.bin"), "damaged: tokens.bin is not as it was written"),
        (
            lambda folder: change(folder, dtype="float16"),
            "facts.json: dtype=.float16.: must be 'uint16' or 'uint32'",
        ),
        (lambda folder: change(folder, tokens=-1), r"facts.json: tokens=-1: must be greater than or equal to 0"),
        (lambda folder: change(folder, tokens=7), "damaged: tokens.bin is not as it was written"),
        (lambda folder: change(folder, text_bytes="9"), r"facts.json: text_bytes=\"9\": must be a valid integer"),
        (lambda folder: change(folder, tokenizer="another"), "made by another tokenizer"),
        (lambda folder: change(folder, text="another"), "made of another text"),
    ],
)
def test_damaged_and_foreign_caches_are_named(config: DataConfig, tokenizer: Any, damage: Any, reason: str) -> None:
    token_stream(config, "all", tokenizer)
    (facts,) = Path(str(config.cache_dir)).rglob("facts.json")
    damage(facts.parent)
    with pytest.raises(UserError, match=rf"data\.cache_dir=.*{facts.parent.name}: .*{reason}.*; delete the folder$"):
        token_stream(config, "all", tokenizer)


def flip(file: Path) -> None:
    """Turn one bit in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def change(folder: Path, **values: Any) -> None:
    facts = json.loads((folder / "facts.json").read_text())
    (folder / "facts.json").write_text(json.dumps(facts | values))


def test_a_cache_copied_to_another_key_is_noticed(config: DataConfig, tokenizer: Any) -> None:
    token_stream(config, "all", tokenizer)
    (mine,) = (folder.parent for folder in Path(str(config.cache_dir)).rglob("facts.json"))
    saved = {file.name: file.read_bytes() for file in mine.iterdir()}
    token_stream(config, "all", train_tokenizer(TEXTS, 270, context=32))
    (other,) = (f.parent for f in Path(str(config.cache_dir)).rglob("facts.json") if f.parent != mine)
    for name, content in saved.items():
        (other / name).write_bytes(content)
    with pytest.raises(UserError, match="made by another tokenizer"):
        token_stream(config, "all", train_tokenizer(TEXTS, 270, context=32))


def test_a_cache_folder_that_cannot_be_written_is_named(config: DataConfig, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data\.cache_dir=.*file: cannot be written"):
        token_stream(DataConfig(source=config.source, cache_dir=str(tmp_path / "file")), "all", tokenizer)


def _length(source: str, cache: str, results: Any) -> None:
    tokenizer = train_tokenizer(TEXTS, 280, context=32)
    results.put(len(token_stream(DataConfig(source=source, cache_dir=cache), "all", tokenizer)))


def test_two_processes_build_one_cache(config: DataConfig) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=_length, args=(config.source, config.cache_dir, results)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE)
    assert [process.exitcode for process in processes] == [0, 0]
    assert results.get() == results.get() > 0
    folders = [p for p in (Path(str(config.cache_dir)) / "tokens").iterdir() if p.is_dir()]
    assert len(folders) == 1 and sorted(p.name for p in folders[0].iterdir()) == ["facts.json", "tokens.bin"]


def test_wide_vocabularies_take_four_bytes(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wide:
        eos_token_id = 70_000
        bos_token_id = None
        backend_tokenizer = None

        def __len__(self) -> int:
            return 70_001

        def get_vocab(self) -> dict[str, int]:
            return {"a": 0}

        def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
            return {"input_ids": [[66_000] for _ in texts]}

    stream = token_stream(config, "all", Wide())
    assert stream.tokens.dtype == np.uint32
    assert stream.tokens.tolist() == [66_000, 70_000] * 2


def test_unknown_words_are_no_targets(config: DataConfig, tokenizer: Any) -> None:
    unknown = ignored_token(tokenizer)
    assert tokenizer.convert_ids_to_tokens(unknown) == "<unk>"
    blocks = Blocks(token_stream(config, "all", tokenizer), 32, unknown)
    items = [blocks[i] for i in range(len(blocks))]
    ids, labels = (torch.cat([item[key] for item in items]) for key in ("input_ids", "labels"))
    assert (ids == unknown).any()
    assert torch.equal(labels == -100, ids == unknown)
    assert torch.equal(labels[labels != -100], ids[ids != unknown])


def test_no_lone_space_before_an_unknown_word(tokenizer: Any) -> None:
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("dog, <unk> by")["input_ids"])
    assert pieces[pieces.index("<unk>") - 1] == ","


def test_short_text_and_misfit_tokenizers_are_named(config: DataConfig, tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"data\.context=100000: the text has only \d+ tokens"):
        Blocks(token_stream(config, "all", tokenizer), 100_000)
    with pytest.raises(UserError, match="has 280 tokens and the model's embedding only 279 rows"):
        check_fit(tokenizer, 279, "mine")
    with pytest.raises(UserError, match=r"vocab_size=5000: the text yields only"):
        train_tokenizer(TEXTS, 5000, context=32)


@given(blocks=st.integers(1, 40), seed=st.integers(0, 5), consumed=st.integers(0, 100))
def test_sampler_sees_each_block_once_an_epoch_and_resumes(blocks: int, seed: int, consumed: int) -> None:
    whole = list(itertools.islice(EndlessSampler(blocks, seed), 200))
    for epoch in range(200 // blocks):
        assert sorted(whole[epoch * blocks : (epoch + 1) * blocks]) == list(range(blocks))
    rest = itertools.islice(EndlessSampler(blocks, seed, consumed), 200 - consumed)
    assert list(rest) == whole[consumed:]


def test_sampler_shuffles_differently_by_epoch_and_seed() -> None:
    assert EndlessSampler(50, 0).order(0) != EndlessSampler(50, 0).order(1)
    assert EndlessSampler(50, 0).order(0) != EndlessSampler(50, 1).order(0)


def test_an_order_is_drawn_once_an_epoch_and_is_like_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    orders = [tuple(EndlessSampler(50, seed).order(epoch)) for seed in range(4) for epoch in range(4)]
    assert len(set(orders)) == 16
    drawn = []
    real = EndlessSampler.order
    monkeypatch.setattr(EndlessSampler, "order", lambda sampler, epoch: (drawn.append(epoch), real(sampler, epoch))[1])
    list(itertools.islice(EndlessSampler(5, 0, consumed=3), 10))  # draws of millions of blocks take seconds
    assert drawn == [0, 1, 2]


@given(ranks=st.integers(1, 4), consumed=st.integers(0, 30), blocks=st.integers(1, 9))
def test_ranks_share_the_blocks_from_where_the_run_stopped(ranks: int, consumed: int, blocks: int) -> None:
    whole = list(itertools.islice(EndlessSampler(blocks, 0), consumed + 5 * ranks))
    shares = [list(itertools.islice(EndlessSampler(blocks, 0, consumed, r, ranks), 5)) for r in range(ranks)]
    assert [block for turn in zip(*shares, strict=True) for block in turn] == whole[consumed:]


def test_datamodule_resumes_where_the_steps_ended(config: DataConfig, tokenizer: Any) -> None:
    def module() -> TextDataModule:
        return TextDataModule(config, tokenizer, context=16, micro_batch=1, step_blocks=2, seed=0)

    batches = [b["input_ids"] for b in itertools.islice(module().train_dataloader(), 8)]
    resumed = module()
    assert resumed.state_dict() == {"consumed": 0}
    resumed.load_state_dict(json.loads(json.dumps({"consumed": 3 * 2})))
    assert torch.equal(next(iter(resumed.train_dataloader()))["input_ids"], batches[6])


def test_datamodules_of_several_processes_resume_where_the_steps_ended(config: DataConfig, tokenizer: Any) -> None:
    """Two processes of one block a batch: what they read together is what one process would have read."""

    def module(rank: int = 0, ranks: int = 1, step: int = 0) -> TextDataModule:
        module = TextDataModule(config, tokenizer, context=16, micro_batch=1, step_blocks=2, seed=4)
        module.trainer = SimpleNamespace(global_rank=rank, world_size=ranks, global_step=step)
        return module

    def batches(module: TextDataModule, count: int) -> list[Tensor]:
        return [batch["input_ids"] for batch in itertools.islice(module.train_dataloader(), count)]

    state = module(rank=1, ranks=2, step=3).state_dict()
    assert state["consumed"] == 3 * 2
    shares = []
    for rank in range(2):
        resumed = module(rank, ranks=2)
        resumed.load_state_dict(state)
        shares.append(batches(resumed, 3))
    together = [batch for turn in zip(*shares, strict=True) for batch in turn]
    assert torch.equal(torch.cat(together), torch.cat(batches(module(), 12)[6:]))


def test_blocks_are_the_stream_in_order() -> None:
    stream = TokenStream(np.arange(70, dtype=np.uint16), 1, 70)
    blocks = Blocks(stream, 32)
    assert len(blocks) == 2
    assert blocks[1]["input_ids"].tolist() == list(range(32, 64))


def test_split_of_sources_reaches_the_stream(config: DataConfig, tokenizer: Any) -> None:
    lengths = {s: len(token_stream(config, s, tokenizer)) for s in ("train", "validation", "test", "all")}
    assert lengths["train"] > lengths["test"] > 0
    assert sources.fingerprint(config, "train") != sources.fingerprint(config, "test")


def test_published_lines_get_no_end_of_text(tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "text.txt"
    file.write_text("The cat sat.\n\nThe dog ran.\n")
    config = DataConfig(source=str(file), text_format="lines", cache_dir=str(tmp_path))
    stream = token_stream(config, "all", tokenizer)
    assert tokenizer.decode(stream.tokens.tolist()) == "The cat sat.\n\n\n\n\nThe dog ran.\n"
