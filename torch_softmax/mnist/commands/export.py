"""Export a trained classifier for use without this package, by torch.export or as ONNX.

    torch-softmax export runs/short                  # runs/short/model.pt2
    torch-softmax export runs/short --format onnx    # runs/short/model.onnx

Both take `pixels` and return `probabilities`, for any batch size. In torch:

    classify = torch.export.load("model.pt2").module()
    probabilities = classify(pixels)

The name of the data set and the meaning of input and output go along: in a .pt2 as the extra file
description.json, in ONNX as metadata.
"""

import argparse
import io
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ... import SoftmaxRegression
from ..._files import write_atomically
from ..._values import UserError
from ..checkpoints import CHECKPOINT_NAME, load_checkpoint

DYNAMIC = {"pixels": {0: torch.export.Dim("batch")}}
BATCH_SIZES = (1, 2, 1000)  # to compare on
TOLERANCE = 1e-4  # of a probability: other sums round otherwise, wrong ones are off by far more

Description = dict[str, str]
Predict = Callable[[Tensor], Tensor]


class Classifier(nn.Module):
    """Pixels (batch, D) in, probabilities (batch, K) out."""

    def __init__(self, model: SoftmaxRegression) -> None:
        super().__init__()
        self.model = model
        self.example = torch.zeros(2, model.in_features)

    def forward(self, pixels: Tensor) -> Tensor:
        # Torch's own operator: nothing is differentiated here, and every runtime has it.
        return torch.softmax(self.model(pixels), -1)

    def describe(self, dataset: str) -> Description:
        """What a user of the exported file must know."""
        features, classes = self.model.in_features, self.model.num_classes
        return {
            "dataset": dataset,
            "pixels": f"float32 (batch, {features}), row by row, from 0 (background) to 1 (ink)",
            "probabilities": f"float32 (batch, {classes}), of the classes 0 to {classes - 1}",
        }


def write_pt2(classifier: Classifier, description: Description) -> bytes:
    """The file that torch.export.load reads."""
    program = torch.export.export(
        classifier, (classifier.example,), dynamic_shapes=DYNAMIC, strict=False
    )
    buffer = io.BytesIO()
    extra_files = {"description.json": json.dumps(description)}
    torch.export.save(program, buffer, extra_files=extra_files)
    return buffer.getvalue()


def read_pt2(content: bytes) -> Predict:
    """The function in such a file."""
    return torch.export.load(io.BytesIO(content)).module()


def write_onnx(classifier: Classifier, description: Description) -> bytes:
    """The ONNX file, by torch's own exporter."""
    program = torch.onnx.export(
        classifier,
        (classifier.example,),
        dynamo=True,
        dynamic_shapes=DYNAMIC,
        input_names=["pixels"],
        output_names=["probabilities"],
        verbose=False,
    )
    assert program is not None  # as it is with dynamo
    program.model.metadata_props.update(description)
    content: bytes = program.model_proto.SerializeToString()
    return content


def read_onnx(content: bytes) -> Predict:
    """The function in such a file, as the reference implementation runs it."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(onnx.load_from_string(content))

    def predict(pixels: Tensor) -> Tensor:
        (probabilities,) = evaluator.run(None, {"pixels": pixels.numpy()})
        return torch.from_numpy(probabilities)

    return predict


class Format(NamedTuple):
    """How to write and to read back a kind of file, and the modules of an extra that it needs."""

    write: Callable[[Classifier, Description], bytes]
    read: Callable[[bytes], Predict]
    modules: tuple[str, ...] = ()


FORMATS = {
    "pt2": Format(write_pt2, read_pt2),
    "onnx": Format(write_onnx, read_onnx, ("onnx", "onnxscript")),
}


def run(args: argparse.Namespace) -> None:
    """Export, read back, compare, and only then write."""
    output = choose_output(args.run_dir, args.format, args.output)
    chosen = FORMATS[output.suffix[1:]]
    if not all(map(find_spec, chosen.modules)):
        needed = " and ".join(chosen.modules)
        raise UserError(f'needs {needed}: pip install "torch_softmax[onnx]"')
    checkpoint = load_checkpoint(args.run_dir)
    model = checkpoint.build_model().requires_grad_(False)
    classifier = Classifier(model).eval()
    content = chosen.write(classifier, classifier.describe(checkpoint.dataset))
    error = largest_error(model, chosen.read(content))
    if not error <= TOLERANCE:
        raise UserError(f"probabilities differ by {error:.1e} once read back; nothing was written")
    write_atomically(output, content)
    print(f"saved {output}; read back, its probabilities differ by at most {error:.1e}")


def choose_output(checkpoint: Path, format: str | None, output: Path | None) -> Path:
    """The path to write to, whose ending is that of the format."""
    if output is None:
        beside = checkpoint / CHECKPOINT_NAME if checkpoint.is_dir() else checkpoint
        return beside.with_suffix(f".{format or 'pt2'}")
    endings = [f".{format}"] if format else [f".{name}" for name in FORMATS]
    if output.suffix not in endings:
        raise ValueError(f"output must end in {' or '.join(endings)}, got {str(output)!r}")
    return output


def largest_error(model: SoftmaxRegression, predict: Predict) -> float:
    """The largest difference of a probability, on random pixels in batches of several sizes."""
    batches = [torch.rand(size, model.in_features) for size in BATCH_SIZES]
    return max(float((predict(x) - model.predict_proba(x)).abs().max()) for x in batches)
