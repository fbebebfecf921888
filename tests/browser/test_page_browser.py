"""The page in a real browser: a newcomer's whole way, and what every place keeps to."""

import json

import pytest

pytest.importorskip("gradio")
pytest.importorskip("playwright")

import pages
from chromium import CHROMIUM
from conftest import EXAMPLES

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason="no chromium")]
PHOTOS = sorted((EXAMPLES / "dog").glob("*.png"))


def test_a_newcomer_goes_from_photos_to_an_export_though_the_server_is_killed_on_the_way(tmp_path):
    server = pages.Server(tmp_path)
    try:
        with pages.browser() as browser:
            page, asked = pages.opened(browser, server)
            pages.drop_photos(page, PHOTOS)
            pages.go(page, "Train")
            pages.set_fields(page, pages.QUICK)
            page.locator("#train-start").click()
            page.wait_for_selector(".samples [role=img]")  # a sample while it trains
            server.kill()
            pid = json.loads((tmp_path / "web/jobs/0001.json").read_text())["pid"]
            before = (tmp_path / "runs/sks-dog/log.jsonl").read_text().count("\n")
            server.start()

            page, asked = pages.opened(browser, server)  # the page of the new server finds the training as it is
            pages.go(page, "Train")
            pages.wait_state(page, "running")
            assert json.loads((tmp_path / "web/jobs/0001.json").read_text())["pid"] == pid
            page.locator("#train-stop").click()
            pages.wait_state(page, "stopped")
            assert (tmp_path / "runs/sks-dog/log.jsonl").read_text().count("\n") >= before
            page.locator("#train-resume").click()
            pages.wait_state(page, "finished")
            steps = [json.loads(line)["step"] for line in (tmp_path / "runs/sks-dog/log.jsonl").read_text().splitlines()]
            assert steps == list(range(1, 41))

            pages.go(page, "Draw")
            page.wait_for_function("document.querySelector('#draw-run input').value.startsWith('sks')")
            page.locator("#draw-go").click()
            page.wait_for_selector("#draw-images img")

            pages.go(page, "Compare")
            pages.wait_chosen(page, "#compare-one", "#compare-two")
            page.locator("#compare-count input").fill("2")
            page.locator("#compare-go").click()
            for left, side in ((4, "left"), (3, "neither"), (2, "right")):
                page.wait_for_selector(f".ask:has-text('{left} left')")
                page.locator(f"#vote-{side}").click()
            page.wait_for_selector(".ask:has-text('1 left')")
            votes = [json.loads(line) for line in (tmp_path / "web/votes.jsonl").read_text().splitlines()]
            assert [vote["vote"] == "neither" for vote in votes] == [False, True, False]

            pages.go(page, "Runs")
            pages.wait_chosen(page, "#runs-run")
            page.locator("#runs-export").click()
            page.wait_for_selector(".note:has-text('written and checked')")
            assert (tmp_path / "runs/sks-dog/export").is_dir()
            assert not [url for url in asked if not url.startswith((server.address, "data:", "blob:"))]
    finally:
        server.kill()
