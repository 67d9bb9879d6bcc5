"""The data sets: the right arrays or an error that says what to do, whatever a file holds."""

import contextlib
import dataclasses
import gzip
import hashlib
import http.server
import io
import json
import os
import re
import socket
import struct
import sys
import threading
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pooch
import pytest
import scipy.io

from experiments import datasets
from experiments.datasets import DatasetError, Record, load

MAX_BYTES, HALF_OF_MEMORY = datasets.MAX_BYTES, datasets.half_of_memory()
GIVEN = os.environ.get("GUIDEBOOK_DATA")
TRAIN_X, TRAIN_C, TEST_X, TEST_C = datasets.MNIST
TRAIN_MAT, TEST_MAT = datasets.SVHN
REMEDY = r"; .+"
GET_FILES = "; go online once, or give .* --data-dir or .* GUIDEBOOK_DATA .now not set.$"
HTML = b"<!DOCTYPE html>\n<html><body>Please sign in</body></html>"


def idx(array):
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def header(*lengths):
    return struct.pack(f">HBB{len(lengths)}I", 0, 8, len(lengths), *lengths)


def packed(content):
    return gzip.compress(content, 6, mtime=0)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def save(path, **arrays):
    np.savez(path, **arrays)
    return path


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def npy_header(shape, descr="|u1"):
    stream = io.BytesIO()
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue()


def zipped(path, compression=zipfile.ZIP_DEFLATED, **members):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return path


def peak_memory(function):
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def random_images(num, *shape, dtype=np.uint8):
    return np.random.default_rng(num).integers(0, 256, (num, *shape)).astype(dtype)


def same(left, right):
    return left.keys() == right.keys() and all(
        left[key].dtype == right[key].dtype and np.array_equal(left[key], right[key])
        for key in left
    )


@pytest.fixture
def nobody():
    """A URL where connections are refused."""
    with socket.socket() as bound:  # but not listening
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}/"


@pytest.fixture(autouse=True)
def _nothing_of_the_users(tmp_path, monkeypatch, nobody):
    monkeypatch.delenv("GUIDEBOOK_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setenv("NO_PROXY", "*")
    refusing = (f"{nobody}{{}}.gz", f"{nobody}too/{{}}.gz")
    for name in datasets.SOURCES:
        set_mirrors(name, refusing, monkeypatch)
    monkeypatch.setattr(datasets, "half_of_memory", lambda: 10**9)
    monkeypatch.setattr(datasets, "MAX_BYTES", 2**20)


def set_mirrors(name, mirrors, monkeypatch):
    source = dataclasses.replace(datasets.SOURCES[name], mirrors=mirrors)
    monkeypatch.setitem(datasets.SOURCES, name, source)


def count_as(table, contents, monkeypatch):
    for name, content in contents.items():
        monkeypatch.setitem(table, name, hashlib.sha256(content).hexdigest())


def as_mnist(x, x_test, monkeypatch, table=datasets.MNIST):
    """Four files that count as MNIST, or as Fashion-MNIST, by name."""
    contents = {
        TRAIN_X: idx(x),
        TRAIN_C: idx(np.arange(len(x)) % 10),
        TEST_X: idx(x_test),
        TEST_C: idx(np.arange(len(x_test)) % 10),
    }
    count_as(table, contents, monkeypatch)
    return contents


@pytest.fixture
def small(monkeypatch):
    return as_mnist(random_images(60, 6, 5), random_images(20, 6, 5), monkeypatch)


@pytest.fixture
def placed(tmp_path, small):
    """A directory with the files of ``small``."""
    for name, content in small.items():
        write(tmp_path / "placed" / name, content)
    return tmp_path / "placed"


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "caches" / "guidebook" / "mnist"


class Mirrors(http.server.ThreadingHTTPServer):
    """Two mirrors, /one/ and /two/, that count their requests.

    ``answers`` maps a path to the bytes to send, a status, "cut" (fewer bytes than announced) or
    "silence".
    """

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers = {
            f"/{mirror}/{name}": content
            for mirror in ("one", "two")
            for name, content in files.items()
        }
        self.requests = []
        self.closing = threading.Event()

    def urls(self, end=""):
        start = f"http://127.0.0.1:{self.server_port}"
        return tuple(f"{start}/{mirror}/{{}}{end}" for mirror in ("one", "two"))


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append(self.path)
        answer = self.server.answers[self.path]
        if answer == "silence":
            self.server.closing.wait(10)
            return
        if isinstance(answer, int):
            self.send_error(answer)
            return
        body = b"\x1f\x8b123" if answer == "cut" else answer
        self.send_response(200)
        self.send_header("Content-Length", str(len(body) + (100 if answer == "cut" else 0)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving(files):
    server = Mirrors(files)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def mirrors(small, monkeypatch):
    with serving({f"{name}.gz": packed(content) for name, content in small.items()}) as server:
        set_mirrors("mnist", server.urls(".gz"), monkeypatch)
        yield server


def load_small(**settings):
    return load("mnist", num_validation=10, progress=False, **settings)


def require_small(loaded, small):
    """That ``loaded`` is what the files of ``small`` hold."""
    x = np.frombuffer(small[TRAIN_X], np.uint8, offset=16).reshape(60, 6, 5)
    x_test = np.frombuffer(small[TEST_X], np.uint8, offset=16).reshape(20, 6, 5)
    c = (np.arange(60) % 10).astype(np.int32)
    assert same(loaded.train, {"x": x[:50], "c": c[:50]})
    assert same(loaded.validation, {"x": x[50:], "c": c[50:]})
    assert same(loaded.test, {"x": x_test, "c": c[:20]})
    assert (loaded.name, loaded.num_classes, loaded.x_shape) == ("mnist", 10, (6, 5))


# --- MNIST's files, whatever is in them -----------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 3, 2), (1, 1, 1), (300, 28, 28), (2, 3, 4, 5)])
@pytest.mark.parametrize("pack", [bytes, packed])
def test_mnists_format_gives_back_what_was_stored(tmp_path, shape, pack, monkeypatch):
    x, x_test = random_images(*shape), random_images(3, *shape[1:])
    for name, content in as_mnist(x, x_test, monkeypatch).items():
        write(tmp_path / name, pack(content))
    loaded = load("mnist", data_dir=tmp_path, num_validation=0)
    for part, images in ((loaded.train, x), (loaded.test, x_test)):
        labels = np.arange(len(images), dtype=np.int32) % 10
        assert same(part, {"x": images, "c": labels})
        assert all(value.flags.writeable for value in part.values())


NINE = idx(random_images(9, 4, 4))
BAD_IDX = {
    "empty": (b"", "an empty file"),
    "empty packed": (packed(b""), "an empty file"),
    "web page": (HTML, "a web page"),
    "packed web page": (packed(HTML), "a web page"),
    "text": (b"thesis", "other content .6 bytes"),
    "floats": (b"\0\0\x0d\3" + bytes(100), "other content"),
    "no axes": (b"\0\0\x08\0\1", "other content"),
    "200 axes": (b"\0\0\x08\xc8" + bytes(1000), "other content"),
    "cut header": (header(5, 3, 2)[:-1], "other content .15 bytes"),
    "cut packed header": (packed(header(5, 3, 2)[:7]), "other content .7 bytes"),
    "labels": (idx(np.arange(30)), "other content"),
    "the labels": (idx(np.arange(60) % 10), TRAIN_C),
    "the packed labels": (packed(idx(np.arange(60) % 10)), TRAIN_C),
    "matrix": (idx(np.zeros((6, 5))), "other content"),
    "no images": (header(0, 28, 28), "other content .16 bytes"),
    "four billion": (header(2**32 - 1, 28, 28) + bytes(9), "other content .25 bytes"),
    "more than any": (header(*[2**32 - 1] * 3) + bytes(9), "other content .25 bytes"),
    "millions": (header(10**6, 28, 28) + bytes(9), "other content .25 bytes"),
    "packed millions": (packed(header(10**6, 28, 28)), "other content .16 bytes"),
    "cut": (NINE[:-1], "other content .159 bytes"),
    "cut inside": (packed(NINE[:-1]), "other content .159 bytes"),
    "trailing": (NINE + b"\0", "other content .161 bytes"),
    "trailing inside": (packed(NINE + b"\0"), "other content .161 bytes"),
    "bomb": (packed(header(60, 6, 5) + bytes(10**7)), "at most 1,048,576 bytes, got more"),
    "two": (packed(NINE) * 2, "other content .320 bytes"),
    "packed, then text": (packed(NINE) + b"x", "BadGzipFile"),
    "packed, cut": (packed(NINE)[:-20], "EOFError"),
    "packed, without sum": (packed(NINE)[:-8], "EOFError"),
    "packed, bad sum": (packed(NINE)[:-8] + bytes(8), "CRC check failed"),
    "two bytes": (b"\x1f\x8b", "EOFError"),
}


@pytest.mark.parametrize("kind", BAD_IDX)
def test_a_bad_file_is_an_error_and_takes_no_memory(placed, kind):
    content, got = BAD_IDX[kind]
    write(placed / TRAIN_X, content)

    def read():
        with pytest.raises(DatasetError, match=rf"/{TRAIN_X}: expected .*{got}.*{REMEDY}"):
            load_small(data_dir=placed)

    assert peak_memory(read) < 4e6


def test_a_file_of_another_kind_names_both(placed, small):
    right, found = (datasets.MNIST[name] for name in (TRAIN_X, TEST_X))
    write(placed / TRAIN_X, packed(small[TEST_X]))
    expected = (
        f"/{TRAIN_X}: expected mnist's {TRAIN_X} with SHA-256 {right}, got mnist's {TEST_X} .*"
    )
    with pytest.raises(DatasetError, match=f"{expected}{found}.; get the file anew"):
        load_small(data_dir=placed)


def test_a_file_keeps_to_a_bound(placed, small, monkeypatch):
    size = len(small[TRAIN_X])
    monkeypatch.setattr(datasets, "MAX_BYTES", size)
    require_small(load_small(data_dir=placed), small)
    monkeypatch.setattr(datasets, "MAX_BYTES", size - 1)
    for content, got in ((small[TRAIN_X], f"{size:,}"), (packed(small[TRAIN_X]), "more|1,8")):
        write(placed / TRAIN_X, content)
        with pytest.raises(DatasetError, match=f"at most {size - 1:,} bytes, got ({got})"):
            load_small(data_dir=placed)


@pytest.mark.parametrize("kind", ["directory", "nothing", "pipe", "dangling link"])
def test_what_is_no_file_is_an_error(placed, kind):
    for path in (placed / TRAIN_X, placed / "mine.npy", placed / "mine.npz"):
        path.unlink(missing_ok=True)
        if kind == "directory":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "dangling link":
            path.symlink_to(placed / "gone")
        name = "mnist" if path.suffix == "" else str(path)
        with pytest.raises(DatasetError, match=r": expected .* got (a directory|no .*); give"):
            load(name, data_dir=placed)


def test_a_file_that_may_not_be_read_is_an_error(placed, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    write(placed / "mine.npy", npy(GOOD))
    monkeypatch.setattr(Path, "read_bytes", refuse)  # root may read everything
    for name, file in (("mnist", TRAIN_X), (str(placed / "mine.npy"), "mine.npy")):
        with pytest.raises(DatasetError, match=rf"/{file}: expected .* got .*Permission denied"):
            load(name, data_dir=placed)


def mutants(content, num):
    """Copies of ``content`` with bytes flipped, cut off, added or moved."""
    rng = np.random.default_rng(len(content))
    for _ in range(num):
        mutant = bytearray(content)
        for _ in range(rng.integers(1, 4)):
            kind, size = rng.integers(6), max(1, len(mutant))
            at, to = sorted(rng.integers(0, size, 2))
            if kind < 2 and mutant:
                mutant[at] ^= 1 << rng.integers(8)
            elif kind == 2:
                mutant[at : at + 1] = rng.bytes(1)
            elif kind == 3:
                del mutant[at if rng.integers(2) else size - 1 :]
            elif kind == 4:
                mutant += rng.bytes(rng.integers(1, 9)) if rng.integers(2) else bytes(3)
            else:
                mutant[at:to] = mutant[to : to + rng.integers(0, 20)]
        yield bytes(mutant)


def fuzz(path, content, num, read, is_right):
    """How many mutants were read all the same, each of them rightly."""
    num_read = 0
    for mutant in mutants(content, num):
        path.write_bytes(mutant)
        try:
            found = read(path)
        except DatasetError as error:
            message = str(error)
        else:
            message = f"{path}"
            num_read += 1
            assert is_right(found, mutant), mutant
        assert message.startswith(str(path))
    return num_read


@pytest.mark.parametrize("name", [TRAIN_X, TRAIN_C])
@pytest.mark.parametrize("pack", [bytes, packed])
def test_a_damaged_file_is_an_error_or_the_same_array(tmp_path, monkeypatch, name, pack):
    x = random_images(4, 3, 5)
    contents = as_mnist(x, x, monkeypatch)
    for key, content in contents.items():
        write(tmp_path / key, content)
    right = load("mnist", data_dir=tmp_path, num_validation=0).train
    num_read = fuzz(
        tmp_path / name,
        pack(contents[name]),
        400,
        lambda _: load("mnist", data_dir=tmp_path, num_validation=0),
        lambda found, _: same(found.train, right),
    )
    assert num_read < 120
    assert pack is bytes or num_read > 0  # the time stamp in gzip's header does not matter


# --- MNIST ----------------------------------------------------------------------------------------


SPELLINGS = {
    "raw": (bytes, "{}"),
    "packed": (packed, "{}.gz"),
    "raw, called packed": (bytes, "{}.gz"),
    "packed, called raw": (packed, "{}"),
    "subdirectory": (packed, "mnist/{}.gz"),
}


@pytest.mark.parametrize("kind", SPELLINGS)
@pytest.mark.parametrize("by", ["argument", "environment"])
@pytest.mark.parametrize("mark", ["-", "."])
def test_mnist_is_read_from_a_directory(tmp_path, small, monkeypatch, kind, by, mark, cache):
    pack, name = SPELLINGS[kind]
    for key, content in small.items():
        write(tmp_path / name.format(key.replace("-idx", f"{mark}idx")), pack(content))
    if by == "environment":
        monkeypatch.setenv("GUIDEBOOK_DATA", str(tmp_path))
    for kind in ("mnist", "auto"):
        directory = tmp_path if by == "argument" else None
        loaded = load(kind, data_dir=directory, num_validation=10)
        require_small(loaded, small)
    assert not cache.exists()


def test_a_directory_without_the_files_names_them(tmp_path, small):
    write(tmp_path / f"{TRAIN_X}.gz", small[TRAIN_X])
    for kind in ("mnist", "auto"):
        with pytest.raises(DatasetError) as caught:
            load(kind, data_dir=tmp_path)
        message = str(caught.value)
        assert f"got no {TRAIN_C}, no {TEST_X}, no {TEST_C}; give" in message
        assert f"mnist's files (.gz or not) in {tmp_path} or its folder mnist, got" in message


@pytest.mark.parametrize("by", ["argument", "environment"])
@pytest.mark.parametrize(
    ("content", "got"),
    [
        (HTML, "a web page"),
        (b"", "an empty file"),
        (packed(idx(random_images(61, 6, 5)))[:-9], "EOFError"),
        (idx(random_images(61, 6, 5)), "other content"),
        (idx(np.arange(60)), "other content"),
        (packed(idx(np.arange(60) % 10)), TRAIN_C),
        (packed(header(2**17, 28, 28) + bytes(2**21)), "at most 1,048,576 bytes, got more"),
    ],
)
def test_a_bad_file_in_a_directory_is_an_error_always(
    tmp_path, small, mirrors, monkeypatch, by, content, got
):
    for key, right in small.items():
        write(tmp_path / key, content if key == TRAIN_X else right)
    monkeypatch.setenv("GUIDEBOOK_DATA", str(tmp_path))
    for kind in ("mnist", "auto"):
        with pytest.raises(DatasetError, match=f"{TRAIN_X}: expected .*{got}.*{REMEDY}"):
            load(kind, data_dir=tmp_path if by == "argument" else None)
    assert mirrors.requests == []
    assert (tmp_path / TRAIN_X).read_bytes() == content


def test_mnist_is_downloaded_once(small, mirrors, cache, capsys, monkeypatch):
    (handler,) = pooch.get_logger().handlers
    monkeypatch.setattr(handler, "stream", sys.stderr)
    monkeypatch.setattr(pooch.get_logger(), "level", 0)
    for kind in ("mnist", "auto", "mnist"):
        require_small(load(kind, num_validation=10), small)
        assert mirrors.requests == [f"/one/{name}.gz" for name in datasets.MNIST]
    assert {path.name: path.read_bytes() for path in cache.iterdir()} == small
    assert capsys.readouterr() == ("", "")


def test_what_the_environments_directory_lacks_is_downloaded(tmp_path, small, mirrors, monkeypatch):
    monkeypatch.setenv("GUIDEBOOK_DATA", str(tmp_path / "nothing there"))
    require_small(load_small(), small)
    assert len(mirrors.requests) == 4


def test_the_cache_works_offline_and_is_where_xdg_says(
    tmp_path, small, mirrors, monkeypatch, nobody
):
    load_small()
    here = datasets.SOURCES["mnist"].mirrors
    set_mirrors("mnist", (f"{nobody}{{}}",), monkeypatch)
    require_small(load_small(), small)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    with pytest.raises(DatasetError):
        load_small()
    set_mirrors("mnist", here, monkeypatch)
    require_small(load_small(), small)
    assert len(list((tmp_path / "elsewhere" / "guidebook" / "mnist").iterdir())) == 4


BAD_ANSWERS = {
    "missing": (404, "404 Client Error"),
    "broken": (500, "500 Server Error"),
    "web page": (HTML, "a web page"),
    "empty": (b"", "an empty file"),
    "labels": (packed(idx(np.arange(60))), "other content"),
    "the labels": (packed(idx(np.arange(60) % 10)), TRAIN_C + " ."),
    "foreign": (packed(idx(random_images(61, 6, 5))), "other content"),
    "truncated": (packed(idx(random_images(61, 6, 5)))[:-30], "EOFError"),
    "bomb": (packed(header(60, 6, 5) + bytes(10**7)), "got more"),
    "promise": (packed(header(2**32 - 1, 28, 28)), "other content"),
    "cut": ("cut", "IncompleteRead|ended prematurely"),
    "silence": ("silence", "timed out"),
}


@pytest.mark.parametrize("kind", BAD_ANSWERS)
def test_a_bad_mirror_is_passed_over_and_leaves_nothing(small, mirrors, cache, kind, monkeypatch):
    if kind == "silence":
        monkeypatch.setattr(datasets, "TIMEOUT", (5, 0.4))
    answer, got = BAD_ANSWERS[kind]
    mirrors.answers[f"/one/{TRAIN_X}.gz"] = answer
    require_small(load_small(), small)
    assert mirrors.requests == [
        f"/one/{TRAIN_X}.gz",
        *(f"/two/{name}.gz" for name in datasets.MNIST),  # the mirror that failed comes last
    ]
    assert {path.name: path.read_bytes() for path in cache.iterdir()} == small
    for path in cache.iterdir():
        path.unlink()
    mirrors.answers[f"/two/{TRAIN_X}.gz"] = answer
    with pytest.raises(DatasetError) as caught:
        load_small()
    one, two = (url.format(TRAIN_X) for url in datasets.SOURCES["mnist"].mirrors)
    message = str(caught.value)
    assert message.index(TRAIN_X) < message.index(one) < message.index(two)
    assert len(list(re.finditer(got, message))) == 2
    assert re.search(GET_FILES, message)
    assert str(cache) + "/" not in message
    assert list(cache.iterdir()) == []


def test_an_unreachable_mirror_is_passed_over(small, mirrors, monkeypatch, nobody):
    set_mirrors("mnist", (f"{nobody}{{}}", datasets.SOURCES["mnist"].mirrors[1]), monkeypatch)
    require_small(load_small(), small)


@pytest.mark.parametrize("pack", [bytes, lambda content: gzip.compress(content, 1, mtime=9)])
def test_a_mirror_that_packs_otherwise_is_as_good(small, mirrors, pack):
    for name, content in small.items():
        mirrors.answers[f"/one/{name}.gz"] = pack(content)
    require_small(load_small(), small)
    assert len(mirrors.requests) == 4


BAD_CACHED = {
    "web page": lambda path: path.write_bytes(HTML),
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "foreign": lambda path: path.write_bytes(idx(random_images(21, 6, 5))),
    "packed": lambda path: path.write_bytes(packed(path.read_bytes())),
    "dangling link": lambda path: (path.unlink(), path.symlink_to("gone")),
}


@pytest.mark.parametrize("kind", BAD_CACHED)
def test_a_bad_file_in_the_cache_is_replaced(small, mirrors, cache, kind, monkeypatch, nobody):
    load_small()
    path = cache / TEST_X
    right = path.read_bytes()
    BAD_CACHED[kind](path)
    require_small(load_small(), small)
    assert mirrors.requests[4:] == [f"/one/{TEST_X}.gz"]
    assert path.read_bytes() == right
    BAD_CACHED[kind](path)
    here = datasets.SOURCES["mnist"].mirrors
    set_mirrors("mnist", (f"{nobody}{{}}",), monkeypatch)
    with pytest.raises(DatasetError, match=f"got a bad {path} .remove it.*{nobody}.*refused"):
        load_small()
    set_mirrors("mnist", here, monkeypatch)
    require_small(load_small(), small)
    assert len(list(cache.iterdir())) == 4


def test_what_cannot_be_replaced_in_the_cache_is_named(small, mirrors, cache):
    (cache / TEST_X).mkdir(parents=True)
    with pytest.raises(DatasetError, match=f"got a bad {cache / TEST_X} .remove it"):
        load_small()
    assert load("auto", progress=False).name == "digits"


def test_a_cache_that_cannot_be_written_is_an_error(small, mirrors, cache):
    write(cache.parent, b"a file in the directory's place")
    with pytest.raises(DatasetError, match=f"mnist: expected {TRAIN_X} in .*; go online"):
        load_small()


def test_downloads_are_shown_on_a_terminal(small, mirrors, capsys, monkeypatch, tmp_path):
    load_small()
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for progress in (False, True):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"{progress}"))
        load("mnist", num_validation=10, progress=progress)
        out, err = capsys.readouterr()
        assert out == ""
        assert ("B/s" in err) is progress


def test_sizes_of_mnist(tmp_path, small):
    for key, content in small.items():
        write(tmp_path / key, content)
    all_of_it = load("mnist", data_dir=tmp_path, num_validation=0)
    assert len(all_of_it.train["x"]) == 60
    assert all_of_it.validation is None
    assert len(load("mnist", data_dir=tmp_path, num_validation=59).train["x"]) == 1
    for number, bound in ((60, "0 to 59"), (None, "0 to 59"), (-1, "0 to 59")):
        with pytest.raises(ValueError, match=f"num_validation: expected {bound}"):
            load("mnist", data_dir=tmp_path, num_validation=number)


def given(name, file):
    """Whether GUIDEBOOK_DATA holds a file."""
    places = [Path(GIVEN), Path(GIVEN, name)] if GIVEN else []
    return any(path for place in places for path in place.glob(f"{file}*"))


@pytest.mark.skipif(not given("mnist", TRAIN_X), reason="GUIDEBOOK_DATA holds no MNIST")
def test_the_real_mnist(monkeypatch):
    monkeypatch.setattr(datasets, "MAX_BYTES", MAX_BYTES)
    began = time.perf_counter()
    loaded = load("mnist", data_dir=GIVEN)
    assert time.perf_counter() - began < 2
    assert loaded.train["x"].shape == (50_000, 28, 28)
    assert loaded.validation["x"].shape == (10_000, 28, 28)
    assert loaded.test["x"].shape == (10_000, 28, 28)
    assert loaded.num_classes == 10
    assert list(loaded.train["c"][:5]) == [5, 0, 4, 1, 9]
    assert list(loaded.test["c"][:5]) == [7, 2, 1, 0, 4]
    x = load("mnist", data_dir=GIVEN, num_validation=0).train["x"]
    assert x.shape == (60_000, 28, 28)
    assert x.mean() == pytest.approx(33.318421449829934, rel=1e-12)


# --- MNIST, binarised once and for all ------------------------------------------------------------

AMAT = tuple(datasets.STATIC)  # for training, for validation, for testing


def amat(x):
    return "".join(" ".join(map(str, image.ravel())) + "\n" for image in x).encode()


def binary_images(num):
    return np.random.default_rng(num).integers(0, 2, (num, 28, 28), np.uint8)


@pytest.fixture
def static(monkeypatch):
    """Three files that count as static MNIST, by name."""
    contents = {name: amat(binary_images(num)) for name, num in zip(AMAT, (12, 5, 6), strict=True)}
    count_as(datasets.STATIC, contents, monkeypatch)
    return contents


def load_static(num_validation=5, **settings):
    return load("static-mnist", num_validation=num_validation, progress=False, **settings)


def require_static(loaded):
    """That ``loaded`` is what the files of ``static`` hold. The test images are shuffled."""
    parts = (loaded.train, loaded.validation, loaded.test)
    for part, num in zip(parts, (12, 5, 6), strict=True):
        x = binary_images(num) * np.uint8(255)
        order = np.random.default_rng(0).permutation(6) if num == 6 else slice(None)
        assert same(part, {"x": x[order]})
        assert part["x"].flags.c_contiguous
        assert part["x"].flags.writeable
    assert (loaded.name, loaded.num_classes, loaded.x_shape) == ("static-mnist", None, (28, 28))


@pytest.mark.parametrize("spelling", ["{}", "{}.gz", "static_mnist/{}.gz", "static-mnist/{}"])
@pytest.mark.parametrize("by", ["argument", "environment"])
def test_static_mnist_is_read_from_a_directory(tmp_path, static, monkeypatch, spelling, by, cache):
    pack = packed if spelling.endswith("gz") else bytes
    for name, content in static.items():
        write(tmp_path / spelling.format(name), pack(content))
    if by == "environment":
        monkeypatch.setenv("GUIDEBOOK_DATA", str(tmp_path))
    require_static(load_static(data_dir=tmp_path if by == "argument" else None))
    assert not cache.parent.exists()


def test_static_mnist_is_downloaded_once(static, cache, monkeypatch, nobody):
    with serving(static) as server:
        set_mirrors("static-mnist", server.urls()[:1], monkeypatch)
        require_static(load_static())
        assert server.requests == [f"/one/{name}" for name in AMAT]
    cached = (cache.parent / "static-mnist").iterdir()
    assert {path.name: path.read_bytes() for path in cached} == static
    set_mirrors("static-mnist", (f"{nobody}{{}}",), monkeypatch)
    require_static(load_static())


def test_any_number_of_static_mnists_images_may_be_held_out(tmp_path, static):
    for name, content in static.items():
        write(tmp_path / name, content)
    x = np.concatenate([binary_images(12), binary_images(5)]) * np.uint8(255)
    for number in (0, 3, 5, 8, 16):
        loaded = load_static(number, data_dir=tmp_path)
        held_out = loaded.validation["x"] if number else x[:0]
        assert len(held_out) == number
        np.testing.assert_array_equal(np.concatenate([loaded.train["x"], held_out]), x)
        assert same(loaded.test, load_static(data_dir=tmp_path).test)
    with pytest.raises(ValueError, match=r"num_validation: expected 0 to 16, .*got 17"):
        load_static(17, data_dir=tmp_path)


def test_a_directory_without_static_mnist_names_its_files(tmp_path, static):
    write(tmp_path / AMAT[0], static[AMAT[0]])
    folders = f"{tmp_path} or its folder static_mnist or static-mnist"
    expected = f"static-mnist's files .* in {folders}, got no {AMAT[1]}, no {AMAT[2]}; give"
    with pytest.raises(DatasetError, match=f"^data_dir: expected {expected}"):
        load_static(data_dir=tmp_path)


@pytest.mark.parametrize("kind", ["changed", "cut", "lines", "swapped"])
def test_a_bad_static_mnist_is_an_error(tmp_path, static, monkeypatch, kind):
    right = static[AMAT[0]]
    content, got = {
        "changed": (bytes([right[0] ^ 1]) + right[1:], "other content"),
        "cut": (right[:-2], "other content"),
        "lines": (right.replace(b"\n", b"\r\n"), "other content"),
        "swapped": (static[AMAT[1]], f"static-mnist's {AMAT[1]}"),
    }[kind]
    for name in AMAT:
        write(tmp_path / name, content if name == AMAT[0] else static[name])
    with pytest.raises(DatasetError, match=f"/{AMAT[0]}: expected static.*, got {got} .*{REMEDY}"):
        load_static(data_dir=tmp_path)
    count_as(datasets.STATIC, {AMAT[0]: content}, monkeypatch)
    if kind in ("cut", "lines"):
        with pytest.raises(DatasetError, match=f"/{AMAT[0]}: expected the arrays of static-mnist"):
            load_static(data_dir=tmp_path)


def test_static_mnist_takes_no_more_memory_to_read_than_its_file():
    content = amat(binary_images(300))
    assert peak_memory(lambda: datasets.SOURCES["static-mnist"].read(content)) < len(content)


@pytest.mark.skipif(not given("static_mnist", AMAT[0]), reason="GUIDEBOOK_DATA holds no such MNIST")
def test_the_real_static_mnist(monkeypatch):
    monkeypatch.setattr(datasets, "MAX_BYTES", MAX_BYTES)
    loaded = load("static-mnist", data_dir=GIVEN)
    parts = [part["x"] for part in (loaded.train, loaded.validation, loaded.test)]
    assert [len(x) for x in parts] == [50_000, 10_000, 10_000]
    assert {*np.unique(np.concatenate(parts))} == {0, 255}
    if given("mnist", TRAIN_X):
        grey = load("mnist", data_dir=GIVEN, num_validation=0)
        for x, whole in ((parts[0], grey.train), (parts[1], grey.train), (parts[2], grey.test)):
            x, pixels = x[:30].reshape(30, -1) > 0, whole["x"].reshape(-1, 784).T
            impossible = x @ (pixels == 0).astype(np.float32) + ~x @ (pixels == 255).astype(
                np.float32
            )
            assert (impossible.min(1) == 0).all()  # one of MNIST's images may have become this one
            assert len({*whole["c"][impossible.argmin(1)]}) > 5  # not sorted by digit


# --- Fashion-MNIST, whose files have MNIST's names ------------------------------------------------


@pytest.fixture
def fashion(monkeypatch):
    """Four files that count as Fashion-MNIST, by name."""
    x, x_test = random_images(61, 6, 5), random_images(21, 6, 5)
    return as_mnist(x, x_test, monkeypatch, datasets.FASHION)


def load_fashion(**settings):
    return load("fashion-mnist", num_validation=11, progress=False, **settings)


def require_fashion(loaded):
    """That ``loaded`` is what the files of ``fashion`` hold."""
    x, c = random_images(61, 6, 5), np.arange(61, dtype=np.int32) % 10
    assert same(loaded.train, {"x": x[:50], "c": c[:50]})
    assert same(loaded.validation, {"x": x[50:], "c": c[50:]})
    assert same(loaded.test, {"x": random_images(21, 6, 5), "c": c[:21]})
    assert (loaded.name, loaded.num_classes) == ("fashion-mnist", 10)


@pytest.fixture
def fashion_mirror(fashion, monkeypatch):
    with serving({f"{name}.gz": packed(content) for name, content in fashion.items()}) as server:
        set_mirrors("fashion-mnist", server.urls(".gz"), monkeypatch)
        yield server


def test_the_sums_of_public_files_are_sums_and_none_is_there_twice():
    sums = [value for source in datasets.SOURCES.values() for value in source.sums.values()]
    assert len({*sums}) == len(sums) == 13
    assert all(re.fullmatch("[0-9a-f]{64}", value) for value in sums)


@pytest.mark.parametrize("place", ["", "fashion-mnist", "fashion_mnist"])
@pytest.mark.parametrize("by", ["argument", "environment"])
@pytest.mark.parametrize("beside", [False, True])
def test_fashion_is_read_from_a_directory(
    tmp_path, fashion, small, monkeypatch, place, by, beside, cache
):
    for name, content in fashion.items():
        write(tmp_path / place / f"{name}.gz", packed(content))
    if beside:  # MNIST lies there too
        for name, content in small.items():
            write(tmp_path / ("" if place else "mnist") / name, content)
    if by == "environment":
        monkeypatch.setenv("GUIDEBOOK_DATA", str(tmp_path))
    directory = tmp_path if by == "argument" else None
    require_fashion(load_fashion(data_dir=directory))
    if beside:
        require_small(load_small(data_dir=directory), small)
    assert not cache.parent.exists()


@pytest.mark.parametrize("place", ["", "fashion-mnist"])
def test_a_directory_of_mnist_is_none_of_fashion(tmp_path, fashion_mirror, small, place):
    for name, content in small.items():
        write(tmp_path / place / name, content)
    wrong = tmp_path / place / TRAIN_X
    expected = f"^{wrong}: expected fashion-mnist's {TRAIN_X} with .*, got mnist's {TRAIN_X} .*"
    remedy = "; give fashion-mnist's files, or --dataset mnist$"
    with pytest.raises(DatasetError, match=f"{expected}{remedy}"):
        load_fashion(data_dir=tmp_path)
    assert fashion_mirror.requests == []


def test_mnist_in_the_environments_directory_does_not_hide_the_cache_of_fashion(
    tmp_path, fashion, small, fashion_mirror, monkeypatch, cache
):
    for name, content in small.items():
        write(tmp_path / "placed" / name, content)
    monkeypatch.setenv("GUIDEBOOK_DATA", str(tmp_path / "placed"))
    for _ in range(2):
        require_fashion(load_fashion())
        assert fashion_mirror.requests == [f"/one/{name}.gz" for name in datasets.FASHION]
    require_small(load_small(), small)
    found = {path.name: path.read_bytes() for path in (cache.parent / "fashion-mnist").iterdir()}
    assert found == fashion
    assert not cache.exists()


def test_fashion_in_the_environments_directory_does_not_hide_that_mnist_is_missing(
    tmp_path, fashion, small, monkeypatch, capsys
):
    for name, content in fashion.items():
        write(tmp_path / name, content)
    monkeypatch.setenv("GUIDEBOOK_DATA", str(tmp_path))
    got = f"got {tmp_path / TRAIN_X}: .*, got fashion-mnist's {TRAIN_X} .*refused"
    with pytest.raises(DatasetError, match=f"^mnist: expected {TRAIN_X} .*{got}.*; go online"):
        load_small()
    assert load("auto", progress=False).name == "digits"
    assert re.search(got, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("place", "content"),
    [("fashion-mnist", None), ("fashion_mnist", None), ("", HTML), ("", idx(np.arange(61) % 10))],
)
def test_other_bad_files_in_the_environments_directory_are_errors(
    tmp_path, fashion, small, fashion_mirror, monkeypatch, place, content
):
    write(tmp_path / place / TRAIN_X, content or small[TRAIN_X])
    monkeypatch.setenv("GUIDEBOOK_DATA", str(tmp_path))
    with pytest.raises(DatasetError, match=f"/{TRAIN_X}: expected fashion-mnist's {TRAIN_X} .*"):
        load_fashion()
    assert fashion_mirror.requests == []


def test_a_mirror_that_gives_mnist_for_fashion_is_passed_over(fashion, small, fashion_mirror):
    fashion_mirror.answers[f"/one/{TRAIN_X}.gz"] = packed(small[TRAIN_X])
    require_fashion(load_fashion())
    assert f"/two/{TRAIN_X}.gz" in fashion_mirror.requests


@pytest.mark.skipif(not given("fashion_mnist", TRAIN_X), reason="GUIDEBOOK_DATA holds no Fashion")
def test_the_real_fashion(monkeypatch):
    monkeypatch.setattr(datasets, "MAX_BYTES", MAX_BYTES)
    loaded = load("fashion-mnist", data_dir=GIVEN)
    parts = (loaded.train, loaded.validation, loaded.test)
    assert [part["x"].shape for part in parts] == [(n, 28, 28) for n in (50_000, 10_000, 10_000)]
    assert list(np.bincount(loaded.test["c"])) == [1000] * 10


# --- SVHN -----------------------------------------------------------------------------------------


def mat(compressed=True, **arrays):
    stream = io.BytesIO()
    scipy.io.savemat(stream, arrays, do_compression=compressed)
    return stream.getvalue()


def svhn_arrays(num):
    x = np.random.default_rng(num).integers(0, 256, (32, 32, 3, num), np.uint8)
    return {"X": x, "y": (np.arange(num, dtype=np.uint8) % 10 + 1).reshape(num, 1)}


@pytest.fixture
def svhn(monkeypatch):
    """Two files that count as SVHN, by name."""
    contents = {
        TRAIN_MAT: mat(**svhn_arrays(30)),
        TEST_MAT: mat(compressed=False, **svhn_arrays(20)),
    }
    count_as(datasets.SVHN, contents, monkeypatch)
    return contents


@pytest.fixture
def svhn_cache(cache):
    return cache.parent / "svhn"


@pytest.fixture
def svhn_mirror(svhn, monkeypatch):
    with serving(svhn) as server:
        set_mirrors("svhn", server.urls()[:1], monkeypatch)
        yield server


@pytest.fixture
def parsed(monkeypatch):
    """What SciPy's reader is given."""
    given, original = [], scipy.io.loadmat

    def loadmat(stream, **settings):
        given.append(stream.getvalue())
        return original(stream, **settings)

    monkeypatch.setattr(scipy.io, "loadmat", loadmat)
    return given


def load_svhn(**settings):
    return load("svhn", num_validation=10, progress=False, **settings)


def require_svhn(loaded):
    """That ``loaded`` is what the files of ``svhn`` hold."""
    x, x_test = (np.moveaxis(svhn_arrays(num)["X"], 3, 0) for num in (30, 20))
    c = np.array([1, 2, 3, 4, 5, 6, 7, 8, 9, 0] * 3, np.int32)
    assert same(loaded.train, {"x": x[:20], "c": c[:20]})
    assert same(loaded.validation, {"x": x[20:], "c": c[20:]})
    assert same(loaded.test, {"x": x_test, "c": c[:20]})
    assert (loaded.name, loaded.num_classes, loaded.x_shape) == ("svhn", 10, (32, 32, 3))


@pytest.mark.parametrize("place", ["", "svhn"])
@pytest.mark.parametrize("by", ["argument", "environment"])
def test_svhn_is_read_from_a_directory(tmp_path, svhn, monkeypatch, place, by, svhn_cache):
    for name, content in svhn.items():
        write(tmp_path / place / name, content)
    if by == "environment":
        monkeypatch.setenv("GUIDEBOOK_DATA", str(tmp_path))
    require_svhn(load_svhn(data_dir=tmp_path if by == "argument" else None))
    assert not svhn_cache.exists()


@pytest.mark.parametrize("compressed", [False, True])
def test_pixels_and_labels_of_svhn_are_where_they_belong(tmp_path, monkeypatch, compressed):
    x, y = np.zeros((32, 32, 3, 4), np.uint8), np.array([[10], [1], [9], [10]], np.uint8)
    pixels = {(3, 7, 1, 0): 11, (7, 3, 2, 0): 12, (31, 0, 0, 1): 13, (0, 31, 0, 3): 14}
    for place, value in pixels.items():
        x[place] = value
    contents = {name: mat(compressed, X=x, y=y) for name in datasets.SVHN}
    count_as(datasets.SVHN, contents, monkeypatch)
    for name, content in contents.items():
        write(tmp_path / name, content)
    loaded = load("svhn", data_dir=tmp_path, num_validation=0)
    for part in (loaded.train, loaded.test):
        for (row, column, channel, image), value in pixels.items():
            assert part["x"][image, row, column, channel] == value
        assert part["x"].sum() == 50
        assert (part["x"].shape, part["x"].dtype) == ((4, 32, 32, 3), np.uint8)
        assert part["x"].flags.c_contiguous
        assert part["x"].flags.writeable
        assert part["c"].dtype == np.int32
        assert list(part["c"]) == [0, 1, 9, 0]


def test_sizes_of_svhn(tmp_path, svhn, monkeypatch):
    x, y = np.zeros((32, 32, 3, 10_003), np.uint8), np.ones((10_003, 1), np.uint8)
    y[3:] = 2
    contents = svhn | {TRAIN_MAT: mat(X=x, y=y)}
    count_as(datasets.SVHN, contents, monkeypatch)
    for name, content in contents.items():
        write(tmp_path / name, content)
    loaded = load("svhn", data_dir=tmp_path)
    assert [len(part["x"]) for part in (loaded.train, loaded.validation, loaded.test)] == [
        3,
        10_000,
        20,
    ]
    assert set(loaded.train["c"]) == {1}
    assert set(loaded.validation["c"]) == {2}
    with pytest.raises(ValueError, match=r"num_validation: expected 0 to 10002, .*got 10003"):
        load("svhn", data_dir=tmp_path, num_validation=10_003)


def test_all_of_svhn(tmp_path, svhn):
    for name, content in svhn.items():
        write(tmp_path / name, content)
    loaded = load("svhn", data_dir=tmp_path, num_validation=0)
    assert (len(loaded.train["x"]), loaded.validation) == (30, None)


def test_a_directory_without_svhn_names_its_files(tmp_path, svhn):
    write(tmp_path / TRAIN_MAT, svhn[TRAIN_MAT])
    with pytest.raises(DatasetError) as caught:
        load("svhn", data_dir=tmp_path)
    message = str(caught.value)
    assert f"{tmp_path} or its folder svhn, got no {TEST_MAT}; give" in message
    assert f"no {TRAIN_MAT}" not in message


def test_auto_is_never_svhn(tmp_path, svhn, monkeypatch):
    for name, content in svhn.items():
        write(tmp_path / name, content)
    monkeypatch.setenv("GUIDEBOOK_DATA", str(tmp_path))
    assert load().name == "digits"


def test_svhn_is_downloaded_once(svhn_mirror, svhn, svhn_cache, monkeypatch, nobody, capsys):
    require_svhn(load_svhn())
    assert svhn_mirror.requests == [f"/one/{TRAIN_MAT}", f"/one/{TEST_MAT}"]
    assert {path.name: path.read_bytes() for path in svhn_cache.iterdir()} == svhn
    set_mirrors("svhn", (f"{nobody}{{}}",), monkeypatch)
    require_svhn(load_svhn())
    assert capsys.readouterr() == ("", "")


BAD_MAT = {
    "web page": (HTML, "a web page"),
    "empty": (b"", "an empty file"),
    "no .mat": (b"thesis" * 100, "other content"),
    "truncated": (mat(**svhn_arrays(30))[:-1], "other content"),
    "trailing": (mat(**svhn_arrays(30)) + b"\0", "other content"),
    "foreign": (mat(**svhn_arrays(31)), "other content"),
    "packed": (packed(mat(**svhn_arrays(31))), "other content"),
}


@pytest.mark.parametrize("kind", [*BAD_MAT, "missing", "cut"])
def test_a_bad_delivery_of_svhn_leaves_nothing(svhn_mirror, svhn, svhn_cache, kind, parsed):
    others = {"missing": (404, "404 Client Error"), "cut": ("cut", "IncompleteRead|prematurely")}
    answer, got = (BAD_MAT | others)[kind]
    svhn_mirror.answers[f"/one/{TRAIN_MAT}"] = answer
    with pytest.raises(DatasetError) as caught:
        load_svhn()
    message = str(caught.value)
    assert message.startswith(f"svhn: expected {TRAIN_MAT} in {svhn_cache} or from a mirror, got ")
    assert datasets.SOURCES["svhn"].mirrors[0].format(TRAIN_MAT) in message
    assert re.search(got, message)
    assert re.search(GET_FILES, message)
    assert kind not in BAD_MAT or datasets.SVHN[TRAIN_MAT] in message
    assert list(svhn_cache.iterdir()) == []
    assert parsed == []
    svhn_mirror.answers[f"/one/{TRAIN_MAT}"] = svhn[TRAIN_MAT]
    require_svhn(load_svhn())
    assert set(parsed) == set(svhn.values())


def test_svhn_may_be_packed(tmp_path, svhn, svhn_mirror):
    write(tmp_path / f"{TRAIN_MAT}.gz", packed(svhn[TRAIN_MAT]))
    write(tmp_path / TEST_MAT, packed(svhn[TEST_MAT]))
    require_svhn(load_svhn(data_dir=tmp_path))
    svhn_mirror.answers[f"/one/{TEST_MAT}"] = packed(svhn[TEST_MAT])
    require_svhn(load_svhn())


@pytest.mark.parametrize("kind", BAD_MAT)
def test_a_bad_svhn_in_the_cache_is_replaced(svhn_mirror, svhn, svhn_cache, kind, parsed):
    write(svhn_cache / TEST_MAT, BAD_MAT[kind][0])
    require_svhn(load_svhn())
    assert {path.name: path.read_bytes() for path in svhn_cache.iterdir()} == svhn
    assert set(parsed) == set(svhn.values())


@pytest.mark.parametrize("kind", BAD_MAT)
def test_a_bad_svhn_in_a_directory_is_an_error_and_is_not_parsed(
    tmp_path, svhn_mirror, svhn, monkeypatch, kind, parsed
):
    content, got = BAD_MAT[kind]
    write(tmp_path / TRAIN_MAT, content)
    write(tmp_path / "svhn" / TEST_MAT, svhn[TEST_MAT])
    monkeypatch.setenv("GUIDEBOOK_DATA", str(tmp_path))
    expected = f"svhn's {TRAIN_MAT} with SHA-256 {datasets.SVHN[TRAIN_MAT]}"
    for directory in (tmp_path, None):
        with pytest.raises(DatasetError, match=f"/{TRAIN_MAT}: expected {expected}, got {got}.*;"):
            load_svhn(data_dir=directory)
    assert parsed == []
    assert svhn_mirror.requests == []
    assert (tmp_path / TRAIN_MAT).read_bytes() == content


def test_svhn_of_an_impossible_size_is_not_read(tmp_path, svhn, monkeypatch):
    monkeypatch.setattr(datasets, "MAX_BYTES", MAX_BYTES)
    write(tmp_path / TEST_MAT, svhn[TEST_MAT])
    with (tmp_path / TRAIN_MAT).open("wb") as stream:
        stream.truncate(2**28 + 1)

    def read():
        expected = f"{TRAIN_MAT}: expected at most 268,435,456 bytes, got .*268,435,457{REMEDY}"
        with pytest.raises(DatasetError, match=expected):
            load_svhn(data_dir=tmp_path)

    assert peak_memory(read) < 1e6


def test_svhn_takes_the_memory_of_its_file_and_twice_its_images(tmp_path, svhn, monkeypatch):
    contents = {name: mat(**svhn_arrays(num)) for name, num in ((TRAIN_MAT, 300), (TEST_MAT, 9))}
    count_as(datasets.SVHN, contents, monkeypatch)
    for name, content in contents.items():
        write(tmp_path / name, content)
    images = 32 * 32 * 3 * 300
    assert peak_memory(lambda: load_svhn(data_dir=tmp_path)) < 3.2 * images + 1e6


X, Y = svhn_arrays(12).values()
RIGHT = r"X and y: expected uint8 \(32, 32, 3, N\) and \(N, 1\) of 1 to 10"
BAD_SVHN = {
    "no X": (mat(y=Y, x=X), "KeyError: 'X'"),
    "no y": (mat(X=X), "KeyError: 'y'"),
    "nothing": (mat(), "KeyError: 'X'"),
    "dtype": (mat(X=X.astype(np.uint16), y=Y), rf"{RIGHT}, got uint16 \(32, 32, 3, 12\)"),
    "floats": (mat(X=X / 255, y=Y), f"{RIGHT}, got float64"),
    "text": (mat(X="thesis", y=Y), rf"{RIGHT}, got <U6 \(1,\)"),
    "record": (mat(X={"a": 1}, y=Y), f"{RIGHT}, got "),
    "images first": (mat(X=X.transpose(3, 0, 1, 2), y=Y), rf"{RIGHT}, got uint8 \(12, 32, 32, 3\)"),
    "grey": (mat(X=X[:, :, 0], y=Y), rf"{RIGHT}, got uint8 \(32, 32, 12\)"),
    "small": (mat(X=X[:31], y=Y), rf"{RIGHT}, got uint8 \(31, 32, 3, 12\)"),
    "fewer labels": (mat(X=X, y=Y[1:]), rf"{RIGHT}, got .* and uint8 \(11, 1\)"),
    "a row": (mat(X=X, y=Y.T), rf"{RIGHT}, got .* and uint8 \(1, 12\)"),
    "cells": (mat(X=X, y=Y.astype(object)), ""),
    "0": (mat(X=X, y=Y - 1), rf"{RIGHT}, got .* of \[0 1 2 3 4 5 6 7 8 9\]"),
    "11": (mat(X=X, y=Y + 1), rf"{RIGHT}, got .* of \[ *2 .* 11\]"),
    "negative": (mat(X=X, y=Y * -1.0), rf"{RIGHT}, got .* of \[-10"),
    "between": (mat(X=X, y=Y - 0.5), rf"{RIGHT}, got .* of \[0.5"),
    "nan": (mat(X=X, y=Y * np.nan), rf"{RIGHT}, got .* of \[nan\]"),
    "unreadable": (mat(X=X, y=Y)[:-1000], "Error"),
}


@pytest.mark.parametrize("kind", BAD_SVHN)
def test_arrays_that_are_not_svhns_are_an_error_in_spite_of_the_sum(
    tmp_path, svhn, monkeypatch, kind
):
    content, message = BAD_SVHN[kind]
    count_as(datasets.SVHN, {TRAIN_MAT: content}, monkeypatch)
    write(tmp_path / TRAIN_MAT, content)
    write(tmp_path / TEST_MAT, svhn[TEST_MAT])
    expected = f"/{TRAIN_MAT}: expected the arrays of svhn, got one that cannot be read .*{message}"
    with pytest.raises(DatasetError, match=f"{expected}.*{REMEDY}"):
        load("svhn", data_dir=tmp_path, num_validation=1)


@pytest.mark.skipif(not given("svhn", TRAIN_MAT), reason="GUIDEBOOK_DATA holds no SVHN")
def test_the_real_svhn(monkeypatch):
    monkeypatch.setattr(datasets, "MAX_BYTES", MAX_BYTES)
    loaded = load("svhn", data_dir=GIVEN)
    assert loaded.train["x"].shape == (63_257, 32, 32, 3)
    assert loaded.validation["x"].shape == (10_000, 32, 32, 3)
    assert loaded.test["x"].shape == (26_032, 32, 32, 3)
    c = np.concatenate([loaded.train["c"], loaded.validation["c"]])
    counts = [4948, 13861, 10585, 8497, 7458, 6882, 5727, 5595, 5045, 4659]
    assert list(np.bincount(c)) == counts
    counts = [1744, 5099, 4149, 2882, 2523, 2384, 1977, 2019, 1660, 1595]
    assert list(np.bincount(loaded.test["c"])) == counts


# --- digits, and MNIST's absence ------------------------------------------------------------------


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    loaded = load("digits")
    assert [len(part["x"]) for part in (loaded.train, loaded.validation, loaded.test)] == [
        1197,
        300,
        300,
    ]
    assert (loaded.name, loaded.num_classes, loaded.x_shape) == ("digits", 10, (8, 8))
    original = load_digits()
    images = {
        (image.tobytes(), int(label))
        for image, label in zip(
            np.array([round(v * 255 / 16) for v in original.images.ravel()], np.uint8).reshape(
                -1, 8, 8
            ),
            original.target,
            strict=True,
        )
    }
    found = [
        (image.tobytes(), int(label))
        for part in (loaded.train, loaded.validation, loaded.test)
        for image, label in zip(part["x"], part["c"], strict=True)
    ]
    assert len(found) == 1797
    assert set(found) == images
    for part in (loaded.train, loaded.validation, loaded.test):
        assert part["x"].dtype == np.uint8
        assert set(part["c"]) == set(range(10))


def test_the_digits_test_set_never_changes():
    usual = load("digits")
    assert same(load("digits").train, usual.train)
    for number in (0, 1, 100, 1496):
        loaded = load("digits", num_validation=number)
        assert same(loaded.test, usual.test)
        assert len(loaded.train["x"]) == 1497 - number
        assert (loaded.validation is None) == (number == 0)
        assert loaded.validation is None or len(loaded.validation["x"]) == number
    with pytest.raises(ValueError, match=r"num_validation: expected 0 to 1496, .*got 1497"):
        load("digits", num_validation=1497)


def test_without_mnist_auto_takes_the_digits_and_says_so_loudly(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("GUIDEBOOK_DATA", str(tmp_path / "nothing"))
    assert same(load().train, load("digits").train)
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[0] == lines[-1] == "!" * 80
    assert "NOT MNIST" in lines[1]
    assert all(line.startswith("!!") for line in lines)
    for word in ("NOT MNIST", "digits", "--data-dir", "GUIDEBOOK_DATA", "--dataset mnist"):
        assert word in err
    for mirror in datasets.SOURCES["mnist"].mirrors:
        assert re.search(f"{mirror.format(TRAIN_X)}: .*refused", err)
    assert f"GUIDEBOOK_DATA (now {tmp_path / 'nothing'})" in err


def test_mnist_insists(capsys):
    with pytest.raises(DatasetError, match=r"mnist: expected .*--data-dir .*GUIDEBOOK_DATA"):
        load("mnist")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["MNIST", "cifar10", "", "images.txt", "npz", "x.mat"])
def test_an_unknown_name_lists_the_known(name):
    known = "auto, mnist, static-mnist, fashion-mnist, svhn, digits or the path"
    with pytest.raises(ValueError, match=f"name: expected {known} .*got '{name}'"):
        load(name)


# --- the user's own files -------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (28, 28), (5, 4, 3), (2, 9, 1)])
@pytest.mark.parametrize("dtype", ["u1", "?", "<f2", "<f4", ">f4", "<f8", "g"])
def test_own_images_of_any_size_and_type(tmp_path, shape, dtype):
    values = random_images(60, *shape)
    floats = (values / 255).astype(dtype)
    x = {"u1": values, "?": values > 127}.get(dtype, floats)
    expected = {"u1": values, "?": np.where(values > 127, 255, 0).astype(np.uint8)}.get(
        dtype, floats.astype(np.float32)
    )
    np.save(tmp_path / "mine.npy", x)
    loaded = load(str(tmp_path / "mine.npy"))
    assert (loaded.name, loaded.x_shape, loaded.num_classes) == ("mine.npy", shape, None)
    parts = (loaded.train, loaded.validation, loaded.test)
    assert [len(part["x"]) for part in parts] == [45, 5, 10]
    assert all(part.keys() == {"x"} for part in parts)
    found = np.concatenate([part["x"] for part in parts])
    assert found.dtype == expected.dtype
    assert sorted(image.tobytes() for image in found) == sorted(
        image.tobytes() for image in expected
    )


def test_own_images_in_fortran_order(tmp_path):
    x = random_images(30, 4, 3, 2)
    for order in "CF":
        np.save(tmp_path / f"{order}.npy", np.asarray(x, order=order))
    assert same(load(str(tmp_path / "F.npy")).train, load(str(tmp_path / "C.npy")).train)


def test_own_images_in_either_version_of_numpys_format(tmp_path):
    for version in (1, 2):
        with (tmp_path / f"{version}.npy").open("wb") as stream:
            np.lib.format.write_array(stream, random_images(30, 4, 3), (version, 0))
    assert same(load(str(tmp_path / "1.npy")).train, load(str(tmp_path / "2.npy")).train)


@pytest.mark.parametrize("names", [("x", "c"), ("x_train", "c_train")])
@pytest.mark.parametrize("save_as", [np.savez, np.savez_compressed])
def test_own_images_keep_their_labels(tmp_path, names, save_as):
    x = np.arange(100, dtype=np.uint8).repeat(4).reshape(100, 2, 2)
    save_as(tmp_path / "mine.npz", **dict(zip(names, (x, np.arange(100)), strict=True)))
    loaded = load(str(tmp_path / "mine.npz"))
    parts = (loaded.train, loaded.validation, loaded.test)
    assert [len(part["x"]) for part in parts] == [76, 8, 16]
    for part in parts:
        assert part["c"].dtype == np.int32
        np.testing.assert_array_equal(part["x"][:, 0, 0], part["c"])
    assert sorted(np.concatenate([part["c"] for part in parts])) == list(range(100))
    assert (loaded.name, loaded.num_classes) == ("mine.npz", 100)


def test_own_splits_are_kept(tmp_path):
    arrays = {
        f"{key}{end}": value
        for end, num in (("", 12), ("_validation", 5), ("_test", 13))
        for key, value in (("x", random_images(num, 3, 3)), ("c", np.arange(num) % 4 + num))
    }
    loaded = load(str(save(tmp_path / "mine.npz", **arrays)))
    for end, part in (
        ("", loaded.train),
        ("_validation", loaded.validation),
        ("_test", loaded.test),
    ):
        np.testing.assert_array_equal(part["x"], arrays[f"x{end}"])
        np.testing.assert_array_equal(part["c"], arrays[f"c{end}"])
    assert loaded.num_classes == 17  # the test set has the largest label
    with pytest.raises(ValueError, match=r"num_validation: expected none, .*x_validation, got 3"):
        load(str(tmp_path / "mine.npz"), num_validation=3)
    arrays = {key: value for key, value in arrays.items() if "validation" not in key}
    path = str(save(tmp_path / "mine.npz", **arrays))
    loaded = load(path, num_validation=3)
    assert [len(part["x"]) for part in (loaded.train, loaded.validation, loaded.test)] == [9, 3, 13]
    loaded = load(path, num_validation=0)
    np.testing.assert_array_equal(loaded.train["x"], arrays["x"])
    assert loaded.validation is None


def test_own_test_set_does_not_depend_on_the_validation_set(tmp_path):
    np.save(tmp_path / "mine.npy", random_images(50, 3, 3))
    path = str(tmp_path / "mine.npy")
    usual = load(path)
    assert same(load(path).train, usual.train)
    for number in (0, 1, 41):
        loaded = load(path, num_validation=number)
        assert same(loaded.test, usual.test)
        assert len(loaded.train["x"]) == 42 - number
    with pytest.raises(ValueError, match=r"num_validation: expected 0 to 41, .*got 42"):
        load(path, num_validation=42)


@pytest.mark.parametrize(("number", "least"), [(None, 3), (1, 3), (0, 2)])
def test_own_images_must_be_enough_to_split(tmp_path, number, least):
    path = tmp_path / "mine.npy"
    np.save(path, random_images(least, 3, 3))
    loaded = load(str(path), num_validation=number)
    assert len(loaded.train["x"]) == len(loaded.test["x"]) == 1
    np.save(path, random_images(least - 1, 3, 3))
    expected = rf"mine.npy: x: expected at least {least} images .*, got {least - 1}; give more"
    with pytest.raises(DatasetError, match=expected):
        load(str(path), num_validation=number)


def with_value(value):
    x = np.full((9, 3, 3), 0.5)
    x[4, 1] = value
    return x


GOOD = random_images(9, 3, 3)
NAMES = "perhaps c, x_test, c_test, x_validation, c_validation"
IN_UNIT = r"expected floats in \[0, 1\], got"
NOT_LABELS = "expected integers 0, 1, ..., one for each of 9 images, got"
NUMBER = "; number the classes from 0, and give one for each image"
BAD_ARRAYS = {
    "nan": ({"x": with_value(np.nan)}, f"x: {IN_UNIT} nan to nan; replace what is not finite"),
    "inf": ({"x": with_value(-np.inf)}, f"x: {IN_UNIT} -inf to 0.5; replace what is not finite"),
    "both inf": ({"x": with_value([-np.inf, np.inf, 0])}, f"{IN_UNIT} -inf to inf; replace"),
    "above": ({"x": with_value(1.001)}, f"{IN_UNIT} 0.5 to 1.001; .*divide"),
    "below": ({"x": with_value(-0.001)}, f"{IN_UNIT} -0.001 to 0.5; .*divide"),
    "0..255": ({"x": GOOD.astype(np.float32)}, rf"{IN_UNIT} .* to 2\d\d; .*divide .* 255"),
    "uint16": ({"x": GOOD.astype(np.uint16)}, "expected uint8, .*, got uint16; divide .* 65535"),
    "int64": ({"x": GOOD.astype(np.int64)}, "expected uint8, .*, got int64; divide"),
    "complex": ({"x": GOOD.astype(complex)}, "x: expected an array of numbers, got complex128;"),
    "text": ({"x": GOOD.astype(str)}, "x: expected an array of numbers, got <U3;"),
    "record": ({"x": np.zeros((9, 3, 3), "u1,f4")}, "x: expected an array of numbers, got"),
    "rank 0": ({"x": np.uint8(3)}, r"images \(N, H, W\) or .*, got shape \(\); reshape"),
    "rank 1": ({"x": GOOD[:, 0, 0]}, r"or a table \(N, D\), got shape \(9,\); reshape"),
    "rank 5": ({"x": GOOD.reshape(9, 3, 3, 1, 1)}, r"got shape \(9, 3, 3, 1, 1\); reshape"),
    "empty": ({"x": GOOD[:0]}, r"at least one number, got shape \(0, 3, 3\); add it"),
    "no width": ({"x": GOOD[:, :, :0]}, r"at least one number, got shape \(9, 3, 0\)"),
    "nothing": ({}, f"expected images or a table x or x_train, and {NAMES}, got nothing; save"),
    "no images": ({"c": np.arange(9)}, "expected images or a table x or .*, got c; save"),
    "keras": ({"x_train": GOOD, "y_train": GOOD}, "expected images .*, got x_train, y_train; save"),
    "both names": ({"x": GOOD, "x_train": GOOD}, "expected images .*, got x, x_train; save"),
    "only a test": (
        {"x_test": GOOD},
        "expected images or a table x or x_train, .*, got x_test; save",
    ),
    "labels alone": (
        {"x": GOOD, "c_test": np.arange(9)},
        "expected images or a table x or .*, got x, c_test; save .*, and no labels without their x",
    ),
    "labels for some": (
        {"x": GOOD, "c": np.arange(9), "x_test": GOOD},
        r"x_test: expected each x uint8 \(3, 3\), each c int32 .*, got each x uint8 \(3, 3\); save",
    ),
    "labels for others": (
        {"x": GOOD, "x_test": GOOD, "c_test": np.arange(9)},
        r"x_test: expected each x uint8 \(3, 3\), as .* got .*, each c int32 \(\); save both",
    ),
    "other size": (
        {"x": GOOD, "x_validation": random_images(9, 3, 4)},
        r"x_validation: expected each x uint8 \(3, 3\), .*got each x uint8 \(3, 4\); save",
    ),
    "other type": (
        {"x": GOOD, "x_test": GOOD / 255},
        r"x_test: expected each x uint8 .*, as .*got each x float32 \(3, 3\); save both alike",
    ),
    "bad test": ({"x": GOOD, "x_test": GOOD / 100}, r"x_test: expected floats in \[0, 1\]"),
    "fewer labels": (
        {"x": GOOD, "c": np.arange(8)},
        rf"c: {NOT_LABELS} int64 of shape \(8,\), 0 to 7{NUMBER}",
    ),
    "one-hot": ({"x": GOOD, "c": np.eye(9, dtype=int)}, rf"c: {NOT_LABELS} .*\(9, 9\), .*{NUMBER}"),
    "float labels": ({"x": GOOD, "c": np.ones(9)}, f"c: {NOT_LABELS} float64 .*{NUMBER}"),
    "bool labels": ({"x": GOOD, "c": np.ones(9, bool)}, f"c: {NOT_LABELS} bool .*{NUMBER}"),
    "negative": ({"x": GOOD, "c": np.arange(9) - 1}, f"c: {NOT_LABELS} .* -1 to 7{NUMBER}"),
    "enormous": ({"x": GOOD, "c": np.arange(9) + 2**40}, f"c: {NOT_LABELS} .* 109.*{NUMBER}"),
    "unsigned": (
        {"x": GOOD, "c": np.full(9, 2**64 - 1, np.uint64)},
        f"c: {NOT_LABELS} .* 1844.*{NUMBER}",
    ),
    "pickles": (
        {"x": GOOD.astype(object)},
        "x: expected an array of .*, got pickled objects; save",
    ),
}


@pytest.mark.parametrize("kind", BAD_ARRAYS)
def test_own_arrays_that_will_not_do_are_an_error(tmp_path, kind):
    arrays, message = BAD_ARRAYS[kind]
    path = save(tmp_path / "mine.npz", **arrays)
    with pytest.raises(DatasetError, match=f"mine.npz.*: .*{message}"):
        load(str(path))
    if arrays.keys() == {"x"}:
        np.save(tmp_path / "mine.npy", arrays["x"])
        with pytest.raises(DatasetError, match=f"mine.npy.*: .*{message}"):
            load(str(tmp_path / "mine.npy"))


class Bomb:
    def __reduce__(self):
        return (os.abort, ())


def test_pickles_are_not_opened(tmp_path):
    bombs = np.array([Bomb()] * 9, object).reshape(1, 3, 3)
    np.save(tmp_path / "mine.npy", bombs, allow_pickle=True)
    with pytest.raises(DatasetError, match="got pickled objects"):
        load(str(tmp_path / "mine.npy"))


RAW = npy(GOOD)
BAD_NPY = {
    "empty": (b"", "EOF|magic"),
    "web page": (HTML, "magic"),
    "version": (RAW[:6] + b"\7" + RAW[7:], "cannot be read"),
    "cut magic": (RAW[:5], "cannot be read"),
    "cut header": (RAW[:40], "cannot be read"),
    "cut": (RAW[:-1], "209 bytes, .*got 208"),
    "trailing": (RAW + b"\0", "209 bytes, .*got 210"),
    "terabytes": (
        npy_header((10**9, 64, 64)) + bytes(99),
        "4,096,000,000,128 bytes, as its header promises, got 227",
    ),
    "more than any": (
        npy_header((10**30, 64, 64)) + bytes(99),
        "4,096,000,.*, as its header promises, got 227",
    ),
    "gigabytes": (npy_header((10**6, 28, 28)) + bytes(99), "784,000,128 bytes.*got 227"),
    "negative": (npy_header((-9, -3, 3)) + bytes(81), r"shape \(-9, -3, 3\)"),
    "enormous header": (b"\x93NUMPY\2\0\xff\xff\xff\xff" + bytes(99), "cannot be read"),
    "nested header": (b"\x93NUMPY\1\0\x10\x27" + b"(" * 10_000, "cannot be read"),
    "code": (b"\x93NUMPY\1\0\x10\0" + b"__import__('os')", "cannot be read"),
}


@pytest.mark.parametrize("kind", BAD_NPY)
@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_npy_that_is_bad_is_an_error_and_takes_no_memory(tmp_path, kind, suffix):
    content, got = BAD_NPY[kind]
    path = tmp_path / f"mine.{suffix}"
    if suffix == "npy":
        path.write_bytes(content)
    else:
        zipped(path, x=content)

    def read():
        with pytest.raises(DatasetError, match=rf"mine.*: x: expected .*({got}).*{REMEDY}"):
            load(str(path))

    assert peak_memory(read) < 4e6


def lying(content, promise):
    """A zip file whose directory says that its member has ``promise`` bytes."""
    stream = io.BytesIO()
    zipped(stream, x=content)
    whole = bytearray(stream.getvalue())
    for mark, at in ((b"PK\1\2", 24), (b"PK\3\4", 22)):
        start = whole.index(mark) + at
        whole[start : start + 4] = struct.pack("<I", promise)
    return bytes(whole)


def miscounted():
    stream = io.BytesIO()
    zipped(stream, x=RAW)
    whole = bytearray(stream.getvalue())
    whole[-12:-10] = b"\2\0"
    return bytes(whole)


def with_bad_sum():
    stream = io.BytesIO()
    zipped(stream, zipfile.ZIP_STORED, x=RAW)
    return stream.getvalue().replace(RAW[-9:], bytes(9))


BAD_NPZ = {
    "empty": (b"", "not a zip file"),
    "web page": (HTML, "not a zip file"),
    "npy": (RAW, "not a zip file"),
    "cut": (lying(RAW, len(RAW))[:-1], "not a zip file"),
    "end alone": (b"PK\5\6" + bytes(18), "got nothing"),
    "bad sum": (with_bad_sum(), "Bad CRC-32"),
    "miscounted": (miscounted(), "2 arrays, as its end says, got 1"),
    "promises more": (lying(npy_header((10**6, 28, 28)), 784_000_128), "CRC|EOFError|got 128"),
    "holds more": (lying(npy_header((9, 3, 3)) + bytes(10**7), 209), "CRC"),
    "terabytes": (lying(RAW, 2**32 - 2), "at most 1,000,000,000 bytes, got 4,29"),
}


@pytest.mark.parametrize("kind", BAD_NPZ)
def test_npz_that_is_bad_is_an_error_and_takes_no_memory(tmp_path, kind):
    content, got = BAD_NPZ[kind]
    path = write(tmp_path / "mine.npz", content)

    def read():
        with pytest.raises(DatasetError, match=rf"mine.*: expected .*({got})(?s:.*){REMEDY}"):
            load(str(path))

    assert peak_memory(read) < 4e6


def test_a_zip_bomb_is_refused_by_its_header(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "half_of_memory", lambda: 10**7)
    path = zipped(tmp_path / "mine.npz", x=npy_header((10**5, 10, 10)) + bytes(10**7))
    assert path.stat().st_size < 20_000

    def read():
        with pytest.raises(
            DatasetError, match=r"mine.npz: expected at most 10,000,000 bytes, got 10,000,"
        ):
            load(str(path))

    assert peak_memory(read) < 1e6
    half = npy_header((5 * 10**4, 10, 10)) + bytes(5 * 10**6)
    path = zipped(tmp_path / "mine.npz", x=half, x_test=half)
    assert peak_memory(read) < 1e6


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="not Linux")
def test_half_of_memory_is_half_of_it():
    kibibytes = int(Path("/proc/meminfo").read_text().split()[1])
    assert pytest.approx(512 * kibibytes, rel=0.01) == HALF_OF_MEMORY


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressions_without_bounds_are_refused(tmp_path, compression):
    path = zipped(tmp_path / "mine.npz", compression, x=RAW)
    with pytest.raises(
        DatasetError, match=r"expected .*savez_compressed writes, got another compression; use it"
    ):
        load(str(path))


def test_two_members_of_one_name_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "mine.npz", "w") as archive:
        archive.writestr("x.npy", RAW)
        archive.writestr("x", RAW)
    with pytest.raises(DatasetError, match=r"expected images or a table x .*, got x, x; save"):
        load(str(tmp_path / "mine.npz"))


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_damaged_npz_is_an_error_or_the_same_arrays(tmp_path, compression):
    path = zipped(tmp_path / "mine.npz", compression, x=RAW, c=npy(np.arange(9)))
    right = load(str(path))

    def is_right(found, _):
        return all(same(getattr(found, p), getattr(right, p)) for p in ("train", "test"))

    num_read = fuzz(path, path.read_bytes(), 800, lambda path: load(str(path)), is_right)
    assert 0 < num_read < 400  # the time stamps of a zip file do not matter


def test_damaged_npy_is_an_error_or_what_numpy_reads(tmp_path):
    def is_right(found, mutant):
        x = np.load(io.BytesIO(mutant))
        parts = np.concatenate([part["x"] for part in (found.train, found.validation, found.test)])
        return parts.shape == x.shape and (
            x.dtype != np.uint8
            or sorted(image.tobytes() for image in parts) == sorted(image.tobytes() for image in x)
        )

    path = tmp_path / "mine.npy"
    num_read = fuzz(path, RAW, 800, lambda path: load(str(path)), is_right)
    assert 0 < num_read < 500  # a pixel or a blank may change


@pytest.mark.parametrize("suffix", ["npz", "csv"])
def test_another_file_larger_than_half_of_memory_says_how_to_stream(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(datasets, "half_of_memory", lambda: 8)
    path = write(tmp_path / f"mine.{suffix}", RAW)
    with pytest.raises(
        DatasetError, match=rf"mine.{suffix}: expected at most .*, got 209; save x by .* \.npy file"
    ):
        load(str(path))


# --- what a run keeps -----------------------------------------------------------------------------


def test_a_record_says_what_a_model_needs_and_survives_json(tmp_path):
    save(tmp_path / "mine.npz", x=random_images(30, 4, 3, 2), c=np.arange(30) % 7)
    for name, expected in (
        ("digits", Record("digits", (8, 8), 10, 1197)),
        (str(tmp_path / "mine.npz"), Record("mine.npz", (4, 3, 2), 7, 23)),
    ):
        loaded = load(name)
        assert loaded.record == expected
        assert len(loaded.train["x"]) == expected.num_data
        assert Record(**json.loads(json.dumps(dataclasses.asdict(expected)))) == expected
    np.save(tmp_path / "mine.npy", random_images(30, 4, 3))
    assert load(str(tmp_path / "mine.npy")).record.num_classes is None


# --- tables ---------------------------------------------------------------------------------------

TABLE = np.random.default_rng(0).normal(size=(30, 3)).astype(np.float32)


def as_csv(path, *lines):
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


def rows_of(table, *columns):
    return [",".join(map(repr, map(float, row))) for row in np.column_stack([table, *columns])]


@pytest.mark.parametrize("dtype", ["?", "u1", "<i8", "<f4", ">f8"])
def test_an_own_table_of_any_type_is_float32(tmp_path, dtype):
    x = (TABLE * 100).astype(dtype)
    np.save(tmp_path / "mine.npy", x)
    loaded = load(str(tmp_path / "mine.npy"))
    parts = [loaded.train["x"], loaded.validation["x"], loaded.test["x"]]
    assert loaded.x_shape == (3,)
    assert [part.dtype for part in parts] == [np.float32] * 3
    assert sorted(map(tuple, np.concatenate(parts))) == sorted(map(tuple, x.astype(np.float32)))


def test_a_csv_is_the_npz_of_its_columns(tmp_path):
    c = np.arange(30) % 4
    save(tmp_path / "mine.npz", x=TABLE, c=c)
    ours = load(str(tmp_path / "mine.npz"))
    for name in ("label", "c"):
        lines = rows_of(TABLE[:, :1], c, TABLE[:, 1:])
        path = as_csv(tmp_path / "mine.csv", f"\ufeffsize, {name} ,'weight',age", *lines, "", "")
        other = load(path)
        assert same(other.train, ours.train)
        assert same(other.validation, ours.validation)
        assert same(other.test, ours.test)
        assert other.num_classes == 4
    assert load(as_csv(tmp_path / "one.csv", "x", *rows_of(TABLE[:, :1]))).x_shape == (1,)


def test_a_record_has_the_columns_of_the_training_set(tmp_path):
    table = np.column_stack([TABLE, np.full(30, 0.1)])
    np.save(tmp_path / "mine.npy", table)
    loaded = load(str(tmp_path / "mine.npy"))
    record, x = loaded.record, loaded.train["x"].astype(np.float64)
    np.testing.assert_allclose(record.x_mean, x.mean(0), rtol=1e-6)
    np.testing.assert_allclose(record.x_std[:3], x.std(0)[:3], rtol=1e-6)
    assert record.x_std[3] == 0  # constant
    assert Record(**json.loads(json.dumps(dataclasses.asdict(record)))) == record
    assert load("digits").record.x_mean is None


BAD_CSV = {
    "empty": ([], "line 1: expected a first line of names, each of them once, got nothing; write"),
    "no names": (["1,2", "3,4"], "line 1: expected a first line of names.*, got 1, 2; write"),
    "twice": (["a,a", "3,4"], "line 1: expected .*each of them once, got a, a; write"),
    "nameless": ([",a", "3,4"], "line 1: expected .* names, .*got , a; write"),
    "semicolons": (["a;b", "3;4"], "line 1: .*got a;b; write .* with commas between"),
    "two labels": (["a,c,label", "1,2,3"], "line 1: expected at most one .*c or label, .*; rename"),
    "only labels": (["label", "1"], "line 1: expected a column of numbers, got label; add one"),
    "no lines": (["a,b"], "expected lines of numbers below the names, got none; add the data"),
    "short line": (["a,b", "1,2", "", "3"], "line 4: expected 2 numbers, one for .*, got 1; give"),
    "long line": (["a,b", "1,2,3"], "line 2: expected 2 numbers, one for each name, got 3; give"),
    "word": (["a,b", "1,2", "3,x y"], "line 3, column 'b': expected a finite number, got 'x y';"),
    "missing": (["a,b", "1,2", ",4"], "line 3, column 'a': expected a .*, got nothing; fill it in"),
    "nan": (["a,b", "1,nan"], "line 2, column 'b': expected a finite number, got 'nan'; fill"),
    "large": (["a,b", "1,1e39"], "x: expected finite numbers that float32 holds, got 1e"),
    "broken label": (
        ["a,label", "1,0", "", "1,1.5"],
        "line 4, column 'label': expected a label 0, 1, 2, .*, got 1.5; number the classes",
    ),
    "negative": (["c,a", "-1,0"], "line 2, column 'c': expected a label .*, got -1; number"),
    "enormous": (["c,a", "4e9,0"], "line 2, column 'c': expected a label .*, got 4e"),
    "too few": (["a,b", "1,2", "3,4"], "x: expected at least 3 rows to split, got 2; give more"),
}


@pytest.mark.parametrize("kind", BAD_CSV)
def test_a_bad_csv_is_one_line_that_says_where(tmp_path, kind):
    lines, message = BAD_CSV[kind]
    path = as_csv(tmp_path / "mine.csv", *lines)
    with pytest.raises(DatasetError, match=rf"^{path}[,:] {message}") as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_a_csv_that_is_no_text_is_an_error(tmp_path):
    for content in (b"\xff\xfe\x00", b"a,b\n1,\xff\n", gzip.compress(b"a,b\n1,2\n")):
        path = write(tmp_path / "mine.csv", content)
        with pytest.raises(DatasetError, match=rf"^{path}: expected lines of numbers .*; get the"):
            load(str(path))


def test_what_is_missing_in_a_table_is_an_error_that_says_where(tmp_path):
    x = TABLE.copy()
    x[4, 2] = np.nan
    np.save(tmp_path / "mine.npy", x)
    with pytest.raises(DatasetError, match=r"x: expected finite .*got nan in row 4, column 2 \(fr"):
        load(str(tmp_path / "mine.npy"))


def test_labels_of_a_table_are_counted_in_rows(tmp_path):
    path = save(tmp_path / "mine.npz", x=TABLE, c=np.arange(3))
    with pytest.raises(
        DatasetError, match=r"one for each of 30 rows, .*, and give one for each ro"
    ):
        load(str(path))
