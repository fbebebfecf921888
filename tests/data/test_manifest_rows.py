"""A manifest of many subjects: what it may be, and what is refused before anything runs."""

import json

import pytest

from personalize.common.errors import UserError
from personalize.data.manifest_rows import check_rows, read_rows, row_settings, shard_of

ROW = {"id": "rex", "photos": "rex", "class": "dog"}


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_jsonl_csv_and_parquet_hold_the_same_rows(tmp_path):
    rows = [{**ROW, "train.lr": 0.0001}, {"id": "007", "photos": "b", "class": "NA"}]
    expected = [{**row, "photos": str(tmp_path / row["photos"])} for row in rows]
    (tmp_path / "m.csv").write_text("id,photos,class,train.lr\nrex,rex,dog,0.0001\n007,b,NA,\n")
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    Dataset.from_list([rows[0], {**rows[1], "train.lr": None}]).to_parquet(tmp_path / "m.parquet")
    for path in (jsonl(tmp_path / "m.jsonl", rows), tmp_path / "m.parquet"):
        assert read_rows(path) == expected
    from_csv = read_rows(tmp_path / "m.csv")
    assert from_csv[1] == expected[1] and row_settings(from_csv[0]) == row_settings(expected[0]) == ["train.lr=0.0001"]


def test_a_folder_of_folders_is_a_manifest(tmp_path):
    (tmp_path / "rex").mkdir()
    (tmp_path / "rex" / "subject.toml").write_text('class = "dog"')
    assert read_rows(tmp_path) == [{**ROW, "photos": str(tmp_path / "rex")}]


def test_files_are_a_list_and_absolute_paths_and_data_sets_stay(tmp_path):
    rows = [{**ROW, "photos": ["a.png", "/b.png"]}, {"id": "tom", "photos": ["hf:x/y"], "class": "cat"}]
    assert [row["photos"] for row in read_rows(jsonl(tmp_path / "m.jsonl", rows))] == [
        [str(tmp_path / "a.png"), "/b.png"], ["hf:x/y"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "rex"}, "rows 1 and 2 have the same id 'rex'"),
        ({"id": "../etc"}, "row 2 has the id '../etc'"),
        ({"id": "a/b"}, "row 2 has the id 'a/b'"),
        ({"id": ".."}, "row 2 has the id '..'"),
        ({"id": ""}, "row 2 has the id ''"),
        ({"id": None}, "row 2 has the id ''"),
        ({"id": "base-pictures"}, "row 2 has the id 'base-pictures'"),
        ({"train.stesp": 3}, "row 2 has the column 'train.stesp', which is no setting; did you mean 'train.steps'"),
        ({"class_word": "dog"}, "row 2 has the column 'class_word'"),
        ({"class": " "}, "row 2 .'tom'. does not say the class"),
        ({"class": None}, "row 2 .'tom'. does not say the class"),
    ],
)
def test_what_is_wrong_is_refused_by_the_number_of_its_row(row, message):
    with pytest.raises(UserError, match=message):
        check_rows([ROW, {**ROW, "id": "tom", **row}], lambda row: None)


def test_a_wrong_value_is_refused_by_the_number_and_id_of_its_row():
    def check(row):
        raise UserError("train.steps = -1 is not allowed")

    with pytest.raises(UserError, match="row 1 .'rex'.: train.steps = -1"):
        check_rows([ROW], check)


@pytest.mark.parametrize(("name", "text"), [("m.jsonl", '{"id":\n'), ("m.jsonl", ""), ("m.yaml", ""), ("m.parquet", "x")])
def test_what_is_no_table_is_refused(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match="manifest"):
        read_rows(tmp_path / name)


def test_shards_are_all_rows_once():
    rows = [{"id": str(k)} for k in range(7)]
    assert sorted(row["id"] for k in range(3) for row in shard_of(rows, f"{k}/3")) == [row["id"] for row in rows]
    assert shard_of(rows[:1], "1/2") == []
    for text in ("3/3", "1", "-1/3", "a/b", "1/0"):
        with pytest.raises(UserError, match="--shard"):
            shard_of(rows, text)
