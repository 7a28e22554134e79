"""What the README says is what the package does."""

import re
from pathlib import Path

import pytest

from latticeflow.config import load_config
from latticeflow.config.reference import reference

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_configuration_reference_is_the_schema():
    found = re.search(r"<!-- reference: .*?-->\n(.*?)\n<!-- end of reference -->", README, flags=re.DOTALL)
    assert found is not None
    assert found[1].strip() == reference().strip()


def test_every_configuration_of_the_readme_exists_and_is_valid():
    named = set(re.findall(r"`(runs/[\w-]+\.toml)`", README))
    assert named == {f"runs/{path.name}" for path in (ROOT / "runs").glob("*.toml")}
    for name in named:
        load_config(ROOT / name)


def test_ci_calls_the_test_command_of_the_readme():
    assert 'pip install ".[test]" && pytest' in README
    assert 'pip install ".[test]" && pytest' in (ROOT / ".ci/run").read_text()


@pytest.mark.parametrize("script", re.findall(r"`python (runs/benchmarks/\w+\.py)`", README))
def test_benchmark_scripts_and_their_tables_exist(script):
    assert (ROOT / script).is_file()
    table = ROOT / "runs/benchmarks/results" / f"{Path(script).stem}.md"
    assert table.read_text().strip() in README
