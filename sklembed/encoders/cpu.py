"""Instructions of this machine's processor, on which precision and runtime depend."""

import platform
import time
from functools import cache
from hashlib import blake2b
from pathlib import Path

import numpy as np
from filelock import FileLock

from sklembed.encoders.database import default_path
from sklembed.encoders.networks import read_json, write_json

# Instructions for integers, from the newest on; results differ between them.
_INTEGER_INSTRUCTIONS = ("amx_int8", "avx512_vnni", "avx_vnni", "avx512f", "avx2")
# Without one of them, OpenVINO would compute in float32.
_BFLOAT16_INSTRUCTIONS = ("amx_bf16", "avx512_bf16")
_BFLOAT16_PAYS = 1.2  # times faster than float32, from which on "auto" chooses it


@cache
def cpu_flags() -> frozenset[str]:
    """Return the features of the processor, by their names in Linux.

    Empty where the system does not list them.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def has_bfloat16() -> bool:
    """Return whether the processor has instructions for bfloat16."""
    return not cpu_flags().isdisjoint(_BFLOAT16_INSTRUCTIONS)


def integer_instructions() -> str:
    """Return the newest instructions for integers, which int8 vectors depend on."""
    for name in _INTEGER_INSTRUCTIONS:
        if name in cpu_flags():
            return name
    return platform.machine()


def bfloat16_pays() -> bool:
    """Return whether this processor multiplies matrices faster in bfloat16.

    Without instructions for bfloat16 it never does, with AMX always. With AVX512-BF16
    alone it depends on the processor, so a multiplication is timed once per machine and
    remembered beside the default store.
    """
    if "amx_bf16" in cpu_flags():
        return True
    if "avx512_bf16" not in cpu_flags():
        return False
    try:
        path = default_path().with_name("processors.json")
        facts = read_json(path) or {}
        if processor_hash() in facts:
            return bool(facts[processor_hash()])
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            facts = read_json(path) or {}
            if processor_hash() not in facts:
                facts[processor_hash()] = _time_bfloat16() > _BFLOAT16_PAYS
                write_json(path, facts)
            return bool(facts[processor_hash()])
    except OSError:  # a timing that cannot be remembered could change the next time
        return True


def _time_bfloat16() -> float:
    """Return how many times faster than in float32 a multiplication is in bfloat16."""
    import torch

    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        left = torch.ones(512, 384, dtype=dtype)
        right = torch.ones(384, 1536, dtype=dtype)
        ticks = []
        for _ in range(9):
            tick = time.perf_counter()
            left @ right
            ticks.append(time.perf_counter() - tick)
        seconds[dtype] = np.median(ticks)
    return float(seconds[torch.float32] / seconds[torch.bfloat16])


@cache
def processor_hash() -> str:
    """Return a hash of the kind of processor and its features."""
    text = f"{platform.machine()} {platform.processor()} {sorted(cpu_flags())}"
    return blake2b(text.encode(), digest_size=8).hexdigest()
