"""The command that breaks formulas: its mutations fit the package, and it says which survive."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import check_mutations
from check_mutations import MUTATIONS, ROOT, Mutation, main

PACKAGE = ROOT / "torch_softmax"


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_fits_the_package(mutation):
    source = (PACKAGE / mutation.file).read_text()
    assert source.count(mutation.old) == 1
    compile(source.replace(mutation.old, mutation.new), mutation.file, "exec")


def test_names_tell_mutations_apart():
    names = [mutation.name for mutation in MUTATIONS]
    assert len(set(names)) == len(names)


def test_a_text_that_is_gone_is_an_error(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    with pytest.raises(
        ValueError, match=r"'gone' must find its text once in a\.py, found it 0 times"
    ):
        Mutation("gone", "a.py", "y = 1", "y = 2").apply(tmp_path)


@pytest.fixture
def one_mutation(monkeypatch, tmp_path):
    """A package of one line with its test, and the mutation of that line."""

    def prepare(new, *, right="2"):
        for name in ("torch_softmax", "tests"):
            (tmp_path / name).mkdir()
        (tmp_path / "pyproject.toml").write_text("")
        (tmp_path / "torch_softmax" / "__init__.py").write_text("two = 2\n")
        test = f"import torch_softmax\n\ndef test_two():\n    assert torch_softmax.two == {right}\n"
        (tmp_path / "tests" / "test_two.py").write_text(test)
        monkeypatch.setattr(check_mutations, "ROOT", tmp_path)
        monkeypatch.setattr(check_mutations, "TESTS", ())
        monkeypatch.setattr(check_mutations, "TESTS_OF", {"__init__.py": "tests/test_two.py"})
        mutation = Mutation("another number", "__init__.py", "two = 2", new)
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
