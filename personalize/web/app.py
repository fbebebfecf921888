"""The page's five places, and the server that shows them."""

import functools
import html
import os
import secrets
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}  # before gradio is imported

import gradio as gr
from PIL import Image
from starlette.middleware import Middleware

from personalize.common.errors import UserError
from personalize.common.html import render
from personalize.common.job_queue import Jobs
from personalize.web.workspace import Workspace

USER = "personalize"  # whom a password is of
MOST_UPLOAD = "100mb"  # a file
HERE = Path(__file__).parent
FONT = ["-apple-system", "BlinkMacSystemFont", "Segoe UI", "Inter", "Roboto", "Noto Sans", "system-ui", "sans-serif"]
# The browser itself asks nobody else.
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'"


@dataclass(frozen=True)
class Page:
    """What the five places share. bases: those that may be trained besides the hub's."""

    space: Workspace
    jobs: Jobs
    bases: tuple[str, ...]

    def subjects(self, before: str | None) -> dict:
        return listed(self.space.subjects(), before)


def listed(names: Iterable[str], before: str | None, fallback: int = 0) -> dict:
    """A list of what a folder has now: what was chosen stays chosen while it is there, else it is the first, or another."""
    names = list(names)
    return gr.update(choices=names, value=before if before in names else next(iter(names[fallback:] or names), None))


def gallery(label: str, **options) -> gr.Gallery:
    """Images to look at. Gradio's third button, which is left out, would send them to others."""
    return gr.Gallery(label=label, columns=4, interactive=False, buttons=["download", "fullscreen"], **options)


def _brush(width: int) -> gr.Brush:
    return gr.Brush(default_size=max(4, width // 10), colors=["#ffffff"], color_mode="fixed")


def painter(label: str, *transforms: str) -> gr.ImageEditor:
    """Where a photo or an image is painted on in white."""
    return gr.ImageEditor(type="pil", sources=(), transforms=transforms, layers=False, label=label, brush=_brush(64))


def editable(image: Image.Image) -> dict:
    """An image to paint on, with a brush of its measure."""
    return gr.update(value=image.convert("RGB"), brush=_brush(image.width))


def guarded(work: Callable) -> Callable:
    """A handler whose UserError is shown as text."""

    @functools.wraps(work)
    def handler(*values):
        try:
            return work(*values)
        except UserError as error:
            raise gr.Error(html.escape(str(error)), title="This cannot be done", duration=None, print_exception=False) from None

    return handler


def text(template: str, **values) -> str:
    """The HTML of a template of this folder, which escapes every value."""
    return render(f"web/{template}.html.j2", url=url, **values)


def url(path: Path) -> str:
    """Where the page finds a file of the workspace; another address once the file has changed."""
    return f"/gradio_api/file={quote(str(path))}?{path.stat().st_mtime_ns if path.exists() else 0}"


def frame(path: Path, title: str) -> str:
    """A page that a command wrote, inside this one; it runs no script."""
    return text("frame", page=path.read_text(encoding="utf-8", errors="replace"), title=title)


def build(page: Page) -> gr.Blocks:
    """The whole page."""
    from personalize.web import compare, draw, photos, runs, train

    with gr.Blocks(title="personalize", analytics_enabled=False, fill_width=True) as blocks:
        gr.HTML(text("header", root=page.space.root.name))
        with gr.Tabs():
            for name, place in (("Photos", photos), ("Train", train), ("Draw", draw), ("Compare", compare), ("Runs", runs)):
                with gr.Tab(name, id=name.lower()) as tab:
                    place.build(page, tab, blocks)
    return blocks


def _known_decoders() -> None:
    """Leaves this process the image decoders that photos are read with, whoever opens a file; others run programs."""
    from personalize.data.decode import FORMATS

    Image.init()
    Image.ID[:] = [name for name in Image.ID if name in FORMATS]
    for name in set(Image.OPEN) - set(FORMATS):
        del Image.OPEN[name]


def serve(
    folder: Path, *, host: str = "127.0.0.1", port: int = 7860, password: str = "", bases: tuple[str, ...] = (), say=print,
    wait: bool = True,
):  # fmt: skip
    """Serves the page of a workspace until Ctrl-C; elsewhere than on this machine a password is asked for.

    -> gradio's server, where `wait` is false.
    """
    space = Workspace(folder)
    if host not in ("127.0.0.1", "localhost", "::1") and not password:
        password = secrets.token_urlsafe(9)
        say(f"user: {USER}, password: {password}")
    _known_decoders()
    os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="personalize-web-")
    jobs = Jobs(space.own / "jobs", root=space.root, runs=space.runs_folder)
    jobs.keep_going()
    blocks = build(Page(space, jobs, ("toyland", *bases)))
    app, address, _ = blocks.launch(
        server_name=host, server_port=port or None, auth=(USER, password) if password else None, quiet=True, share=False,
        _frontend=False,  # else a busy machine that needs 3 s for the first answer is an error
        prevent_thread_lock=True, ssr_mode=False, max_file_size=MOST_UPLOAD, footer_links=[], run_history=False, pwa=False,
        allowed_paths=[str(place) for place in space.places],
        theme=gr.themes.Base(font=FONT, font_mono=["ui-monospace", "monospace"]), css_paths=HERE / "page.css",
        app_kwargs={"docs_url": None, "redoc_url": None, "middleware": [Middleware(_Policy)]},
    )  # fmt: skip
    say(f"the page: {address}")
    if wait:
        blocks.block_thread()
    return blocks


class _Policy:
    """Adds POLICY to each answer."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def marked(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, marked if scope["type"] == "http" else send)
