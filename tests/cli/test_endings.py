"""How a command ends: one line for what a person can put right, JSON with --json, a stranger's names escaped."""

import json
import os
import subprocess
import sys

import pytest

from personalize.cli import app
from personalize.common.terminal import printable


@pytest.fixture
def ended(monkeypatch, capsys):
    """The command line -> exit status, stdout, stderr."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["personalize", *map(str, words)])
        for stream in (sys.stdout, sys.stderr):
            monkeypatch.setattr(stream, "reconfigure", lambda **options: None, raising=False)
        with pytest.raises(SystemExit) as end:
            app.main()
        return end.value.code, *capsys.readouterr()

    return call


@pytest.mark.parametrize(
    "text, shown",
    [("a\x1b[31mb", r"a\x1b[31mb"), ("a\nb", r"a\nb"), ("a\u202eb", r"a\u202eb"), ("a\udce9", r"a\udce9"), ("dög 猫", "dög 猫"),
     ("\x07\x08", r"\x07\x08"), ("a\u2066b", r"a\u2066b"), ("a\r", r"a\r")],
)  # fmt: skip
def test_what_moves_a_cursor_or_turns_a_line_is_shown_escaped(text, shown):
    assert printable(text) == shown


def test_a_name_of_a_file_reaches_the_screen_escaped(ended, tmp_path):
    (tmp_path / "a\x1b[31m\n.png").touch()
    status, out, err = ended("photos", tmp_path)
    assert status == 2 and out == "" and r"a\x1b[31m\n.png" in err and err.count("\n") == 1


def test_errors_are_json_where_the_result_would_be(ended):
    for words, said in ((["train", "nowhere", "--class", "dog", "--json"], "nowhere does not exist"),
                        (["train", "--jsonn", "--json"], "No such option")):  # fmt: skip
        status, out, err = ended(*words)
        error = json.loads(out)["error"]
        assert status == 2 and err == "" and error["kind"] == "error" and said in error["message"]


def test_another_exception_is_a_line_and_a_file_with_the_traceback(ended, monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr("personalize.commands.rare_tokens.tokens", lambda *a, **k: 1 / 0)
    status, out, err = ended("tokens")
    (log,) = tmp_path.iterdir()
    assert status == 1 and err.count("\n") == 1 and f"ZeroDivisionError: division by zero. Please report it with {log}" in err
    assert "1 / 0" in log.read_text() and "Traceback" in log.read_text()


def test_the_version(ended):
    status, out, _ = ended("--version")
    assert status == 0 and out.startswith("personalize ") and out[12].isdigit()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a full device")
def test_a_full_device_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "personalize", "--version"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1 and done.stderr == "error: cannot write the result to stdout: No space left on device\n"


@pytest.mark.parametrize(
    "words, said",
    [(["photos", ""], "the name of the photos is empty"), (["train", "p", "--class", "  "], "the class is empty"),
     (["photos", "~nouser/x"], "no such user"), (["photos", "x" * 300], "File name too long")],
    ids=["no name", "no class", "no user", "too long"],
)  # fmt: skip
def test_an_odd_name_is_one_line(ended, words, said):
    status, out, err = ended(*words)
    assert status == 2 and said in err and err.count("\n") == 1


def test_processes_without_a_launcher_are_refused(ended, monkeypatch, tiny_sd, photos, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.chdir(tmp_path)
    status, _, err = ended("train", photos, "--class", "dog", "--base", tiny_sd, "--quiet", "--device", "cpu")
    assert status == 2 and "WORLD_SIZE=2 is set, and RANK is not" in err


def test_a_file_among_good_photos_that_cannot_be_used_makes_the_status_1(ended, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ended("photos", photos, "--quiet")[0] == 0
    (tmp_path / "p").mkdir()
    for path in photos.iterdir():
        (tmp_path / "p" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "p" / "z.png").write_bytes(b"no image")
    assert ended("photos", tmp_path / "p", "--quiet")[0] == 1
