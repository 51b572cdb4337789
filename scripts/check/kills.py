"""Kill a training again and again at random moments, and see whether anything is lost.

    python -m scripts.check.kills
    python -m scripts.check.kills --kills 10 --seed 1

A training on the digits is killed with SIGKILL and resumed until it has come to its
end, and then another begins. After each kill there must be a checkpoint that loads, with every
epoch that was reported as done. At the end the weights must be, bit for bit, those of a training
that was never stopped. The exit status is 0 only where all of this holds.
"""

import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import get_context
from pathlib import Path
from threading import RLock

import torch
from tqdm import tqdm

from torch_softmax import __main__ as command
from torch_softmax import _checks as checks
from torch_softmax._command_line import Parser, run_command
from torch_softmax.mnist.checkpoints import CHECKPOINT_NAME, CheckpointError, load_checkpoint

EPOCHS = 5

# Its server imports torch once, where otherwise every training would.
PROCESSES = get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch_softmax.mnist.runs"])


class Training:
    """A training in a process of its own, to be killed and gone on with."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.log = directory.with_suffix(".log")

    def run(self, seconds: float | None = None) -> bool:
        """Begin or go on, and return whether it came to its end before it was killed.

        Args:
            seconds: Until it is killed, from the first checkpoint on; None lets it finish.
        """
        checkpoint = self.directory / CHECKPOINT_NAME
        if checkpoint.exists():
            arguments = ["resume", str(self.directory)]
        else:
            begin = ["train", "--dataset=digits", f"--epochs={EPOCHS}"]
            arguments = [*begin, f"--output-dir={self.directory}"]
        process = PROCESSES.Process(target=train, args=(arguments, self.log))
        process.start()
        while process.is_alive() and not checkpoint.exists():
            time.sleep(0.001)
        process.join(seconds)
        process.kill()
        process.join()
        if process.exitcode not in (0, -signal.SIGKILL):
            raise RuntimeError(f"training ended with {process.exitcode}:\n{self.log.read_text()}")
        return process.exitcode == 0

    def check_epochs(self) -> None:
        """Raise a CheckpointError unless each epoch that was reported can be loaded."""
        epoch = load_checkpoint(self.directory).epoch
        reported = re.findall(r"^epoch +(\d+)/", self.log.read_text(), re.MULTILINE)
        if reported and epoch < int(reported[-1]):
            raise CheckpointError(
                f"the checkpoint has {epoch} epochs, where {reported[-1]} were reported"
            )

    def check_weights(self, expected: dict[str, torch.Tensor]) -> None:
        """Raise a CheckpointError unless the weights are these, bit for bit."""
        weights = load_checkpoint(self.directory).model
        if not all(torch.equal(weights[name], tensor) for name, tensor in expected.items()):
            raise CheckpointError("the weights are not those of a training that was never stopped")


def train(arguments: Sequence[str], log: Path) -> None:
    """Run the command in this process, with what it prints appended to a file line by line."""
    tqdm.set_lock(RLock())  # its usual lock, made for several processes, outlives a kill
    with log.open("a", buffering=1) as file, redirect_stdout(file), redirect_stderr(file):
        sys.exit(command.main(arguments))


def check(kills: int, seed: int) -> None:
    """Kill as often as asked for, let the last training finish, and print the count.

    Raises:
        ValueError: That is not often.
        CheckpointError: Anything was lost.
    """
    checks.positive("--kills", kills)
    moments = random.Random(seed)
    killed = trainings = 0
    with (
        tempfile.TemporaryDirectory() as scratch,
        tqdm(total=kills, unit="kill", disable=None) as bar,
    ):
        never_stopped = Training(Path(scratch, "never-stopped"))
        never_stopped.run()
        expected = load_checkpoint(never_stopped.directory).model
        start = time.perf_counter()
        Training(Path(scratch, "timed")).run()
        longest = time.perf_counter() - start

        while killed < kills:
            trainings += 1
            training = Training(Path(scratch, str(trainings)))
            while not training.run(moments.uniform(0, longest) if killed < kills else None):
                killed += 1
                bar.update()
                training.check_epochs()
            training.check_weights(expected)
    print(
        f"{killed} kills of {trainings} trainings: each left a checkpoint with all epochs done, "
        "and each training ended with the weights of one that was never stopped"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = Parser(
        prog="check.kills",
        description="Kill a training at random moments, and see whether anything is lost.",
        example="python -m scripts.check.kills --kills 10",
    )
    parser.add_argument("--kills", type=int, default=100, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the moments (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    return run_command(parser, lambda: check(args.kills, args.seed))


if __name__ == "__main__":
    sys.exit(main())
