"""What commands have to know of torchrun: which process prints, and how to begin again."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout


@contextmanager
def one_voice() -> Iterator[None]:
    """Let one of torchrun's processes print within the block, and one on each machine its errors.

    An error that nothing catches within the block has its traceback on every process.
    """
    rank, local_rank = (os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK"))
    with ExitStack() as stack:
        nowhere = stack.enter_context(open(os.devnull, "w"))
        if rank != "0":
            stack.enter_context(redirect_stdout(nowhere))
        if local_rank != "0":
            stack.enter_context(redirect_stderr(nowhere))
        yield


def launcher() -> list[str]:
    """The words of a command line that begin a script as this process was begun."""
    if "LOCAL_WORLD_SIZE" not in os.environ:
        return ["python"]
    return ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"]]
