"""Which characters are found in a picture, and what is refused: no desk or shadow is read as an 8.

`pytest -rP tests/mnist/test_characters.py` prints how many pictures of each kind are read rightly
and wrongly, and how many refused. They are made of test digits, and of MNIST's too where it is in
`data`.
"""

import math
from collections import Counter
from typing import NamedTuple

import pytest
import torch
from torch.nn.functional import pad

from tests.mnist.drawing import INK, PAPER, draw, likeness, square, to_grey
from tests.mnist.pictures import BLANK, GROUNDS, KINDS, picture
from torch_softmax import SoftmaxRegression
from torch_softmax.mnist.characters import MOST, NoCharacterError, find_characters, find_drawing
from torch_softmax.mnist.frames import FRAMES, normalize

PICTURES = 25  # of each kind; the constants were chosen on pictures of MNIST and of other seeds
SURE = 0.9  # the least probability of the digits that are used


class Reader(NamedTuple):
    """A classifier, and test digits of which it is rightly sure, with their labels.

    What is read wrongly is then the fault of how it was found.
    """

    name: str
    model: SoftmaxRegression
    digits: list

    def read(self, grey):
        """The classes of a picture's characters, from left to right; none where it is refused."""
        try:
            pixels = normalize(grey, FRAMES[self.name])
        except NoCharacterError:
            return []
        with torch.no_grad():
            return self.model(pixels).argmax(1).tolist()


def reader_of(checkpoint, test, margin):
    model = checkpoint.build_model()
    images, labels = test[torch.arange(min(len(test), 1000))]
    with torch.no_grad():
        is_sure = model.predict_proba(images)[torch.arange(len(labels)), labels] >= SURE
    side = math.isqrt(images.shape[1])
    chosen = pad(images[is_sure].view(-1, side, side), [margin] * 4)
    digits = list(zip(chosen, labels[is_sure].tolist(), strict=True))
    return Reader(checkpoint.dataset, model, digits)


@pytest.fixture(scope="module", params=["digits", "mnist"])
def reader(request):
    def of(name):
        return request.getfixturevalue(name)

    if request.param == "mnist":
        return reader_of(of("trained_on_mnist"), of("mnist").test, margin=0)
    return reader_of(of("trained"), of("digits").test, margin=2)


@pytest.fixture(scope="module")
def told(request, reader):
    """How often pictures of a kind are read rightly and wrongly, and refused."""
    kind = request.param
    random = torch.Generator().manual_seed(1000 + list(KINDS).index(kind))
    counts = Counter()
    for _ in range(PICTURES):
        size = int(torch.randint(2, 6, (), generator=random)) if "several" in kind else 1
        places = torch.randint(len(reader.digits), (size,), generator=random)
        chosen = [reader.digits[i] for i in places]
        labels = [label for _, label in chosen] if kind in GROUNDS else None
        found = reader.read(picture(kind, [digit for digit, _ in chosen], random))
        counts["refused" if not found else "right" if found == labels else "wrong"] += 1
    told = ", ".join(f"{counts[outcome]} {outcome}" for outcome in ("right", "wrong", "refused"))
    print(f"{reader.name}, {kind}: {told}")
    return counts


@pytest.mark.parametrize("told", GROUNDS, indirect=True)
def test_few_of_the_pictures_that_are_not_refused_are_read_wrongly(told):
    assert told["wrong"] < 0.1 * (told["right"] + told["wrong"])


@pytest.mark.parametrize("told", GROUNDS, indirect=True)
def test_most_pictures_of_digits_are_not_refused(told):
    assert told["refused"] <= 0.2 * PICTURES


@pytest.mark.parametrize("told", [*BLANK, "landscape"], indirect=True)
def test_a_picture_without_a_digit_is_refused(told):
    assert told["refused"] == PICTURES


@pytest.mark.parametrize("told", ["portrait"], indirect=True)
def test_nearly_every_face_is_refused(told):
    assert told["refused"] >= 0.9 * PICTURES  # hair may be as much of a ring as a 0 is


def refusal(grey):
    with pytest.raises(NoCharacterError) as info:
        find_characters(grey)
    return str(info.value)


@pytest.mark.parametrize("name", ["china.jpg", "flower.jpg"])
def test_photographs_and_their_quarters_are_refused(name):
    photo = pytest.importorskip("sklearn.datasets").load_sample_image(name)
    grey = torch.tensor(photo).float().mean(-1) / 255
    quarters = [quarter for half in grey.chunk(2) for quarter in half.chunk(2, 1)]
    for part in (grey, *quarters):
        refusal(part)


# One rule each


@pytest.fixture
def seven():
    return to_grey(draw())


def sheet(*drawings):
    """Drawings beside each other as dark ink on paper."""
    return PAPER + (INK - PAPER) * torch.cat(drawings, 1)


def test_characters_come_from_left_to_right(seven):
    bar = torch.zeros(160, 60)
    bar[40:120, 25:37] = 1
    found = find_characters(sheet(seven, bar, seven))
    assert [round(ink.shape[1] / 12) for ink in found] == [5, 1, 5]


@pytest.mark.parametrize("lighter", [False, True])
def test_each_is_what_it_is_alone(seven, lighter):
    picture = sheet(seven, seven)
    if lighter:
        picture = 1 - picture
    expected = square(seven)
    for pixels in normalize(picture, FRAMES["mnist"]):
        assert likeness(pixels.view(28, 28), expected) > 0.98


def test_a_piece_beside_its_character_is_no_character_of_its_own(seven):
    seven[58:61] = 0  # a gap through the stroke
    (ink,) = find_characters(sheet(seven))
    assert ink.shape[0] == pytest.approx(80, abs=2)


def test_what_touches_the_border_is_left_out(seven):
    picture = sheet(seven, seven)
    picture[:, 225:] = 0
    assert len(find_characters(picture)) == 2


def test_a_character_that_the_border_cuts_off_is_refused(seven):
    assert "touches the border" in refusal(sheet(seven)[:, 50:])


def test_a_blot_is_refused():
    paper = torch.full((100, 100), PAPER)
    paper[30:70, 30:70] = INK
    assert "too broad" in refusal(paper)


def test_a_dash_is_refused():
    paper = torch.full((100, 100), PAPER)
    paper[47:53, 20:80] = INK
    assert "too flat" in refusal(paper)


def test_two_rows_are_refused(seven):
    assert "no single row" in refusal(sheet(torch.cat([seven, seven])))


def test_too_many_characters_are_refused():
    paper = torch.full((60, 20 * (MOST + 1)), PAPER)
    for k in range(MOST + 1):
        paper[15:45, 20 * k + 8 : 20 * k + 12] = INK
    assert "too many" in refusal(paper)


def test_what_need_not_be_strokes_is_one_drawing():
    paper = torch.full((100, 100), PAPER)
    paper[30:70, 20:80] = INK
    (ink,) = find_drawing(paper)
    assert ink.shape == (40, 60)
    with pytest.raises(NoCharacterError, match="nothing is drawn"):
        find_drawing(torch.full((100, 100), PAPER))
