"""Break each formula of the package in turn, and see whether the tests notice.

    python -m scripts.check.mutations
    python -m scripts.check.mutations --only bias

A mutant takes the place of a function, whatever stands in its body. Where a line within a loop is
meant, which no function stands for, a text is replaced in a copy of the package. Some of the tests
run until the first fails. The exit status is 0 only where every mutation is caught.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from torch_softmax import _checks as checks
from torch_softmax._command_line import Parser, run_command

from .mutants import MUTATIONS, Mutant, Text

ROOT = Path(__file__).resolve().parents[2]

# The tests to run for a mutation: those of its file, and then those of the whole.
TESTS = ("tests/test_derivation.py", "tests/losses/test_properties.py", "tests/test_verify.py")
TESTS_OF = {
    "functional.py": "losses/test_log_prob losses/test_distillation losses/test_mapped "
    "losses/test_as_torch losses/test_softmax losses/test_linear_memory",
    "losses/_formulas.py": "losses/test_row_functions losses/test_log_prob losses/test_logits "
    "losses/test_extra",
    "losses/_numbers.py": "losses/test_extra losses/test_log_prob losses/test_row_functions",
    "losses/_targets.py": "losses/test_extra losses/test_logits losses/test_left_out_rows "
    "losses/test_mapped losses/test_compiled",
    "losses/logits.py": "losses/test_extra losses/test_logits losses/test_linear",
    "losses/distillation.py": "losses/test_distillation losses/test_row_functions",
    "losses/mapped.py": "losses/test_mapped",
    "losses/_small.py": "losses/test_small",
    "losses/_chunked.py": "losses/test_row_functions losses/test_left_out_rows losses/test_mapped "
    "losses/test_promises losses/test_linear",
    "losses/_products.py": "losses/test_row_functions losses/test_linear",
    "losses/_sweeps.py": "losses/test_row_functions losses/test_many losses/test_mapped "
    "losses/test_linear",
    "losses/_autograd.py": "losses/test_softmax losses/test_small losses/test_mapped "
    "losses/test_as_torch losses/test_promises",
    "losses/_operators.py": "losses/test_extra losses/test_compiled losses/test_promises",
    "losses/_dtypes.py": "losses/test_mapped losses/test_as_torch",
    "_transforms.py": "losses/test_promises",
    "causal_lm.py": "test_causal_lm",
    "optim/_objective.py": "optim/test_objective optim/test_newton",
    "optim/_hessian.py": "optim/test_objective curvature/test_hessian",
    "curvature/_sweeps.py": "curvature/test_hessian",
    "curvature/_solve.py": "curvature/test_solve",
    "curvature/laplace.py": "curvature/test_laplace",
    "curvature/sampling.py": "curvature/test_sampling",
    "mnist/training.py": "mnist/test_training",
}


@contextmanager
def copy_of_package() -> Iterator[Path]:
    """A copy of the package and its tests, in a directory that is gone afterwards."""
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory)
        for name in ("torch_softmax", "tests", "scripts"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        yield copy


def first_failure(
    place: Path, tests: Sequence[str], command: Sequence[str] = ("pytest",)
) -> str | None:
    """Run tests in a place until the first fails, and return its name; None if all pass.

    Args:
        place: A folder that holds the package and its tests.
        tests: What to run there.
        command: The module that runs them, with its own arguments.

    Raises:
        RuntimeError: The tests could not be run.
    """
    options = ["-x", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", *command, *options, *tests],
        cwd=place,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        return None
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", done.stdout, re.MULTILINE)
    if done.returncode != 1 or failed is None:
        raise RuntimeError(f"pytest ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return failed[1]


def suite_of(mutation: Mutant | Text) -> list[str]:
    """The tests that should notice a mutation."""
    return [*(f"tests/{name}.py" for name in TESTS_OF[mutation.file].split()), *TESTS]


def what_notices(mutation: Mutant | Text) -> str | None:
    """The first test that fails with a mutation; None if it survives them all."""
    if isinstance(mutation, Mutant):
        return first_failure(ROOT, suite_of(mutation), ["scripts.check.mutants", mutation.name])
    with copy_of_package() as copy:
        mutation.apply(copy / "torch_softmax")
        return first_failure(copy, suite_of(mutation))


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = Parser(
        prog="check.mutations",
        description="Break each formula in turn, and see whether the tests notice.",
        example="python -m scripts.check.mutations --only bias",
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="mutations named like this")
    parser.add_argument("--jobs", type=int, default=2, help="mutations at a time (default: 2)")
    arguments = parser.parse_args(argv)
    return run_command(parser, lambda: check(arguments.only, arguments.jobs))


def check(only: str, jobs: int) -> int:
    """Try the mutations with some text in their names, and print what became of each.

    Args:
        only: The text.
        jobs: Mutations at a time.

    Returns:
        0 where all are caught, by tests that pass without them; else 1.
    """
    checks.positive("--jobs", jobs)
    chosen = [mutation for mutation in MUTATIONS if only in mutation.name]
    if not chosen:
        raise ValueError(f"--only must be a text in the name of a mutation, got {only!r}")
    noticed = []
    with ThreadPoolExecutor(jobs) as pool:
        for mutation, test in zip(chosen, pool.map(what_notices, chosen), strict=True):
            print(
                f"{'caught' if test else 'SURVIVED':<10}{mutation.name:<48}{test or ''}", flush=True
            )
            noticed += [test] if test else []
    print(f"\n{len(noticed)} of {len(chosen)} mutations caught")
    # A test that fails anyway has noticed nothing.
    broken = first_failure(ROOT, sorted(set(noticed))) if noticed else None
    if broken:
        print(f"but without any mutation too, this test fails: {broken}")
    return 0 if len(noticed) == len(chosen) and not broken else 1


if __name__ == "__main__":
    sys.exit(main())
