"""The images: uint8 tensors from the embedded set, CIFAR-100, an .npz or a folder of PNGs (specification §4).

Whatever the source, the result is the same five arrays, checked at the door: what does not fit is refused by
a :class:`StudyError` of one line. Files may come from strangers: nothing is unpickled, and no array is
allocated before the file has shown that it holds as many bytes as its header claims.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import shutil
import socket
import stat
import sys
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from ..errors import StudyError, closest, reason, shown
from ..files import ROOT, atomic_path, read_bytes, taking_turns
from .images import ARRAYS, IMAGE_SIZE, ImageData
from .synthetic import make_synthetic

SOURCES = ("synthetic", "cifar100")
# CIFAR-100's fine labels 0 .. 99 as the data set orders them, by the alphabet.
_NAMES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard
lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear
pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal
shark shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank
telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""
CIFAR100_CLASSES = tuple(_NAMES.split())
CIFAR100_PER_CLASS = (500, 100)  # 50,000 and 10,000 images, specification §4
MAX_ARRAY_BYTES = 2**32  # 1.4 million images; a file that claims more is damaged or hostile
MAX_SHRINKING = 100  # images shrink less; arrays of a megabyte or two may be as empty as they like
MAX_MEMBERS = 1000  # of an .npz, which needs 5
MAX_CLASSES = 100_000
MAX_NAME = 255  # characters of a class name, as of a folder's
MAX_PNG_BYTES = 2**22  # of 32 x 32 pixels and whatever a program may write beside them
DOWNLOAD_ATTEMPTS = 2
DOWNLOAD_SILENCE = 30  # seconds without a byte before a download counts as cut


def load_data(
    source: str | os.PathLike = "synthetic",
    *,
    limit: int | None = None,
    seed: int = 0,
    cache: str | os.PathLike = ROOT / "data",
) -> ImageData:
    """Load a data set.

    Parameters
    ----------
    source : "synthetic"; "cifar100", downloaded once into ``cache``; an .npz with the arrays
        ``train_images`` uint8 (N, 32, 32, 3), ``train_labels`` integer (N,), ``test_images``, ``test_labels``
        and ``class_names``; or a folder with ``train/<class>/*.png`` and ``test/<class>/*.png``
    limit : keep the first so many images of each class in each split; None keeps all
    seed : of the synthetic data; the others ignore it
    cache : folder for the download, by default ``data/`` of the checkout

    Raises
    ------
    StudyError : one line with the value seen and the remedy, for anything that is not such a data set
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise StudyError(
            f"limit {shown(limit)}: give a whole number of images per class, at least 1, or None"
        )
    name = os.fspath(source)
    if name == "synthetic":
        arrays = make_synthetic(seed)
    elif name == "cifar100":
        arrays = _load_cifar100(Path(cache))
    else:
        arrays = _load_path(name)
    if limit is not None:
        for split in ("train", "test"):
            keep = _first_of_each_class(arrays[f"{split}_labels"], limit)
            arrays[f"{split}_images"] = arrays[f"{split}_images"][keep]
            arrays[f"{split}_labels"] = arrays[f"{split}_labels"][keep]
    tensors = {key: torch.from_numpy(np.ascontiguousarray(arrays[key])) for key in ARRAYS[:4]}
    return ImageData(**tensors, class_names=tuple(arrays["class_names"].tolist()), source=name)


def hold_out(data: ImageData, per_class: int) -> ImageData:
    """The training half alone: to test on the last ``per_class`` of each class, to train on the others.

    A recipe is chosen on these; the test images choose nothing.

    Raises
    ------
    StudyError : a class would have no image left to train on, or none to test on
    """
    labels = data.train_labels.numpy()
    fewest = np.bincount(labels, minlength=data.num_classes).min()
    if fewest < 2:
        raise StudyError("a class has one training image, so none of it can be held out; give more images")
    if not 1 <= per_class < fewest:
        raise StudyError(
            f"hold-out {per_class} of each class is outside 1 .. {fewest - 1}, with {fewest} training images "
            "in the smallest class; choose another number"
        )
    held = torch.from_numpy(len(labels) - 1 - _first_of_each_class(labels[::-1], per_class))
    kept = torch.ones(len(labels), dtype=torch.bool)
    kept[held] = False
    images = [
        data.train_images[kept],
        data.train_labels[kept],
        data.train_images[held],
        data.train_labels[held],
    ]
    return ImageData(*images, class_names=data.class_names, source=f"{data.source}, {per_class} held out")


def save_npz(data: ImageData, path: str | os.PathLike) -> None:
    """Write a data set as the .npz that :func:`load_data` reads, whole or not at all, without pickles."""
    arrays = {name: getattr(data, name).cpu().numpy() for name in ARRAYS[:4]}
    _write_npz({**arrays, "class_names": np.array(data.class_names)}, Path(path))


def _first_of_each_class(labels: np.ndarray, limit: int) -> np.ndarray:
    """Positions, ascending, of the first ``limit`` images of every class."""
    by_class = np.argsort(labels, kind="stable")
    _, first, count = np.unique(labels[by_class], return_index=True, return_counts=True)
    rank = np.arange(len(labels)) - np.repeat(first, count)
    return np.sort(by_class[rank < limit])


# --- paths ------------------------------------------------------------------------------------------------


def _load_path(name: str) -> dict[str, np.ndarray]:
    expanded = os.path.expanduser(name)
    path = Path(expanded)
    try:
        mode = os.stat(expanded).st_mode  # not path.stat(): Path("") is the current folder
    except (OSError, ValueError):  # ValueError: a null byte in the name
        if path.suffix or len(path.parts) > 1:
            raise StudyError(
                f"data {name!r}: no such file or folder; correct the path or use 'synthetic'"
            ) from None
        known = closest(name, SOURCES)
        raise StudyError(
            f"unknown data source {name!r}: {known}, or give the path of an .npz or a folder"
        ) from None
    if stat.S_ISDIR(mode):
        return _load_folder(path)
    if stat.S_ISREG(mode):
        return _load_npz(path)
    raise StudyError(f"data {name!r} is neither a file nor a folder; give an .npz or a data folder")


def _load_npz(path: Path) -> dict[str, np.ndarray]:
    """Read and check the five arrays of an .npz; whatever is wrong with the file becomes one StudyError."""
    try:
        _refuse_many_members(path)
        with zipfile.ZipFile(path) as archive:
            present = {entry.removesuffix(".npy") for entry in archive.namelist()}
            missing = [name for name in ARRAYS if name not in present]
            if missing:
                seen = ascii(", ".join(sorted(present)))[:200]  # names of a stranger: one line, not for ever
                raise StudyError(
                    f"{path} has no array {', '.join(missing)} (it has {seen}); "
                    f"an .npz of the study holds {', '.join(ARRAYS)}"
                )
            arrays = {name: _read_member(archive, name, path) for name in ARRAYS}
    except StudyError:
        raise
    except Exception as error:  # a damaged or hostile file can raise nearly anything, from zlib to struct
        raise StudyError(f"{path} is not a whole .npz ({reason(error)}); copy or make it again") from error
    return _checked(arrays, str(path))


def _refuse_many_members(path: Path) -> None:
    """Before zipfile makes an object of each entry of the directory, which stands at the end of the file."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 2**25))
        if file.read().count(b"PK\x01\x02") > MAX_MEMBERS:
            raise StudyError(f"{path} has more than {MAX_MEMBERS} members; an .npz of the study has 5")


def _read_member(archive: zipfile.ZipFile, name: str, path: Path) -> np.ndarray:
    """One array, allocated only after its header, its entry in the archive and the file agree on its size."""
    entry = archive.getinfo(f"{name}.npy")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise StudyError(f"{path}: array {name} is packed in another way than numpy.savez does; save it anew")
    with archive.open(entry) as stream:
        version = np.lib.format.read_magic(stream)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }.get(version)
        if read_header is None:
            raise StudyError(f"{path}: array {name} has format version {version}; save it with numpy.savez")
        shape, _, dtype = read_header(stream)
        if dtype.hasobject:
            raise StudyError(f"{path}: array {name} holds pickled objects, never loaded; save plain arrays")
        claimed = math.prod(shape) * dtype.itemsize
        held = entry.file_size - stream.tell()
        packed = min(entry.compress_size, path.stat().st_size)
        # Deflate itself shrinks by 1032 at most.
        possible = min(MAX_ARRAY_BYTES, max(min(2**21, 1032 * packed), MAX_SHRINKING * packed))
        # Without bytes any shape agrees with the file, and numpy makes 4 of them out of none.
        if min(shape, default=0) < 0 or not dtype.itemsize or claimed != held or claimed > possible:
            raise StudyError(
                f"{path}: array {name} claims shape {shape} of {dtype}, {claimed} bytes, but the file holds "
                f"{min(held, possible)}; copy or make it again"
            )
    with archive.open(entry) as stream:
        # Reads the entry to its last byte (the sizes agree), where zipfile compares the checksum.
        return np.lib.format.read_array(stream, allow_pickle=False)


def _load_folder(path: Path) -> dict[str, np.ndarray]:
    """Read train/<class>/*.png and test/<class>/*.png; classes and files in the order of their names."""
    classes = {split: _class_folders(path, split) for split in ("train", "test")}
    for one, other in (("train", "test"), ("test", "train")):
        only = sorted(set(classes[one]) - set(classes[other]))
        if only:
            raise StudyError(
                f"{path}: class {only[0]!r} is in {one}/ but not in {other}/ ({len(only)} such); "
                "both need the same class folders"
            )
    arrays: dict[str, np.ndarray] = {"class_names": np.array(classes["train"])}
    for split, names in classes.items():
        images, labels = [], []
        for label, name in enumerate(names):
            files = [file for file in _visible(path / split / name) if is_image(file.name)]
            if not files:
                raise StudyError(f"{path / split / name} has no .png in it; add images or remove the folder")
            images += [_read_png(file) for file in files]
            labels += [label] * len(files)
        arrays[f"{split}_images"] = np.stack(images)
        arrays[f"{split}_labels"] = np.array(labels)
    return _checked(arrays, str(path))


def is_image(name: str) -> bool:
    """Whether a file of a class folder is read, by its name."""
    return name.lower().endswith(".png") and not name.startswith(".")


def _class_folders(path: Path, split: str) -> list[str]:
    if not (path / split).is_dir():
        raise StudyError(
            f"{path} has no folder {split}/; a data folder is train/<class>/*.png and test/<class>/*.png"
        )
    names = [entry.name for entry in _visible(path / split) if entry.is_dir()]
    if not names:
        raise StudyError(f"{path / split} has no class folders; put the images in {split}/<class>/*.png")
    return names


def _visible(folder: Path) -> list[Path]:
    """What is in a folder, by name, without the hidden files that systems leave behind."""
    try:
        return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise StudyError(f"cannot read {folder}: {error.strerror}; check its permissions") from error


def _read_png(path: Path) -> np.ndarray:
    """One image, uint8 (32, 32, 3)."""
    from PIL import Image  # only this source needs it, and importing it takes a while

    content = read_bytes(path, MAX_PNG_BYTES)
    try:
        odd = _odd_png(content)
        if odd is None:
            with warnings.catch_warnings(), Image.open(io.BytesIO(content), formats=["PNG"]) as image:
                warnings.simplefilter("ignore")  # what is wrong is told below
                size, mode = image.size, image.mode  # known before any pixel is decoded
                if size == (IMAGE_SIZE, IMAGE_SIZE) and mode in ("RGB", "L", "P"):
                    return np.asarray(image.convert("RGB"))
    except Exception as error:  # damaged images raise OSError, SyntaxError, struct.error, zlib.error, ...
        raise StudyError(f"{path} is not a readable PNG ({reason(error)}); replace or remove it") from error
    if odd is not None:
        raise StudyError(f"{path} is {odd}; save it as one 8-bit RGB picture without transparency")
    if size != (IMAGE_SIZE, IMAGE_SIZE):
        raise StudyError(f"{path} is {size[0]} x {size[1]} pixels; resize it to {IMAGE_SIZE} x {IMAGE_SIZE}")
    raise StudyError(f"{path} has colour mode {mode}; save it as 8-bit RGB without transparency")


def _odd_png(content: bytes) -> str | None:
    """What making a PNG 8-bit RGB would lose without a word: frames, 16 bits, transparency, damage.

    Its checksums are compared here, since the decoder leaves out those of the pixels.
    """
    if content[12:16] == b"IHDR" and content[24:25] == b"\x10":
        return "of 16 bits a channel"
    place = 8  # after the signature: chunks of length, name, content, checksum
    while place + 8 <= len(content):
        name, end = (
            content[place + 4 : place + 8],
            place + 8 + int.from_bytes(content[place : place + 4], "big"),
        )
        if name in (b"acTL", b"fcTL", b"fdAT"):
            return "animated"
        if name == b"tRNS":
            return "partly transparent (a tRNS chunk)"
        if zlib.crc32(content[place + 4 : end]) != int.from_bytes(content[end : end + 4], "big"):
            raise ValueError("a checksum in it is wrong")
        place = end + 4
    return None


# --- what every source must satisfy -----------------------------------------------------------------------


def _checked(arrays: dict[str, np.ndarray], source: str) -> dict[str, np.ndarray]:
    """The arrays with labels as int64, or a StudyError on the first thing that does not fit."""
    names = arrays["class_names"]
    if names.dtype.kind != "U" or names.ndim != 1 or not len(names):
        raise StudyError(f"{source}: class_names is {_described(names)}; give a list of strings, one a class")
    if len(names) > MAX_CLASSES or names.dtype.itemsize > 4 * MAX_NAME:
        raise StudyError(
            f"{source}: class_names is {_described(names)}, more than {MAX_CLASSES} names "
            f"or names longer than {MAX_NAME} characters; shorten them"
        )
    names = np.ascontiguousarray(names.astype(names.dtype.newbyteorder("=")))
    if names.view(np.uint32).max() > sys.maxunicode:
        raise StudyError(f"{source}: class_names holds codes that are no characters; write the names again")
    bad = [name for name in names.tolist() if not name or not name.isprintable()]
    if bad:
        raise StudyError(f"{source}: class name {bad[0]!r} is empty or not printable; rename the class")
    unique, count = np.unique(names, return_counts=True)
    if len(unique) < len(names):
        raise StudyError(
            f"{source}: class name {str(unique[count > 1][0])!r} occurs twice; names must differ"
        )
    checked = {"class_names": names}
    for split in ("train", "test"):
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        wanted = (IMAGE_SIZE, IMAGE_SIZE, 3)
        if images.dtype != np.uint8 or images.shape[1:] != wanted or not len(images):
            raise StudyError(
                f"{source}: {split}_images is {_described(images)}; give uint8 (N, 32, 32, 3), at least one"
            )
        if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
            raise StudyError(
                f"{source}: {split}_labels is {_described(labels)}; "
                f"give whole numbers of an integer dtype, one for each of the {len(images)} images"
            )
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= len(names):
            raise StudyError(
                f"{source}: {split}_labels has label {low if low < 0 else high}, outside 0..{len(names) - 1} "
                f"of the {len(names)} class_names; correct the labels or name every class"
            )
        empty = np.flatnonzero(np.bincount(labels.astype(np.int64), minlength=len(names)) == 0)
        if len(empty):
            raise StudyError(
                f"{source}: class {str(names[empty[0]])!r} has no image in {split} ({len(empty)} such); "
                "add images or drop the class from class_names and renumber"
            )
        checked[f"{split}_images"], checked[f"{split}_labels"] = images, labels.astype(np.int64)
    return checked


def _described(array: np.ndarray) -> str:
    nan = array.dtype.kind == "f" and int(np.isnan(array).sum())
    return f"{array.dtype} of shape {array.shape}" + (f" with {nan} NaN" if nan else "")


# --- CIFAR-100 --------------------------------------------------------------------------------------------


def _load_cifar100(cache: Path) -> dict[str, np.ndarray]:
    """The real CIFAR-100: from the cached .npz, else from torchvision's download, which is then cached.

    torchvision compares MD5 sums of the archive and of each file in it before anything is unpickled; without
    a network, the archive can be put into ``cache`` by hand.
    """
    cached = cache / "cifar100.npz"
    if cached.exists():
        try:
            return _whole_cifar100(cached)
        except StudyError as error:
            print(f"{error}; making it anew", file=sys.stderr)
    with taking_turns(cache):  # torchrun starts several processes that all come here at once
        with contextlib.suppress(StudyError):  # not there, or still the one of no use
            return _whole_cifar100(cached)
        arrays = _download_cifar100(cache)
        _write_npz(arrays, cached)
        return arrays


def _whole_cifar100(path: Path) -> dict[str, np.ndarray]:
    arrays = _load_npz(path)
    _check_is_whole(arrays, path)
    return arrays


def _check_is_whole(arrays: dict[str, np.ndarray], path: Path) -> None:
    for split, per_class in zip(("train", "test"), CIFAR100_PER_CLASS, strict=True):
        counts = np.bincount(arrays[f"{split}_labels"])
        if len(counts) != 100 or (counts != per_class).any():
            raise StudyError(f"{path} is not the whole CIFAR-100: {counts.sum()} {split} images")


def _download_cifar100(cache: Path) -> dict[str, np.ndarray]:
    """Download (unless it is there), verify and convert; a bad archive is removed and fetched once more."""
    from torchvision.datasets import CIFAR100  # takes a second to import, and only this source needs it
    from torchvision.datasets.utils import check_integrity

    archive = cache / CIFAR100.filename
    silence = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_SILENCE)
    try:
        for attempt in range(1, DOWNLOAD_ATTEMPTS + 1):
            try:
                train = CIFAR100(str(cache), train=True, download=True)
                test = CIFAR100(str(cache), train=False)
                break
            except Exception as error:  # network, HTTP, disk, checksum, tar: all mean "there is no data"
                if not check_integrity(str(archive), CIFAR100.tgz_md5):
                    archive.unlink(missing_ok=True)
                shutil.rmtree(cache / CIFAR100.base_folder, ignore_errors=True)
                if attempt == DOWNLOAD_ATTEMPTS:
                    raise StudyError(
                        f"CIFAR-100 from {CIFAR100.url} failed {attempt} times ({reason(error)}); "
                        f"check the network, put {CIFAR100.filename} into {cache}, or name an .npz"
                    ) from error
    finally:
        socket.setdefaulttimeout(silence)
    arrays = {"class_names": np.array(train.classes)}
    for split, part in (("train", train), ("test", test)):
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = part.data, np.array(part.targets)
    return _checked(arrays, "CIFAR-100")


def _write_npz(arrays: dict[str, np.ndarray], path: Path) -> None:
    with atomic_path(path) as temporary, open(temporary, "wb") as stream:  # a stream: savez renames a path
        np.savez(stream, **arrays)
