"""A pretrained network with a linear head, and the choice of the parameters to train."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LinearHead(nn.Module):
    """A linear layer on centred and scaled vectors.

    Parameters
    ----------
    weight : Tensor of shape (n_outputs, n_features)
        Initial weights.
    bias : Tensor of shape (n_outputs,)
        Initial bias.
    mean : Tensor of shape (n_features,)
        Mean of the vectors.
    scale : float
        Scale by which centred vectors are divided. Steps of training then do not depend on the
        norm of the vectors.
    """

    mean: Tensor

    def __init__(
        self, weight: Tensor, bias: Tensor, mean: Tensor, scale: float
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)
        self.register_buffer("mean", mean)
        self.scale = scale

    def forward(self, vectors: Tensor) -> Tensor:
        """Map (batch, n_features) to (batch, n_outputs)."""
        return F.linear((vectors - self.mean) / self.scale, self.weight, self.bias)


class CellNetwork(nn.Module):
    """A pretrained network and a head, which take the positions of cells.

    The network stays in evaluation mode. Batch normalisation keeps its statistics, which small
    batches would spoil, and no dropout draws from the global random state.

    Parameters
    ----------
    network : torch.nn.Module
        The pretrained network.
    head : LinearHead
        The head.
    vectors : callable
        Takes the network and prepared cells, and returns vectors (batch, n_features).
    prepared : callable
        Takes a list of positions, and returns prepared cells.
    dtype : torch.dtype
        Precision of the products of the network; its weights stay in float32.
    """

    def __init__(
        self,
        network: nn.Module,
        head: LinearHead,
        vectors: Callable[[nn.Module, list[Any]], Tensor],
        prepared: Callable[[list[int]], list[Any]],
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.network = network
        self.head = head
        self.vectors = vectors
        self.prepared = prepared
        self.dtype = dtype
        self.eval()

    def forward(self, positions: Tensor) -> Tensor:
        """Map positions (batch,) to outputs (batch, n_outputs)."""
        cells = self.prepared(positions.tolist())
        is_mixed = self.dtype != torch.float32
        with torch.autocast(positions.device.type, self.dtype, enabled=is_mixed):
            vectors = self.vectors(self.network, cells)  # (batch, n_features)
        output: Tensor = self.head(vectors.float())
        return output


def cross_entropies(logits: Tensor, codes: Tensor) -> Tensor:
    """Return the cross-entropy of each row, given logits (batch, n_classes)."""
    return F.cross_entropy(logits, codes, reduction="none")


def squared_errors(outputs: Tensor, y: Tensor) -> Tensor:
    """Return the squared error of each row, given outputs (batch, 1) and targets (batch,)."""
    return (outputs[:, 0] - y).square()


def used_parameters(
    network: nn.Module, vectors: Callable[[nn.Module], Tensor]
) -> list[str]:
    """Return the names of the parameters that vectors depend on.

    A checkpoint may have a second tower, a pooler, or layers above the one that is used.
    """
    names, parameters = [], []
    for name, parameter in network.named_parameters():
        if parameter.is_floating_point():
            names.append(name)
            parameters.append(parameter.requires_grad_(True))
    gradients = torch.autograd.grad(
        vectors(network).sum(), parameters, allow_unused=True
    )
    network.requires_grad_(False)
    pairs = zip(names, gradients, strict=True)
    return [name for name, gradient in pairs if gradient is not None]


def heights(network: nn.Module, names: list[str]) -> dict[str, int]:
    """Return the number of layers from each parameter up to the head, at least 1.

    The layers are the items of the list of modules that has the most of these parameters. The
    parameters before the list, such as embeddings, are a layer, and so are those after it.
    """
    prefix, n_layers = _largest_list(network, names)
    first_of_list = _first_with(names, prefix)
    result = {}
    for position, name in enumerate(names):
        if n_layers and name.startswith(prefix):
            layer = 1 + int(name.removeprefix(prefix).split(".")[0])
        elif position < first_of_list:
            layer = 0
        else:
            layer = n_layers + 1
        result[name] = n_layers + 2 - layer
    return result


def _largest_list(network: nn.Module, names: list[str]) -> tuple[str, int]:
    """Return the prefix of the list of modules with the most parameters, and its length."""
    best, most, n_layers = "", 0, 0
    for name, module in network.named_modules():
        if not isinstance(module, nn.ModuleList):
            continue
        prefix = f"{name}."
        inside = [parameter for parameter in names if parameter.startswith(prefix)]
        n_weights = sum(network.get_parameter(name).numel() for name in inside)
        if n_weights > most:  # the outermost list comes first
            best, most, n_layers = prefix, n_weights, len(module)
    return best, n_layers


def _first_with(names: list[str], prefix: str) -> int:
    for position, name in enumerate(names):
        if name.startswith(prefix):
            return position
    return len(names)


def adaptable_modules(network: nn.Module, names: list[str]) -> list[str]:
    """Return the names of the modules that are matrix products, for low-rank adapters.

    These are linear layers, and convolutions of single pixels without groups.
    """
    used = set(names)
    chosen = []
    for name, module in network.named_modules():
        if f"{name}.weight" in used and _is_product(module):
            chosen.append(name)
    return chosen


def _is_product(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        is_pointwise = module.kernel_size == (1, 1) and module.stride == (1, 1)
        if not is_pointwise or module.groups > 1:
            return False
        return type(module) is nn.Conv2d or _computes(module, F.conv2d, (1, 1))
    if isinstance(module, nn.Linear):
        return type(module) is nn.Linear or _computes(module, F.linear, ())
    return _is_transposed(module)


@torch.no_grad()
def _computes(
    module: nn.Module, function: Callable[..., Tensor], size: tuple[int, ...]
) -> bool:
    """Return whether a module of a subclass computes a function of its weights."""
    weight, bias = module.get_parameter("weight"), module._parameters["bias"]
    n_in = weight.shape[1]
    x = torch.linspace(-1, 1, n_in, device=weight.device).view(1, n_in, *size)
    expected = function(x, weight, bias)
    output = module(x)
    return output.shape == expected.shape and torch.allclose(output, expected, 1e-4)


def _is_transposed(module: nn.Module) -> bool:
    """Return whether a module is the linear layer of GPT-2, with weights (n_in, n_out)."""
    return type(module).__name__ == "Conv1D"


def initialize_adapters(network: nn.Module, generator: torch.Generator) -> list[str]:
    """Give adapters their weights, drawn as by peft; return the names of these.

    The second matrix is zero, so that the network does not change.
    """
    names = []
    for name, parameter in list(network.named_parameters()):
        if ".lora_" not in name:
            continue
        value = torch.zeros(parameter.shape)
        if ".lora_A." in name:
            bound = 1.0 / math.sqrt(value[0].numel())
            value.uniform_(-bound, bound, generator=generator)
        module = network.get_submodule(name.rpartition(".")[0])
        module.weight = nn.Parameter(value)
        names.append(name)
    return names


def merge_adapters(
    network: nn.Module, adapters: Mapping[str, Tensor], scaling: float
) -> None:
    """Add low-rank adapters to the weights of a network without adapters, in float32."""
    for name, down in adapters.items():
        if ".lora_A." not in name:
            continue
        up = adapters[name.replace(".lora_A.", ".lora_B.")]  # (n_out, rank, ...)
        product = up.flatten(1) @ down.flatten(1)  # (n_out, n_in)
        module = network.get_submodule(name.partition(".lora_A.")[0])
        if _is_transposed(module):
            product = product.T
        weight = module.get_parameter("weight")
        weight.data.add_((scaling * product).view_as(weight).to(weight.device))


def copy_parameters(network: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy values to the parameters of these names."""
    for name, value in values.items():
        network.get_parameter(name).data.copy_(value)


def parameter_groups(
    parameters: Iterable[tuple[nn.Parameter, int]],
    lr: float,
    layer_decay: float,
    weight_decay: float,
) -> list[dict[str, Any]]:
    """Return groups for an optimizer, given parameters and their number of layers to the head.

    The learning rate decays from layer to layer. Vectors, such as biases and the weights of
    normalisation, have no weight decay.
    """
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for parameter, height in parameters:
        is_matrix = parameter.ndim > 1
        group = groups.setdefault((height, is_matrix), {"params": []})
        group["params"].append(parameter)
        group["lr"] = lr * layer_decay**height
        group["weight_decay"] = weight_decay if is_matrix else 0.0
    return list(groups.values())
