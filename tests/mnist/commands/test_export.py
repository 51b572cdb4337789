"""The command that exports: what it writes gives the model's probabilities, or is not written."""

import json

import pytest
import torch

from tests.helpers import one_line
from torch_softmax.__main__ import main
from torch_softmax.mnist.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from torch_softmax.mnist.commands import export
from torch_softmax.mnist.commands._parsers import EXPORT_FORMATS
from torch_softmax.mnist.data import load_dataset
from torch_softmax.mnist.settings import Settings


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The path of a classifier of the digits before its first epoch."""
    path = tmp_path_factory.mktemp("run") / "model.pt"
    save_checkpoint(path, Checkpoint.start(Settings(), load_dataset("digits", "nowhere")))
    return path


@pytest.fixture(scope="module", params=["pt2", "onnx"])
def exported(request, checkpoint):
    """The path of the same classifier as exported."""
    for module in export.FORMATS[request.param].modules:
        pytest.importorskip(module)
    output = checkpoint.with_suffix(f".{request.param}")
    assert main(["export", str(checkpoint), f"--format={request.param}"]) == 0
    return output


@pytest.mark.parametrize("batch_size", [1, 5])
def test_the_exported_file_gives_the_probabilities(exported, checkpoint, batch_size):
    predict = export.FORMATS[exported.suffix[1:]].read(exported.read_bytes())
    model = load_checkpoint(checkpoint).build_model()
    pixels = torch.rand(batch_size, 64)
    torch.testing.assert_close(predict(pixels), model.predict_proba(pixels).detach())


def test_the_exported_program_is_of_torch_operators_alone(checkpoint, tmp_path):
    main(["export", str(checkpoint), f"--output={tmp_path / 'a.pt2'}"])
    nodes = torch.export.load(tmp_path / "a.pt2").graph.nodes
    calls = [str(node.target) for node in nodes if node.op not in ("placeholder", "output")]
    assert calls == ["aten.linear.default", "aten.softmax.int"]


def test_an_exported_pt2_tells_what_it_is(checkpoint, tmp_path):
    main(["export", str(checkpoint), f"--output={tmp_path / 'a.pt2'}"])
    extra_files = {"description.json": ""}
    torch.export.load(tmp_path / "a.pt2", extra_files=extra_files)
    description = json.loads(extra_files["description.json"])
    assert description["dataset"] == "digits"
    assert description["pixels"].startswith("float32 (batch, 64)")
    assert description["probabilities"].startswith("float32 (batch, 10)")


def test_an_exported_onnx_tells_what_it_is(checkpoint, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    main(["export", str(checkpoint), f"--output={tmp_path / 'a.onnx'}"])
    written = onnx.load(tmp_path / "a.onnx")
    assert {entry.key: entry.value for entry in written.metadata_props}["dataset"] == "digits"
    assert [value.name for value in written.graph.input] == ["pixels"]
    assert [value.name for value in written.graph.output] == ["probabilities"]


def test_one_line_tells_where_the_exported_file_is(checkpoint, tmp_path, capsys):
    main(["export", str(checkpoint), f"--output={tmp_path / 'a.pt2'}"])
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"saved {tmp_path / 'a.pt2'}; read back, its probabilities differ by at")


@pytest.mark.parametrize("name", ["model.pt", ""])
@pytest.mark.parametrize(
    ("given_format", "output", "chosen"),
    [
        (None, None, "model.pt2"),
        ("onnx", None, "model.onnx"),
        (None, "a.onnx", "a.onnx"),
        ("pt2", "a.pt2", "a.pt2"),
    ],
)
def test_the_output_is_given_or_lies_beside_the_checkpoint(
    checkpoint, name, given_format, output, chosen
):
    run_dir = checkpoint.parent
    given = None if output is None else run_dir / output
    assert export.choose_output(run_dir / name, given_format, given) == run_dir / chosen


# What can't be


@pytest.mark.parametrize("error", [0.5, float("nan")])
def test_an_exported_file_with_other_probabilities_is_not_written(
    checkpoint, tmp_path, monkeypatch, capsys, error
):
    output = tmp_path / "a.pt2"
    output.write_text("old")
    right = export.FORMATS["pt2"]

    def read_wrong(content):
        predict = right.read(content)
        return lambda pixels: predict(pixels) + error * (len(pixels) == 1)

    monkeypatch.setitem(export.FORMATS, "pt2", right._replace(read=read_wrong))
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


def test_the_formats_are_those_of_the_help():
    assert tuple(export.FORMATS) == EXPORT_FORMATS
