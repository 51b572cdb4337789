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
from typing import NamedTuple

from torch_softmax import _checks as checks
from torch_softmax._command_line import Parser, run_command

from .mutants import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[2]

# The tests to run for a mutation: those of the whole, which are fast, and then those of its room.
TESTS = ("tests/test_derivation.py", "tests/losses/test_properties.py", "tests/test_verify.py")
TESTS_OF = {
    "losses/_formulas.py": ["tests/losses/test_logits.py"],
    "losses/_targets.py": ["tests/losses/test_logits.py"],
    "losses/_cross_entropy.py": ["tests/losses/test_linear.py"],
    "losses/_capped.py": ["tests/losses/test_extra.py", "tests/losses/test_by_hand.py"],
    "losses/_mapped.py": ["tests/losses/test_mapped.py"],
    "losses/log_prob.py": ["tests/losses/test_log_prob.py", "tests/losses/test_by_hand.py"],
    "losses/distillation.py": ["tests/losses/test_distillation.py"],
    "losses/_small.py": ["tests/losses/test_small.py"],
    "losses/_chunked.py": ["tests/losses/test_linear.py"],
    "losses/_products.py": ["tests/losses/test_linear.py", "tests/losses/test_promises.py"],
    "losses/_sweeps.py": ["tests/losses/test_linear.py", "tests/losses/test_promises.py"],
    "losses/_autograd.py": ["tests/losses/test_softmax.py", "tests/losses/test_small.py"],
    "optim/_objective.py": ["tests/optim"],
    "optim/_hessian.py": ["tests/curvature/test_hessian.py", "tests/optim"],
    "curvature/_sweeps.py": ["tests/curvature/test_hessian.py"],
    "losses/_many.py": ["tests/losses/test_many.py"],
    "curvature/_solve.py": ["tests/curvature/test_solve.py"],
    "curvature/laplace.py": ["tests/curvature/test_laplace.py"],
    "curvature/sampling.py": ["tests/curvature/test_sampling.py"],
    "mnist/training.py": ["tests/mnist/test_training.py"],
}


class Text(NamedTuple):
    """A text of the package, which occurs once in its file, and what to put in its place."""

    name: str
    file: str
    old: str
    new: str

    def apply(self, package: Path) -> None:
        """Change a copy of the package.

        Raises:
            ValueError: The old text does not occur exactly once.
        """
        path = package / self.file
        source = path.read_text(encoding="utf-8")
        if source.count(self.old) != 1:
            raise ValueError(
                f"mutation {self.name!r} must find its text once in {self.file}, "
                f"found it {source.count(self.old)} times: {self.old!r}"
            )
        path.write_text(source.replace(self.old, self.new), encoding="utf-8")


TEXTS = [
    Text(
        "chunks: sums of the last one alone",
        "losses/_chunked.py",
        "result += part",
        "result.copy_(part)",
    ),
    Text(
        "map: ∂L/∂b of the last block alone",
        "losses/_mapped.py",
        "out.b.add_(gradient.sum(0))",
        "out.b.copy_(gradient.sum(0))",
    ),
    Text(
        "map: a shared gradient of the last block alone",
        "losses/_mapped.py",
        "total.add_(gradient)",
        "total.copy_(gradient)",
    ),
    Text(
        "distillation: T for T²",
        "losses/distillation.py",
        "divergence = temperature**2 * divergence",
        "divergence = temperature * divergence",
    ),
    Text(
        "total: hand out what was taken twice",
        "losses/_autograd.py",
        "taken, ctx.taken = ctx.taken, None",
        "taken = ctx.taken",
    ),
    Text(
        "linear: ∂L/∂b of the last block alone",
        "losses/_sweeps.py",
        "out.b.add_(gradient.sum(0))",
        "out.b.copy_(gradient.sum(0))",
    ),
    Text(
        "linear: S for S − y in ∂L/∂x and ∂L/∂W",
        "losses/_sweeps.py",
        "g = put(z, block, gradient)",
        "g = put(z, block, torch.softmax(wide, 1))",
    ),
    Text(
        "linear: ∂L/∂x over that of the first chunk",
        "losses/_sweeps.py",
        "pull_to_rows(g, W, out.x[rows])",
        "pull_to_rows(g, W, out.x[: len(g)])",
    ),
    Text(
        "linear Hessian: no uW g",
        "losses/_sweeps.py",
        "add_pulled_to_rows_(out.x[rows], g, uW)",
        "pass",
    ),
    Text(
        "linear Hessian: no g uxᵀ",
        "losses/_sweeps.py",
        "add_pulled_to_classes_(out.W, g, moved)",
        "pass",
    ),
    Text(
        "linear Hessian: b of the last block alone",
        "losses/_sweeps.py",
        "out.b.add_(second.by_z.sum(0))",
        "out.b.copy_(second.by_z.sum(0))",
    ),
    Text(
        "capped: half of the gradient of the z-loss",
        "losses/_capped.py",
        "2 * options.z_loss * lse",
        "options.z_loss * lse",
    ),
    Text(
        "log-prob: the gradient of the entropy without log Σ",
        "losses/log_prob.py",
        "row.entropy - row.total.log()",
        "row.entropy",
    ),
    Text(
        "many directions: what the first one does, for each",
        "losses/_many.py",
        "t[some].flatten(0, 1)",
        "t[: some.stop - some.start].flatten(0, 1)",
    ),
    Text(
        "hessian: what the rows count is left out",
        "optim/_hessian.py",
        "chunk.weighted(product, block)",
        "product",
    ),
    Text(
        "newton: trials of half the length",
        "optim/_objective.py",
        "torch.lerp(z, end, length / self.length)",
        "torch.lerp(z, end, length / 2)",
    ),
    Text(
        "curvature: the diagonal of x, not of its square",
        "curvature/_sweeps.py",
        "a, cast(chunk.x, S.dtype).square()",
        "a, cast(chunk.x, S.dtype)",
    ),
    Text(
        "curvature: the trace without that of the bias",
        "curvature/_sweeps.py",
        "squares += 1",
        "pass",
    ),
    Text(
        "curvature: a residual as it is carried along",
        "curvature/_solve.py",
        "residual = g - multiply(u)",
        "residual = torch.zeros_like(g)",
    ),
    Text(
        "curvature: variances of no prior",
        "curvature/laplace.py",
        "b.clamp(min=0)) + precision)",
        "b.clamp(min=0)) + 1)",
    ),
    Text(
        "curvature: labels that are impossible",
        "curvature/sampling.py",
        "right=True",
        "right=False",
    ),
]
MUTATIONS: list[Mutant | Text] = [*MUTANTS, *TEXTS]


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
    return [*TESTS, *TESTS_OF[mutation.file]]


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
