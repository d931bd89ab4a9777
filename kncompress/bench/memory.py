"""Part ``memory``: peak of a fresh process for a forward pass, and for the losses on the logits with their gradient."""

import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kncompress.anatomy.plan import Plan
from kncompress.bench.child import exchange, peak_memory, reset_peak, run_child
from kncompress.bench.measurement import OURS, Measurement
from kncompress.bench.setting import Setting, random_model
from kncompress.compression.compress import compress_
from kncompress.compression.inspection import predict
from kncompress.distill import logits_kl_and_cross_entropy
from kncompress.kron import parse_shape


def measure_memory(setting: Setting, plan: Plan) -> Iterator[Measurement]:
    """Bytes above those of the process before: ``memory/forward`` against the dense model, ``memory/losses`` against
    torch's own functions on all logits at once.
    """
    fields, sizes = setting.fields, setting.sizes
    maps = {name: str(shape) for name, shape in plan.resolve(fields).items()}
    job = {
        "architecture": fields.to_dict(),
        "dtype": str(setting.dtype).removeprefix("torch."),
        "device": setting.device.type,
        "sequence": sizes.sequence,
        "batch": max(1, sizes.tokens // sizes.sequence),
        "seed": setting.config.seed,
    }
    table = predict(fields, plan)
    tokens, bytes_each = job["batch"] * sizes.sequence, setting.number_bytes
    setting.say("memory: forward")
    pair = {OURS: _run(job | {"what": "forward", "maps": maps}), "dense": _run(job | {"what": "forward", "maps": {}})}
    # The logits of all tokens are the model's output.
    bound = float(bytes_each * (table.parameters_after + tokens * fields.vocab_size))
    yield _measurement("memory/forward", f"{tokens:,} tokens", pair, "dense", bound)
    setting.say("memory: losses")
    pair = {OURS: _run(job | {"what": "losses"}), "plain": _run(job | {"what": "plain losses"})}
    bound = float(bytes_each * tokens * fields.vocab_size)
    yield _measurement("memory/losses", f"{tokens:,} x {fields.vocab_size:,} logits", pair, "plain", bound)


def _measurement(name: str, what: str, values: dict[str, float], rival: str, bound: float) -> Measurement:
    return Measurement(name, what, values, {rival: values[rival] / values[OURS]}, rival, None, bound, "bytes")


def _run(job: dict[str, Any]) -> float:
    return float(run_child(["-m", "kncompress.bench.memory"], job)["bytes"])


def _forward(job: dict[str, Any], device: torch.device, dtype: torch.dtype) -> int:
    """Peak of a forward pass, the weights included."""
    from transformers import AutoConfig

    values = dict(job["architecture"])
    fields = AutoConfig.for_model(values.pop("model_type"), **values)
    before = reset_peak(device)
    with torch.device("meta"):
        model = random_model(fields, job["seed"], torch.device("meta"), dtype)
    compress_(model, Plan({name: parse_shape(shape) for name, shape in job["maps"].items()}))
    _fill(model, device)
    ids = torch.zeros(job["batch"], job["sequence"], dtype=torch.int64, device=device)
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    return max(1, peak_memory(device) - before)


def _losses(job: dict[str, Any], device: torch.device, dtype: torch.dtype) -> int:
    """Peak of both losses on logits and their gradient, above the logits themselves."""
    shape = (job["batch"], job["sequence"], job["architecture"]["vocab_size"])
    student = torch.full(shape, 0.5, dtype=dtype, device=device).requires_grad_()
    teacher = torch.ones(shape, dtype=dtype, device=device)
    labels = torch.zeros(shape[:2], dtype=torch.int64, device=device)
    before = reset_peak(device)
    loss = _ours(student, teacher, labels) if job["what"] == "losses" else _plain(student, teacher, labels)
    loss.backward()
    return max(1, peak_memory(device) - before)


def _ours(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return logits_kl_and_cross_entropy(student, teacher, labels, (1.0, 1.0))[0]


def _plain(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """As one would write it."""
    log_q, log_p = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    kl = F.kl_div(log_q, log_p, log_target=True, reduction="sum") / labels.numel()
    return kl + F.cross_entropy(student[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())


def _fill(model: Any, device: torch.device) -> None:
    """Fill the weights of a model on the meta device with ones, shared weights once: memory that is never written to
    would not count."""
    made: dict[int, torch.nn.Parameter] = {}
    kept = list(model.parameters())  # an id is unique only among tensors that live
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None:
                if id(old) not in made:
                    made[id(old)] = torch.nn.Parameter(torch.ones_like(old, device=device))
                module._parameters[name] = made[id(old)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.ones_like(buffer, device=device)
    del kept


def main(job: dict[str, Any]) -> dict[str, int]:
    """In the child."""
    device, dtype = torch.device(job["device"]), getattr(torch, job["dtype"])
    return {"bytes": (_forward if job["what"] == "forward" else _losses)(job, device, dtype)}


if __name__ == "__main__":
    given, made = exchange(sys.argv[1:])
    made.write_text(json.dumps(main(given)))
