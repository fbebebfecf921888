"""In a real browser the report fits phone and desktop, loads all its images, asks for nothing, and has a dark side."""

import html as entities
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import reports
from PIL import Image

from personalize.evaluation.report.page import html

CHROMIUM = shutil.which("chromium")
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars",
)  # fmt: skip
DARK, LIGHT = 0, 1  # blink's preferredColorScheme
# the page in a frame as wide as a phone (a window cannot be), opened wherever it can be, and looked at from outside
FRAME = """<!doctype html><meta charset="utf-8"><meta name="color-scheme" content="light dark"><style>body{{margin:0}}
iframe{{border:0;display:block;width:{width}px;height:4000px}}</style><iframe srcdoc="{page}"></iframe><pre></pre><script>
document.querySelector("iframe").onload = async event => {{
  const inside = event.target.contentDocument, root = inside.documentElement;
  inside.querySelectorAll("details").forEach(one => one.open = true);
  const spans = [...inside.querySelectorAll("span.pic:not(.none)")];
  const urls = spans.map(one => getComputedStyle(one).backgroundImage.slice(5, -2));
  const sizes = await Promise.all(urls.map(async url => {{
    const one = new Image(); one.src = url;
    await one.decode().catch(() => 0);
    return one.naturalWidth;
  }}));
  const beyond = [...inside.querySelectorAll("main *")].filter(one => !one.closest(".box, svg")
    && one.getBoundingClientRect().right > root.clientWidth + 0.5).map(one => one.outerHTML.slice(0, 120));
  document.querySelector("pre").textContent = JSON.stringify({{
    width: root.clientWidth, needed: root.scrollWidth, beyond,
    images: [...inside.images].map(one => one.naturalWidth), styled: sizes,
    asked: inside.defaultView.performance.getEntriesByType("resource").map(one => one.name).filter(n => !n.startsWith("data:")),
    small: [...inside.querySelectorAll(".pic")].filter(one => one.getBoundingClientRect().width < 40).length,
  }});
}};
</script>"""
MANY = [f"a sks dog with a very long description of everything around it, number {k}" for k in range(25)]

pytestmark = [pytest.mark.browser, pytest.mark.skipif(not CHROMIUM, reason="there is no chromium")]


def browse(folder: Path, page: str, *flags: str) -> str:
    file = folder / "page.html"
    file.write_text(page, encoding="utf-8")
    command = [CHROMIUM, *QUIET, f"--user-data-dir={folder / 'browser'}", *flags, file.as_uri()]
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120, check=True).stdout


@pytest.mark.parametrize("width", [375, 768, 1280])
@pytest.mark.parametrize("prompts,size", [(None, 64), (MANY, 160)], ids=["toyland", "25 prompts"])
def test_the_page_fits_and_every_image_is_decoded(tmp_path, width, prompts, size):
    shown = reports.shown(prompts, 2, size=size)
    page = html(reports.evaluation(prompts, 2), shown)
    framed = FRAME.format(width=width, page=entities.escape(page))
    dom = browse(tmp_path, framed, "--window-size=1400,1000", "--virtual-time-budget=10000", "--dump-dom")
    found = json.loads(entities.unescape(re.search(r"<pre>(.+?)</pre><script>", dom, re.S)[1]))
    assert found["width"] == found["needed"] == width and not found["beyond"] and not found["asked"]
    assert found["images"] and all(found["images"]) and all(found["styled"])
    assert len(found["images"]) + len(set(found["styled"])) > 20 and not found["small"]


def test_the_dark_page_is_dark_and_the_light_one_light(tmp_path):
    page, corners = html(reports.evaluation(), reports.shown()), {}
    for scheme in (DARK, LIGHT):
        file = tmp_path / f"{scheme}.png"
        browse(
            tmp_path, page, f"--blink-settings=preferredColorScheme={scheme}", "--window-size=1280,900", f"--screenshot={file}"
        )
        with Image.open(file) as image:
            corners[scheme] = image.convert("RGB").getpixel((3, 3))
    assert corners == {DARK: (0x15, 0x17, 0x1B), LIGHT: (0xFD, 0xFD, 0xFC)}


def test_a_script_that_got_in_would_not_run(tmp_path):
    page = html(reports.evaluation(), reports.shown()).replace("</main>", "<script>document.title = 'ran'</script></main>")
    assert "<title>ran" not in browse(tmp_path, page, "--dump-dom")
