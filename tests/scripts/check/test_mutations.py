"""The command that breaks formulas: its mutations fit the package, and it says which survive."""

import subprocess
import sys

import pytest

from scripts.check import mutations as check_mutations
from scripts.check.mutants import MUTATIONS, Mutant, Text
from scripts.check.mutations import ROOT, main, suite_of

PACKAGE = ROOT / "torch_softmax"


def of_kind(kind):
    of_it = [mutation for mutation in MUTATIONS if isinstance(mutation, kind)]
    return pytest.mark.parametrize("mutation", of_it, ids=lambda mutation: mutation.name)


@of_kind(Text)
def test_a_text_fits_the_package(mutation):
    source = (PACKAGE / mutation.file).read_text()
    assert source.count(mutation.old) == 1
    compile(source.replace(mutation.old, mutation.new), mutation.file, "exec")


@of_kind(Mutant)
def test_a_mutant_has_its_place(mutation):
    owner, name = mutation.place()
    original = vars(owner)[name]
    assert callable(mutation.change(getattr(original, "func", original)))


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_has_its_tests(mutation):
    assert all((ROOT / test).exists() for test in suite_of(mutation))


@pytest.mark.parametrize(
    ("change", "printed"),
    [
        ("lambda f: lambda *args: 'mutant'", "mutant"),
        ("given(linear_weight=torch.Tensor.flipud)", "tensor([1])"),
        ("returning(neg)", "tensor([0])"),
    ],
    ids=["another function", "another argument", "another result"],
)
def test_a_mutant_is_met_by_every_name_of_its_function(change, printed):
    """In a process of its own, as it stays."""
    script = f"""
import torch
from torch_softmax.curvature import sample_labels
from torch_softmax import curvature
from scripts.check.mutants import Mutant, given, neg, returning

Mutant("", "curvature/sampling.py", "sample_labels", {change}).take_its_place()
assert curvature.sample_labels is curvature.sampling.sample_labels is not sample_labels
print(curvature.sample_labels(torch.ones(1, 1), torch.tensor([[99.0], [0.0]])))
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"{printed}\n"


def test_names_tell_mutations_apart():
    names = [mutation.name for mutation in MUTATIONS]
    assert len(set(names)) == len(names)


def test_a_text_that_is_gone_is_an_error(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    with pytest.raises(
        ValueError, match=r"'gone' must find its text once in a\.py, found it 0 times"
    ):
        Text("gone", "a.py", "y = 1", "y = 2").apply(tmp_path)


@pytest.fixture
def one_mutation(monkeypatch, tmp_path):
    """A package of one line with its test, and the mutation of that line."""

    def prepare(new, *, right="2"):
        for name in ("torch_softmax", "tests", "scripts"):
            (tmp_path / name).mkdir()
        (tmp_path / "pyproject.toml").write_text("")
        (tmp_path / "torch_softmax" / "__init__.py").write_text("two = 2\n")
        test = f"import torch_softmax\n\ndef test_two():\n    assert torch_softmax.two == {right}\n"
        (tmp_path / "tests" / "test_two.py").write_text(test)
        monkeypatch.setattr(check_mutations, "ROOT", tmp_path)
        monkeypatch.setattr(check_mutations, "TESTS", ())
        monkeypatch.setattr(check_mutations, "TESTS_OF", {"__init__.py": "test_two"})
        mutation = Text("another number", "__init__.py", "two = 2", new)
        monkeypatch.setattr(check_mutations, "MUTATIONS", [mutation])

    return prepare


def test_a_mutation_that_is_caught(one_mutation, capsys):
    one_mutation("two = 3")
    assert main([]) == 0
    output = capsys.readouterr().out
    assert output.split()[:4] == ["caught", "another", "number", "tests/test_two.py::test_two"]
    assert output.splitlines()[-1] == "1 of 1 mutations caught"


def test_a_mutation_that_survives(one_mutation, capsys):
    one_mutation("two = 1 + 1")
    assert main([]) == 1
    output = capsys.readouterr().out
    assert output.split()[:3] == ["SURVIVED", "another", "number"]
    assert output.splitlines()[-1] == "0 of 1 mutations caught"


def test_a_test_that_fails_anyway_catches_nothing(one_mutation, capsys):
    one_mutation("two = 3", right="4")
    assert main([]) == 1
    assert capsys.readouterr().out.splitlines()[-1].endswith("fails: tests/test_two.py::test_two")


@pytest.mark.parametrize(
    "options", [["--jobs", "0"], ["--jobs", "all"], ["--only", "no such name"]]
)
def test_a_bad_argument_is_one_line(options, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(options)
    (line,) = capsys.readouterr().err.splitlines()
    assert options[0] in line
