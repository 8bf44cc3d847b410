"""Networks with trained parameters: their cells in training, adapters, and predictions."""

import json
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from hashlib import blake2b

import joblib
import numpy as np

from sklembed.encoders.cells import decode
from sklembed.encoders.inference import Encoding

_SCALING = 2.0  # of low-rank adapters


class Cells:
    """Prepared cells of training rows: texts are kept, images are prepared by threads."""

    def __init__(self, problem, trainable, encoder):
        self._column, self._backend = problem.column, problem.backend
        self._prepare = trainable.prepare
        self._settings = getattr(encoder, "_image_settings", None)
        self._texts = {}

    def __enter__(self):
        self._pool = ThreadPoolExecutor(joblib.cpu_count())
        return self

    def __exit__(self, *_):
        self._pool.shutdown(cancel_futures=True)

    def __call__(self, rows):
        """Return the prepared cells of a list of rows."""
        rows = self._column.first_rows[rows].tolist()
        if self._backend.modality == "image":
            return list(self._pool.map(self._prepare_row, rows))
        for row in rows:
            if row not in self._texts:
                self._texts[row] = self._prepare_row(row)
        return [self._texts[row] for row in rows]

    def _prepare_row(self, row):
        cell, key = self._column.cells[row], self._column.keys[row]
        size = getattr(self._backend, "image_size", None)
        modality = self._backend.modality
        return self._prepare([decode(cell, modality, key, self._settings, size)])[0]


class TunedBackend:
    """A backend of a network with trained parameters, for predictions."""

    def __init__(self, base, method, change, device):
        self.base, self.method, self.change, self.device = base, method, change, device
        self.modality, self.n_features = base.modality, base.n_features
        self.image_size = getattr(base, "image_size", None)

    def __repr__(self):
        return f"{self.base!r}, trained by method={self.method!r}"

    @cached_property
    def digest(self):
        """Hash of the trained parameters."""
        digest = blake2b(digest_size=16)
        for name, value in self.change.items():
            digest.update(f"{name} {value.shape} ".encode())
            digest.update(np.ascontiguousarray(value))
        return digest.hexdigest()

    def describe(self):
        """Return everything that changes a vector."""
        return self.base.describe() | {"method": self.method, "change": self.digest}

    def weights(self):
        """Return the key of the loaded network, which also pools its states."""
        description = json.dumps(self.describe(), sort_keys=True)
        return f"{self.base.weights()}, {description} on {self.device}"

    def load(self):
        """Load the network, and change its parameters."""
        import torch

        from sklembed.nn.finetuning import copy_parameters, merge_adapters

        trainable = self.base.trainable(self.device)
        change = {}
        for name, value in self.change.items():
            change[name] = torch.tensor(value)
        if self.method == "lora":
            merge_adapters(trainable.network, change, _SCALING)
        else:
            copy_parameters(trainable.network, change)
        return trainable

    def encoding(self, loaded):
        """Return the steps by which the loaded network encodes cells."""
        import torch

        def forward(prepared):
            with torch.inference_mode():
                return loaded.vectors(loaded.network, prepared).cpu().numpy()

        return Encoding(forward, loaded.prepare, loaded.cost, loaded.budget)


def normalized(vectors, normalize, network, prepared):
    """Return vectors as tensors, scaled to unit length if `normalize`."""
    import torch

    values = vectors(network, prepared)
    if normalize:
        return torch.nn.functional.normalize(values.float(), dim=1)
    return values


def inject_adapters(network, modules, rank, generator):
    """Add low-rank adapters to modules; return the names of their weights."""
    from peft import LoraConfig, inject_adapter_in_model

    from sklembed.nn.finetuning import initialize_adapters

    config = LoraConfig(r=rank, lora_alpha=_SCALING * rank, target_modules=modules)
    with _plain_convolutions(network, modules), warnings.catch_warnings():
        # peft warns of layers of GPT-2, whose weights are transposed, and handles them.
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        # On the meta device no weights are drawn from the global random state.
        inject_adapter_in_model(config, network, low_cpu_mem_usage=True)
    return initialize_adapters(network, generator)


@contextmanager
def _plain_convolutions(network, names):
    """Show convolutions of subclasses as plain ones.

    peft makes adapters of the class of the module, whose constructor may differ.
    """
    from torch import nn

    classes = []
    for name in names:
        module = network.get_submodule(name)
        if isinstance(module, nn.Conv2d):
            classes.append((module, type(module)))
            module.__class__ = nn.Conv2d
    try:
        yield
    finally:
        for module, original in classes:
            module.__class__ = original
