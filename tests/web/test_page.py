"""The page shows what users wrote as text, reads nothing outside its workspace, and asks for a password elsewhere."""

import json
import re
import subprocess
import sys

import pytest

pytest.importorskip("gradio")

from personalize.commands.export.targets import TARGETS
from personalize.common.job_queue import FAILED, Job
from personalize.common.run_list import read_run
from personalize.web import app, runs

EVIL = "<img src=x onerror=alert(1)> ${1+1} {{value}} **bold**"
PROBE = """
import json, sys, urllib.error, urllib.request
from pathlib import Path
from personalize.web.app import serve

def ask(address):
    try:
        with urllib.request.urlopen(address, timeout=20) as answer:
            return answer.status, dict(answer.headers), answer.read(200_000).decode("utf-8", "replace")
    except urllib.error.HTTPError as error:
        return error.code, {}, error.read(2000).decode("utf-8", "replace")

root, said, found = Path(sys.argv[1]), [], {}
for name, password in (("open", ""), ("closed", "secret")):
    serve(root, port=0, password=password, say=said.append, wait=False)
    address = said[-1].split()[-1].rstrip("/")
    asked = {"page": "/", "config": "/config"} | {path: f"/gradio_api/file={path}" for path in sys.argv[2:]}
    found[name] = {key: ask(address + path) for key, path in asked.items()}
heavy = [name for name in ("torch", "diffusers", "transformers") if name in sys.modules]
print(json.dumps({"said": said, "found": found, "heavy": heavy}))
sys.stdout.flush()
import os
os._exit(0)
"""


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    root = tmp_path_factory.mktemp("page")
    work = root / "work"
    (work / "runs" / "a").mkdir(parents=True)
    (root / "secret.txt").write_text("secret")
    (work / "recipe.toml").write_text("secret")
    (work / "runs" / "a" / "recipe.toml").write_text("seed = 1")
    paths = ["/etc/passwd", f"{root}/secret.txt", f"{work}/runs/../../secret.txt", f"{work}/runs/%2e%2e/%2e%2e/secret.txt",
             f"{work}/recipe.toml", "../secret.txt", f"{work}/runs/a/recipe.toml"]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", PROBE, str(work), *paths], capture_output=True, encoding="utf-8", timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), paths


def test_only_files_of_the_workspace_are_given_out(probed):
    found, (*outside, inside) = probed[0]["found"]["open"], probed[1]
    assert [path for path in outside if found[path][0] not in (403, 404) or found[path][2] == "secret"] == []
    assert found[inside][::2] == [200, "seed = 1"]


def test_the_page_loads_nothing_from_elsewhere_and_imports_nothing_heavy(probed):
    status, headers, page = probed[0]["found"]["open"]["page"]
    assert status == 200 and "default-src 'self'" in headers["content-security-policy"]
    loaded = re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=[\"'](?:https?:)?//[^\"']*", page)
    assert not loaded and "fonts.googleapis" not in page
    assert probed[0]["heavy"] == []


def test_with_a_password_nothing_is_given_out_without_it(probed):
    found = probed[0]["found"]["closed"]
    assert found["config"][0] == 401 and all(found[path][0] in (401, 403) for path in probed[1])


def test_another_host_has_a_password(monkeypatch, tmp_path):
    launched, said = {}, []

    class Blocks:
        def launch(self, **options):
            launched.update(options)
            return None, "http://x/", None

    monkeypatch.setattr(app, "build", lambda page: Blocks())
    monkeypatch.setattr(app, "_known_decoders", lambda: None)
    monkeypatch.setattr(app.Jobs, "keep_going", lambda self: None)
    app.serve(tmp_path, host="0.0.0.0", say=said.append, wait=False)
    user, password = launched["auth"]
    assert len(password) >= 12 and password in said[0] and user in said[0]
    app.serve(tmp_path, say=said.append, wait=False)
    assert launched["auth"] is None and launched["server_name"] == "127.0.0.1"


def test_what_users_wrote_is_shown_as_text(tmp_path):
    manifest = {"status": "finished", "subjects": [{"prompt": EVIL}], "base": EVIL, "methods": [EVIL]}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest))
    job = Job(tmp_path / "0001.json", ["train"], EVIL, FAILED, 1, "")
    (tmp_path / "0001.log").write_text(f"error: {EVIL}")
    watched = {"job": job, "error": job.error, "log": job.log, "can_resume": True, "run": None, "steps": 0, "step": 0}
    shown = [
        app.text("runs", rows=[runs.row(read_run(tmp_path / "run"))]),
        app.text("watch", **watched, losses="", path="", samples=[]),
        app.text("note", lines=[EVIL]), app.text("asks", prompt=EVIL, left=1), app.text("row", row={"prompt": EVIL}, name=EVIL),
        app.text("differences", rows=[("train.prompt", "set-train-prompt", EVIL)]), app.text("frame", page=EVIL, title=EVIL),
    ]  # fmt: skip
    assert all("<img src=x" not in html and "&lt;img src=x" in html for html in shown)


def test_a_score_that_was_not_measured_is_never_a_number(tmp_path):
    (tmp_path / "manifest.json").write_text('{"status": "interrupted"}')
    html = app.text("runs", rows=[runs.row(read_run(tmp_path))])
    assert html.count("not measured") == 2 and "0.000" not in html


def test_the_page_exports_for_what_the_command_does():
    assert runs.FORMATS == TARGETS
