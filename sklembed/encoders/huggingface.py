"""Text and vision checkpoints through transformers: pooled vectors, tokens, layers, both towers."""

import contextlib
import copy
import functools
import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sklembed.encoders.backends import Modality
from sklembed.encoders.checkpoints import Checkpoint
from sklembed.encoders.inference import Encoding

POOLINGS = ("mean", "cls", "max", "last", "pooler")

# What a batch may cost in tokens. A CPU is fastest while a batch's activations fit its caches.
_BUDGETS = {"cpu": 2048}
_BUDGET_OF_ACCELERATORS = 65536
_PIXELS_A_TOKEN = 16 * 16
_UNLIMITED = 1_000_000  # tokenizers say 1e30 where they know no limit
# What batching may change of a vector, relative to its length, by the precision of the model.
TOLERANCES = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 3e-2}
# Longer than the blocks by which some models cut texts.
_LONG_TEXT = "the dog sat under a tree, and then the cat slept on a mat, " * 5

# Vision transformers whose first token stands for the picture; others have patches alone.
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
# By which configurations name the width of the hidden states.
_WIDTHS = (
    "hidden_size",
    "d_model",
    "dim",
    "n_embd",
    "emb_dim",
    "model_dim",
    "hidden_dim",
)
# Position embeddings of these begin behind the padding token's index.
_OFFSET_POSITIONS = {
    "camembert",
    "data2vec-text",
    "longformer",
    "mpnet",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
}


@dataclass(frozen=True)
class HuggingFaceBackend:
    """A text or vision checkpoint, or one tower of a dual encoder, through transformers.

    The parameters are those of FrozenEncoder. Only `load` and `encoding` need the weights. What
    the files say is read once: an object of this class lives for one call of the encoder.
    """

    checkpoint: Checkpoint
    modality_parameter: str = "auto"
    output: str = "pooled"
    pooling_parameter: str = "auto"
    layer: int | tuple[int, ...] = -1
    layer_aggregation: str = "concat"
    max_length_parameter: int | None = None
    device: str = "auto"
    dtype: str = "auto"

    @functools.cached_property
    def modality(self) -> Modality:
        """The modality asked for, checked against what the checkpoint offers."""
        offered = self._towers()
        if self.modality_parameter == "auto":
            if len(offered) > 1:
                raise ValueError(
                    f"{self._name} encodes text and images; say which: modality='text' or "
                    "modality='image'."
                )
            return offered[0]
        if self.modality_parameter not in offered:
            raise ValueError(
                f"modality={self.modality_parameter!r}, but {self._name} "
                f"({self._config.model_type}) encodes {' and '.join(offered)}."
            )
        return self.modality_parameter

    @property
    def n_features(self) -> int:
        """Width of the vectors, from the configuration."""
        config = self._tower
        if self.output == "pooled":
            if self.pooling == "projected" and getattr(
                self._config, "projection_dim", None
            ):
                return self._config.projection_dim
            if self.pooling in (
                "projected",
                "pooler",
            ):  # SigLIP's texts have a width of their own
                return getattr(config, "projection_size", None) or self._width(
                    self._n_layers
                )
            resized = [
                step["n_features"] for step in self._head if "n_features" in step
            ]
            if resized:
                return resized[-1]
        widths = [self._width(layer) for layer in self.layers]
        return widths[0] if self.layer_aggregation == "mean" else sum(widths)

    @functools.cached_property
    def pooling(self) -> str:
        """How a sequence of vectors becomes one."""
        if self.pooling_parameter != "auto":
            return self.pooling_parameter
        if self._is_dual and self.output == "pooled":
            return "projected"
        if "pooling" in self._settings:
            return self._settings["pooling"]
        if self.modality == "text":
            return "mean"
        return "cls" if self._config.model_type in _WITH_CLASS_TOKEN else "mean"

    @functools.cached_property
    def layers(self) -> list[int]:
        """The hidden states asked for: 0 the embeddings, the number of layers the last state."""
        n_layers = self._n_layers
        wanted = [self.layer] if isinstance(self.layer, int) else list(self.layer)
        if not wanted or not all(isinstance(layer, int) for layer in wanted):
            raise ValueError(
                f"layer must be an int or a list of some; got {self.layer!r}."
            )
        for layer in wanted:
            if not -n_layers - 1 <= layer <= n_layers:
                raise ValueError(
                    f"layer={layer}, but {self._name} has hidden states 0 (the embeddings) to "
                    f"{n_layers}, or {-n_layers - 1} to -1 from the end."
                )
        return [layer % (n_layers + 1) for layer in wanted]

    @property
    def max_length(self) -> int | None:
        """Tokens after which a text is cut; None leaves it to the tokenizer and the positions."""
        most = _most_tokens(self._tower)
        if self.max_length_parameter is not None:
            if most and self.max_length_parameter > most:
                raise ValueError(
                    f"max_length={self.max_length_parameter}, but {self._name} takes at "
                    f"most {most} tokens. Leave max_length=None, or lower it."
                )
            return int(self.max_length_parameter)
        return self._settings.get("max_length")

    @property
    def grid_shape(self) -> tuple[int, int]:
        """Rows and columns of the patches, or of the feature map, that image tokens stand for.

        Raises
        ------
        ValueError
            If the model encodes text, or the grid depends on the picture.
        """
        if self.modality == "text":
            raise ValueError(
                f"{self._name} encodes text; only images have a grid of patches."
            )
        from PIL import Image

        processor = _load_image_processor(self.checkpoint)
        sizes = {
            processor(images=[Image.new("RGB", size)], return_tensors="np")[
                "pixel_values"
            ].shape
            for size in ((64, 48), (48, 96))
        }
        if len(sizes) > 1:
            raise ValueError(
                f"{self._name} keeps the proportions of a picture, so each has a grid of its own."
            )
        height, width = sizes.pop()[-2:]
        return self._grid((height, width))

    def describe(self) -> dict[str, Any]:
        """Name what changes a vector: checkpoint, tower, layers, pooling, length, precision.

        Raises
        ------
        ValueError, OSError
            If the checkpoint cannot be found, or does not offer what is asked of it.
        """
        self._check()
        description = {
            "backend": "huggingface",
            "label": self.checkpoint.name,  # for people; no part of the fingerprint
            "checkpoint": self.checkpoint.identity(),
            "remote_code": self.checkpoint.other_code()
            or self.checkpoint.runs_remote_code,
            "modality": self.modality,
            "layers": self.layers,
            "dtype": self._dtype_name,
        }
        if len(self.layers) > 1:
            description["layer_aggregation"] = self.layer_aggregation
        if self.output == "tokens":
            # Special tokens are always excluded; the entry keeps the keys of stored vectors.
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

    def weights(self) -> str:
        """Name the weights, their precision and where they lie; all else is done with them."""
        code = " by its own code" if self.checkpoint.runs_remote_code else ""
        code += "".join(
            f" of {repo}@{sha}" for repo, sha in self.checkpoint.other_code().items()
        )
        return f"{self.checkpoint.identity()}{code} in {self._dtype_name} on {self._device}"

    def load(self) -> "_Loaded":
        """Load the checkpoint, to evaluation mode, on the device."""
        from transformers import AutoModel

        self.checkpoint.check_weights()
        with _quiet():
            model, report = AutoModel.from_pretrained(
                dtype=getattr(_torch(), self._dtype_name),
                output_loading_info=True,
                **self.checkpoint.model_source(),
            )
        unused = ["lm_head"]
        if hasattr(model, "encoder") and hasattr(model, "decoder"):  # T5 and its like
            model = model.get_encoder()
            unused.append("decoder")
        absent = [
            key for key in report["missing_keys"] if not any(u in key for u in unused)
        ]
        absent += [str(key) for key in report["mismatched_keys"]]
        for config in (model.config, model.config.get_text_config()):
            if getattr(config, "use_cache", False):
                config.use_cache = (
                    False  # keys and values of all layers serve generation alone
                )
        model = model.eval().requires_grad_(False).to(self._device)
        return _Loaded(model, absent)

    def encoding(self, loaded: "_Loaded") -> Encoding:
        """Say how the loaded checkpoint encodes cells.

        Raises
        ------
        OSError
            If tokenizer files or weights are absent, which transformers would make up.
        """
        self._check_weights(loaded.absent)
        steps = self._text_steps if self.modality == "text" else self._image_steps
        prepare, cost, run = steps(loaded)
        head = [
            _head_step(step, self.checkpoint, loaded.model.device)
            for step in self._head
        ]

        def encode(prepared):
            with _torch().inference_mode():
                states, keep = run(prepared)
                if self.output == "tokens":
                    return _ragged(_combine(states, self.layer_aggregation), keep)
                if self.pooling not in ("projected", "pooler"):
                    states = [_pool(state, keep, self.pooling) for state in states]
                vectors = _combine(states, self.layer_aggregation)
                for step in head:
                    vectors = step(vectors)
                return vectors.cpu().numpy()

        def forward(prepared):
            if len(prepared) == 1:
                return encode(prepared)
            if self not in loaded.batchings:
                loaded.batchings[self] = self._find_batching(encode, prepare)
            return _encode_in_groups(encode, prepared, loaded.batchings[self])

        budget = _BUDGETS.get(loaded.model.device.type, _BUDGET_OF_ACCELERATORS)
        return Encoding(forward, prepare, cost, budget)

    def _find_batching(self, encode, prepare) -> str:
        """Find out by trial which cells may share a batch: any, those of one length, or none.

        A model may ignore the attention mask or mix padding into short texts; another may mix the
        cells of a batch, as by statistics of the batch. Neither says so in its configuration.

        Raises
        ------
        ValueError
            If the model gives a cell another vector each time.
        """
        first, longer = prepare(_trial_cells(self.modality))
        if self.modality == "text" and _length(first) == _length(
            longer
        ):  # a small max_length
            (first,) = prepare([""])
        alone = encode([first])[0]

        def is_unchanged(
            batch,
        ):  # its last cell, as some models read the first cell's mask for all
            beside = encode(batch)[-1]
            error = (
                np.linalg.norm(beside - alone)
                if beside.shape == alone.shape
                else np.inf
            )
            return error <= TOLERANCES[self._dtype_name] * max(
                np.linalg.norm(alone), 1e-12
            )

        if is_unchanged([longer, first]):
            return "any"
        if self.modality == "text":
            n_tokens = _length(first)
            cut = {name: values[:n_tokens] for name, values in longer.items()}
            if is_unchanged([cut, first]):
                return "one length"
        if is_unchanged([first]):
            return "none"
        raise ValueError(
            f"{self._name} ({self._config.model_type}) gives the same cell another vector each "
            "time, so its vectors cannot be stored. Choose another checkpoint."
        )

    def _text_steps(self, loaded):
        """Return how texts are tokenised, what they cost, and how the model runs on them."""
        tokenizer = loaded.tokenizer(self.checkpoint)
        prompt, lower_case = (
            self._settings.get("prompt", ""),
            self._settings.get("lower_case"),
        )
        limits = [
            self.max_length or tokenizer.model_max_length,
            _most_tokens(self._tower),
        ]
        max_length = min(limit for limit in [*limits, _UNLIMITED] if limit is not None)
        n_special = tokenizer.num_special_tokens_to_add()
        if max_length <= n_special:
            raise ValueError(
                f"max_length={max_length} leaves no room for a text: {self._name} adds {n_special} "
                "special tokens to each."
            )
        # SigLIP reads the last position, and was trained with every text padded to full length.
        whole = self._config.model_type.startswith("siglip")
        skipped = (
            0
            if self._settings.get("pool_prompt", True)
            else _prompt_length(tokenizer, prompt)
        )
        fillers = (
            tokenizer.pad_token_id,
            tokenizer.eos_token_id,
            0,
        )  # masked: any will do
        padding = {
            "input_ids": next(token for token in fillers if token is not None),
            "token_type_ids": tokenizer.pad_token_type_id,
            "attention_mask": 0,
            "special_tokens_mask": 1,
        }
        empty = padding | {"attention_mask": 1}

        def prepare(texts):
            texts = [prompt + text for text in texts]
            with loaded.tokenizing:  # a fast tokenizer refuses two threads at once
                columns = tokenizer(
                    [text.lower() for text in texts] if lower_case else texts,
                    padding="max_length" if whole else False,
                    truncation=max_length < _UNLIMITED,
                    max_length=max_length if max_length < _UNLIMITED else None,
                    return_attention_mask=True,
                    return_special_tokens_mask=True,
                )
            names = [name for name in padding if name in columns]
            # Where a tokenizer adds no special tokens, an empty text has no token at all.
            return [
                {name: columns[name][i] or [empty[name]] for name in names}
                for i in range(len(texts))
            ]

        def run(prepared):
            inputs = {
                name: _pad(
                    [cell[name] for cell in prepared],
                    padding[name],
                    loaded.model.device,
                )
                for name in prepared[0]
            }
            special, keep = (
                inputs.pop("special_tokens_mask"),
                inputs["attention_mask"].clone(),
            )
            if whole:
                del inputs["attention_mask"]
            longer = (
                keep.sum(1) > skipped
            )  # what is cut within the prompt is all there is
            keep[longer, :skipped] = 0
            if self.output == "tokens":
                keep *= 1 - special
            states = self._states(loaded.model, inputs)
            if states[0].ndim == 3 and states[0].shape[1] != keep.shape[1]:
                raise ValueError(
                    f"{self._name} ({self._config.model_type}) returns {states[0].shape[1]} "
                    f"vectors for {keep.shape[1]} tokens, so they cannot be pooled here. Wrap the "
                    "model in a CallableBackend."
                )
            return states, keep

        return prepare, _length, run

    def _image_steps(self, loaded):
        """Return how pictures become pixels, what they cost, and how the model runs on them."""
        processor, model = loaded.image_processor(self.checkpoint), loaded.model

        def prepare(pictures):
            return [
                processor(images=[picture], return_tensors="np")["pixel_values"][0]
                for picture in pictures
            ]

        def run(prepared):
            torch = _torch()
            if len({pixels.shape for pixels in prepared}) > 1:
                raise ValueError(
                    f"{self._name} keeps the proportions of pictures, so that they do not fit "
                    "into one batch. Pass batch_size=1, or give its processor a fixed size."
                )
            pixels = torch.from_numpy(np.stack(prepared)).to(model.device, model.dtype)
            states = self._states(model, {"pixel_values": pixels})
            if self.output == "pooled":
                return states, None
            n_tokens, n_special = (
                states[0].shape[1],
                self._count_special_tokens(pixels, states[0]),
            )
            keep = torch.ones(
                len(prepared), n_tokens, dtype=torch.long, device=model.device
            )
            keep[:, :n_special] = 0  # special tokens come before the patches
            return states, keep

        return prepare, _length, run

    def _count_special_tokens(self, pixels, states) -> int:
        """Count the class and register tokens, and make sure that the rest is the grid."""
        rows, columns = self._grid(pixels.shape[-2:])
        kind, expected = self._tower.model_type, 0
        if kind in _WITH_CLASS_TOKEN:
            expected = (
                1
                + (getattr(self._tower, "num_register_tokens", 0) or 0)
                + (kind == "deit")
            )
        if states.shape[1] != expected + rows * columns:
            raise ValueError(
                f"{self._name} ({kind}) makes {states.shape[1]} tokens of a picture, which are not "
                f"{expected} special ones and a grid of {rows} x {columns}. Wrap the model in a "
                "CallableBackend that returns the tokens you want."
            )
        return expected

    def _states(self, model, inputs):
        """Run the model or the tower; return (batch, tokens, dim) states, or its own vector."""
        if self.pooling == "projected":
            run = (
                model.get_text_features
                if self.modality == "text"
                else model.get_image_features
            )
            output = run(**inputs)  # in transformers 5 the vector is a field of it
            return [getattr(output, "pooler_output", output).float()]
        if self._is_dual:
            model = model.text_model if self.modality == "text" else model.vision_model
        if self.pooling == "pooler":
            vector = getattr(model(**inputs), "pooler_output", None)
            if vector is None:
                raise ValueError(
                    f"pooling='pooler', but {self._name} ({self._config.model_type}) has no pooled "
                    "vector of its own. Pass pooling='mean', 'cls' or 'last'."
                )
            return [vector.float().flatten(1)]
        if self.layers == [self._n_layers]:
            return [_as_sequence(model(**inputs).last_hidden_state)]
        output = model(output_hidden_states=True, **inputs)
        if len(output.hidden_states) != self._n_layers + 1:
            raise ValueError(
                f"{self._name} ({self._config.model_type}) returned {len(output.hidden_states)} "
                f"hidden states, and {self._n_layers + 1} were expected. Leave layer=-1."
            )
        states = [*output.hidden_states[: self._n_layers], output.last_hidden_state]
        return [_as_sequence(states[layer]) for layer in self.layers]

    def _check(self) -> None:
        """Refuse what the checkpoint cannot do, and what would silently have no effect."""
        kind = self._config.model_type
        if kind in _RANDOM:
            raise ValueError(
                f"{self._name} ({kind}) masks patches at random, so a picture has no vector of "
                "its own. Choose another checkpoint."
            )
        if self.checkpoint.file("adapter_config.json", optional=True) is not None:
            raise ValueError(
                f"{self._name} has an adapter, which changes vectors only where peft is installed. "
                "Load it with peft, merge it into the model and save that: "
                "model.merge_and_unload().save_pretrained(directory)."
            )
        if kind == "big_bird" and self._config.attention_type == "block_sparse":
            raise ValueError(
                f"{self._name} (big_bird) changes its attention for good at the first short text. "
                "Save it with attention_type='original_full'."
            )
        rope = getattr(self._tower, "rope_parameters", None) or {}
        short = rope.get("original_max_position_embeddings") or 0
        if (
            rope.get("rope_type") == "longrope"
            and (self.max_length or short + 1) > short
        ):
            raise ValueError(
                f"{self._name} ({kind}) encodes a text differently beside one of more than {short} "
                f"tokens. Pass max_length={short}."
            )
        if self.modality == "image" and self.max_length_parameter is not None:
            raise ValueError("max_length would have no effect: the cells are images.")
        if self._is_hierarchical and self.layers != [self._n_layers]:
            raise ValueError(
                f"layer={self.layer}, but the widths and grids of the stages of {self._name} "
                f"({kind}) are not known here; leave layer=-1."
            )
        if self.output == "tokens":
            if self.pooling_parameter != "auto":
                raise ValueError(
                    f"pooling={self.pooling_parameter!r} would have no effect with output='tokens'."
                )
            if self.modality == "image" and self._cell_size is None:
                raise ValueError(
                    f"The patches of {self._name} ({kind}) cannot be told from its configuration; "
                    "wrap the model in a CallableBackend."
                )
        if self.pooling in ("projected", "pooler") and self.layers != [self._n_layers]:
            raise ValueError(
                f"layer={self.layer}, but pooling={self.pooling_parameter!r} takes the model's own "
                "vector, which comes after all layers. Pass pooling='mean' or 'cls'."
            )
        widths = {self._width(layer) for layer in self.layers}
        if len(widths) > 1 and (
            self.layer_aggregation == "mean" or self.output == "tokens"
        ):
            raise ValueError(
                f"The layers {self.layer} of {self._name} differ in width or in grid; pool them "
                "with layer_aggregation='concat', or choose one."
            )

    def _check_weights(self, absent) -> None:
        """Refuse weights that transformers made up, unless nothing is done with them."""
        if not self._is_dual and self.pooling != "pooler":
            absent = [key for key in absent if "pooler" not in key]
        if absent:
            raise OSError(
                f"{self._name} lacks {len(absent)} weights of its architecture, such as "
                f"{absent[:2]}; they would be made up at random. Save the whole model by "
                "save_pretrained."
            )

    def _towers(self) -> list[Modality]:
        config = self._config
        if self._is_dual:
            return ["text", "image"]
        if hasattr(config, "vision_config") or not (
            hasattr(config, "num_channels") or hasattr(config, "vocab_size")
        ):
            raise ValueError(
                f"{self._name} ({config.model_type}) is neither a text model, a vision model nor a "
                "dual encoder of both with a common space. Wrap it in a CallableBackend."
            )
        return ["image"] if hasattr(config, "num_channels") else ["text"]

    def _width(self, layer: int) -> int:
        """Find the width of a hidden state in the configuration."""
        config = self._tower
        is_last = layer == self._n_layers
        if is_last and getattr(config, "neck_hidden_sizes", None):  # MobileViT
            return config.neck_hidden_sizes[-1]
        if is_last and getattr(config, "word_embed_proj_dim", None):  # OPT
            return config.word_embed_proj_dim
        if self._is_convolutional:
            widths = [getattr(config, "embedding_size", config.hidden_sizes[0])]
            return [*widths, *config.hidden_sizes][layer]
        for named in (config, config.get_text_config()):
            for name in _WIDTHS:
                if isinstance(getattr(named, name, None), int):
                    return getattr(named, name)
        if is_last and self.modality == "image" and not self._is_dual:
            width = _measure_width(self.checkpoint, self.checkpoint.identity())
            if width is not None:
                return width
        raise ValueError(
            f"The width of the vectors of {self._name} ({config.model_type}) cannot be read from "
            "its configuration; wrap the model in a CallableBackend."
        )

    def _grid(self, size) -> tuple[int, int]:
        """Count the rows and columns of patches, or of the feature map, in pixels of a size."""
        if self._is_convolutional or self._is_hierarchical:  # which pad the last cell
            return tuple(-(-length // self._cell_size) for length in size)
        return tuple(length // self._cell_size for length in size)

    @functools.cached_property
    def _cell_size(self) -> int | None:
        """Pixels from one token of a picture to the next; None where the configuration is mute."""
        config = self._tower
        if self._is_convolutional:
            return 32 >> (self._n_layers - self.layers[0])
        patch = getattr(config, "patch_size", None)
        patch = patch[0] if isinstance(patch, list | tuple) else patch
        return patch and patch << (
            len(config.depths) - 1 if self._is_hierarchical else 0
        )

    @functools.cached_property
    def _n_layers(self) -> int:
        config = self._tower
        if self._is_convolutional:
            return len(config.hidden_sizes)
        return getattr(config, "num_hidden_layers", None) or 0

    @functools.cached_property
    def _is_convolutional(self) -> bool:
        return bool(getattr(self._tower, "hidden_sizes", None))

    @functools.cached_property
    def _is_hierarchical(self) -> bool:
        """Tell transformers that merge patches from stage to stage, as Swin does."""
        return hasattr(self._tower, "depths") and not self._is_convolutional

    @functools.cached_property
    def _is_dual(self) -> bool:
        """Tell an encoder of texts and images from a generative model that reads both."""
        config = self._config
        return (
            hasattr(config, "text_config")
            and hasattr(config, "vision_config")
            and (
                hasattr(config, "projection_dim")
                or config.model_type.startswith("siglip")
            )
        )

    @functools.cached_property
    def _tower(self):
        """The configuration of the model, or of the dual encoder's tower that is asked for."""
        if not self._is_dual:
            return self._config
        return (
            self._config.text_config
            if self.modality == "text"
            else self._config.vision_config
        )

    @functools.cached_property
    def _head(self) -> list[dict[str, Any]]:
        """What sentence-transformers files do to a pooled vector.

        Dense layers are trained for the files' own pooling, and left out for another.
        """
        if self.output == "tokens":
            return []
        steps = self._settings.get("head", [])
        if self.pooling != self._settings.get("pooling") or self.layers != [
            self._n_layers
        ]:
            return [step for step in steps if step["kind"] == "normalize"]
        return steps

    @property
    def _name(self) -> str:
        return repr(self.checkpoint.model)

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
    def _dtype_name(self) -> str:
        from sklembed._torch import resolve_dtype

        return str(resolve_dtype(self.dtype, self._device)).removeprefix("torch.")


@dataclass
class _Loaded:
    """A model on its device, and what prepares cells for it, loaded when first asked for.

    A checkpoint may lie in several places. What prepares is read where the encoder that asks has
    found it: elsewhere it may have been changed since the model was loaded.
    """

    model: Any
    absent: list[str]  # weights that the checkpoint lacks
    batchings: dict[Any, str] = field(
        default_factory=dict
    )  # backend -> cells that share a batch
    tokenizing: threading.Lock = field(default_factory=threading.Lock)
    _tokenizer: Any = None
    _image_processor: Any = None

    def tokenizer(self, checkpoint):
        if self._tokenizer is None:
            self._tokenizer = _load_tokenizer(checkpoint)
        return self._tokenizer

    def image_processor(self, checkpoint):
        if self._image_processor is None:
            self._image_processor = _load_image_processor(checkpoint)
        return self._image_processor


@functools.lru_cache(maxsize=64)
def _measure_width(checkpoint, identity) -> int | None:
    """Run an image model without its weights, where its configuration does not name the width."""
    from transformers import AutoModel

    config = copy.deepcopy(checkpoint.config())
    size = getattr(config, "image_size", None) or 224
    size = (size, size) if isinstance(size, int) else size
    torch = _torch()
    try:
        with _quiet(), torch.device("meta"), torch.inference_mode():
            model = AutoModel.from_config(
                config, trust_remote_code=checkpoint.trust_remote_code
            )
            pixels = torch.empty(1, config.num_channels, *size)
            states = model.eval()(pixel_values=pixels).last_hidden_state
    except Exception:  # of any architecture; the caller says what to do
        return None
    return _as_sequence(states).shape[-1]


def _load_tokenizer(checkpoint):
    from transformers import AutoTokenizer

    checkpoint.check_tokenizer()
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(**checkpoint.source())
    except (
        KeyError,
        TypeError,
        ValueError,
    ) as error:  # of a tokenizer class without its files
        reason = " ".join(str(error).split())
        raise OSError(
            f"The tokenizer of {checkpoint.model!r} cannot be loaded. Save it beside the model: "
            f"tokenizer.save_pretrained(directory). (transformers says: {reason})"
        ) from error
    # Where the files are absent, transformers makes one that knows no word and says nothing.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise OSError(
            f"{checkpoint.model!r} holds no tokenizer files, without which every text looks alike. "
            "Save the tokenizer beside the model: tokenizer.save_pretrained(directory)."
        )
    return tokenizer


def _trial_cells(modality) -> list:
    """Return a short text and a long one, or two images."""
    if modality == "text":
        return ["a", _LONG_TEXT]
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    return [Image.fromarray(pixels), Image.fromarray(255 - pixels[::-1])]


def _length(prepared) -> int:
    """Count the tokens of a prepared text, or what an image costs in tokens."""
    if isinstance(prepared, dict):
        return len(prepared["input_ids"])
    return max(1, prepared[0].size // _PIXELS_A_TOKEN)


def _encode_in_groups(encode, prepared, batching: str):
    """Encode cells together as far as they may share a batch; keep their order."""
    if batching == "any":
        return encode(prepared)
    groups: dict[int, list[int]] = {}
    for position, cell in enumerate(prepared):
        group = _length(cell) if batching == "one length" else position
        groups.setdefault(group, []).append(position)
    values = [None] * len(prepared)
    for positions in groups.values():
        encoded = encode([prepared[position] for position in positions])
        for position, value in zip(positions, encoded, strict=True):
            values[position] = value
    return values if encoded[0].ndim == 2 else np.stack(values)


def _prompt_length(tokenizer, prompt: str) -> int:
    """Count the tokens of a prompt, without the one that ends a text."""
    ids = tokenizer(prompt)["input_ids"]
    return len(ids) - (bool(ids) and ids[-1] in tokenizer.all_special_ids)


def _load_image_processor(checkpoint):
    from transformers import AutoImageProcessor

    checkpoint.check_image_processor()
    # Pillow resizes alike on every machine; torchvision, where present, would not.
    return AutoImageProcessor.from_pretrained(backend="pil", **checkpoint.source())


def _head_step(step, checkpoint, device):
    """Make a function of one step that sentence-transformers files apply to pooled vectors."""
    torch = _torch()
    if step["kind"] == "normalize":
        return lambda vectors: torch.nn.functional.normalize(vectors, dim=1)
    if step["kind"] == "truncate":
        return lambda vectors: vectors[:, : step["n_features"]]
    weights = checkpoint.tensors(step["path"])
    if "linear.weight" not in weights:
        raise OSError(
            f"The weights in the folder {step['path']!r} of {checkpoint.model!r} lack "
            f"'linear.weight'; they are {list(weights)}. Download the whole model again."
        )
    weights = {name: tensor.to(device).float() for name, tensor in weights.items()}
    activation = getattr(torch.nn, step["activation"])()
    return lambda vectors: activation(
        torch.nn.functional.linear(
            vectors, weights["linear.weight"], weights.get("linear.bias")
        )
    )


def _most_tokens(config) -> int | None:
    """Find how many tokens a model has positions for, where it says so."""
    most = max(getattr(config, "max_position_embeddings", None) or 0, 0) or None
    if most and config.model_type in _OFFSET_POSITIONS:
        most -= config.pad_token_id + 1
    return most


@contextlib.contextmanager
def _quiet():
    """Keep transformers from printing a bar and a report for every model that a worker loads.

    What the report says of weights that are used and absent is an error of ours.
    """
    from transformers.utils import logging

    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(max(verbosity, logging.ERROR))
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


def _torch():
    """Import torch when a model is about to run, and not before."""
    import torch

    return torch


def _pad(rows, value, device):
    """Stack rows of different lengths, padded on the right: on the left, positions would shift."""
    torch = _torch()
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, True, value).to(
        device
    )  # (batch, tokens)


def _as_sequence(states):
    """Lay out a convolutional network's (batch, dim, height, width) as (batch, tokens, dim)."""
    states = states.float()
    return states.flatten(2).transpose(1, 2) if states.ndim == 4 else states


def _pool(states, keep, pooling: str):
    """Reduce (batch, tokens, dim) to (batch, dim), leaving out what `keep` marks by 0."""
    torch = _torch()
    if keep is None:
        keep = torch.ones(states.shape[:2], device=states.device)
    keep = keep.to(states.dtype)  # (batch, tokens)
    rows = torch.arange(len(states), device=states.device)
    if pooling == "cls":
        return states[rows, keep.argmax(dim=1)]
    if pooling == "last":
        return states[rows, keep.shape[1] - 1 - keep.flip(1).argmax(dim=1)]
    if pooling == "max":
        return states.masked_fill(keep[..., None] == 0, float("-inf")).amax(dim=1)
    if pooling == "weightedmean":
        keep = keep * torch.arange(1, keep.shape[1] + 1, device=keep.device)
    n_tokens = keep.sum(dim=1, keepdim=True)
    total = (states * keep[..., None]).sum(dim=1)
    return total / (n_tokens.sqrt() if pooling == "mean_sqrt_len" else n_tokens)


def _combine(states, aggregation: str):
    """Join the vectors of several layers, or average them."""
    torch = _torch()
    return (
        torch.stack(states).mean(0)
        if aggregation == "mean"
        else torch.cat(states, dim=-1)
    )


def _ragged(states, keep):
    """Split (batch, tokens, dim) into an array (T_i, dim) a cell, of the tokens to keep."""
    states, keep = states.cpu().numpy(), keep.bool().cpu().numpy()
    return [state[kept] for state, kept in zip(states, keep, strict=True)]
