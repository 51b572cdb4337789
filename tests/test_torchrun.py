"""What a command does in one of torchrun's processes."""

import signal
import sys

import pytest

from torch_softmax._command_line import stop_on_interrupt
from torch_softmax._torchrun import launcher, one_voice


def test_an_interruption_that_is_passed_on_is_no_second_one():
    with stop_on_interrupt(patient=True) as stop:
        assert not stop()
        for _ in range(3):
            signal.raise_signal(signal.SIGINT)
        assert stop()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    ("rank", "local_rank", "out", "err"),
    [("0", "0", "out", "err"), ("1", "1", "", ""), ("2", "0", "", "err")],
)
def test_one_process_prints_and_one_on_each_machine_its_errors(
    monkeypatch, capsys, rank, local_rank, out, err
):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    with one_voice():
        print("out", end="")
        print("err", end="", file=sys.stderr)
    assert capsys.readouterr() == (out, err)


def test_a_command_line_begins_as_this_process_did(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert launcher() == ["python"]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert launcher() == ["torchrun", "--nproc-per-node", "4"]
