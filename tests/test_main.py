"""The command torch-softmax: its help, its faces, what it sets before torch loads, and verify."""

import os
import re
import shlex
import subprocess
import sys

import pytest
import torch

from tests.helpers import ROOT, one_line
from torch_softmax import _verify_losses
from torch_softmax.__main__ import MODULES, build_parser, main

COMMANDS = list(MODULES)

# What a process begins with. Only the ranks of torchrun count, as torchrun itself needs torch.
REPORT_AND_END_AT_TORCH = """
import os, sys

class Finder:
    def find_spec(name, path=None, target=None):
        if name == "torch" and ("COUNTED" not in os.environ or os.environ["COUNTED"] in os.environ):
            print("torch", os.environ.get("OMP_WAIT_POLICY"), file=sys.__stdout__, flush=True)
            os._exit(0)

sys.meta_path.insert(0, Finder)
"""


@pytest.fixture
def until_torch(tmp_path):
    """Run Python until it asks for torch, and return its status and what it has printed."""
    (tmp_path / "sitecustomize.py").write_text(REPORT_AND_END_AT_TORCH)
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    usual = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}

    def run(*arguments, **environment):
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            env={**usual, "PYTHONPATH": paths, **environment},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.returncode, done.stdout, done.stderr

    return run


# The help


@pytest.mark.parametrize("command", [[], *([command] for command in COMMANDS)], ids="".join)
def test_the_help_needs_no_torch(until_torch, command):
    status, printed, _ = until_torch("-m", "torch_softmax", *command, "--help")
    assert status == 0
    assert printed.startswith(" ".join(["usage: torch-softmax", *command]))


def test_the_help_names_every_command(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    printed = capsys.readouterr().out
    assert re.findall(r"^    (\w+) ", printed, re.MULTILINE) == COMMANDS


@pytest.mark.parametrize("command", [[], *([command] for command in COMMANDS)], ids="".join)
def test_the_help_ends_with_an_example_that_can_be_typed(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([*command, "--help"])
    *_, title, example = capsys.readouterr().out.splitlines()
    assert title == "example:"
    program, *words = shlex.split(example)
    assert program == "torch-softmax"
    assert build_parser().parse_args(words).command == (command or ["train"])[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "torch-softmax: the following arguments are required: COMMAND"),
        (["fly"], "torch-softmax: argument COMMAND: invalid choice: 'fly'"),
        (["resume"], "torch-softmax resume: the following arguments are required: RUN_DIR"),
        (["train", "--lr=fast"], "torch-softmax train: argument --lr: invalid float value: 'fast'"),
    ],
)
def test_bad_words_are_one_line_without_torch(until_torch, words, message):
    status, printed, said = until_torch("-m", "torch_softmax", *words)
    assert (status, printed) == (2, "")
    (line,) = said.splitlines()
    assert line.startswith(message)


# The faces, and what is set before torch loads


FACES = [
    ["train_mnist.py"],
    ["scripts/evaluate.py", "runs"],
    ["scripts/export.py", "runs"],
    ["scripts/plot.py", "runs"],
    ["scripts/predict.py", "runs", "7.png"],
    *(["-m", "torch_softmax", *words] for words in (["train"], ["resume", "runs"], ["verify"])),
]


@pytest.mark.parametrize("face", FACES, ids=" ".join)
def test_waiting_threads_do_not_spin(until_torch, face):
    assert until_torch(*face) == (0, "torch PASSIVE\n", "")


def test_nor_do_those_of_the_processes_of_torchrun(until_torch):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    status, printed, said = until_torch(*torchrun, "train_mnist.py", COUNTED="RANK")
    assert (status, printed) == (0, 2 * "torch PASSIVE\n"), said


def test_what_the_user_has_set_stays(until_torch):
    _, printed, _ = until_torch("train_mnist.py", OMP_WAIT_POLICY="ACTIVE")
    assert printed == "torch ACTIVE\n"


def test_the_library_sets_nothing(until_torch):
    _, printed, _ = until_torch("-c", "import torch_softmax.functional")
    assert printed == "torch None\n"


def test_ctrl_c_while_torch_loads_is_one_line(monkeypatch, capsys):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr("torch_softmax.__main__.import_module", interrupted)
    assert main(["verify"]) == 130
    assert one_line(capsys) == "torch-softmax verify: interrupted"


# The audit


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_the_losses_hold_what_they_claim(dtype, capsys):
    assert main(["verify", "--dtype", dtype]) == 0
    _, *tables, summary = capsys.readouterr().out.split("\n\n")
    lines = [line for table in tables for line in table.splitlines()[1:]]
    rows = [line[28:].split() for line in lines]
    assert [len(row) for row in rows] == len(rows) * [5]
    assert all(float(error) < 0.1 for row in rows for error in row)
    assert summary == f"{5 * len(rows)} claims, 0 failures\n"


def test_a_loss_that_is_wrong_is_named(monkeypatch, capsys):
    monkeypatch.setattr(_verify_losses, "softmax", lambda z: z.softmax(1).detach() + 0 * z)
    assert main(["verify"]) == 1
    summary, *failures = capsys.readouterr().out.split("\n\n")[-1].splitlines()
    assert summary.endswith(f" claims, {len(failures)} failures")
    assert failures[0] == "softmax: backward: SILENTLY WRONG"


def test_a_device_that_is_not_there_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        main(["verify", "--device=cuda"])
    assert one_line(capsys).startswith("torch-softmax verify: device must be one that torch finds")
