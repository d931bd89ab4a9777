"""Processor, GPUs, bfloat16 and compilers: what computes here, and how well."""

import os
import shutil
from pathlib import Path

from kncompress.diagnosis.findings import Finding
from kncompress.diagnosis.installation import attempt

AREA = "devices"
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16", "i8mm")
_GIB = 1 << 30


def check_devices(compile: bool) -> list[Finding]:
    """CPU, GPUs, bf16 and torch.compile; an import of torch that fails is told by the installation's findings."""
    try:
        import torch  # noqa: F401
    except Exception:
        return []
    return [_processor(), *_gpus(), _bf16(), _compiler(compile)]


def _cpuinfo() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    return {key.strip().lower(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _processor() -> Finding:
    import torch

    facts = _cpuinfo()
    flags = facts.get("flags", facts.get("features", "")).split()
    known = [name for name in _FLAGS if name in flags] or [torch.backends.cpu.get_cpu_capability()]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    name = facts.get("model name", "processor")
    text = f"{name}, {cores} cores, {torch.get_num_threads()} threads in use; {' '.join(known)}"
    if torch.get_num_threads() > cores:
        return Finding(AREA, "CPU", "note", text, f"more threads than cores: set OMP_NUM_THREADS={cores}")
    return Finding(AREA, "CPU", "ok", text)


def _gpus() -> list[Finding]:
    import torch

    if torch.cuda.is_available():
        found = []
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            text = f"{facts.name}, {facts.total_memory / _GIB:.0f} GiB, compute capability {facts.major}.{facts.minor}"
            found.append(Finding(AREA, f"GPU {index}", "ok", text))
        return found
    if not (Path("/proc/driver/nvidia").exists() or shutil.which("nvidia-smi")):
        return [Finding(AREA, "GPU", "ok", "none; everything runs on the CPU")]
    build = torch.version.cuda
    if build is None:
        text, todo = "a driver is here, but this torch is built without CUDA", "install a CUDA build: pytorch.org"
    else:
        text = f"torch is built for CUDA {build}, but finds no device"
        todo = (
            "nvidia-smi tells driver and devices; the driver may be older than CUDA asks, or CUDA_VISIBLE_DEVICES empty"
        )
    return [Finding(AREA, "GPU", "note", text, todo)]


def _bf16() -> Finding:
    import torch

    if torch.cuda.is_available():
        native, unit = torch.cuda.is_bf16_supported(including_emulation=False), "the GPU"
    else:
        native, unit = "amx_bf16" in _cpuinfo().get("flags", "").split(), "the CPU (AMX)"
    if native:
        return Finding(AREA, "bf16", "ok", f"{unit} multiplies it natively: precision=auto takes it")
    return Finding(AREA, "bf16", "ok", "no unit for it here: precision=auto stays at fp32")


def _compiler(compile: bool) -> Finding:
    if compile:
        return attempt("torch.compile", _compile, "nothing in this package needs it; see the error", AREA)
    command = os.environ.get("CXX") or next((name for name in ("g++", "clang++") if shutil.which(name)), None)
    if command:
        return Finding(AREA, "torch.compile", "ok", f"a C++ compiler is here ({command}); compile=true tries it")
    return Finding(AREA, "torch.compile", "note", "no C++ compiler", "for torch.compile on the CPU: install g++")


def _compile() -> str:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(64, device=device)
    compiled = torch.compile(lambda y: torch.sin(y) * 2 + y, dynamic=False)
    torch.testing.assert_close(compiled(x), torch.sin(x) * 2 + x)
    return f"compiled a function for {device}"
