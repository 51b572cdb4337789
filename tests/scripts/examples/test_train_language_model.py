"""The language model's script: one curve by both ways, of a model that can't look ahead."""

import math
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from scripts.benchmark.measure import Place
from scripts.examples import train_language_model as script
from tests.helpers import one_line

PLACE = Place("cpu", torch.float32, 1)
TEXT = "for x in xs: # the ∂ of x\n    print(x)\n"
SETTINGS = script.Settings("cross-entropy", steps=20, vocabulary=7, batch_size=2)


@pytest.fixture(scope="module")
def library_text():
    return script.library_text()


@pytest.fixture(scope="module")
def results():
    """What trainings give on a text that repeats itself, by their loss and the way to it."""
    text = torch.arange(1000) % 7
    return {
        (loss, way): script.train(way, text, SETTINGS._replace(loss=loss), PLACE)
        for loss in script.LOSSES
        for way in script.WAYS
    }


@pytest.fixture
def quick(monkeypatch):
    """A short text, and no new process for each training."""
    monkeypatch.setattr(script, "CHARACTERS", 20_000)
    monkeypatch.setattr(script, "fresh_process", lambda: ThreadPoolExecutor(1))


# The text and its tokens


def test_the_text_is_as_long_on_every_python(library_text):
    assert len(library_text) == script.CHARACTERS


def test_the_text_has_words_for_the_default_vocabulary(library_text):
    assert len(script.choose_tokens(library_text, 32768)) == 32768


def test_tokens_are_the_characters_and_then_the_most_frequent_words():
    tokens = script.choose_tokens("do do do be be", 7)
    assert tokens == [" ", "b", "d", "e", "o", " do", " be"]


@pytest.mark.parametrize("words", [0, 2, 8])
@pytest.mark.parametrize("text", [TEXT, TEXT[::-1]])
def test_tokens_spell_the_text(text, words):
    tokens = script.choose_tokens(TEXT, len(set(TEXT)) + words)
    assert "".join(tokens[index] for index in script.encode(text, tokens)) == text


def test_a_word_is_one_token_and_an_unknown_word_its_characters():
    tokens = [" ", "s", "x", " x"]
    assert script.encode(" x xs", tokens).tolist() == [3, 0, 2, 1]


# The model and its training


@pytest.mark.parametrize("changed", [1, 5, 9])
def test_hidden_states_depend_on_no_later_token(changed):
    model = script.LanguageModel(vocabulary=7)
    tokens = torch.randint(6, (2, 10))
    before = model(tokens)
    tokens[:, changed] = 6
    same = (model(tokens) == before).all(-1)
    assert same.tolist() == [[position < changed for position in range(10)]] * 2


@pytest.mark.parametrize("loss", script.LOSSES)
def test_both_ways_give_the_same_curve(loss, results):
    dense, ours = (torch.tensor(results[loss, way].losses) for way in script.WAYS)
    # A teacher that is sure of what it says makes much of a rounding.
    atol = 1e-4 if loss == "distillation" else 1e-6
    torch.testing.assert_close(ours, dense, rtol=0, atol=atol)


@pytest.mark.parametrize("loss", script.LOSSES)
def test_what_repeats_itself_is_learnt(loss, results):
    losses = results[loss, "ours"].losses
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("way", script.WAYS)
def test_what_is_random_cannot_be_learnt(way):
    text = torch.randint(7, (5000,))
    assert min(script.train(way, text, SETTINGS, PLACE).losses) > 0.95 * math.log(7)


def test_a_teacher_is_far_from_uniform():
    teacher = script.make_teacher(vocabulary=7)
    probabilities = teacher.head(teacher(torch.randint(7, (2, 10)))).softmax(-1)
    assert probabilities.amax(-1).mean() > 0.8


def test_a_fresh_process_gives_the_same_curve(results):
    fresh = script.train_in_fresh_process("ours", torch.arange(1000) % 7, SETTINGS, PLACE)
    assert fresh.losses == results["cross-entropy", "ours"].losses


# The command


@pytest.mark.parametrize("loss", script.LOSSES)
@pytest.mark.usefixtures("quick")
def test_the_command_compares_both_ways(capsys, loss):
    options = ["--steps=2", "--vocabulary=256", "--batch-size=1", "--device=cpu"]
    assert script.main([*options, f"--loss={loss}"]) == 0
    output = capsys.readouterr().out
    assert re.search(r"step +dense +ours\n +1 +\d\.\d{6} +\d\.\d{6}\n +2 ", output)
    assert float(output.rpartition("largest difference of the losses: ")[2]) < 1e-5


@pytest.mark.usefixtures("quick")
def test_one_way_is_compared_with_none(capsys):
    assert script.main(["--steps=1", "--vocabulary=256", "--by=dense", "--device=cpu"]) == 0
    output = capsys.readouterr().out
    assert re.search(r"step +dense\n +1 +\d\.\d{6}\n", output)
    assert "difference" not in output


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--steps=0", "steps must be at least 1, got 0"),
        ("--batch-size=-1", "batch_size must be at least 1, got -1"),
        ("--vocabulary=9", "vocabulary must be from "),
        ("--vocabulary=1000000", "vocabulary must be from "),
        ("--loss=sparse", "argument --loss: invalid choice: 'sparse'"),
        ("--by=hand", "argument --by: invalid choice: 'hand'"),
    ],
)
@pytest.mark.usefixtures("quick")
def test_a_bad_option_is_one_line(capsys, option, message):
    with pytest.raises(SystemExit, match="2"):
        script.main([option])
    assert one_line(capsys).startswith(f"train_language_model: {message}")


@pytest.mark.usefixtures("quick")
def test_too_little_memory_is_one_line(capsys):
    assert script.main(["--vocabulary=256", f"--batch-size={10**15}", "--by=ours"]) == 1
    assert one_line(capsys).startswith("train_language_model: ours: fails with Runtime")


def test_a_python_without_sources_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script.sysconfig, "get_path", lambda name: str(tmp_path))
    assert script.main([]) == 1
    assert "has no sources of the standard library" in one_line(capsys)
