"""The folder that the page works in: what it may read and write, and what lies there."""

import re
from pathlib import Path

from personalize.common.errors import UserError
from personalize.common.files import make_folder, slug, write_text
from personalize.common.run_list import Run, list_runs, read_run
from personalize.common.settings import read_toml

SUBJECT = "subject.toml"  # beside the photos, as in data_examples/


class Workspace:
    """A folder with runs/, priors/, photos/ (a folder for each subject) and web/, its own (jobs, drawn images, votes)."""

    def __init__(self, folder: Path):
        self.root = Path(folder).resolve()
        self.places = [self.root / name for name in ("runs", "photos", "web")]
        self.runs_folder, self.photos_folder, self.own = self.places
        for place in self.places:
            make_folder(place)

    def inside(self, path: Path | str) -> Path:
        """A path with its links followed. UserError where it is not below runs/, photos/ or web/ here."""
        full = Path(self.root, str(path).replace("\0", "")).resolve()
        if not any(full.is_relative_to(place) for place in self.places):
            raise UserError(f"{path} is not in this workspace, {self.root}. Choose a file or folder in it.")
        return full

    def within(self, value):
        """A path in here as seen from `root`; other values stay."""
        return str(Path(value).relative_to(self.root)) if str(value).startswith(f"{self.root}/") else value

    def require_plain(self, text: str, allowed: tuple[str, ...] = ()) -> str:
        """A setting's text, which is no path out of here: commands run in `root`, so relative paths are inside."""
        path = str(text).strip().removeprefix("hf:").replace("\0", "")
        leads_out = path.startswith(("/", "~", "\\")) or ".." in re.split(r"[/\\]", path) or path[1:2] == ":"
        if text not in allowed and (leads_out or not (self.root / path).resolve().is_relative_to(self.root)):
            raise UserError(f"{text} is not in this workspace, {self.root}. Put it there, or name a base by --base.")
        return text

    def named(self, parent: Path, name: str, what: str) -> Path:
        """The folder of this name right below `parent`. UserError for another path, and for one that is not there."""
        full = self.inside(parent / (name or ""))
        if full.parent != parent or not full.is_dir():
            raise UserError(f"there is no {what} {name!r} here: choose one from the list.")
        return full

    def run(self, name: str) -> Run:
        return read_run(self.named(self.runs_folder, name, "run"))

    def runs(self) -> list[Run]:
        return list_runs(self.runs_folder)

    def subjects(self) -> list[str]:
        return sorted(path.name for path in self.photos_folder.iterdir() if path.is_dir() and not path.name.startswith("."))

    def subject(self, name: str) -> Path:
        return self.named(self.photos_folder, name, "subject")

    def new_subject(self, name: str, class_word: str) -> str:
        """Makes the folder of a subject, or gives one another class word -> its name."""
        if not class_word.strip():
            raise UserError("what do the photos show? Give a class word, such as dog.")
        name = slug(name or class_word)
        text = class_word.strip().replace("\\", "\\\\").replace('"', '\\"')
        write_text(self.photos_folder / name / SUBJECT, f'class = "{" ".join(text.split())}"\n')
        return name

    def class_word(self, name: str) -> str:
        path = self.subject(name) / SUBJECT
        return str(read_toml(path, "subject").get("class", "")) if path.exists() else ""
