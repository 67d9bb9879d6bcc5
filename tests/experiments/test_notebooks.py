"""The notebooks, run from top to bottom on small settings, and what is saved in them."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = {
    path.stem: path
    for path in (Path(__file__).parents[2] / "experiments/notebooks").glob("*.ipynb")
}

# What replaces the values in the cell tagged "parameters".
SMALL = {
    "a_the_toy": {"num_data": 500, "num_steps": 50},
    "b_swapping_guides": {"num_steps": 20, "num_samples": 5},
    "c_comparing_traces": {"num_steps": 40},
    "e_any_program": {"num_data": 20, "num_steps": 30},
    "f_few_labels": {"dataset": "digits", "num_labels": 20, "num_epochs": 1, "num_test": 20},
    "d_mnist_cvae": {"dataset": "digits", "num_epochs": 1, "num_test": 20, "num_samples": 8},
}


def read(name):
    return nbformat.read(NOTEBOOKS[name], as_version=4)


def code(name):
    return [cell for cell in read(name).cells if cell.cell_type == "code"]


def test_every_notebook_has_small_settings():
    assert NOTEBOOKS.keys() == SMALL.keys()


QUICK = "a_the_toy"


@pytest.mark.parametrize(
    "name", [QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in SMALL if n != QUICK)]
)
def test_a_notebook_runs(name, tmp_path):
    notebook = read(name)
    (parameters,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    names = [part.strip() for part in parameters.source.split("=")[0].split(",")]
    assert names == list(SMALL[name])
    parameters.source = "\n".join(f"{key} = {value!r}" for key, value in SMALL[name].items())
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()


@pytest.mark.parametrize("name", SMALL)
def test_a_notebook_is_saved_as_it_ran(name):
    cells = code(name)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert any(cell.outputs for cell in cells)
    assert all(output.output_type != "error" for cell in cells for output in cell.outputs)
    assert all(output.get("name") != "stderr" for cell in cells for output in cell.outputs)
    assert NOTEBOOKS[name].stat().st_size < 500_000  # small pictures
    assert all(cell.source.count("\n") < 20 for cell in cells)


@pytest.mark.parametrize(
    "name", ["a_the_toy", "b_swapping_guides", "c_comparing_traces", "e_any_program"]
)
def test_swapping_the_guide_is_one_word(name):
    """Cells that make a guide of the catalogue differ from their neighbours in nothing else."""
    swaps = [cell.source for cell in code(name) if cell.source.startswith("guide = guides.")]
    rest = {source.split("(model)", 1)[1] for source in swaps}
    assert len(swaps) >= 2
    assert len(rest) <= 2  # one use of the guide, or two where it is judged in two ways
