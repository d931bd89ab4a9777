"""A tiny GPT-2 for the tests of this folder."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

logging.disable_progress_bar()


@pytest.fixture
def tiny_config():
    return GPT2Config(
        vocab_size=96,
        n_embd=24,
        n_layer=3,
        n_head=2,
        n_positions=32,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
    )


@pytest.fixture
def tiny(tiny_config):
    """Dense, in evaluation mode; biases random, so that a lost one shows."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(tiny_config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model


@pytest.fixture
def ids():
    return torch.randint(2, 96, (2, 7), generator=torch.Generator().manual_seed(1))
