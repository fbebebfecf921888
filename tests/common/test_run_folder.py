"""Run folders: what survives a kill, who may hold a folder, what is found again."""

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

import personalize
from personalize.common import files, run_folder
from personalize.common.errors import UserError
from personalize.common.files import (
    append_jsonl,
    explained,
    key_of,
    read_json,
    read_jsonl,
    sha256,
    slug,
    write_json,
    write_text,
    writing,
)

ROOT = Path(personalize.__file__).parents[1]


def python(code, *args, wait=True):
    """A Python process of its own with this package; `wait=False` hands it over running."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    if wait:
        process.communicate(timeout=30)
    return process


KILLED_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
from personalize.common.files import writing
with writing(Path(sys.argv[1])) as temporary:
    temporary.write_text("half of the n")
    os.kill(os.getpid(), signal.SIGKILL)
"""

KILLED_BEFORE_RENAME = """
import os, sys
from pathlib import Path
from personalize.common import files
os.replace = lambda *names: os._exit(9)
files.write_text(Path(sys.argv[1]), "the new text")
"""

HOLD = """
import sys, time
from pathlib import Path
from personalize.common import run_folder
with run_folder.lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


HOLD_A_MOMENT = """
import os, sys, time
from pathlib import Path
from personalize.common import errors, run_folder
(Path(sys.argv[1]) / f"ready-{os.getpid()}").touch()
while len(list(Path(sys.argv[1]).glob("ready-*"))) < 4:
    time.sleep(0.01)
try:
    with run_folder.lock(Path(sys.argv[1])):
        time.sleep(3)
        print("held")
except errors.UserError:
    print("refused")
"""


@pytest.mark.parametrize("code", [KILLED_WHILE_WRITING, KILLED_BEFORE_RENAME])
def test_a_write_killed_half_way_leaves_the_old_file_whole(tmp_path, code):
    path = tmp_path / "manifest.json"
    write_text(path, "the old text")
    assert python(code, path).returncode in (9, -signal.SIGKILL)
    assert path.read_text() == "the old text"


def test_what_a_killed_writer_left_is_removed_by_the_next_holder_only_if_it_is_dead(tmp_path):
    python(KILLED_WHILE_WRITING, tmp_path / "checkpoints" / "a.safetensors")
    assert len(list(tmp_path.rglob(".tmp-*"))) == 1
    with writing(tmp_path / "b.png") as mine:
        mine.write_bytes(b"b")
        with run_folder.lock(tmp_path):
            assert list(tmp_path.rglob(".tmp-*")) == [mine.parent]
    assert (tmp_path / "b.png").read_bytes() == b"b"


def test_an_error_while_writing_leaves_the_old_file_and_no_temporary(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(KeyboardInterrupt), writing(path) as temporary:
        temporary.write_text("{")
        raise KeyboardInterrupt
    assert read_json(path) == {"a": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_writing_keeps_the_suffix_and_makes_the_folder(tmp_path):
    path = tmp_path / "new" / "weights.safetensors"
    with writing(path) as temporary:
        assert temporary.name == path.name and temporary.parent.parent == path.parent
        (temporary.parent / "of-the-library").touch()
        temporary.write_bytes(b"w")
    assert path.read_bytes() == b"w" and os.listdir(path.parent) == ["weights.safetensors"]


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    for name in ("old", "new"):
        with writing(tmp_path / "model") as temporary:
            (temporary / "unet").mkdir(parents=True)
            (temporary / "unet" / name).write_text(name)
    assert os.listdir(tmp_path) == ["model"]
    assert os.listdir(tmp_path / "model" / "unet") == ["new"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_is_a_user_error():
    path = Path("/dev/full")
    with pytest.raises(UserError, match="/dev/full: No space left"), explained(path), open(path, "wb", 0) as full:
        full.write(b"x")


def test_json_at_fault_is_named_with_its_line(tmp_path):
    path = tmp_path / "manifest.json"
    path.write_text('{\n  "a": 1,\n  "b": }\n')
    with pytest.raises(UserError, match=re.escape(f"{path}, line 3")):
        read_json(path)
    with pytest.raises(UserError, match=r"missing\.json"):
        read_json(tmp_path / "missing.json")


@pytest.mark.parametrize("torn", [b'{"step": 3, "lo', b'{"step": 3, "name": "\xe7', b"\0\0\0\0", b"3"])
def test_a_torn_last_line_is_dropped_and_the_next_append_is_intact(tmp_path, torn):
    path = tmp_path / "log.jsonl"
    rows = [{"step": 1, "name": "狗"}, {"step": 2}]
    for row in rows:
        append_jsonl(path, row)
    with open(path, "ab") as file:
        file.write(torn)
    assert read_jsonl(path) == rows
    append_jsonl(path, {"step": 3})
    assert read_jsonl(path) == [*rows, {"step": 3}]
    assert path.read_bytes().count(b"\n") == 3


def test_a_whole_last_row_that_lacks_its_newline_is_kept(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}')
    append_jsonl(path, {"step": 2})
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}]


def test_a_torn_only_line_is_replaced(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"st')
    assert read_jsonl(path) == []
    append_jsonl(path, {"step": 1})
    assert path.read_bytes() == b'{"step": 1}\n'


def test_a_fault_inside_a_jsonl_file_is_not_passed_over(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(UserError, match="line 2"):
        read_jsonl(path)


def test_hashes_and_keys_name_content(tmp_path):
    path = tmp_path / "photo.png"
    path.write_bytes(b"pixels")
    assert sha256(path) == sha256(b"pixels") == hashlib.sha256(b"pixels").hexdigest()
    assert key_of({"a": 1, "b": [2.0]}) == key_of({"b": [2.0], "a": 1})
    assert key_of({"a": 1}) != key_of({"a": 2})
    assert re.fullmatch("[0-9a-f]{12}", key_of({}))


def test_a_manifest_of_this_or_an_older_schema_opens_and_of_a_newer_one_does_not(tmp_path):
    run_folder.write_manifest(tmp_path, {"status": "running", "seed": 3})
    assert run_folder.read_manifest(tmp_path) == {"status": "running", "seed": 3, "schema": run_folder.SCHEMA}
    path = tmp_path / "manifest.json"
    path.write_text('{"status": "finished"}')
    assert run_folder.read_manifest(tmp_path)["status"] == "finished"
    newer = json.dumps({"status": "finished", "schema": run_folder.SCHEMA + 1})
    path.write_text(newer)
    with pytest.raises(UserError, match=f"schema {run_folder.SCHEMA + 1}.*up to {run_folder.SCHEMA}"):
        run_folder.read_manifest(tmp_path)
    with pytest.raises(UserError, match="Update"):
        run_folder.write_manifest(tmp_path, {"status": "running"})
    assert path.read_text() == newer


@pytest.mark.parametrize("text", ["[]", '{"schema": "one"}', "{"])
def test_a_manifest_that_is_none_is_a_user_error(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json"):
        run_folder.read_manifest(tmp_path)


def test_a_folder_without_manifest_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"no manifest\.json"):
        run_folder.read_manifest(tmp_path / "photos")


def test_a_status_outside_the_list_is_a_programmers_mistake(tmp_path):
    with pytest.raises(AssertionError):
        run_folder.write_manifest(tmp_path, {"status": "done"})


def test_a_folder_held_by_a_live_process_is_refused_and_a_killed_ones_is_taken_over(tmp_path):
    process = python(HOLD, tmp_path, wait=False)
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UserError) as error, run_folder.lock(tmp_path):
            pass
        for part in (str(tmp_path), f"process {process.pid} ", os.uname().nodename):
            assert part in str(error.value)
    finally:
        process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, but a zombie until it is waited for
    assert (tmp_path / "lock").exists()
    with run_folder.lock(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    assert os.listdir(tmp_path) == ["lock.flock"]
    process.communicate()


def test_a_process_does_not_hold_a_folder_twice(tmp_path):
    with run_folder.lock(tmp_path), pytest.raises(UserError, match=f"process {os.getpid()} "), run_folder.lock(tmp_path):
        pass


@pytest.mark.parametrize("text", ["", "[]", '{"pid": 3}', '{"host": "elsewhere", "pid": 1, "started": "1"}'])
def test_what_the_text_of_an_earlier_lock_says_holds_nobody_up(tmp_path, text):
    """Older versions locked by that file alone, and a killed one left it."""
    (tmp_path / "lock").write_text(text)
    with run_folder.lock(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("text", ["", "[]", "{", '{"host": "h"}'])
def test_a_holder_who_has_not_said_yet_who_it_is_is_respected(tmp_path, text):
    with run_folder.lock(tmp_path):
        (tmp_path / "lock").write_text(text)
        with pytest.raises(UserError, match="is held by another process"), run_folder.lock(tmp_path):
            pass


def test_of_many_processes_at_once_one_holds_the_folder(tmp_path):
    processes = [python(HOLD_A_MOMENT, tmp_path, wait=False) for _ in range(4)]
    said = [process.communicate(timeout=60)[0] for process in processes]
    assert sorted(said) == ["held\n", *["refused\n"] * 3], said


def test_a_lock_is_given_back_after_an_error(tmp_path):
    with pytest.raises(ValueError), run_folder.lock(tmp_path):
        raise ValueError
    with run_folder.lock(tmp_path):
        pass


def test_newest_run_is_the_last_written_of_its_status(tmp_path):
    for second, (name, status) in enumerate([("b", "finished"), ("a", "finished"), ("c", "failed")]):
        run_folder.write_manifest(tmp_path / name, {"status": status})
        os.utime(tmp_path / name / "manifest.json", (second, second))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "manifest.json").write_text("{")
    assert run_folder.newest_run(tmp_path).name == "a"
    assert run_folder.newest_run(tmp_path, "failed").name == "c"
    with pytest.raises(UserError, match="no interrupted run in .*1 failed, 2 finished, 1 unread.*personalize train"):
        run_folder.newest_run(tmp_path, "interrupted")
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "nowhere"))):
        run_folder.newest_run(tmp_path / "nowhere")


def test_a_slug_is_a_safe_name_and_never_empty():
    assert slug("Étienne's  <dog>/../x") == "etienne-s-dog-x"
    assert len(slug("x" * 300)) == 60
    assert slug("狗") != slug("猫")
    assert re.fullmatch("[0-9a-f]{8}", slug("狗"))


def test_too_little_disk_is_refused_with_both_figures(tmp_path):
    run_folder.require_free_disk(tmp_path / "not" / "yet", 1)
    with pytest.raises(UserError, match=r"needs 1000000000\.00 GB, and \d+\.\d\d GB are free"):
        run_folder.require_free_disk(tmp_path / "not" / "yet", 10**18)


def test_pruning_keeps_the_newest_by_step_and_the_protected(tmp_path):
    for name in ("step-000100", "step-000200", "step-999900", "step-1000000", "step-new"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    gone = run_folder.prune_checkpoints(tmp_path, 2, {"step-000100"})
    assert [p.name for p in gone] == ["step-000200"]
    assert [p.name for p in run_folder.checkpoints(tmp_path)] == ["step-000100", "step-999900", "step-1000000"]
    assert run_folder.prune_checkpoints(tmp_path / "new", 2) == []


def test_library_versions_come_without_importing_the_libraries():
    code = "import sys; from personalize.common import run_folder as r; r.library_versions(); sys.exit('torch' in sys.modules)"
    process = python(code)
    assert process.returncode == 0
    assert run_folder.library_versions()["python"] == ".".join(map(str, sys.version_info[:3]))


CONTENDER = """
import os, sys
from pathlib import Path
from personalize.common.errors import UserError
from personalize.common.run_folder import lock
folder, held = Path(sys.argv[1]), 0
for _ in range(150):
    try:
        with lock(folder):
            os.close(os.open(folder / "inside", os.O_CREAT | os.O_EXCL))
            held += 1
            os.unlink(folder / "inside")
    except UserError:
        pass
print(held)
"""


def test_six_processes_never_hold_a_folder_at_once(tmp_path):
    contenders = [
        subprocess.Popen([sys.executable, "-c", CONTENDER, str(tmp_path)], stdout=subprocess.PIPE, text=True) for _ in range(6)
    ]
    held = [int(process.communicate(timeout=60)[0]) for process in contenders]
    assert all(process.returncode == 0 for process in contenders) and sum(held) > 30
    assert sorted(os.listdir(tmp_path)) == ["lock.flock"]


DISKS = [OSError(code, os.strerror(code)) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)]
DISKS += [shutil.Error([("a", "b", "No space left")]), SafetensorError("I/O error: No space left on device")]


@pytest.mark.parametrize("error", DISKS, ids=repr)
def test_a_disk_that_fails_is_one_error_that_names_the_file(tmp_path, error):
    path = tmp_path / "model.safetensors"
    with (
        pytest.raises(UserError, match=r"cannot write .*model.safetensors: .+Free or change the disk"),
        writing(path) as temporary,
    ):
        temporary.write_bytes(b"half")
        raise error
    assert os.listdir(tmp_path) == []


def test_cleaning_up_does_not_hide_the_error_that_came_first(tmp_path, monkeypatch):
    def fails(*args, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    with pytest.raises(UserError, match="a.json: No space left"), run_folder.lock(tmp_path), writing(tmp_path / "a.json"):
        monkeypatch.setattr(Path, "unlink", fails)
        monkeypatch.setattr("os.unlink", fails)
        monkeypatch.setattr("os.rmdir", fails)
        raise OSError(errno.ENOSPC, "No space left")


def test_what_is_written_for_its_owner_alone_is_given_to_whom_the_umask_lets(tmp_path):
    with writing(tmp_path / "w.safetensors") as temporary:
        temporary.touch(mode=0o600)
    assert (tmp_path / "w.safetensors").stat().st_mode & 0o777 == 0o666 & ~files.UMASK


def test_a_name_that_is_no_unicode_is_stored_escaped_and_read_back(tmp_path):
    name = os.fsdecode(b"caf\xe9.jpg")
    write_json(tmp_path / "a.json", {"path": name})
    append_jsonl(tmp_path / "a.jsonl", {"path": name})
    assert read_json(tmp_path / "a.json") == {"path": name} == read_jsonl(tmp_path / "a.jsonl")[0]
