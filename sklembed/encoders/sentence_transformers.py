"""Settings in the files of sentence-transformers and model2vec: pooling, prompt, head."""

import functools
import json
from pathlib import Path
from typing import Any

# Activations of Dense modules of sentence-transformers, by their names in torch.nn.
_ACTIVATIONS = {"GELU", "Identity", "ReLU", "SiLU", "Sigmoid", "Tanh"}
# Names that sentence-transformers gives the pooled vector.
_POOLED = {None, "sentence_embedding"}
_POOLINGS = {
    "cls": "cls",
    "max": "max",
    "mean": "mean",
    "mean_sqrt_len": "mean_sqrt_len",
    "weightedmean": "weightedmean",
    "lasttoken": "last",
}
_MODEL2VEC_MAX_LENGTH = 512  # of models without the setting
# Keys of sentence-transformers files that do not change vectors. Keys that are neither here
# nor handled below raise an error that names them, unless their value is empty.
_IGNORED_TRANSFORMER_KEYS = {
    "backend",
    "cache_dir",
    "document_length",  # this and the next two: encode_query and encode_document
    "query_expansion",
    "query_length",
    "module_output_name",  # repeats modality_config
    "unpad_inputs",
}
_IGNORED_ARGUMENTS = {
    "add_pooling_layer",
    "attn_implementation",
    "cache_dir",
    "clean_up_tokenization_spaces",
    "device_map",
    "dtype",
    "local_files_only",
    "low_cpu_mem_usage",
    "padding_side",
    "revision",
    "subfolder",  # sentence-transformers overrides it
    "token",
    "torch_dtype",
    "trust_remote_code",  # the parameter of the encoder decides
    "use_auth_token",
    "use_cache",
    "use_fast",
    "use_safetensors",
}
_IGNORED_MODEL_KEYS = {
    "__version__",
    "prompts",
    "default_prompt_name",
    "similarity_fn_name",
}
# Arguments of the model, the configuration and the tokenizer, by their old and new names.
_ARGUMENTS = ("model_args", "model_kwargs", "config_args", "config_kwargs")
_TOKENIZER_ARGUMENTS = ("tokenizer_args", "processor_kwargs")
# Values, in JSON, of disabled settings and of arguments that are not passed.
_UNSET = {"null", "false", '""', "[]", "{}"}
_NO_ARGUMENT = {"null"}
# A model returns token vectors, which a Pooling module reduces, or is run by a tower.
_TOKEN_VECTORS = ("forward", "last_hidden_state")
_TOWERS = {"text": "get_text_features", "image": "get_image_features"}
# sentence-transformers names the settings of the first module by one of these.
_TRANSFORMER_KINDS = (
    "bert roberta distilbert camembert albert xlm-roberta xlnet".split()
)


@functools.lru_cache(maxsize=64)
def read_sentence_transformer(checkpoint, identity) -> dict[str, Any]:
    """Read the settings of a checkpoint of text models, once for each identity."""
    modules = checkpoint.read_json("modules.json")
    if modules is None:
        _check_no_module_files(checkpoint)
        return {}
    settings = _read_transformer_settings(checkpoint) | _read_prompt(checkpoint)
    head = []  # steps after the pooling
    for i, module in enumerate(modules):
        kind, path = _module_kind(checkpoint, module, i), module["path"]
        if kind == "Pooling":
            if head or "pooling" in settings:
                raise _unsupported(checkpoint, f"a Pooling module at position {i}")
            settings |= _read_pooling(checkpoint, f"{path}/config.json")
        elif kind == "Normalize":
            head.append(_read_normalize(checkpoint, f"{path}/config.json"))
        elif kind == "Dense":
            head.append(_read_dense(checkpoint, path))
        elif kind not in ("Transformer", "Dropout"):
            raise _unsupported(checkpoint, f"a {kind} module")
    if "truncate_dim" in settings:
        head.append({"kind": "truncate", "n_features": settings.pop("truncate_dim")})
    if not settings.pop("has_towers") and "pooling" not in settings:
        raise _unsupported(checkpoint, "no Pooling module")
    return settings | {"head": head}


@functools.lru_cache(maxsize=64)
def read_static_embedding(checkpoint, identity) -> dict[str, Any]:
    """Read the settings of static token embeddings, once for each identity.

    They are a model2vec checkpoint, or one that only sentence-transformers can read.
    model2vec writes the files of both libraries, and its own rules then apply.
    """
    config = checkpoint.read_json("config.json")
    if config is not None:
        return {
            "library": "model2vec",
            "folder": "",
            "max_length": config.get("max_length", _MODEL2VEC_MAX_LENGTH),
            "head": [{"kind": "normalize"}] if config.get("normalize") else [],
        }
    first, *modules = _read_required(checkpoint, "modules.json")
    settings = {"library": "sentence-transformers", "folder": first["path"]}
    settings |= _read_prompt(checkpoint)
    head = []
    for i, module in enumerate([first, *modules]):
        kind = _module_kind(checkpoint, module, i, first="StaticEmbedding")
        if kind == "Normalize":
            head.append(_read_normalize(checkpoint, f"{module['path']}/config.json"))
        elif i > 0:
            raise _unsupported(checkpoint, f"a {kind} module after StaticEmbedding")
    if "truncate_dim" in settings:
        head.append({"kind": "truncate", "n_features": settings.pop("truncate_dim")})
    return settings | {"head": head}


def is_static_embedding(modules) -> bool:
    """Return whether the first module is a StaticEmbedding."""
    first = next(iter(modules or []), {})
    return first.get("type", "").endswith(".StaticEmbedding")


def _module_kind(checkpoint, module, position, first="Transformer") -> str:
    """Return the class of a module; the first module only must be of the class `first`."""
    package, _, kind = module["type"].rpartition(".")
    if package.split(".")[0] != "sentence_transformers":
        raise _unsupported(checkpoint, f"a custom module, {module['type']}")
    if (kind == first) != (position == 0):
        raise _unsupported(checkpoint, f"a {kind} module at position {position}")
    if kind == "Transformer" and module["path"]:
        raise _unsupported(checkpoint, f"its Transformer in {module['path']!r}")
    return kind


def _check_no_module_files(checkpoint) -> None:
    """Check that a directory without modules.json has no other sentence-transformers files.

    Without modules.json the pooling would be unknown. A commit of the hub is complete.
    """
    if not checkpoint.is_directory:
        return
    leftovers: list[str] = []
    for pattern in (
        "*_Pooling",
        "config_sentence_transformers.json",
        "sentence_*_config.json",
    ):
        leftovers += [path.name for path in Path(checkpoint.place).glob(pattern)]
    if leftovers:
        raise OSError(
            f"{checkpoint.model!r} has {leftovers[0]!r} of a sentence-transformers model, but "
            "no modules.json, which defines its pooling. Download the complete model again, "
            f"or, to use the transformer alone, remove {', '.join(leftovers)}."
        )


def _read_transformer_settings(checkpoint) -> dict[str, Any]:
    """Read the settings of the first module, a Transformer."""
    name, config = _find_transformer_config(checkpoint)
    if not config:
        return {"has_towers": False}
    handled = {"max_seq_length", "do_lower_case", "modality_config", "transformer_task"}
    handled |= {*_ARGUMENTS, *_TOKENIZER_ARGUMENTS, *_IGNORED_TRANSFORMER_KEYS}
    _check_settings(checkpoint, name, config, handled)
    task = config.get("transformer_task", "feature-extraction")
    if task != "feature-extraction":
        raise _unsupported(checkpoint, f"the transformer_task {task!r}")
    for key in _ARGUMENTS:
        arguments, source = config.get(key), f"{key} of {name}"
        _check_settings(checkpoint, source, arguments, _IGNORED_ARGUMENTS, _NO_ARGUMENT)
    max_length = config.get("max_seq_length")
    for key in _TOKENIZER_ARGUMENTS:
        arguments, source = dict(config.get(key) or {}), f"{key} of {name}"
        if arguments.get("truncation_side") == "right":  # the default
            del arguments["truncation_side"]
        handled = _IGNORED_ARGUMENTS | {"model_max_length"}
        _check_settings(checkpoint, source, arguments, handled, _NO_ARGUMENT)
        max_length = arguments.get("model_max_length", max_length)
    return {
        "max_length": max_length,
        "lower_case": bool(config.get("do_lower_case", False)),
        "has_towers": _has_towers(checkpoint, config.get("modality_config") or {}),
    }


def _find_transformer_config(checkpoint):
    """Return name and content of the first module's settings; the name varies by release."""
    for kind in _TRANSFORMER_KINDS:
        name = f"sentence_{kind}_config.json"
        config = checkpoint.read_json(name)
        if config:
            return name, config
    return None, None


def _has_towers(checkpoint, modality_config) -> bool:
    """Return whether towers with a pooler run the model; other methods are not supported."""
    methods = []
    for modality, tower in _TOWERS.items():
        entry = modality_config.get(modality)
        if entry is None:
            continue
        method = (entry.get("method"), entry.get("method_output_name"))
        if method not in (_TOKEN_VECTORS, (tower, "pooler_output"), (tower, None)):
            raise _unsupported(checkpoint, f"modality_config {modality}: {entry}")
        methods.append(method)
    if modality_config and not methods:
        raise _unsupported(checkpoint, f"modality_config {modality_config}")
    return any(method != _TOKEN_VECTORS for method in methods)


def _read_prompt(checkpoint) -> dict[str, Any]:
    file = "config_sentence_transformers.json"
    config = checkpoint.read_json(file) or {}
    handled = _IGNORED_MODEL_KEYS | {"model_type", "truncate_dim"}
    _check_settings(checkpoint, file, config, handled)
    if config.get("model_type") not in (None, "SentenceTransformer"):
        raise _unsupported(checkpoint, f"the model_type {config['model_type']!r}")
    settings = {}
    name = config.get("default_prompt_name")
    if name is not None:
        # sentence-transformers defines these two names in every model.
        prompts = {"query": "", "document": ""} | (config.get("prompts") or {})
        if name not in prompts:
            raise _unsupported(
                checkpoint,
                f"default_prompt_name={name!r}, which is not among its prompts {list(prompts)},",
            )
        settings["prompt"] = prompts[name]
    if config.get("truncate_dim"):
        settings["truncate_dim"] = config["truncate_dim"]
    return settings


def _read_pooling(checkpoint, name) -> dict[str, Any]:
    config = _read_required(checkpoint, name)
    active = [m for m in config if m.startswith("pooling_mode_") and config[m] is True]
    handled = {
        "word_embedding_dimension",
        "embedding_dimension",
        "pooling_mode",
        "include_prompt",
    }
    _check_settings(checkpoint, name, config, handled | set(active))
    if not active and not handled.intersection(config):
        raise OSError(
            f"The file {name!r} of {checkpoint.model!r} specifies no pooling: {config}."
        )
    modes = config.get("pooling_mode") or active or ["mean"]
    if isinstance(modes, str):
        modes = [modes]
    mode = modes[0].removeprefix("pooling_mode_")
    mode = mode.removesuffix("_tokens").removesuffix("_token")
    if len(modes) != 1 or mode not in _POOLINGS:
        raise _unsupported(checkpoint, f"the pooling {', '.join(modes)}")
    return {
        "pooling": _POOLINGS[mode],
        "pool_prompt": config.get("include_prompt", True),
    }


def _read_normalize(checkpoint, name) -> dict[str, Any]:
    """Read a Normalize module; older releases of sentence-transformers wrote no file."""
    config = checkpoint.read_json(name, optional=True) or {}
    names = {config.get("module_input_name"), config.get("module_output_name")}
    if not names <= _POOLED:
        raise _unsupported(checkpoint, f"a Normalize module of the kind {config}")
    return {"kind": "normalize"}


def _read_dense(checkpoint, path) -> dict[str, Any]:
    """Read the shape of a dense layer; its weights are loaded with the model."""
    name = f"{path}/config.json"
    config = _read_required(checkpoint, name)
    activation = config.get("activation_function", "torch.nn.Tanh")
    package, _, activation = activation.rpartition(".")
    names = {config.get("module_input_name"), config.get("module_output_name")}
    is_known = package.split(".")[0] == "torch" and activation in _ACTIVATIONS
    if not is_known or config.get("use_residual") or not names <= _POOLED:
        raise _unsupported(checkpoint, f"a Dense module of the kind {config}")
    handled = {"in_features", "out_features", "bias", "activation_function"}
    handled |= {"module_input_name", "module_output_name"}
    _check_settings(checkpoint, name, config, handled)
    if not isinstance(config.get("out_features"), int):
        raise OSError(
            f"The file {name!r} of {checkpoint.model!r} specifies no out_features: {config}."
        )
    return {
        "kind": "dense",
        "path": path,
        "n_features": config["out_features"],
        "activation": activation,
    }


def _check_settings(checkpoint, source, settings, handled, unset=_UNSET) -> None:
    """Raise an error that names the first setting with an unsupported effect."""
    for key, value in (settings or {}).items():
        if key not in handled and json.dumps(value) not in unset:
            raise _unsupported(checkpoint, f"{key}={value!r} in {source}")


def _read_required(checkpoint, name):
    """Read a file that modules.json lists."""
    config = checkpoint.read_json(name)
    if config is None:
        raise checkpoint.missing_file(name, "modules.json")
    return config


def wrapping_advice(checkpoint) -> str:
    """Return how to use a model of sentence-transformers that is not supported."""
    return (
        f"Wrap it: CallableBackend(lambda: SentenceTransformer({checkpoint.model!r}).encode, "
        "name=..., version=..., modality=..., n_features=...)."
    )


def _unsupported(checkpoint, feature) -> ValueError:
    return ValueError(
        f"{checkpoint.model!r} is a sentence-transformers model with {feature}, which is not "
        f"supported. {wrapping_advice(checkpoint)}"
    )
