"""Peak memory of this process, or of a block of statements in it."""

import ctypes
import math
import sys
from pathlib import Path

try:
    import resource
except ImportError:  # on Windows
    resource = None  # type: ignore[assignment]

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # see proc(5)


def peak_mib():
    """Return the peak memory of this process in MiB; NaN on Windows."""
    # Linux: unlike ru_maxrss, VmHWM never includes the peak of the parent process.
    peak = _read_status("VmHWM")
    if not math.isnan(peak) or resource is None:
        return peak
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


class PeakMemory:
    """Peak memory of the process within a block, above its memory at the start.

    Threads of the process that run at the same time are included.

    Attributes
    ----------
    mib : float
        The difference in MiB, after the block. NaN where the peak cannot be reset: on
        other systems than Linux.
    """

    def __enter__(self):
        _return_free_memory()
        self.mib, self._start = math.nan, _read_status("VmRSS")
        try:
            _CLEAR.write_text(_RESET_PEAK)
        except OSError:
            self._start = math.nan
        return self

    def __exit__(self, *_):
        # The kernel counts pages in batches, so a peak can appear below the start.
        difference = _read_status("VmHWM") - self._start
        self.mib = difference if math.isnan(difference) else max(difference, 0.0)


def _read_status(name):
    """Return a size in the status of this process in MiB, NaN if there is none."""
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) / 2**10
    return math.nan


def _return_free_memory():
    """Let glibc return free memory, which a block could use again without a trace."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
