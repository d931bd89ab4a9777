import math

import pytest
import torch
import torch.nn.functional as F

from kncompress.distill import cross_entropy, logits_kl, logits_kl_and_cross_entropy, mse


def normal(*shape, seed=0, **kwargs):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, **{"dtype": torch.float64, **kwargs})


def softmax(row):
    exps = [math.exp(x) for x in row]
    return [e / sum(exps) for e in exps]


def slow_kl(student, teacher, temperature, mask):
    """KL by the definition, a number at a time."""
    total, tokens = 0.0, 0
    for b in range(student.shape[0]):
        for t in range(student.shape[1]):
            if not mask[b, t]:
                continue
            q = softmax((student[b, t] / temperature).tolist())
            p = softmax((teacher[b, t] / temperature).tolist())
            total += sum(pi * math.log(pi / qi) for pi, qi in zip(p, q, strict=True))
            tokens += 1
    return temperature**2 * total / tokens


MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 1, 0, 1, 0]])


# --- mse


def test_mse_by_hand():
    student = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    teacher = torch.tensor([[[1.0, 0.0], [3.0, 7.0]]])
    assert mse(student, teacher).item() == pytest.approx((0 + 4 + 0 + 9) / 4)
    assert mse(student, teacher, torch.tensor([[False, True]])).item() == pytest.approx(9 / 2)


def test_mse_accumulates_in_float32():
    student = torch.ones(1, 4096, 8, dtype=torch.bfloat16)
    teacher = torch.full_like(student, 1.0078125)  # the next bfloat16
    loss = mse(student, teacher)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(0.0078125**2, rel=1e-6)


# --- logits


@pytest.mark.parametrize("temperature", [1.0, 2.5, 0.5])
@pytest.mark.parametrize("mask", [None, MASK])
def test_logits_kl_is_the_definition(temperature, mask):
    student, teacher = normal(3, 5, 7, seed=1), normal(3, 5, 7, seed=2)
    expected = slow_kl(student, teacher, temperature, torch.ones_like(MASK) if mask is None else mask)
    assert logits_kl(student, teacher, temperature, mask).item() == pytest.approx(expected, rel=1e-10)


def test_logits_kl_by_hand():
    """Teacher (3/4, 1/4), student (1/2, 1/2)."""
    student = torch.zeros(1, 1, 2)
    teacher = torch.tensor([[[math.log(3), 0.0]]])
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert logits_kl(student, teacher).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("chunk", [1, 4, 15, 1000])
def test_chunked_equals_unchunked(chunk, mask):
    teacher = normal(3, 5, 7, seed=2)
    values, gradients = [], []
    for size in (None, chunk):
        student = normal(3, 5, 7, seed=1).requires_grad_()
        value = logits_kl(student, teacher, 2.0, mask, chunk=size)
        (3 * value).backward()
        values.append(value.item())
        gradients.append(student.grad)
    assert values[0] == pytest.approx(values[1], rel=1e-12)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=0)


@pytest.mark.parametrize("mask", [None, MASK])
def test_logits_kl_gradient(mask):
    student, teacher = normal(3, 5, 4, seed=1).requires_grad_(), normal(3, 5, 4, seed=2)
    assert torch.autograd.gradcheck(lambda s: logits_kl(s, teacher, 1.7, mask, chunk=4), (student,))


def test_temporaries_follow_the_chunk():
    """Nothing of (tokens x vocabulary) is allocated beyond the gradient, in the student's type."""
    student = normal(1, 512, 256, dtype=torch.bfloat16).requires_grad_()
    teacher = normal(1, 512, 256, seed=1, dtype=torch.bfloat16)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        logits_kl(student, teacher, 2.0, chunk=32)
    sizes = sorted((event.cpu_memory_usage for event in profile.events()), reverse=True)
    assert sizes[0] == 512 * 256 * 2
    chunks = [size for size in sizes if size == 32 * 256 * 4]
    assert len(chunks) >= 16, "the chunks were not seen: the profile does not show what this test reads in it"
    assert all(size <= 32 * 256 * 4 for size in sizes if size != 512 * 256 * 2)


def test_bf16_inputs_give_the_float32_result_of_the_same_numbers():
    student, teacher = normal(2, 5, 7, dtype=torch.bfloat16), normal(2, 5, 7, seed=1, dtype=torch.bfloat16)
    student.requires_grad_()
    value = logits_kl(student, teacher, 2.0)
    value.backward()
    assert value.dtype == torch.float32 and student.grad.dtype == torch.bfloat16
    assert value.item() == pytest.approx(slow_kl(student.double(), teacher.double(), 2.0, torch.ones(2, 5)), rel=1e-5)


@pytest.mark.parametrize("arguments, message", [({"temperature": 0}, "temperature=0"), ({"chunk": 0}, "chunk=0")])
def test_logits_kl_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        logits_kl(normal(1, 2, 3), normal(1, 2, 3), **arguments)


# --- both


@pytest.mark.parametrize("loss", [mse, logits_kl])
def test_equal_inputs_give_zero(loss):
    x = normal(3, 5, 7, dtype=torch.float32).requires_grad_()
    value = loss(x, x.detach().clone())
    value.backward()
    assert value.item() == 0 and not x.grad.any()


@pytest.mark.parametrize("loss", [mse, logits_kl])
def test_gradients_reach_the_student_alone(loss):
    student, teacher = normal(3, 5, 7).requires_grad_(), normal(3, 5, 7, seed=1).requires_grad_()
    loss(student, teacher).backward()
    assert student.grad.abs().max() > 0 and teacher.grad is None


@pytest.mark.parametrize("loss", [mse, logits_kl])
def test_a_teacher_run_in_inference_mode(loss):
    student = normal(3, 5, 7).requires_grad_()
    with torch.inference_mode():
        teacher = normal(3, 5, 7, seed=1)
    loss(student, teacher).backward()
    assert student.grad.abs().max() > 0


@pytest.mark.parametrize("loss", [mse, logits_kl])
def test_masked_tokens_have_no_say(loss):
    student, teacher = normal(3, 5, 7), normal(3, 5, 7, seed=1)
    before = loss(student, teacher, mask=MASK)
    student[MASK == 0] = torch.nan
    student.requires_grad_()
    after = loss(student, teacher, mask=MASK)
    after.backward()
    assert before.item() == after.item()
    assert not student.grad[MASK == 0].any() and student.grad[MASK == 1].all()


@pytest.mark.parametrize("loss", [mse, logits_kl])
def test_shapes_that_differ(loss):
    with pytest.raises(ValueError, match=r"student \(1, 2, 3\) and teacher \(1, 2, 4\) differ"):
        loss(normal(1, 2, 3), normal(1, 2, 4))
    with pytest.raises(ValueError, match=r"mask \(1, 3\) does not fit"):
        loss(normal(1, 2, 3), normal(1, 2, 3), mask=torch.ones(1, 3))


# --- cross-entropy


def test_cross_entropy_shifts_and_ignores():
    logits = normal(2, 4, 3)
    labels = torch.tensor([[2, 0, -100, 1], [1, 1, 2, -100]])
    expected = 0.0
    for b, t, label in [(0, 0, 0), (0, 2, 1), (1, 0, 1), (1, 1, 2)]:
        expected -= math.log(softmax(logits[b, t].tolist())[label])
    assert cross_entropy(logits, labels).item() == pytest.approx(expected / 4, rel=1e-10)


def test_cross_entropy_gradient_skips_what_predicts_nothing():
    logits = normal(2, 4, 3).requires_grad_()
    labels = torch.tensor([[2, 0, -100, 1], [1, 1, 2, -100]])
    cross_entropy(logits, labels).backward()
    scored = torch.tensor([[1, 0, 1, 0], [1, 1, 0, 0]]).bool()
    assert logits.grad[scored].all() and not logits.grad[~scored].any()


def test_cross_entropy_of_bf16_logits_is_float32():
    logits = normal(2, 4, 300, dtype=torch.bfloat16)
    labels = torch.randint(0, 300, (2, 4), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        value = cross_entropy(logits, labels)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(cross_entropy(logits.double(), labels).item(), rel=1e-6)


def test_cross_entropy_refuses_labels_of_another_shape():
    with pytest.raises(ValueError, match="do not fit logits"):
        cross_entropy(normal(2, 4, 3), torch.zeros(2, 3, dtype=torch.long))


@pytest.mark.parametrize("chunk", ["auto", 1, 4, None])
@pytest.mark.parametrize("temperature", [1.0, 2.5, 0.5])
def test_both_terms_in_one_walk(chunk, temperature):
    """Value, terms and gradient are those of torch's own functions on all logits at once."""
    student, teacher = normal(3, 5, 11).requires_grad_(), normal(3, 5, 11)
    labels = torch.arange(15).view(3, 5) % 11
    labels[1, 3:] = -100
    total, kl, text = logits_kl_and_cross_entropy(student, teacher, labels, (0.7, 1.3), temperature, chunk)
    (found,) = torch.autograd.grad(3 * total, student)
    log_p, log_q = ((x / temperature).log_softmax(-1) for x in (teacher, student))
    plain_kl = F.kl_div(log_q, log_p, log_target=True, reduction="sum") / 15 * temperature**2
    plain_text = F.cross_entropy(student[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close((kl, text, total), (plain_kl, plain_text, 0.7 * plain_kl + 1.3 * plain_text))
    (wanted,) = torch.autograd.grad(3 * (0.7 * plain_kl + 1.3 * plain_text), student)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("chunk", [1, 4, None])
def test_the_gradient_in_the_place_of_the_teachers_logits(chunk):
    """The same numbers; the teacher's tensor is lost, unless it comes from inference mode or is of another type."""
    student, labels = normal(3, 5, 11, seed=1).requires_grad_(), torch.arange(15).view(3, 5) % 11

    def gradient(teacher, overwrite):
        total, *_ = logits_kl_and_cross_entropy(student, teacher, labels, (0.7, 1.3), 1.0, chunk, overwrite)
        return torch.autograd.grad(2 * total, student)[0]

    wanted = gradient(normal(3, 5, 11), False)
    lost = normal(3, 5, 11)
    torch.testing.assert_close(gradient(lost, True), wanted)
    assert not torch.equal(lost, normal(3, 5, 11))
    with torch.inference_mode():
        kept = normal(3, 5, 11)
    torch.testing.assert_close(gradient(kept, True), wanted)
    assert torch.equal(kept, normal(3, 5, 11))
    single = normal(3, 5, 11).float()
    gradient(single, True)
    assert torch.equal(single, normal(3, 5, 11).float())


@pytest.mark.parametrize("chunk", ["auto", 2, None])
def test_cross_entropy_in_chunks_is_torchs(chunk):
    logits = normal(2, 6, 9).requires_grad_()
    labels = torch.arange(12).view(2, 6) % 9
    labels[0, :3] = -100
    plain = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    found = cross_entropy(logits, labels, chunk)
    torch.testing.assert_close(found, plain)
    torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in (found, plain)))
