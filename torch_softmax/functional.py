"""The three functions, as drop-ins for those of `torch.nn.functional`."""

from .linear_loss import linear_cross_entropy
from .logits_loss import cross_entropy
from .softmax import softmax

__all__ = ["cross_entropy", "linear_cross_entropy", "softmax"]
