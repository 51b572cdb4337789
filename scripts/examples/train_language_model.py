"""Train a small language model by a dense loss and by ours: one curve, less memory.

    python -m scripts.examples.train_language_model                      # a minute or two
    python -m scripts.examples.train_language_model --loss soft-capped   # or another of LOSSES
    python -m scripts.examples.train_language_model --by ours            # without the dense one

The model is a causal transformer, its text the sources of Python's own standard library. What it
takes to change to ours is the body of one function: that of `dense_z_loss` for `our_z_loss`, say.
"""

import argparse
import math
import platform
import re
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from scripts.benchmark.measure import MIB, SEED, Place, fresh_process, peak_bytes, reason
from torch_softmax import _checks as checks
from torch_softmax._command_line import Parser, add_device_option, choose_device, run_command
from torch_softmax.functional import linear_cross_entropy, linear_distillation, linear_log_prob

CHARACTERS = 4_000_000
WORD = re.compile(r" ?\w+|\s+|[^\w\s]")
CONTEXT, WIDTH, LAYERS, HEADS = 128, 128, 2, 4
LEARNING_RATE = 2e-3
SOFTCAP, Z_LOSS, ENTROPY_BONUS = 30.0, 1e-4, 1e-2
SHARPNESS = 30.0  # of a teacher, whose distributions would otherwise be nearly uniform
ROWS = 12  # of the table of losses, besides the last step


class States(NamedTuple):
    """What a loss is made of: hidden states (B, T, D), a head, and the tokens (B, T) to come."""

    hidden: Tensor
    head: nn.Linear
    targets: Tensor
    teacher: "States | None" = None  # of the same tokens; for distillation alone

    @property
    def logits(self) -> Tensor:
        """The logits (B · T, V), which the dense losses hold."""
        logits: Tensor = self.head(self.hidden).flatten(0, 1)
        return logits


def dense_cross_entropy(states: States) -> Tensor:
    """The usual loss."""
    return F.cross_entropy(states.logits, states.targets.flatten())


def our_cross_entropy(states: States) -> Tensor:
    """The same, which never holds the logits."""
    return linear_cross_entropy(states.hidden, states.head.weight, states.targets)


def dense_soft_capped(states: States) -> Tensor:
    """The loss of logits that are kept within a cap."""
    logits = SOFTCAP * torch.tanh(states.logits / SOFTCAP)
    return F.cross_entropy(logits, states.targets.flatten())


def our_soft_capped(states: States) -> Tensor:
    """The same, without the logits."""
    return linear_cross_entropy(states.hidden, states.head.weight, states.targets, softcap=SOFTCAP)


def dense_z_loss(states: States) -> Tensor:
    """The loss with a penalty on the logarithm of the softmax's denominator."""
    logits = states.logits
    penalty = logits.logsumexp(1).square().mean()
    return F.cross_entropy(logits, states.targets.flatten()) + Z_LOSS * penalty


def our_z_loss(states: States) -> Tensor:
    """The same, without the logits."""
    return linear_cross_entropy(states.hidden, states.head.weight, states.targets, z_loss=Z_LOSS)


def dense_log_prob(states: States) -> Tensor:
    """Minus the log-probability, less a bonus for the entropy, as in reinforcement learning."""
    log_probs = states.logits.log_softmax(1)
    entropy = -(log_probs.exp() * log_probs).sum(1)
    log_prob = log_probs.gather(1, states.targets.flatten().unsqueeze(1))
    return -log_prob.mean() - ENTROPY_BONUS * entropy.mean()


def our_log_prob(states: States) -> Tensor:
    """The same, without the logits."""
    of = linear_log_prob(states.hidden, states.head.weight, states.targets)
    return -of.log_prob.mean() - ENTROPY_BONUS * of.entropy.mean()


def dense_distillation(states: States) -> Tensor:
    """The divergence of the model's distributions from a teacher's."""
    assert states.teacher is not None
    student = states.logits.log_softmax(1)
    teacher = states.teacher.logits.log_softmax(1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def our_distillation(states: States) -> Tensor:
    """The same, without the logits of either."""
    assert states.teacher is not None
    teacher = states.teacher
    return linear_distillation(
        states.hidden, states.head.weight, teacher.hidden, teacher.head.weight
    )


LOSSES: dict[str, dict[str, Callable[[States], Tensor]]] = {
    "cross-entropy": {"dense": dense_cross_entropy, "ours": our_cross_entropy},
    "soft-capped": {"dense": dense_soft_capped, "ours": our_soft_capped},
    "z-loss": {"dense": dense_z_loss, "ours": our_z_loss},
    "log-prob": {"dense": dense_log_prob, "ours": our_log_prob},
    "distillation": {"dense": dense_distillation, "ours": our_distillation},
}
WAYS = ("dense", "ours")


class Settings(NamedTuple):
    """What can be chosen about a training, besides the way to its loss."""

    loss: str
    steps: int
    vocabulary: int
    batch_size: int


class Result(NamedTuple):
    """The loss before each update, the median time of a step, and the growth of memory in MiB."""

    losses: list[float]
    step_seconds: float
    memory_mib: float | None


class LanguageModel(nn.Module):
    """A causal transformer, which gives hidden states; its `head` is for the loss to apply."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(LAYERS)
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Hidden states (B, T, D) of tokens (B, T), each from the tokens up to its own."""
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=tokens.device)
        hidden = self.tokens(tokens) + self.positions.weight[:length]
        for block in self.blocks:
            hidden = block(hidden, mask, is_causal=True)
        states: Tensor = self.norm(hidden)
        return states


def library_text() -> str:
    """The sources of the standard library's modules one after another, as far as CHARACTERS."""
    folder = Path(sysconfig.get_path("stdlib"))
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py")))
    if not text:
        raise FileNotFoundError(f"{folder} has no sources of the standard library to train on")
    return text[:CHARACTERS]


def choose_tokens(text: str, vocabulary: int) -> list[str]:
    """All characters of a text, then its words and marks, the most frequent first."""
    characters = sorted(set(text))
    words = [word for word, _ in Counter(WORD.findall(text)).most_common()]
    tokens = list(dict.fromkeys(characters + words))
    if not len(characters) <= vocabulary <= len(tokens):
        raise ValueError(
            f"vocabulary must be from {len(characters)} (the text's characters) to {len(tokens)} "
            f"(with all its words), got {vocabulary}"
        )
    return tokens[:vocabulary]


def encode(text: str, tokens: Sequence[str]) -> Tensor:
    """The indices (N) of a text's words and marks, or of the characters of one that is no token."""
    index = {token: i for i, token in enumerate(tokens)}
    parts = ([word] if word in index else word for word in WORD.findall(text))
    return torch.tensor([index[part] for part in chain.from_iterable(parts)])


def make_teacher(vocabulary: int) -> LanguageModel:
    """A frozen model of random weights, which is sure of what it says."""
    teacher = LanguageModel(vocabulary).requires_grad_(False)
    teacher.head.weight *= SHARPNESS
    return teacher


def train(way: str, text: Tensor, settings: Settings, place: Place) -> Result:
    """Train a new model on random stretches of a text, given as the indices (N) of its tokens."""
    compute_loss = LOSSES[settings.loss][way]
    before = peak_bytes(place, reset=True)
    torch.set_num_threads(place.threads)
    torch.manual_seed(SEED)
    model = LanguageModel(settings.vocabulary).to(place.device)
    teacher = None
    if settings.loss == "distillation":
        teacher = make_teacher(settings.vocabulary).to(place.device)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
    losses, seconds = [], []
    for _ in tqdm(range(settings.steps), desc=way, unit="step", leave=False, disable=None):
        start = time.perf_counter()
        first = torch.randint(len(text) - CONTEXT, (settings.batch_size, 1))
        stretch = text[first + torch.arange(CONTEXT + 1)].to(place.device)
        tokens, targets = stretch[:, :-1], stretch[:, 1:]
        states = States(model(tokens), model.head, targets)
        if teacher is not None:
            states = states._replace(teacher=States(teacher(tokens), teacher.head, targets))
        loss = compute_loss(states)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    after = peak_bytes(place)
    memory = None if before is None or after is None else (after - before) / MIB
    return Result(losses, median(seconds), memory)


def train_in_fresh_process(way: str, text: Tensor, settings: Settings, place: Place) -> Result:
    """Train where nothing has used memory but the libraries, which a first step loads."""
    with fresh_process() as process:
        least = settings._replace(steps=1, vocabulary=1, batch_size=1)
        process.submit(train, way, text.new_zeros(2 * CONTEXT), least, place)
        try:
            return process.submit(train, way, text, settings, place).result()
        except RuntimeError as error:  # of torch without memory, or of a process that was killed
            raise OSError(f"{way}: {reason(error)}") from error


def report(results: dict[str, Result]) -> Iterator[str]:
    """The curves side by side, how far apart they are, and what they took."""

    def row(title: object, cells: Iterable[str]) -> str:
        return f"{title:>12}" + "".join(f"{cell:>14}" for cell in cells)

    curve = list(zip(*(result.losses for result in results.values()), strict=True))
    yield row("step", results)
    for step in sorted({*range(0, len(curve), math.ceil(len(curve) / ROWS)), len(curve) - 1}):
        yield row(step + 1, (f"{loss:.6f}" for loss in curve[step]))
    yield row("step time", (f"{r.step_seconds * 1e3:.0f} ms" for r in results.values()))
    if all(result.memory_mib is not None for result in results.values()):
        yield row("peak memory", (f"{r.memory_mib:.0f} MiB" for r in results.values()))
    if len(results) > 1:
        difference = max(max(losses) - min(losses) for losses in curve)
        yield f"largest difference of the losses: {difference:.1e}"


def train_and_compare(args: argparse.Namespace) -> None:
    """Train in each way that is asked for, and print what came of it."""
    settings = Settings(args.loss, args.steps, args.vocabulary, args.batch_size)
    for name in ("steps", "vocabulary", "batch_size"):
        checks.positive(name, getattr(settings, name))
    place = Place(choose_device(args.device).type, torch.float32, torch.get_num_threads())
    text = library_text()
    indices = encode(text, choose_tokens(text, settings.vocabulary))
    rows = settings.batch_size * CONTEXT
    print(
        f"Python {platform.python_version()}'s library, {len(indices):,} tokens of "
        f"{settings.vocabulary:,} kinds; on {place.device}, {rows:,} tokens a step, "
        f"whose logits are {rows * settings.vocabulary * 4 / MIB:,.0f} MiB"
    )
    ways = WAYS if args.by == "both" else [args.by]
    results = {way: train_in_fresh_process(way, indices, settings, place) for way in ways}
    print("\n".join(report(results)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = Parser(
        prog="train_language_model",
        description="Train a causal transformer on the standard library's sources by a dense "
        "loss and by ours, and compare their curves, time and memory.",
        example="python -m scripts.examples.train_language_model --steps 20 --vocabulary 2048",
    )
    parser.add_argument(
        "--loss",
        choices=LOSSES,
        default="cross-entropy",
        help="what to minimise (default: %(default)s)",
    )
    parser.add_argument(
        "--by", choices=("both", *WAYS), default="both", help="the way to it (default: %(default)s)"
    )
    for name, default, meaning in (
        ("--steps", 60, "updates of the weights"),
        ("--vocabulary", 32768, "different tokens"),
        ("--batch-size", 16, f"stretches of {CONTEXT} tokens in a step"),
    ):
        help = f"{meaning} (default: {default})"
        parser.add_argument(name, type=int, default=default, metavar="N", help=help)
    add_device_option(parser)
    args = parser.parse_args(argv)
    return run_command(parser, lambda: train_and_compare(args))


if __name__ == "__main__":
    sys.exit(main())
