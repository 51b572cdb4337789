"""Break each formula of the package in turn, and see whether the tests notice.

    python scripts/check_mutations.py
    python scripts/check_mutations.py --only bias

Each mutation replaces a text in a copy of the package, and some of the tests run on that copy until
the first fails. The exit status is 0 only where every mutation is caught.
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

from torch_softmax._command_line import Parser

ROOT = Path(__file__).resolve().parents[1]

# The tests to run for a mutation: those of the whole, which are fast, and then those of its room.
TESTS = ("tests/test_derivation.py", "tests/test_properties.py", "tests/test_verify.py")
TESTS_OF = {
    "losses/_formulas.py": "tests/test_logits_loss.py",
    "losses/_targets.py": "tests/test_logits_loss.py",
    "losses/_cross_entropy.py": "tests/test_linear_loss.py",
    "losses/_chunked.py": "tests/test_linear_loss.py",
    "losses/_sweeps.py": "tests/test_linear_loss.py",
    "losses/_autograd.py": "tests/test_softmax.py",
    "training.py": "tests/test_training.py",
}


class Mutation(NamedTuple):
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


def mutations(file: str, *changes: tuple[str, str, str]) -> list[Mutation]:
    """The mutations of a file."""
    return [Mutation(name, file, old, new) for name, old, new in changes]


MUTATIONS = [
    *mutations(
        "losses/_formulas.py",
        (
            "Jacobian: S_i δ_ij alone",
            "softmax * (u - (softmax * u).sum(dim, keepdim=True))",
            "softmax * u",
        ),
        (
            "Jacobian: swap the δ",
            "softmax * (u - (softmax * u).sum(dim, keepdim=True))",
            "softmax * ((softmax * u).sum(dim, keepdim=True) - u)",
        ),
        ("definition: no exponential", "(z - top).exp().sum(1).log()", "(z - top).sum(1)"),
        ("loss: forget log Σ e^z", "Numbers(-S.amax(1).log(), y", "Numbers(0 * S.amax(1), y"),
        ("gap: of the label above the top", "z.gather(1, self", "-z.gather(1, self"),
        ("gap: forget the floor", ".masked_fill(self.floor == 0, 0) * self.floor", " * 0"),
        ("gap: forget the label's share", "product(self.hot, total)", "total"),
        ("gap: 0 · ∞", "torch.where((weight == 0) & value.isinf(), 0, weight", "(weight"),
        ("gradient: drop the − y", "return y.subtract_from_(softmax, weights.t)", "return softmax"),
        ("gradient: forget the weight s", "softmax *= weights.s.unsqueeze(1)", "pass"),
        (
            "gradient: forget the weight t",
            "y.subtract_from_(softmax, weights.t)",
            "y.subtract_from_(softmax, None)",
        ),
        (
            "gradient: forget the label's share",
            "for weight in (t, self.hot):",
            "for weight in (t,):",
        ),
        (
            "gradient: forget the floor",
            "gradient -= weigh(self.floor.expand",
            "gradient -= 0 * weigh(self.floor.expand",
        ),
        ("∂T/∂y: swap the sign", "    by_y = top - z", "    by_y = z - top"),
        ("∂T/∂p: forget the scale", "by_y if y.scale is None else", "by_y if True else"),
        ("∂T/∂p: forget the weight t", "return by_p if t is None else", "return by_p if True else"),
        ("Hessian: S ∘ u alone", "weigh(u - mean.unsqueeze(1), weights.s)", "weigh(u, weights.s)"),
        (
            "Hessian: forget the weight s",
            "weigh(u - mean.unsqueeze(1), weights.s)",
            "(u - mean.unsqueeze(1))",
        ),
        ("Hessian: forget a change of s", "by_z += change.ds.unsqueeze(1)", "pass"),
        (
            "Hessian: forget a change of t",
            "by_z = y.subtract_from_(by_z, change.dt)",
            "pass",
        ),
        ("Hessian: forget how y moves S − y", "by_z -= weigh(dy, weights.t)", "pass"),
        (
            "slope: forget how y moves it",
            "slope = slope + product(dy,",
            "slope = slope + 0 * product(dy,",
        ),
        (
            "slope by p: forget the scale",
            "weigh(y.push_forward(-u), weights.t)",
            "weigh(-u, weights.t)",
        ),
        (
            "slope by p: forget the weight t",
            "weigh(y.push_forward(-u), weights.t)",
            "y.push_forward(-u)",
        ),
    ),
    *mutations(
        "losses/_targets.py",
        (
            "weight: ignore it in y",
            "hot = mass = None if weight is None else",
            "hot = mass = None if True else",
        ),
        (
            "weight: ignore it in the mass",
            "None if weight is None else hot + floor",
            "None if True else hot + floor",
        ),
        (
            "weight: ignore it in the mean",
            "divisor = (hot if keep is None else hot * keep).sum()",
            "pass",
        ),
        (
            "smoothing of labels: keep all of y",
            "dtype) if hot is None else hot) * (1 - smoothing)",
            "dtype) if hot is None else hot)",
        ),
        ("smoothing: no floor in the mass", "mass = mass + floor.sum()", "pass"),
        (
            "probabilities: no mass",
            "mass = p.sum(1, dtype=dtype)",
            "mass = 0 * p.sum(1, dtype=dtype) + 1",
        ),
        (
            "ignore_index: count the ignored",
            "keep.sum(dtype=dtype)",
            "0.0 * keep.sum() + len(keep)",
        ),
        (
            "ignore_index: weigh the ignored",
            "(hot if keep is None else hot * keep)",
            "hot",
        ),
    ),
    *mutations(
        "losses/_cross_entropy.py",
        ("forget the 1/B", "loss = loss / rows.divisor", "pass"),
        ("a mean of nothing is 0", "loss = loss.masked_fill(rows.empty, nan)", "pass"),
        ("keep the ignored", "loss = loss.masked_fill(~rows.keep, 0)", "pass"),
        ("forget the mass", "log_sum if rows.mass is None else", "log_sum if True else"),
        ("sum: forget the mass", "counts if rows.mass is None else", "counts if True else"),
        (
            "sum: keep the ignored",
            "counts = rows.keep.to(how.dtype)",
            "counts = 0 * rows.keep.to(how.dtype) + 1",
        ),
    ),
    *mutations(
        "losses/_chunked.py",
        (
            "chunks: drop a ragged last one",
            "range(0, max(1, rows), step)",
            "range(0, max(1, rows - rows % step), step)",
        ),
        ("chunks: sums of the last one alone", "result += part", "result.copy_(part)"),
        (
            "total: forget the gradient from above",
            "scaled_(next(gradients), upstream)",
            "next(gradients)",
        ),
        ("total: hand out what was taken twice", "self.taken.pop()", "self.taken[0]"),
        ("total: forget the weights", "product(weight, result) for", "result for"),
    ),
    *mutations(
        "losses/_sweeps.py",
        (
            "linear: skip the bias",
            "W @ x.t() if b is None else torch.addmm(b.unsqueeze(1), W, x.t())",
            "W @ x.t()",
        ),
        (
            "linear: skip the bias of many classes",
            "return torch.addmm(bias, a, b, out=out)",
            "return torch.mm(a, b, out=out)",
        ),
        (
            "linear: ∂L/∂b of the last block alone",
            "out.b.add_(gradient.sum(0))",
            "out.b.copy_(gradient.sum(0))",
        ),
        (
            "linear: ∂L/∂W of the last chunk alone",
            "cast(x, total.dtype), out=total)",
            "cast(x, total.dtype), beta=0, out=total)",
        ),
        (
            "linear: S for S − y in ∂L/∂x and ∂L/∂W",
            "g = _put(z, block, gradient)",
            "g = _put(z, block, torch.softmax(wide, 1))",
        ),
        (
            "linear: ∂L/∂x over that of the first chunk",
            "torch.mm(g, W, out=out.x[rows])",
            "torch.mm(g, W, out=out.x[: len(g)])",
        ),
        (
            "linear Hessian: skip a change of x",
            "u = torch.addmm(u, ux.to(u.dtype), here.W.t().to(u.dtype), out=u)",
            "pass",
        ),
        ("linear Hessian: skip a change of b", "u if ub is None else u.add_(ub)", "u"),
        ("linear Hessian: no uW g", "torch.addmm(out.x[rows], g, uW, out=out.x[rows])", "pass"),
        ("linear Hessian: no g uxᵀ", "_add_product_(out.W, g, moved)", "pass"),
        (
            "linear Hessian: b of the last block alone",
            "out.b.add_(second.by_z.sum(0))",
            "out.b.copy_(second.by_z.sum(0))",
        ),
        ("an ignored row that holds nan", "masked_fill(~inputs.keep.unsqueeze(1), 0)", "clone()"),
    ),
    *mutations(
        "losses/_autograd.py",
        (
            "forward mode: off where it nests",
            "_set_fwd_grad_enabled(True)",
            "_set_fwd_grad_enabled(False)",
        ),
    ),
    *mutations(
        "training.py",
        (
            "training: step uphill",
            "parameter.sub_(gradient, alpha=lr)",
            "parameter.add_(gradient, alpha=lr)",
        ),
        (
            "training: forget the learning rate",
            "parameter.sub_(gradient, alpha=lr)",
            "parameter.sub_(gradient)",
        ),
        (
            "training: decay the wrong way",
            "gradient.add(parameter, alpha=weight_decay)",
            "gradient.sub(parameter, alpha=weight_decay)",
        ),
    ),
]


@contextmanager
def copy_of_package() -> Iterator[Path]:
    """A copy of the package and its tests, in a directory that is gone afterwards."""
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory)
        for name in ("torch_softmax", "tests"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        yield copy


def first_failure(copy: Path, tests: Sequence[str]) -> str | None:
    """Run tests of a copy until the first fails, and return its name; None if all pass.

    Raises:
        RuntimeError: The tests could not be run.
    """
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", done.stdout, re.MULTILINE)
    if done.returncode != 1 or failed is None:
        raise RuntimeError(f"pytest ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return failed[1]


def what_notices(mutation: Mutation) -> str | None:
    """The first test that fails with a mutation; None if it survives them all."""
    with copy_of_package() as copy:
        mutation.apply(copy / "torch_softmax")
        return first_failure(copy, [*TESTS, TESTS_OF[mutation.file]])


def main(argv: list[str] | None = None) -> int:
    """Try every mutation and print what became of it."""
    parser = Parser(description="Break each formula in turn, and see whether the tests notice.")
    parser.add_argument("--only", default="", metavar="TEXT", help="mutations named like this")
    parser.add_argument("--jobs", type=int, default=2, help="mutations at a time (default: 2)")
    arguments = parser.parse_args(argv)
    if arguments.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {arguments.jobs}")
    chosen = [mutation for mutation in MUTATIONS if arguments.only in mutation.name]
    if not chosen:
        parser.error(f"--only {arguments.only!r}: no mutation has this in its name")

    noticed = []
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for mutation, test in zip(chosen, pool.map(what_notices, chosen), strict=True):
            print(
                f"{'caught' if test else 'SURVIVED':<10}{mutation.name:<48}{test or ''}", flush=True
            )
            noticed += [test] if test else []
    print(f"\n{len(noticed)} of {len(chosen)} mutations caught")
    # A test that fails anyway has noticed nothing.
    with copy_of_package() as copy:
        broken = first_failure(copy, sorted(set(noticed))) if noticed else None
    if broken:
        print(f"but without any mutation too, this test fails: {broken}")
    return 0 if len(noticed) == len(chosen) and not broken else 1


if __name__ == "__main__":
    sys.exit(main())
