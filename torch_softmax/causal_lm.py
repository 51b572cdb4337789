"""Calls of a causal language model of `transformers` that give its loss, and never make logits."""

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .functional import linear_cross_entropy
from .losses._numbers import changed

__all__ = ["call_without_logits"]

# What the logits of the probe are: one for the scale, one for the cap, the others up to a REACH.
# The first is a power of 2, so that a scale that is a float comes back as that very float.
SMALL, LARGE, REACH = 2.0**-20, 2.0**40, 100.0


def call_without_logits(
    model: nn.Module,
    *,
    labels: Tensor,
    chunk_size: int | None = None,
    z_loss: float = 0.0,
    **inputs: Any,
) -> Any:
    """`model(labels=labels, **inputs)`, whose loss is computed a few rows of logits at a time.

    All but the head is the model's own: its forward, the shift of its labels, what a mixture of
    experts adds to the loss, and the wrapper around it (`DistributedDataParallel`, a PEFT model).
    In place of the head's product the model gets a few numbers as logits. What it makes of those
    tells the scale a and the cap c of

        L = Σ lse − z'_label over num_items_in_batch,  with  z' = c tanh(a z / c),  lse = log Σ e^z'

    and anything else that it does to logits raises. The loss is float32 in half precision.

    Args:
        model: A model with `get_output_embeddings` and `loss_function`, as those of transformers
            have them, whose head is a plain `nn.Linear`; or a wrapper around one.
        labels: Class indices (B, T) as the model takes them, not shifted; -100 is ignored.
        chunk_size: The rows whose logits are held at a time; see `linear_cross_entropy`.
        z_loss: ζ, at least 0, which adds ζ lse² to the loss of each row that counts.
        inputs: What else the model takes, such as `input_ids`, `attention_mask` and
            `num_items_in_batch`, the number of labels of all micro-batches and ranks.

    Returns:
        The output of the model, with `loss`, and None for `logits`.

    Raises:
        TypeError: The model is none of these, is compiled, or is replicated by `DataParallel`; its
            head is something else than its weight and bias (an adapter, a quantised one, one with
            hooks); or it does to its logits what a scale and a cap don't say.
        ValueError: The labels don't fit.

    Example:
        >>> from torch_softmax.causal_lm import call_without_logits
        >>> loss = call_without_logits(model, input_ids=ids, labels=ids).loss  # doctest: +SKIP

    Source: for the cap, Gemma 2 (2024), section 2; for the z-loss, PaLM (2022), section 5.
    """
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a tensor, got {type(labels).__name__}")
    causal_lm: Any = _with_loss_function(model)
    head = _plain_linear(causal_lm.get_output_embeddings())
    call = _Call(head, chunk_size, z_loss)
    own = causal_lm.loss_function
    if getattr(own, "__name__", "") != "ForCausalLMLoss":
        raise TypeError(f"model must have ForCausalLMLoss as its loss_function, got {own!r}")
    head.forward = call.probed  # type: ignore[method-assign]
    causal_lm.loss_function = call.loss
    try:
        outputs = model(labels=labels, **inputs)
    except Exception as error:
        if call.hidden is None:
            raise
        raise TypeError(
            f"model must take its logits to its loss_function, but {type(causal_lm).__name__} does "
            f"something else with them first: {error}"
        ) from error
    finally:
        del head.forward
        causal_lm.loss_function = own
    return call.finished(outputs)


def _with_loss_function(model: nn.Module) -> nn.Module:
    """The causal language model that is wrapped in a model."""
    for module in model.modules():
        if isinstance(module, nn.DataParallel):
            raise TypeError("model must not be replicated by DataParallel: use one GPU a process")
        # A compiled forward would not see what is replaced here, or be compiled at each call.
        if "_orig_mod" in module._modules or module._compiled_call_impl is not None:
            raise TypeError("model must not be compiled as a whole: compile its layers")
        # Of the class: wrappers have all that is in them as attributes of their own.
        if hasattr(type(module), "loss_function"):
            return module
    raise TypeError(
        "model must be a causal language model of transformers, with a loss_function, "
        f"got {type(model).__name__}"
    )


def _plain_linear(head: object) -> nn.Linear:
    """A model's head, if it does nothing but multiply with its weight and add its bias."""
    if type(head) is not nn.Linear:
        given = type(head).__name__
    elif "forward" in vars(head):
        given = "one with a forward of its own"
    elif (
        head._forward_hooks
        or head._forward_pre_hooks
        or head._backward_hooks
        or head._backward_pre_hooks
    ):
        given = "one with hooks"
    else:
        return head
    raise TypeError(
        "the output head of model must be a plain nn.Linear, for it is not called but its weight "
        f"and bias are taken, got {given}"
    )


class _Call:
    """What stands in for a head and for a loss function, for one call of a model."""

    def __init__(self, head: nn.Linear, chunk_size: int | None, z_loss: float) -> None:
        self.head, self.chunk_size, self.z_loss = head, chunk_size, z_loss
        self.probe = _probe(head.out_features)
        self.hidden: Tensor | None = None  # from the head's call to that of the loss function
        self.value: Tensor | None = None

    def probed(self, input: Tensor) -> Tensor:
        """Keep the hidden states (B, T, D), and return the logits (1, 1, K) of the probe."""
        if self.hidden is not None or self.value is not None:
            raise TypeError("model must call its output head once, got a second call")
        self.hidden = input
        # The probe stays on the CPU, so that nothing waits for a device.
        return self.probe.clone()

    def loss(
        self,
        logits: Tensor,
        labels: Tensor | None,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | float | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **others: Any,
    ) -> Tensor:
        """The loss of the hidden states, with the signature and the shift of `ForCausalLMLoss`."""
        hidden, self.hidden = self.hidden, None
        if hidden is None:
            raise TypeError("model must call its output head, and then its loss_function, once")
        scale, cap = _scale_and_cap(self.probe, logits)
        # Whoever uses these logits for anything else gets no number.
        logits.detach().fill_(math.nan)
        target = shift_labels
        if target is None:
            assert labels is not None
            target = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(hidden.device)
        # Only now: a sharded weight is whole while its layer's forward runs.
        if type(self.head.weight) not in (nn.Parameter, Tensor):
            raise TypeError(
                "the output head of model must have a plain tensor as its weight, "
                f"got {type(self.head.weight).__name__}"
            )
        self.value = linear_cross_entropy(
            hidden,
            self.head.weight,
            target.to(hidden.device),
            linear_bias=self.head.bias,
            ignore_index=ignore_index,
            chunk_size=self.chunk_size,
            dtype=torch.promote_types(hidden.dtype, torch.float32),
            softcap=cap,
            logit_scale=scale,
            z_loss=self.z_loss,
            count=num_items_in_batch,
        )
        return self.value

    def finished(self, outputs: Any) -> Any:
        """The outputs of the model without the logits of the probe."""
        if self.value is None:
            raise TypeError("model must call its output head, and then its loss_function, once")
        if not dataclasses.is_dataclass(outputs) or isinstance(outputs, type):
            raise TypeError(f"model must return its output by name, got {type(outputs).__name__}")
        loss = outputs.loss  # type: ignore[attr-defined]
        if loss is not self.value and loss.isnan() and not self.value.isnan():
            raise TypeError("model must use its logits for its loss_function alone")
        return dataclasses.replace(outputs, logits=None)


def _probe(classes: int) -> Tensor:
    """Logits (1, 1, K) that tell what a model does to logits."""
    known = torch.tensor([SMALL, LARGE], dtype=torch.float64)
    others = torch.linspace(-REACH, REACH, max(classes - 2, 0), dtype=torch.float64)
    return torch.cat([known, others])[:classes].view(1, 1, -1)


def _scale_and_cap(probe: Tensor, made: Tensor) -> tuple[float, float | None]:
    """The scale and the cap by which a model has made logits from those of the probe."""
    exact = made.dtype in (torch.float32, torch.float64)
    if exact and made.shape == probe.shape and probe.numel() > 1 and not made.requires_grad:
        small, large, *_ = made.flatten().tolist()
        scale, cap = small / SMALL, None
        if not math.isclose(large, scale * LARGE, rel_tol=1e-3):
            cap = abs(large) or None  # its tanh is 1
            if math.isclose(scale, 1, rel_tol=1e-6):  # but for what c tanh(z / c) rounds
                scale = 1.0
        expected = changed(probe, math.inf if cap is None else cap, scale).z.to(made)
        if torch.allclose(made, expected, rtol=1e-5, atol=1e-6):
            return scale, cap
    raise TypeError(
        "model must do nothing to its logits but scale them and cap them by c tanh(z / c)"
    )
