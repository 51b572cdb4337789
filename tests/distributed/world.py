"""Processes that stay for many calls, one rank of a process group each, on this machine alone."""

import os
import pickle
import signal
import socket
import tempfile
import time
import traceback
import warnings
from datetime import timedelta
from multiprocessing import connection, get_context
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from tests.helpers import ON_TORCH_2_6

needs_fsdp_on_cpu = pytest.mark.skipif(
    ON_TORCH_2_6, reason="torch 2.6 can't fully_shard on a CPU itself"
)

LIMIT = 60.0  # seconds of a call
GRACE = 10.0  # seconds that the other ranks have after one has failed

# Its server imports once what otherwise every process would, some of it in its first call. All
# tests share it, and it goes by the last who told it what to import.
PROCESSES = get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["pytest", "torch._dynamo", "torch_softmax.distributed.class_parallel"]
)


class RankError(RuntimeError):
    """What went wrong on some of the ranks; `failures` has a text for each of these."""

    def __init__(self, failures):
        self.failures = failures
        super().__init__("\n".join(f"rank {rank} {text}" for rank, text in failures.items()))


class World:
    """A process group of some ranks, to be used in a `with`.

    Its processes are started by the first call, and again by the one after a failure that they
    didn't all survive. They end with this process, however it ends.
    """

    def __init__(self, size, limit=LIMIT):
        self.size = size
        self.limit = limit
        self._folder = tempfile.TemporaryDirectory()
        self._ranks = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._stop()
        self._folder.cleanup()

    def run(self, function, *args):
        """Call function(mesh, *args) on every rank, and return what each returned.

        Raises:
            RankError: if a rank raised, died, or took longer than the limit.
        """
        if not self._ranks:
            self._start()
        call = pickle.dumps((function, args))
        for _, pipe in self._ranks:
            pipe.send_bytes(call)
        answers, failures = self._answers()
        if len(answers) < self.size:
            self._stop()
        if failures:
            raise RankError(failures)
        return [answers[rank] for rank in range(self.size)]

    def _answers(self):
        """The answer of each rank that gave one, and the failures among all."""
        answers, failures = {}, {}
        waiting = {pipe: rank for rank, (_, pipe) in enumerate(self._ranks)}
        deadline = time.monotonic() + self.limit
        while waiting:
            ready = connection.wait(list(waiting), max(0, deadline - time.monotonic()))
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    answers[rank], failure = pickle.loads(pipe.recv_bytes())
                except (EOFError, ConnectionError):
                    failure = "died"
                if failure:
                    failures[rank] = failure
                    deadline = min(deadline, time.monotonic() + GRACE)
            if not ready:
                failures |= dict.fromkeys(waiting.values(), "took too long")
                break
        return answers, failures

    def _start(self):
        handle, store = tempfile.mkstemp(dir=self._folder.name)
        os.close(handle)
        for rank in range(self.size):
            pipe, other_end = PROCESSES.Pipe()
            process = PROCESSES.Process(
                target=_serve, args=(other_end, rank, self.size, store, self.limit), daemon=True
            )
            process.start()
            other_end.close()
            self._ranks.append((process, pipe))

    def _stop(self):
        for process, pipe in self._ranks:
            process.kill()
            process.join()
            pipe.close()
        self._ranks = []


def _serve(pipe, rank, size, store, limit):
    """Answer the calls that come through a pipe, until its other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests, which then close it
    torch.set_num_threads(1)
    warnings.filterwarnings("error", module="torch_softmax")
    warnings.filterwarnings("ignore", "DTensor random operators", UserWarning)
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    os.environ["GLOO_SOCKET_IFNAME"] = loopback
    address = Path(store).as_uri()
    dist.init_process_group("gloo", address, timedelta(seconds=limit), size, rank)
    mesh = init_device_mesh("cpu", (size,))
    while True:
        try:
            function, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        answer = failure = None
        try:
            answer = function(mesh, *args)
        except BaseException:
            failure = f"raised\n{traceback.format_exc()}"
        pipe.send_bytes(pickle.dumps((answer, failure)))
