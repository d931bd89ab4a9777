import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kncompress.errors import UserError
from kncompress.evaluation.windows import Window, batches, read, sliding_windows


def test_no_overlap_by_hand():
    assert sliding_windows(11, 4) == [Window(0, 4, 3), Window(4, 8, 3), Window(8, 11, 2)]
    assert sliding_windows(8, 4, 4) == [Window(0, 4, 3), Window(4, 8, 3)]


def test_a_last_window_of_one_token_is_left_out():
    assert sliding_windows(9, 4) == [Window(0, 4, 3), Window(4, 8, 3)]


def test_overlap_by_hand():
    assert sliding_windows(11, 6, 2) == [Window(0, 6, 5), Window(2, 8, 2), Window(4, 10, 2), Window(6, 11, 1)]


def test_a_text_shorter_than_the_context():
    assert sliding_windows(3, 8) == sliding_windows(3, 8, 2) == [Window(0, 3, 2)]


@settings(deadline=None)
@given(st.integers(2, 300), st.integers(2, 40), st.data())
def test_every_token_is_scored_once_with_the_promised_context(length, context, data):
    stride = data.draw(st.integers(1, context))
    windows = sliding_windows(length, context, stride)
    scored = [token for w in windows for token in range(w.end - w.targets, w.end)]
    unscored = {0} if stride < context else set(range(0, length, context))
    assert scored == [token for token in range(length) if token not in unscored]
    assert all(w.end - w.begin <= context for w in windows)
    assert all(w.end - w.targets - w.begin >= max(1, context - stride) for w in windows[1:])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((1, 4), "tokens=1: too short"),
        ((0, 4), "tokens=0: too short"),
        ((9, 1), "context=1: must be 2 or more"),
        ((9, 4, 5), "stride=5: must lie between 1 and context=4"),
        ((9, 4, 0), "stride=0: must lie"),
    ],
)
def test_impossible_windows(arguments, message):
    with pytest.raises(UserError, match=message):
        sliding_windows(*arguments)


@settings(deadline=None)
@given(st.integers(2, 200), st.integers(2, 20), st.integers(1, 100), st.data())
def test_batches_keep_order_shape_and_size(length, context, batch_tokens, data):
    windows = sliding_windows(length, context, data.draw(st.integers(1, context)))
    groups = list(batches(windows, batch_tokens))
    assert [window for group in groups for window in group] == windows
    for group in groups:
        assert len({(window.end - window.begin, window.targets) for window in group}) == 1
        assert len(group) == 1 or sum(window.end - window.begin for window in group) <= batch_tokens


def test_batches_are_filled():
    assert [len(group) for group in batches(sliding_windows(44, 4), 16)] == [4, 4, 3]


@pytest.mark.parametrize("kind", ["tensor", "list", "uint16", "uint32", "memmap"])
def test_read_every_kind_of_tokens(kind, tmp_path):
    ids = [3, 65535, 0, 7, 5, 1]
    tokens = {"tensor": torch.tensor(ids), "list": ids}.get(kind)
    if kind == "memmap":
        np.array(ids, np.uint16).tofile(tmp_path / "tokens")
        tokens = np.memmap(tmp_path / "tokens", np.uint16, "r")
    elif tokens is None:
        tokens = np.array(ids, kind)
    rows = read(tokens, [Window(0, 3, 2), Window(3, 6, 2)])
    assert rows.dtype == torch.int64 and rows.tolist() == [ids[:3], ids[3:]]
