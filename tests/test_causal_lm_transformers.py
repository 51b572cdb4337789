"""Models, the trainer and adapters of Hugging Face: losses and gradients are the dense ones."""

import math
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from tests.helpers import NewTensors
from torch_softmax.causal_lm import call_without_logits

transformers = pytest.importorskip("transformers", minversion="4.50")
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs are not for us to mend

CLASSES, WIDTH, LENGTH, CHUNK = 97, 16, 12, 10
SIZES = {
    "vocab_size": CLASSES,
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": LENGTH,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SIZES_OF_GPT2 = {
    "vocab_size": CLASSES,
    "n_embd": WIDTH,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": LENGTH,
    "bos_token_id": 1,
    "eos_token_id": 2,
    **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
}


def build(name, **options):
    """A model of a family, as it comes, but small."""
    torch.manual_seed(0)
    kind = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    sizes = SIZES_OF_GPT2 if name == "GPT2" else SIZES
    config = getattr(transformers, f"{name}Config")(**sizes, **options)
    return getattr(transformers, f"{name}{kind}")(config)


FAMILIES = {
    "Llama": partial(build, "Llama"),
    "Llama, tied": partial(build, "Llama", tie_word_embeddings=True),
    "GPT-2, tied": partial(build, "GPT2"),
    "Gemma 2, capped and tied": partial(build, "Gemma2", final_logit_softcapping=0.5),
    "Cohere, scaled and tied": partial(build, "Cohere", logit_scale=0.3),
    "Granite, divided": partial(build, "Granite", logits_scaling=3.0),
}
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
TRAINED = ["Llama", "GPT-2, tied", "Gemma 2, capped and tied"]
every_trained_family = pytest.mark.parametrize(
    "family", [FAMILIES[t] for t in TRAINED], ids=TRAINED
)


def tokens(rows=4):
    """Token indices (B, T), and labels of which each row ignores other many."""
    ids = torch.randint(3, CLASSES, (rows, LENGTH))
    first = torch.randint(LENGTH - 2, (rows, 1))
    return ids, torch.where(torch.arange(LENGTH) < first, -100, ids)


def dense_loss(model, ids, labels):
    """The loss of the model's logits, shifted here."""
    logits = model(input_ids=ids).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


def our_loss(model, ids, labels, **inputs):
    return call_without_logits(model, input_ids=ids, labels=labels, chunk_size=CHUNK, **inputs).loss


def gradients(model, loss):
    """The gradient of each parameter by its name."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(parameters, torch.autograd.grad(loss, [*parameters.values()]), strict=True))


def assert_same_loss(model, ours, dense):
    torch.testing.assert_close(ours, dense, rtol=1e-9, atol=0)
    torch.testing.assert_close(
        gradients(model, ours), gradients(model, dense), rtol=1e-7, atol=1e-10
    )


# Models


@every_family
def test_loss_and_gradients_are_those_of_the_logits_in_float64(family):
    model, (ids, labels) = family().double(), tokens()
    assert_same_loss(model, our_loss(model, ids, labels), dense_loss(model, ids, labels))


@every_family
def test_in_bfloat16_the_loss_is_as_near_to_that_of_float64_as_the_models_own(family):
    ids, labels = tokens()
    model = family().bfloat16()
    exact = dense_loss(family().bfloat16().double(), ids, labels)
    ours = our_loss(model, ids, labels)
    own = model(input_ids=ids, labels=labels).loss
    assert ours.dtype == torch.float32
    assert (ours - exact).abs() <= (own - exact).abs() + 1e-3 * exact


def test_the_loss_of_a_router_is_added():
    model = build("Mixtral", num_local_experts=4, output_router_logits=True)
    ids, labels = tokens()
    own = model(input_ids=ids, labels=labels)
    assert own.aux_loss
    ours = our_loss(model, ids, labels)
    torch.testing.assert_close(ours, own.loss)
    torch.testing.assert_close(gradients(model, ours), gradients(model, own.loss))


def test_a_number_of_items_is_what_the_model_would_make_of_it():
    model, (ids, labels) = build("Llama"), tokens()
    own = model(input_ids=ids, labels=labels, num_items_in_batch=torch.tensor(77)).loss
    torch.testing.assert_close(
        our_loss(model, ids, labels, num_items_in_batch=torch.tensor(77)), own
    )


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradients_are_the_same_with_checkpointing(use_reentrant):
    model, (ids, labels) = build("Llama").double().train(), tokens()
    dense = dense_loss(model, ids, labels)
    expected = gradients(model, dense)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    our_loss(model, ids, labels).backward()
    actual = {name: p.grad for name, p in model.named_parameters()}
    torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-10)


@every_family
def test_no_tensor_is_as_large_as_the_logits_of_all_rows(family):
    model, (ids, labels) = family(), tokens(rows=16)
    with NewTensors() as new:
        our_loss(model, ids, labels).backward()
    # A gradient of the head, which has more rows than a chunk.
    of_classes = [shape for shape in new.shapes if CLASSES in shape]
    assert max(map(math.prod, of_classes)) == CLASSES * WIDTH


def test_a_model_with_a_loss_of_its_own_is_refused():
    config = transformers.BartConfig(
        vocab_size=CLASSES, d_model=16, decoder_layers=1, decoder_attention_heads=2
    )
    model, (ids, labels) = transformers.BartForCausalLM(config), tokens()
    with pytest.raises(TypeError, match="BartForCausalLM does something else with them first"):
        our_loss(model, ids, labels)


# The trainer


class ChunkedTrainer(getattr(transformers, "Trainer", object)):
    """The recipe of the README."""

    def compute_loss(self, model, *args, **kwargs):
        return super().compute_loss(partial(call_without_logits, model), *args, **kwargs)


class Examples(torch.utils.data.Dataset):
    """Rows of tokens, each of which has other many labels that count."""

    def __init__(self, rows):
        self.ids, self.labels = tokens(rows)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "labels": self.labels[index]}


@pytest.fixture
def train(tmp_path):
    """Train a model for some steps, and return the losses that were logged with the trainer."""
    pytest.importorskip("accelerate")

    def trained(trainer, model, *, batch=8, parts=1, steps=6, **options):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=parts,
            max_steps=steps,
            learning_rate=0.1,
            lr_scheduler_type="constant",
            optim="sgd",
            max_grad_norm=0.0,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            **options,
        )
        torch.manual_seed(0)
        data = Examples(32)
        made = trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)
        made.train()
        return torch.tensor([e["loss"] for e in made.state.log_history if "loss" in e]), made

    return trained


@every_trained_family
def test_the_trainer_gives_the_curve_of_the_dense_loss(family, train):
    dense, _ = train(transformers.Trainer, family())
    ours, _ = train(ChunkedTrainer, family())
    assert len(ours) == 6
    assert ours[-1] < ours[0]
    torch.testing.assert_close(ours, dense, rtol=0, atol=2e-4)


@every_trained_family
def test_the_trainer_gives_one_curve_for_any_number_of_micro_batches(family, train):
    whole, of_whole = train(ChunkedTrainer, family())
    parts, of_parts = train(ChunkedTrainer, family(), batch=2, parts=4)
    torch.testing.assert_close(parts, whole, rtol=0, atol=2e-4)
    for actual, expected in zip(
        of_parts.model.parameters(), of_whole.model.parameters(), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


def test_the_trainer_gives_the_curve_of_the_dense_loss_in_bfloat16(train):
    dense, _ = train(transformers.Trainer, build("Gemma2"), bf16=True)
    ours, _ = train(ChunkedTrainer, build("Gemma2"), bf16=True)
    torch.testing.assert_close(ours, dense, rtol=0, atol=0.02)


def test_the_trainer_gives_the_curve_of_the_dense_loss_with_checkpointing(train):
    dense, _ = train(transformers.Trainer, build("Llama"))
    ours, _ = train(ChunkedTrainer, build("Llama"), gradient_checkpointing=True)
    torch.testing.assert_close(ours, dense, rtol=0, atol=2e-4)


def test_the_trainer_evaluates_to_the_same_loss(train):
    _, trainer = train(ChunkedTrainer, build("Llama"), steps=1)
    loss = trainer.evaluate()["eval_loss"]
    dense = transformers.Trainer(
        model=trainer.model, args=trainer.args, eval_dataset=trainer.eval_dataset
    )
    assert loss == pytest.approx(dense.evaluate()["eval_loss"], abs=1e-5)


def test_label_smoothing_of_the_trainer_is_refused(train):
    with pytest.raises(TypeError, match="labels"):
        train(ChunkedTrainer, build("Llama"), label_smoothing_factor=0.1)


# Adapters


@pytest.fixture
def adapted():
    """A Llama with an adapter."""
    peft = pytest.importorskip("peft")

    def with_adapter(config, **options):
        return peft.get_peft_model(
            build("Llama").double(), getattr(peft, config)(task_type="CAUSAL_LM", **options)
        ).double()

    return with_adapter


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ("LoraConfig", {"target_modules": ["q_proj"], "init_lora_weights": False}),
        ("LoraConfig", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
        ("PromptTuningConfig", {"num_virtual_tokens": 3}),
    ],
    ids=["an adapter", "a copy", "virtual tokens"],
)
def test_gradients_of_an_adapter_below_the_head_are_those_of_the_dense_loss(
    config, options, adapted
):
    model = adapted(config, **options)
    ids, labels = tokens()
    mask = torch.ones_like(ids)
    own = model(input_ids=ids, labels=labels, attention_mask=mask).loss
    ours = our_loss(model, ids, labels, attention_mask=mask)
    torch.testing.assert_close(ours, own.to(ours), rtol=1e-5, atol=0)
    torch.testing.assert_close(gradients(model, ours), gradients(model, own), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["an adapter", "a copy"],
)
def test_an_adapter_on_the_head_is_refused(options, adapted):
    with pytest.raises(TypeError, match=r"the output head of model must be a plain nn\.Linear"):
        our_loss(adapted("LoraConfig", **options), *tokens())
