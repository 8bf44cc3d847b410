"""Target: the folder of the output, and the call that writes to it."""

import json
import re
import uuid

from sklembed.scale.shards import MANIFEST, VECTORS

_PART = re.compile(r"part-\d{8}\.parquet")
_DRAFTS = re.compile(r"_draft-[0-9a-f]{32}")


class Target:
    """A folder to which one call at a time writes.

    Parts are written to a folder of drafts, and moved to the target at the end. The
    manifest says which call writes, and whether the parts in the target are complete.

    Parameters
    ----------
    folder : Folder
        The folder, which need not exist.
    """

    def __init__(self, folder):
        self.folder = folder
        self._call = uuid.uuid4().hex
        self.drafts = folder.folder(f"_draft-{self._call}")

    def check(self):
        """Raise an error if the folder is not empty and not of an earlier call."""
        names = [name for name in self.folder.names() if name != VECTORS]
        if names and MANIFEST not in names:
            raise FileExistsError(
                f"The target {self.folder.path} is not empty, and not of an earlier "
                f"call: it has {names[0]!r}. Pass another folder."
            )

    def __enter__(self):
        """Create the folder, mark it as of this call, and delete older drafts."""
        self.folder.create()
        manifest = self._read_manifest()
        self._write_manifest(manifest["complete"], manifest["summary"])
        for name in self.folder.names():
            if _DRAFTS.fullmatch(name):
                self.folder.delete_folder(name)
        self.drafts.create()
        return self

    def __exit__(self, *error):
        """Delete the drafts of this call, unless another call has deleted them."""
        if self.folder.exists(self.drafts.name):
            self.folder.delete_folder(self.drafts.name)

    def commit(self, names):
        """Replace the parts of an earlier call by the parts of this call.

        Parameters
        ----------
        names : list of str
            Names of all parts.

        Raises
        ------
        OSError
            If another call writes to the target, or parts are not among the drafts.
        """
        self._check_call()
        self._check_drafts(names)
        self._write_manifest(complete=False, summary=None)
        for name in names:
            self.folder.system.move(self.drafts.file(name), self.folder.file(name))
        for name in set(self.folder.names()).difference(names):
            if _PART.fullmatch(name):
                self.folder.delete(name)

    def complete(self, summary):
        """Mark the target as complete.

        Parameters
        ----------
        summary : dict
            The counts of the call.
        """
        self._check_call()
        self._write_manifest(complete=True, summary=summary)

    def _check_call(self):
        if self._read_manifest().get("call") != self._call:
            raise OSError(
                f"Another call has taken over the target {self.folder.path}. Wait for "
                "its end, or pass another folder. The vectors of this call are in the "
                "shards."
            )

    def _check_drafts(self, names):
        missing = sorted(set(names).difference(self.drafts.names()))
        if missing:
            raise OSError(
                f"{len(missing)} of {len(names)} parts are missing in "
                f"{self.drafts.path}, first: {missing[0]}. Was the folder changed, or "
                "is it on a disk that the workers do not share? Call again: cells whose "
                "vectors are in the shards are not encoded again."
            )

    def _read_manifest(self):
        if not self.folder.exists(MANIFEST):
            return {"complete": False, "summary": None}
        return json.loads(self.folder.read(MANIFEST))

    def _write_manifest(self, complete, summary):
        manifest = {"complete": complete, "summary": summary, "call": self._call}
        self.folder.write(MANIFEST, json.dumps(manifest).encode())
