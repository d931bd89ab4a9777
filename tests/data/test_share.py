"""Validation blocks shared by several processes."""

import math

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from kncompress.data.module import Share
from kncompress.data.tokens import IGNORED_LABEL, Blocks, TokenStream


@given(count=st.integers(1, 40), ranks=st.integers(1, 9), context=st.integers(1, 5))
def test_every_block_is_counted_once_and_all_ranks_have_as_many(count: int, ranks: int, context: int) -> None:
    tokens = np.arange(count * context, dtype=np.uint16)
    blocks = Blocks(TokenStream(tokens, 1, 0), context)
    shares = [Share(blocks, count, rank, ranks) for rank in range(ranks)]
    assert {len(share) for share in shares} == {math.ceil(count / ranks)}
    items = [item for share in shares for item in share]
    assert len(items) == sum(map(len, shares))
    counted = torch.cat([item["labels"] for item in items])
    assert sorted(counted[counted != IGNORED_LABEL].tolist()) == tokens.tolist()
    assert all(item["input_ids"].shape == (context,) for item in items)


def test_fewer_blocks_than_there_are_lie_all_over_the_text() -> None:
    blocks = Blocks(TokenStream(np.arange(100, dtype=np.uint16), 1, 0), 2)
    items = [item for rank in range(2) for item in Share(blocks, 5, rank, 2)]
    places = sorted({int(item["input_ids"][0]) // 2 for item in items})
    assert places == [0, 10, 20, 30, 40]
