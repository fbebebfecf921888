"""The page in a browser: its server as a process, and the steps of a person who has never used it."""

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

from chromium import CHROMIUM

WAIT = 240_000  # ms, on a machine that does other things too
QUICK = {  # a training of seconds
    "train.steps": "40", "train.sample_every": "2", "train.checkpoint_minutes": "0", "prior.count": "0", "choose.every": "0",
    "draw.steps": "2", "draw.count": "1", "evaluate.count": "1",
}  # fmt: skip
SECTIONS = {"train": "Training", "prior": "Class images", "choose": "Choose", "draw": "Drawing", "evaluate": "Evaluate"}


class Server:
    """`personalize web` of a workspace, which may be killed and started again."""

    def __init__(self, workspace: Path):
        self.workspace = workspace
        self.start()

    def start(self) -> None:
        words = [sys.executable, "-m", "personalize", "web", str(self.workspace), "--port", "0"]
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, encoding="utf-8", env=environment)
        self.address = next(line.split()[-1] for line in self.process.stdout if line.startswith("the page: "))

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@contextmanager
def browser():
    """A chromium without a window -> playwright's browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        opened = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield opened
        finally:
            opened.close()


def opened(browser, server: Server, *, width: int = 1280, scheme: str = "light"):
    """The page in a new tab -> (it, the addresses that it asked for)."""
    page = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme).new_page()
    page.set_default_timeout(WAIT)
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(server.address)
    page.wait_for_selector("#photos-subject")
    return page, asked


def go(page, place: str) -> None:
    tab = page.get_by_role("tab", name=place, exact=True).first
    if tab.is_visible():
        tab.click()
    else:  # of a phone: behind the dots
        page.locator(".overflow-menu > button").first.click()
        page.locator(".overflow-dropdown button", has_text=place).first.click()
    page.wait_for_timeout(800)


def drop_photos(page, photos: list[Path], name: str = "my dog", class_word: str = "dog") -> None:
    page.locator("#photos-name textarea, #photos-name input").first.fill(name)
    page.locator("#photos-class textarea, #photos-class input").first.fill(class_word)
    page.locator("#photos-make").click()
    page.wait_for_function("document.querySelector('#photos-subject input').value != ''")
    page.locator("#photos-files input[type=file]").set_input_files([str(path) for path in photos])
    page.wait_for_selector("iframe.paper")


def set_fields(page, values: dict[str, str]) -> None:
    page.locator("#train-settings > button").click()
    for section in dict.fromkeys(key.split(".")[0] for key in values):
        page.locator("#train-settings").get_by_role("button", name=SECTIONS[section]).click()
    for key, value in values.items():
        field = page.locator(f"#set-{key.replace('.', '-').replace('_', '-')}").locator("textarea, input").first
        field.fill(value)
        field.blur()
    page.wait_for_selector(f".differences li >> nth={len(values) - 1}")


def wait_state(page, state: str) -> None:
    page.wait_for_selector(f".watched .state.{state}")


def wait_chosen(page, *fields: str) -> None:
    """Until the lists of these fields have come, with an entry chosen."""
    for field in fields:
        page.wait_for_function(f"document.querySelector('{field} input').value != ''")
