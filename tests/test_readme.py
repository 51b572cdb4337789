import os
import re
import socket
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from tests.distributed.world import PROCESSES

README = Path(__file__).resolve().parents[1] / "README.md"

# A block of Python, and the block right behind it, if there is one, of what it prints.
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:```\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)
BLOCKS = BLOCK.findall(README.read_text(encoding="utf-8"))


def test_every_block_of_code_is_found():
    assert len(BLOCKS) == README.read_text(encoding="utf-8").count("```python") > 0


def run(code, folder, environment, output):
    """Run code in this process, which is a fresh one."""
    os.chdir(folder)
    os.environ |= environment
    with output.open("w") as file, redirect_stdout(file):
        exec(code, {"__name__": "__main__"})


@pytest.mark.parametrize(("code", "printed"), BLOCKS, ids=range(len(BLOCKS)))
def test_a_block_of_code_prints_what_it_says(code, printed, tmp_path):
    if "transformers" in code:
        pytest.importorskip("transformers")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # As torchrun sets them for one process.
    ranks = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    output = tmp_path / "output"
    process = PROCESSES.Process(target=run, args=(code, tmp_path, ranks, output))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    assert output.read_text() == printed
