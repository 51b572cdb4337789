"""Mirrors that stall, drip, refuse or send something else, on this machine."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from torch_softmax.mnist import mirrors
from torch_softmax.mnist.mirrors import FetchError, Limits, fetch

FILE = bytes(range(256)) * 1000  # more than a chunk
CHECKSUM = hashlib.md5(FILE).hexdigest()
PAGE = b"<html>Sign in to this network</html>"
# A mirror that is well answers at once; on a busy machine it still has a minute to do so.
PATIENT = Limits(total=120.0, silence=60.0)


class Mirror(BaseHTTPRequestHandler):
    """Behaves as the folder is named that it is asked for."""

    def do_GET(self):
        behaviour = self.path.split("/")[1]
        self.server.asked.append(behaviour)
        getattr(self, behaviour)()

    def good(self):
        self.answer(FILE)

    def page(self):
        self.answer(PAGE)

    def truncated(self):
        self.answer(FILE[:1000], length=len(FILE))

    def missing(self):
        self.send_error(404)

    def busy(self):
        self.send_error(503)

    def stalling(self):
        self.server.ended.wait()

    def stalling_midway(self):
        self.answer(FILE[:1000], length=len(FILE))
        self.server.ended.wait()

    def dripping(self):
        self.answer(b"", length=len(FILE))
        self.drip()

    def dripping_headers(self):
        self.drip()

    def garbled(self):
        self.wfile.write(b"no HTTP\r\n\r\n")

    def answer(self, content, length=None):
        self.send_response(200)
        self.send_header("Content-Length", str(length or len(content)))
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()

    def drip(self):
        try:
            while not self.server.ended.wait(0.01):
                self.wfile.write(b"x")
                self.wfile.flush()
        except OSError:  # whoever asked has gone
            self.server.left.set()

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Mirror) as server:
        server.asked, server.ended, server.left = [], threading.Event(), threading.Event()
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.ended.set()
        server.shutdown()
        thread.join()


def folders(server, *behaviours):
    return [f"http://127.0.0.1:{server.server_port}/{behaviour}/" for behaviour in behaviours]


def test_the_first_mirror_is_enough_where_it_is_well(server):
    first, second = folders(server, "good", "page")
    assert fetch([first, second], "file.gz", CHECKSUM, PATIENT) == (first, FILE)
    assert server.asked == ["good"]


def test_a_mirror_is_asked_for_the_file_alone(server):
    # The server has no do_HEAD, and refuses it with status 501.
    _, content = fetch(folders(server, "good"), "file.gz", CHECKSUM, PATIENT)
    assert content == FILE


@pytest.mark.parametrize("bad", ["page", "truncated", "missing", "busy", "garbled"])
def test_the_next_mirror_is_asked_after_one_that_sends_something_else(server, bad):
    first, second = folders(server, bad, "good")
    assert fetch([first, second], "file.gz", CHECKSUM, PATIENT) == (second, FILE)
    assert server.asked == [bad, "good"]


@pytest.mark.parametrize("bad", ["stalling", "stalling_midway", "dripping_headers"])
def test_a_silent_mirror_leaves_time_for_the_next(server, bad, monkeypatch):
    first, second = folders(server, bad, "good")
    download = mirrors._download

    def impatient_with_the_first(url, seconds, silence):
        return download(url, seconds, 0.2 if url.startswith(first) else silence)

    monkeypatch.setattr(mirrors, "_download", impatient_with_the_first)
    assert fetch([first, second], "file.gz", CHECKSUM, PATIENT) == (second, FILE)


def test_a_dripping_mirror_leaves_time_for_the_next(server):
    first, second = folders(server, "dripping", "good")
    limits = Limits(total=12.0, silence=60.0)  # of which the first has half
    assert fetch([first, second], "file.gz", CHECKSUM, limits) == (second, FILE)
    assert server.left.wait(60)  # the connection to it is not kept


def test_every_mirror_that_failed_is_told_of_in_one_line(server):
    bad = [*folders(server, "page", "truncated", "missing", "busy"), "http://127.0.0.1:1/"]
    with pytest.raises(FetchError) as raised:
        fetch(bad, "file.gz", CHECKSUM, PATIENT)
    page, truncated, missing, busy, nobody = bad
    assert str(raised.value) == (
        f"{page} sent 36 bytes without the file's checksum; "
        f"{truncated} sent 1,000 bytes without the file's checksum; "
        f"{missing} answered 404 Not Found; "
        f"{busy} answered 503 Service Unavailable; "
        f"{nobody} failed: Connection refused"
    )


def test_silence_is_told_of(server):
    with pytest.raises(FetchError, match=r"^\S+/stalling/ was silent for 0\.1 s$"):
        fetch(folders(server, "stalling"), "file.gz", CHECKSUM, Limits(total=60.0, silence=0.1))


def test_dripping_is_told_of(server):
    with pytest.raises(FetchError, match=r"^\S+/dripping/ was not done in 0\.5 s$"):
        fetch(folders(server, "dripping"), "file.gz", CHECKSUM, Limits(total=0.5, silence=60.0))


def test_an_answer_that_is_no_http_is_told_of_in_one_line(server):
    with pytest.raises(FetchError, match=r"^\S+/garbled/ failed: BadStatusLine: no HTTP$"):
        fetch(folders(server, "garbled"), "file.gz", CHECKSUM, PATIENT)


def test_a_name_lookup_that_hangs_is_not_waited_for(monkeypatch):
    release = threading.Event()
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: release.wait())
    with pytest.raises(FetchError, match=r"^http://somewhere/ was silent for 0\.01 s$"):
        fetch(["http://somewhere/"], "file.gz", CHECKSUM, Limits(total=60.0, silence=0.01))
    release.set()
