"""Files that are whole or not there, whatever happens while they are written."""

import os
from contextlib import suppress
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file in one step: whoever reads it, even after a crash, finds the old or the new.

    Args:
        path: The file; `path` with `.tmp` behind it is used on the way.
        content: The new bytes.

    Raises:
        OSError: The file can't be written; what was there before stays.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_directory(path.parent)
    except OSError as error:
        raise OSError(f"{path} can't be written: {error.strerror}") from error
    finally:
        with suppress(OSError):  # it has become the file, or never was
            temporary.unlink()


def _sync_directory(directory: Path) -> None:
    """Make a new name in a directory last through a crash of the machine."""
    if not hasattr(os, "O_DIRECTORY"):  # on Windows, directories can't be opened
        return
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
