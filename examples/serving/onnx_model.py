"""Predict texts with onnxruntime, tokenizers and numpy alone.

The process imports neither sklembed nor scikit-learn, pandas or torch. Another process
has written both files:

.. code-block:: python

    encoder.export("encoder")  # a FrozenEncoder of texts
    sklembed.to_onnx(pipeline, "head.onnx")  # the pipeline that begins with it
"""

import json
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer


class OnnxModel:
    """A text encoder and a classifier in ONNX Runtime.

    Parameters
    ----------
    encoder : str or path
        Directory that ``FrozenEncoder.export`` has written, of an encoder without
        prompts and without ``normalize=True``.

    head : str or path
        File that ``sklembed.to_onnx`` has written.

    n_threads : int, default=1
        Number of threads.
    """

    def __init__(self, encoder, head, n_threads=1):
        self.recipe = json.loads(Path(encoder, "sklembed.json").read_text())
        self.tokenizer = Tokenizer.from_file(str(Path(encoder, "tokenizer.json")))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = n_threads
        options.enable_cpu_mem_arena = False  # memory is returned after long texts
        self.encoder, self.head = (
            onnxruntime.InferenceSession(path, options)
            for path in (Path(encoder, "network.onnx"), head)
        )
        metadata = self.head.get_modelmeta().custom_metadata_map
        self.classes = json.loads(metadata["classes"])

    def encode(self, texts):
        """Return the vectors of texts: (n_texts, n_features)."""
        tokens = self.tokenizer.encode_batch(texts)
        columns = {
            "input_ids": [text.ids for text in tokens],
            "token_type_ids": [text.type_ids for text in tokens],
            "attention_mask": [text.attention_mask for text in tokens],
        }
        inputs = {}
        for name, padding in self.recipe["inputs"]["padding"].items():
            inputs[name] = _pad(columns[name], padding)
        inputs["mask"] = inputs["attention_mask"]
        names = [node.name for node in self.encoder.get_inputs()]
        return self.encoder.run(None, {name: inputs[name] for name in names})[0]

    def predict_proba(self, texts):
        """Return the probabilities of the classes: (n_texts, n_classes)."""
        return self.head.run(["probabilities"], {"X": self.encode(texts)})[0]


def _pad(rows, value):
    """Stack lists of integers, padded on the right."""
    length = max(map(len, rows))
    return np.array([row + [value] * (length - len(row)) for row in rows])
