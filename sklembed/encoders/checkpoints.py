"""Identity, configuration and files of a checkpoint, read without loading the model."""

import contextlib
import functools
import json
import os
import tempfile
import time
import zipfile
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from sklembed.encoders.database import default_path

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
# Files of weights, in the order in which transformers looks for them.
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
_MODEL2VEC_MAX_LENGTH = 512  # of models without the setting
_IMAGE_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")

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

# Owners of popular models, by the start of the name.
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
# Suffixes of files that cannot change a vector. All other files are hashed.
_IGNORED_SUFFIXES = set(".md .png .jpg .svg .onnx .h5 .msgpack .ot .gguf".split())

# The file that remembers hashes of directories. Its version changes with the hash.
_MEMO_VERSION = "sklembed-checkpoints-1"
_MEMO_SIZE = 256
# A file that was written shortly before hashing may change again within the same tick of
# the clock of its file system.
_RACY_NS = 2_000_000_000


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory or a model of the hub, accessed without loading weights."""

    model: str
    revision: str | None = None
    local_files_only: bool = False
    trust_remote_code: bool = False
    allow_pickle: bool = False

    @property
    def is_directory(self) -> bool:
        """Whether the model is a local directory instead of a hub id."""
        return os.path.isdir(self.place)

    @property
    def place(self) -> str:
        """The directory with ``~`` expanded, or the hub id."""
        return os.path.expanduser(self.model)

    def identity(self) -> str:
        """Return a key of the content: the hub's commit, or a hash of a directory's files.

        It is read once per object, and each call of an encoder makes a new object.
        """
        return self._identity

    @functools.cached_property
    def _identity(self) -> str:
        if self.is_directory:
            return _hash_directory(os.path.realpath(self.place))
        return f"{self.model}@{self._commit()}"

    def config(self):
        """Load the configuration, again when the content has changed.

        Raises
        ------
        OSError
            If there is no configuration, or it is damaged.
        """
        if self.is_directory and self.file("config.json") is None:
            modules = _read_json(self, "modules.json")
            raise OSError(
                _no_config_message(f"The directory {self.model!r}", self, modules)
            )
        return _read_config(self, self.identity())

    @property
    def name(self) -> str:
        """A readable name: the hub id, or the last two parts of a directory's path."""
        if self.is_directory:
            return "/".join(Path(self.place).resolve().parts[-2:])
        return self.model

    @property
    def runs_remote_code(self) -> bool:
        """Whether the checkpoint contains modelling code that may be run."""
        return self.trust_remote_code and bool(getattr(self.config(), "auto_map", None))

    def other_code(self) -> dict[str, str]:
        """Map other hub repositories with the checkpoint's modelling code to their commits."""
        if not self.trust_remote_code:
            return {}
        config = _read_json(self, "config.json") or {}
        commits = {}
        for reference in (config.get("auto_map") or {}).values():
            repository, _, name = str(reference).partition("--")
            # Code in the checkpoint itself is part of the checkpoint's commit.
            if name and repository != self.model:
                module = name.partition(".")[0]
                commits[repository] = _resolve_code(
                    repository, module, self.local_files_only
                )
        return dict(sorted(commits.items()))

    def model_source(self) -> dict[str, Any]:
        """Return `source` for the model and its configuration, with the commit of other code."""
        source = self.source()
        commits = list(self.other_code().values())
        if len(commits) == 1:
            source["code_revision"] = commits[0]
        return source

    def source(self) -> dict[str, Any]:
        """Return the arguments of `from_pretrained` that load the content of `identity`."""
        return {
            "pretrained_model_name_or_path": self.place,
            "revision": None if self.is_directory else self._commit(),
            "local_files_only": self.local_files_only,
            "trust_remote_code": self.trust_remote_code,
        }

    def file(self, name: str, *, optional: bool = False) -> Path | None:
        """Return the path of a file of the checkpoint, or None if there is no such file.

        Parameters
        ----------
        name : str
            Path within the checkpoint.
        optional : bool, default=False
            Whether a file counts as absent if an offline cache has no record of it.

        Raises
        ------
        OSError
            If the download fails, an offline cache has no record of the file, or the
            path leads out of the checkpoint.
        """
        # Files elsewhere are no part of the identity, so that vectors might change.
        if os.path.isabs(name) or ".." in Path(name).parts:
            raise OSError(
                f"{self.model!r} names the file {name!r}, which is not within the "
                "checkpoint. Do not trust its files."
            )
        if self.is_directory:
            path = Path(self.place, name)
            return path if path.is_file() else None
        from huggingface_hub import (
            _CACHED_NO_EXIST,
            hf_hub_download,
            try_to_load_from_cache,
        )
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        commit = self._commit()
        path = try_to_load_from_cache(self.model, name, revision=commit)
        if path is _CACHED_NO_EXIST:
            return None
        if path is not None:
            return Path(path)
        try:
            path = hf_hub_download(
                self.model,
                name,
                revision=commit,
                local_files_only=self.local_files_only,
            )
        except Exception as error:  # of the network, the hub or the disk
            is_local = isinstance(error, LocalEntryNotFoundError)
            if isinstance(error, EntryNotFoundError) and not is_local:
                return None  # the hub has no such file
            if not (is_local and self._is_offline):
                raise OSError(
                    f"{name!r} of {self.model!r}, which changes vectors, could not be "
                    f"downloaded from the hub: {_reason(error.__cause__ or error)}. Nothing "
                    "was encoded; try again."
                ) from error
            if optional or _is_absent_from_listing(self.model, commit, name):
                return None
            raise OSError(
                f"The local cache of {self.model!r} does not record whether the repository has "
                f"{name!r}, which changes vectors. Use the model once while online, or pass "
                f"the directory of a complete download: hf download {self.model}."
            ) from error
        return Path(path)

    def check_weights(self) -> None:
        """Check the files of weights before they are loaded.

        Raises
        ------
        OSError
            If a file is a git-lfs pointer or damaged, or a shard is missing.
        ValueError
            If the weights are pickles, and `allow_pickle` is False.
        """
        names = _WEIGHTS
        explicit = (_read_json(self, "config.json") or {}).get("transformers_weights")
        if explicit is not None:  # transformers then reads this file alone
            names = (str(explicit),)
        for name in names:
            self._check_is_allowed(name)
            path = self.file(name, optional=True)
            if path is None:
                continue
            if not name.endswith(".json"):
                _check_weights_file(path)
                return
            for shard in _shards(self, name):
                self._check_is_allowed(shard)
                shard_path = self.file(shard)
                if shard_path is None:
                    raise _missing_file(self, shard, name)
                _check_weights_file(shard_path)
            return

    def _check_is_allowed(self, name) -> None:
        """Raise an error for the name of a pickle, before it is downloaded."""
        if self.allow_pickle or ".safetensors" in name:
            return
        if self.is_directory and self.file(name) is None:
            return
        raise ValueError(
            f"{self.model!r} has no weights in safetensors files, and files such as "
            f"{name} are pickles. If you trust their author, pass allow_pickle=True; or "
            "load the model by transformers and save it by save_pretrained, which writes "
            "safetensors."
        )

    def check_tokenizer(self) -> None:
        """Download and check the tokenizer's files; transformers would replace missing ones.

        Raises
        ------
        OSError
            If a file could not be downloaded, is a git-lfs pointer or damaged.
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

    def image_processor(self) -> dict[str, Any]:
        """Download and check the files of the image processor, and return its settings.

        Raises
        ------
        OSError
            If a file could not be downloaded, is a git-lfs pointer or damaged.
        """
        preprocessor, processor = [
            _read_json(self, name) or {} for name in _IMAGE_PROCESSOR_FILES
        ]
        return processor.get("image_processor") or preprocessor

    def tensors(self, folder: str) -> dict[str, Any]:
        """Load the weights of one module of a sentence-transformers model.

        Raises
        ------
        OSError
            If the folder has no weights, or they are damaged.
        ValueError
            If the weights are pickles, and `allow_pickle` is False.
        """
        path = self.file(f"{folder}/model.safetensors", optional=True)
        if path is not None:
            from safetensors.torch import load_file

            check_file(path)
            return load_file(path)
        name = f"{folder}/pytorch_model.bin"
        self._check_is_allowed(name)
        path = self.file(name)
        if path is None:
            raise OSError(
                f"The folder {folder!r} of {self.model!r} has neither model.safetensors nor "
                "pytorch_model.bin. Save the complete model with SentenceTransformer.save."
            )
        check_file(path)
        return _read_pickle(path, "cpu")

    @property
    def has_config(self) -> bool:
        """Whether a directory exists and has the file that names the kind of its model."""
        if not self.is_directory:
            return False
        return self.is_static or self.file("config.json") is not None

    @property
    def is_static(self) -> bool:
        """Whether the model is a table of token vectors. False if no file can be read."""
        try:
            model_type = (_read_json(self, "config.json") or {}).get("model_type")
            if model_type is not None:
                return model_type == "model2vec"
            modules = _read_json(self, "modules.json")
        except (OSError, ImportError):  # raised again when the model is described
            return False
        return _is_static_embedding(modules)

    def static_embedding(self) -> dict[str, Any]:
        """Read the settings of static token embeddings: folder, limit, prompt, head.

        Raises
        ------
        ValueError
            If a setting of sentence-transformers is not supported.
        """
        return _read_static_embedding(self, self.identity())

    def sentence_transformer(self) -> dict[str, Any]:
        """Read the settings of sentence-transformers: pooling, lengths, prompt, head.

        Raises
        ------
        ValueError
            If a setting is not supported.
        """
        return _read_sentence_transformer(self, self.identity())

    def _commit(self) -> str:
        return _resolve_commit(self.model, self.revision, self.local_files_only)

    @property
    def _is_offline(self) -> bool:
        """Whether only the local cache is read, which records the files of the hub."""
        from huggingface_hub import constants

        return self.local_files_only or constants.HF_HUB_OFFLINE


@functools.lru_cache(maxsize=64)
def _resolve_commit(model, revision, local_files_only) -> str:
    """Resolve a revision to a commit by the hub or its local cache, once per process.

    Raises
    ------
    OSError
        If the model is neither a directory nor found.
    """
    from transformers.utils import cached_file

    if model.startswith(("http://", "https://")):
        hub_id = "/".join(model.split("/")[3:5])
        raise OSError(f"model={model!r} is a URL. Pass the hub id, such as {hub_id!r}.")
    if os.path.isfile(os.path.expanduser(model)):
        raise OSError(
            f"model={model!r} is a file. Pass the directory of the checkpoint, "
            f"{os.path.dirname(model) or '.'!r}, which contains its config.json."
        )
    try:
        path = cached_file(
            model, "config.json", revision=revision, local_files_only=local_files_only
        )
    except (OSError, ValueError) as error:
        # Offline, config.json may be missing because the repository has none.
        path, modules = _find_modules(model, revision, local_files_only=True)
        if not _is_static_embedding(modules):
            message = _not_found_message(model, local_files_only, error)
            raise OSError(message) from error
    if path is None:
        path, modules = _find_modules(model, revision, local_files_only)
        if not _is_static_embedding(modules):
            checkpoint = Checkpoint(model, revision, local_files_only)
            raise OSError(
                _no_config_message(f"The hub repository {model!r}", checkpoint, modules)
            )
    return Path(path).parent.name  # …/snapshots/<commit>/<file>


def _find_modules(model, revision, local_files_only):
    """Return path and content of modules.json of a hub model, or None and None."""
    from transformers.utils import cached_file

    try:
        path = cached_file(
            model,
            "modules.json",
            revision=revision,
            local_files_only=local_files_only,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError:  # not the name of a repository
        path = None
    if path is None:
        return None, None
    return path, _parse_json(Path(path))


def _not_found_message(model, local_files_only, error) -> str:
    is_path = "\\" in model or model.count("/") > 1 or model.startswith((".", "~", "/"))
    if is_path:
        place = os.path.abspath(os.path.expanduser(model))
        return (
            f"There is no directory {place!r} on this machine. An encoder contains no weights: "
            "copy the checkpoint there, or set another path with set_params(model=...)."
        )
    where = "the local cache" if local_files_only else "the hub or the local cache"
    return (
        f"The model {model!r} is neither a local directory nor found in {where}. "
        f"{_suggestion(model)}Check the name, download the model while online, or pass the "
        "directory of a checkpoint. Offline, local_files_only=True avoids waiting for the hub. "
        f"(Error of transformers: {_reason(error)})"
    )


@functools.lru_cache(maxsize=64)
def _resolve_code(repository, module, local_files_only) -> str:
    """Resolve the commit of a repository of code, as `_resolve_commit` does for a model."""
    from transformers.utils import cached_file

    path = cached_file(repository, f"{module}.py", local_files_only=local_files_only)
    return Path(path).parent.name


def _suggestion(model: str) -> str:
    """Suggest a hub id for a name without an owner."""
    if "/" in model:
        return ""
    suggested_owner = "sentence-transformers"
    for start, owner in _OWNERS.items():
        if model.lower().startswith(start):
            suggested_owner = owner
            break
    return f"Did you mean {suggested_owner}/{model}? "


def _reason(error: BaseException) -> str:
    """Return the type and first line of an error."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def _is_absent_from_listing(model, commit, name) -> bool:
    """Return whether a complete download has a list of files that does not contain `name`."""
    try:
        from huggingface_hub import get_cached_repo_tree
    except ImportError:  # huggingface_hub 1
        return False
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        files = get_cached_repo_tree(model, revision=commit)
    except CachedRepoTreeNotFoundError:
        return False
    return all(file.path != name for file in files)


def _no_config_message(place, checkpoint, modules) -> str:
    """Explain why there is no configuration, and how to continue."""
    transformer = next(iter(modules or []), {})
    kind = transformer.get("type", "").rsplit(".", 1)[-1]
    if kind not in ("", "Transformer"):
        return (
            f"{place} has no config.json: it is a sentence-transformers model whose first "
            f"module is {kind}, which is not supported. {_wrapping_advice(checkpoint)}"
        )
    if transformer.get("path"):
        return (
            f"{place} has no config.json: it is in the old layout of sentence-transformers. "
            "Load it with SentenceTransformer, save it again, and pass the new directory."
        )
    message = (
        f"{place} has no config.json, so transformers cannot load it. Pass a directory that "
        "save_pretrained wrote, or another hub id; wrap other models in a CallableBackend."
    )
    if checkpoint.is_directory:
        folder = Path(checkpoint.place)
        configs = [
            *folder.glob("*/config.json"),
            *folder.glob("snapshots/*/config.json"),
        ]
        if configs:
            message += f" Did you mean {str(configs[0].parent)!r}?"
    return message


@functools.lru_cache(maxsize=64)
def _read_config(checkpoint, identity):
    """Load a configuration once for each identity."""
    from transformers import AutoConfig

    _check_no_kernels(checkpoint, _read_json(checkpoint, "config.json"))
    try:
        return AutoConfig.from_pretrained(**checkpoint.model_source())
    except (ImportError, OSError, ValueError):
        raise
    except Exception as error:  # values of a wrong type raise errors of any type
        raise OSError(
            f"The config.json of {checkpoint.model!r} cannot be read ({_reason(error)}): "
            "it is damaged, or was written for another version of transformers. "
            "Download the model again."
        ) from error


def _check_no_kernels(checkpoint, config) -> None:
    """Raise an error if a configuration names a kernel, which is code on the hub."""
    for key, value in (config or {}).items():
        if isinstance(value, dict):
            _check_no_kernels(checkpoint, value)
        elif key.endswith("_implementation") and "/" in str(value):
            raise ValueError(
                f"The config.json of {checkpoint.model!r} has {key}={value!r}, which is "
                "code on the hub, and is not run. Remove the entry."
            )


def _hash_directory(directory: str) -> str:
    """Hash the files of a directory, linked folders included, that can change a vector."""
    signature, visited = [], set()
    for folder, subfolders, names in os.walk(directory, followlinks=True):
        visited.add(_folder_id(folder))
        # os.walk descends into the subfolders that remain here. Links may form a circle.
        subfolders[:] = _visible(subfolders)
        for name in _visible(subfolders):
            if _folder_id(os.path.join(folder, name)) in visited:
                subfolders.remove(name)
        for name in _visible(names):
            path = os.path.join(folder, name)
            suffix = os.path.splitext(name)[1]
            if suffix in _IGNORED_SUFFIXES or not os.path.isfile(path):
                continue
            status = os.stat(path)
            times = status.st_mtime_ns, status.st_ctime_ns
            signature.append(_File(path, status.st_size, *times, status.st_ino))
    return _hash_files(directory, tuple(signature))


def _folder_id(folder) -> tuple[int, int]:
    """Return what identifies a folder under all its names."""
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _visible(names) -> list[str]:
    return sorted(name for name in names if not name.startswith("."))


class _File(NamedTuple):
    """Signature of a file: a change of its content changes one of these."""

    path: str
    size: int
    modified: int  # in nanoseconds, as the next
    changed: int  # unlike `modified`, programs cannot set it
    inode: int


@functools.lru_cache(maxsize=64)
def _hash_files(root, signature) -> str:
    """Hash names and content of files, once per machine until their signature changes."""
    key = blake2b(repr((root, signature)).encode(), digest_size=16).hexdigest()
    remembered = _remembered_hashes().get(key)
    if remembered is not None:
        return remembered
    start = time.time_ns()
    hasher = blake2b(digest_size=16)
    for file in signature:
        name = os.path.relpath(file.path, root).replace(os.sep, "/")  # as on any system
        hasher.update(f"{name}\0{file.size}\0".encode())
        with open(file.path, "rb") as content:
            while chunk := content.read(1 << 22):
                hasher.update(chunk)
    newest = max((max(file.modified, file.changed) for file in signature), default=0)
    if newest < start - _RACY_NS:
        _remember_hash(key, hasher.hexdigest())
    return hasher.hexdigest()


def _memo_path() -> Path:
    """Return the file of hashes by signature, beside the default store."""
    return Path(f"{default_path()}.checkpoints.json")


def _remembered_hashes() -> dict[str, str]:
    """Read the hashes by signature; empty if the file is absent, damaged or of another version."""
    try:
        header, _, body = _memo_path().read_bytes().partition(b"\n")
    except (OSError, ValueError):  # no file, or no path for it
        return {}
    return json.loads(body) if header == _memo_header(body) else {}


def _memo_header(body) -> bytes:
    """Return the first line: the version, and a hash that reveals any damage."""
    return f"{_MEMO_VERSION} {blake2b(body, digest_size=16).hexdigest()}".encode()


def _remember_hash(key, content_hash) -> None:
    """Add a hash to the file, if it can be written. Of two writers at once, one may lose."""
    hashes = _remembered_hashes() | {key: content_hash}
    newest = dict(list(hashes.items())[-_MEMO_SIZE:])
    body = json.dumps(newest).encode()
    with contextlib.suppress(OSError, ValueError):
        path = _memo_path()
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.")
        try:
            with open(descriptor, "wb") as file:
                file.write(_memo_header(body) + b"\n" + body)
            os.replace(draft, path)
        except BaseException:
            os.unlink(draft)
            raise


@functools.lru_cache(maxsize=64)
def _read_sentence_transformer(checkpoint, identity) -> dict[str, Any]:
    modules = _read_json(checkpoint, "modules.json")
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


def _is_static_embedding(modules) -> bool:
    """Return whether the first module is a StaticEmbedding."""
    first = next(iter(modules or []), {})
    return first.get("type", "").endswith(".StaticEmbedding")


@functools.lru_cache(maxsize=64)
def _read_static_embedding(checkpoint, identity) -> dict[str, Any]:
    """Read a model2vec checkpoint, or one that only sentence-transformers can read.

    model2vec writes the files of both libraries, and its own rules then apply.
    """
    config = _read_json(checkpoint, "config.json")
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
        config = _read_json(checkpoint, name)
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
    config = _read_json(checkpoint, file) or {}
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
    config = _read_json(checkpoint, name, optional=True) or {}
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
    config = _read_json(checkpoint, name)
    if config is None:
        raise _missing_file(checkpoint, name, "modules.json")
    return config


def _read_json(checkpoint, name, *, optional=False):
    path = checkpoint.file(name, optional=optional)
    return None if path is None else _parse_json(path)


def _parse_json(path):
    check_file(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (RecursionError, ValueError) as error:
        raise OSError(
            f"The file {str(path)!r} is not valid JSON ({error}): it is damaged or truncated. "
            "Download it again."
        ) from error
    if path.name == "modules.json":
        is_valid = isinstance(content, list) and all(map(_is_module, content))
    else:
        is_valid = isinstance(content, dict)
    if not is_valid:
        raise OSError(
            f"The file {str(path)!r} does not have the entries of a {path.name}: it is "
            "damaged. Download it again."
        )
    return content


def _is_module(entry) -> bool:
    """Return whether an entry of modules.json has a class and a folder."""
    if not isinstance(entry, dict):
        return False
    return isinstance(entry.get("type"), str) and isinstance(entry.get("path"), str)


def check_file(path) -> None:
    """Check that a file is not empty, truncated or saved in place of another.

    Raises
    ------
    OSError
        If the file is empty, a git-lfs pointer, a web page, or truncated weights.
    """
    path = Path(path)
    with open(path, "rb") as file:
        start = file.read(64).lstrip()
    if not start:
        problem = "is empty. Download it again"
    elif start.startswith(b"version https://git-lfs"):
        problem = (
            "is a git-lfs pointer instead of the content. Run `git lfs pull` in its directory, "
            "or download it again"
        )
    elif start.lower().startswith((b"<!doctype", b"<html")):
        problem = "is a web page that was saved in place of the file. Download it again"
    elif _is_truncated(path, start):
        problem = "is damaged or truncated. Download it again"
    else:
        return
    raise OSError(f"The file {str(path)!r} {problem}.")


def _is_truncated(path, start) -> bool:
    """Return whether weights do not match their header; False for other files."""
    if path.suffix == ".bin":
        return start.startswith(b"PK") and not zipfile.is_zipfile(path)
    if path.suffix != ".safetensors":
        return False
    try:
        with safe_open(path, framework="numpy"):  # validates the header and the size
            return False
    except SafetensorError:
        return True


def _check_weights_file(path) -> None:
    """Check a file of weights, of which a pickle must contain nothing else."""
    check_file(path)
    if ".safetensors" not in path.name:
        _read_pickle(path, "meta")  # without the numbers


def _read_pickle(path, device) -> dict[str, Any]:
    """Load weights from a pickle. torch refuses everything but tensors and containers."""
    import torch

    try:
        return torch.load(path, map_location=device, weights_only=True)
    # torch raises errors of any type, and recommends to load the file without checks.
    except Exception as error:
        raise OSError(
            f"The file {str(path)!r} cannot be read as weights. It is damaged, or contains "
            "more than weights: do not trust it."
        ) from error


def _shards(checkpoint, name) -> list[str]:
    """Return the names of the files that an index lists."""
    weight_map = _read_json(checkpoint, name).get("weight_map")
    shards = set(weight_map.values()) if isinstance(weight_map, dict) else {None}
    if not all(isinstance(shard, str) for shard in shards):
        raise OSError(
            f"The file {name!r} of {checkpoint.model!r} does not map weights to files: it "
            "is damaged. Download it again."
        )
    return sorted(shards)


def _missing_file(checkpoint, name, index) -> OSError:
    return OSError(
        f"{checkpoint.model!r} has no file {name!r}, although its {index} lists it. Download "
        "the complete model again, or save it again."
    )


def _wrapping_advice(checkpoint) -> str:
    return (
        f"Wrap it: CallableBackend(lambda: SentenceTransformer({checkpoint.model!r}).encode, "
        "name=..., version=..., modality=..., n_features=...)."
    )


def _unsupported(checkpoint, feature) -> ValueError:
    return ValueError(
        f"{checkpoint.model!r} is a sentence-transformers model with {feature}, which is not "
        f"supported. {_wrapping_advice(checkpoint)}"
    )
