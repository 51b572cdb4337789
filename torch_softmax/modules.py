"""The classifier and the two losses as modules, which hold parameters and options."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from . import _checks as checks
from . import functional
from .losses._small import small_loss
from .losses._targets import (
    check_classes,
    logit_options_of,
    options_of,
)


class SoftmaxRegression(nn.Linear):
    """Softmax regression: a linear layer whose outputs are the logits of the classes.

    p(k | x) = S_k(z) with z = x Wᵀ + b and S = softmax(z). It is an `nn.Linear`, whose state_dict
    (`weight`, `bias`) it shares.

    Args:
        in_features: D, the size of an input.
        num_classes: K.
        bias: Whether there is a b.
        device, dtype: Those of the parameters.

    Example:
        >>> model = SoftmaxRegression(2, 3)
        >>> model(torch.zeros(5, 2)).shape
        torch.Size([5, 3])
        >>> model.predict(torch.zeros(5, 2)).dtype
        torch.int64

    Source: Bishop, Pattern Recognition and Machine Learning (2006), section 4.3.4.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        checks.positive("in_features", in_features)
        checks.positive("num_classes", num_classes)
        super().__init__(in_features, num_classes, bias, device, dtype)

    @property
    def num_classes(self) -> int:
        """K."""
        return self.out_features

    def loss(self, input: Tensor, target: Tensor, **options: Any) -> Tensor:
        """The cross-entropy of `self(input)`, in memory for only a few rows of logits.

        Args:
            input: (..., D).
            target: Class indices (...) or probabilities (..., K).
            options: Those of `linear_cross_entropy`, such as `reduction` or `label_smoothing`.
        """
        return functional.linear_cross_entropy(
            input, self.weight, target, linear_bias=self.bias, **options
        )

    def loss_and_predicted(self, input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The mean loss with the most probable class of each input, as `loss` and `predict` say.

        A small batch on a CPU gets both from the same logits, without a second product.

        Args:
            input: (..., D).
            target: Class indices (...) or probabilities (..., K).

        Example:
            >>> model = SoftmaxRegression(2, 3)
            >>> loss, predicted = model.loss_and_predicted(torch.eye(2), torch.tensor([0, 2]))
            >>> torch.equal(predicted, model.predict(torch.eye(2)))
            True
        """
        batch = (input, self.weight, self.bias, target)
        if small := small_loss(batch, "mean", (-100, 0.0, 1.0, 0.0), predict=True):
            loss, predicted = small
            return loss, predicted
        with torch.no_grad():
            predicted = self.predict(input)
        return self.loss(input, target), predicted

    def predict_proba(self, input: Tensor) -> Tensor:
        """The probability of each class, (..., K), for inputs (..., D)."""
        return functional.softmax(self(input), -1)

    def predict(self, input: Tensor) -> Tensor:
        """The most probable class, an int64 index (...), for inputs (..., D)."""
        predicted: Tensor = self(input).argmax(-1)
        return predicted


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """A drop-in for `nn.CrossEntropyLoss`, in closed form; see `functional.cross_entropy`.

    Example:
        >>> CrossEntropyLoss(reduction="sum")(torch.zeros(2, 4), torch.tensor([0, 1]))
        tensor(2.7726)
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        options_of(weight, ignore_index, self.reduction, label_smoothing, dtype)
        self.dtype = dtype

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of logits (C), (N, C) or (N, C, d1, ...)."""
        return functional.cross_entropy(
            input,
            target,
            self.weight,
            self.ignore_index,
            self.reduction,
            self.label_smoothing,
            dtype=self.dtype,
        )


class LinearCrossEntropyLoss(nn.Module):
    """A drop-in for `nn.LinearCrossEntropyLoss`; see `functional.linear_cross_entropy`.

    It has the same arguments and state_dict keys, with `chunk_size` in place of `options`.

    Args:
        in_features: D, the size of an input.
        num_classes: C.
        out_features: The further dimensions (d1, ...) of an input's losses, mostly none.
        bias: Whether the linear layer has a bias.
        device, dtype: Those of the parameters.
        reduction, weight, ignore_index, label_smoothing, chunk_size: As in the function.
        loss_dtype: Its `dtype`.
        softcap, logit_scale, z_loss: As in the function.

    Example:
        >>> head = LinearCrossEntropyLoss(2, 3)
        >>> head(torch.zeros(5, 2), torch.tensor([0, 1, 2, 0, 1])).item() == math.log(3)
        False
        >>> sorted(head.state_dict())
        ['linear.weight']
    """

    weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        chunk_size: int | None = None,
        loss_dtype: torch.dtype | None = None,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        z_loss: float = 0.0,
    ) -> None:
        super().__init__()
        checks.positive("in_features", in_features)
        checks.positive("num_classes", num_classes)
        ignored = -100 if ignore_index is None else ignore_index
        options_of(weight, ignored, reduction, label_smoothing, loss_dtype)
        check_classes(num_classes, weight)
        checks.chunk_size(chunk_size)
        _, self.logit_scale, self.z_loss = logit_options_of(softcap, logit_scale, z_loss)
        self.softcap = softcap
        self.num_classes = num_classes
        self.out_features = out_features
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.chunk_size = chunk_size
        self.loss_dtype = loss_dtype
        self.register_buffer("weight", weight)
        # The parameters keep two dimensions, as an nn.Linear has.
        outputs = math.prod(out_features, start=num_classes)
        self.linear = nn.Linear(in_features, outputs, bias, device, dtype)

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        row_weight: Tensor | None = None,
        count: Tensor | float | None = None,
    ) -> Tensor:
        """The loss of inputs (..., D), or (N, D) with `out_features`.

        Args:
            input: x.
            target: Class indices or probabilities.
            row_weight: What the loss of each row is multiplied with.
            count: What a mean divides by.
        """
        weight, bias = self.linear.weight, self.linear.bias
        if self.out_features:
            shape = (self.num_classes, *self.out_features)
            weight = weight.unflatten(0, shape)
            bias = None if bias is None else bias.unflatten(0, shape)
        return functional.linear_cross_entropy(
            input,
            weight,
            target,
            linear_bias=bias,
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            chunk_size=self.chunk_size,
            dtype=self.loss_dtype,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            z_loss=self.z_loss,
            row_weight=row_weight,
            count=count,
        )

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        words = [f"reduction={self.reduction!r}", f"label_smoothing={self.label_smoothing}"]
        usual = {"softcap": None, "logit_scale": 1.0, "z_loss": 0.0}
        words += [f"{n}={getattr(self, n)}" for n, v in usual.items() if getattr(self, n) != v]
        return ", ".join(words)
