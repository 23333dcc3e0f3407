"""Every source gives the same five arrays; whatever is not a data set is refused in one line."""

from __future__ import annotations

import concurrent.futures
import hashlib
import http.server
import io
import os
import pickle
import struct
import tarfile
import threading
import tracemalloc
import zipfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as reference
from PIL import Image
from torchvision.datasets import CIFAR100

from msunet_core.data import sources as room
from msunet_core.data.images import ARRAYS, MEAN, STD, ImageData, normalise
from msunet_core.data.sources import hold_out, load_data, save_npz
from msunet_core.errors import StudyError

NAMES = ("apple", "bear", "cup")


def small_arrays() -> dict[str, np.ndarray]:
    """Three classes, four training images and two test images each."""
    draw = np.random.default_rng(0)
    return {
        "train_images": draw.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8),
        "train_labels": np.tile(np.arange(3, dtype=np.uint8), 4),
        "test_images": draw.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8),
        "test_labels": np.tile(np.arange(3, dtype=np.uint8), 2),
        "class_names": np.array(NAMES),
    }


@pytest.fixture
def npz(tmp_path):
    """Writes the small arrays with some of them replaced (None: left out); returns the path."""

    def write(*, compressed: bool = False, **changes) -> Path:
        arrays = {name: array for name, array in {**small_arrays(), **changes}.items() if array is not None}
        path = tmp_path / "small.npz"
        (np.savez_compressed if compressed else np.savez)(path, **arrays)
        return path

    return write


@pytest.fixture
def folder(tmp_path) -> Path:
    """A data folder of the small arrays, images of each class in order."""
    arrays = small_arrays()
    for split in ("train", "test"):
        for i, (image, label) in enumerate(
            zip(arrays[f"{split}_images"], arrays[f"{split}_labels"], strict=True)
        ):
            home = tmp_path / "photos" / split / NAMES[label]
            home.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(home / f"{i:02d}.png")
    return tmp_path / "photos"


def refusal(source, **options) -> str:
    """The message of the refusal, which must be one line and no warning."""
    with pytest.raises(StudyError) as caught:
        load_data(source, **options)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400, message
    return message


# --- what is accepted ---------------------------------------------------------------------------------------


def test_an_npz_comes_back_as_tensors(npz):
    data, arrays = load_data(npz()), small_arrays()
    for name in ARRAYS[:4]:
        assert np.array_equal(getattr(data, name).numpy(), arrays[name]), name
    assert data.train_images.dtype == data.test_images.dtype == torch.uint8
    assert data.train_labels.dtype == data.test_labels.dtype == torch.int64
    assert data.class_names == NAMES and data.num_classes == 3


def test_compression_and_integer_type_of_the_labels_do_not_matter(npz):
    plain = load_data(npz())
    for dtype in (np.int8, np.int32, np.uint64, ">i4"):
        other = load_data(npz(compressed=True, train_labels=small_arrays()["train_labels"].astype(dtype)))
        assert other.fingerprint == plain.fingerprint, dtype


def test_a_folder_holds_the_same_data_in_class_order(folder):
    data, arrays = load_data(folder), small_arrays()
    order = np.argsort(arrays["train_labels"], kind="stable")
    assert np.array_equal(data.train_images.numpy(), arrays["train_images"][order])
    assert data.train_labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert data.class_names == NAMES


def test_hidden_files_and_other_files_in_a_folder_are_no_images(folder):
    before = load_data(folder).fingerprint
    (folder / "train" / ".DS_Store").write_bytes(b"x")
    (folder / "train" / "README.txt").write_text("about")
    (folder / "train" / "bear" / "._00.png").write_bytes(b"x")
    (folder / "train" / "bear" / "notes.txt").write_text("about")
    assert load_data(folder).fingerprint == before


def test_limit_keeps_the_first_images_of_each_class_in_their_order(npz):
    whole = load_data(npz())
    some = load_data(npz(), limit=2)
    assert torch.equal(some.train_images, whole.train_images[:6])
    assert some.train_labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert len(some.test_images) == 6, "a limit above what a class has keeps all of it"


def test_what_save_npz_writes_is_read_back(npz, tmp_path):
    data = load_data(npz())
    save_npz(data, tmp_path / "copy.npz")
    again = load_data(tmp_path / "copy.npz")
    assert again.fingerprint == data.fingerprint and again.class_names == data.class_names


def test_a_failed_write_leaves_the_old_file_and_no_other(npz, tmp_path, monkeypatch):
    data = load_data(npz())
    target = tmp_path / "kept.npz"
    save_npz(data, target)
    before, names = target.read_bytes(), sorted(os.listdir(tmp_path))
    monkeypatch.setattr(np, "savez", lambda stream, **arrays: (stream.write(b"half"), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        save_npz(data, target)
    assert target.read_bytes() == before and sorted(os.listdir(tmp_path)) == names


def test_the_fingerprint_names_the_content_not_the_path(npz, folder, tmp_path):
    data = load_data(npz())
    changed = data.train_images.clone()
    changed[0, 0, 0, 0] ^= 1
    parts = {name: getattr(data, name) for name in (*ARRAYS, "source")}
    assert len(data.fingerprint) == 16
    assert ImageData(**{**parts, "source": "elsewhere"}).fingerprint == data.fingerprint
    assert ImageData(**{**parts, "train_images": changed}).fingerprint != data.fingerprint
    assert ImageData(**{**parts, "class_names": ("apple", "bear", "cap")}).fingerprint != data.fingerprint


def test_normalise_is_torchvisions_to_tensor_and_normalize(npz):
    images = load_data(npz()).train_images
    out = normalise(images)
    assert out.dtype == torch.float32 and out.is_contiguous(memory_format=torch.channels_last)
    for ours, image in zip(out, images, strict=True):
        expected = reference.normalize(reference.to_tensor(image.numpy()), MEAN, STD)
        # Scale and offset are applied in another order: some roundings of values up to 2.7 (2.4e-7 each).
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


# --- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source, words",
    [
        ("syntetic", ("unknown data source 'syntetic'", "did you mean 'synthetic'", "cifar100")),
        ("cifar10", ("unknown data source 'cifar10'", "did you mean 'cifar100'")),
        ("", ("unknown data source ''",)),
        ("no/such/file.npz", ("no such file or folder", "no/such/file.npz")),
        ("nul\0byte", ("unknown data source",)),
        ("/dev/null", ("neither a file nor a folder", "/dev/null")),
    ],
)
def test_an_unknown_source_or_missing_path_is_named(source, words):
    message = refusal(source)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, "20"])
def test_a_limit_that_is_no_positive_whole_number_is_refused(limit):
    assert f"limit {limit!r}" in refusal("synthetic", limit=limit)


def test_missing_arrays_are_listed_with_those_that_are_there(npz):
    message = refusal(npz(test_labels=None, class_names=None))
    assert "no array test_labels, class_names" in message and "train_images" in message


SMALL = small_arrays()


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"train_images": SMALL["train_images"].astype(np.float32)},
            "train_images is float32 of shape (12, 32,",
        ),
        ({"train_images": np.full((12, 32, 32, 3), np.nan)}, "with 36864 NaN"),
        ({"train_images": SMALL["train_images"].transpose(0, 3, 1, 2)}, "shape (12, 3, 32, 32); give uint8"),
        ({"test_images": SMALL["test_images"][:, :28, :28]}, "test_images is uint8 of shape (6, 28, 28, 3)"),
        ({"test_images": SMALL["test_images"][:0]}, "shape (0, 32, 32, 3)"),
        ({"train_images": np.uint8(3)}, "train_images is uint8 of shape ()"),
        ({"train_labels": SMALL["train_labels"][:-1]}, "shape (11,); give whole numbers"),
        ({"train_labels": SMALL["train_labels"].astype(float)}, "train_labels is float64"),
        ({"train_labels": np.full(12, np.nan)}, "with 12 NaN"),
        ({"train_labels": SMALL["train_labels"] > 0}, "train_labels is bool"),
        ({"train_labels": SMALL["train_labels"].astype(np.int64) - 1}, "label -1, outside 0..2"),
        ({"test_labels": np.full(6, 2**63, np.uint64)}, "label 9223372036854775808, outside 0..2"),
        ({"class_names": SMALL["class_names"][:2]}, "label 2, outside 0..1 of the 2 class_names"),
        ({"class_names": np.array([*NAMES, "dog"])}, "class 'dog' has no image in train"),
        ({"class_names": np.array(["apple", "bear", "bear"])}, "class name 'bear' occurs twice"),
        ({"class_names": np.array(["apple", "", "cup"])}, "class name '' is empty"),
        ({"class_names": np.array(["apple", "a\nb", "cup"])}, r"class name 'a\nb'"),
        ({"class_names": np.arange(3)}, "class_names is int64 of shape (3,)"),
        ({"class_names": np.array(NAMES, object)}, "class_names holds pickled objects, never loaded"),
        ({"test_labels": np.array([0, 1, 0, 1, 0, 1])}, "class 'cup' has no image in test (1 such)"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_by_name(npz, changes, words):
    path = npz(**changes)
    message = refusal(path)
    assert words in message and str(path) in message, message


def test_nothing_in_an_npz_is_ever_unpickled(npz, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    assert "pickled objects" in refusal(npz(train_labels=np.array([Bomb()] * 12, object)))
    assert not (tmp_path / "executed").exists()


def test_a_truncated_npz_is_refused_wherever_it_is_cut(npz):
    path = npz()
    whole = path.read_bytes()
    for length in [0, 1, 3, 21, 100, *range(1000, len(whole), 4001), len(whole) - 22, len(whole) - 1]:
        path.write_bytes(whole[:length])
        assert "is not a whole .npz" in refusal(path), length


@pytest.mark.parametrize("compressed", [False, True])
def test_damaged_bytes_are_refused_or_change_nothing(npz, compressed):
    """250 files with 1 to 8 damaged bytes each: what is accepted is what was written."""
    path = npz(compressed=compressed)
    whole, fingerprint = path.read_bytes(), load_data(path).fingerprint
    draw = np.random.default_rng(1)
    refused = 0
    for _ in range(250):
        damaged = np.frombuffer(whole, np.uint8).copy()
        where = draw.integers(0, len(whole), draw.integers(1, 9))
        if draw.random() < 0.5:  # headers and the directory are a small part of the file: aim at them too
            where = np.where(draw.random(len(where)) < 0.5, where % 300, len(whole) - 1 - where % 700)
        damaged[where] = draw.integers(0, 256, len(where))
        path.write_bytes(damaged.tobytes())
        try:
            assert load_data(path).fingerprint == fingerprint
        except StudyError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 200, refused


@pytest.mark.parametrize("shape", [(10**12, 32, 32, 3), (2**62, 2**62), (-1, 32, 32, 3), (0, 32, 32, 3)])
def test_a_shape_that_is_not_what_the_file_holds_is_refused_before_anything_is_allocated(npz, shape):
    path = npz()
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(path) as old:
        members = {name: old.read(name) for name in old.namelist()}
    members["train_images.npy"] = header.getvalue() + bytes(100)
    with zipfile.ZipFile(path, "w") as new:
        for name, content in members.items():
            new.writestr(name, content)
    assert "array train_images claims shape" in refusal(path)


def test_a_file_that_is_no_archive_is_refused(tmp_path):
    text = tmp_path / "data.npz"
    text.write_text("not a zip archive")
    assert "is not a whole .npz" in refusal(text)
    np.save(tmp_path / "one.npy", np.zeros(3))
    assert "is not a whole .npz" in refusal(tmp_path / "one.npy")


def test_a_folder_needs_train_and_test_with_the_same_classes(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "has no folder train/" in refusal(tmp_path / "empty")
    (tmp_path / "bare" / "train").mkdir(parents=True)
    assert "has no class folders" in refusal(tmp_path / "bare")
    (folder / "train" / "dog").mkdir()
    assert "class 'dog' is in train/ but not in test/ (1 such)" in refusal(folder)
    (folder / "test" / "dog").mkdir()
    assert f"{folder / 'train' / 'dog'} has no .png in it" in refusal(folder)


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda file: Image.new("RGB", (28, 32)).save(file), "is 28 x 32 pixels; resize it to 32 x 32"),
        (lambda file: Image.new("RGBA", (32, 32)).save(file), "has colour mode RGBA; save it as 8-bit RGB"),
        (lambda file: file.write_bytes(file.read_bytes()[:500]), "is not a readable PNG"),
        (lambda file: file.write_bytes(b""), "is not a readable PNG"),
        (lambda file: Image.new("RGB", (32, 32)).save(file, format="BMP"), "is not a readable PNG"),
    ],
)
def test_an_image_that_does_not_fit_is_named(folder, spoil, words):
    file = folder / "test" / "cup" / "02.png"
    spoil(file)
    message = refusal(folder)
    assert words in message and str(file) in message, message


# --- CIFAR-100 ----------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A small archive in CIFAR-100's own format behind a loopback URL, with its checksums in place."""
    draw = np.random.default_rng(0)
    labels = {"train": [i % 100 for i in range(200)], "test": [i % 100 for i in range(100)]}
    members = {"meta": pickle.dumps({"fine_label_names": [f"class {i}" for i in range(100)]})}
    for split, fine in labels.items():
        pixels = draw.integers(0, 256, (len(fine), 3072), dtype=np.uint8)
        members[split] = pickle.dumps({"data": pixels, "fine_labels": fine})
    archive = tmp_path / "served" / CIFAR100.filename
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(f"{CIFAR100.base_folder}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    listener = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=archive.parent))
    threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def md5(content: bytes) -> str:
        return hashlib.md5(content).hexdigest()

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(CIFAR100, "url", f"http://127.0.0.1:{listener.server_port}/{archive.name}")
    monkeypatch.setattr(CIFAR100, "tgz_md5", md5(archive.read_bytes()))
    monkeypatch.setattr(CIFAR100, "train_list", [["train", md5(members["train"])]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", md5(members["test"])]])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": md5(members["meta"])})
    monkeypatch.setattr(room, "CIFAR100_PER_CLASS", (2, 1))
    yield archive
    listener.shutdown()
    listener.server_close()


def test_cifar100_is_downloaded_once_and_then_read_from_its_cache(server, tmp_path):
    cache = tmp_path / "data"
    first = load_data("cifar100", cache=cache)
    assert first.train_images.shape == (200, 32, 32, 3) and first.num_classes == 100
    planes = pickle.loads((cache / CIFAR100.base_folder / "train").read_bytes())["data"]
    assert np.array_equal(first.train_images[7].permute(2, 0, 1).numpy().ravel(), planes[7])
    server.unlink()
    for name in (CIFAR100.filename, f"{CIFAR100.base_folder}/train"):
        (cache / name).unlink()
    assert load_data("cifar100", cache=cache).fingerprint == first.fingerprint


def test_an_archive_put_there_by_hand_needs_no_network(server, tmp_path):
    cache = tmp_path / "data"
    cache.mkdir()
    server.rename(cache / CIFAR100.filename)
    assert load_data("cifar100", cache=cache).num_classes == 100


def test_a_cut_download_is_refused_and_leaves_nothing_that_looks_finished(server, tmp_path):
    cache = tmp_path / "data"
    whole = server.read_bytes()
    server.write_bytes(whole[: len(whole) // 2])
    message = refusal("cifar100", cache=cache)
    assert "failed 2 times" in message and str(cache) in message, message
    assert os.listdir(cache) == [".lock"]
    server.write_bytes(whole)
    assert load_data("cifar100", cache=cache).num_classes == 100, "the same command then works"


def test_processes_that_ask_at_once_download_once(server, tmp_path, monkeypatch):
    """As under torchrun; threads stand in, since a lock is of the descriptor that each one opens."""
    downloads, download = [], room._download_cifar100
    monkeypatch.setattr(room, "_download_cifar100", lambda cache: downloads.append(cache) or download(cache))
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(load_data, "cifar100", cache=tmp_path / "data") for _ in range(3)]
        assert len({one.result().fingerprint for one in asked}) == 1
    assert len(downloads) == 1


def test_a_download_that_fails_once_is_tried_again(server, tmp_path, monkeypatch):
    whole = server.read_bytes()
    server.write_bytes(whole[:1000])
    remove = Path.unlink
    # The archive is repaired while the first bad copy is being removed.
    monkeypatch.setattr(
        Path, "unlink", lambda self, missing_ok=False: (server.write_bytes(whole), remove(self, missing_ok))
    )
    assert load_data("cifar100", cache=tmp_path / "data").num_classes == 100


def test_changed_files_are_never_unpickled(server, tmp_path):
    cache = tmp_path / "data"
    load_data("cifar100", cache=cache)
    (cache / "cifar100.npz").unlink()
    (cache / CIFAR100.filename).unlink()
    server.unlink()
    (cache / CIFAR100.base_folder / "train").write_bytes(b"cos\nsystem\n(S'touch executed'\ntR.")
    assert "failed 2 times" in refusal("cifar100", cache=cache)


def test_a_damaged_cache_is_said_and_made_anew(server, tmp_path, capsys):
    cache = tmp_path / "data"
    first = load_data("cifar100", cache=cache)
    cached = cache / "cifar100.npz"
    cached.write_bytes(cached.read_bytes()[:5000])
    assert load_data("cifar100", cache=cache).fingerprint == first.fingerprint
    assert "is not a whole .npz" in capsys.readouterr().err


def test_a_part_of_cifar100_in_the_cache_is_not_taken_for_the_whole(server, tmp_path, capsys):
    cache = tmp_path / "data"
    first = load_data("cifar100", cache=cache)
    save_npz(load_data("cifar100", cache=cache, limit=1), cache / "cifar100.npz")
    assert load_data("cifar100", cache=cache).fingerprint == first.fingerprint
    assert "is not the whole CIFAR-100: 100 train images" in capsys.readouterr().err


def test_without_a_network_one_line_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(CIFAR100, "url", "http://127.0.0.1:9/cifar-100-python.tar.gz")  # the discard port
    message = refusal("cifar100", cache=tmp_path / "data")
    assert "check the network" in message and "or name an .npz" in message


# --- the real images ----------------------------------------------------------------------------------------

REAL = os.environ.get("MSUNET_CIFAR100_NPZ")
needs_real = pytest.mark.skipif(not REAL, reason="MSUNET_CIFAR100_NPZ names no .npz of the real CIFAR-100")


@needs_real
def test_the_real_cifar100_is_what_spec_section_4_says():
    data = load_data(REAL)
    assert data.num_classes == 100 and data.class_names[0] == "apple" and data.class_names[-1] == "worm"
    for labels, images in ((data.train_labels, data.train_images), (data.test_labels, data.test_images)):
        counts = labels.bincount(minlength=100)
        assert counts.min() == counts.max() > 0 and len(images) == len(labels)


@needs_real
def test_the_published_normalisation_roughly_standardises_the_real_images():
    images = normalise(load_data(REAL, limit=20).train_images)
    # The constants are CIFAR-10's: CIFAR-100's own mean differs by up to 0.03 (0.14 of the std), its
    # std by up to 0.07 (a third of it); 2,000 images leave 0.02 of noise.
    assert images.mean((0, 2, 3)).abs().max() < 0.3
    assert (images.std((0, 2, 3)) - 1).abs().max() < 0.5


def test_held_out_images_are_the_last_of_each_class_and_no_longer_trained_on():
    whole = load_data("synthetic", limit=5)
    held = hold_out(whole, 2)
    assert held.test_labels.bincount().tolist() == [2] * 100
    assert held.train_labels.bincount().tolist() == [3] * 100
    for label in (0, 57, 99):
        own = whole.train_images[whole.train_labels == label]
        assert torch.equal(held.train_images[held.train_labels == label], own[:3])
        found = held.test_images[held.test_labels == label]
        assert {image.numpy().tobytes() for image in found} == {image.numpy().tobytes() for image in own[3:]}


@pytest.mark.parametrize("count", [0, 5, -1])
def test_a_hold_out_that_leaves_a_class_empty_is_refused(count):
    with pytest.raises(StudyError, match=rf"hold-out {count} of each class is outside 1 .. 4"):
        hold_out(load_data("synthetic", limit=5), count)


# --- files of strangers -----------------------------------------------------------------------------------


def header(descr: str, shape: tuple) -> bytes:
    stream = io.BytesIO()
    fields = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, fields)
    return stream.getvalue()


def put(path: Path, name: str, content: bytes, kind: int = zipfile.ZIP_DEFLATED) -> None:
    """Replace one array of an .npz by bytes."""
    with zipfile.ZipFile(path) as archive:
        members = {entry: archive.read(entry) for entry in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for entry, data in (members | {f"{name}.npy": content}).items():
            archive.writestr(entry, data, kind)


@pytest.mark.parametrize(
    ("descr", "shape", "content"),
    [
        ("<U0", (3_000_000_000,), b""),
        ("|V0", (3_000_000_000,), b""),
        ("<U1", (3,), b"\xff" * 12),
        (">U1", (3,), bytes.fromhex("00110000") * 3),
        ("<U1", (3,), b"\0\xd8\0\0" * 3),
        ("<U1", (3,), b"\x1b\0\0\0" * 3),
        ("<U2000000", (3,), b"a\0\0\0" * 6_000_000),
        ("<U1", (1_000_000,), b"a\0\0\0" * 1_000_000),
        ("<U1", (4_000_000_000,), b""),
        ("<U1", (-3,), b""),
    ],
    ids=[
        "no width",
        "void",
        "beyond",
        "beyond, swapped",
        "surrogates",
        "escapes",
        "long",
        "many",
        "lie",
        "minus",
    ],
)
def test_class_names_that_are_none_are_refused_and_take_no_memory(npz, descr, shape, content):
    path = npz()
    put(path, "class_names", header(descr, shape) + content)
    tracemalloc.start()
    try:
        assert "class_names" in refusal(path)
        assert tracemalloc.get_traced_memory()[1] < 100 * 2**20
    finally:
        tracemalloc.stop()


def test_class_names_of_the_other_byte_order_are_names(npz):
    path = npz(class_names=np.array(NAMES, dtype=">U5"))
    assert load_data(path).class_names == NAMES


def test_a_small_file_of_nothing_does_not_fill_the_memory(npz):
    path = npz()
    put(path, "train_images", header("|u1", (30_000, 32, 32, 3)) + bytes(30_000 * 3072))
    assert path.stat().st_size < 200_000
    assert "claims shape (30000, 32, 32, 3)" in refusal(path)


def test_an_archive_of_very_many_members_or_of_another_packing_is_refused(npz):
    path = npz()
    put(path, "class_names", header("<U1", (1,)) + b"a\0\0\0", zipfile.ZIP_LZMA)
    assert "packed in another way" in refusal(path)
    with zipfile.ZipFile(path, "a") as archive:
        for number in range(2000):
            archive.writestr(f"{number}", b"")
    assert "more than 1000 members" in refusal(path)


def png(**options) -> bytes:
    stream = io.BytesIO()
    mode, more = options.pop("mode", "RGB"), options.pop("append_images", [])
    Image.new(mode, (32, 32)).save(stream, "PNG", append_images=more, **options)
    return stream.getvalue()


def sixteen_bits() -> bytes:
    """A PNG of 16 bits a channel, which PIL reads as 8-bit RGB without a word."""

    def chunk(name: bytes, content: bytes) -> bytes:
        checked = name + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    rows = (b"\0" + bytes(32 * 6)) * 32
    head = struct.pack(">IIBBBBB", 32, 32, 16, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lambda: png(save_all=True, append_images=[Image.new("RGB", (32, 32), "red")]), "animated"),
        (sixteen_bits, "16 bits a channel"),
        (lambda: png(transparency=(1, 2, 3)), "partly transparent"),
        (lambda: png(mode="P", transparency=0), "partly transparent"),
        (lambda: png(mode="L", transparency=3), "partly transparent"),
        (lambda: png() + bytes(2**23), "more than"),
        (lambda: png()[:40], "not a readable PNG"),
        (lambda: png().replace(b"IDAT", b"IDAT\0", 1), "not a readable PNG"),
        (lambda: b"", "not a readable PNG"),
    ],
    ids=["animated", "16 bits", "tRNS", "tRNS palette", "tRNS grey", "long", "cut", "shifted", "empty"],
)
def test_a_png_that_would_be_reduced_is_refused(folder, content, said):
    image = folder / "train" / NAMES[0] / "00.png"
    image.write_bytes(content())
    assert said in refusal(folder)


def test_a_pipe_or_a_folder_among_the_images_is_refused_and_not_waited_for(folder):
    image = folder / "train" / NAMES[0] / "99.png"
    os.mkfifo(image)
    assert "not a regular file" in refusal(folder)
    image.unlink()
    image.mkdir()
    assert "cannot read" in refusal(folder)


@pytest.mark.parametrize("name", ["a b", "100%", "it's", "$x^$", "<b>", "`x`", "$(x)", "a&b;c|d", "é"])
def test_a_class_may_be_called_anything_that_can_be_shown(folder, name):
    for split in ("train", "test"):
        (folder / split / NAMES[0]).rename(folder / split / name)
    assert name in load_data(folder).class_names
