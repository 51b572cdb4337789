"""The command that exports: what it writes gives the model's probabilities, or is not written."""

import json

import pytest
import torch

from tests.helpers import one_line
from torch_softmax.__main__ import main
from torch_softmax.mnist.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from torch_softmax.mnist.commands import export
from torch_softmax.mnist.data import load_dataset
from torch_softmax.mnist.settings import Settings


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The path of a classifier of the digits before its first epoch."""
    path = tmp_path_factory.mktemp("run") / "model.pt"
    save_checkpoint(path, Checkpoint.start(Settings(), load_dataset("digits", "nowhere")))
    return path


@pytest.fixture(scope="module")
def pt2(checkpoint):
    """The path of the classifier as exported for torch."""
    assert main(["export", str(checkpoint)]) == 0
    return checkpoint.with_suffix(".pt2")


@pytest.fixture(scope="module")
def onnx_file(checkpoint):
    """The path of the classifier as exported for ONNX."""
    for module in ("onnx", "onnxscript"):
        pytest.importorskip(module)
    assert main(["export", str(checkpoint), "--format=onnx"]) == 0
    return checkpoint.with_suffix(".onnx")


@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize("format", export.EXPORT_FORMATS)
def test_the_exported_file_gives_the_probabilities(request, checkpoint, format, batch_size):
    pixels = torch.rand(batch_size, 64)
    if format == "pt2":
        probabilities = torch.export.load(request.getfixturevalue("pt2")).module()(pixels)
    else:
        path = request.getfixturevalue("onnx_file")
        evaluator = pytest.importorskip("onnx.reference").ReferenceEvaluator(str(path))
        probabilities = torch.from_numpy(evaluator.run(None, {"pixels": pixels.numpy()})[0])
    model = load_checkpoint(checkpoint).build_model()
    torch.testing.assert_close(probabilities, model.predict_proba(pixels).detach())


def test_an_exported_pt2_is_of_torch_operators_alone_and_tells_what_it_is(pt2):
    extra_files = {"description.json": ""}
    nodes = torch.export.load(pt2, extra_files=extra_files).graph.nodes
    calls = [str(node.target) for node in nodes if node.op not in ("placeholder", "output")]
    assert calls == ["aten.linear.default", "aten.softmax.int"]
    description = json.loads(extra_files["description.json"])
    assert description["dataset"] == "digits"
    assert description["pixels"].startswith("float32 (batch, 64)")
    assert description["probabilities"].startswith("float32 (batch, 10)")


def test_an_exported_onnx_tells_what_it_is(onnx_file):
    written = pytest.importorskip("onnx").load(onnx_file)
    assert {entry.key: entry.value for entry in written.metadata_props}["dataset"] == "digits"
    assert [value.name for value in written.graph.input] == ["pixels"]
    assert [value.name for value in written.graph.output] == ["probabilities"]


@pytest.mark.parametrize("name", ["model.pt", ""])
def test_one_line_tells_where_the_exported_file_is(checkpoint, tmp_path, capsys, name):
    main(["export", str(checkpoint.parent / name), f"--output={tmp_path / 'a.pt2'}"])
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"saved {tmp_path / 'a.pt2'}; read back, its probabilities differ by at")
    assert (tmp_path / "a.pt2").exists()


# What can't be


@pytest.mark.parametrize("error", [0.5, float("nan")])
def test_an_exported_file_with_other_probabilities_is_not_written(
    checkpoint, tmp_path, monkeypatch, capsys, error
):
    output = tmp_path / "a.pt2"
    output.write_text("old")
    read = export.read_pt2

    def read_wrong(content):
        predict = read(content)
        return lambda pixels: predict(pixels) + error * (len(pixels) == 1)

    monkeypatch.setattr(export, "read_pt2", read_wrong)
    assert main(["export", str(checkpoint), f"--output={output}"]) == 1
    line = one_line(capsys)
    assert line.startswith("torch-softmax export: probabilities differ by ")
    assert line.endswith(" nothing was written")
    assert output.read_text() == "old"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output=a.txt"], "output must end in .pt2 or .onnx, got 'a.txt'"),
        (["--output=a.pt2", "--format=onnx"], "output must end in .onnx, got 'a.pt2'"),
        (["--format=pt"], "argument --format: invalid choice: 'pt'"),
    ],
)
def test_a_bad_option_is_one_line(checkpoint, capsys, options, message):
    with pytest.raises(SystemExit, match="2"):
        main(["export", str(checkpoint), *options])
    assert one_line(capsys).startswith(f"torch-softmax export: {message}")


def test_a_checkpoint_that_is_not_there(tmp_path, capsys):
    assert main(["export", str(tmp_path / "none.pt")]) == 1
    assert "No such file or directory" in one_line(capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_to_export_to_that_is_not_there(checkpoint, tmp_path, capsys):
    output = tmp_path / "none" / "a.pt2"
    assert main(["export", str(checkpoint), f"--output={output}"]) == 1
    assert one_line(capsys).startswith(
        f"torch-softmax export: {output} can't be written: No such file"
    )


def test_without_onnx_the_extra_is_named(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    assert main(["export", str(checkpoint), "--format=onnx"]) == 1
    assert one_line(capsys).endswith('pip install "torch_softmax[onnx]"')
