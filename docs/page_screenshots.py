"""Makes docs/page-*.png: the page's five places, as a person meets them who trains Toyland's dog.

PYTHONPATH=$PWD:$PWD/tests python docs/page_screenshots.py WORKSPACE    (an empty folder; chromium and playwright are needed)
"""

import sys
from pathlib import Path

import pages
from PIL import Image

HERE = Path(__file__).parent
SETTINGS = {
    "train.steps": "60", "train.sample_every": "10", "prior.count": "8", "choose.every": "20",
    "choose.prompts": "a {token} {class}", "draw.steps": "15", "evaluate.count": "1",
    "evaluate.prompts": "a {token} {class} swimming, a {token} {class} in the snow",
}  # fmt: skip


def shoot(page, place: str) -> None:
    """The whole place, in 256 colours."""
    file = HERE / f"page-{place.lower()}.png"
    page.wait_for_timeout(1500)
    page.screenshot(path=file, full_page=True)
    with Image.open(file) as image:
        image.convert("RGB").quantize(256).save(file, optimize=True)


def photos_and_train(page) -> None:
    pages.drop_photos(page, sorted((HERE.parent / "data_examples" / "dog").glob("*.png")))
    page.frame_locator("iframe.paper").locator("img, .pic").first.wait_for()
    shoot(page, "Photos")
    pages.go(page, "Train")
    pages.set_fields(page, SETTINGS)
    page.locator("#train-settings > button").click()  # folds it again
    page.locator("#train-start").click()
    page.wait_for_selector(".samples th[scope=col] >> nth=2")
    shoot(page, "Train")
    pages.wait_state(page, "finished")


def draw_compare_and_runs(page) -> None:
    pages.go(page, "Draw")
    page.wait_for_function("document.querySelector('#draw-run input').value.startsWith('sks')")
    page.get_by_label("The base beside it").check()
    page.locator("#draw-go").click()
    page.wait_for_selector("#draw-images img")
    shoot(page, "Draw")
    pages.go(page, "Compare")
    pages.wait_chosen(page, "#compare-one", "#compare-two")
    page.locator("#compare-prompts textarea").fill("a {token} {class} swimming")
    page.locator("#compare-go").click()
    page.wait_for_selector("#compare-left img")
    shoot(page, "Compare")
    pages.go(page, "Runs")
    pages.wait_chosen(page, "#runs-run")
    page.locator("#runs-evaluate").click()
    page.wait_for_selector("iframe.paper >> visible=true")
    shoot(page, "Runs")


def main(workspace: Path) -> None:
    server = pages.Server(workspace)
    try:
        with pages.browser() as browser:
            page, _ = pages.opened(browser, server)
            if not (workspace / "runs" / "sks-dog" / "model").exists():  # else it goes on
                photos_and_train(page)
            draw_compare_and_runs(page)
    finally:
        server.kill()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
