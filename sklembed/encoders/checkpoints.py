"""What a checkpoint says of itself without its weights: identity, configuration, files."""

import functools
import json
import os
import zipfile
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

# What a Dense module of sentence-transformers may apply, by their names in torch.nn.
_ACTIVATIONS = {"GELU", "Identity", "ReLU", "SiLU", "Sigmoid", "Tanh"}
_POOLED = {None, "sentence_embedding"}
_POOLINGS = {
    "cls": "cls",
    "max": "max",
    "mean": "mean",
    "mean_sqrt_len": "mean_sqrt_len",
    "weightedmean": "weightedmean",
    "lasttoken": "last",
}
# Where transformers looks for weights, in its order.
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_VOCABULARIES = (
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)
_IMAGE_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")

# Keys of sentence-transformers files that no vector of ours depends on. Keys that are neither here
# nor handled below are refused by name, unless their value is empty.
_HARMLESS_OF_TRANSFORMER = {
    "backend",
    "cache_dir",
    "document_length",  # these three are for encode_query and encode_document
    "query_expansion",
    "query_length",
    "module_output_name",  # modality_config says the same
    "unpad_inputs",
}
_HARMLESS_ARGUMENTS = {
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
    "subfolder",  # sentence-transformers puts its own in place of it
    "token",
    "torch_dtype",
    "trust_remote_code",  # only the encoder's parameter allows it
    "use_auth_token",
    "use_cache",
    "use_fast",
    "use_safetensors",
}
_HARMLESS_OF_MODEL = {
    "__version__",
    "prompts",
    "default_prompt_name",
    "similarity_fn_name",
}
# Arguments for the model, the tokenizer and the configuration, by their old and new names.
_ARGUMENTS = ("model_args", "model_kwargs", "config_args", "config_kwargs")
_TOKENIZER_ARGUMENTS = ("tokenizer_args", "processor_kwargs")
# Values, in JSON, of settings that are switched off, and of arguments that are not passed.
_UNSET = {"null", "false", '""', "[]", "{}"}
_NO_ARGUMENT = {"null"}
# How a model is run: to the vectors of tokens, which a Pooling module reduces, or by a tower.
_TOKEN_VECTORS = ("forward", "last_hidden_state")
_TOWERS = {"text": "get_text_features", "image": "get_image_features"}

# The owners of models that are often named without one.
_OWNERS = {
    "all-": "sentence-transformers",
    "bge-": "BAAI",
    "clip-vit-": "openai",
    "convnext": "facebook",
    "dinov": "facebook",
    "e5-": "intfloat",
    "gte-": "thenlper",
    "jina-": "jinaai",
    "multilingual-e5-": "intfloat",
    "mxbai-": "mixedbread-ai",
    "nomic-": "nomic-ai",
    "qwen": "Qwen",
    "resnet-": "microsoft",
    "siglip": "google",
    "snowflake-": "Snowflake",
    "swin": "microsoft",
    "vit-": "google",
}
# Files that no vector can depend on; whatever else lies in a checkpoint's directory counts.
_WITHOUT_EFFECT = {
    ".md",
    ".png",
    ".jpg",
    ".svg",
    ".onnx",
    ".h5",
    ".msgpack",
    ".ot",
    ".gguf",
}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory or a model of the hub; nothing here needs its weights."""

    model: str
    revision: str | None = None
    local_files_only: bool = False
    trust_remote_code: bool = False

    @property
    def is_directory(self) -> bool:
        """Whether the model is a local directory, and no hub id."""
        return os.path.isdir(self.place)

    @property
    def place(self) -> str:
        """The directory with ``~`` expanded, or the hub id."""
        return os.path.expanduser(self.model)

    def identity(self) -> str:
        """Name the content: the hub's commit, or a digest of a directory's files."""
        if self.is_directory:
            return _digest_directory(Path(self.place).resolve())
        return f"{self.model}@{self._commit()}"

    def config(self):
        """Read the configuration, anew when the content has changed.

        Raises
        ------
        OSError
            If there is none to be had, or it is damaged.
        """
        if self.is_directory and self.file("config.json") is None:
            modules = _read_json(self, "modules.json")
            raise OSError(
                _without_config(f"The directory {self.model!r}", self, modules)
            )
        return _read_config(self, self.identity())

    @property
    def name(self) -> str:
        """The name that people know it by: a hub id, or the end of a directory's path, like one."""
        return (
            "/".join(Path(self.place).resolve().parts[-2:])
            if self.is_directory
            else self.model
        )

    @property
    def runs_remote_code(self) -> bool:
        """Whether the checkpoint brings modelling code, and may run it."""
        return self.trust_remote_code and bool(getattr(self.config(), "auto_map", None))

    def other_code(self) -> dict[str, str]:
        """Map the other hub repositories that its modelling code comes from to their commits."""
        if not self.trust_remote_code:
            return {}
        config = _read_json(self, "config.json") or {}
        commits = {}
        for reference in (config.get("auto_map") or {}).values():
            repository, _, name = str(reference).partition("--")
            if (
                name and repository != self.model
            ):  # its own code is that of its own commit
                module = name.partition(".")[0]
                commits[repository] = _resolve_code(
                    repository, module, self.local_files_only
                )
        return dict(sorted(commits.items()))

    def model_source(self) -> dict[str, Any]:
        """Return `source` for the model and its configuration, whose code may lie elsewhere."""
        commits = list(self.other_code().values())
        return self.source() | (
            {"code_revision": commits[0]} if len(commits) == 1 else {}
        )

    def source(self) -> dict[str, Any]:
        """Return the arguments by which `from_pretrained` finds what `identity` names."""
        return {
            "pretrained_model_name_or_path": self.place,
            "revision": None if self.is_directory else self._commit(),
            "local_files_only": self.local_files_only,
            "trust_remote_code": self.trust_remote_code,
        }

    def file(self, name: str, *, optional: bool = False) -> Path | None:
        """Find one of the checkpoint's files, or None where it has no such file.

        Parameters
        ----------
        name : str
            Path within the checkpoint.
        optional : bool, default=False
            Whether a file that an offline cache knows nothing of counts as absent.

        Raises
        ------
        OSError
            If the hub could not be asked, or only the hub knows whether there is such a file.
        """
        if self.is_directory:
            path = Path(self.place, name)
            return path if path.is_file() else None
        from huggingface_hub import (
            _CACHED_NO_EXIST,
            constants,
            hf_hub_download,
            try_to_load_from_cache,
        )
        from huggingface_hub.errors import (
            LocalEntryNotFoundError,
            RemoteEntryNotFoundError,
        )

        commit = self._commit()
        cached = try_to_load_from_cache(self.model, name, revision=commit)
        if cached is _CACHED_NO_EXIST:
            return None
        if cached is not None:
            return Path(cached)
        try:
            path = hf_hub_download(
                self.model,
                name,
                revision=commit,
                local_files_only=self.local_files_only,
            )
        except RemoteEntryNotFoundError:
            return None
        except (
            Exception
        ) as error:  # of the network, the hub, the disk: the libraries' are many
            is_offline = self.local_files_only or constants.HF_HUB_OFFLINE
            if is_offline and isinstance(error, LocalEntryNotFoundError):
                if optional or _lacks_by_listing(self.model, commit, name):
                    return None
                raise OSError(
                    f"The local cache of {self.model!r} does not tell whether the repository has "
                    f"{name!r}, which changes vectors. Use the model once while online, or pass "
                    f"the directory of a complete download: hf download {self.model}."
                ) from error
            raise OSError(
                f"The hub could not be asked for {name!r} of {self.model!r}, which changes "
                f"vectors: {_reason(error.__cause__ or error)}. Nothing was encoded; try again."
            ) from error
        return Path(path)

    def check_weights(self) -> None:
        """Refuse weights that are not whole, naming the file, before they are loaded.

        Raises
        ------
        OSError
            If a file is a pointer of git-lfs, cut short or absent beside others.
        """
        for name in _WEIGHTS:
            path = self.file(name, optional=True)
            if path is None:
                continue
            if not name.endswith(".json"):
                check_file(path)
                return
            shards = _read_json(self, name).get("weight_map", {})
            for shard in sorted(set(shards.values())):
                shard_path = self.file(shard)
                if shard_path is None:
                    raise _lost(self, shard, name)
                check_file(shard_path)
            return

    def check_tokenizer(self) -> None:
        """Fetch and check the tokenizer's files: transformers makes up for any that it misses.

        Raises
        ------
        OSError
            If a file could not be fetched, is a pointer of git-lfs or damaged.
        """
        paths = [self.file(name) for name in _TOKENIZER_FILES]
        paths += [self.file(name, optional=True) for name in _VOCABULARIES]
        for path in paths:
            if path is None:
                continue
            if path.suffix == ".json":
                _parse_json(path)
            else:
                check_file(path)

    def check_image_processor(self) -> None:
        """Fetch and check the files of the image processor.

        Raises
        ------
        OSError
            If a file could not be fetched, is a pointer of git-lfs or damaged.
        """
        for name in _IMAGE_PROCESSOR_FILES:
            _read_json(self, name)

    def tensors(self, folder: str) -> dict[str, Any]:
        """Read the weights of one module of a sentence-transformers model.

        Raises
        ------
        OSError
            If there are none.
        """
        path = self.file(f"{folder}/model.safetensors", optional=True)
        if path is not None:
            from safetensors.torch import load_file

            check_file(path)
            return load_file(path)
        path = self.file(f"{folder}/pytorch_model.bin")
        if path is None:
            raise OSError(
                f"The folder {folder!r} of {self.model!r} holds neither model.safetensors nor "
                "pytorch_model.bin. Save the whole model, by SentenceTransformer.save."
            )
        import torch

        check_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)

    def sentence_transformer(self) -> dict[str, Any]:
        """Read what sentence-transformers files say: pooling, lengths, prompt, what follows.

        Raises
        ------
        ValueError
            If they ask for something that is not understood here.
        """
        return _read_sentence_transformer(self, self.identity())

    def _commit(self) -> str:
        return _resolve_commit(self.model, self.revision, self.local_files_only)


@functools.lru_cache(maxsize=64)
def _resolve_commit(model, revision, local_files_only) -> str:
    """Ask the hub, or its local cache, which commit a revision stands for now; once a process.

    Raises
    ------
    OSError
        If the model is neither a directory nor to be found.
    """
    from transformers.utils import cached_file

    if model.startswith(("http://", "https://")):
        hub_id = "/".join(model.split("/")[3:5])
        raise OSError(f"model={model!r} is a URL. Pass the hub id, such as {hub_id!r}.")
    if os.path.isfile(os.path.expanduser(model)):
        raise OSError(
            f"model={model!r} is a file. Pass the directory of the checkpoint, "
            f"{os.path.dirname(model) or '.'!r}, which holds its config.json."
        )
    try:
        path = cached_file(
            model, "config.json", revision=revision, local_files_only=local_files_only
        )
    except (OSError, ValueError) as error:
        if model.count("/") > 1 or model.startswith(
            (".", "~", "/")
        ):  # a path, and no owner/name
            place = os.path.abspath(os.path.expanduser(model))
            raise OSError(
                f"There is no directory {place!r} on this machine. An encoder carries no weights: "
                "copy the checkpoint there, or name another place by set_params(model=...)."
            ) from error
        where = "the local cache" if local_files_only else "the hub or the local cache"
        raise OSError(
            f"The model {model!r} is neither a local directory nor found in {where}. "
            f"{_suggestion(model)}Check the "
            "name, download it while online, or give the directory of a checkpoint; offline, "
            "local_files_only=True answers at once. "
            f"(transformers says: {_reason(error)})"
        ) from error
    if path is None:
        checkpoint = Checkpoint(model, revision, local_files_only)
        modules = cached_file(
            model,
            "modules.json",
            revision=revision,
            local_files_only=local_files_only,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        modules = None if modules is None else _parse_json(Path(modules))
        raise OSError(
            _without_config(f"The hub repository {model!r}", checkpoint, modules)
        )
    return Path(path).parent.name  # …/snapshots/<commit>/config.json


@functools.lru_cache(maxsize=64)
def _resolve_code(repository, module, local_files_only) -> str:
    """Resolve the commit of a repository of code, as `_resolve_commit` does of a model."""
    from transformers.utils import cached_file

    path = cached_file(repository, f"{module}.py", local_files_only=local_files_only)
    return Path(path).parent.name


def _suggestion(model: str) -> str:
    """Suggest the full id where a model is named without its owner."""
    if "/" in model:
        return ""
    names = model.lower()
    owner = next(
        (owner for start, owner in _OWNERS.items() if names.startswith(start)), None
    )
    return f"Did you mean {owner or 'sentence-transformers'}/{model}? "


def _reason(error: BaseException) -> str:
    """Return the first line of an error that stands for others."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def _lacks_by_listing(model, commit, name) -> bool:
    """Tell whether a download of the whole repository has listed its files, without this one."""
    try:
        from huggingface_hub import get_cached_repo_tree
    except ImportError:  # huggingface_hub 1
        return False
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        return name not in {
            file.path for file in get_cached_repo_tree(model, revision=commit)
        }
    except CachedRepoTreeNotFoundError:
        return False


def _without_config(place, checkpoint, modules) -> str:
    """Say why there is no configuration, and what to do."""
    transformer = next(iter(modules or []), {})
    kind = transformer.get("type", "").rsplit(".", 1)[-1]
    if kind not in ("", "Transformer"):
        return (
            f"{place} has no config.json: it is a sentence-transformers model whose first module "
            f"is {kind}, which is not supported. {_wrap(checkpoint)}"
        )
    if transformer.get("path"):
        return (
            f"{place} has no config.json: it is in the old layout of sentence-transformers. Load "
            "it with SentenceTransformer, save it once, and pass the new directory."
        )
    message = (
        f"{place} holds no config.json, so it is not a checkpoint that transformers can load. Pass "
        "the directory that save_pretrained wrote, or another hub id; wrap other models in a "
        "CallableBackend."
    )
    if checkpoint.is_directory:
        folder = Path(checkpoint.place)
        inner = [*folder.glob("*/config.json"), *folder.glob("snapshots/*/config.json")]
        if inner:
            message += f" Did you mean {str(inner[0].parent)!r}?"
    return message


@functools.lru_cache(maxsize=64)
def _read_config(checkpoint, identity):
    """Read a configuration once for each identity."""
    from transformers import AutoConfig

    _read_json(checkpoint, "config.json")  # names the file where it is damaged

    return AutoConfig.from_pretrained(**checkpoint.model_source())


def _digest_directory(directory: Path) -> str:
    files, seen = [], set()
    for folder, folders, names in os.walk(directory, followlinks=True):
        seen.add(os.path.realpath(folder))
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".")
            and os.path.realpath(Path(folder, name)) not in seen
        )
        files += [
            Path(folder, name) for name in sorted(names) if not name.startswith(".")
        ]
    files = [
        path for path in files if path.is_file() and path.suffix not in _WITHOUT_EFFECT
    ]
    signature = tuple((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files)
    return _digest_files(directory, signature)


@functools.lru_cache(maxsize=64)
def _digest_files(root, signature) -> str:
    """Digest files by name and content; read again only when a size or time has changed."""
    digest = blake2b(digest_size=16)
    for path, size, _ in signature:
        digest.update(f"{os.path.relpath(path, root)}\0{size}\0".encode())
        with open(path, "rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


@functools.lru_cache(maxsize=64)
def _read_sentence_transformer(checkpoint, identity) -> dict[str, Any]:
    modules = _read_json(checkpoint, "modules.json")
    if modules is None:
        _check_is_not_lost(checkpoint)
        return {}
    settings = _read_transformer_settings(checkpoint) | _read_prompt(checkpoint)
    head = []  # what is done to pooled vectors
    for i, module in enumerate(modules):
        package, _, kind = module["type"].rpartition(".")
        if package.split(".")[0] != "sentence_transformers":
            raise _not_understood(
                checkpoint, f"a module of its own code, {module['type']}"
            )
        if (kind == "Transformer") != (i == 0):
            raise _not_understood(checkpoint, f"a {kind} module at position {i}")
        if kind == "Transformer" and module["path"]:
            raise _not_understood(checkpoint, f"its Transformer in {module['path']!r}")
        if kind == "Pooling":
            if head or "pooling" in settings:
                raise _not_understood(checkpoint, f"a Pooling module at position {i}")
            settings |= _read_pooling(checkpoint, f"{module['path']}/config.json")
        elif kind == "Normalize":
            head.append(_read_normalize(checkpoint, f"{module['path']}/config.json"))
        elif kind == "Dense":
            head.append(_read_dense(checkpoint, module["path"]))
        elif kind not in ("Transformer", "Dropout"):
            raise _not_understood(checkpoint, f"a {kind} module")
    if "truncate_dim" in settings:
        head.append({"kind": "truncate", "n_features": settings.pop("truncate_dim")})
    if not settings.pop("has_towers") and "pooling" not in settings:
        raise _not_understood(checkpoint, "no Pooling module")
    return settings | {"head": head}


def _check_is_not_lost(checkpoint) -> None:
    """Refuse a directory in which other files of sentence-transformers lack their modules.json."""
    if not checkpoint.is_directory:  # a commit of the hub is complete
        return
    names = ("*_Pooling", "config_sentence_transformers.json", "sentence_*_config.json")
    remains = [
        path.name for name in names for path in Path(checkpoint.place).glob(name)
    ]
    if remains:
        raise OSError(
            f"{checkpoint.model!r} has {remains[0]!r} of a sentence-transformers model, but no "
            "modules.json, which names its pooling. Download the whole model again, or, to use "
            f"the transformer alone, remove {', '.join(remains)}."
        )


def _read_transformer_settings(checkpoint) -> dict[str, Any]:
    """Read the settings of the first module, under whichever name the library wrote them."""
    kinds = (
        "bert",
        "roberta",
        "distilbert",
        "camembert",
        "albert",
        "xlm-roberta",
        "xlnet",
    )
    for kind in kinds:
        name = f"sentence_{kind}_config.json"
        config = _read_json(checkpoint, name)
        if config:
            break
    else:
        return {"has_towers": False}
    handled = {"max_seq_length", "do_lower_case", "modality_config", "transformer_task"}
    handled |= {*_ARGUMENTS, *_TOKENIZER_ARGUMENTS}
    _refuse_others(checkpoint, name, config, handled | _HARMLESS_OF_TRANSFORMER)
    if config.get("transformer_task", "feature-extraction") != "feature-extraction":
        raise _not_understood(
            checkpoint, f"the transformer_task {config['transformer_task']!r}"
        )
    for key in _ARGUMENTS:
        _refuse_others(
            checkpoint,
            f"{key} of {name}",
            config.get(key),
            _HARMLESS_ARGUMENTS,
            _NO_ARGUMENT,
        )
    max_length = config.get("max_seq_length")
    for key in _TOKENIZER_ARGUMENTS:
        arguments = config.get(key) or {}
        if arguments.get("truncation_side") == "right":
            arguments = {k: v for k, v in arguments.items() if k != "truncation_side"}
        known = _HARMLESS_ARGUMENTS | {"model_max_length"}
        _refuse_others(checkpoint, f"{key} of {name}", arguments, known, _NO_ARGUMENT)
        max_length = arguments.get("model_max_length", max_length)
    return {
        "max_length": max_length,
        "lower_case": bool(config.get("do_lower_case", False)),
        "has_towers": _has_towers(checkpoint, config.get("modality_config") or {}),
    }


def _has_towers(checkpoint, modality_config) -> bool:
    """Tell whether the model is run by towers that pool; refuse other ways to run it."""
    ways = {}
    for modality, tower in _TOWERS.items():
        entry = modality_config.get(modality)
        if entry is None:
            continue
        way = (entry.get("method"), entry.get("method_output_name"))
        if way not in (_TOKEN_VECTORS, (tower, "pooler_output"), (tower, None)):
            raise _not_understood(checkpoint, f"modality_config {modality}: {entry}")
        ways[modality] = way
    if modality_config and not ways:
        raise _not_understood(checkpoint, f"modality_config {modality_config}")
    return any(way != _TOKEN_VECTORS for way in ways.values())


def _read_prompt(checkpoint) -> dict[str, Any]:
    file = "config_sentence_transformers.json"
    config = _read_json(checkpoint, file) or {}
    _refuse_others(
        checkpoint, file, config, {*_HARMLESS_OF_MODEL, "model_type", "truncate_dim"}
    )
    if config.get("model_type") not in (None, "SentenceTransformer"):
        raise _not_understood(checkpoint, f"the model_type {config['model_type']!r}")
    name, prompts = config.get("default_prompt_name"), config.get("prompts") or {}
    prompts = {"query": "", "document": ""} | prompts  # as the library has them
    if name is not None and name not in prompts:
        raise _not_understood(
            checkpoint,
            f"default_prompt_name={name!r}, which its prompts {list(prompts)} lack,",
        )
    settings = {} if name is None else {"prompt": prompts[name]}
    if config.get("truncate_dim"):
        settings["truncate_dim"] = config["truncate_dim"]
    return settings


def _read_pooling(checkpoint, name) -> dict[str, Any]:
    config = _read_required(checkpoint, name)
    active = [m for m in config if m.startswith("pooling_mode_") and config[m] is True]
    modes = config.get("pooling_mode") or active or ["mean"]
    modes = [modes] if isinstance(modes, str) else modes
    handled = {
        "word_embedding_dimension",
        "embedding_dimension",
        "pooling_mode",
        "include_prompt",
    }
    _refuse_others(checkpoint, name, config, handled | set(active))
    if not active and not handled.intersection(config):
        raise OSError(
            f"The file {name!r} of {checkpoint.model!r} names no pooling: {config}."
        )
    short = (
        modes[0]
        .removeprefix("pooling_mode_")
        .removesuffix("_tokens")
        .removesuffix("_token")
    )
    if len(modes) != 1 or short not in _POOLINGS:
        raise _not_understood(checkpoint, f"the pooling {', '.join(modes)}")
    return {
        "pooling": _POOLINGS[short],
        "pool_prompt": config.get("include_prompt", True),
    }


def _read_normalize(checkpoint, name) -> dict[str, Any]:
    """Read what a Normalize module applies to; older releases of the library wrote no file."""
    config = _read_json(checkpoint, name, optional=True) or {}
    inputs = {config.get("module_input_name"), config.get("module_output_name")}
    if not inputs <= _POOLED:
        raise _not_understood(checkpoint, f"a Normalize module of the kind {config}")
    return {"kind": "normalize"}


def _read_dense(checkpoint, path) -> dict[str, Any]:
    """Read the shape of a dense layer; its weights are read with the model's."""
    name = f"{path}/config.json"
    config = _read_required(checkpoint, name)
    activation = config.get("activation_function", "torch.nn.Tanh")
    package, _, activation = activation.rpartition(".")
    names = {config.get("module_input_name"), config.get("module_output_name")}
    understood = package.split(".")[0] == "torch" and activation in _ACTIVATIONS
    if not understood or config.get("use_residual") or not names <= _POOLED:
        raise _not_understood(checkpoint, f"a Dense module of the kind {config}")
    handled = {"in_features", "out_features", "bias", "activation_function"}
    handled |= {"module_input_name", "module_output_name"}
    _refuse_others(checkpoint, name, config, handled)
    if not isinstance(config.get("out_features"), int):
        raise OSError(
            f"The file {name!r} of {checkpoint.model!r} names no out_features: {config}."
        )
    return {
        "kind": "dense",
        "path": path,
        "n_features": config["out_features"],
        "activation": activation,
    }


def _refuse_others(checkpoint, file, config, known, unset=_UNSET) -> None:
    """Refuse, by name, settings that have an effect which is not reproduced here."""
    for key, value in (config or {}).items():
        if key not in known and json.dumps(value) not in unset:
            raise _not_understood(checkpoint, f"{key}={value!r} in {file}")


def _read_required(checkpoint, name):
    """Read a file that modules.json names."""
    config = _read_json(checkpoint, name)
    if config is None:
        raise _lost(checkpoint, name, "modules.json")
    return config


def _read_json(checkpoint, name, *, optional=False):
    path = checkpoint.file(name, optional=optional)
    return None if path is None else _parse_json(path)


def _parse_json(path):
    check_file(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OSError(
            f"The file {str(path)!r} is no valid JSON ({error}): it is damaged or cut short. "
            "Download it again."
        ) from error
    if path.name == "modules.json":
        is_sound = isinstance(content, list) and all(map(_is_module, content))
    else:
        is_sound = isinstance(content, dict)
    if not is_sound:
        raise OSError(
            f"The file {str(path)!r} does not have the entries of a {path.name}: it is damaged. "
            "Download it again."
        )
    return content


def _is_module(entry) -> bool:
    """Tell an entry of modules.json, which names a class and a folder."""
    return isinstance(entry, dict) and all(
        isinstance(entry.get(k), str) for k in ("type", "path")
    )


def check_file(path) -> None:
    """Refuse a file that stands for another or is cut short, as far as its ends tell.

    Raises
    ------
    OSError
        If the file is empty, a pointer of git-lfs, a web page, or weights that are cut short.
    """
    path = Path(path)
    with open(path, "rb") as file:
        start = file.read(64).lstrip()
    if not start:
        trouble = "is empty. Download it again"
    elif start.startswith(b"version https://git-lfs"):
        trouble = (
            "is a pointer of git-lfs and not the file itself. Run `git lfs pull` in its directory, "
            "or download it again"
        )
    elif start.lower().startswith((b"<!doctype", b"<html")):
        trouble = "is a web page that was saved in place of the file. Download it again"
    elif _is_cut(path, start):
        trouble = "is damaged or cut short. Download it again"
    else:
        return
    raise OSError(f"The file {str(path)!r} {trouble}.")


def _is_cut(path, start) -> bool:
    """Tell weights that do not end where their header says; of other files nothing is known."""
    if path.suffix == ".bin":
        return start.startswith(b"PK") and not zipfile.is_zipfile(path)
    if path.suffix != ".safetensors":
        return False
    size = path.stat().st_size
    with open(path, "rb") as file:
        n_header = int.from_bytes(file.read(8), "little")
        if n_header > size - 8:
            return True
        try:
            header = json.loads(file.read(n_header))
        except ValueError:
            return True
    header.pop("__metadata__", None)
    ends = [tensor["data_offsets"][1] for tensor in header.values()]
    return size != 8 + n_header + max(ends, default=0)


def _lost(checkpoint, name, index) -> OSError:
    return OSError(
        f"{checkpoint.model!r} lacks {name!r}, which its {index} names. Download the whole model "
        "again, or save it anew."
    )


def _wrap(checkpoint) -> str:
    return (
        f"Wrap it: CallableBackend(lambda: SentenceTransformer({checkpoint.model!r}).encode, "
        "name=..., version=..., modality=..., n_features=...)."
    )


def _not_understood(checkpoint, what) -> ValueError:
    return ValueError(
        f"{checkpoint.model!r} is a sentence-transformers model with {what}, which is not "
        f"supported. {_wrap(checkpoint)}"
    )
