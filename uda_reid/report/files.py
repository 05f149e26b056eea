"""Files that are complete or absent, whatever happens while they are written."""

import errno
import os
from contextlib import suppress
from pathlib import Path

PARTIAL = ".partial"  # ends the name of a file that is being written


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file under another name, flushes it to disk and renames it: a reader sees the old or the new file.

    Raises:
        OSError: it cannot be written; the old file at `path` is unchanged.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _sync_folder(path.parent)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(handle)
