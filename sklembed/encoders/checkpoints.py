"""What a checkpoint says of itself without its weights: identity, configuration, files."""

import functools
import json
import os
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

# What a Dense module of sentence-transformers may apply, by their names in torch.nn.
_ACTIVATIONS = {"GELU", "Identity", "ReLU", "SiLU", "Sigmoid", "Tanh"}
_POOLED = {None, "sentence_embedding"}
# Files that no vector can depend on; whatever else lies in a checkpoint's directory counts.
_WITHOUT_EFFECT = {".md", ".png", ".jpg", ".svg", ".onnx", ".h5", ".msgpack", ".ot", ".gguf"}


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
        return os.path.isdir(self.model)

    def identity(self) -> str:
        """Name the content: the hub's commit, or a digest of a directory's files."""
        if self.is_directory:
            return _digest_directory(Path(self.model).resolve())
        return f"{self.model}@{self._commit()}"

    def config(self):
        """Read the configuration, anew when the content has changed.

        Raises
        ------
        OSError
            If there is none to be had.
        """
        if self.is_directory and self.file("config.json") is None:
            raise OSError(
                f"The directory {self.model!r} holds no config.json, so it is not a checkpoint. "
                "Give the directory that save_pretrained wrote, or a hub id; a model in the old "
                "layout of sentence-transformers has to be loaded and saved by that library once."
            )
        return _read_config(self, self.identity())

    @property
    def name(self) -> str:
        """The name that people know it by: a hub id, or the end of a directory's path, like one."""
        return "/".join(Path(self.model).resolve().parts[-2:]) if self.is_directory else self.model

    @property
    def runs_remote_code(self) -> bool:
        """Whether the checkpoint brings modelling code, and may run it."""
        return self.trust_remote_code and bool(getattr(self.config(), "auto_map", None))

    def source(self) -> dict[str, Any]:
        """Return the arguments by which `from_pretrained` finds what `identity` names."""
        return {
            "pretrained_model_name_or_path": self.model,
            "revision": None if self.is_directory else self._commit(),
            "local_files_only": self.local_files_only,
            "trust_remote_code": self.trust_remote_code,
        }

    def file(self, name: str) -> Path | None:
        """Find one of the checkpoint's files, or None where it has no such file."""
        if self.is_directory:
            path = Path(self.model, name)
            return path if path.is_file() else None
        from transformers.utils import cached_file

        found = cached_file(
            self.model,
            name,
            revision=self._commit(),
            local_files_only=self.local_files_only,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return None if found is None else Path(found)

    def tensors(self, folder: str) -> dict[str, Any]:
        """Read the weights of one module of a sentence-transformers model.

        Raises
        ------
        OSError
            If there are none.
        """
        path = self.file(f"{folder}/model.safetensors")
        if path is not None:
            from safetensors.torch import load_file

            return load_file(path)
        path = self.file(f"{folder}/pytorch_model.bin")
        if path is None:
            raise OSError(
                f"The folder {folder!r} of {self.model!r} holds neither model.safetensors nor "
                "pytorch_model.bin. Save the whole model, by SentenceTransformer.save."
            )
        import torch

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

    try:
        path = cached_file(
            model, "config.json", revision=revision, local_files_only=local_files_only
        )
    except (OSError, ValueError) as error:
        if model.count("/") > 1 or model.startswith((".", "~", "/")):  # a path, and no owner/name
            raise OSError(
                f"There is no directory {model!r} on this machine. An encoder carries no weights: "
                "copy the checkpoint there, or name another place by set_params(model=...)."
            ) from error
        where = "the local cache" if local_files_only else "the hub or the local cache"
        raise OSError(
            f"The model {model!r} is neither a local directory nor found in {where}. Check the "
            "name, download it while online, or give the directory of a checkpoint; offline, "
            "local_files_only=True answers at once. "
            f"(transformers says: {str(error).splitlines()[0]})"
        ) from error
    return Path(path).parent.name  # …/snapshots/<commit>/config.json


@functools.lru_cache(maxsize=64)
def _read_config(checkpoint, identity):
    """Read a configuration once for each identity."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(**checkpoint.source())


def _digest_directory(directory: Path) -> str:
    files, seen = [], set()
    for folder, folders, names in os.walk(directory, followlinks=True):
        seen.add(os.path.realpath(folder))
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and os.path.realpath(Path(folder, name)) not in seen
        )
        files += [Path(folder, name) for name in sorted(names) if not name.startswith(".")]
    files = [path for path in files if path.is_file() and path.suffix not in _WITHOUT_EFFECT]
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
        return {}
    settings = _read_transformer_settings(checkpoint) | _read_prompt(checkpoint)
    head = []  # what is done to pooled vectors
    for module in modules:
        kind = module["type"].rsplit(".", 1)[-1]
        if kind == "Pooling":
            settings |= _read_pooling(checkpoint, f"{module['path']}/config.json")
        elif kind == "Normalize":
            head.append({"kind": "normalize"})
        elif kind == "Dense":
            head.append(_read_dense(checkpoint, module["path"]))
        elif kind != "Transformer":
            raise _not_understood(checkpoint, f"a {kind} module")
    if "truncate_dim" in settings:
        head.append({"kind": "truncate", "n_features": settings.pop("truncate_dim")})
    return settings | {"head": head}


def _read_transformer_settings(checkpoint) -> dict[str, Any]:
    """Read the settings of the first module, under whichever name the library wrote them."""
    kinds = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
    for kind in kinds:
        found = _read_json(checkpoint, f"sentence_{kind}_config.json")
        if found is not None:
            if any((found.get("processing_kwargs") or {}).values()):
                raise _not_understood(checkpoint, "processing_kwargs")
            return {
                "max_length": found.get("max_seq_length"),
                "lower_case": bool(found.get("do_lower_case", False)),
            }
    return {}


def _read_prompt(checkpoint) -> dict[str, Any]:
    config = _read_json(checkpoint, "config_sentence_transformers.json") or {}
    name = config.get("default_prompt_name")
    settings = {} if name is None else {"prompt": config["prompts"][name]}
    if config.get("truncate_dim"):
        settings["truncate_dim"] = config["truncate_dim"]
    return settings


def _read_pooling(checkpoint, name) -> dict[str, Any]:
    config = _read_json(checkpoint, name) or {}
    modes = [m for m in config if m.startswith("pooling_mode_") and config[m] is True]
    modes = modes or [f"pooling_mode_{config.get('pooling_mode', 'mean')}"]
    mode = modes[0].removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token")
    known = {mode: mode for mode in ("mean", "cls", "max", "weightedmean")}
    known |= {"lasttoken": "last", "mean_sqrt_len": "mean_sqrt_len"}
    if len(modes) != 1 or mode not in known:
        raise _not_understood(checkpoint, f"the pooling {', '.join(modes)}")
    return {"pooling": known[mode], "pool_prompt": config.get("include_prompt", True)}


def _read_dense(checkpoint, path) -> dict[str, Any]:
    """Read the shape of a dense layer; its weights are read with the model's."""
    config = _read_json(checkpoint, f"{path}/config.json") or {}
    activation = config.get("activation_function", "Tanh").rsplit(".", 1)[-1]
    source = config.get("module_input_name", "sentence_embedding")
    if activation not in _ACTIVATIONS or config.get("use_residual") or source not in _POOLED:
        raise _not_understood(checkpoint, f"a Dense module of the kind {config}")
    return {
        "kind": "dense",
        "path": path,
        "n_features": config["out_features"],
        "activation": activation,
    }


def _read_json(checkpoint, name):
    path = checkpoint.file(name)
    return None if path is None else json.loads(path.read_text(encoding="utf-8"))


def _not_understood(checkpoint, what) -> ValueError:
    return ValueError(
        f"{checkpoint.model!r} is a sentence-transformers model with {what}, which is not "
        "supported. Wrap it: CallableBackend(lambda: SentenceTransformer(...).encode, …)."
    )
