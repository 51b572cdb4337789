"""A file from the first of several mirrors that sends it whole and in time."""

import hashlib
import threading
import time
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException
from queue import Empty, SimpleQueue
from typing import NamedTuple
from urllib.error import HTTPError, URLError

from tqdm import tqdm

CHUNK = 1 << 16  # bytes


class Limits(NamedTuple):
    """How long to wait, in seconds.

    Args:
        total: For a file, over all mirrors; each has an equal share of what is left.
        silence: For the next byte of a mirror, or its first one, before it is given up.
    """

    total: float = 300.0
    silence: float = 10.0


DEFAULT_LIMITS = Limits()


class FetchError(RuntimeError):
    """A file that no mirror has sent; the message is one line that says what each one did."""


class _MirrorError(Exception):
    """What one mirror did instead of sending the file."""


def fetch(
    mirrors: Sequence[str], name: str, checksum: str, limits: Limits = DEFAULT_LIMITS
) -> tuple[str, bytes]:
    """Return the mirror that has sent a file whole, and what the file holds.

    Args:
        mirrors: The addresses of the folders that should have it, tried in this order.
        name: That of the file.
        checksum: Its MD5 sum in hexadecimal digits.
        limits: How long to wait.

    Raises:
        FetchError: None has sent it.
    """
    deadline = time.monotonic() + limits.total
    failures = []
    for i, mirror in enumerate(mirrors):
        share = (deadline - time.monotonic()) / (len(mirrors) - i)
        try:
            content = _download(mirror + name, share, limits.silence)
            if hashlib.md5(content, usedforsecurity=False).hexdigest() != checksum:
                raise _MirrorError(f"sent {len(content):,} bytes without the file's checksum")
        except _MirrorError as error:
            failures.append(f"{mirror} {error}")
        else:
            return mirror, content
    raise FetchError("; ".join(failures))


def _download(url: str, seconds: float, silence: float) -> bytes:
    """Return what an address sends.

    A thread reads it, and is left behind when it takes too long: the time limit of a socket is one
    for each byte of it, and looking up a name has none.
    """
    chunks: SimpleQueue[bytes | Exception] = SimpleQueue()
    given_up = threading.Event()
    # Of the limits the one here comes first; that of the socket ends the thread.
    options = (url, 2 * silence, chunks, given_up)
    threading.Thread(target=_read, args=options, daemon=True).start()
    deadline = time.monotonic() + seconds
    content = bytearray()
    name = url.rpartition("/")[2]
    with tqdm(desc=name, unit="B", unit_scale=True, leave=False, disable=None) as bar:
        try:
            while chunk := chunks.get(timeout=max(0.0, min(silence, deadline - time.monotonic()))):
                if isinstance(chunk, Exception):
                    raise _MirrorError(_reason(chunk)) from chunk
                content += chunk
                bar.update(len(chunk))
        except Empty:
            late = time.monotonic() >= deadline
            told = f"was not done in {seconds:.3g} s" if late else f"was silent for {silence:.3g} s"
            raise _MirrorError(told) from None
        finally:
            given_up.set()
    return bytes(content)


def _read(
    url: str,
    silence: float,
    chunks: "SimpleQueue[bytes | Exception]",
    given_up: threading.Event,
) -> None:
    """Put what an address sends into a queue, and at the end nothing or what went wrong."""
    request = urllib.request.Request(url, headers={"User-Agent": "torch_softmax"})
    try:
        with urllib.request.urlopen(request, timeout=silence) as response:
            # read would wait until it has as many bytes as it is asked for.
            while not given_up.is_set() and (chunk := response.read1(CHUNK)):
                chunks.put(chunk)
        chunks.put(b"")
    except Exception as error:  # of many kinds; whoever waits for the queue tells of it
        chunks.put(error)


def _reason(error: Exception) -> str:
    """Tell in one line what has gone wrong on the way."""
    if isinstance(error, HTTPError):
        return f"answered {error.code} {error.reason}"
    reason = error.reason if isinstance(error, URLError) else error
    text = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
    kind = f"{type(reason).__name__}: " if isinstance(reason, HTTPException) else ""
    return "failed: " + kind + " ".join(text.split())
