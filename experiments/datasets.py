"""The images that experiments train on: MNIST, SVHN, scikit-learn's digits, or a user's own file.

Files and mirrors are not trusted. What a header promises is compared with what there can be before
memory is taken, gzip and zip are read in pieces to their ends, where their sums are checked, and
MNIST's and SVHN's files must have the one right SHA-256. What is not right is a ``DatasetError``
that names the file.
"""

import contextlib
import functools
import gzip
import hashlib
import io
import itertools
import math
import operator
import os
import struct
import sys
import textwrap
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pooch
from jaxtyping import Float32, Int32, UInt8

MIRRORS = {
    "mnist": (
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
    ),
    "svhn": ("http://ufldl.stanford.edu/housenumbers/",),
}
MNIST = {  # the SHA-256 of each file's content, not compressed
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
SVHN = {  # the SHA-256 of each file
    "train_32x32.mat": "435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8",
    "test_32x32.mat": "cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b",
}
OWN_NAMES = ("x", "c", "x_test", "c_test", "x_validation", "c_validation")
GET_FILES = (
    "go online once, or give the directory of its files with --data-dir or in the environment "
    "variable GUIDEBOOK_DATA"
)
TIMEOUT = (5, 30)  # seconds, to connect and between two pieces
ANEW = "get the file anew, or from another source"


class DatasetError(ValueError):
    """Data that cannot be had, or that are not what they should be."""


@dataclass(frozen=True)
class Dataset:
    """Images ``x`` and, where there are any, their labels ``c``.

    Attributes:
        name: mnist, svhn, digits or the file's name.
        train: ``x``, (N, H, W) or (N, H, W, C), uint8 or float32 in [0, 1]; ``c``, (N,), int32.
        validation: the same, held out of the training set; None if nothing was.
        test: the same.
        num_classes: one more than the largest label; None without labels.
    """

    name: str
    train: dict[str, np.ndarray]
    validation: dict[str, np.ndarray] | None
    test: dict[str, np.ndarray]
    num_classes: int | None

    @property
    def x_shape(self) -> tuple[int, ...]:
        """The shape of one image, (H, W) or (H, W, C)."""
        return self.train["x"].shape[1:]


def load(
    name: str = "auto",
    *,
    data_dir: str | Path | None = None,
    num_validation: int | None = None,
    progress: bool = True,
) -> Dataset:
    """Loads a data set, split the same way every time.

    Args:
        name: ``mnist``; ``svhn``, the Street View House Numbers of Netzer et al. 2011, cropped to
            32 x 32 pixels in colour; ``digits``, the 1,797 images of 8 x 8 pixels in scikit-learn;
            ``auto``, MNIST if it can be had, else the digits and a notice on standard error; or
            the path of an .npy or .npz file. An .npy file holds images, (N, H, W) or (N, H, W, C),
            as uint8, bool or floats in [0, 1]. An .npz file holds them as ``x`` (or ``x_train``),
            may hold labels, integers (N,), as ``c`` (or ``c_train``), and may have ``x_test``,
            ``c_test``, ``x_validation`` and ``c_validation``; a sixth of ``x`` is the test set if
            it has none.
        data_dir: where MNIST's four files are, compressed or not, or SVHN's two: in it or in its
            subdirectory mnist or svhn. By default they come from the directory that the
            environment variable GUIDEBOOK_DATA names, the user's cache or the network, whichever
            has them first.
        num_validation: how many training images to hold out: by default the last 10,000 of MNIST
            or SVHN, 300 of the digits, a tenth of a file's. The test set does not depend on it.
        progress: whether to show a download if there is a terminal.

    Raises:
        DatasetError: the data cannot be had, or are not what they should be.
        ValueError: there is no such data set, or ``num_validation`` does not fit it.
    """
    if num_validation is not None and num_validation < 0:
        raise ValueError(f"num_validation: expected at least 0, got {num_validation}")
    if name in ("auto", *SOURCES):
        try:
            source = "mnist" if name == "auto" else name
            return _from_source(source, data_dir, num_validation, progress)
        except _NotToBeHadError as error:
            if name != "auto":
                raise
            print(_notice(error), file=sys.stderr, flush=True)
    if name in ("auto", "digits"):
        return _digits(num_validation)
    if Path(name).suffix in (".npy", ".npz"):
        return _own(Path(name).expanduser(), num_validation)
    raise ValueError(
        f"name: expected auto, {', '.join(SOURCES)}, digits or the path of an .npy or .npz file, "
        f"got {name!r}"
    )


def read_idx(
    path: str | Path,
    *,
    num_axes: int | None = None,
    sha256: str | None = None,
    max_bytes: int | None = None,
) -> UInt8[np.ndarray, "..."]:
    """Reads an IDX file of unsigned bytes, the format of MNIST's files.

    IDX is two zeros, a type (8: unsigned byte), the number of axes (these four bytes are called
    the magic number), each axis's length in four bytes with the highest first, and the array.

    Args:
        path: the file. Whether gzip has compressed it is seen in its content, not in its name.
        num_axes: how many axes to expect, 1 for labels and 3 for images; any by default.
        sha256: what SHA-256 the content, not compressed, must have.
        max_bytes: how large the content may be; half of the machine's memory by default.

    Raises:
        DatasetError: there is no such file, or it is not what it should be.
    """
    expected = f"an IDX file{_idx_kind(num_axes)}"
    with _open(Path(path), expected) as (stream, length):
        read = stream.read
        if stream.peek(2)[:2] == b"\x1f\x8b":
            read, length = gzip.GzipFile(fileobj=stream).read, 1032 * length  # deflate's best
        magic = read(4)
        if magic not in (b"\0\0\x08\1", b"\0\0\x08\2", b"\0\0\x08\3"):
            raise _error(path, expected, _got(magic, f"one that begins with {magic!r}"))
        if num_axes not in (None, magic[3]):
            raise _error(path, expected, f"one{_idx_kind(magic[3])}")
        lengths = read(4 * magic[3])
        if len(lengths) < 4 * magic[3]:
            raise _error(path, expected, "one that ends in its header")
        shape = struct.unpack(f">{magic[3]}I", lengths)
        if 0 in shape:
            raise _error(path, expected, f"one of shape {shape}")
        start = 4 + len(lengths)
        content = _complete(
            path, magic + lengths, read, start + math.prod(shape), length, max_bytes
        )
    if sha256 is not None:
        _require_sum(path, content, sha256)
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


# --- the data sets --------------------------------------------------------------------------------


def _from_source(
    name: str, data_dir: str | Path | None, num_validation: int | None, progress: bool
) -> Dataset:
    source = SOURCES[name]
    directory = os.environ.get("GUIDEBOOK_DATA") if data_dir is None else data_dir
    paths = _find(name, Path(directory).expanduser()) if directory else {}
    missing = [file for file in source.sha256 if file not in paths]
    if missing and data_dir is not None:
        raise _error(
            "data_dir",
            f"{source.files} in {data_dir} or its subdirectory {name}",
            f"no {', no '.join(missing)}",
            "give the directory that holds them",
        )
    mirrors: list[str] = [*MIRRORS[name]]
    arrays = {file: source.read(file, source.sha256[file], path) for file, path in paths.items()}
    arrays |= {file: _fetch(name, file, mirrors, progress) for file in missing}
    parts = itertools.batched((arrays[file] for file in source.sha256), len(source.sha256) // 2)
    data, test = (functools.reduce(operator.or_, part) for part in parts)
    num_images = len(data["x"])
    cut = num_images - _held_out(10_000 if num_validation is None else num_validation, num_images)
    train = {key: value[:cut] for key, value in data.items()}
    validation = {key: value[cut:] for key, value in data.items()}
    return _dataset(name, train, validation, test)


def _digits(num_validation: int | None) -> Dataset:
    from sklearn.datasets import load_digits  # takes a second

    digits = load_digits()
    x = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    held_out = _held_out(300 if num_validation is None else num_validation, len(x) - 300)
    return _dataset("digits", *_split({"x": x, "c": digits.target.astype(np.int32)}, 300, held_out))


def _own(path: Path, num_validation: int | None) -> Dataset:
    with _open(path, f"an {path.suffix} file") as (stream, length):
        if path.suffix == ".npy":
            arrays = {"x": _read_npy(f"{path}: x", stream.read, length)}
        else:
            arrays = _read_npz(path, stream)
    train = _part(path, arrays, "")
    validation = _part(path, arrays, "_validation")
    test = _part(path, arrays, "_test")
    for end, part in (("_validation", validation), ("_test", test)):
        if part and _kind(part) != _kind(train):
            what = f"{path}: x{end}"
            raise _error(what, f"{_kind(train)}, like x", _kind(part), "save them alike")
    if validation and num_validation is not None:
        raise ValueError(
            f"num_validation: expected none, as {path} has x_validation, got {num_validation}; "
            f"leave one of the two out"
        )
    num_images = len(train["x"])
    needed = 1 + (not test) + (not validation and num_validation != 0)
    if num_images < needed:
        raise _error(
            f"{path}: x", f"at least {needed} images to split", f"{num_images}", "give more"
        )
    num_test = 0 if test else max(1, num_images // 6)
    if num_validation is None:
        num_validation = 0 if validation else max(1, (num_images - num_test) // 10)
    held_out = _held_out(num_validation, num_images - num_test)
    train, drawn_validation, drawn_test = _split(train, num_test, held_out)
    return _dataset(path.name, train, validation or drawn_validation, test or drawn_test)


def _held_out(num_validation: int, num_images: int) -> int:
    if num_validation >= num_images:
        raise ValueError(
            f"num_validation: expected 0 to {num_images - 1}, fewer than there are images to "
            f"train on, got {num_validation}"
        )
    return num_validation


def _split(
    data: dict[str, np.ndarray], num_test: int, num_validation: int
) -> tuple[dict[str, np.ndarray], ...]:
    """Training, validation and test set, each in the order of ``data``. The test is drawn first."""
    order = np.random.default_rng(0).permutation(len(data["x"]))
    test, validation, train = np.split(order, (num_test, num_test + num_validation))
    parts = (np.sort(part) for part in (train, validation, test))
    return tuple({key: value[part] for key, value in data.items()} for part in parts)


def _dataset(
    name: str,
    train: dict[str, np.ndarray],
    validation: dict[str, np.ndarray],
    test: dict[str, np.ndarray],
) -> Dataset:
    parts = [part for part in (train, validation, test) if len(part["x"])]
    num_classes = 1 + max(int(part["c"].max()) for part in parts) if "c" in train else None
    return Dataset(name, train, validation if len(validation["x"]) else None, test, num_classes)


def _notice(error: DatasetError) -> str:
    reason, _, remedy = str(error).rpartition("; ")
    paragraphs = (
        "NOT MNIST! The data are scikit-learn's digits instead: 1,797 images of 8 x 8 pixels.",
        f"Why: {reason}.",
        f"For MNIST, {remedy}. --dataset mnist makes this an error.",
    )
    wrapper = textwrap.TextWrapper(76, break_long_words=False, break_on_hyphens=False)
    lines = "\n\n".join(map(wrapper.fill, paragraphs)).splitlines()
    frame = "!" * 80
    return "\n".join([frame, *(f"!!  {line}" for line in lines), frame])


# --- files from mirrors ---------------------------------------------------------------------------


class _NotToBeHadError(DatasetError):
    """The files are not there and cannot be downloaded."""


@dataclass(frozen=True)
class Source:
    """A data set whose files are in ``MIRRORS``.

    Attributes:
        files: the files in words, for a message.
        sha256: what each file's content must have, not compressed by gzip, by the file's name:
            the training set's files, then as many of the test set's.
        end: what the mirrors put behind a file's name, and a user may.
        read: makes ``x``, ``c`` or both of a file, given its name, its SHA-256 and its path.
    """

    files: str
    sha256: dict[str, str]
    end: str
    read: Callable[[str, str, str | Path], dict[str, np.ndarray]]


def _read_mnist(file: str, sha256: str, path: str | Path) -> dict[str, np.ndarray]:
    is_x = "images" in file
    array = read_idx(path, num_axes=3 if is_x else 1, sha256=sha256, max_bytes=2**26)
    return {"x": array} if is_x else {"c": array.astype(np.int32)}


def _read_svhn(_: str, sha256: str, path: str | Path) -> dict[str, np.ndarray]:
    """Reads a MATLAB file of images X, (32, 32, 3, N), and labels y, (N, 1), where 10 is digit 0.

    SciPy's reader is not made for what a stranger may have written. Nothing of the kind gets to
    it: it is given bytes in memory, after they have been found to have the right SHA-256.
    """
    from scipy.io import loadmat  # takes a moment

    with _open(Path(path), "a MATLAB file") as (stream, length):
        _require_memory(path, length, 2**28)
        content = stream.read(length)
        _require_sum(path, content, sha256)
        arrays = loadmat(io.BytesIO(content))
        if not arrays.keys() >= {"X", "y"}:
            names = [name for name in arrays if not name.startswith("__")]
            raise _error(path, "arrays X and y", ", ".join(names) or "nothing")
        x, y = arrays["X"], arrays["y"]
        if x.dtype != np.uint8 or x.shape[:-1] != (32, 32, 3):
            raise _error(f"{path}: X", "uint8 (32, 32, 3, N)", f"{x.dtype} {x.shape}")
        if y.dtype.kind not in "iuf" or y.shape != (x.shape[-1], 1):
            raise _error(f"{path}: y", f"numbers ({x.shape[-1]}, 1)", f"{y.dtype} {y.shape}")
        if not np.isin(y, range(1, 11)).all():
            raise _error(f"{path}: y", "labels 1, 2, ..., 10", f"{y.min()} to {y.max()}")
        x = np.ascontiguousarray(x.transpose(3, 0, 1, 2))
        return {"x": x, "c": (y[:, 0] % 10).astype(np.int32)}


SOURCES = {
    "mnist": Source(
        "MNIST's four files, with or without .gz, with -idx or .idx,",
        MNIST,
        ".gz",
        _read_mnist,
    ),
    "svhn": Source("SVHN's train_32x32.mat and test_32x32.mat", SVHN, "", _read_svhn),
}


def _find(name: str, directory: Path) -> dict[str, Path]:
    """Those of a source's files that are in a directory, whatever is in them."""
    found, source = {}, SOURCES[name]
    places, ends = (directory, directory / name), ("", source.end)
    for file, place, mark, end in itertools.product(source.sha256, places, "-.", ends):
        path = place / f"{file.replace('-idx', f'{mark}idx')}{end}"
        if file not in found and os.path.lexists(path):
            found[file] = path
    return found


def _fetch(name: str, file: str, mirrors: list[str], progress: bool) -> dict[str, np.ndarray]:
    """What one of a source's files holds, from the user's cache; downloaded if missing or bad.

    A mirror that fails goes to the end of ``mirrors``, so that the next file tries it last.
    """
    source, failures = SOURCES[name], []
    read = functools.partial(source.read, file, source.sha256[file])
    path = pooch.os_cache("guidebook") / name / f"{file}{source.end}"
    if os.path.lexists(path):
        try:
            return read(path)
        except DatasetError as error:
            failures.append(f"{error} (it has been removed)")
            _remove(path)

    def download(url: str, output_file: str, _: object) -> None:
        show = progress and sys.stderr.isatty()
        client = pooch.HTTPDownloader(progressbar=show, chunk_size=2**16, timeout=TIMEOUT)
        client(url, output_file, None)
        try:
            read(output_file)
        except DatasetError as error:
            raise ValueError(str(error).replace(output_file, url)) from error

    pooch.get_logger().setLevel("WARNING")
    for mirror in tuple(mirrors):
        url = f"{mirror}{path.name}"
        try:  # no hash for pooch, as the content's is checked in ``download``
            pooch.retrieve(url, None, path.name, path.parent, downloader=download)
            return read(path)
        except (ValueError, OSError) as error:
            failures.append(_reason(error, url))
            mirrors.remove(mirror)
            mirrors.append(mirror)
    directory = os.environ.get("GUIDEBOOK_DATA")
    places = f"{directory} (GUIDEBOOK_DATA), in {path.parent}" if directory else path.parent
    expected = f"{file} in {places} or from a mirror"
    raise _error(name, expected, "; ".join(failures), GET_FILES, _NotToBeHadError)


def _remove(path: Path) -> None:
    try:
        path.unlink()
    except OSError as error:
        got = f"a bad one that cannot be removed ({error.strerror})"
        raise _error(path, "the right file", got, "remove it", _NotToBeHadError) from error


def _reason(error: BaseException, url: str) -> str:
    """What went wrong. requests wraps a failed connection several times; its core is short."""
    cause = error
    while isinstance(error, OSError) and cause.__context__ is not None:
        cause = cause.__context__
    return str(cause) if url in str(cause) else f"{url}: {cause}"


# --- the user's own files -------------------------------------------------------------------------


def _read_npz(path: Path, stream: io.BufferedReader) -> dict[str, np.ndarray]:
    arrays = {}
    with zipfile.ZipFile(stream) as archive:
        infos = archive.infolist()
        members = [info.filename.removesuffix(".npy") for info in infos]
        names = [{"x_train": "x", "c_train": "c"}.get(member, member) for member in members]
        if "x" not in names or len(set(names)) < len(names) or not set(names) <= set(OWN_NAMES):
            expected = f"images x or x_train, and perhaps {', '.join(OWN_NAMES[1:])}"
            got = ", ".join(members) or "nothing"
            raise _error(path, expected, got, "save the arrays under these names")
        stream.seek(-12 - len(archive.comment), os.SEEK_END)
        if (count := int.from_bytes(stream.read(2), "little")) != len(infos):  # zipfile looks away
            raise _error(path, f"{count} arrays, as its end says", f"{len(infos)}")
        _require_memory(path, sum(info.file_size for info in infos), None)
        for name, info in zip(names, infos, strict=True):
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                got = f"compression {info.compress_type}"  # which may unpack without bounds
                raise _error(path, "what numpy.savez_compressed writes", got, "use that")
            with archive.open(info) as member:
                arrays[name] = _read_npy(f"{path}: {name}", member.read, info.file_size)
    return arrays


def _read_npy(what: str, read: Callable[[int], bytes], length: int) -> np.ndarray:
    with _refusing(what, "an array in NumPy's format"):
        head = io.BytesIO(read(2**14))  # NumPy takes headers of up to 10,000 bytes
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[np.lib.format.read_magic(head)]
        shape, is_fortran, dtype = read_header(head)
        if dtype.kind not in "biuf":
            got = "pickled objects" if dtype.hasobject else str(dtype)
            raise _error(what, "an array of numbers", got, "save it as numbers")
        if min(shape, default=1) < 1:
            raise _error(what, "at least one number", f"shape {shape}", "give more")
        start = head.tell()
        size = start + dtype.itemsize * math.prod(shape)
        content = _complete(what, head.getvalue(), read, size, length, None)
        array = np.frombuffer(content, dtype, offset=start)
        return array.reshape(shape[::-1]).T if is_fortran else array.reshape(shape)


def _part(path: Path, arrays: dict[str, np.ndarray], end: str) -> dict[str, np.ndarray]:
    """One part of a file, checked; empty if the file does not have it."""
    x, c, part = arrays.get(f"x{end}"), arrays.get(f"c{end}"), {}
    if x is not None:
        part["x"] = _images(x, f"{path}: x{end}")
    elif c is not None:
        raise _error(path, f"images x{end} for the labels c{end}", "none", "give both")
    if c is not None:
        part["c"] = _labels(c, f"{path}: c{end}", len(part["x"]))
    return part


def _images(
    x: np.ndarray, what: str
) -> UInt8[np.ndarray, "N H W *C"] | Float32[np.ndarray, "N H W *C"]:
    divide = "divide by the largest value that a pixel can have, such as 255 or 65535"
    if x.ndim not in (3, 4):
        expected = "images (N, H, W) or (N, H, W, C)"
        raise _error(what, expected, f"shape {x.shape}", "reshape them")
    if x.dtype == bool:
        x = (x.view(np.uint8) > 0) * np.uint8(255)
    if x.dtype == np.uint8:
        return np.require(x, np.uint8, ["C", "A"])
    if x.dtype.kind != "f":
        raise _error(what, "uint8, bool or floats in [0, 1]", str(x.dtype), divide)
    low, high = float(x.min()), float(x.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise _error(what, "finite numbers", "NaN or infinity", "replace what is not finite")
    if low < 0 or high > 1:
        raise _error(what, "floats in [0, 1]", f"{low:g} to {high:g}", divide)
    return np.require(x, np.float32, ["C", "A"])


def _labels(c: np.ndarray, what: str, num_images: int) -> Int32[np.ndarray, " N"]:
    if c.dtype.kind not in "iu" or c.shape != (num_images,):
        expected = f"integers, one for each of {num_images} images"
        raise _error(what, expected, f"{c.dtype} of shape {c.shape}", "give one for each")
    if c.min() < 0 or c.max() >= 2**31 - 1:
        got = f"{c.min()} to {c.max()}"
        raise _error(what, "labels 0, 1, ...", got, "number the classes from 0")
    return c.astype(np.int32)


def _kind(part: dict[str, np.ndarray]) -> str:
    shape = ", ".join(map(str, part["x"].shape[1:]))
    return f"{part['x'].dtype} (N, {shape}) {'with' if 'c' in part else 'without'} labels"


# --- files that may be anything -------------------------------------------------------------------


@contextlib.contextmanager
def _open(path: Path, expected: str) -> Iterator[tuple[io.BufferedReader, int]]:
    """The file and its length in bytes."""
    if not os.path.isfile(path):
        there = "a directory" if os.path.isdir(path) else "something that is no file"
        got = there if os.path.lexists(path) else "nothing there"
        raise _error(path, expected, got, "give the path of a file")
    with _refusing(path, expected), path.open("rb") as stream:
        yield stream, os.fstat(stream.fileno()).st_size


@contextlib.contextmanager
def _refusing(what: object, expected: str) -> Iterator[None]:
    """Makes one error of the many that gzip, zlib, zipfile and NumPy raise at a bad file."""
    try:
        yield
    except DatasetError:
        raise
    except Exception as error:
        got = f"one that cannot be read ({type(error).__name__}: {error})"
        raise _error(what, expected, got) from error


def _error(
    what: object, expected: str, got: str, remedy: str = ANEW, kind: type = DatasetError
) -> DatasetError:
    return kind(f"{what}: expected {expected}, got {got}; {remedy}")


def _got(content: bytes, other: str) -> str:
    return {b"": "an empty file", b"<": "a web page"}.get(content[:1], other)


def _require_sum(path: object, content: bytes | bytearray, sha256: str) -> None:
    if (found := hashlib.sha256(content).hexdigest()) != sha256:
        got = _got(bytes(content[:1]), f"other content, {found}")
        raise _error(path, f"content with SHA-256 {sha256}", got)


def _idx_kind(num_axes: int | None) -> str:
    if num_axes is None:
        return ""
    kind = {1: "labels", 2: "a matrix", 3: "images"}.get(num_axes, f"{num_axes} axes")
    return f" of {kind} (magic number {2048 + num_axes})"


def _complete(
    what: object,
    head: bytes,
    read: Callable[[int], bytes],
    size: int,
    length: int,
    max_bytes: int | None,
) -> bytearray:
    """Reads on after ``head`` to the ``size`` that it promises, which must be the end.

    Memory is taken as bytes come, not as they are promised; and nothing is read if the promise
    exceeds ``length``, the most that there can be. At the end gzip and zip check their sums.
    """
    _require_memory(what, size, max_bytes)
    expected = f"{size:,} bytes, as its header promises"
    if size > length:
        raise _error(what, expected, f"at most {length:,}")
    content = bytearray(head[:size])
    while len(content) < size and (piece := read(min(2**20, size - len(content)))):
        content += piece
    if len(content) < size or len(head) > size or read(1):
        raise _error(what, expected, f"{len(content):,}" if len(content) < size else "more")
    return content


def _require_memory(what: object, size: int, max_bytes: int | None) -> None:
    max_bytes = _half_of_memory() if max_bytes is None else max_bytes
    if size > max_bytes:
        got = f"a promise of {size:,}"
        raise _error(what, f"at most {max_bytes:,} bytes", got, f"{ANEW}, or give less")


def _half_of_memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, OSError, ValueError):  # not every system tells
        return 2**32
