"""Any kind of file read as grey levels that tell its colours apart, or one line that says why."""

import pytest
from PIL import Image, ImageFilter

from tests.mnist.drawing import draw, likeness, square, to_grey
from torch_softmax.mnist.images import READ_SIDE, ImageError, read_image


@pytest.fixture
def expected():
    """What every picture of the same ink should become."""
    return square(to_grey(draw()))


def save(image, path, **options):
    image.save(path, **options)
    return path


def painted(mode, paper, pen):
    """The 7 in a colour on a ground."""
    image = Image.new(mode, draw().size, paper)
    image.paste(pen, mask=draw())
    return image


FILES = {
    "grey": ("png", painted("L", 230, 40)),
    "black and white": ("png", painted("L", 255, 0).convert("1")),
    "light on dark": ("png", painted("L", 10, 220)),
    "colours": ("png", painted("RGB", (250, 240, 200), (20, 40, 160))),
    "colours of one brightness": ("png", painted("RGB", (0, 130, 0), (255, 0, 0))),
    "two pure colours": ("png", painted("RGB", (0, 200, 0), (200, 0, 0))),
    "palette": ("png", painted("RGB", (250, 240, 200), (20, 40, 160)).quantize(8)),
    "black on nothing": ("png", painted("RGBA", (255, 255, 255, 0), (0, 0, 0, 255))),
    "black on nothing, stored as black": ("png", painted("RGBA", (0, 0, 0, 0), (0, 0, 0, 255))),
    "white on nothing": ("png", painted("RGBA", (0, 0, 0, 0), (255, 255, 255, 255))),
    "grey with alpha": ("png", painted("LA", (255, 0), (0, 255))),
    "16 bits": ("png", painted("I", 60_000, 3_000).convert("I;16")),
    "JPEG": ("jpg", painted("RGB", (250, 240, 200), (20, 40, 160))),
    "grey JPEG": ("jpg", painted("L", 230, 40)),
    "CMYK JPEG": ("jpg", painted("RGB", (250, 240, 200), (20, 40, 160)).convert("CMYK")),
    "GIF": ("gif", painted("L", 230, 40)),
    "BMP": ("bmp", painted("RGB", (250, 240, 200), (20, 40, 160))),
    "TIFF": ("tiff", painted("L", 230, 40)),
    "WebP": ("webp", painted("RGB", (250, 240, 200), (20, 40, 160))),
}


@pytest.mark.parametrize("name", FILES)
def test_any_kind_of_file(tmp_path, expected, name):
    suffix, image = FILES[name]
    path = save(image, tmp_path / f"picture.{suffix}")
    assert likeness(square(read_image(path)), expected) > 0.98


@pytest.mark.parametrize(
    ("orientation", "turn_back"),
    [
        (3, Image.Transpose.ROTATE_180),
        (6, Image.Transpose.ROTATE_90),
        (8, Image.Transpose.ROTATE_270),
        (2, Image.Transpose.FLIP_LEFT_RIGHT),
    ],
)
def test_the_orientation_of_a_photo(tmp_path, expected, orientation, turn_back):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(draw().transpose(turn_back), tmp_path / "photo.jpg", exif=exif)
    assert likeness(square(read_image(path)), expected) > 0.98


def test_a_large_picture_is_shrunk(tmp_path, expected):
    image = draw().resize((1200, 1600)).filter(ImageFilter.GaussianBlur(3))
    grey = read_image(save(image, tmp_path / "large.png"))
    assert grey.shape == (READ_SIDE, READ_SIDE * 3 // 4)
    assert likeness(square(grey), expected) > 0.98


@pytest.mark.parametrize("image", [Image.new("RGBA", (50, 50)), Image.new("I;16", (50, 50))])
def test_a_file_with_nothing_in_it_is_blank(tmp_path, image):
    grey = read_image(save(image, tmp_path / "blank.png"))
    assert grey.min() == grey.max()


def broken(path):
    """Keep the first half of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "tiff", "webp"])
def test_half_a_file(tmp_path, suffix):
    path = save(draw(), tmp_path / f"half.{suffix}")
    broken(path)
    with pytest.raises(ImageError, match=f"{path} is no image, or is damaged"):
        read_image(path)


@pytest.mark.parametrize("content", [b"", b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_no_image(tmp_path, content):
    path = tmp_path / "image.png"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=f"{path} is no image, or is damaged"):
        read_image(path)


def test_no_file(tmp_path):
    with pytest.raises(ImageError, match="can't be read: No such file or directory"):
        read_image(tmp_path / "missing.png")


def test_too_many_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    path = save(draw(), tmp_path / "huge.png")
    with pytest.raises(ImageError, match=f"{path} has more pixels than can be read"):
        read_image(path)
