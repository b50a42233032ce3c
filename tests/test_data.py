"""Datasets: digits, folders, and really prepared TFDS datasets."""

import itertools
import re
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from ml_collections import ConfigDict
from PIL import Image

from ddpm_jax import configs
from ddpm_jax.errors import UserError
from ddpm_jax.files import data


def section(**changes):
    return ConfigDict({**configs.default_config().data.to_dict(), **changes})


def digits(**changes):
    return section(name="digits", image_size=(8, 8), channels=1, **changes)


def first(batches, count):
    """The images of the first batches."""
    return [batch.images for batch in itertools.islice(batches, count)]


def options(**changes):
    return {"batch_size": 7, "seed": 0, "first_step": 0, "random_flip": False, **changes}


def numbered(size):
    """A source whose image i has the value i everywhere."""
    return source_of(np.tile(np.arange(size)[:, None, None, None], (1, 2, 2, 1)).astype(np.uint8))


def source_of(images):
    return data.Source(len(images), lambda i: data.Batch(images[i], None), ())


# The embedded digits.


def test_digits():
    source = data.open_source(digits(split="train"))
    assert source.size == 1797
    x = source.read(np.arange(1797)).images
    assert (x.shape, x.dtype, x.min(), x.max()) == ((1797, 8, 8, 1), np.uint8, 0, 255)
    assert len(np.unique(x)) == 17


def test_slices_split_the_digits():
    parts = [
        data.open_source(digits(split=spec)) for spec in ("train[:1500]", "train[1500:]", "train")
    ]
    assert [p.size for p in parts] == [1500, 297, 1797]
    arrays = [p.read(np.arange(p.size)).images for p in parts]
    np.testing.assert_array_equal(np.concatenate(arrays[:2]), arrays[2])


# Batches.


def test_every_image_once_an_epoch():
    epochs = np.concatenate(first(data.batches(numbered(21), **options()), 6))[:, 0, 0, 0]
    assert sorted(epochs[:21]) == sorted(epochs[21:]) == list(range(21))
    assert list(epochs[:21]) != list(epochs[21:])


def test_batches_are_a_function_of_seed_and_step():
    source = data.open_source(digits(split="train"))
    whole = first(data.batches(source, **options(random_flip=True)), 8)
    later = first(data.batches(source, **options(random_flip=True, first_step=5)), 3)
    np.testing.assert_array_equal(whole[5:], later)
    other = first(data.batches(source, **options(seed=1)), 1)
    assert (other[0] != whole[0]).any()


def test_a_batch_may_be_larger_than_the_dataset():
    (batch,) = first(data.batches(numbered(3), **options()), 1)
    assert sorted(batch[:6, 0, 0, 0]) == [0, 0, 1, 1, 2, 2]


def test_flips_mirror_half_of_the_images():
    x = np.zeros((1000, 2, 4, 3), np.uint8)
    x[:, :, 0] = 9
    source = source_of(x)
    (batch,) = first(data.batches(source, **options(batch_size=1000, random_flip=True)), 1)
    flipped = batch[:, 0, 3, 0] == 9
    assert 430 < flipped.sum() < 570
    np.testing.assert_array_equal(batch[flipped][:, :, ::-1], x[flipped])
    np.testing.assert_array_equal(batch[~flipped], x[~flipped])


# Folders.


@pytest.fixture
def folder(tmp_path):
    """Ten images of several kinds, each of one colour, and a file that is none."""
    for i in range(10):
        colour = (20 * i, 10, 255 - 20 * i)
        image = Image.new("RGB", (40 + i, 20), colour)
        path = tmp_path / f"class{i % 2}" / f"{i}.{('png', 'jpg', 'JPEG', 'webp')[i % 4]}"
        path.parent.mkdir(exist_ok=True)
        image.save(path, quality=95)
    (tmp_path / "notes.txt").write_text("not an image")
    return tmp_path


def folder_section(path, **changes):
    fields = dict(name="folder", path=str(path), image_size=(8, 12), split="train")
    return section(**{**fields, **changes})


@pytest.mark.parametrize("max_ram_gib", [0.0, 1.0])
def test_folder(folder, max_ram_gib):
    source = data.open_source(folder_section(folder, max_ram_gib=max_ram_gib))
    x = source.read(np.arange(source.size)).images
    assert (x.shape, x.dtype) == ((10, 8, 12, 3), np.uint8)
    reds = sorted(x[:, 4, 6, 0].astype(int))
    np.testing.assert_allclose(reds, 20 * np.arange(10), atol=4)  # JPEG and WebP lose a little


@pytest.mark.parametrize("channels, expected", [(1, 1), (3, 3), (4, 4)])
def test_folder_channels(folder, channels, expected):
    source = data.open_source(folder_section(folder, channels=channels))
    x = source.read(np.arange(2)).images
    assert x.shape == (2, 8, 12, expected)
    assert channels < 4 or (x[..., 3] == 255).all()


def test_crop_and_squash():
    """A white square in the middle of a wide image fills the crop and not the squashed one."""
    wide = np.zeros((20, 60), np.uint8)
    wide[:, 20:40] = 255
    image = Image.fromarray(wide)
    fields = dict(image_size=(10, 10), channels=1)
    crop = data.fit(image, section(resize="crop", **fields))
    squash = data.fit(image, section(resize="squash", **fields))
    assert crop.min() > 200  # its edge sees a little of what was cut
    assert squash[5, 0, 0] == 0 and squash[5, 5, 0] == 255


def test_resizing_is_antialiased():
    """A fine checkerboard becomes gray; without antialiasing it would stay black or white."""
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    small = data.fit(Image.fromarray(board), section(image_size=(8, 8), channels=1))
    assert np.abs(small.astype(int) - 127).max() < 16


def test_sixteen_bits_are_scaled():
    ramp = Image.fromarray(np.arange(0, 65536, 1024, np.uint16).reshape(8, 8))
    x = data.fit(ramp, section(image_size=(8, 8), channels=1))
    np.testing.assert_array_equal(x.ravel(), np.arange(0, 256, 4))


def test_broken_images_are_named(folder, caplog):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    for name in ("truncated.png", "truncated.jpg"):
        Image.fromarray(noise).save(folder / name)
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    with pytest.raises(UserError) as error:
        data.open_source(folder_section(folder))
    assert "3 of 13 unreadable" in str(error.value)
    for name in ("truncated.png", "truncated.jpg", "empty.jpg"):
        assert name in str(error.value)
    section = folder_section(folder, skip_unreadable=True, eval_split="train[:5]")
    assert data.open_source(section).size == 10
    data.open_source(section, "eval_split")
    assert caplog.text.count("(skipped)") == 1


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(name="folder", path="/nowhere"), "data.path='/nowhere'"),
        (dict(name="folder", path=""), "data.path=''"),
        (dict(name="no_such_set"), "data.name='no_such_set'"),
        (dict(name="digits", split="tset"), "data.split='tset'"),
        (dict(name="digits", split="train[:9000]"), "data.split"),
        (dict(name="digits", split="train[:"), "data.split"),
        (dict(name="digits", split="train[:0]"), "holds no images"),
    ],
)
def test_bad_input(changes, message):
    with pytest.raises(UserError) as error:
        data.open_source(section(**changes))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_empty_folder(tmp_path):
    with pytest.raises(UserError, match=r"data\.path"):
        data.open_source(folder_section(tmp_path))


# TFDS.


def prepare(data_dir, name="mnist", count=30, size=(28, 28, 1)):
    """Has the official builder write `count` images whose pixels are all i."""
    builder = tfds.builder(name, data_dir=str(data_dir), file_format="array_record")
    builder._split_generators = lambda _: {
        split: ((i, {"image": np.full(size, i, np.uint8), "label": i % 10}) for i in range(count))
        for split in ("train", "test")
    }
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    prepare(folder)
    return folder


@pytest.mark.parametrize("max_ram_gib", [0.0, 1.0])
def test_tfds(data_dir, max_ram_gib):
    fields = dict(name="mnist", data_dir=str(data_dir), channels=1, max_ram_gib=max_ram_gib)
    source = data.open_source(section(**fields, image_size=(28, 28), split="train[:90%]"))
    assert source.size == 27
    x = source.read(np.arange(27)).images
    assert x.shape == (27, 28, 28, 1)
    assert len({*x[:, 0, 0, 0]}) == 27 and (x == x[:, :1, :1]).all()
    larger = data.open_source(section(**fields, image_size=(32, 32), split="test"))
    assert larger.read(np.arange(2)).images.shape == (2, 32, 32, 1)
    with pytest.raises(UserError, match=r"data.split='validation'.*train"):
        data.open_source(section(**fields, split="validation"))


@pytest.mark.parametrize("max_ram_gib", [0.0, 1.0])
def test_labels_of_tfds(data_dir, max_ram_gib):
    fields = dict(name="mnist", data_dir=str(data_dir), channels=1, image_size=(28, 28))
    fields |= dict(max_ram_gib=max_ram_gib, num_classes=10, split="train")
    source = data.open_source(section(**fields))
    images, labels = source.read(np.array([5, 12, 0]))
    assert source.label_names == tuple("0123456789")
    np.testing.assert_array_equal(labels, images[:, 0, 0, 0] % 10)
    assert labels.dtype == np.int32


def test_a_tfds_image_without_a_label(data_dir, monkeypatch):
    """TFDS's label of it is -1."""
    fields = dict(name="mnist", data_dir=str(data_dir), channels=1, image_size=(28, 28))
    fields |= dict(max_ram_gib=0.0, num_classes=10, split="train")
    as_data_source = tfds.core.DatasetBuilder.as_data_source

    def unlabelled(*args, **options):
        stored = as_data_source(*args, **options)
        read = stored.__getitems__
        stored.__getitems__ = lambda i: [row | {"label": row["label"] - 10} for row in read(i)]
        return stored

    monkeypatch.setattr(tfds.core.DatasetBuilder, "as_data_source", unlabelled)
    with pytest.raises(UserError, match=r"image 5 of train: has the label -\d+, no class"):
        data.open_source(section(**fields)).read(np.array([5, 4]))
    fields["num_classes"] = 0
    assert data.open_source(section(**fields)).read(np.array([5, 4])).labels is None


@pytest.mark.parametrize("max_ram_gib", [0.0, 1.0])
def test_labels_of_a_folder(folder, max_ram_gib):
    """The classes are its folders, by name; image i has red level 20 i and class i mod 2."""
    fields = dict(num_classes=2, max_ram_gib=max_ram_gib, split="train[:7]")
    source = data.open_source(folder_section(folder, **fields))
    assert source.label_names == ("class0", "class1")
    images, labels = source.read(np.arange(7))
    np.testing.assert_array_equal(labels, np.round(images[:, 4, 6, 0] / 20) % 2)
    with pytest.raises(
        UserError, match=r"data\.num_classes=3: folder has 2 classes: class0, class1"
    ):
        data.open_source(folder_section(folder, num_classes=3))
    with pytest.raises(UserError, match=r"0\.png is not in the folder of a class"):
        data.open_source(folder_section(folder / "class0", num_classes=2))


def test_labels_follow_their_images():
    """After shuffling and flips, each digit of a batch still has its own label."""
    source = data.open_source(digits(split="train", num_classes=10))
    images, labels = source.read(np.arange(source.size))
    known = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
    for batch in itertools.islice(data.batches(source, **options()), 20):
        assert [known[image.tobytes()] for image in batch.images] == batch.labels.tolist()
    assert data.open_source(digits(split="train")).read(np.arange(3)).labels is None


def test_eval_split_is_named_in_errors(data_dir):
    wrong = section(name="mnist", data_dir=str(data_dir), eval_split="tets")
    with pytest.raises(UserError, match=r"data.eval_split='tets'"):
        data.open_source(wrong, "eval_split")


def test_the_program_imports_neither_tensorflow_nor_torch(data_dir):
    code = f"""
import sys
import numpy as np
from ddpm_jax import cli, configs
from ddpm_jax.files import data
config = configs.named_config("mnist")
config.data.data_dir = {str(data_dir)!r}
data.open_source(config.data).read(np.arange(3))
assert not {{"tensorflow", "torch"}} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_not_prepared_and_no_network(tmp_path, monkeypatch):
    def refuse(self, *args, **kwargs):
        url = "url: /~kriz/cifar-10-binary.tar.gz"  # as long as the text of requests
        raise ConnectionError(f"{'HTTPSConnectionPool: ' * 5}{url} (Failed to resolve 'x.org')")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", refuse)
    with pytest.raises(UserError) as error:
        data.open_source(section(name="mnist", data_dir=str(tmp_path / "none")))
    assert "data.name='mnist'" in str(error.value)
    assert "Failed to resolve 'x.org'" in str(error.value)
    assert "tfds build mnist --file_format=array_record --data_dir" in str(error.value)


def test_what_a_user_might_not_expect_is_said_once(folder, caplog):
    """One warning for both splits: about other files, and about levels that are mostly unused."""
    for path in folder.rglob("*.*"):
        if path.suffix != ".txt":
            Image.new("L", (8, 8), 3).save(path)
    for field in ("split", "eval_split"):
        data.open_source(folder_section(folder, eval_split="train[:5]"), field)
    start = rf"data\.path='{folder}': "
    skipped = f"{start}skipped files that are not images: 1 .txt"
    few = f"{start}the images use only the levels"
    assert [len(re.findall(text, caplog.text)) for text in (skipped, few)] == [1, 1]


def test_links_to_folders_are_classes(folder, tmp_path_factory):
    """Half of the images are in a folder that is a link."""
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "x"
    (folder / "class1").rename(elsewhere)
    (folder / "class1").symlink_to(elsewhere)
    source = data.open_source(folder_section(folder, num_classes=2))
    assert (source.size, source.label_names) == (10, ("class0", "class1"))


def test_images_that_change_are_looked_at_again(folder):
    """Also within one process, such as a notebook."""
    assert data.open_source(folder_section(folder)).size == 10
    (folder / "class0" / "0.png").write_text("no image")
    with pytest.raises(UserError, match="1 of 10 unreadable"):
        data.open_source(folder_section(folder))


def test_a_split_that_rounds_to_nothing(folder, data_dir):
    few = folder_section(folder, eval_split="train[:4%]")
    official = section(name="mnist", data_dir=str(data_dir), channels=1, eval_split="test[:1%]")
    for wanted, size in ((few, 10), (official, 30)):
        message = rf"data\.eval_split='.*%\]': holds no images: .* of {size} .*'train\[:1\]'"
        with pytest.raises(UserError, match=message):
            data.open_source(wanted, "eval_split")


def test_a_dataset_that_is_gone_is_named(tmp_path):
    prepare(tmp_path)
    fields = dict(name="mnist", data_dir=str(tmp_path), channels=1, image_size=(28, 28))
    source = data.open_source(section(**fields, max_ram_gib=0.0))
    for path in tmp_path.rglob("*.array_record*"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"data\.name='mnist': .*cannot be read"):
        source.read(np.arange(3))
