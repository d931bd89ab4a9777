import math

import torch

from kncompress.evaluation import TokenMean


def test_tokens_count_not_batches():
    mean = TokenMean()
    mean.update(torch.tensor([1.0, 2.0, 3.0]).sum(), 3)
    mean.update(10.0, 1)
    assert mean.compute().item() == 4.0 and mean.totals() == (16.0, 4)


def test_single_tokens_count_beyond_float32():
    """2^24 + 1 does not exist in float32."""
    mean = TokenMean()
    mean.update(float(2**24), 2**24)
    for _ in range(3):
        mean.update(1.0, 1)
    assert mean.totals() == (2**24 + 3, 2**24 + 3)


def test_no_token_is_nan_and_reset_forgets():
    mean = TokenMean()
    mean.update(5.0, 1)
    mean.reset()
    mean.update(0.0, 0)
    assert math.isnan(mean.compute())


def test_the_states_are_summed_over_processes():
    """Two processes of 1 and 3 tokens: the mean of all four, not the mean of the means."""
    other = {"total": torch.tensor(2.0, dtype=torch.float64), "count": torch.tensor(1)}
    mean = TokenMean(
        dist_sync_fn=lambda mine, group=None: [
            mine,
            other["count" if mine.dtype == torch.int64 else "total"],
        ],
        distributed_available_fn=lambda: True,
    )
    mean.update(18.0, 3)
    assert mean.compute().item() == 5.0
    assert mean.totals() == (20.0, 4)
    alone = TokenMean(sync_on_compute=False, distributed_available_fn=lambda: True)
    alone.update(18.0, 3)
    assert alone.totals() == (18.0, 3)
