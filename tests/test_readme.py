"""README.md and its pages keep their word: Python is executed, commands are executed or checked.

``python`` blocks of a page are one program, executed from top to bottom in an empty directory. The
section of ``SLOW_SECTION`` is left out. A slow test executes it after all imports above it.

``bash`` blocks hold one command a line, and each is executed or checked by the rule of ``check``
that knows it; so is a command within a sentence, `` `uv sync` ``. An experiment's settings are
checked. The last command that names a script is executed, in an empty directory, with the page's
arguments and the settings of ``SMALL`` after them. A block that begins with ``# my_model.py`` is a
file of that name there, and ``my.npz`` has data for it. What would take long or change the machine
is only checked: an installation names extras that exist, a benchmark accepts its arguments and
``--help``, and the test suite is started as in ``.ci/run``. A command that no rule knows fails.

``text`` blocks show output, which differs from machine to machine, and ``bibtex`` blocks cite:
these two are exempt. A block in any other language fails, and so does code without a fence.
"""

import contextlib
import importlib
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import tyro

ROOT = Path(__file__).parents[1]
PAGES = {
    name: (ROOT / name).read_text()
    for name in ("README.md", "models/README.md", "inference/README.md", "experiments/README.md")
}
CI = (ROOT / ".ci" / "run").read_text().splitlines()
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
NAME = PYPROJECT["project"]["name"]
EXTRAS = PYPROJECT["project"]["optional-dependencies"]
GROUPS = PYPROJECT["dependency-groups"]

# Settings that make an experiment take seconds, by the script's name; they come after the
# README's own, and the last one counts.
SMALL = {
    "mnist_vae": "--dataset digits --num-epochs 1 --num-test 20 --num-samples 5 --no-progress",
    "mnist_cvae": "--dataset digits --num-epochs 1 --num-test 20 --num-samples 5 --no-progress "
    "--num-label-samples 2",
    "mnist_quadrants": "--dataset digits --baseline-epochs 1 --num-epochs 1 --num-validation 50 "
    "--num-train 200 --num-test 20 --num-samples 5 --no-progress",
    "svhn_vae": "--dataset digits --channels 4 8 --hidden 8 --num-epochs 1 --num-train 200 "
    "--num-test 20 --num-samples 5 --no-progress",
    "ladder": "--dataset digits --num-epochs 1 --num-train 200 --num-test 20 --num-samples 5 "
    "--num-components 5 --no-progress",
    "mnist_semi": "--dataset digits --num-labels 20 --rows term --num-draws 1 --num-epochs 1 "
    "--num-test 20 --num-samples 5 --num-label-samples 2 --no-progress",
    "compare": "",
    "diagnose": "--num-data 5 --num-simulations 50 --num-samples 30 --num-steps 10 --no-progress",
    "runs": "",
    "train": "--num-epochs 1 --num-samples 5 --no-progress",
    "linear_gaussian": "--dataset digits --num-train 200 --num-latents 3 --num-steps 20 "
    "--no-progress",
    "exact": "--quick --num-steps 20 --no-progress",
    "certify": "--quick --judges log_likelihood --no-progress",
    "gaussian_mean": "--num-data 2000 --num-steps 100 --batch-size 100 --num-seeds 2 --no-progress",
}


class ReadmeError(Exception):
    """A line of the README that does not work, or that no rule knows."""


def refuse(number: int, line: str, message: str) -> None:
    raise ReadmeError(f"README.md, line {number}: {message}; got: {line.strip()}")


TABLES = {"certify", "runs"}  # scripts without a run directory


# --- reading --------------------------------------------------------------------------------------


class Block(NamedTuple):
    """Lines between fences, or between blocks in "prose"; ``first`` is the first one's number."""

    language: str
    first: int
    lines: list[str]


def read_blocks(text: str) -> list[Block]:
    blocks, fence, indent = [Block("prose", 1, [])], None, ""
    for number, line in enumerate(text.splitlines(), start=1):
        opening = re.fullmatch(r"(\s*)(`{3,}|~{3,})\s*(\S*).*", line)
        if fence is None and opening:
            indent, fence, language = opening.groups()
            if language not in ("python", "bash", "text", "bibtex"):
                refuse(number, line, "expected a block of python, bash, text or bibtex")
            blocks.append(Block(language, number + 1, []))
        elif fence is not None and re.fullmatch(rf"{fence}{fence[0]}*", line.strip()):
            fence, indent = None, ""
            blocks.append(Block("prose", number + 1, []))
        else:
            before = blocks[-1].lines[-1:]
            if fence is None and re.match(r"    +\S|\t", line) and not "".join(before).strip():
                refuse(number, line, "expected code between fences, not indented")
            blocks[-1].lines.append(line.removeprefix(indent))
    if fence is not None:
        refuse(blocks[-1].first - 1, fence, "expected a fence that closes this one")
    return blocks


def read_python(text: str) -> str:
    """The program, each line at its number in the README, which tracebacks then name."""
    program = [""] * len(text.splitlines())
    for language, first, lines in read_blocks(text):
        if language == "python":
            program[first - 1 : first - 1 + len(lines)] = lines
    return "\n".join(program)


def read_commands(text: str) -> Iterator[tuple[int, str]]:
    """Commands and their line numbers. A backslash at the end of a line continues it."""
    for language, first, lines in read_blocks(text):
        begun = ""
        for number, line in enumerate(lines, start=first):
            if language == "prose":
                for command in re.findall(r"`((?:git|pip|python|uv) [^`]+)`", line):
                    yield number, command
            if language == "bash":
                begun += line.strip()
                if begun.endswith("\\") and number < first + len(lines) - 1:
                    begun = begun[:-1]
                else:
                    if begun and not begun.startswith("#"):
                        yield number, begun
                    begun = ""


# --- the rules ------------------------------------------------------------------------------------


def execute_python(text: str, directory: Path) -> None:
    program = directory / "program.py"
    program.write_text(read_python(text))
    with contextlib.chdir(directory):
        runpy.run_path(str(program), run_name="readme")


def check_command(number: int, command: str, directory: Path, runs: bool = True) -> None:
    """Executes the command in ``directory`` if ``runs``, or checks it, or fails."""
    try:
        for simple in re.split(r"\s&&\s", command):
            check(shlex.split(simple, comments=True), directory, runs)
    except ReadmeError as error:
        refuse(number, command, str(error))
    except ValueError as error:
        refuse(number, command, f"expected words: {error}")


def check(words: list[str], directory: Path, runs: bool = True) -> None:
    if shlex.join(words) in CI:
        return  # word for word what is run to check every change
    settings = {}
    while words and re.fullmatch(r"[A-Z][A-Z0-9_]*=.*", words[0]):
        name, _, settings[name] = words.pop(0).partition("=")
    match words:
        case ["uv", "run", *words]:
            words = without_extras(words)
            if words and words[0].endswith(".py"):
                words = ["python", *words]
        case ["uv", "pip", "install", *_]:
            words = words[1:]

    match words:
        case ["git", "clone", address] if address.startswith("https://"):
            pass
        case ["cd", name] if name == NAME or (ROOT / name).is_dir():
            pass
        case ["uv", "sync", *options] if not without_extras(options):
            pass
        case ["pip", "install", *requirements]:
            for requirement in requirements:
                check_requirement(requirement)
        case ["pytest", path] if (ROOT / path).exists():
            pass
        case ["python", script, *arguments] if script.startswith("experiments/"):
            check_arguments(script, arguments)
            if not runs:
                pass
            elif script.startswith("experiments/benchmarks/"):
                execute([str(ROOT / script), "--help"], settings, directory)
            else:
                execute_experiment(script, arguments, settings, directory)
        case _:
            raise ReadmeError("expected a command that a rule of this test executes or checks")


def without_extras(words: list[str]) -> list[str]:
    """The words after the leading ``--extra`` and ``--group``, which must name what exists."""
    declared = {"--extra": EXTRAS, "--group": GROUPS}
    while len(words) > 1 and words[0] in declared:
        option, name, *words = words
        if name not in declared[option]:
            raise ReadmeError(f"expected one of {', '.join(declared[option])} after {option}")
    return words


def check_requirement(requirement: str) -> None:
    """``-e``, uv, or this project by directory, name or address, with extras that exist."""
    if requirement in ("-e", "uv"):
        return
    known = re.fullmatch(rf"(\.|{NAME})(\[(?P<extras>.*)\])?( @ git\+https://\S+)?", requirement)
    if not known:
        raise ReadmeError(f"expected to install {NAME}, not {requirement}")
    extras = known["extras"].split(",") if known["extras"] else []
    if not set(extras) <= EXTRAS.keys():
        raise ReadmeError(f"expected extras among {', '.join(EXTRAS)}")


def check_arguments(script: str, arguments: list[str]) -> None:
    """The script's configuration accepts the README's arguments as they stand."""
    if not (ROOT / script).is_file():
        raise ReadmeError(f"expected a script, and there is no {script}")
    config = importlib.import_module(script.removesuffix(".py").replace("/", ".")).Config
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            tyro.cli(config, args=arguments)
    except SystemExit as error:
        if error.code:
            complaint = " ".join(re.findall(r"[^\s│╭╮╰╯─]+", said.getvalue()))
            raise ReadmeError(f"expected arguments that {script} accepts: {complaint}") from None


def execute_experiment(
    script: str, arguments: list[str], settings: dict[str, str], directory: Path
) -> None:
    small = SMALL.get(Path(script).stem)
    if small is None:
        raise ReadmeError(f"expected small settings for {script} in SMALL")
    execute([str(ROOT / script), *arguments, *small.split()], settings, directory)
    writes = "--help" not in arguments and Path(script).stem not in TABLES
    if writes and not list(directory.rglob("result.json")):
        raise ReadmeError("expected a result.json")


def execute(arguments: list[str], settings: dict[str, str], directory: Path) -> None:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=directory,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=600,
    )
    if done.returncode:
        raise ReadmeError(f"expected exit status 0, not {done.returncode}: {done.stderr}")
    if re.search(r"\w+Warning: ", done.stderr):
        raise ReadmeError(f"expected no warnings: {done.stderr}")
    if not done.stdout.strip():
        raise ReadmeError("expected output")


# --- the pages -----------------------------------------------------------------------------------

COMMANDS = [(page, *found) for page, text in PAGES.items() for found in read_commands(text)]
LAST = {  # the line that executes a script
    script: (page, number)
    for page, number, command in COMMANDS
    for script in re.findall(r"experiments/[\w/]+\.py", command)
}


def test_there_are_python_and_commands():
    readme = PAGES["README.md"]
    assert read_python(readme).strip(), "README.md: expected a block of python, got none"
    assert list(read_commands(readme)), "README.md: expected a command, got none"


# By page, the heading of a section whose Python takes long. Nothing after it needs it, and it needs
# nothing above it but what is imported.
SLOW_SECTION = {"README.md": "## Believing a fit"}


def section_of(page):
    """The section's first line and the one after its last, from 0. Without one, no lines."""
    lines = PAGES[page].splitlines()
    if page not in SLOW_SECTION:
        return len(lines), len(lines)
    first = lines.index(SLOW_SECTION[page])
    return first, next(i for i in range(first + 1, len(lines)) if lines[i].startswith("## "))


def without_section(page):
    lines = PAGES[page].splitlines()
    first, after = section_of(page)
    return "\n".join([*lines[:first], *[""] * (after - first), *lines[after:]])


def section_alone(page):
    """The section. Above it, of Python there are only the imports."""
    lines, program = PAGES[page].splitlines(), read_python(PAGES[page]).splitlines()
    first, after = section_of(page)
    for i, line in enumerate(program[:first]):
        if line and not line.startswith(("import ", "from ")):
            lines[i] = ""
    return "\n".join(lines[:after])


QUICK_PAGE = "README.md"


@pytest.mark.parametrize(
    "page",
    [
        page if page == QUICK_PAGE else pytest.param(page, marks=pytest.mark.slow)
        for page, text in PAGES.items()
        if read_python(text).strip()
    ],
)
def test_python(page, tmp_path):
    execute_python(without_section(page), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("page", SLOW_SECTION)
def test_python_of_a_slow_section(page, tmp_path):
    execute_python(section_alone(page), tmp_path)


# Scripts that take long here, and that tests/experiments runs too.
LONG = ("mnist_quadrants.py", "svhn_vae.py", "linear_gaussian.py", "mnist_cvae.py", "compare.py")
LONG += ("exact.py", "train.py", "diagnose.py", "certify.py", "mnist_semi.py", "ladder.py")


def write_own_files(page, directory):
    """The user's files that a command on the page names."""
    for language, _, lines in read_blocks(PAGES[page]):
        if language == "python" and lines[0] == "# my_model.py":
            (directory / "my_model.py").write_text("\n".join(lines))
            c, x = np.random.default_rng(0).normal(size=(2, 50))
            np.savez(directory / "my.npz", c=c, x=x)


@pytest.mark.parametrize(
    ("page", "number", "command"),
    [pytest.param(*found, id=f"{found[0]} {found[1]}: {found[2]}") for found in COMMANDS],
)
def test_command(page, number, command, tmp_path):
    write_own_files(page, tmp_path)
    is_long = any(script in command for script in LONG)
    check_command(number, command, tmp_path, runs=(page, number) in LAST.values() and not is_long)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "number", "command"),
    [
        pytest.param(*found, id=f"{found[0]} {found[1]}: {found[2]}")
        for found in COMMANDS
        if found[:2] in LAST.values() and any(script in found[2] for script in LONG)
    ],
)
def test_a_long_command(page, number, command, tmp_path):
    write_own_files(page, tmp_path)
    check_command(number, command, tmp_path)


def anchors(page):
    """The names that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", PAGES[page], flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_links_to_exists(page):
    here = (ROOT / page).parent
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (here / name).resolve() if name else ROOT / page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(str(path.relative_to(ROOT))), target


# --- the rules, tested ----------------------------------------------------------------------------


def check_commands(text, directory):
    for number, command in read_commands(text):
        check_command(number, command, directory)


@pytest.mark.parametrize(
    "text",
    [
        "```bash\nmake all\n```",
        "```bash\n$ uv sync\n```",
        "```bash\nuv sync && make all\n```",
        "```bash\nuv sync | cat\n```",
        "```bash\nuv run pytest --no-such-option\n```",
        "```bash\nuv sync --extra no-such-extra\n```",
        "```bash\npip install 'guidebook[no-such-extra]'\n```",
        "```bash\npip install no-such-package\n```",
        "```bash\npython experiments/no_such_script.py\n```",
        "```bash\npython experiments/gaussian_mean.py --no-such-option 1\n```",
        "```bash\npython experiments/gaussian_mean.py --num-data many\n```",
        "```bash\npython experiments/gaussian_mean.py --sigma 0\n```",
        "```bash\npython experiments/benchmarks/speed.py --rounds many\n```",
        "```bash\nuv sync \\\n  --no-such-option\n```",
        "```bash\nuv sync \\\n```",
        "```bash\npip install 'guidebook\n```",
        "Then `uv synchronise` it.",
        "```sh\nuv sync\n```",
        "```\nuv sync\n```",
        "~~~\nuv sync\n~~~",
        "Then\n\n    uv sync\n",
        "```bash\nuv sync\n",
    ],
)
def test_what_no_rule_allows_is_named(text, tmp_path):
    with pytest.raises(ReadmeError, match=r"README.md, line \d: expected .*; got: ."):
        check_commands(text, tmp_path)


@pytest.mark.parametrize(
    "command",
    [
        "git clone https://example.org/guidebook && cd guidebook",
        "uv sync --extra cuda  # with a GPU",
        "pip install -e '.[cuda]'",
        "uv pip install 'guidebook[cuda] @ git+https://example.org/guidebook'",
        "uv run pytest",
        "uv run pytest tests/test_readme.py",
    ],
)
def test_what_is_checked_without_being_executed(command, tmp_path):
    check_command(1, command, tmp_path)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("raise SystemExit(3)", "exit status 0, not 3"),
        ("import warnings\nwarnings.warn('old', FutureWarning)\nprint(1)", "FutureWarning: old"),
        ("", "expected output"),
    ],
)
def test_a_script_that_fails_warns_or_is_silent_is_refused(program, message, tmp_path):
    with pytest.raises(ReadmeError, match=message):
        execute(["-c", program], {}, tmp_path)


def test_python_is_one_program_that_keeps_its_line_numbers(tmp_path):
    text = "```python\nx = 1\n```\n\n- a list\n\n  ```python\n  y = x + 1\n  assert y == 3\n  ```\n"
    with pytest.raises(AssertionError) as caught:
        execute_python(text, tmp_path)
    assert caught.traceback[-1].lineno + 1 == 9
