"""Data to train on: public images by name, or a user's own .npy, .npz or .csv file.

The names are those in ``SOURCES``, such as mnist, and digits, which scikit-learn brings. Data are
images or a table: a vector of numbers for each datum. An .npy file larger than half of the memory
stays on the disk, and its rows are read when they are needed. No file and no mirror is trusted. The
files of public data sets must have the right SHA-256. No pickle is loaded, and no header is given
more memory than the file fills. A bad file is a ``DatasetError``.
"""

import contextlib
import csv
import gzip
import hashlib
import io
import math
import os
import sys
import zipfile
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pooch
import psutil
from jaxtyping import Float32, Int32, Integer, Shaped, UInt8

if TYPE_CHECKING:
    from inference._streams import Stream
else:  # slow to import
    Stream = Any

MAX_BYTES = 2**28  # none of these files is larger
PIECE_BYTES = 2**25  # what is looked at together: this bounds the memory of the checks
HEADER_BYTES = 2**16  # the longest header of an .npy file that is not loaded
TIMEOUT = (5, 30)  # seconds to connect, and seconds between two pieces
ENDS = ("", "_test", "_validation")
LABELS = ("c", "label")  # the names that the column of labels may have
ANEW = "get the file anew, or from another source"
NOTICE = """{0}
!!  NOT MNIST! The data are scikit-learn's digits instead: 1,797 images of 8 x 8 pixels.
!!  --dataset mnist makes this an error. Why: {1}
{0}"""

Arrays = Mapping[str, Any]  # NumPy arrays, or a stream
Images = UInt8[np.ndarray, "N H W *C"] | Float32[np.ndarray, "N H W *C"]
Vectors = Float32[np.ndarray, "N D"]


def half_of_memory() -> int:
    """Half of the machine's memory, in bytes. An .npy file larger than this is streamed."""
    return psutil.virtual_memory().total // 2


class DatasetError(ValueError):
    """The data cannot be had, or they are not what they should be."""


class _NotToBeHadError(DatasetError):
    """The files are not there, and no mirror gives them."""


class _OfAnotherError(DatasetError):
    """The file belongs to another data set."""


@dataclass(frozen=True)
class Record:
    """What a model needs to know of a data set. It can be kept as JSON.

    Attributes:
        name: the data set's name.
        x_shape: the shape of one image, or (D,) for a table.
        num_classes: one more than the largest label; None without labels.
        num_data: how many training data there are.
        x_mean, x_std: of a table, the mean and the standard deviation of each column of the
            training set. The deviation of a constant column is 0. None for images.
    """

    name: str
    x_shape: tuple[int, ...]
    num_classes: int | None
    num_data: int
    x_mean: tuple[float, ...] | None = None
    x_std: tuple[float, ...] | None = None

    def __init__(
        self,
        name: str,
        x_shape: Sequence[int],
        num_classes: int | None,
        num_data: int,
        x_mean: Sequence[float] | None = None,
        x_std: Sequence[float] | None = None,
    ) -> None:
        x_shape = tuple(x_shape)  # JSON gives a list
        vars(self).update(name=name, x_shape=x_shape, num_classes=num_classes, num_data=num_data)
        columns = {"x_mean": x_mean, "x_std": x_std}
        vars(self).update({n: None if v is None else tuple(v) for n, v in columns.items()})


@dataclass(frozen=True)
class Dataset:
    """Images or vectors ``x`` and, if there are any, their labels ``c``.

    Attributes:
        name: the name given to ``load``, or the file's name.
        train: ``x``, images (N, H, W) or (N, H, W, C), uint8 or float32 in [0, 1], or a table
            (N, D), any float32; ``c``, (N,), int32. A stream, if the file is too large to load.
        validation: the same, held out of the training set; None if nothing was.
        test: the same.
        num_classes: one more than the largest label; None without labels.
    """

    name: str
    train: Arrays
    validation: Arrays | None
    test: Arrays
    num_classes: int | None

    @property
    def x_shape(self) -> tuple[int, ...]:
        """The shape of one image, (H, W) or (H, W, C), or (D,)."""
        return self.train["x"].shape[1:]

    @cached_property
    def record(self) -> Record:
        """What a model needs to know of the data, without the data."""
        x = self.train["x"]
        known = self.name, self.x_shape, self.num_classes, len(x)
        if x.ndim != 2:
            return Record(*known)
        mean: Any = sum(piece.sum(0, dtype=np.float64) for _, piece in pieces(x)) / len(x)
        squares: Any = sum(np.square(piece - mean).sum(0) for _, piece in pieces(x))
        low, high = extent(x, axis=0)
        std: Any = np.where(high > low, np.sqrt(squares / len(x)), 0)
        # Rounded, they are the same on machines that add in another order.
        return Record(*known, mean.astype(np.float32).tolist(), std.astype(np.float32).tolist())


def load(
    name: str = "auto",
    *,
    data_dir: str | Path | None = None,
    num_validation: int | None = None,
    progress: bool = True,
) -> Dataset:
    """Loads a data set. It is split the same way every time.

    Args:
        name: ``mnist``; ``static-mnist``, the images of MNIST that Larochelle & Murray 2011
            binarised once and for all, without labels, as uint8, 0 or 255. The file has the test
            images sorted by digit, and they are shuffled here; ``fashion-mnist``, clothes in
            MNIST's format (Xiao, Rasul & Vollgraf 2017); ``svhn``, the Street View House Numbers of
            Netzer et al. 2011, cropped to 32 x 32 pixels in colour; ``digits``, the 1,797 images of
            8 x 8 pixels in scikit-learn;
            ``auto``, MNIST if it can be had, else the digits and a notice on standard error; or
            the path of an .npy, .npz or .csv file. An .npy file holds images, (N, H, W) or
            (N, H, W, C), as uint8, bool or floats in [0, 1], or a table, (N, D), of any finite
            numbers. An .npz file holds them as ``x`` (or ``x_train``), and perhaps labels, integers
            (N,), as ``c`` (or ``c_train``), and ``x_test``, ``c_test``, ``x_validation``,
            ``c_validation``. A .csv file holds a table: a line of names, then lines of numbers,
            with commas between. The column named c or label holds labels, the others are ``x``.
            Without ``x_test``, a sixth of ``x`` is the test set. An .npy file larger than half of
            the memory is not loaded: its rows are read when they are needed.
        data_dir: the directory of the data set's files, compressed by gzip or not. They may lie in
            its subdirectory of the data set's name, as fashion-mnist or fashion_mnist, which comes
            first. By default they come from the directory in the environment variable
            GUIDEBOOK_DATA, the user's cache or the network. In the variable's directory, files of
            the same names that belong to another data set are passed over.
        num_validation: how many training data to hold out. By default 300 of the digits, a tenth of
            a file's, and the last 10,000 of the others. The last 10,000 of static-mnist are
            Larochelle & Murray's validation set. The test set does not depend on it.
        progress: whether to show a download on a terminal.

    Raises:
        DatasetError: the data cannot be had, or they are not what they should be.
        ValueError: there is no such data set, or ``num_validation`` does not fit it.
    """
    if name in ("auto", *SOURCES):
        source = "mnist" if name == "auto" else name
        try:
            arrays = _from_source(source, data_dir, progress)
            return _dataset(source, source, arrays, num_validation, 0, 10_000)
        except _NotToBeHadError as error:
            if name != "auto":
                raise
            print(NOTICE.format("!" * 80, error), file=sys.stderr, flush=True)
    if name in ("auto", "digits"):
        from sklearn.datasets import load_digits  # takes a second

        digits = load_digits()
        x = np.rint(digits.images * (255 / 16)).astype(np.uint8)
        return _dataset("digits", "digits", {"x": x, "c": digits.target}, num_validation, 300, 300)
    path = Path(name).expanduser()
    if path.suffix in (".npy", ".npz", ".csv"):
        arrays = _from_csv(path) if path.suffix == ".csv" else _from_own(path)
        return _dataset(path.name, path, arrays, num_validation)
    expected = f"auto, {', '.join(SOURCES)}, digits or the path of an .npy, .npz or .csv file"
    raise ValueError(f"name: expected {expected}, got {name!r}")


def read(path: str | Path) -> Arrays:
    """Reads the arrays of a file by name, as they are: any names, any shapes.

    Args:
        path: an .npz file of arrays; an .npy file, whose array is called ``x``; or a .csv file: a
            line of names, then lines of numbers, with commas between. Each column is an array
            (N,). It holds integers if all its numbers are written without a point.

    Returns:
        Arrays, or a stream of the rows of an .npy file larger than half of the memory.

    Raises:
        DatasetError: the file cannot be had, or it is not what it should be.
        ValueError: it has another ending.
    """
    path = Path(path).expanduser()
    if path.suffix not in (".npz", ".npy", ".csv"):
        raise ValueError(f"dataset: expected the path of an .npz, .npy or .csv file, got {path}")
    if path.suffix == ".csv":
        table = _read_csv(path)
        columns = zip(table.names, table.values.T, table.are_whole, strict=True)
        return {
            name: values.astype(np.int64 if is_whole and abs(values).max() < 2**53 else np.float64)
            for name, values, is_whole in columns
        }
    if _is_too_large(path):
        from inference._streams import memory_mapped  # slow to import

        return memory_mapped({"x": _mapped(path)})
    content = _read(path, path, f"an {path.suffix} file", half_of_memory())
    if path.suffix == ".npy":
        return {"x": _array(content, f"{path}: x")}
    with _refusing(path, "an .npz file"):
        archive = zipfile.ZipFile(io.BytesIO(content))
        names = _members(archive)
        got = ", ".join(names) or "nothing"
        _require(names and len({*names}) == len(names), path, "arrays, each name once", got)
        contents = _unpacked(archive, content, path)
    return {n: _array(content, f"{path}: {n}") for n, content in zip(names, contents, strict=True)}


# --- arrays in memory and streams -----------------------------------------------------------------


def is_streamed(arrays: Arrays) -> bool:
    """Whether the arrays lie on the disk, and their rows are read when they are needed."""
    return bool(arrays) and not isinstance(arrays, dict)


def take(arrays: Arrays, index: Integer[np.ndarray, " M"]) -> Arrays:
    """Some rows of every array. Those of a stream are not read yet."""
    if isinstance(arrays, dict):
        return {name: array[index] for name, array in arrays.items()}
    stream: Any = arrays
    return stream.take(index)


def first(arrays: Arrays, names: Sequence[str], count: int | None = None) -> Arrays:
    """The first rows of some of the arrays, or all rows."""
    if isinstance(arrays, dict):
        return {name: arrays[name][:count] for name in names}
    stream: Any = arrays
    return stream.only(names).take(np.arange(stream.num_data)[:count])


def in_memory(arrays: Arrays, setting: str) -> dict[str, np.ndarray]:
    """The arrays, read into memory.

    Args:
        arrays: any data.
        setting: the option that takes fewer of them, for a message.

    Raises:
        DatasetError: they take more than half of the memory.
    """
    size = sum(array.dtype.itemsize * math.prod(array.shape) for array in arrays.values())
    expected = f"at most {half_of_memory():,} bytes of data that are looked at as a whole"
    remedy = f"give fewer with --{setting.replace('_', '-')}"
    _require(size <= half_of_memory(), "dataset", expected, f"{size:,}", remedy)
    return {name: np.asarray(array) for name, array in arrays.items()}


def pieces(x: Any) -> Iterator[tuple[int, np.ndarray]]:
    """An array or a column of a stream piece by piece, each with the number of its first row."""
    size = max(1, PIECE_BYTES // max(1, x.dtype.itemsize * math.prod(x.shape[1:])))
    for start in range(0, len(x), size):
        if isinstance(x, np.ndarray):
            yield start, np.asarray(x[start : start + size])
        else:
            rows = np.arange(start, min(start + size, len(x)))
            yield start, x.stream.rows(rows)[x.name]


def extent(x: Any, axis: int | None = None) -> tuple[Any, Any]:
    """The least and the greatest number, of all or of each column. NaN if there is one."""
    both = [(piece.min(axis), piece.max(axis)) for _, piece in pieces(x)]
    low, high = zip(*both, strict=True)
    return np.min(low, axis=0), np.max(high, axis=0)


# --- reading --------------------------------------------------------------------------------------


def _dataset(
    name: str, what: object, arrays: Arrays, num_validation: int | None, *sizes: int
) -> Dataset:
    """Checks the arrays, and draws a test and a validation set unless they are given.

    ``sizes`` are their sizes. By default, they are a sixth of the data and a tenth of the rest.
    """
    parts, kinds = [], []
    for end in ENDS:
        x, c = arrays.get(f"x{end}"), arrays.get(f"c{end}")
        part: Any = {} if x is None else _observations(x, f"{what}: x{end}")
        if c is not None:
            part["c"] = _labels(c, f"{what}: c{end}", part["x"])
        parts.append(part)
        kinds.append(", ".join(f"each {k} {v.dtype} {v.shape[1:]}" for k, v in part.items()))
        like = f"{kinds[0]}, as in the training set"
        _require(kinds[-1] in ("", kinds[0]), f"{what}: x{end}", like, kinds[-1], "save both alike")
    train, test, validation = parts
    if validation and num_validation is not None:
        expected = "expected none, as there is x_validation"
        raise ValueError(f"num_validation: {expected}, got {num_validation}; leave one out")
    num_data = len(train["x"])
    num_test = sizes[0] if sizes else 0 if test else max(1, num_data // 6)
    most = num_data - num_test - 1
    if num_validation is None:
        num_validation = sizes[1] if sizes else 0 if validation else max(1, (most + 1) // 10)
    rows = "rows" if train["x"].ndim == 2 else "images"
    least = f"at least {1 + (num_test > 0) + (num_validation > 0)} {rows} to split"
    _require(most >= (num_validation > 0), f"{what}: x", least, f"{num_data}", "give more")
    if not 0 <= num_validation <= most:
        expected = f"0 to {most}, fewer than there are {rows} to train on"
        raise ValueError(f"num_validation: expected {expected}, got {num_validation}")
    order = np.arange(num_data)[::-1]  # the last images of a public data set are held out
    if name not in SOURCES:
        order = np.random.default_rng(0).permutation(num_data)
    drawn = [
        take(train, np.sort(part)) if len(part) else {}
        for part in np.split(order, (num_test, num_test + num_validation))
    ]
    test, validation, train = test or drawn[0], validation or drawn[1], drawn[2]
    largest = [int(part["c"].max()) for part in (train, validation, test) if "c" in part]
    return Dataset(name, train, validation or None, test, 1 + max(largest) if largest else None)


# --- public data sets -----------------------------------------------------------------------------


def _read_idx(content: bytes) -> Arrays:
    """Reads a file of MNIST: images, (N, H, W), or labels, (N,)."""
    # The fourth byte is the number of axes. The shape and the array follow.
    shape = np.frombuffer(content, ">u4", content[3], offset=4)
    array = np.frombuffer(content, np.uint8, offset=4 + shape.nbytes).reshape(shape)
    return {"c" if array.ndim == 1 else "x": array}


def _read_amat(content: bytes) -> Arrays:
    """Reads binary images written as text: a line of 784 digits, with blanks between, for each."""
    characters = np.frombuffer(content, np.uint8).reshape(-1, 28, 28, 2)  # a digit, a separator
    return {"x": characters[..., 0] == ord("1")}


def _read_mat(content: bytes) -> Arrays:
    """Reads an SVHN file: images X, (32, 32, 3, N), and labels y, (N, 1). Label 10 is digit 0."""
    from scipy.io import loadmat  # takes a moment

    arrays = loadmat(io.BytesIO(content))
    x, y = arrays["X"], arrays["y"]
    is_right = x.dtype == np.uint8 and x.shape == (32, 32, 3, len(y)) and y.shape == (len(y), 1)
    if not (is_right and np.isin(y, range(1, 11)).all()):
        got = f"{x.dtype} {x.shape} and {y.dtype} {y.shape} of {np.unique(y)}"
        raise ValueError(f"X and y: expected uint8 (32, 32, 3, N) and (N, 1) of 1 to 10, got {got}")
    return {"x": np.moveaxis(x, 3, 0), "c": (y[:, 0] % 10).astype(np.int32)}


@dataclass(frozen=True)
class Source:
    """A public data set.

    Attributes:
        sums: the SHA-256 of each file, not compressed. Images come in the order of their files.
        test: what the names of the test set's files begin with. The others are for training.
        read: gives the arrays that a file holds, ``x``, ``c`` or both.
        mirrors: addresses of the files, with {} for a file's name.
        is_sorted: whether the test images lie sorted by class. They are then shuffled once and for
            all, so that the first ones are like the others.
    """

    sums: dict[str, str]
    test: str
    read: Callable[[bytes], Arrays]
    mirrors: tuple[str, ...]
    is_sorted: bool = False


MNIST = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
STATIC = {
    "binarized_mnist_train.amat": (
        "ad693b29f94c14277b095f5238ddefbbdaaae0939789dd2f4f0205278cee3e4d"
    ),
    "binarized_mnist_valid.amat": (
        "1de3d397c40fe8eeb33dafd4099a1f665ec01e96d9be234aaeeac8a34930e2e2"
    ),
    "binarized_mnist_test.amat": "e6687bfea3f820c174f33b7865140b2a2dd2930ef786f35d45795fc193b5ab2c",
}
FASHION = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
SVHN = {
    "train_32x32.mat": "435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8",
    "test_32x32.mat": "cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b",
}
SOURCES = {
    "mnist": Source(
        MNIST,
        "t10k",
        _read_idx,
        (
            "https://storage.googleapis.com/cvdf-datasets/mnist/{}.gz",
            "https://ossci-datasets.s3.amazonaws.com/mnist/{}.gz",
        ),
    ),
    "static-mnist": Source(
        STATIC,
        "binarized_mnist_test",
        _read_amat,
        ("http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/{}",),
        is_sorted=True,
    ),
    "fashion-mnist": Source(
        FASHION,
        "t10k",
        _read_idx,
        (
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/{}.gz",
            "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/{}.gz",
            "https://storage.googleapis.com/tensorflow/tf-keras-datasets/{}.gz",
        ),
    ),
    "svhn": Source(SVHN, "test", _read_mat, ("http://ufldl.stanford.edu/housenumbers/{}",)),
}


def _from_source(name: str, data_dir: str | Path | None, progress: bool) -> Arrays:
    source, paths, arrays = SOURCES[name], {}, {}
    mirrors = [*source.mirrors]
    folders = [*dict.fromkeys((name.replace("-", "_"), name))]
    if directory := os.environ.get("GUIDEBOOK_DATA") if data_dir is None else str(data_dir):
        place = Path(directory).expanduser()
        paths = {  # a later one wins
            file: path
            for file in source.sums
            for folder in (place, *(place / folder for folder in folders))
            for stem in (file.replace("-idx", ".idx"), file)
            for end in (".gz", "")
            if os.path.lexists(path := folder / f"{stem}{end}")
        }
    if data_dir is not None:
        expected = f"{name}'s files (.gz or not) in {data_dir} or its folder {' or '.join(folders)}"
        missing = ", ".join(f"no {file}" for file in source.sums if file not in paths)
        _require(not missing, "data_dir", expected, missing, "give the directory that holds them")
    for file in source.sums:
        content, failures = None, []
        if path := paths.get(file):
            try:
                content = _read_source(path, path, name, file)
            except _OfAnotherError as error:
                if data_dir is not None or path.parent.name in folders:
                    raise
                failures = [str(error)]
        if content is None:
            path = _fetch(name, file, mirrors, failures, progress)
            content = _read_source(path, path, name, file)
        end = "_test" if file.startswith(source.test) else ""
        with _refusing(path, f"the arrays of {name}"):
            for key, array in source.read(content).items():
                if end and source.is_sorted:
                    array = np.random.default_rng(0).permutation(array)
                arrays.setdefault(f"{key}{end}", []).append(array)
    return {key: np.concatenate(some) if some[1:] else some[0] for key, some in arrays.items()}


def _fetch(name: str, file: str, mirrors: list[str], failures: list[str], progress: bool) -> Path:
    """Gives a file's path in the user's cache, and downloads the file if it is missing or bad.

    A mirror that fails goes to the end of ``mirrors``. The next file tries it last. ``failures``
    says what was tried before.
    """
    sha256, path = SOURCES[name].sums[file], pooch.os_cache("guidebook") / name / file

    def download(url: str, output_file: str, _: object) -> None:
        show = progress and sys.stderr.isatty()
        client = pooch.HTTPDownloader(progressbar=show, chunk_size=2**16, timeout=TIMEOUT)
        client(url, output_file, None)
        Path(output_file).write_bytes(_read_source(output_file, url, name, file))

    pooch.get_logger().setLevel("WARNING")
    for _ in SOURCES[name].mirrors:
        url = mirrors[0].format(file)
        try:
            pooch.retrieve(url, sha256, file, path.parent, downloader=download)
            return path
        except (ValueError, OSError) as error:
            is_wrapped = isinstance(error, OSError)  # requests wraps a failed connection
            while is_wrapped and error.__context__ is not None:
                error = error.__context__
            failures.append(str(error) if url in str(error) else f"{url}: {error}")
            mirrors.append(mirrors.pop(0))
    if os.path.lexists(path):
        failures.insert(0, f"a bad {path} (remove it)")
    raise _NotToBeHadError(
        f"{name}: expected {file} in {path.parent} or from a mirror, got {'; '.join(failures)}; "
        f"go online once, or give the directory of its files with --data-dir or in the environment "
        f"variable GUIDEBOOK_DATA (now {os.environ.get('GUIDEBOOK_DATA', 'not set')})"
    )


def _from_own(path: Path) -> Arrays:
    if _is_too_large(path):
        return {"x": _mapped(path)}
    content = _read(path, path, f"an {path.suffix} file", half_of_memory())
    if path.suffix == ".npy":
        return {"x": _array(content, f"{path}: x")}
    with _refusing(path, "an .npz file"):
        archive = zipfile.ZipFile(io.BytesIO(content))
        members = _members(archive)
        names = [member.removesuffix("_train") for member in members]
        allowed = [f"{key}{end}" for end in ENDS for key in "xc"]
        needed = {"x", *(name.replace("c", "x") for name in names)}
        is_right = len({*names}) == len(names) and needed <= {*names} <= {*allowed}
        expected = f"images or a table x or x_train, and perhaps {', '.join(allowed[1:])}"
        remedy = "save the arrays under these names, and no labels without their x"
        _require(is_right, path, expected, ", ".join(members) or "nothing", remedy)
        contents = _unpacked(archive, content, path)
    return {n: _array(content, f"{path}: {n}") for n, content in zip(names, contents, strict=True)}


def _members(archive: zipfile.ZipFile) -> list[str]:
    """The names of the arrays of an .npz file."""
    return [info.filename.removesuffix(".npy") for info in archive.infolist()]


def _unpacked(archive: zipfile.ZipFile, content: bytes, path: Path) -> list[bytes]:
    """What the members of an .npz file hold. They may not take all the memory."""
    infos = archive.infolist()
    count = int.from_bytes(content[-12 - len(archive.comment) :][:2], "little")
    _require(count == len(infos), path, f"{count} arrays, as its end says", f"{len(infos)}")
    kinds = {info.compress_type for info in infos}  # some unpack without bounds
    expected, got = "what numpy.savez_compressed writes", "another compression"
    _require(kinds <= {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}, path, expected, got, "use it")
    size = sum(info.file_size for info in infos)
    most = half_of_memory()
    _require(size <= most, path, f"at most {most:,} bytes", f"{size:,}", _remedy(path))
    return [archive.open(info).read(info.file_size + 1) for info in infos]


class _Header(NamedTuple):
    """What the header of an .npy file says, and where the numbers begin."""

    shape: tuple[int, ...]
    order: Literal["C", "F"]
    dtype: np.dtype
    offset: int


def _header(stream: io.BytesIO, num_bytes: int, what: str) -> _Header:
    """Reads the header of an .npy file of so many bytes."""
    version = np.lib.format.read_magic(stream)
    read_header = getattr(np.lib.format, "read_array_header_{}_{}".format(*version))
    shape, is_fortran, dtype = read_header(stream)
    got = "pickled objects" if dtype.hasobject else str(dtype)
    _require(dtype.kind in "biuf", what, "an array of numbers", got, "save it as numbers")
    _require(min(shape, default=1) > 0, what, "at least one number", f"shape {shape}", "add it")
    size = stream.tell() + dtype.itemsize * math.prod(shape)
    expected = f"{size:,} bytes, as its header promises"
    _require(size == num_bytes, what, expected, f"{num_bytes:,}")
    return _Header(shape, "F" if is_fortran else "C", dtype, stream.tell())


def _array(content: bytes, what: str) -> Shaped[np.ndarray, "..."]:
    """Reads an .npy file. NumPy itself would take all the memory that the header promises."""
    with _refusing(what, "an array in NumPy's format"):
        header = _header(io.BytesIO(content), len(content), what)
        array = np.frombuffer(content, header.dtype, offset=header.offset)
        return array.reshape(header.shape, order=header.order)


def _is_too_large(path: Path) -> bool:
    """Whether a file is an .npy file that is better left on the disk."""
    return path.suffix == ".npy" and path.is_file() and path.stat().st_size > half_of_memory()


def _mapped(path: Path) -> np.memmap:
    """The array of an .npy file, left on the disk."""
    what = f"{path}: x"
    with _refusing(what, "an array in NumPy's format"):
        with path.open("rb") as file:
            beginning = io.BytesIO(file.read(HEADER_BYTES))
        header = _header(beginning, path.stat().st_size, what)
        return np.memmap(path, header.dtype, "r", header.offset, header.shape, header.order)


class _Table(NamedTuple):
    """What a .csv file holds.

    ``numbers`` has the number of each row's line. ``are_whole`` says of each column whether all
    its numbers are written without a point.
    """

    names: list[str]
    values: np.ndarray
    numbers: array
    are_whole: list[bool]


def _read_csv(path: Path) -> _Table:
    """A line of names, then lines of numbers."""
    content = _read(path, path, "a .csv file", half_of_memory() // 4)  # numbers take more than text
    with _refusing(path, "lines of numbers with commas between, below a line of names"):
        lines = csv.reader(io.TextIOWrapper(io.BytesIO(content), "utf-8-sig", newline=""))
        names = [name.strip() for name in next(lines, [])]
        got = ", ".join(names)[:200] or "nothing"
        is_right = all(map(_is_name, names)) and len({*names}) == len(names)
        expected = "a first line of names, each of them once"
        remedy = "write the names of the columns into the first line, with commas between"
        _require(names and is_right, f"{path}, line 1", expected, got, remedy)
        values, numbered, whole = array("d"), array("q"), [*range(len(names))]
        for row in lines:
            if row:  # no empty line
                values.extend(_numbers(row, names, f"{path}, line {lines.line_num}"))
                numbered.append(lines.line_num)
                whole = [i for i in whole if row[i].strip().lstrip("+-").isdecimal()]
    _require(numbered, path, "lines of numbers below the names", "none", "add the data")
    table = np.frombuffer(values, np.float64).reshape(-1, len(names))
    return _Table(names, table, numbered, [i in whole for i in range(len(names))])


def _from_csv(path: Path) -> Arrays:
    """The columns of a table as x. One column may hold labels."""
    names, table, numbered, _ = _read_csv(path)
    given = [names.index(name) for name in LABELS if name in names]
    expected, got = f"at most one column of labels, {' or '.join(LABELS)}", ", ".join(names)[:200]
    _require(len(given) < 2, f"{path}, line 1", expected, got, "rename or leave out one")
    _require(len(names) > len(given), f"{path}, line 1", "a column of numbers", got, "add one")
    if not given:
        return {"x": table}
    c = table[:, given[0]]
    wrong = np.flatnonzero((c != np.floor(c)) | (c < 0) | (c >= 2**31 - 1))
    if wrong.size:
        where = f"{path}, line {numbered[wrong[0]]}, column {names[given[0]]!r}"
        remedy = "number the classes from 0, or rename a column that holds no labels"
        _require(False, where, "a label 0, 1, 2, ...", f"{c[wrong[0]]:g}", remedy)
    return {"x": np.delete(table, given, axis=1), "c": c.astype(np.int64)}


def _is_name(text: str) -> bool:
    """False for nothing, for a number, and for a line that commas do not divide."""
    return text != "" and math.isnan(_number(text)) and not {*text} & {";", "\t"}


def _number(text: str) -> float:
    """What a text says. NaN if it is no number."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def _numbers(row: list[str], names: list[str], where: str) -> list[float]:
    """A line's numbers. Each is finite, and there are as many as names."""
    got, remedy = f"{len(row)}", "give one number for each name, with commas between"
    _require(len(row) == len(names), where, f"{len(names)} numbers, one for each name", got, remedy)
    numbers = [*map(_number, row)]
    if not all(map(math.isfinite, numbers)):
        at = [*map(math.isfinite, numbers)].index(False)
        got = repr(row[at][:50]) if row[at].strip() else "nothing"
        remedy = "fill it in, or leave the line or the column out; write words as numbers"
        _require(False, f"{where}, column {names[at]!r}", "a finite number", got, remedy)
    return numbers


def _observations(x: np.ndarray, what: str) -> dict[str, Images | Vectors] | Stream:
    """Checks images or a table, and makes them uint8 or float32. A mapped file becomes a stream."""
    expected = "images (N, H, W) or (N, H, W, C), or a table (N, D)"
    _require(x.ndim in (2, 3, 4), what, expected, f"shape {x.shape}", "reshape them")
    check, convert = (_check_table, _as_table) if x.ndim == 2 else (_check_images, _as_images)
    check(x, what)
    return _streamed(x, convert) if isinstance(x, np.memmap) else {"x": convert(x)}


def _streamed(x: np.memmap, convert: Callable[[np.ndarray], np.ndarray]) -> Stream:
    """A stream of a mapped array. It converts each row when it reads it."""
    import jax

    from inference._streams import Stream, memory_mapped

    raw = memory_mapped({"x": x})
    shape = jax.ShapeDtypeStruct(x.shape, convert(x[:1]).dtype)
    return Stream(lambda index: {"x": convert(raw.read(index)["x"])}, {"x": shape})


def _check_table(x: np.ndarray, what: str) -> None:
    for start, piece in pieces(x):
        wrong = np.argwhere(~np.isfinite(_as_table(piece)))
        if wrong.size:
            row, column = wrong[0]
            where = f"{piece[row, column]:g} in row {start + row}, column {column} (from 0)"
            remedy = "fill in what is missing, or leave the row or the column out"
            _require(False, what, "finite numbers that float32 holds", where, remedy)


def _as_table(x: np.ndarray) -> Vectors:
    with np.errstate(over="ignore"):
        return np.require(x, np.float32, ["C", "A", "W"])


def _check_images(x: np.ndarray, what: str) -> None:
    if x.dtype in (bool, np.uint8):
        return
    divide = "divide by the largest value that a pixel can have, such as 255 or 65535"
    _require(x.dtype.kind == "f", what, "uint8, bool or floats in [0, 1]", str(x.dtype), divide)
    low, high = extent(x)
    got, remedy = f"{low:g} to {high:g}", f"replace what is not finite, and {divide}"
    _require(0 <= low <= high <= 1, what, "floats in [0, 1]", got, remedy)


def _as_images(x: np.ndarray) -> Images:
    if x.dtype == bool:
        x = (x.view(np.uint8) > 0) * np.uint8(255)
    return np.require(x, np.uint8 if x.dtype == np.uint8 else np.float32, ["C", "A", "W"])


def _labels(c: np.ndarray, what: str, x: np.ndarray) -> Int32[np.ndarray, " N"]:
    is_right = c.dtype.kind in "iu" and c.shape == (len(x),)
    row = "row" if x.ndim == 2 else "image"
    expected = f"integers 0, 1, ..., one for each of {len(x)} {row}s"
    got = f"{c.dtype} of shape {c.shape}, {c.min()} to {c.max()}"
    remedy = f"number the classes from 0, and give one for each {row}"
    _require(is_right and 0 <= c.min() <= c.max() < 2**31 - 1, what, expected, got, remedy)
    return c.astype(np.int32)


def _read(path: str | Path, what: object, expected: str, max_bytes: int) -> bytes:
    """What a file holds."""
    got = "a directory" if os.path.isdir(path) else "no file there"
    _require(os.path.isfile(path), what, expected, got, "give the path of a file")
    size, most = os.path.getsize(path), f"at most {max_bytes:,} bytes"
    _require(size <= max_bytes, what, most, f"{size:,}", _remedy(path))
    with _refusing(what, expected):
        return Path(path).read_bytes()


def _read_source(path: str | Path, what: object, name: str, file: str) -> bytes:
    """What a file of a public data set holds. It is unpacked, and must have the right SHA-256."""
    sha256, expected = SOURCES[name].sums[file], f"{name}'s {file}"
    content = _read(path, what, expected, MAX_BYTES)
    if content.startswith(b"\x1f\x8b"):
        with _refusing(what, expected):
            content = gzip.GzipFile(fileobj=io.BytesIO(content)).read(MAX_BYTES + 1)
        _require(len(content) <= MAX_BYTES, what, f"at most {MAX_BYTES:,} bytes", "more")
    found = hashlib.sha256(content).hexdigest()
    if found == sha256:
        return content
    of = {value: (n, f) for n, source in SOURCES.items() for f, value in source.sums.items()}
    other, known = of.get(found, (name, None))
    kind = {b"": "an empty file", b"<": "a web page"}.get(content[:1], "other content")
    kind = f"{other}'s {known}" if known else kind
    got = f"{kind} ({len(content):,} bytes, {found})"
    expected = f"{what}: expected {expected} with SHA-256 {sha256}, got {got}"
    if other != name:
        raise _OfAnotherError(f"{expected}; give {name}'s files, or --dataset {other}")
    raise DatasetError(f"{expected}; {ANEW}")


def _remedy(path: str | Path) -> str:
    """What to do about a file that is too large."""
    if Path(path).suffix in (".npz", ".csv"):
        return "save x by numpy.save as an .npy file, which is read piece by piece, or give less"
    return f"{ANEW}, or give less"


@contextlib.contextmanager
def _refusing(what: object, expected: str) -> Iterator[None]:
    """Makes one error of the many that gzip, zipfile, NumPy and SciPy raise at a bad file."""
    try:
        yield
    except DatasetError:
        raise
    except Exception as error:
        got = f"one that cannot be read ({type(error).__name__}: {error})"
        raise DatasetError(f"{what}: expected {expected}, got {got}; {ANEW}") from error


def _require(is_right: object, what: object, expected: str, got: str, remedy: str = ANEW) -> None:
    if not is_right:
        raise DatasetError(f"{what}: expected {expected}, got {got}; {remedy}")
