"""Reading images: every mode, orientation, size and kind of damage."""
import socket
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from xai_companion.data.items import Item, resized
from xai_companion.data.photos import PHOTO_NAMES, image_paths, load_image, load_images, photos


def noise(height=40, width=60, channels=3):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels if channels > 1 else pixels[..., 0])


def test_rgb_keeps_its_values(tmp_path):
    noise().save(tmp_path / "a.png")
    image = load_image(tmp_path / "a.png", size=None)
    assert image.dtype == torch.float32 and image.shape == (3, 40, 60)
    assert torch.equal((image * 255).round().byte().permute(1, 2, 0), torch.tensor(np.asarray(noise())))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    name = tmp_path / ("a.tif" if mode in ("CMYK", "YCbCr", "LAB") else "a.png")
    picture = noise().convert("RGB" if mode in ("LAB", "HSV") else mode)
    picture.save(name)
    image = load_image(name, size=16)
    assert image.shape == (3, 16, 16) and 0 <= image.min() and image.max() <= 1


@pytest.mark.parametrize("mode, options", [("P", {"transparency": 0}), ("L", {"transparency": 7}), ("RGB", {"transparency": (1, 2, 3)})])
def test_transparent_colours_become_white(tmp_path, mode, options):
    colour = {"P": 0, "L": 7, "RGB": (1, 2, 3)}[mode]
    Image.new(mode, (4, 4), colour).save(tmp_path / "a.png", **options)
    assert (load_image(tmp_path / "a.png", size=None) == 1).all()


def test_half_transparent_is_mixed_with_white(tmp_path):
    Image.new("RGBA", (2, 2), (0, 0, 0, 51)).save(tmp_path / "a.png")
    assert torch.allclose(load_image(tmp_path / "a.png", size=None), torch.tensor(0.8), atol=1 / 255)


def test_sixteen_bits_keep_their_precision(tmp_path):
    values = np.array([[0, 1, 300, 65535]], dtype=np.uint16)
    for name in ("a.png", "a.tif"):
        Image.fromarray(values).save(tmp_path / name)
        assert torch.allclose(load_image(tmp_path / name, size=None)[1], torch.tensor(values / 65535).float())


def test_float_images_must_lie_in_range(tmp_path):
    for values, good in (([0.0, 1.0], True), ([0.0, 2.0], False), ([0.0, np.nan], False), ([-0.5, 1.0], False)):
        Image.fromarray(np.array([values], dtype=np.float32)).save(tmp_path / "a.tif")
        if good:
            assert load_image(tmp_path / "a.tif", size=None)[0].tolist() == [values]
        else:
            with pytest.raises(ValueError, match="a.tif.*outside"):
                load_image(tmp_path / "a.tif")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise().save(tmp_path / "a.png", exif=exif)
    upright = load_image(tmp_path / "a.png", size=None)
    stored = torch.tensor(np.asarray(noise())).permute(2, 0, 1) / 255
    undo = {1: lambda t: t, 2: lambda t: t.flip(2), 3: lambda t: t.flip((1, 2)), 4: lambda t: t.flip(1),
            5: lambda t: t.transpose(1, 2), 6: lambda t: t.rot90(-1, (1, 2)), 7: lambda t: t.flip((1, 2)).transpose(1, 2),
            8: lambda t: t.rot90(1, (1, 2))}
    assert torch.equal(upright, undo[orientation](stored))


@pytest.mark.parametrize("height, width", [(300, 451), (451, 300), (100, 100), (20, 33), (256, 259)])
def test_crop_is_the_usual_evaluation_transform(tmp_path, height, width):
    smooth = noise(8, 8).resize((width, height), Image.Resampling.BICUBIC)
    smooth.save(tmp_path / "a.png")
    usual = transforms.Compose([transforms.Resize(256, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(224),
                                transforms.ToTensor()])(smooth)
    ours = load_image(tmp_path / "a.png", 224)
    assert ours.shape == (3, 224, 224) and (ours - usual).abs().max() < 2 / 255


def test_squash_keeps_the_whole_image(tmp_path):
    half = np.zeros((20, 80, 3), dtype=np.uint8)
    half[:, 40:] = 255
    Image.fromarray(half).save(tmp_path / "a.png")
    image = load_image(tmp_path / "a.png", 32, crop=False)
    assert image.shape == (3, 32, 32) and image[:, :, 0].max() < 1e-5 and image[:, :, -1].min() > 1 - 1e-5
    assert torch.isclose(image.mean(), torch.tensor(0.5), atol=0.01)


def test_bad_files_are_named(tmp_path):
    noise().save(tmp_path / "a.jpg")
    whole = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[:-400])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").touch()
    for name in ("cut.jpg", "text.png", "empty.png"):
        with pytest.raises(ValueError, match=name):
            load_image(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="missing.png"):
        load_image(tmp_path / "missing.png")
    with pytest.raises(ValueError, match="folder.*load_images"):
        load_image(tmp_path)
    for size in (0, -1, 1.5, "224"):
        with pytest.raises(ValueError, match="size must be"):
            load_image(tmp_path / "a.jpg", size)


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "tif", "webp", "bmp"])
def test_damage_is_an_error_or_an_image(tmp_path, suffix):
    file = tmp_path / f"damaged.{suffix}"
    noise(16, 16).save(file)
    whole = file.read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(whole)
        for place in generator.integers(0, len(whole), 3):
            damaged[place] = generator.integers(256)
        file.write_bytes(bytes(damaged[:generator.integers(1, len(whole) + 1)]))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                image = load_image(file, 8)
            except ValueError as error:
                assert file.name in str(error)
            else:
                assert image.shape == (3, 8, 8) and image.isfinite().all()


def test_paths(tmp_path):
    for name in ("z.png", "a.JPEG", "deep/er/b.webp", ".hidden/c.png", "._a.jpg", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [p.relative_to(tmp_path).as_posix() for p in image_paths(tmp_path)]
    assert found == ["a.JPEG", "deep/er/b.webp", "z.png"]
    assert image_paths(str(tmp_path / "notes.txt")) == [tmp_path / "notes.txt"]
    assert image_paths(p for p in [tmp_path / "z.png", tmp_path / "deep"]) == [tmp_path / "z.png", tmp_path / "deep/er/b.webp"]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        image_paths([tmp_path, tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="at least one"):
        image_paths([])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty has no images"):
        image_paths(tmp_path / "empty")


def test_load_images(tmp_path):
    noise(10, 20).save(tmp_path / "a.png")
    noise(20, 10).save(tmp_path / "b.png")
    batch = load_images(tmp_path, size=8)
    assert batch.shape == (2, 3, 8, 8)
    assert torch.equal(batch[1], load_image(tmp_path / "b.png", 8))
    with pytest.raises(ValueError, match=r"b.png has \(20, 10\)"):
        load_images(tmp_path, size=None)


def test_photos_need_no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("photos() opened a connection")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    images = photos(64)
    assert images.shape == (4, 3, 64, 64) and len(PHOTO_NAMES) == 4 and images.dtype == torch.float32
    assert 0 <= images.min() and images.max() <= 1
    red, green, blue = images.mean((2, 3))[PHOTO_NAMES.index("rocket")]
    assert blue > green > red                                   # the evening sky
    assert len({round(float(m), 3) for m in images.mean((1, 2, 3))}) == 4


def test_the_usual_size_of_a_network(tmp_path):
    noise().save(tmp_path / "a.png")
    whole = load_image(tmp_path / "a.png", None)
    assert torch.equal(load_image(tmp_path / "a.png"), resized(Item("", whole, ()), 224, crop=True).image)
    assert torch.equal(load_images(tmp_path)[0], load_image(tmp_path / "a.png"))
    assert torch.equal(load_images(tmp_path, 16, crop=False)[0], resized(Item("", whole, ()), 16).image)


def test_a_folder_that_is_called_like_an_image(tmp_path):
    (tmp_path / "cats.png").mkdir()
    noise().save(tmp_path / "cats.png" / "a.png")
    assert image_paths(tmp_path) == [tmp_path / "cats.png" / "a.png"]


def test_photos_are_squares_of_those_of_scikit_image(monkeypatch):
    from skimage import data
    for name, stored, left, top, side in (("cat", data.chelsea(), 90, 0, 300), ("coffee", data.coffee(), 70, 0, 400),
                                          ("rocket", data.rocket(), 190, 100, 260), ("astronaut", data.astronaut(), 0, 0, 512)):
        square = torch.tensor(stored[top:top + side, left:left + side]).permute(2, 0, 1) / 255
        assert (photos(side)[PHOTO_NAMES.index(name)] - square).abs().max() < 1e-4
    for profile, side in (("smoke", 64), ("quick", 224)):
        monkeypatch.setenv("XAI_COMPANION_PROFILE", profile)
        assert photos().shape == (4, 3, side, side)
