"""Run the network of a model by OpenVINO or ONNX Runtime on a CPU, instead of torch.

A network is exported once for each runtime, and checked once for each processor: its
vectors must agree with torch on cells of the call. Torch runs whatever cannot be
exported or does not agree.
"""

import contextlib
import logging
import os
import platform
import sys
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path

import joblib
import numpy as np

from sklembed.encoders import cpu
from sklembed.encoders.inference import Encoding, in_torch, is_out_of_memory
from sklembed.encoders.networks import NetworkEntry

# Fastest first (see bench_encode.py), with the packages that each one needs.
_PACKAGES = {
    "openvino": ("openvino",),
    "onnx": ("onnxruntime", "onnx", "onnxscript"),
}
RUNTIMES = tuple(_PACKAGES)
# Relative error of a vector that a precision may cause.
TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 3e-2, "int8": 0.3}
_N_CHECKED_CELLS = 48
_N_CELLS_OF_A_VERDICT = 32  # before, each call compares its cells
_CHECKED_AT_ONCE = 6  # cells of different lengths, in one batch
_LOADED_LIMIT = 4

_LOGGER = logging.getLogger("sklembed")
_LOGGED: set[str] = set()
_LOADED: OrderedDict[tuple, Callable] = OrderedDict()  # functions that run a network
# Number of cells that this process has compared, by entry and condition.
_N_COMPARED: dict[tuple, int] = {}
_KEPT_AFTER_FORK: list = []
_LOCK = threading.RLock()


class UnavailableError(ValueError):
    """Raised if a runtime cannot compute in a precision, or not on this machine."""


class RefusedError(Exception):
    """Raised if no runtime can run a network. The message says why."""


@dataclass
class Plan:
    """How to run the network of one call.

    Parameters
    ----------
    runtimes : tuple of str
        Runtimes to try before torch, in this order.

    precision : {"float32", "bfloat16", "float16", "int8"}
        Precision of the vectors. Torch replaces a runtime in float32 only, since the
        other precisions have a key for each runtime.

    directory : Path or None
        Directory of the exported networks. None: there is none.

    may_export : bool
        Whether the call is long enough to export a network, or the user demands it.

    is_demanded : bool
        Whether the user has named the runtime.

    cells : callable
        Takes a number, and yields at most so many decoded cells of the call.

    exporting : callable
        Takes the name of a runtime, and returns a context in which the network is
        exported and checked.
    """

    runtimes: tuple[str, ...] = ()
    precision: str = "float32"
    directory: Path | None = None
    may_export: bool = False
    is_demanded: bool = False
    cells: Callable[[int], Iterable] = lambda n_cells: []
    exporting: Callable[[str], AbstractContextManager] = contextlib.nullcontext
    # The runtime of the last encoding, set by `apply`; None without a network.
    used: str | None = None

    def apply(self, encoding: Encoding) -> Encoding:
        """Return the encoding with a `forward` that runs the network.

        Raises
        ------
        RefusedError
            If no runtime can run the network in a precision other than float32.
        """
        self.used = None
        network = encoding.network
        if network is None and self.is_demanded:
            raise ValueError(
                f"runtime={self.runtimes[0]!r} would have no effect: the model is a "
                "function. Let `load` of a CallableBackend return a torch module, or "
                "leave runtime='auto'."
            )
        if network is None:
            return encoding
        self.used = "torch"
        reasons = []
        for runtime in self.runtimes:
            try:
                run = self._run_by(runtime, encoding)
            except RefusedError as error:
                reasons.append(f"{runtime}: {error}")
                continue
            if run is None:
                message = f"torch runs {network.label}: no network for {runtime} yet"
                log_once(f"{message}, and too few cells to export one", logging.INFO)
            else:
                self.used = runtime
                budget = network.runtime_budget or encoding.budget
                forward = network.forward(_on_tensors(run))
                if self.precision == "float32":
                    forward = _or_by_torch(forward, encoding, runtime)
                return replace(encoding, forward=forward, budget=budget)
        if self.runtimes and self.precision != "float32":
            raise RefusedError("; ".join(reasons) or "the store is read-only")
        if reasons:
            log_once(f"torch runs {network.label} ({'; '.join(reasons)})")
        return in_torch(encoding)

    def _run_by(self, runtime, encoding):
        """Return the function of a runtime, or None if exporting does not pay."""
        network = encoding.network
        if self.directory is None:
            raise RefusedError("there is no directory for its files")
        entry = _entry(
            network.key, network.label, runtime, self.precision, self.directory
        )
        condition = _condition(self.precision, network.use)
        verdict = entry.verdict(condition)
        if verdict is not None and not verdict["accepted"]:
            raise RefusedError(verdict["reason"])
        n_compared = _N_COMPARED.get((entry.folder, condition))
        if verdict is not None or (n_compared or 0) >= _N_CELLS_OF_A_VERDICT:
            with contextlib.suppress(Exception):  # damaged files are exported again
                return _loaded(entry, runtime, self.precision)
        if n_compared is None and not self.may_export:
            if self.is_demanded:
                raise RefusedError("the store is read-only")
            return None
        network.module()  # raises the errors of the checkpoint
        try:
            with entry.attempt(), _quiet(), self.exporting(runtime):
                return self._export_and_check(runtime, encoding, entry, condition)
        except RefusedError:
            raise
        except OSError as error:  # of the disk, or of another process
            raise RefusedError(f"its files cannot be used: {error}") from error
        except Exception as error:  # exporters and runtimes raise errors of any type
            reason = _reason(error)
            if not (isinstance(error, ImportError) or is_out_of_memory(error)):
                with contextlib.suppress(OSError):
                    entry.record(condition, {"accepted": False, "reason": reason})
            raise RefusedError(reason) from error

    def _export_and_check(self, runtime, encoding, entry, condition):
        """Export a network unless another process has; compare it with torch."""
        network, cells = encoding.network, []
        for cell in self.cells(_N_CHECKED_CELLS):
            with contextlib.suppress(ValueError, OSError):  # raised again later
                cells += encoding.prepare([cell])
        trial = network.trial()
        if not entry.is_intact():
            # Trial cells differ in length, so that tracing cannot drop the mask.
            examples = trial[:2] or cells[:1] * 2
            if not examples:
                return None
            inputs = network.inputs(examples)
            entry.write(partial(_EXPORTERS[runtime], network, inputs, self.precision))
        run = _loaded(entry, runtime, self.precision)
        if entry.verdict(condition) is not None:
            return run
        n_before = _N_COMPARED.get((entry.folder, condition))
        if n_before is not None:
            trial = []  # compared in an earlier call
        expected, actual = in_torch(encoding).forward, network.forward(_on_tensors(run))
        error, n_compared = _compare(expected, actual, cells, network.widths)
        error_of_trial, _ = _compare(expected, actual, trial, network.widths)
        error = max(error, error_of_trial)
        tolerance = TOLERANCES[self.precision]
        if error > tolerance:
            raise ArithmeticError(
                f"its vectors differ from torch by {error:.1e} of their length, and "
                f"{tolerance:.0e} is allowed in {self.precision}"
            )
        n_compared += n_before or 0
        _N_COMPARED[entry.folder, condition] = n_compared
        if n_compared >= _N_CELLS_OF_A_VERDICT:
            entry.record(condition, {"accepted": True, "error": error})
        return run

    def choice(self, key: str, use: str) -> str:
        """Return the runtime in which the next cell would be encoded."""
        for runtime in self.runtimes:
            accepts = self._accepts(runtime, key, use)
            if accepts or (accepts is None and self.may_export):
                return runtime
        return "torch"

    def refuses(self, key: str, use: str) -> bool:
        """Return whether all runtimes are known to refuse a network."""
        accepts = [self._accepts(runtime, key, use) for runtime in self.runtimes]
        return all(accepted is False for accepted in accepts)

    def _accepts(self, runtime, key, use) -> bool | None:
        """Return the verdict on a network, or None if there is none yet."""
        if self.directory is None:
            return None
        entry = _entry(key, "", runtime, self.precision, self.directory)
        condition = _condition(self.precision, use)
        verdict = entry.verdict(condition)
        if verdict is None:
            return True if (entry.folder, condition) in _N_COMPARED else None
        return bool(verdict["accepted"])


def _or_by_torch(forward, encoding, runtime) -> Callable[[list], list]:
    """Return a `forward` that falls back to torch, such as for images of other shapes."""

    def forward_or_by_torch(prepared):
        try:
            return forward(prepared)
        except Exception as error:  # of any type
            if is_out_of_memory(error):
                raise
            label = encoding.network.label
            log_once(f"torch runs a batch of {label} ({runtime}: {_reason(error)})")
            return in_torch(encoding).forward(prepared)

    return forward_or_by_torch


def _reason(error) -> str:
    """Return type and message of an error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def candidates(runtime: str, precision: str, *, on_cpu: bool) -> tuple[str, ...]:
    """Return the runtimes to try before torch.

    Parameters
    ----------
    runtime : {"auto", "torch", "openvino", "onnx"}
        The parameter of an encoder.

    precision : {"float32", "bfloat16", "float16", "int8"}
        Precision of the vectors.

    on_cpu : bool
        Whether the model runs on a CPU. Torch is used elsewhere.

    Raises
    ------
    UnavailableError
        If the runtime cannot compute in this precision, or not on this device.
    ImportError
        If the runtime is not installed.
    """
    able = _able(precision)
    if runtime in RUNTIMES:
        if not on_cpu:
            raise UnavailableError(
                f"runtime={runtime!r} runs on the CPU only. Pass device='cpu', or "
                "runtime='auto', which uses torch on other devices."
            )
        if runtime not in able:
            raise UnavailableError(
                f"runtime={runtime!r} cannot compute in {precision}"
                f"{' on this machine' if precision == 'bfloat16' else ''}. "
                f"{_ADVICE[precision]}"
            )
        require(runtime)
        return (runtime,)
    chosen = tuple(name for name in able if _is_installed(name))
    if precision == "int8" and (runtime == "torch" or not on_cpu or not chosen):
        raise UnavailableError(f"dtype='int8' needs ONNX Runtime. {_ADVICE['int8']}")
    if runtime == "torch" or not on_cpu:
        return ()
    return chosen


_ADVICE = {
    "float16": "Pass dtype='float32', or runtime='torch'.",
    "bfloat16": (
        "OpenVINO does on a CPU with AVX512-BF16 or AMX. Pass dtype='auto', or "
        "runtime='torch', which is slow without them."
    ),
    "int8": "Pass runtime='onnx' and device='cpu': pip install 'sklembed[onnx]'.",
}


def _able(precision) -> tuple[str, ...]:
    """Return the runtimes that can compute in a precision on this machine."""
    if precision == "float32":
        return RUNTIMES
    if precision == "bfloat16" and cpu.has_bfloat16():
        return ("openvino",)
    return ("onnx",) if precision == "int8" else ()


def require(runtime: str) -> None:
    """Raise an ImportError if a runtime is not installed."""
    if not _is_installed(runtime):
        raise ImportError(
            f"runtime={runtime!r} needs {', '.join(_PACKAGES[runtime])}: pip install "
            f"'sklembed[{runtime}]'."
        )


@cache
def _is_installed(runtime) -> bool:
    return all(find_spec(package) is not None for package in _PACKAGES[runtime])


def _condition(precision, use) -> str:
    """Return what a verdict depends on besides the exported files."""
    return f"{use} in {precision} on {cpu.processor_hash()}"


def _entry(network_key, label, runtime, precision, directory) -> NetworkEntry:
    description = {
        "key": network_key,
        "runtime": runtime,
        "version": _version(_PACKAGES[runtime][0]),
        "libraries": [_version(name) for name in ("torch", "transformers")],
        # bfloat16 is a setting of the runtime, not of the files.
        "dtype": "int8" if precision == "int8" else "float32",
        "instructions": cpu.integer_instructions() if precision == "int8" else None,
    }
    return NetworkEntry.of(directory, description, model=label)


@cache
def _version(package) -> str:
    """Return the version of a package, which may be part of another distribution."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # such as onnxruntime of onnxruntime-gpu
        return str(getattr(import_module(package), "__version__", "unknown"))


def _loaded(entry, runtime, precision) -> Callable:
    """Load an exported network, once per process and number of threads."""
    n_threads = _n_threads()
    key = entry.folder, precision, n_threads
    with _LOCK:
        if key not in _LOADED:
            if not entry.is_intact():
                raise FileNotFoundError(f"no intact network in {entry.folder}")
            _LOADED[key] = _LOADERS[runtime](entry.network, precision, n_threads)
            if len(_LOADED) > _LOADED_LIMIT:
                _LOADED.popitem(last=False)
        _LOADED.move_to_end(key)
        return _LOADED[key]


def _export_openvino(network, inputs, precision, folder) -> None:
    import openvino
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    # openvino.convert_model does the same, and reports each use to its makers.
    decoder = TorchScriptPythonDecoder(
        network.module(), example_input=tuple(inputs.values())
    )
    frontend = FrontEndManager().load_by_framework("pytorch")
    model = frontend.convert(frontend.load(decoder))
    if len(model.inputs) != len(inputs):
        raise ValueError(f"{len(model.inputs)} of the inputs {list(inputs)} are left")
    shapes = {}
    for i, (name, tensor) in enumerate(inputs.items()):
        model.inputs[i].get_tensor().set_names({name})
        shape = list(tensor.shape)
        for axis in network.dynamic_axes:
            shape[axis] = -1
        shapes[i] = openvino.PartialShape(shape)
    for i, output in enumerate(model.outputs):
        output.get_tensor().set_names({f"output{i}"})
    model.reshape(shapes)
    openvino.save_model(model, folder / "network.xml", compress_to_fp16=False)


def _export_onnx(network, inputs, precision, folder) -> None:
    import torch

    module, tensors = network.module(), tuple(inputs.values())
    axes = dict.fromkeys(network.dynamic_axes, torch.export.Dim.DYNAMIC)
    n_outputs = len(module(*tensors))
    program = torch.onnx.export(
        module,
        tensors,
        dynamo=True,
        dynamic_shapes={"inputs": tuple(axes for _ in tensors)},
        input_names=list(inputs),
        output_names=[f"output{i}" for i in range(n_outputs)],
        verbose=False,
    )
    path = folder / "network.onnx"
    if precision != "int8":
        program.save(path)
        return
    from onnxruntime.quantization import quant_pre_process, quantize_dynamic

    program.save(folder / "float32.onnx")
    # Nothing is left to optimise. This marks the file, whose lack is logged as a warning.
    quant_pre_process(
        folder / "float32.onnx",
        folder / "float32.marked.onnx",
        skip_optimization=True,
        skip_onnx_shape=True,
        skip_symbolic_shape=True,
    )
    # Without VNNI the sums of products saturate, unless a bit is spared.
    has_vnni = cpu.integer_instructions() in ("amx_int8", "avx512_vnni", "avx_vnni")
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    quantize_dynamic(
        folder / "float32.marked.onnx",
        path,
        per_channel=True,
        reduce_range=is_x86 and not has_vnni,
    )
    for file in folder.glob("float32.*"):
        file.unlink()


def _load_openvino(folder, precision, n_threads) -> Callable:
    import openvino

    core = openvino.Core()
    settings = {
        "INFERENCE_NUM_THREADS": n_threads,
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[precision],
        "NUM_STREAMS": 1,
        # Else the threads of all processes would run on the same cores.
        "ENABLE_CPU_PINNING": False,
    }
    model = core.read_model(folder / "network.xml")
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    used = [value.any_name for value in model.inputs]
    names = [f"output{i}" for i in range(len(model.outputs))]

    def run(arrays):
        results = request.infer(
            {name: arrays[name] for name in used}, share_inputs=True
        )
        return [results[name] for name in names]

    return run


def _load_onnx(folder, precision, n_threads) -> Callable:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = n_threads
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(
        folder / "network.onnx", options, providers=["CPUExecutionProvider"]
    )
    # An input that does not change the outputs is not exported.
    used = {value.name for value in session.get_inputs()}
    names = [f"output{i}" for i in range(len(session.get_outputs()))]

    def run(arrays):
        return session.run(names, {name: arrays[name] for name in used})

    return run


_EXPORTERS = {"openvino": _export_openvino, "onnx": _export_onnx}
_LOADERS = {"openvino": _load_openvino, "onnx": _load_onnx}


def export_network(runtime, network, inputs, precision, folder) -> None:
    """Write a network to the files of a runtime.

    Parameters
    ----------
    runtime : {"openvino", "onnx"}
        The runtime.

    network : Network
        The network.

    inputs : dict of str to Tensor
        Inputs of a batch of cells that differ in length.

    precision : {"float32", "bfloat16", "int8"}
        Precision of the vectors.

    folder : Path
        Folder of the files.
    """
    with _quiet():
        _EXPORTERS[runtime](network, inputs, precision, folder)


def load_network(runtime, folder, precision) -> Callable:
    """Return the function of an exported network: a dict of arrays to a list of arrays."""
    return _LOADERS[runtime](folder, precision, _n_threads())


def _n_threads() -> int:
    """Return the number of threads of torch, or the number that it would have."""
    torch = sys.modules.get("torch")
    if torch is not None:
        return torch.get_num_threads()
    n_threads = os.environ.get("OMP_NUM_THREADS", "")
    return int(n_threads) if n_threads.isdecimal() else joblib.cpu_count()


def _on_tensors(run) -> Callable:
    """Return the function of a network on tensors instead of arrays."""
    import torch

    def run_on_tensors(inputs):
        outputs = run({name: tensor.numpy() for name, tensor in inputs.items()})
        return [torch.from_numpy(output) for output in outputs]

    return run_on_tensors


def relative_error(vectors, reference, widths=()) -> float:
    """Return the error relative to the length of the reference.

    Of several vectors side by side, with `widths`, it is the largest error. If the
    shapes differ, such as for another number of tokens, it is infinite.
    """
    if vectors.shape != reference.shape:
        return np.inf
    ends = np.cumsum(widths)[:-1].astype(int)
    errors = []
    for block in np.split(np.arange(reference.shape[-1]), ends):
        length = max(np.linalg.norm(reference[..., block]), 1e-12)
        error = np.linalg.norm(vectors[..., block] - reference[..., block])
        errors.append(error / length)
    return float(np.max(errors))


def _compare(expected, actual, cells, widths) -> tuple[float, int]:
    """Return the largest relative error of a vector, and the number of cells compared.

    Cells to which torch gives a vector that is not finite are left out.
    """
    largest, n_compared = 0.0, 0
    for start in range(0, len(cells), _CHECKED_AT_ONCE):
        batch = cells[start : start + _CHECKED_AT_ONCE]
        for vector, other in zip(expected(batch), actual(batch), strict=True):
            if vector.shape != other.shape:
                raise ValueError(
                    f"it returns the shape {other.shape}, and torch {vector.shape}"
                )
            if not np.isfinite(vector).all():
                continue
            error = relative_error(other, vector, widths)
            largest = max(largest, float(np.nan_to_num(error, nan=np.inf)))
            n_compared += 1
    return largest, n_compared


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the warnings of tracing, which users cannot act on."""
    names = ("torch.onnx", "onnxscript", "transformers")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def log_once(message, level=logging.WARNING) -> None:
    """Log a message once per process."""
    if message not in _LOGGED:
        _LOGGED.add(message)
        _LOGGER.log(level, message)


def _forget_after_fork() -> None:
    """Forget loaded networks in a forked child, which lacks their threads."""
    global _LOCK
    _LOCK = threading.RLock()
    _KEPT_AFTER_FORK.extend(_LOADED.values())  # deleting them would join the threads
    _LOADED.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)
