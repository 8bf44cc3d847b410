"""HuggingFaceBackend: text and vision checkpoints and dual encoders of transformers."""

import contextlib
import copy
import functools
import importlib
import math
import re
import threading
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any

import numpy as np

from sklembed.encoders.backends import CheckpointBackend, Modality, trial_cells
from sklembed.encoders.cpu import bfloat16_pays, integer_instructions
from sklembed.encoders.inference import (
    Encoding,
    Network,
    Trainable,
    in_torch,
    loading,
)
from sklembed.encoders.runtimes import (
    TOLERANCES,
    candidates,
    relative_error,
)
from sklembed.encoders.text_inputs import TextInputs, encode_in_groups, n_tokens

POOLINGS = ("mean", "cls", "max", "last", "pooler")

# Maximum cost of a batch in tokens. A CPU is fastest if activations fit its caches.
_BUDGETS = {"cpu": 2048}
_ACCELERATOR_BUDGET = 65536
_RUNTIME_BUDGET = 512  # runtimes are faster still in smaller batches
_PIXELS_PER_TOKEN = 16 * 16
_UNLIMITED = 1_000_000  # tokenizers without a limit have a max_length of 1e30
# Relative error that batching may cause, by the precision of the model.
_BATCHING_TOLERANCES = TOLERANCES | {"float32": 1e-5}

_FLAGS = threading.RLock()

# Vision transformers with a class token; others have patches only.
_WITH_CLASS_TOKEN = {
    "beit",
    "clip_vision_model",
    "data2vec-vision",
    "deit",
    "dinov2",
    "dinov2_with_registers",
    "dinov3_vit",
    "vit",
    "vit_msn",
}
_RANDOM = {"vit_mae"}
# Image processors that begin by resizing the whole image to the size in their file.
_PLAIN_IMAGE_PROCESSOR = re.compile(
    "(Bit|CLIP|DeiT|Siglip|ViT)(ImageProcessor|FeatureExtractor)(Fast|Pil)?"
)
_NEAREST = 0  # Pillow's filter that keeps single pixels instead of averaging
# Names of the width of the hidden states in configurations.
_WIDTHS = (
    "hidden_size",
    "d_model",
    "dim",
    "n_embd",
    "emb_dim",
    "model_dim",
    "hidden_dim",
)
# Their position embeddings start after the index of the padding token.
_OFFSET_POSITIONS = {
    "camembert",
    "data2vec-text",
    "longformer",
    "mpnet",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
}


@contextlib.contextmanager
def _torchvision_explained():
    """Explain an error of transformers that comes from the torchvision of another torch.

    transformers imports torchvision if it is installed.
    """
    try:
        yield
    except Exception as error:
        cause = _find_torchvision_error(error)
        if cause is None or _can_import_torchvision():
            raise
        raise ImportError(
            f"torchvision {version('torchvision')} does not match torch "
            f"{version('torch')}, so that transformers cannot be loaded. Install the "
            "torchvision that was built for this torch, or uninstall torchvision, which "
            f"sklembed does not need. (The error is {type(cause).__name__}: {cause})"
        ) from error


def _find_torchvision_error(error: BaseException | None) -> BaseException | None:
    """Return the first of an error and its causes that names torchvision, or None."""
    while error is not None and "torchvision" not in str(error):
        error = error.__cause__ or error.__context__
    return error


def _can_import_torchvision() -> bool:
    """Return whether torchvision is absent, or can be imported."""
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        return error.name == "torchvision"
    except Exception:  # of its operators, its libraries or its half-imported modules
        return False
    return True


@dataclass(frozen=True)
class HuggingFaceBackend(CheckpointBackend):
    """A text or vision checkpoint, or one tower of a dual encoder, in transformers.

    Only `encoding` needs the weights, unless a runtime has a copy. Files are read once
    per object, which lives for one call of the encoder.
    """

    others: "tuple[HuggingFaceBackend, ...]" = ()  # see `joined`

    @functools.cached_property
    def modality(self) -> Modality:
        """Modality of the cells, which the checkpoint must support."""
        supported = self._modalities()
        if self.modality_parameter == "auto":
            if len(supported) > 1:
                raise ValueError(
                    f"{self._name} encodes text and images; say which: modality='text' "
                    "or modality='image'."
                )
            return supported[0]
        if self.modality_parameter not in supported:
            raise ValueError(
                f"modality={self.modality_parameter!r}, but {self._name} "
                f"({self._model_type}) encodes {' and '.join(supported)}."
            )
        return self.modality_parameter

    @property
    def n_features(self) -> int:
        """Width of the vectors, from the configuration."""
        if self.output == "pooled":
            projection_dim = getattr(self._config, "projection_dim", None)
            if self.pooling == "projected" and projection_dim:
                return projection_dim
            if self.pooling in ("projected", "pooler"):
                # SigLIP projects its texts to another width.
                projection_size = getattr(self._tower, "projection_size", None)
                return projection_size or self._width(self._n_layers)
            for step in reversed(self._head):
                if "n_features" in step:
                    return step["n_features"]
        if self.layer_aggregation == "mean":
            return self._widths[0]
        return sum(self._widths)

    @functools.cached_property
    def pooling(self) -> str:
        """Reduction of the vectors of tokens to one."""
        if self.pooling_parameter != "auto":
            return self.pooling_parameter
        if self._is_dual and self.output == "pooled":
            return "projected"
        if "pooling" in self._settings:
            return self._settings["pooling"]
        if self.modality == "image" and self._model_type in _WITH_CLASS_TOKEN:
            return "cls"
        return "mean"

    @functools.cached_property
    def layers(self) -> list[int]:
        """Indices of the hidden states, from 0 (embeddings) to the number of layers."""
        n_layers = self._n_layers
        layers = self.layer
        if isinstance(layers, int):
            layers = [layers]
        for layer in layers or [None]:
            if not isinstance(layer, int):
                raise ValueError(
                    f"layer must be an int or a list of ints; got {self.layer!r}."
                )
            if not -n_layers - 1 <= layer <= n_layers:
                raise ValueError(
                    f"layer={layer}, but {self._name} has hidden states 0 (the "
                    f"embeddings) to {n_layers}, or {-n_layers - 1} to -1 from the end."
                )
        return [layer % (n_layers + 1) for layer in layers]

    @property
    def max_length(self) -> int | None:
        """Maximum number of tokens of a text; None for the limit of the tokenizer."""
        max_length, n_positions = self.max_length_parameter, _n_positions(self._tower)
        if max_length is None:
            return self._settings.get("max_length")
        if n_positions and max_length > n_positions:
            raise ValueError(
                f"max_length={max_length}, but {self._name} takes at most "
                f"{n_positions} tokens. Leave max_length=None, or lower it."
            )
        return int(max_length)

    @functools.cached_property
    def image_size(self) -> int | None:
        """Smaller side to which images are resized; None if unknown, and for texts.

        Read from the files of the image processor, which is not loaded.

        Raises
        ------
        OSError
            If a file could not be downloaded or is damaged.
        """
        if self.modality == "text":
            return None
        settings = self.checkpoint.image_processor()
        types = ("image_processor_type", "feature_extractor_type")
        names = [settings[key] for key in types if key in settings]
        is_plain = names and _PLAIN_IMAGE_PROCESSOR.fullmatch(names[0])
        has_own_code = "auto_map" in settings
        is_resized = settings.get("do_resize", True)
        is_averaged = settings.get("resample") != _NEAREST
        if has_own_code or not (is_plain and is_resized and is_averaged):
            return None
        size = settings.get("size")
        if isinstance(size, dict) and size.keys() == {"height", "width"}:
            size = max(size.values())
        elif isinstance(size, dict) and size.keys() == {"shortest_edge"}:
            size = size["shortest_edge"]
        return size if isinstance(size, int) else None

    @property
    def grid_shape(self) -> tuple[int, int]:
        """Rows and columns of the patches, or of the feature map, of an image.

        Raises
        ------
        ValueError
            If the model encodes text, or the grid depends on the image.
        """
        if self.modality == "text":
            return super().grid_shape
        from PIL import Image

        processor = _load_image_processor(self.checkpoint)
        shapes = set()
        for size in ((64, 48), (48, 96)):
            inputs = processor(images=[Image.new("RGB", size)], return_tensors="np")
            shapes.add(inputs["pixel_values"].shape)
        if len(shapes) > 1:
            raise ValueError(
                f"{self._name} keeps the proportions of an image, so that grids differ."
            )
        return self._grid(*shapes.pop()[-2:])

    def describe(self) -> dict[str, Any]:
        """Describe everything that changes a vector, in JSON types.

        Raises
        ------
        ValueError, OSError
            If the checkpoint cannot be found, or does not support the parameters.
        """
        self._check_model()
        self._check_parameters()
        remote_code = self.checkpoint.other_code() or self.checkpoint.runs_remote_code
        description = {
            "backend": "huggingface",
            "label": self.checkpoint.name,  # for people; no part of the fingerprint
            "checkpoint": self.checkpoint.identity(),
            "remote_code": remote_code,
            "modality": self.modality,
            "layers": self.layers,
        } | self.precision
        if len(self.layers) > 1:
            description["layer_aggregation"] = self.layer_aggregation
        if self.output == "tokens":
            # Special tokens are never returned; the entry keeps keys of stored vectors.
            description["special_tokens"] = False
        else:
            description |= {"pooling": self.pooling, "head": self._head}
            description["unit_length"] = self._head[-1:] == [{"kind": "normalize"}]
        if self.modality == "text":
            description |= {
                "max_length": self.max_length,
                "prompt": self._settings.get("prompt", ""),
                "pool_prompt": self._settings.get("pool_prompt", True),
                "lower_case": self._settings.get("lower_case", False),
            }
        return description

    @functools.cached_property
    def precision(self) -> dict[str, str]:
        """What changes a vector by rounding: dtype, and its runtime and instructions.

        Runtimes give the vectors of torch in float32, and have other ones below it.
        """
        precision = {"dtype": self.dtype_name}
        if self.runtimes and self.dtype_name != "float32":
            precision["runtime"] = self.runtimes[0]
        if self.dtype_name == "int8":
            precision["instructions"] = integer_instructions()
        return precision

    @functools.cached_property
    def runtimes(self) -> tuple[str, ...]:
        """Runtimes to try before torch."""
        on_cpu = self._device.type == "cpu"
        return candidates(self.runtime, self.dtype_name, on_cpu=on_cpu)

    def weights(self) -> str:
        """Return the key of the weights: checkpoint, code, precision and device."""
        code = " by its own code" if self.checkpoint.runs_remote_code else ""
        for repository, commit in self.checkpoint.other_code().items():
            code += f" of {repository}@{commit}"
        identity = self.checkpoint.identity()
        return f"{identity}{code} in {self._torch_dtype} on {self._device}"

    @functools.cached_property
    def passes(self) -> Any:
        """Key of the passes through the network, or None if they cannot be shared.

        Backends with equal keys differ in pooling, layers or their aggregation only.
        """
        if self.output == "tokens":
            return None
        plain = replace(
            self, pooling_parameter="auto", layer=-1, layer_aggregation="concat"
        )
        return plain, self.pooling == "projected"

    def joined(self, others) -> "HuggingFaceBackend":
        """Return a backend that also encodes cells as others do, in the same passes.

        Its vectors are followed by the vectors of the others.

        Parameters
        ----------
        others : iterable of HuggingFaceBackend
            Backends with equal `passes`.
        """
        return replace(self, others=tuple(others))

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths of the vectors of this backend and of the others."""
        return tuple(backend.n_features for backend in (self, *self.others))

    def load(self) -> "_Loaded":
        """Return the checkpoint, whose weights are loaded when torch has to run it."""
        return _Loaded()

    @_torchvision_explained()
    def load_model(self) -> tuple[Any, list[str]]:
        """Load the model in evaluation mode; return it and the weights that are absent.

        Raises
        ------
        OSError
            If a file of weights is damaged, or the configuration describes no network.
        ImportError
            If the installed torchvision does not match torch.
        """
        from transformers import AutoModel

        self.checkpoint.check_weights()
        try:
            with _quiet():
                model, report = AutoModel.from_pretrained(
                    dtype=getattr(_torch(), self._torch_dtype),
                    output_loading_info=True,
                    **self.checkpoint.model_source(),
                )
        # Networks do not validate their sizes, such as a number of heads of 0.
        except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
            raise OSError(
                f"No network can be built by the config.json of {self._name} "
                f"({type(error).__name__}: {error}): it is damaged, or was written for "
                "another version of transformers. Download the model again."
            ) from error
        unused = "lm_head"
        if hasattr(model, "encoder") and hasattr(model, "decoder"):  # such as T5
            model = model.get_encoder()
            unused = "lm_head|decoder"
        absent = []
        for key in report["missing_keys"]:
            if re.search(unused, key) is None:
                absent.append(key)
        for key in report["mismatched_keys"]:
            absent.append(str(key))
        for config in (model.config, model.config.get_text_config()):
            if getattr(config, "use_cache", False):
                # Only generation needs the keys and values of all layers.
                config.use_cache = False
        return model.eval().requires_grad_(False).to(self._device), absent

    def encoding(self, loaded: "_Loaded") -> Encoding:
        """Return the steps by which the loaded checkpoint encodes cells.

        Raises
        ------
        OSError
            If tokenizer files or weights are absent, which transformers would
            initialise at random.
        """
        prepare, collate = self._steps(loaded)
        members = [(backend, backend._head_steps()) for backend in (self, *self.others)]

        def forward_by(run):
            def encode(prepared):
                with _torch().inference_mode(), self._full_precision():
                    inputs, mask = collate(prepared)
                    states = dict(zip(self._outputs, run(inputs), strict=True))
                    mask = self._mask_of_states(states, inputs, mask)
                    if self.output == "tokens":
                        return self._tokens(states, mask)
                    vectors = []
                    for backend, steps in members:
                        vectors.append(backend._vectors(states, mask, steps))
                    return _torch().cat(vectors, dim=1).cpu().numpy()

            def forward(prepared):
                if len(prepared) == 1:
                    return encode(prepared)
                if self not in loaded.batchings:
                    loaded.batchings[self] = self._find_batching(encode, prepare)
                batching = loaded.batchings[self]
                return encode_in_groups(encode, prepared, batching, _length)

            return forward

        is_text = self.modality == "text"
        network = Network(
            label=self.checkpoint.name,
            key=self.network_key,
            use=self.network_use,
            module=lambda: self._module(loaded, prepare, collate),
            inputs=lambda prepared: collate(prepared)[0],
            forward=forward_by,
            trial=lambda: prepare(trial_cells(self.modality)),
            widths=self.widths,
            dynamic_axes=(0, 1) if is_text else (0,),
            runtime_budget=_RUNTIME_BUDGET if is_text else None,
        )
        budget = _BUDGETS.get(self._device.type, _ACCELERATOR_BUDGET)
        return Encoding(None, prepare, _length, budget, network)

    def _module(self, loaded, prepare, collate):
        """Return the module that maps the tensors of a batch to `_outputs`."""
        from sklembed.nn.layers import Applied

        model, absent = loaded.model_of(self)
        for backend in (self, *self.others):
            backend._check_weights(absent)
        inputs, _ = collate(prepare(trial_cells(self.modality)[:1]))
        names = list(inputs)

        def states(model, *tensors):
            return self._states(model, dict(zip(names, tensors, strict=True)))

        return Applied(states, model)

    def trainable(self, device: str) -> Trainable:
        """Return the network, loaded anew in float32, and its differentiable steps.

        Raises
        ------
        OSError
            If tokenizer files or weights are absent.
        """
        backend = replace(self, device=device, dtype="float32", runtime="torch")
        loaded = _Loaded()
        network, absent = loaded.model_of(backend)
        backend._check_weights(absent)
        prepare, collate = backend._steps(loaded)
        steps = backend._head_steps()

        def vectors(network, prepared):
            inputs, mask = collate(prepared)
            outputs = backend._states(network, inputs)
            states = dict(zip(backend._outputs, outputs, strict=True))
            mask = backend._mask_of_states(states, inputs, mask)
            return backend._vectors(states, mask, steps)

        def encode(prepared):
            with _torch().inference_mode():
                return vectors(network, prepared).cpu().numpy()

        batching = backend._find_batching(encode, prepare)

        def vectors_in_groups(network, prepared):
            run = functools.partial(vectors, network)
            stack = _torch().stack
            return encode_in_groups(run, prepared, batching, _length, stack)

        budget = _BUDGETS.get(backend._device.type, _ACCELERATOR_BUDGET)
        return Trainable(network, vectors_in_groups, prepare, _length, budget)

    def export_parts(self, loaded: "_Loaded") -> "ExportParts":
        """Return the parts of a text model that encode without torch and transformers.

        Raises
        ------
        ValueError
            If the model encodes images, or its tokenizer is written in Python.
        """
        if self.modality != "text" or self.output != "pooled":
            raise ValueError(
                f"{self._name} encodes {self.modality} with output={self.output!r}, but "
                "only pooled vectors of texts can be exported."
            )
        encoding = self.encoding(loaded)
        prepare, collate = self._text_steps(loaded)
        steps = self._head_steps()

        def inputs_and_mask(prepared):
            inputs, mask = collate(prepared)
            if self.pooling in ("projected", "pooler"):  # which take no mask
                return inputs
            return inputs | {"mask": mask}

        def vectors(model, *tensors):
            inputs = dict(zip(names, tensors, strict=True))
            mask = inputs.pop("mask", None)
            states = dict(zip(self._outputs, self._states(model, inputs), strict=True))
            return self._vectors(states, mask, steps)

        def module():
            from sklembed.nn.layers import Applied

            return Applied(vectors, encoding.network.module().network)

        trial = prepare(trial_cells(self.modality))
        names = list(inputs_and_mask(trial[:1]))
        inputs = self._text_inputs(loaded.tokenizer(self.checkpoint))
        inputs = replace(
            inputs, padding={name: inputs.padding[name] for name in trial[0]}
        )
        in_torch(encoding).forward(trial)  # finds which cells may share a batch
        return ExportParts(
            encoding=encoding,
            network=replace(encoding.network, module=module, inputs=inputs_and_mask),
            tokenizer=self._fast_tokenizer(loaded, inputs),
            inputs=inputs,
            batching=loaded.batchings[self],
        )

    def _fast_tokenizer(self, loaded, inputs):
        """Return the tokenizer, in Rust, with the limit on its tokens."""
        from tokenizers import Tokenizer

        tokenizer = loaded.tokenizer(self.checkpoint)
        if not tokenizer.is_fast:
            raise ValueError(
                f"The tokenizer of {self._name} ({type(tokenizer).__name__}) is written "
                "in Python, so that it cannot be exported."
            )
        fast = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        fast.no_padding()
        fast.no_truncation()
        if inputs.max_length is not None:
            side = tokenizer.truncation_side
            fast.enable_truncation(inputs.max_length, direction=side)
        if inputs.pads_to_max:
            fast.enable_padding(
                pad_id=tokenizer.pad_token_id,
                pad_type_id=tokenizer.pad_token_type_id,
                pad_token=tokenizer.pad_token,
                length=inputs.max_length,
            )
        return fast

    @property
    def network_key(self) -> str:
        """Key of the weights, and of the outputs that `_states` returns."""
        outputs = " ".join(map(str, self._outputs))
        return f"{self.weights()}: {outputs} of {self.modality}"

    @property
    def network_use(self) -> str:
        """What a check of the network depends on besides its outputs."""
        poolings = [backend.pooling for backend in (self, *self.others)]
        uses = " ".join([self.output, *sorted(set(poolings))])
        return f"{uses}, at most {self.max_length} tokens"

    @functools.cached_property
    def _outputs(self) -> list[int | str]:
        """Outputs of the network: indices of hidden states, "projected" or "pooler"."""
        layers, vectors = set(), set()
        for backend in (self, *self.others):
            if backend.pooling in ("projected", "pooler"):
                vectors.add(backend.pooling)
            else:
                layers.update(backend.layers)
        return [*sorted(layers), *vectors]

    def _vectors(self, states, mask, steps):
        """Return the vectors of a batch from the outputs of the network."""
        if self.pooling in ("projected", "pooler"):
            vectors = states[self.pooling]
        else:
            pooled = [_pool(states[i], mask, self.pooling) for i in self.layers]
            vectors = _combine(pooled, self.layer_aggregation)
        for step in steps:
            vectors = step(vectors)
        return vectors

    def _tokens(self, states, mask):
        """Return an array of tokens for each cell of a batch."""
        combined = _combine([states[i] for i in self.layers], self.layer_aggregation)
        return _ragged(combined, mask)

    @contextlib.contextmanager
    def _full_precision(self):
        """Compute float32 convolutions on a GPU in float32, not in TF32 with 10 bits."""
        if self._device.type != "cuda" or self._torch_dtype != "float32":
            yield
            return
        cudnn = _torch().backends.cudnn
        # The flags belong to the process: two threads would restore each other's.
        with (
            _FLAGS,
            cudnn.flags(
                enabled=cudnn.enabled,
                benchmark=cudnn.benchmark,
                deterministic=cudnn.deterministic,
                allow_tf32=False,
            ),
        ):
            yield

    def _head_steps(self):
        """Return the functions of the steps after pooling."""
        return [_head_step(step, self.checkpoint, self._device) for step in self._head]

    def _find_batching(self, encode, prepare) -> str:
        """Test which cells may share a batch: "any", those of "one length", or "none".

        A model may ignore the attention mask or mix padding into short texts. It may
        also mix the cells of a batch, for example by statistics of the batch.
        Configurations do not state it.

        Raises
        ------
        ValueError
            If the model encodes a cell differently each time.
        """
        first, longer, *_ = prepare(trial_cells(self.modality))
        if self.modality == "text" and _length(first) == _length(longer):
            (first,) = prepare([""])  # a small max_length cuts both to the same length
        vector = encode([first])[0]
        tolerance = _BATCHING_TOLERANCES[self.dtype_name]

        def is_unchanged(batch):
            # The last cell: some models apply the mask of the first one to all.
            batch_vector = encode(batch)[-1]
            if batch_vector.shape != vector.shape:
                return False
            return relative_error(batch_vector, vector, self.widths) <= tolerance

        if is_unchanged([longer, first]):
            return "any"
        if self.modality == "text":
            n_first = _length(first)
            cut = {name: values[:n_first] for name, values in longer.items()}
            if is_unchanged([cut, first]):
                return "one length"
        if is_unchanged([first]):
            return "none"
        raise ValueError(
            f"{self._name} ({self._model_type}) gives the same cell another vector "
            "each time, so its vectors cannot be stored. Choose another checkpoint."
        )

    def _steps(self, loaded):
        """Return the functions that prepare cells and make a batch of them."""
        if self.modality == "text":
            return self._text_steps(loaded)
        return self._image_steps(loaded)

    def _text_steps(self, loaded):
        """Return the functions that tokenise texts and make a batch of them."""
        tokenizer = loaded.tokenizer(self.checkpoint)
        inputs = self._text_inputs(tokenizer)

        def tokenize(texts):
            with loaded.tokenizing:  # a fast tokenizer raises if two threads use it
                return tokenizer(
                    texts,
                    padding="max_length" if inputs.pads_to_max else False,
                    truncation=inputs.max_length is not None,
                    max_length=inputs.max_length,
                    return_attention_mask=True,
                    return_special_tokens_mask=self.output == "tokens",
                )

        def prepare(texts):
            return inputs.prepare(texts, tokenize)

        def collate(prepared):
            arrays, mask = inputs.collate(prepared)
            tensors = {}
            for name, array in arrays.items():
                tensors[name] = _torch().from_numpy(array).to(self._device)
            return tensors, _torch().from_numpy(mask).to(self._device)

        return prepare, collate

    def _text_inputs(self, tokenizer) -> TextInputs:
        """Return how texts become the inputs of the model."""
        prompt, n_skipped = self._settings.get("prompt", ""), 0
        if not self._settings.get("pool_prompt", True):
            n_skipped = _prompt_length(tokenizer, prompt)
        return TextInputs(
            padding=_padding_values(tokenizer),
            max_length=self._tokenizer_limit(tokenizer),
            prompt=prompt,
            n_skipped=n_skipped,
            lower_case=self._settings.get("lower_case", False),
            # SigLIP reads the last position, and was trained on texts of full length.
            pads_to_max=self._model_type.startswith("siglip"),
        )

    def _tokenizer_limit(self, tokenizer) -> int | None:
        """Return the maximum number of tokens of a text, or None."""
        max_length = self.max_length or tokenizer.model_max_length or _UNLIMITED
        max_length = min(max_length, _n_positions(self._tower) or _UNLIMITED)
        n_special = tokenizer.num_special_tokens_to_add()
        if max_length <= n_special:
            raise ValueError(
                f"max_length={max_length} leaves no room for a text: {self._name} adds "
                f"{n_special} special tokens to each."
            )
        if max_length >= _UNLIMITED:
            return None
        return max_length

    def _image_steps(self, loaded):
        """Return the functions that make pixels of images and a batch of them."""
        processor = loaded.image_processor(self.checkpoint)

        def prepare(images):
            pixels = []
            for image in images:
                inputs = processor(images=[image], return_tensors="np")
                pixels.append(inputs["pixel_values"][0])
            return pixels

        def collate(prepared):
            torch = _torch()
            for pixels in prepared:
                if pixels.shape != prepared[0].shape:
                    raise ValueError(
                        f"{self._name} keeps the proportions of images, so that they "
                        "do not fit into one batch. Pass batch_size=1, or give its "
                        "processor a fixed size."
                    )
            dtype = getattr(torch, self._torch_dtype)
            pixels = torch.from_numpy(np.stack(prepared)).to(self._device, dtype)
            return {"pixel_values": pixels}, None

        return prepare, collate

    def _mask_of_states(self, states, inputs, mask):
        """Return the mask of the tokens to use, (batch, tokens), or None for all.

        Raises
        ------
        ValueError
            If the model returns another number of tokens.
        """
        first = next(iter(states.values()))
        if self.modality == "text":
            if first.ndim == 3 and first.shape[1] != mask.shape[1]:
                raise ValueError(
                    f"{self._name} ({self._model_type}) returns {first.shape[1]} "
                    f"vectors for {mask.shape[1]} tokens, so they cannot be pooled. "
                    "Wrap the model in a CallableBackend."
                )
            return mask
        if self.output == "pooled":
            return None
        # Special tokens come before the patches.
        mask = _torch().ones(first.shape[:2], dtype=_torch().long)
        mask[:, : self._count_special_tokens(inputs["pixel_values"], first)] = 0
        return mask

    def _count_special_tokens(self, pixels, states) -> int:
        """Count class and register tokens, and check that all others form the grid."""
        rows, columns = self._grid(*pixels.shape[-2:])
        model_type = self._tower.model_type
        n_special = 0
        if model_type in _WITH_CLASS_TOKEN:
            n_registers = getattr(self._tower, "num_register_tokens", 0) or 0
            n_special = 1 + n_registers + (model_type == "deit")
        if states.shape[1] != n_special + rows * columns:
            raise ValueError(
                f"{self._name} ({model_type}) returns {states.shape[1]} tokens for an "
                f"image, which are not {n_special} special ones and a grid of {rows} x "
                f"{columns}. Wrap the model in a CallableBackend that returns patches."
            )
        return n_special

    def _states(self, model, inputs):
        """Run the model. Return its `_outputs`: (batch, tokens, dim), or (batch, dim)."""
        if self.pooling == "projected":
            run = model.get_image_features
            if self.modality == "text":
                run = model.get_text_features
            output = run(**inputs)
            # In transformers 5 the vector is a field of the output.
            return [getattr(output, "pooler_output", output).float()]
        if self._is_dual:
            model = model.text_model if self.modality == "text" else model.vision_model
        layers = [layer for layer in self._outputs if layer != "pooler"]
        if set(layers) <= {self._n_layers}:
            output = model(**inputs)
            hidden_states = {}
        else:
            output = model(output_hidden_states=True, **inputs)
            hidden_states = dict(enumerate(output.hidden_states))
            if len(hidden_states) != self._n_layers + 1:
                raise ValueError(
                    f"{self._name} ({self._model_type}) returned {len(hidden_states)} "
                    f"hidden states; expected {self._n_layers + 1}. Leave layer=-1."
                )
        states = []
        for name in self._outputs:
            if name == "pooler":
                states.append(self._pooler_output(output))
            elif name == self._n_layers:
                states.append(_as_sequence(output.last_hidden_state))
            else:
                states.append(_as_sequence(hidden_states[name]))
        return states

    def _pooler_output(self, output):
        """Return the model's own pooled vector, of shape (batch, dim)."""
        vector = getattr(output, "pooler_output", None)
        if vector is None:
            raise ValueError(
                f"pooling='pooler', but {self._name} ({self._model_type}) has no "
                "pooled vector. Pass pooling='mean', 'cls' or 'last'."
            )
        return vector.float().flatten(1)

    def _check_model(self) -> None:
        """Raise an error for checkpoints whose vectors are not reproducible."""
        if self._model_type in _RANDOM:
            raise ValueError(
                f"{self._name} ({self._model_type}) masks patches at random, so that "
                "the vector of an image is not unique. Choose another checkpoint."
            )
        if self.checkpoint.file("adapter_config.json", optional=True) is not None:
            raise ValueError(
                f"{self._name} has an adapter, which changes vectors only if peft is "
                "installed. Load it with peft, merge it into the model and save that: "
                "model.merge_and_unload().save_pretrained(directory)."
            )
        is_sparse = getattr(self._config, "attention_type", None) == "block_sparse"
        if self._model_type == "big_bird" and is_sparse:
            raise ValueError(
                f"{self._name} (big_bird) changes its attention permanently at the "
                "first short text. Save it with attention_type='original_full'."
            )
        rope = getattr(self._tower, "rope_parameters", None) or {}
        limit = rope.get("original_max_position_embeddings") or 0
        is_longrope = rope.get("rope_type") == "longrope"
        if is_longrope and (self.max_length or math.inf) > limit:
            raise ValueError(
                f"{self._name} ({self._model_type}) encodes a text differently beside "
                f"one of more than {limit} tokens. Pass max_length={limit}."
            )

    def _check_parameters(self) -> None:
        """Raise an error for parameters that the model cannot use or would ignore."""
        is_last_layer = self.layers == [self._n_layers]
        if self.modality == "image" and self.max_length_parameter is not None:
            raise ValueError("max_length would have no effect: the cells are images.")
        if self._is_hierarchical and not is_last_layer:
            raise ValueError(
                f"layer={self.layer}, but the widths and grids of the stages of "
                f"{self._name} ({self._model_type}) are unknown; leave layer=-1."
            )
        if self.output == "tokens" and self.pooling_parameter != "auto":
            raise ValueError(
                f"pooling={self.pooling_parameter!r} would have no effect with "
                "output='tokens'."
            )
        is_image_tokens = self.output == "tokens" and self.modality == "image"
        if is_image_tokens and self._cell_size is None:
            raise ValueError(
                f"The size of the patches of {self._name} ({self._model_type}) is not "
                "in its configuration; wrap the model in a CallableBackend."
            )
        if self.pooling in ("projected", "pooler") and not is_last_layer:
            raise ValueError(
                f"layer={self.layer}, but pooling={self.pooling_parameter!r} takes the "
                "model's own vector, which comes after all layers. Pass pooling='mean' "
                "or 'cls'."
            )
        needs_equal_widths = self.layer_aggregation == "mean" or self.output == "tokens"
        if needs_equal_widths and len(set(self._widths)) > 1:
            raise ValueError(
                f"The layers {self.layer} of {self._name} differ in width or in grid; "
                "pool them with layer_aggregation='concat', or choose a single layer."
            )

    def _check_weights(self, absent) -> None:
        """Raise an error for weights that are used and absent from the checkpoint."""
        if not self._is_dual and self.pooling != "pooler":
            absent = [key for key in absent if "pooler" not in key]
        if absent:
            raise OSError(
                f"{self._name} lacks {len(absent)} weights of its architecture, such "
                f"as {absent[:2]}; they would be initialised at random. Save the full "
                "model by save_pretrained."
            )

    def _modalities(self) -> list[Modality]:
        """List the modalities that the checkpoint encodes."""
        config = self._config
        if self._is_dual:
            return ["text", "image"]
        has_images = hasattr(config, "num_channels")
        has_text = hasattr(config, "vocab_size")
        if hasattr(config, "vision_config") or not (has_images or has_text):
            raise ValueError(
                f"{self._name} ({self._model_type}) is neither a text model, a vision "
                "model nor a dual encoder of both with a common space. Wrap it in a "
                "CallableBackend."
            )
        return ["image"] if has_images else ["text"]

    @functools.cached_property
    def _widths(self) -> list[int]:
        """Widths of the hidden states in `layers`."""
        return [self._width(layer) for layer in self.layers]

    def _width(self, layer: int) -> int:
        """Return the width of a hidden state, from the configuration."""
        config = self._tower
        is_last = layer == self._n_layers
        if is_last and getattr(config, "neck_hidden_sizes", None):  # MobileViT
            return config.neck_hidden_sizes[-1]
        if is_last and getattr(config, "word_embed_proj_dim", None):  # OPT
            return config.word_embed_proj_dim
        if self._is_convolutional:
            stem_width = getattr(config, "embedding_size", config.hidden_sizes[0])
            return [stem_width, *config.hidden_sizes][layer]
        for source in (config, config.get_text_config()):
            for name in _WIDTHS:
                if isinstance(getattr(source, name, None), int):
                    return getattr(source, name)
        if is_last and self.modality == "image" and not self._is_dual:
            width = _measure_width(self.checkpoint, self.checkpoint.identity())
            if width is not None:
                return width
        raise ValueError(
            f"The width of the vectors of {self._name} ({config.model_type}) is not in "
            "its configuration; wrap the model in a CallableBackend."
        )

    def _grid(self, height, width) -> tuple[int, int]:
        """Return the rows and columns of the patches or the feature map of an image."""
        rows, columns = height / self._cell_size, width / self._cell_size
        if self._is_convolutional or self._is_hierarchical:
            return math.ceil(rows), math.ceil(columns)  # these pad the image
        return math.floor(rows), math.floor(columns)

    @functools.cached_property
    def _cell_size(self) -> int | None:
        """Pixels between neighbouring tokens of an image; None if unknown."""
        config = self._tower
        if self._is_convolutional:
            # The last map has stride 32, and each earlier one half of it.
            return 32 >> (self._n_layers - self.layers[0])
        patch_size = getattr(config, "patch_size", None)
        if isinstance(patch_size, list | tuple):
            patch_size = patch_size[0]
        if patch_size and self._is_hierarchical:
            # Patches are merged two by two between the stages.
            return patch_size << (len(config.depths) - 1)
        return patch_size

    @functools.cached_property
    def _n_layers(self) -> int:
        if self._is_convolutional:
            return len(self._tower.hidden_sizes)
        return getattr(self._tower, "num_hidden_layers", None) or 0

    @functools.cached_property
    def _is_convolutional(self) -> bool:
        return bool(getattr(self._tower, "hidden_sizes", None))

    @functools.cached_property
    def _is_hierarchical(self) -> bool:
        """Whether the model merges patches from stage to stage, as Swin does."""
        return hasattr(self._tower, "depths") and not self._is_convolutional

    @functools.cached_property
    def _is_dual(self) -> bool:
        """Whether texts and images have a common space, unlike in generative models."""
        config = self._config
        if not (hasattr(config, "text_config") and hasattr(config, "vision_config")):
            return False
        return hasattr(config, "projection_dim") or self._model_type.startswith(
            "siglip"
        )

    @functools.cached_property
    def _tower(self):
        """Configuration of the model, or of the tower of a dual encoder."""
        if not self._is_dual:
            return self._config
        if self.modality == "text":
            return self._config.text_config
        return self._config.vision_config

    @functools.cached_property
    def _head(self) -> list[dict[str, Any]]:
        """Steps of the sentence-transformers files after pooling.

        Dense layers are trained for the pooling of the files, and skipped for another
        one.
        """
        if self.output == "tokens":
            return []
        steps = self._settings.get("head", [])
        is_last_layer = self.layers == [self._n_layers]
        if self.pooling == self._settings.get("pooling") and is_last_layer:
            return steps
        return [step for step in steps if step["kind"] == "normalize"]

    @property
    def _model_type(self) -> str:
        return self._config.model_type

    @functools.cached_property
    def _config(self):
        return self.checkpoint.config()

    @functools.cached_property
    def _settings(self) -> dict[str, Any]:
        return self.checkpoint.sentence_transformer()

    @functools.cached_property
    def _device(self):
        from sklembed._torch import resolve_device

        return resolve_device(self.device)

    @functools.cached_property
    def dtype_name(self) -> str:
        """Precision of the vectors."""
        if self.dtype == "auto" and self._device.type == "cpu":
            return "bfloat16" if bfloat16_pays() else "float32"
        if self.dtype == "int8":
            return "int8"
        from sklembed._torch import resolve_dtype

        return str(resolve_dtype(self.dtype, self._device)).removeprefix("torch.")

    @property
    def _torch_dtype(self) -> str:
        """Precision of torch, with which runtimes are compared."""
        return "float32" if self.runtimes else self.dtype_name


@dataclass(frozen=True)
class ExportParts:
    """Parts of a text model, from which `write_export` makes a directory."""

    encoding: Encoding  # by torch, to compare with
    network: Network  # from the tokens and the mask to the vectors
    tokenizer: Any  # tokenizers.Tokenizer
    inputs: TextInputs
    batching: str  # see `encode_in_groups`


@dataclass
class _Loaded:
    """A model on its device, with its tokenizer or image processor.

    All are loaded on first use; a runtime needs no model. The same weights may lie at
    several paths. Tokenizers and processors are read from the path of the first encoder
    that uses them, since files elsewhere may have changed after the model was loaded.
    """

    batchings: dict[Any, str] = field(default_factory=dict)  # by backend
    tokenizing: threading.Lock = field(default_factory=threading.Lock)
    _model: tuple[Any, list[str]] | None = None
    _tokenizer: Any = None
    _image_processor: Any = None

    def model_of(self, backend) -> tuple[Any, list[str]]:
        """Return the model, and the weights that the checkpoint lacks."""
        if self._model is None:
            with loading():
                self._model = backend.load_model()
        return self._model

    def tokenizer(self, checkpoint):
        if self._tokenizer is None:
            self._tokenizer = _load_tokenizer(checkpoint)
        return self._tokenizer

    def image_processor(self, checkpoint):
        if self._image_processor is None:
            self._image_processor = _load_image_processor(checkpoint)
        return self._image_processor


@functools.lru_cache(maxsize=64)
@_torchvision_explained()
def _measure_width(checkpoint, identity) -> int | None:
    """Run an image model on the meta device to find a width that is not configured."""
    from transformers import AutoModel

    config = copy.deepcopy(checkpoint.config())
    size = getattr(config, "image_size", None) or 224
    if isinstance(size, int):
        size = (size, size)
    torch = _torch()
    try:
        with _quiet(), torch.device("meta"), torch.inference_mode():
            model = AutoModel.from_config(
                config, trust_remote_code=checkpoint.trust_remote_code
            )
            pixels = torch.empty(1, config.num_channels, *size)
            states = model.eval()(pixel_values=pixels).last_hidden_state
    except Exception:  # architectures raise any error; the caller says how to proceed
        return None
    return _as_sequence(states).shape[-1]


@_torchvision_explained()
def _load_tokenizer(checkpoint):
    from transformers import AutoTokenizer

    checkpoint.check_tokenizer()
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(**checkpoint.source())
    except (KeyError, TypeError, ValueError) as error:  # the class lacks its files
        reason = " ".join(str(error).split())
        raise OSError(
            f"The tokenizer of {checkpoint.model!r} cannot be loaded. Save it beside "
            "the model: tokenizer.save_pretrained(directory). (transformers says: "
            f"{reason})"
        ) from error
    # Without files transformers silently makes a tokenizer with an empty vocabulary.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise OSError(
            f"{checkpoint.model!r} contains no tokenizer files, without which all texts "
            "have the same tokens. Save the tokenizer beside the model: "
            "tokenizer.save_pretrained(directory)."
        )
    return tokenizer


@_torchvision_explained()
def _load_image_processor(checkpoint):
    from transformers import AutoImageProcessor

    checkpoint.image_processor()  # an error names a damaged file
    # Pillow resizes identically on every machine; torchvision, if installed, does not.
    return AutoImageProcessor.from_pretrained(backend="pil", **checkpoint.source())


def _length(prepared) -> int:
    """Return the number of tokens of a prepared text or image."""
    if isinstance(prepared, dict):
        return n_tokens(prepared)
    return max(1, prepared[0].size // _PIXELS_PER_TOKEN)


def _padding_values(tokenizer) -> dict[str, int]:
    """Return the padding value of each input of a model."""
    # Padding is masked, so that any token may replace an undefined padding token.
    pad_token = 0
    for token in (tokenizer.eos_token_id, tokenizer.pad_token_id):
        if token is not None:
            pad_token = token
    return {
        "input_ids": pad_token,
        "token_type_ids": tokenizer.pad_token_type_id,
        "attention_mask": 0,
        "special_tokens_mask": 1,
    }


def _prompt_length(tokenizer, prompt: str) -> int:
    """Count the tokens of a prompt, without the token that ends a text."""
    ids = tokenizer(prompt)["input_ids"]
    return len(ids) - (bool(ids) and ids[-1] in tokenizer.all_special_ids)


def _head_step(step, checkpoint, device):
    """Return the function of one sentence-transformers step after pooling."""
    torch = _torch()
    if step["kind"] == "normalize":
        return lambda vectors: torch.nn.functional.normalize(vectors, dim=1)
    if step["kind"] == "truncate":
        return lambda vectors: vectors[:, : step["n_features"]]
    tensors = checkpoint.tensors(step["path"])
    if "linear.weight" not in tensors:
        raise OSError(
            f"The weights in the folder {step['path']!r} of {checkpoint.model!r} lack "
            f"'linear.weight'; they are {list(tensors)}. Download the full model again."
        )
    weight = tensors["linear.weight"].to(device).float()
    bias = tensors.get("linear.bias")
    if bias is not None:
        bias = bias.to(device).float()
    activation = getattr(torch.nn, step["activation"])()
    return lambda vectors: activation(torch.nn.functional.linear(vectors, weight, bias))


def _n_positions(config) -> int | None:
    """Return the maximum number of tokens of a model, or None."""
    n_positions = getattr(config, "max_position_embeddings", None) or 0
    if n_positions <= 0:
        return None
    if config.model_type in _OFFSET_POSITIONS:
        n_positions -= config.pad_token_id + 1
    return n_positions


@contextlib.contextmanager
def _quiet():
    """Hide the progress bar and the report of transformers while a model is loaded.

    Weights that the report lists as absent raise an error of this package instead.
    """
    from transformers.utils import logging

    has_progress_bar = logging.is_progress_bar_enabled()
    verbosity = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(max(verbosity, logging.ERROR))
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_progress_bar:
            logging.enable_progress_bar()


def _torch():
    """Import torch only when a model is about to run."""
    import torch

    return torch


def _as_sequence(states):
    """Reshape feature maps (batch, dim, height, width) to (batch, tokens, dim)."""
    states = states.float()
    if states.ndim == 4:
        states = states.flatten(2).transpose(1, 2)
    return states


def _pool(states, mask, pooling: str):
    """Reduce (batch, tokens, dim) to (batch, dim) over the tokens with mask 1."""
    torch = _torch()
    if mask is None:
        mask = torch.ones(states.shape[:2], device=states.device)
    mask = mask.to(states.dtype)  # (batch, tokens)
    # Not len(states), which an export would keep as a constant.
    rows = torch.arange(states.shape[0], device=states.device)
    if pooling == "cls":
        return states[rows, mask.argmax(dim=1)]
    if pooling == "last":
        return states[rows, mask.shape[1] - 1 - mask.flip(1).argmax(dim=1)]
    if pooling == "max":
        return states.masked_fill(mask[..., None] == 0, float("-inf")).amax(dim=1)
    if pooling == "weightedmean":
        mask = mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)
    norm = mask.sum(dim=1, keepdim=True)
    if pooling == "mean_sqrt_len":
        norm = norm.sqrt()
    return (states * mask[..., None]).sum(dim=1) / norm


def _combine(states, aggregation: str):
    """Concatenate or average the vectors of several layers."""
    torch = _torch()
    if aggregation == "mean":
        return torch.stack(states).mean(0)
    return torch.cat(states, dim=-1)


def _ragged(states, mask):
    """Split (batch, tokens, dim) into an array (T_i, dim) of tokens per cell."""
    states, mask = states.cpu().numpy(), mask.bool().cpu().numpy()
    return [state[rows] for state, rows in zip(states, mask, strict=True)]
