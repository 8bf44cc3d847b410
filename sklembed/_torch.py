"""Resolve devices and dtypes, and convert between arrays and tensors."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch


def resolve_device(device: str) -> torch.device:
    """Return the fastest available device for "auto"; validate any other name.

    Raises
    ------
    ValueError
        If the device is unknown to torch or not available on this machine.
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
    """Return bfloat16 for "auto" if it is faster on this hardware, else float32."""
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
    # bfloat16 is faster on CPUs with AMX; with AVX512-BF16 alone it is slower than float32.
    # Older releases of torch do not report the features of the CPU, so float32 is used.
    features: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and bool(features.get("amx_bf16", False))


def to_tensor(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copy an array to the device; it may be read-only, strided or reversed.

    On the CPU the tensor may share memory with the array, so do not write to it.
    """
    array = np.ascontiguousarray(array)
    if not array.flags.writeable:  # torch.from_numpy warns about it
        return torch.tensor(array, device=device)
    return torch.from_numpy(array).to(device)


def to_tensors(
    pairs: Iterable[tuple[np.ndarray, np.ndarray]], device: torch.device
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Copy pairs of arrays, such as mean and scale, to the device."""
    return [(to_tensor(a, device), to_tensor(b, device)) for a, b in pairs]


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Copy a tensor to an array; bfloat16, which numpy lacks, becomes float32."""
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    return tensor.numpy()


def rebuilt(
    network: torch.nn.Module, weights: Mapping[str, np.ndarray]
) -> torch.nn.Module:
    """Load copies of the weights into a network on the meta device, in evaluation mode."""
    state = {name: torch.from_numpy(value.copy()) for name, value in weights.items()}
    network.load_state_dict(state, assign=True)
    return network.eval()
