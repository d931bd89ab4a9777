"""Teacher and student on one text, against one forward pass a token and against the definitions."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from evaluation.test_perplexity import TOKENS, log_probabilities, random_model

from kncompress.errors import UserError
from kncompress.evaluation import Comparison, compare, perplexity
from kncompress.reading import parse_json


@pytest.fixture(scope="module")
def student():
    return random_model(0)


@pytest.fixture(scope="module")
def teacher():
    return random_model(1)


@pytest.fixture(scope="module")
def by_token(teacher, student):
    """(tokens, 3): KL, same likeliest token, difference of the negative log-likelihoods."""
    rows = []
    for position in range(len(TOKENS)):
        if position % 16:
            context = TOKENS[position - position % 16 : position]
            p, q = log_probabilities(teacher, context), log_probabilities(student, context)
            token = TOKENS[position]
            rows.append(((p.exp() * (p - q)).sum().item(), float(p.argmax() == q.argmax()), (p - q)[token].item()))
    return np.array(rows)


def test_every_figure_against_one_forward_pass_a_token(teacher, student, by_token):
    found = compare(teacher, student, TOKENS, 16, batch_tokens=64)
    kl, same, difference = by_token.T
    assert found.tokens == len(kl) == 70
    assert found.kl == pytest.approx(kl.mean(), rel=1e-5)
    for value, share in ((found.kl_median, 0.5), (found.kl_99, 0.99), (found.kl_999, 0.999)):
        assert value == pytest.approx(np.quantile(kl, share, method="inverted_cdf"), rel=1e-4)
    assert 0 < same.mean() < 1, "or the test below could not tell a share from all or nothing"
    assert found.same_top == pytest.approx(100 * same.mean())
    assert found.log_ratio == pytest.approx(difference.mean(), rel=1e-4)
    assert found.log_ratio_error == pytest.approx(difference.std(ddof=1) / math.sqrt(70), rel=1e-4)
    assert found.teacher == perplexity(teacher, TOKENS, 16, batch_tokens=64)
    assert found.student == perplexity(student, TOKENS, 16, batch_tokens=64)


def test_it_has_a_direction_and_options(teacher, student):
    there, back = compare(teacher, student, TOKENS, 16), compare(student, teacher, TOKENS, 16)
    assert there.kl != pytest.approx(back.kl, rel=1e-2)
    assert there.teacher == back.student and there.log_ratio == -back.log_ratio
    assert compare(teacher, student, TOKENS, 16, limit=40) == compare(teacher, student, TOKENS[:40], 16)
    small = compare(teacher, student, TOKENS, 16, batch_tokens=1)
    assert small.kl == pytest.approx(there.kl, rel=1e-6)
    ignored = compare(teacher, student, TOKENS, 16, ignore=int(TOKENS[20]))
    assert ignored.tokens == ignored.teacher.tokens < 70 and ignored.kl != there.kl


def test_a_model_does_not_diverge_from_itself(student):
    same = compare(student, student, TOKENS, 16)
    assert (same.kl, same.kl_999, same.log_ratio, same.log_ratio_error, same.same_top) == (0, 0, 0, 0, 100)


def test_a_model_that_gives_no_numbers_is_not_hidden(teacher):
    broken = random_model(0)
    with torch.no_grad():
        broken.transformer.ln_f.weight.fill_(math.nan)
    found = compare(teacher, broken, TOKENS, 16)
    assert math.isnan(found.kl) and math.isnan(found.log_ratio) and found.tokens == 70


def test_it_survives_json(teacher, student):
    found = compare(teacher, student, TOKENS, 16)
    assert parse_json(json.dumps(asdict(found)).encode(), Comparison, "start.json") == found


def test_vocabularies_that_differ(student):
    with pytest.raises(UserError, match="vocabulary: 64 and 65 tokens"):
        compare(student, random_model(0, vocabulary=65), TOKENS, 16)


def _compare_share(rank, world, file):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    shared = compare(random_model(1), random_model(0), TOKENS, 16, rank=rank, world=world)
    alone = compare(random_model(1), random_model(0), TOKENS, 16)
    torch.distributed.destroy_process_group()
    assert (shared.tokens, shared.kl_99, shared.same_top) == (alone.tokens, alone.kl_99, alone.same_top)
    assert abs(shared.kl - alone.kl) < 1e-6 and abs(shared.log_ratio_error - alone.log_ratio_error) < 1e-6


@pytest.mark.slow
def test_two_processes_compare_on_one_text(tmp_path):
    torch.multiprocessing.spawn(_compare_share, (2, tmp_path / "store"), nprocs=2)
