"""How objects look in notebooks and in logs: links, reports and progress bars."""

import sys
import warnings
from html import escape

# The website of the documentation. The address must be registered before the first release.
DOCUMENTATION = "https://sklembed.readthedocs.io/en/stable"

_LOG_INTERVAL = 30  # seconds between two lines of a log


class DocLinkMixin:
    """Links the diagram of a public estimator to its page of the API reference."""

    _doc_link_module = "sklembed"
    _doc_link_template = DOCUMENTATION + "/api/sklembed.{estimator_name}.html"


def as_text(title, sentences, tables) -> str:
    """Return a report as text: its title, its sentences, and its tables by heading."""
    parts = [title, *sentences]
    for heading, table in tables.items():
        parts.extend([heading, table.round(3).to_string(index=_has_index(table))])
    return "\n".join(part for part in parts if part)


def as_html(title, sentences, tables) -> str:
    """Return a report as HTML, for notebooks."""
    parts = [f"<h4>{escape(title)}</h4>"]
    if sentences:
        items = [f"<li>{escape(sentence)}</li>" for sentence in sentences]
        parts.append(f"<ul>{''.join(items)}</ul>")
    for heading, table in tables.items():
        if heading:
            parts.append(f"<p><b>{escape(heading)}</b></p>")
        parts.append(table.round(3).to_html(border=0, index=_has_index(table)))
    return f"<div>{''.join(parts)}</div>"


def _has_index(table):
    """Return whether the rows have names; numbers of rows tell nothing."""
    return any(name is not None for name in table.index.names)


def progress_bar(iterable=None, *, verbose, **settings):
    """Return a progress bar of tqdm that suits the place where it is shown.

    A terminal has a bar, a notebook a widget, and a log, which cannot overwrite a line, a line at
    the start, at the end and every 30 seconds.

    Parameters
    ----------
    iterable : iterable or None, default=None
        The items to count; None if the caller calls `update`.
    verbose : int
        If 0, nothing is shown.
    **settings
        Further arguments of tqdm, such as `desc`, `total` and `unit`.

    Returns
    -------
    progress : tqdm
        The bar.
    """
    with warnings.catch_warnings():
        # A notebook without ipywidgets shows the bar of a terminal.
        warnings.filterwarnings("ignore", message="IProgress not found")
        from tqdm.auto import tqdm
    is_notebook = "ipykernel.zmqshell" in sys.modules
    if verbose and not is_notebook and not sys.stderr.isatty():
        settings |= {
            "file": _Log(sys.stderr),
            "ncols": 0,  # figures without a bar
            "mininterval": _LOG_INTERVAL,
            "maxinterval": _LOG_INTERVAL,
        }
    return tqdm(iterable, disable=not verbose, **settings)


class _Log:
    """A stream on which each state of a progress bar is a line."""

    def __init__(self, stream):
        self._stream = stream

    def write(self, text):
        text = text.strip()
        if text:
            self._stream.write(f"{text}\n")

    def flush(self):
        self._stream.flush()
