"""The notebook runs top to bottom."""

import itertools
import pathlib

import pytest

from jaxkv.cache.budgets import parse_budget
from jaxkv.presets import make_preset

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
    shipped = eval(f"dict({EVERYTHING})")  # what is left out is at least known
    for cache, budget in itertools.product(shipped["caches"], shipped["budgets"]):
        make_preset(cache), parse_budget(budget)
    table.source = table.source.replace(EVERYTHING, LESS)
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "quality.png").stat().st_size > 10_000
