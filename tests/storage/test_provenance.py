import json
import subprocess
import sys
from importlib import metadata

import latticeflow
from latticeflow.storage import provenance
from latticeflow.storage.provenance import _git_state


def test_provenance_names_software_machine_and_command():
    found = json.loads(json.dumps(provenance()))
    assert found["package_version"] == latticeflow.__version__
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {name: found[name] for name in ("torch", "numpy", "h5py")} == {
        name: metadata.version(name) for name in ("torch", "numpy", "h5py")
    }
    assert found["cpu_count"] >= found["cpus_usable"] >= 1
    assert found["command"] == sys.orig_argv
    assert found["started"].endswith("+00:00")


def test_the_commit_is_that_of_the_checkout_and_of_no_repository_around_it(tmp_path):
    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    assert _git_state(tmp_path) == (None, None)
    git("init")
    (tmp_path / "file").write_text("1")
    (tmp_path / "inside").mkdir()
    git("add", "file")
    git("commit", "-m", "first")
    commit, dirty = _git_state(tmp_path)
    assert (len(commit), dirty) == (40, False)
    assert _git_state(tmp_path / "inside") == (None, None)
    (tmp_path / "file").write_text("2")
    assert _git_state(tmp_path) == (commit, True)


def test_reading_an_ensemble_needs_no_torch():
    code = "import sys, latticeflow.storage as s; s.provenance(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_storage_imports_nothing_else_of_the_package():
    code = (
        "import sys, latticeflow.storage as s\n"
        "names = {n.split('.')[1] for n in sys.modules if n.startswith('latticeflow.')}\n"
        "assert names == {'storage'}, names\n"
        "assert all(hasattr(s, name) for name in s.__all__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
