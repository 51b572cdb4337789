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
    "_formulas.py": "tests/test_logits_loss.py",
    "_targets.py": "tests/test_logits_loss.py",
    "logits_loss.py": "tests/test_logits_loss.py",
    "_chunks.py": "tests/test_linear_loss.py",
    "_sweeps.py": "tests/test_linear_loss.py",
    "linear_loss.py": "tests/test_linear_loss.py",
    "_functions.py": "tests/test_softmax.py",
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
        "_formulas.py",
        (
            "Jacobian: S_i δ_ij alone",
            "return u - (mean if spread is None else spread.sum_(mean))",
            "return u",
        ),
        (
            "Jacobian: swap the δ",
            "return softmax * centred(softmax, u, dim)",
            "return softmax * (centred(softmax, u, dim) + u.sum(dim, keepdim=True) - 2 * u)",
        ),
        ("loss: drop the − y · z", " - y.dot(z, top)", ""),
        ("loss: forget the mass m", "-weigh(share.log(), y.mass(z))", "-share.log()"),
        ("gradient: drop the − y", "return y.subtract_from_(softmax, r)", "return softmax"),
        ("gradient: forget the mass m", "in (r, y.mass(softmax)):", "in (r,):"),
        (
            "gradient: forget the row's weight r",
            "in (r, y.mass(softmax)):",
            "in (y.mass(softmax),):",
        ),
        (
            "∂L/∂y: swap the sign",
            "(-torch.log_softmax(z, 1))",
            "(torch.log_softmax(z, 1))",
        ),
        ("∂L/∂y: forget the row's weight r", "log_softmax(z, 1)), r)", "log_softmax(z, 1)))"),
        ("Hessian: forget the mass m", "weigh(s * c, y.mass(z))", "s * c"),
        ("Hessian: forget the row's weight r", "weigh(along_z, r)", "along_z"),
        ("Hessian: forget how y moves S − y", " * s - dy\n", " * s\n"),
        (
            "Hessian: forget how y moves the mass",
            "+ dy.sum(1, keepdim=True) * s - dy",
            "- dy",
        ),
        ("slope: forget how y moves it", "slope = slope - (dy *", "slope = slope - 0 * (dy *"),
        ("slope by y: forget the scale", "weigh(y.push_forward(-c), r)", "weigh(-c, r)"),
    ),
    *mutations(
        "_targets.py",
        ("weight: ignore it in y", "r if hot is None else r * hot", "r"),
        ("weight: ignore it in y · z", "product = product * hot", "pass"),
        (
            "weight: ignore it in the mass",
            "mass = self.hot()",
            "mass = None",
        ),
        (
            "weight: ignore it in the mean",
            "weights = weight[target]",
            "weights = 0 * weight[target] + 1",
        ),
        ("smoothing: forget the 1/K", "(label_smoothing / classes)", "label_smoothing"),
        ("smoothing: keep all of y", "(1 - label_smoothing)", "1"),
        ("smoothing: no floor in the gradient", "gradient.addr_(r, self.floor, alpha=-1)", "pass"),
        ("smoothing: no floor in the mass", "mass + self.floor.sum()", "mass"),
        ("probabilities: no scale in a change", " else dp * self.scale", " else dp"),
        (
            "ignore_index: count the ignored",
            "keep.sum(dtype=dtype)",
            "0.0 * keep.sum() + len(keep)",
        ),
        (
            "ignore_index: weigh the ignored",
            "weights if keep is None else weights * keep",
            "weights",
        ),
    ),
    *mutations(
        "logits_loss.py",
        ("logits: forget the 1/B", "loss = loss / rows.divisor", "pass"),
        ("logits: a mean of nothing is 0", "loss.masked_fill(rows.empty, nan)", "loss"),
        ("logits: keep the ignored", "loss = loss.masked_fill(~rows.keep, 0)", "pass"),
        (
            "logits: no slope by r in double backward",
            "None, along_r, None, None",
            "None, 0 * r, None, None",
        ),
        ("logits: no change of r in forward mode", "if dr is not None:", "if False:"),
    ),
    *mutations(
        "_chunks.py",
        (
            "chunks: drop a ragged last one",
            "range(0, max(1, rows), step)",
            "range(0, max(1, rows - rows % step), step)",
        ),
    ),
    *mutations(
        "_sweeps.py",
        ("linear: skip the bias", "torch.addmm(b.unsqueeze(1), W, x.t())", "torch.mm(W, x.t())"),
        (
            "linear: skip the bias of many classes",
            "out.copy_(b).addmm_(x, W.t())",
            "_multiply_(out, x, W.t())",
        ),
        ("linear: ∂L/∂b of the last block alone", "db += dz.sum(0)", "db.copy_(dz.sum(0))"),
        (
            "linear: ∂L/∂W of the last chunk alone",
            "total.addmm_(a.to(total.dtype), x.to(total.dtype))",
            "total.addmm_(a.to(total.dtype), x.to(total.dtype), beta=0)",
        ),
        (
            "linear: S for S − y in ∂L/∂x and ∂L/∂W",
            "                z[block] = dz",
            "                z[block] = torch.softmax(wide, 1)",
        ),
        (
            "linear: ∂L/∂x over that of the first chunk",
            "_multiply_(dx[rows], z, W)",
            "_multiply_(dx[: len(z)], z, W)",
        ),
        ("linear Hessian: skip a change of x", "((ux, W), (x, uW))", "((None, W), (x, uW))"),
        ("linear Hessian: skip a change of W", "((ux, W), (x, uW))", "((ux, W), (x, None))"),
        ("linear Hessian: skip a change of b", "wide_u += ub", "pass"),
        ("linear Hessian: no uW g", "hx[rows].addmm_(g, uW)", "pass"),
        ("linear Hessian: no g uxᵀ", "_add_product_(hW, g, ux[rows])", "pass"),
        (
            "linear Hessian: b of the last block alone",
            "hb += along_z.sum(0)",
            "hb.copy_(along_z.sum(0))",
        ),
    ),
    *mutations(
        "linear_loss.py",
        ("fused: keep the ignored", "losses = losses.masked_fill(r == 0, 0)", "pass"),
        (
            "fused: forget the 1/B in backward",
            "scale = upstream / divisor",
            "scale = upstream",
        ),
        (
            "fused: forget the 1/B in forward mode",
            "tangent.sum() / divisor",
            "tangent.sum()",
        ),
        (
            "fused: forget the gradient from above",
            "r = upstream if r is None else r * upstream",
            "r = torch.ones_like(upstream) if r is None else r",
        ),
        ("fused: hand out the saved gradient twice", "        ctx.gradients = _NOTHING\n", ""),
        (
            "fused: double backward from the saved gradient",
            "(None if g is None else g * scale for",
            "(None if g is None else g.detach() * scale for",
        ),
        (
            "fused: no slope by r in double backward",
            "slope if ctx.needs_input_grad[6]",
            "0 * slope if ctx.needs_input_grad[6]",
        ),
        ("fused: no change of r in forward mode", "if dr is None:", "if True:"),
        (
            "fused: third order of the last chunk alone",
            "functools.reduce(torch.add, chunks)",
            "chunks[-1]",
        ),
    ),
    *mutations(
        "_functions.py",
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
