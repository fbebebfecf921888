"""Chromium without a window: what it measures of a page, its screenshot, and what is in the page after loading."""

import html
import json
import shutil
import subprocess
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Queue
from threading import Thread

from PIL import Image

CHROMIUM = shutil.which("chromium")
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars",
)  # fmt: skip
DARK, LIGHT = 0, 1  # blink's preferredColorScheme
WIDTHS = 375, 768, 1280  # px: a phone, a tablet, a desktop
PATIENCE = 300  # seconds, of a machine that does other things too

# the page in frames as wide as a phone and more (a window cannot be), opened wherever it can be, and looked at from outside
FRAME = '<iframe style="width:{width}px" srcdoc="{page}"></iframe>'
AROUND = """<!doctype html><meta charset="utf-8"><meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">
<style>body{margin:0}iframe{border:0;display:block;height:4000px}</style>FRAMES<script>
const decoded = one => one.decode().then(() => one.naturalWidth, () => 0);
async function measured(frame) {
  const inside = frame.contentDocument, root = inside.documentElement;
  inside.querySelectorAll("details").forEach(one => one.open = true);
  const spans = [...inside.querySelectorAll("span.pic:not(.none)")];
  const urls = spans.map(one => getComputedStyle(one).backgroundImage.slice(5, -2));
  const styled = await Promise.all(urls.map(url => { const one = new Image(); one.src = url; return decoded(one); }));
  const images = await Promise.all([...inside.images].map(decoded));
  const beyond = [...inside.querySelectorAll("main *")].filter(one => !one.closest(".box, svg")
    && one.getBoundingClientRect().right > root.clientWidth + 0.5).map(one => one.outerHTML.slice(0, 120));
  return {
    width: root.clientWidth, needed: root.scrollWidth, beyond, images, styled,
    asked: inside.defaultView.performance.getEntriesByType("resource").map(one => one.name).filter(n => !n.startsWith("data:")),
    small: [...inside.querySelectorAll(".pic")].filter(one => one.getBoundingClientRect().width < 40).length,
  };
}
onload = async () => {
  const found = [];
  for (const frame of document.querySelectorAll("iframe")) found.push(await measured(frame).catch(String));
  fetch("/", {method: "POST", body: JSON.stringify(found)});
};
</script>"""


def measure(folder: Path, page: str) -> list[dict]:
    """What the page is at each of WIDTHS, told by the browser itself once it is done, however long that takes.

    `asked`: the addresses that the page asked for, of itself or of the server it seems to come from.
    """
    frames = "".join(FRAME.format(width=width, page=html.escape(page)) for width in WIDTHS)
    got, asked, told = AROUND.replace("FRAMES", frames).encode(), [], Queue()

    class Server(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.answer(got)

        def do_POST(self):
            told.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.answer(b"")

        def answer(self, body: bytes):
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        browser = _start(folder, "--window-size=1400,1000", f"http://127.0.0.1:{server.server_port}/")
        try:
            found = told.get(timeout=PATIENCE)
        finally:
            browser.terminate()
            browser.communicate()
            server.shutdown()
    return [one | {"asked": one["asked"] + asked[1:]} for one in found]


def corner(folder: Path, page: str, scheme: int) -> tuple[int, int, int]:
    """The colour of the page's corner on a screen that is DARK or LIGHT."""
    file = folder / f"{scheme}.png"
    scheme_flag = f"--blink-settings=preferredColorScheme={scheme}"
    _finish(_start(folder, scheme_flag, "--window-size=1280,900", f"--screenshot={file}", _written(folder, page)))
    with Image.open(file) as image:
        return image.convert("RGB").getpixel((3, 3))


def after_loading(folder: Path, page: str) -> str:
    """The page's HTML once it is loaded and its scripts have run."""
    return _finish(_start(folder, "--dump-dom", _written(folder, page)))


def _written(folder: Path, page: str) -> str:
    file = folder / "page.html"
    file.write_text(page, encoding="utf-8")
    return file.as_uri()


def _start(folder: Path, *words: str) -> subprocess.Popen:
    command = [CHROMIUM, *QUIET, f"--user-data-dir={folder / 'browser'}", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8")


def _finish(browser: subprocess.Popen) -> str:
    """What it wrote, once it ended by itself."""
    try:
        written = browser.communicate(timeout=PATIENCE)[0]
    finally:
        browser.kill()
    assert browser.returncode == 0
    return written
