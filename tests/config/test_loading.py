"""Files: what is read, and how one that cannot be read is refused, by name and line."""

import pickle

import pytest

from latticeflow.config import ConfigError, load_config
from latticeflow.config.loading import parse_config


def refusal(path, *overrides):
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert str(path) in str(caught.value)
    return caught.value


def test_a_file_is_loaded_by_str_or_path(tmp_path, gauge):
    path = tmp_path / "run.toml"
    path.write_text(gauge, encoding="utf-8")
    assert load_config(path) == load_config(str(path)) == parse_config(gauge)
    assert load_config(path, ["run.seed=9"]).run.seed == 9


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_windows_files_are_read(tmp_path, gauge, newline, encoding):
    path = tmp_path / "run.toml"
    path.write_bytes(gauge.replace("\n", newline).encode(encoding))
    assert load_config(path) == parse_config(gauge)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    assert "No such file" in str(refusal(tmp_path / "absent.toml"))
    assert "directory" in str(refusal(tmp_path))
    with pytest.raises(ConfigError, match="null byte"):
        load_config("a\0b.toml")


def test_an_empty_file_misses_the_required_sections(tmp_path):
    path = tmp_path / "empty.toml"
    path.write_bytes(b"")
    assert [problem.path for problem in refusal(path).problems] == ["lattice", "action"]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16-le", "utf-32"])
def test_other_encodings_are_refused_with_the_line(tmp_path, gauge, encoding):
    path = tmp_path / "run.toml"
    path.write_bytes(f"# one\n# Ising \u00fc\n{gauge}".encode(encoding))
    line = "line 2" if encoding in ("latin-1", "utf-16-le") else "line 1"
    assert line in str(refusal(path))


@pytest.mark.parametrize(
    ("text", "line", "word"),
    [
        ("[run]\nseed = 1\nseed = 2\n", 3, "given twice"),
        ("[run]\nseed = 1\n\n[run]\n", 4, "given twice"),
        ("run = {seed = 1}\n[run.more]\n", 2, "given twice"),
        ("[run]\nseed = \n", 2, "invalid value"),
        ("[run]\nseed 7\n", 2, "expected '='"),
        ("[run]\ndevice = 'cpu\n", 2, "illegal character"),
        ("[run\nseed = 1\n", 1, "expected ']'"),
        ("\n\n[lattice]\nshape = [8,", 4, ""),
        ("a = 1\r\nb = = 2\r\n", 2, "invalid value"),
        ("a = 1\nb = " + "9" * 5000 + "\n", 2, "too many digits"),
    ],
)
def test_syntax_errors_name_the_line(tmp_path, text, line, word):
    path = tmp_path / "run.toml"
    path.write_bytes(text.encode())
    error = refusal(path)
    (problem,) = error.problems
    assert problem.path == f"line {line}"
    if word != "illegal character":
        assert word in str(problem)


def test_deep_nesting_is_refused(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("a = " + "[" * 20000, encoding="utf-8")
    assert "nested too deeply" in str(refusal(path))


def test_the_error_survives_pickling(tmp_path):
    error = refusal(tmp_path / "absent.toml")
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.problems, copy.source) == (str(error), error.problems, error.source)
