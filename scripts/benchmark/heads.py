"""The problems of what else is asked of a layer's logits, with gradients: who contends in them."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_softmax.functional import linear_cross_entropy, linear_distillation, linear_log_prob

from .losses import Loss, gradients, layer, layer_with_gradients, products
from .measure import Floor, Place, Problem, Results, Shape
from .rivals import require

SOFTCAP, Z_LOSS = 30.0, 1e-4
ENTROPY = 0.01  # its share in the objective


def student_and_teacher(shape: Shape, place: Place) -> Results:
    """Rows and weights of a student in the midst of a model, and of a teacher that is frozen."""
    x, W, _ = layer_with_gradients(shape, place)
    teacher_x, teacher_W, _ = layer(shape, place)
    return x, W, teacher_x, teacher_W


def dense_distillation(x: Tensor, W: Tensor, teacher_x: Tensor, teacher_W: Tensor) -> Tensor:
    """The forward KL of all logits at once."""
    student, teacher = (F.linear(*of).log_softmax(1) for of in ((x, W), (teacher_x, teacher_W)))
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def liger_distillation(x: Tensor, W: Tensor, teacher_x: Tensor, teacher_W: Tensor) -> Tensor:
    """That of Liger with a β of 0, which is the forward KL there, and no share of labels."""
    package = require("liger_kernel.chunked_loss")
    loss = package.LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0)
    unused = torch.zeros(len(x), dtype=torch.long, device=x.device)
    result: Tensor = loss(x, W, teacher_x, teacher_W, unused)
    return result


def dense_capped(x: Tensor, W: Tensor, target: Tensor) -> Tensor:
    """The loss of capped logits with its z-loss."""
    z = SOFTCAP * torch.tanh(F.linear(x, W) / SOFTCAP)
    return F.cross_entropy(z, target) + Z_LOSS * z.logsumexp(1).square().mean()


def our_capped(x: Tensor, W: Tensor, target: Tensor) -> Tensor:
    """The same, fused."""
    return linear_cross_entropy(x, W, target, softcap=SOFTCAP, z_loss=Z_LOSS)


def dense_policy(x: Tensor, W: Tensor, target: Tensor) -> Tensor:
    """Log-probabilities, and an entropy, of all logits at once."""
    log_S = F.linear(x, W).log_softmax(1)
    log_prob = log_S.gather(1, target.unsqueeze(1)).squeeze(1)
    entropy = -(log_S.exp() * log_S).sum(1)
    return -(log_prob + ENTROPY * entropy).mean()


def our_policy(x: Tensor, W: Tensor, target: Tensor) -> Tensor:
    """The same, fused."""
    of = linear_log_prob(x, W, target)
    return -(of.log_prob + ENTROPY * of.entropy).mean()


def beside_dense(
    section: str,
    inputs: Callable[[Shape, Place], Results],
    floor: tuple[str, Floor],
    dense: Loss,
    ours: Loss,
    **others: Loss,
) -> Problem:
    """A loss with its gradients by torch's dense functions, ours and others', to bare products."""
    losses = {"torch dense": dense, "ours": ours, **others}
    return Problem(
        section=section,
        inputs=inputs,
        floors=dict([floor]),
        contestants={name: partial(gradients, loss) for name, loss in losses.items()},
        reference="torch dense",
        yardstick=floor[0],
    )


THREE = "three products", partial(products, 1, 1, 1)
FOUR = "four products", partial(products, 2, 1, 1)

# The student's three products, and the teacher's logits.
DISTILLATION = beside_dense(
    "distillation",
    student_and_teacher,
    FOUR,
    dense_distillation,
    linear_distillation,
    Liger=liger_distillation,
)
CAPPED = beside_dense("capped", layer_with_gradients, THREE, dense_capped, our_capped)
# What is sent back is known only after all rows, so that the logits are made twice.
LOG_PROB = beside_dense("log-prob", layer_with_gradients, FOUR, dense_policy, our_policy)
