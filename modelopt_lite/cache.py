"""The user's cache: where it is, and small files in it that are believed only if they are whole and the user's own."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import stat
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

COMPILED_KERNELS = "kernels"
"""The folder of compiled kernels."""

logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Return the folder of what can be fetched or made again: ``modelopt-lite`` in the user's cache.

    Raises:
        RuntimeError: if neither ``XDG_CACHE_HOME`` nor a home directory is known.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "modelopt-lite"


def private_folder(kind: str) -> Path:
    """Return a folder in the cache that nobody but the user can write to or read; make it if it is not there.

    What is run is kept there, so a folder that others could have written to is refused.

    Args:
        kind: its name.

    Raises:
        OSError: if it cannot be made, or is another user's, or others have access.
        RuntimeError: as in :func:`cache_folder`.
    """
    folder = cache_folder() / kind
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise PermissionError(f"{folder} must be a folder of this user with mode 0700; remove it or change its mode")
    return folder


def cached(kind: str, key: Iterable[bytes], make: Callable[[], bytes]) -> bytes:
    """Return what was made of a key before, or make it and keep it for other processes.

    A file is written under another name first and holds a digest of its key and content, so one that is half written,
    damaged or of another key is made again. A cache that cannot be used costs time and is no error.

    Args:
        kind: name of the folder in the cache.
        key: all that the content depends on.
        make: makes it; what it raises is raised.
    """
    name = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in key)).hexdigest()
    try:
        path = private_folder(kind) / name
        kept = path.read_bytes() if path.is_file() else b""
    except (OSError, RuntimeError) as error:
        logger.info("nothing is kept in the cache: %s", error)
        return make()
    content = kept[hashlib.sha256().digest_size :]
    if kept == _sealed(name, content):
        return content
    content = make()
    try:
        _write(path, _sealed(name, content))
    except OSError as error:
        logger.info("nothing is kept in the cache: %s", error)
    return content


def _sealed(name: str, content: bytes) -> bytes:
    return hashlib.sha256(name.encode() + content).digest() + content


def _write(path: Path, content: bytes) -> None:
    """Write a file that appears complete or not at all."""
    handle, temporary = tempfile.mkstemp(prefix=".", dir=path.parent)
    try:
        with open(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
