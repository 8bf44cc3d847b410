"""ExportedBackend: a text model in a directory, which runs without torch and transformers.

The directory has the files of the network and of the tokenizer, and ``sklembed.json``
with everything else, such as the description of the vectors.
"""

import functools
import json
import os
import shutil
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sklembed.encoders.backends import CheckpointBackend, trial_cells
from sklembed.encoders.cpu import integer_instructions
from sklembed.encoders.inference import Encoding, in_torch
from sklembed.encoders.networks import RECIPE, checksums, read_json, write_json
from sklembed.encoders.runtimes import (
    TOLERANCES,
    export_network,
    load_network,
    relative_error,
    require,
)
from sklembed.encoders.text_inputs import TextInputs, encode_in_groups, n_tokens

_FORMAT_VERSION = 1
_TOKENIZER = "tokenizer.json"
_BUDGET = 512  # tokens of a batch
# Parameters of an encoder that an export fixes, with the values that leave it to decide.
_FIXED = {
    "modality": "auto",
    "output": "pooled",
    "pooling": "auto",
    "layer": -1,
    "layer_aggregation": "concat",
    "max_length": None,
    "dtype": "auto",
    "runtime": "auto",
}


class Export:
    """A directory that `write_export` has written, in the place of a checkpoint."""

    is_directory = True

    def __init__(self, model):
        self.model = os.fspath(model)
        self.folder = Path(self.model)

    @property
    def has_config(self) -> bool:
        """Whether the directory is an export."""
        return (self.folder / RECIPE).is_file()

    @property
    def name(self) -> str:
        """Name of the exported model."""
        return self.recipe["description"]["label"]

    def identity(self) -> str:
        """Return the identity of the checkpoint that was exported."""
        return self.recipe["description"]["checkpoint"]

    @functools.cached_property
    def recipe(self) -> dict[str, Any]:
        """Content of ``sklembed.json``.

        Raises
        ------
        OSError
            If the file is damaged, or of another format.
        """
        recipe = read_json(self.folder / RECIPE)
        if recipe is None or recipe.get("format") != _FORMAT_VERSION:
            raise OSError(
                f"The file {str(self.folder / RECIPE)!r} is damaged, or of another "
                "version of sklembed. Export the encoder again."
            )
        return recipe


@dataclass(frozen=True)
class ExportedBackend(CheckpointBackend):
    """The network, pooling included, and the tokenizer of a text model.

    The checkpoint is an `Export`. The vectors have the fingerprint of the model that was
    exported.
    """

    modality = "text"
    runtimes = ()  # no other can replace the network

    @property
    def n_features(self) -> int:
        """Width of the vectors."""
        return self.checkpoint.recipe["n_features"]

    @property
    def dtype_name(self) -> str:
        """Precision of the vectors."""
        return self.checkpoint.recipe["description"]["dtype"]

    @property
    def exported_runtime(self) -> str:
        """Runtime that the network was exported for."""
        return self.checkpoint.recipe["parameters"]["runtime"]

    @property
    def precision(self) -> dict[str, str]:
        """What changes a vector by rounding."""
        description = self.checkpoint.recipe["description"]
        names = ("dtype", "runtime", "instructions")
        return {name: description[name] for name in names if name in description}

    def describe(self) -> dict[str, Any]:
        """Describe everything that changes a vector, in JSON types.

        Raises
        ------
        ValueError
            If a parameter differs from its value in the export, or vectors would differ
            on this processor.
        """
        self._check_parameters()
        description = self.checkpoint.recipe["description"]
        instructions = description.get("instructions", integer_instructions())
        if instructions != integer_instructions():
            raise ValueError(
                f"{self._name} was exported in int8 for processors with {instructions}, "
                f"and this one has {integer_instructions()}, whose vectors differ. "
                "Export the encoder on this machine, or with dtype='float32'."
            )
        return description

    def weights(self) -> str:
        """Return the key of the weights: the content of the directory."""
        return json.dumps(self.checkpoint.recipe, sort_keys=True)

    def load(self) -> "_Loaded":
        """Load the tokenizer and the network.

        Raises
        ------
        ImportError
            If the runtime is not installed.
        OSError
            If a file is absent or damaged.
        """
        require(self.exported_runtime)
        folder, recipe = self.checkpoint.folder, self.checkpoint.recipe
        if checksums(folder, leave_out=RECIPE) != recipe["files"]:
            raise OSError(
                f"The files of {self._name} are damaged or incomplete. Copy the "
                "directory again, or export the encoder again."
            )
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(folder / _TOKENIZER))
        run = load_network(self.exported_runtime, folder, self.dtype_name)
        return _Loaded(tokenizer, run)

    def encoding(self, loaded: "_Loaded") -> Encoding:
        """Return the steps by which the loaded model encodes texts."""
        recipe = self.checkpoint.recipe
        inputs = TextInputs(**recipe["inputs"])

        def encode(prepared):
            arrays, mask = inputs.collate(prepared)
            return loaded.run(arrays | {"mask": mask})[0]

        def prepare(texts):
            return inputs.prepare(texts, loaded.tokenize)

        def forward(prepared):
            return encode_in_groups(encode, prepared, recipe["batching"], n_tokens)

        return Encoding(forward, prepare, n_tokens, _BUDGET)

    def _check_parameters(self) -> None:
        """Raise an error for parameters that differ from their values in the export."""
        values = {
            "modality": self.modality_parameter,
            "output": self.output,
            "pooling": self.pooling_parameter,
            "layer": self.layer,
            "layer_aggregation": self.layer_aggregation,
            "max_length": self.max_length_parameter,
            "dtype": self.dtype,
            "runtime": self.runtime,
        }
        exported = self.checkpoint.recipe["parameters"]
        for name, value in values.items():
            if value != _FIXED[name] and _as_json(value) != exported[name]:
                raise ValueError(
                    f"{name}={value!r}, but {self._name} was exported with "
                    f"{name}={exported[name]!r}. Export an encoder with other "
                    "parameters."
                )
        if self.device not in ("auto", "cpu"):
            raise ValueError(
                f"device={self.device!r}, but {self._name} was exported for the CPU."
            )


@dataclass
class _Loaded:
    """A tokenizer, and the function that runs the network."""

    tokenizer: Any
    run: Any

    def tokenize(self, texts: list[str]) -> dict[str, list]:
        """Return the inputs that the tokenizer makes."""
        encodings = self.tokenizer.encode_batch(texts)
        return {
            "input_ids": [encoding.ids for encoding in encodings],
            "token_type_ids": [encoding.type_ids for encoding in encodings],
            "attention_mask": [encoding.attention_mask for encoding in encodings],
        }


def write_export(backend, directory, runtime) -> None:
    """Export a text model, and compare its vectors with those of torch.

    Parameters
    ----------
    backend : HuggingFaceBackend
        The model, on the CPU.

    directory : str or path
        The directory, which must be absent, empty or an earlier export.

    runtime : {"onnx", "openvino"}
        The runtime that will run the network.

    Raises
    ------
    ValueError
        If the model cannot be exported, or the vectors of the export differ.
    FileExistsError
        If the directory has other files.
    """
    directory = Path(os.path.abspath(directory))
    earlier = Export(directory)
    if directory.exists() and any(directory.iterdir()) and not earlier.has_config:
        raise FileExistsError(
            f"The directory {str(directory)!r} is not empty, and no earlier export. "
            "Pass another directory."
        )
    parts = backend.export_parts(backend.load())
    draft = directory.with_name(f"{directory.name}.{uuid.uuid4().hex}")
    draft.mkdir(parents=True)
    try:
        parts.tokenizer.save(str(draft / _TOKENIZER))
        trial = parts.encoding.prepare(trial_cells("text"))
        tensors = parts.network.inputs(trial[:2])
        export_network(runtime, parts.network, tensors, backend.dtype_name, draft)
        recipe = {
            "format": _FORMAT_VERSION,
            "description": backend.describe(),
            "parameters": _parameters(backend, runtime),
            "n_features": backend.n_features,
            "inputs": asdict(parts.inputs),
            "batching": parts.batching,
            "files": checksums(draft),
        }
        write_json(draft / RECIPE, recipe)
        _check(draft, parts.encoding, backend.dtype_name)
        if directory.exists():
            shutil.rmtree(directory)
        draft.rename(directory)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _parameters(backend, runtime) -> dict[str, Any]:
    """Return the values of the parameters that the export fixes, in JSON types."""
    values = {
        "modality": backend.modality,
        "output": backend.output,
        "pooling": backend.pooling_parameter,
        "layer": backend.layer,
        "layer_aggregation": backend.layer_aggregation,
        "max_length": backend.max_length_parameter,
        "dtype": backend.dtype_name,
        "runtime": runtime,
    }
    return {name: _as_json(value) for name, value in values.items()}


def _as_json(value):
    return list(value) if isinstance(value, tuple) else value


def _check(folder, encoding, precision) -> None:
    """Raise an error if the vectors of an export differ from those of torch."""
    exported = ExportedBackend(Export(folder))
    vectors = []
    for steps in (exported.encoding(exported.load()), in_torch(encoding)):
        prepared = steps.prepare(trial_cells("text"))
        vectors.append(
            np.concatenate([steps.forward(prepared), steps.forward(prepared[:1])])
        )
    error = max(map(relative_error, *vectors))
    if error > TOLERANCES[precision]:
        raise ValueError(
            f"The vectors of the export differ from torch by {error:.1e} of their "
            f"length, and {TOLERANCES[precision]:.0e} is allowed in {precision}. Try the "
            "other runtime."
        )
