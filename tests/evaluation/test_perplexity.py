import math

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.modeling_outputs import CausalLMOutput

from kncompress.errors import UserError
from kncompress.evaluation import bits_per_byte, compare, perplexity, scoring

VOCABULARY, POSITIONS = 64, 16


def random_model(seed, vocabulary=VOCABULARY):
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocabulary, n_embd=16, n_layer=2, n_head=2, n_positions=POSITIONS, initializer_range=0.4
    )
    return GPT2LMHeadModel(config)


@pytest.fixture(scope="module")
def model():
    return random_model(0)


@pytest.fixture(scope="module")
def teacher():
    return random_model(1)


TOKENS = torch.randint(0, VOCABULARY, (75,), generator=torch.Generator().manual_seed(0))  # 75 = 4 x 16 + 11


@torch.no_grad()
def log_probabilities(model, context):
    """(V,) after the tokens ``context``, by a forward pass over nothing else."""
    model.eval()
    return model(torch.as_tensor(context)[None], use_cache=False).logits[0, -1].double().log_softmax(-1)


def naive(model, tokens, context, stride):
    """Negative log-likelihood of each token that is scored, one forward pass a token: {position: nats}."""
    nll, begin, scored = {}, 0, 1
    while True:
        end = min(begin + context, len(tokens))
        for position in range(max(scored, begin + 1), end):
            nll[position] = -log_probabilities(model, tokens[begin:position])[tokens[position]].item()
        if end == len(tokens):
            return nll
        begin, scored = begin + stride, end


@pytest.mark.parametrize("stride", [None, 16, 5, 1])
def test_against_one_forward_pass_a_token(model, stride):
    expected = naive(model, TOKENS, 16, stride or 16)
    result = perplexity(model, TOKENS, 16, stride, batch_tokens=64)
    assert result.tokens == len(expected) == (70 if stride in (None, 16) else 74)
    assert result.nll == pytest.approx(np.mean(list(expected.values())), rel=1e-5)
    assert result.perplexity == math.exp(result.nll)
    assert result.nll * result.tokens == pytest.approx(sum(expected.values()), rel=1e-5)


def test_overlap_gives_other_scores_than_no_overlap(model):
    """Or the test above could not tell them apart."""
    assert perplexity(model, TOKENS, 16, 5).nll != pytest.approx(perplexity(model, TOKENS, 16).nll, rel=1e-3)


def test_window_mean_weighs_a_short_last_window_like_a_full_one(model):
    expected = naive(model, TOKENS, 16, 16)
    windows = [[nll for at, nll in expected.items() if at // 16 == i] for i in range(5)]
    assert [len(window) for window in windows] == [15, 15, 15, 15, 10]
    result = perplexity(model, TOKENS, 16)
    assert result.windows == 5
    assert result.window_nll == pytest.approx(np.mean([np.mean(window) for window in windows]), rel=1e-5)
    assert result.window_perplexity == math.exp(result.window_nll)
    assert result.window_nll != pytest.approx(result.nll, rel=1e-4)


def test_window_mean_is_the_models_own_loss_per_window(model):
    """The published protocol: transformers' loss of each window, averaged, exponentiated."""
    model.eval()
    with torch.no_grad():
        losses = [model(part[None], labels=part[None], use_cache=False).loss for part in TOKENS.split(16)]
    result = perplexity(model, TOKENS, 16)
    assert result.window_perplexity == pytest.approx(torch.stack(losses).mean().exp().item(), rel=1e-5)


def test_overlapping_windows_have_no_window_mean(model):
    result = perplexity(model, TOKENS, 16, 8)
    assert result.window_nll is None and result.window_perplexity is None


@pytest.mark.parametrize("stride", [None, 6])
def test_the_batch_size_changes_nothing(model, stride):
    results = [perplexity(model, TOKENS, 16, stride, batch_tokens=size) for size in (1, 33, 64, 10**6)]
    for result in results[1:]:
        assert (result.tokens, result.windows) == (results[0].tokens, results[0].windows)
        assert result.nll == pytest.approx(results[0].nll, rel=1e-6)


@pytest.mark.parametrize("stride", [None, 6])
def test_chunks_of_tokens_change_nothing(model, stride, monkeypatch):
    whole = perplexity(model, TOKENS, 16, stride)
    monkeypatch.setattr(scoring, "_CHUNK_NUMBERS", 4 * VOCABULARY)
    seen = []
    gather = torch.Tensor.gather
    monkeypatch.setattr(torch.Tensor, "gather", lambda self, *a: seen.append(len(self)) or gather(self, *a))
    assert perplexity(model, TOKENS, 16, stride).nll == pytest.approx(whole.nll, rel=1e-9)
    assert max(seen) == 4 and sum(seen) == whole.tokens


@pytest.mark.parametrize("length", [2, 7])
def test_a_text_shorter_than_the_context(model, length):
    expected = naive(model, TOKENS[:length], 16, 16)
    result = perplexity(model, TOKENS[:length], 16)
    assert (result.tokens, result.windows) == (length - 1, 1)
    assert result.nll == result.window_nll == pytest.approx(np.mean(list(expected.values())), rel=1e-5)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_memory_mapped_tokens(model, tmp_path, dtype):
    TOKENS.numpy().astype(dtype).tofile(tmp_path / "tokens.bin")
    mapped = np.memmap(tmp_path / "tokens.bin", dtype, "r")
    assert perplexity(model, mapped, 16, 5) == perplexity(model, TOKENS, 16, 5)


def test_limit_scores_the_beginning(model):
    assert perplexity(model, TOKENS, 16, limit=40) == perplexity(model, TOKENS[:40], 16)
    assert perplexity(model, TOKENS, 16, limit=1000).tokens == 70


def test_ignored_tokens_are_context_but_not_scored(model):
    ignore = int(TOKENS[20])
    kept = {at: nll for at, nll in naive(model, TOKENS, 16, 16).items() if TOKENS[at] != ignore}
    result = perplexity(model, TOKENS, 16, ignore=ignore)
    assert result.tokens == len(kept) < 70
    assert result.nll == pytest.approx(np.mean(list(kept.values())), rel=1e-5)


def test_a_window_of_ignored_tokens_is_no_window(model):
    tokens = TOKENS.clone()
    tokens[16:32] = tokens[0] = 63
    result = perplexity(model, tokens, 16, ignore=63)
    assert result.windows == 4 and math.isfinite(result.window_nll)
    with pytest.raises(UserError, match="every token is ignored"):
        perplexity(model, torch.full((40,), 63), 16, ignore=63)


@pytest.mark.parametrize(
    "tokens, context, stride, message",
    [
        ([], 16, None, "tokens=0: too short"),
        ([5], 16, None, "tokens=1: too short"),
        (TOKENS, 17, None, "context=17: longer than the model's 16 positions"),
        (TOKENS, 8, 9, "stride=9: must lie between 1 and context=8"),
    ],
)
def test_what_cannot_be_scored(model, tokens, context, stride, message):
    with pytest.raises(UserError, match=message):
        perplexity(model, tokens, context, stride)


def test_a_batch_of_texts_is_refused(model):
    with pytest.raises(ValueError, match="2 dimensions"):
        perplexity(model, TOKENS[None], 16)


def test_modes_are_restored_and_dropout_is_off():
    model = random_model(0)  # GPT-2's default dropout
    model.train()
    model.transformer.h[1].eval()
    before = [module.training for module in model.modules()]
    first, second = perplexity(model, TOKENS, 16), perplexity(model, TOKENS, 16)
    assert first == second == perplexity(random_model(0).eval(), TOKENS, 16)
    assert [module.training for module in model.modules()] == before
    with pytest.raises(IndexError):
        perplexity(model, TOKENS + VOCABULARY, 16)
    assert [module.training for module in model.modules()] == before


def test_a_model_can_train_after_being_scored_inside_autocast():
    model = random_model(0)
    with torch.autocast("cpu", torch.bfloat16):
        inside = perplexity(model, TOKENS, 16)
        model(TOKENS[None, :16], labels=TOKENS[None, :16], use_cache=False).loss.backward()
    assert model.transformer.wte.weight.grad.any()
    assert inside == perplexity(model, TOKENS, 16), "the surrounding autocast reached the scores"


def test_bf16_is_near_but_not_float32(model):
    exact, rounded = perplexity(model, TOKENS, 16), perplexity(model, TOKENS, 16, bf16=True)
    assert rounded.nll != exact.nll and rounded.nll == pytest.approx(exact.nll, rel=0.02)


def test_progress_counts_windows(model):
    calls = []
    perplexity(model, TOKENS, 16, batch_tokens=32, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(2, 5), (4, 5), (5, 5)]


class Uniform(nn.Module):
    """A model with no ``logits_to_keep``: every token equally likely."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, input_ids, use_cache):
        return CausalLMOutput(logits=self.weight.expand(*input_ids.shape, VOCABULARY))


@pytest.mark.parametrize("stride", [None, 3])
def test_a_uniform_model_by_hand(stride):
    result = perplexity(Uniform(), TOKENS, 16, stride)
    assert result.perplexity == pytest.approx(VOCABULARY, rel=1e-6)


def test_a_hopeless_model_has_infinite_perplexity():
    model = random_model(0)
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(1e5)
    assert perplexity(model, TOKENS, 16).perplexity == math.inf


# --- bits per byte


def test_bits_per_byte_by_hand():
    assert bits_per_byte(8 * math.log(2), 4) == pytest.approx(2.0)
    with pytest.raises(UserError, match="bytes=0"):
        bits_per_byte(1.0, 0)


# --- several processes


def _score_share(rank, world, file):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    result = perplexity(random_model(0), TOKENS, 16, limit=70, rank=rank, world=world)
    whole = perplexity(random_model(0), TOKENS, 16, limit=70)
    if rank == 0:  # alone, while the other process has long gone on: must not wait for it
        perplexity(random_model(0), TOKENS, 16, limit=70)
    torch.distributed.destroy_process_group()
    assert (result.tokens, result.windows, whole.tokens) == (65, 5, 65)
    assert abs(result.nll - whole.nll) < 1e-6 and abs(result.window_nll - whole.window_nll) < 1e-6


@pytest.mark.slow
def test_two_processes_score_one_text(tmp_path):
    torch.multiprocessing.spawn(_score_share, (2, tmp_path / "store"), nprocs=2)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_shares_of_the_windows_add_up(model, world):
    """Without a process group: what each of several processes would score by itself."""
    shares = [perplexity(model, TOKENS, 16, rank=rank, world=world) for rank in range(world)]
    whole = perplexity(model, TOKENS, 16)
    assert whole.windows == 5 and [share.windows for share in shares] == [len(range(r, 5, world)) for r in range(world)]
    assert sum(share.tokens for share in shares) == whole.tokens
    assert sum(share.nll * share.tokens for share in shares) == pytest.approx(whole.nll * whole.tokens, rel=1e-6)


@pytest.mark.parametrize("stride", [None, 5])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "mistral"])
def test_a_long_window_in_pieces_scores_the_same_and_never_holds_all_logits(kind, stride, monkeypatch):
    torch.manual_seed(0)
    model = _small(kind)
    whole = perplexity(model, TOKENS, 16, stride)
    sizes = []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda *found: sizes.append(found[2].numel()))
    monkeypatch.setattr(scoring, "LOGITS", 3 * VOCABULARY)
    pieces = perplexity(model, TOKENS, 16, stride)
    assert pieces.tokens == whole.tokens and pieces.windows == whole.windows
    assert pieces.nll == pytest.approx(whole.nll, rel=1e-6)
    assert max(sizes) <= 3 * VOCABULARY


def test_two_models_in_pieces_are_compared_as_in_one(model, teacher, monkeypatch):
    whole = compare(teacher, model, TOKENS, 16)
    monkeypatch.setattr(scoring, "LOGITS", 5 * VOCABULARY)
    pieces = compare(teacher, model, TOKENS, 16)
    assert (pieces.kl, pieces.same_top) == (pytest.approx(whole.kl, rel=1e-6), whole.same_top)


def _small(kind):
    if kind == "gpt2":
        return random_model(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    common = sizes | {"vocab_size": VOCABULARY, "num_key_value_heads": 1, "max_position_embeddings": POSITIONS}
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**common))
    return MistralForCausalLM(MistralConfig(**common, sliding_window=4))  # shorter than a window
