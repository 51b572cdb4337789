"""Export a trained classifier for use without this package, by torch.export or as ONNX.

Both take `pixels` and return `probabilities`, for any batch size, as does the function
`torch.export.load("model.pt2").module()`. The file also holds the name of the data set and the
meaning of input and output: a .pt2 as the extra file description.json, ONNX as metadata.
"""

import argparse
import io
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ..._command_line import Parser
from ..._values import UserError
from ._options import add_run_argument

if TYPE_CHECKING:
    from torch import Tensor, nn

EXPORT_FORMATS = ("pt2", "onnx")
BATCH_SIZES = (1, 2, 1000)  # to compare on
TOLERANCE = 1e-4  # of a probability: other sums round otherwise, wrong ones are off by far more


def add_parser(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add the command `export`."""
    parser = commands.add_parser(
        "export",
        help="write a trained classifier for use without this package",
        description="Export a trained classifier for use without this package. It takes pixels, "
        "float32 of shape (batch, D) from 0 to 1, and returns probabilities, float32 of shape "
        "(batch, classes), for any batch size.",
        example="torch-softmax export runs/short --output digits.pt2",
    )
    add_run_argument(parser)
    parser.add_argument(
        "--format",
        choices=EXPORT_FORMATS,
        help="pt2 is for torch.export.load; onnx needs the extra [onnx] "
        "(default: what --output ends in, else pt2)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="where it goes, replacing any that is there (default: beside the checkpoint)",
    )


def run(args: argparse.Namespace) -> None:
    """Export, read back, compare, and only then write."""
    import torch
    from torch import nn

    from ..._files import write_atomically
    from ..checkpoints import load_checkpoint

    output = choose_output(args.run_dir, args.format, args.output)
    is_onnx = output.suffix == ".onnx"
    if is_onnx and not (find_spec("onnx") and find_spec("onnxscript")):
        raise UserError('needs onnx and onnxscript: pip install "torch_softmax[onnx]"')
    checkpoint = load_checkpoint(args.run_dir)
    model = checkpoint.build_model().requires_grad_(False)
    # Torch's own softmax: nothing is differentiated here, and every runtime has it.
    classifier = nn.Sequential(model, nn.Softmax(-1)).eval()
    features, classes = model.in_features, model.num_classes
    description = {
        "dataset": checkpoint.dataset,
        "pixels": f"float32 (batch, {features}), row by row, from 0 (background) to 1 (ink)",
        "probabilities": f"float32 (batch, {classes}), of the classes 0 to {classes - 1}",
    }
    write, read = (write_onnx, read_onnx) if is_onnx else (write_pt2, read_pt2)
    content = write(classifier, torch.zeros(2, features), description)
    predict = read(content)
    batches = [torch.rand(size, features) for size in BATCH_SIZES]
    errors = [(predict(x) - model.predict_proba(x)).abs().max() for x in batches]
    error = float(torch.stack(errors).max())  # nan wins
    if not error <= TOLERANCE:
        raise UserError(f"probabilities differ by {error:.1e} once read back; nothing was written")
    write_atomically(output, content)
    print(f"saved {output}; read back, its probabilities differ by at most {error:.1e}")


def choose_output(checkpoint: Path, format: str | None, output: Path | None) -> Path:
    """Return the path to write to, which ends in the format."""
    from ..checkpoints import CHECKPOINT_NAME

    if output is None:
        beside = checkpoint / CHECKPOINT_NAME if checkpoint.is_dir() else checkpoint
        return beside.with_suffix(f".{format or EXPORT_FORMATS[0]}")
    endings = [f".{format}"] if format else [f".{name}" for name in EXPORT_FORMATS]
    if output.suffix not in endings:
        raise ValueError(f"output must end in {' or '.join(endings)}, got {str(output)!r}")
    return output


def write_pt2(classifier: "nn.Module", example: "Tensor", description: dict[str, str]) -> bytes:
    """Return the file that torch.export.load reads."""
    import torch

    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(classifier, (example,), dynamic_shapes=shapes, strict=False)
    buffer = io.BytesIO()
    extra_files = {"description.json": json.dumps(description)}
    torch.export.save(program, buffer, extra_files=extra_files)
    return buffer.getvalue()


def read_pt2(content: bytes) -> "Callable[[Tensor], Tensor]":
    """Return the function in such a file."""
    import torch

    return torch.export.load(io.BytesIO(content)).module()


def write_onnx(classifier: "nn.Module", example: "Tensor", description: dict[str, str]) -> bytes:
    """Return the ONNX file, by torch's own exporter."""
    import torch

    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.onnx.export(
        classifier,
        (example,),
        dynamo=True,
        dynamic_shapes=shapes,
        input_names=["pixels"],
        output_names=["probabilities"],
        verbose=False,
    )
    assert program is not None  # as it is with dynamo
    program.model.metadata_props.update(description)
    content: bytes = program.model_proto.SerializeToString()
    return content


def read_onnx(content: bytes) -> "Callable[[Tensor], Tensor]":
    """Return the function in such a file, as the reference implementation runs it."""
    import onnx
    import torch
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(onnx.load_from_string(content))

    def predict(pixels: "Tensor") -> "Tensor":
        (probabilities,) = evaluator.run(None, {"pixels": pixels.numpy()})
        return torch.from_numpy(probabilities)

    return predict
