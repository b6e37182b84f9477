"""The notebook runs top to bottom."""

import pathlib

import pytest

NOTEBOOK = pathlib.Path(__file__).parent.parent / "demos" / "budgeted_cache.ipynb"

EVERYTHING = 'caches=["full", "scissorhands", "h2o", "recency", "random"],\n    budgets=["50%", "25%"]'
LESS = 'caches=["full", "h2o", "random"],\n    budgets=["25%"]'  # each pair is a program more, of half a minute


@pytest.mark.slow
@pytest.mark.smollm2
@pytest.mark.filterwarnings("default")  # the notebook machinery warns about itself
def test_notebook_runs(smollm2, tmp_path):
    import nbclient
    import nbformat

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (table,) = [cell for cell in notebook.cells if EVERYTHING in cell.source]
    table.source = table.source.replace(EVERYTHING, LESS)
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "quality.png").stat().st_size > 10_000
