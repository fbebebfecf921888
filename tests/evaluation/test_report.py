"""The report is one calm file: it asks nothing of the network, believes no string, and leaves nothing out or in by chance."""

import base64
import copy
import io
import re
from html.parser import HTMLParser

import pytest
import reports
from PIL import Image

from personalize.common.html import data_uri
from personalize.evaluation.report.figures import el, loss_paths
from personalize.evaluation.report.page import Shown, html
from personalize.evaluation.report.tables import interval, markdown, number, plain, share

VOID = {"meta", "img", "br"}
NASTY = """<script>alert("1")</script> 'x' & | `y`"""
SECTIONS = {  # key of the data: heading
    "fixed_loss": "Loss on fixed noise",
    "scores": "Scores", "checkpoints": "Checkpoints", "prompts": "Prompts", "copying": "Does it copy the photos?",
    "truth": "Read back by Toyland", "photos": "Photos",
}  # fmt: skip


class Reader(HTMLParser):
    """Fails on tags that do not match; keeps attributes, headings and words."""

    def __init__(self):
        super().__init__()
        self.open, self.attributes, self.headings, self.words = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            return
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)
        self.words.append(data)


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert not reader.open
    return reader


@pytest.fixture(scope="module")
def images() -> Shown:
    return reports.shown()


@pytest.fixture(scope="module")
def page(images) -> str:
    return html(reports.evaluation(), images)


def test_every_tag_is_closed_and_every_section_is_there(page):
    assert read(page).headings == [
        "Scores", "Checkpoints", "Loss on fixed noise", "Contact sheet",
        "Which word did that?", "Prompts", "Does it copy the photos?",
        "Is a dog still a dog?", "Read back by Toyland", "Photos",
    ]  # fmt: skip


def test_nothing_is_asked_of_the_network(page):
    policy = [value for tag, name, value in read(page).attributes if tag == "meta" and name == "content"]
    assert any("default-src 'none'" in value for value in policy)
    links = [value for _, name, value in read(page).attributes if name in ("src", "href", "srcset", "action", "data")]
    assert links and all(link.startswith("data:image/") for link in links)
    assert all(inside.startswith('"data:image/') for inside in re.findall(r"url\(([^)]{0,30})", page))
    assert "//" not in re.sub(r"data:image/[^\"]+", "", page) and "@import" not in page


@pytest.mark.parametrize("key", [*SECTIONS, "class"])
@pytest.mark.parametrize("nothing", ["none", "missing", "empty"])
def test_a_section_without_data_leaves_no_hole(page, images, key, nothing):
    data = reports.evaluation()
    data[key] = {"none": None, "missing": None, "empty": type(data[key])()}[nothing]
    if nothing == "missing":
        del data[key]
    bare = Shown(images.photos, [], images.cells, [], [], images.maps)
    found = read(html(data, bare if key == "class" else images))
    gone = SECTIONS.get(key, "Is a dog still a dog?")
    assert found.headings == [title for title in read(page).headings if title != gone]
    assert gone not in markdown(data)


def test_what_is_needed_least_makes_a_page():
    data = {key: reports.evaluation()[key] for key in ("time", "run")}
    found = read(html(data, Shown([], [], {}, [], [])))
    assert not found.headings and "a sks dog" in found.words
    assert markdown(data).startswith("# a sks dog\n")


def test_strings_from_outside_stay_strings():
    def poisoned(value):
        if isinstance(value, dict):
            kept = ("better", "verdict_levels", "time")
            return {key: inside if key in kept else poisoned(inside) for key, inside in value.items()}
        if isinstance(value, list):
            return [poisoned(inside) for inside in value]
        return f"{value} {NASTY}" if isinstance(value, str) else value

    data = poisoned(reports.evaluation())
    data["encoders"][NASTY] = NASTY
    prompts = [f"{prompt} {NASTY}" for prompt in reports.SCENES]
    found = read(html(data, reports.shown(prompts)))
    assert not [tag for tag, *_ in found.attributes if tag == "script"] and "<script" not in html(data, reports.shown(prompts))
    assert not [name for _, name, _ in found.attributes if name.startswith("on")]
    assert f"00.png {NASTY}" in found.words and f"a sks dog swimming {NASTY}" in found.words
    text = markdown(data)
    assert "<script" not in text.replace("\\<script", "")
    columns_agree(text)


def test_photos_are_in_the_page_only_where_they_are_meant_to_be(page, images):
    without = html(reports.evaluation() | {"photos_included": False}, images)
    for photo in images.photos:
        assert data_uri(photo) in page and data_uri(photo) not in without
    assert "--no-photos leaves them out" in page and "--no-photos" not in without


def test_each_image_is_in_the_page_once(page, images):
    for image in (*images.photos, *images.prior, *images.cells.values(), *images.base_class):
        same = [p for p in (*images.cells.values(), *images.base_class, *images.tuned_class) if p == image]
        assert page.count(data_uri(image)) == max(1, len(same))


def test_small_images_are_lossless_large_ones_shrunk_and_metadata_gone(tmp_path):
    image = Image.new("RGB", (900, 600), "teal")
    exif = Image.Exif()
    exif[0x010E] = "my garden"
    image.save(tmp_path / "a.jpg", exif=exif, comment="my street")
    with Image.open(tmp_path / "a.jpg") as read_back:
        assert read_back.info["comment"] == b"my street"
        kept = data_uri(read_back)
    assert kept.startswith("data:image/jpeg;base64,") and data_uri(Image.new("RGB", (128, 64))).startswith("data:image/png")
    with Image.open(io.BytesIO(base64.b64decode(kept.partition(",")[2]))) as small:
        assert small.size == (512, 341) and not {"exif", "comment"} & set(small.info)


def test_the_chosen_checkpoint_is_marked_and_a_disqualified_one_hollow(page):
    assert page.count('class="step chosen"') == page.count('class="ring"') == page.count('<tr class="marked">') == 1
    assert page.count('class="step hollow"') == 1 and page.count('class="step"') == 2
    assert '<tr class="marked"><td class="n">300</td>' in page and "300, chosen" in page
    assert "over: obedience" in page


def test_a_chosen_checkpoint_that_breaks_a_limit_is_not_passed_off_as_good(images):
    row = reports.checkpoint(400, 0.8, 0.5, chosen=True, qualifies=False, failed=["obedience"])
    data = reports.evaluation() | {"checkpoints": [row]}
    assert 'class="step chosen hollow"' in html(data, images)
    assert "chosen, though over: obedience" in html(data, images) and "though over" in markdown(data)


def test_one_checkpoint_or_equal_ones_make_a_figure_too(images):
    for rows in ([reports.checkpoint(5, 0.5, 0.613)], [reports.checkpoint(k, 0.5, 0.6, low=None) for k in (1, 2, 3)]):
        read(html(reports.evaluation() | {"checkpoints": rows}, images))


def order(text: str, names: list[str]) -> list[str]:
    return sorted(names, key=text.index)


def test_prompts_stand_worst_first_in_both_forms(images):
    data = reports.evaluation()
    by_dino = [row["prompt"] for row in sorted(data["prompts"], key=lambda row: row["dino"])]
    table = html(data, images).partition("<h2>Prompts</h2>")[2]
    assert order(table, by_dino) == by_dino and "Worst DINO first." in table
    assert order(markdown(data).partition("## Prompts, worst DINO first")[2], by_dino) == by_dino
    data["prompts"][0]["dino"] = None
    assert "Worst CLIP-T against the base first." in html(data, images)


def test_a_row_of_the_contact_sheet_is_one_noise_and_an_unusable_image_is_marked(page, images):
    table = page.partition("<h2>Contact sheet</h2>")[2].partition("</section>")[0]
    rows = table.split("<tr>")[2:]
    assert len(rows) == 4 and all(row.count('class="pic') == len(reports.SCENES) for row in rows)
    for k, row in enumerate(rows):
        assert row.startswith(f'<th scope="row">{k + 1}</th>') and row.count(f', {k + 1}"') >= 1
    assert '<td class="lost">' in rows[3] and "<b>black</b>" in rows[3] and table.count("<b>") == 1


def test_unusable_images_of_the_base_are_counted_but_make_no_column(images):
    data = reports.evaluation()
    data["unusable"] += [{"prompt": "a dog", "index": 0, "why": "black"}] * 2
    page = html(data, images)
    assert "3 unusable (3 black)" in page and ">a dog</th>" not in page and page.count("<b>black</b>") == 1


def test_an_image_that_is_missing_keeps_its_place(images):
    cells = {key: image for key, image in images.cells.items() if key != ("a sks dog swimming", 3)}
    found = html(reports.evaluation(), Shown([], [], cells, [], []))
    assert found.count('class="pic none"') == found.count("<b>black</b>") == 1


def test_many_prompts_are_shown_in_groups_of_equal_width():
    prompts = [f"prompt {k}" for k in range(25)]
    page = html(reports.evaluation(prompts, 1), reports.shown(prompts, 1))
    heads = re.findall(r'<table class="sheet" style="--n:7">.*?</thead>', page)
    assert [head.count('scope="col"') for head in heads] == [7, 7, 7, 4]
    assert all(len(re.findall(r"<t[hd]\b", head)) == 8 for head in heads)


def columns_agree(text: str):
    for block in re.findall(r"(?:^\|.*\n?)+", text, flags=re.M):
        counts = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(counts) == 1, block


def test_markdown_tables_have_as_many_cells_in_each_row():
    text = markdown(reports.evaluation())
    columns_agree(text)
    assert text.count("| --- |") == 5 and "81 % of the way" in text and "| 300 | 1 | 0.800 | 0.750–0.850 | −0.012 |" in text
    assert "Unusable images: 1; they count." in text


def test_neither_form_changes_what_it_was_given(images):
    data = reports.evaluation()
    before = copy.deepcopy(data)
    html(data, images), markdown(data)
    assert data == before


def test_numbers_are_written_as_people_read_them():
    assert [number(-0.0124), number(None), share(0.806), share(-0.02)] == ["−0.012", "–", "81%", "−2%"]
    assert [interval(0.76, 0.82), interval(None, 1), interval(0.19, 0.32, share)] == ["0.760–0.820", "", "19–32%"]
    assert [plain(v) for v in (1e-4, 2e-05, 1e20, ["a", "b"], None, 4.0, [])] == [
        "0.0001",
        "2e-5",
        "1e20",
        "a, b",
        "–",
        "4",
        "–",
    ]


def test_an_element_escapes_children_and_attributes():
    assert el("p", "<b>", el("i", "&"), None, title='"') == '<p title="&#34;">&lt;b&gt;<i>&amp;</i></p>'


def test_how_far_dino_agrees_with_the_truth_is_in_the_small_print_where_it_is_known(images):
    said, known = "DINO agrees with the truth in 91 % of pairs.", reports.evaluation()
    assert said in " ".join(read(html(known, images)).words) and said in markdown(known)
    unknown = known | {"agreement": None}
    assert "agrees with the truth" not in html(unknown, images) + markdown(unknown)


def test_losses_on_fixed_noise_are_a_line_each_in_the_order_of_steps_and_named_apart():
    rows = [{"step": 10, "fixed_subject": 0.3, "held_out": 0.3}, {"step": 20, "fixed_subject": 0.1, "held_out": 0.1}]
    svg = str(loss_paths(rows))
    lines = re.findall(r'<polyline points="([^"]*)" class="path ([a-z-]+)"', svg)
    assert {name for _, name in lines} == {"fixed-subject", "held-out"} and "class images" not in svg
    (x, y), (x2, y2) = (map(float, dot.split(",")) for dot in lines[0][0].split())
    assert x < x2 and y < y2, "a loss that falls goes down the page"
    heights = [float(y) for y in re.findall(r'y="([\d.]+)" class="label"', svg)]
    assert len(heights) == 2 and abs(heights[0] - heights[1]) >= 14
