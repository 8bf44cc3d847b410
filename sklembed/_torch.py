"""Where device and dtype are resolved, and arrays become tensors and tensors arrays."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def resolve_device(device: str) -> torch.device:
    """Turn "auto" into the fastest device at hand, and check any other name.

    Raises
    ------
    ValueError
        If torch does not know the device, or it is not present on this machine.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        if torch.backends.mps.is_available():
            return torch.device("mps")
        return torch.device("cpu")
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device={device!r} cannot be used here: {error}. Use 'auto', 'cpu', or a device that "
            "torch sees on this machine."
        ) from error
    return resolved


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Turn "auto" into bfloat16 where the hardware gains by it, else float32."""
    if dtype == "auto":
        return torch.bfloat16 if _computes_in_bfloat16(device) else torch.float32
    return {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }[dtype]


def _computes_in_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # Of CPUs only those with AMX gain: with AVX512-BF16 alone, bfloat16 is slower than float32.
    # Older releases of torch cannot say; there float32 is the safe answer.
    features: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and bool(features.get("amx_bf16", False))


def to_tensor(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Bring an array to the device, also a read-only, strided or reversed one.

    On the CPU the tensor may share the array's memory: it is for reading.
    """
    array = np.ascontiguousarray(array)
    if not array.flags.writeable:  # torch.from_numpy warns of it
        return torch.tensor(array, device=device)
    return torch.from_numpy(array).to(device)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Bring a tensor home as a plain array; bfloat16, which numpy lacks, as float32."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def rebuilt(
    network: torch.nn.Module, weights: Mapping[str, np.ndarray]
) -> torch.nn.Module:
    """Give a network that was made on the meta device copies of its weights, and put it to use."""
    state = {name: torch.from_numpy(value.copy()) for name, value in weights.items()}
    network.load_state_dict(state, assign=True)
    return network.eval()
