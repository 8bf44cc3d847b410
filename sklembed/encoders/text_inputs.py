"""TextInputs: texts as the arrays of integers that a network takes."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

_MASK = "attention_mask"


@dataclass(frozen=True)
class TextInputs:
    """How texts become the inputs of a network. All fields are of JSON types.

    Parameters
    ----------
    padding : dict of str to int
        Padding value of each input that a tokenizer may return.

    max_length : int or None
        Maximum number of tokens of a text.

    prompt : str
        Text before each text.

    n_skipped : int
        Number of tokens of the prompt that are not pooled.

    lower_case : bool
        Whether texts are converted to lower case.

    pads_to_max : bool
        Whether all texts are padded to `max_length`, and padding is not masked.
    """

    padding: dict[str, int]
    max_length: int | None
    prompt: str = ""
    n_skipped: int = 0
    lower_case: bool = False
    pads_to_max: bool = False

    def prepare(self, texts: list[str], tokenize: Callable) -> list[dict]:
        """Return the tokens of each text: a dict of the input's name to integers.

        Parameters
        ----------
        texts : list of str
            The texts.

        tokenize : callable
            Takes complete texts, and returns a dict of the input's name to a list with
            the integers of each text.
        """
        texts = [self.prompt + text for text in texts]
        if self.lower_case:
            texts = [text.lower() for text in texts]
        columns = tokenize(texts)
        placeholder = self.padding | {_MASK: 1}
        cells: list[dict] = [{} for _ in texts]
        for name in self.padding:
            if name not in columns:
                continue
            for cell, tokens in zip(cells, columns[name], strict=True):
                # Without special tokens an empty text has no token at all.
                cell[name] = tokens or [placeholder[name]]
        return cells

    def collate(self, prepared: list[dict]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Return the inputs of a batch, and the mask of the tokens to pool.

        Returns
        -------
        inputs : dict of str to ndarray of shape (n_texts, n_tokens), dtype int64
            The inputs of the network.

        mask : ndarray of shape (n_texts, n_tokens), dtype int64
            1 for tokens that are pooled or returned, 0 for others.
        """
        inputs = {}
        for name in prepared[0]:
            rows = [cell[name] for cell in prepared]
            inputs[name] = _pad(rows, self.padding[name])
        is_special = inputs.pop("special_tokens_mask", None)
        mask = inputs[_MASK].copy()
        if self.pads_to_max:
            del inputs[_MASK]
        # A text that is cut within the prompt consists of the prompt: keep it.
        is_longer = mask.sum(axis=1) > self.n_skipped
        mask[is_longer, : self.n_skipped] = 0
        if is_special is not None:
            mask *= 1 - is_special
        return inputs, mask


def n_tokens(prepared: dict) -> int:
    """Return the number of tokens of a prepared text."""
    return len(prepared["input_ids"])


def encode_in_groups(
    encode: Callable,
    prepared: list,
    batching: str,
    length: Callable,
    stack: Callable = np.stack,
):
    """Encode cells together if they may share a batch; keep their order.

    Parameters
    ----------
    encode : callable
        Takes prepared cells, and returns the vectors of each.

    prepared : list
        Prepared cells.

    batching : {"any", "one length", "none"}
        Cells that may share a batch.

    length : callable
        Takes a prepared cell, and returns its number of tokens.

    stack : callable
        Takes the list of all vectors, and returns them as one array or tensor.
    """
    if batching == "any":
        return encode(prepared)
    groups: dict[int, list[int]] = {}
    for position, cell in enumerate(prepared):
        group = length(cell) if batching == "one length" else position
        groups.setdefault(group, []).append(position)
    values: list = [None] * len(prepared)
    for positions in groups.values():
        encoded = encode([prepared[position] for position in positions])
        for position, value in zip(positions, encoded, strict=True):
            values[position] = value
    if values[0].ndim == 2:  # tokens
        return values
    return stack(values)


def _pad(rows: list[list[int]], value: int) -> np.ndarray:
    """Stack the integers of all texts, padded on the right to keep positions."""
    lengths = np.array([len(row) for row in rows])
    padded = np.full((len(rows), lengths.max()), value, dtype=np.int64)
    is_token = np.arange(lengths.max()) < lengths[:, None]
    tokens = itertools.chain.from_iterable(rows)
    padded[is_token] = np.fromiter(tokens, np.int64, lengths.sum())
    return padded
