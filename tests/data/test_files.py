"""Local files read as they are: text of CSV, types that change, several files, names with special characters."""

import bz2
import datetime
import gzip
import json
import lzma
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import Dataset

from instructgpt_hf.data.files import FileRows
from instructgpt_hf.data.sources import describe, load_split, local_files
from instructgpt_hf.errors import InstructGPTError

ROW = {"prompt": "a"}
LINE = '{"prompt": "a"}\n'


def rows_of(path, **more):
    return list(load_split(str(path), "train", role="prompts", **more))


def problem_of(path, split="train"):
    with pytest.raises(InstructGPTError) as caught:
        list(load_split(str(path), split, role="prompts"))
    return str(caught.value)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


class TestCSV:
    @pytest.mark.parametrize("value", ["NA", "null", "None", "nan", "True", "12", "0010", "0.50", "1e5", "", " x "])
    @pytest.mark.parametrize("streaming", [False, True])
    def test_values_are_text(self, tmp_path, value, streaming):
        path = write(tmp_path / "data.csv", f"prompt,completion\nq,{value}\n")
        assert rows_of(path, streaming=streaming) == [{"prompt": "q", "completion": value}]

    def test_quotes_commas_lines_and_the_mark_of_spreadsheets(self, tmp_path):
        path = write(tmp_path / "data.csv", '\ufeffprompt,completion\n"a ""b"", c","d\ne"\n\n')
        assert rows_of(path) == [{"prompt": 'a "b", c', "completion": "d\ne"}]

    def test_an_index_that_pandas_wrote_is_left_out(self, tmp_path):
        assert rows_of(write(tmp_path / "data.csv", ",prompt\n0,a\n")) == [ROW]

    def test_long_fields(self, tmp_path):
        text = "a" * 300_000
        assert rows_of(write(tmp_path / "data.csv", f"prompt\n{text}\n")) == [{"prompt": text}]

    def test_every_line_with_another_number_of_fields(self, tmp_path):
        text = 'prompt,completion\nSay hello,Hello, friend\nSay,"two\nlines"\nSay hello\nq,a,b,c\n'
        message = problem_of(write(tmp_path / "data.csv", text))
        assert "line 2 has 3 fields, the header 2; put text that holds a comma in quotes" in message
        assert "line 5 has 1 field, the header 2" in message and "line 6 has 4 fields" in message
        assert message.count("  - ") == 3

    def test_a_column_twice(self, tmp_path):
        assert "column 'a' stands in the header 2 times" in problem_of(write(tmp_path / "data.csv", "a,b,a\n1,2,3\n"))

    @pytest.mark.parametrize("text", ['a,b\n1,2\n"1,2\n', 'a,b\n1,2\n"x" y,2\n', 'a,b\n1,2\n"x \\"y\\"",2\n'])
    def test_a_wrong_quote(self, tmp_path, text):
        message = problem_of(write(tmp_path / "data.csv", text))
        assert "could not be read as csv: the row on line 3: " in message and "is written twice" in message

    @pytest.mark.parametrize("mark", [";", "\t"])
    def test_other_delimiters(self, tmp_path, mark):
        rows = [{"prompt": "a, b", "completion": f"c{mark}d"}, {"prompt": "e", "completion": "f"}]
        text = f'\nprompt{mark}completion\r\na, b{mark}"c{mark}d"\r\ne{mark}f\r\n'
        path = write(tmp_path / "data.csv", text)
        assert rows_of(path) == rows
        assert "line 5 has 3 fields, the header 2; put text that holds a" in problem_of(
            write(path, f"{text}g{mark}h{mark}i\r\n")
        )


class TestTypes:
    """The type of a column may change anywhere, also of one that nobody reads."""

    @pytest.mark.parametrize("values", [[None, "x"], [4, 3.7], [1, "a"], [{"a": 1}, [2]], [[1], ["a"]]])
    @pytest.mark.parametrize("streaming", [False, True])
    def test_json(self, tmp_path, values, streaming):
        rows = [{"prompt": "a", "extra": values[index >= 20_000]} for index in range(20_010)]
        path = write(tmp_path / "data.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        assert rows_of(path, streaming=streaming) == rows

    def test_columns_that_some_rows_lack(self, tmp_path):
        path = write(tmp_path / "data.jsonl", '{"prompt": "a"}\n{"prompt": "b", "labeler": "x"}\n')
        assert rows_of(path) == [ROW, {"prompt": "b", "labeler": "x"}]

    def test_columns_of_a_stream_that_the_first_row_lacks(self, tmp_path):
        path = write(tmp_path / "data.jsonl", '{"prompt": "a"}\n{"prompt": "a", "system": "s"}\n')
        assert [row["system"] for row in rows_of(path, streaming=True)] == [None, "s"]

    def test_parquet_files_with_other_types(self, tmp_path):
        for number, value in enumerate([None, "x"]):
            Dataset.from_list([{"prompt": "a", "labeler": value}]).to_parquet(str(tmp_path / f"{number}.parquet"))
        assert [row["labeler"] for row in rows_of(tmp_path / "*.parquet")] == [None, "x"]

    def test_parquet_keeps_decimals_and_dates(self, tmp_path):
        day, number = datetime.date(2024, 1, 2), Decimal("4.50")
        pyarrow.parquet.write_table(pa.table({"day": [day], "score": [number]}), tmp_path / "data.parquet")
        assert rows_of(tmp_path / "data.parquet") == [{"day": day, "score": number}]


class TestJSON:
    def test_lines_in_a_file_named_json(self, tmp_path):
        assert rows_of(write(tmp_path / "data.json", LINE * 2)) == [ROW, ROW]

    def test_one_object(self, tmp_path):
        assert rows_of(write(tmp_path / "data.json", '{"prompt": "a"}')) == [ROW]

    def test_blank_lines(self, tmp_path):
        assert rows_of(write(tmp_path / "data.jsonl", f"\n{LINE}\n{LINE}")) == [ROW, ROW]

    def test_wrong_lines_are_named(self, tmp_path):
        path = write(tmp_path / "data.jsonl", f'{LINE}{{"prompt": "a"\n')
        assert f"{path} could not be read as jsonl: line 2, column " in problem_of(path)
        path = write(tmp_path / "data.jsonl", f"{LINE}[1]\n")
        assert "line 2: found list, expected an object" in problem_of(path)
        assert "row 1: found str, expected an object" in problem_of(write(tmp_path / "x.json", '[{"a": 1}, "b"]'))

    def test_separators_of_lines_inside_values(self, tmp_path):
        row = {"prompt": "a\u2028b\x85c"}
        for name in ("data.jsonl", "data.json"):
            assert rows_of(write(tmp_path / name, f"{json.dumps(row, ensure_ascii=False)}\n" * 2)) == [row, row]

    def test_half_of_an_emoji(self, tmp_path):
        text = '{"prompt": "a \\ud83d", "extra": ["\\ude00", {"x": "\\ud83d\\ude00"}]}'
        expected = [{"prompt": "a \ufffd", "extra": ["\ufffd", {"x": "😀"}]}]
        assert rows_of(write(tmp_path / "data.jsonl", text)) == rows_of(write(tmp_path / "x.json", text)) == expected

    @pytest.mark.parametrize("value", ["[" * 100_000 + "]" * 100_000, "1" * 5_000])
    def test_what_python_cannot_hold(self, tmp_path, value):
        path = write(tmp_path / "data.jsonl", f'{LINE}{{"prompt": "a", "x": {value}}}\n')
        assert f"{path} could not be read as jsonl: line 2: " in problem_of(path)

    def test_another_encoding(self, tmp_path):
        path = tmp_path / "data.jsonl"
        path.write_bytes('{"prompt": "é"}\n'.encode("latin-1"))
        assert "could not be read as jsonl: it is not UTF-8 text" in problem_of(path)


class TestNames:
    @pytest.mark.parametrize(("suffix", "module"), [(".gz", gzip), (".bz2", bz2), (".xz", lzma)])
    @pytest.mark.parametrize("kind", ["jsonl", "csv"])
    def test_compressed(self, tmp_path, suffix, module, kind):
        path = tmp_path / f"data.{kind}{suffix}"
        with module.open(path, "wt") as stream:
            stream.write(LINE if kind == "jsonl" else "prompt\na\n")
        assert rows_of(path) == [ROW]

    @pytest.mark.parametrize(("suffix", "module"), [(".gz", gzip), (".bz2", bz2), (".xz", lzma)])
    def test_broken_archive(self, tmp_path, suffix, module):
        path, whole = tmp_path / f"data.jsonl{suffix}", module.compress(LINE.encode() * 100)
        for damaged in (b"no", whole[:-9], whole[:15] + b"xxxxxxxx" + whole[20:]):
            path.write_bytes(damaged)
            assert f"{path} could not be read as jsonl: " in problem_of(path)

    @pytest.mark.parametrize("name", ["DATA.JSONL", "data.JsonL", "data.jsonl.GZ"])
    def test_case_of_the_suffix(self, tmp_path, name):
        path = tmp_path / name
        with (gzip.open if name.endswith("GZ") else open)(path, "wt") as stream:
            stream.write(LINE)
        assert rows_of(path) == [ROW]

    @pytest.mark.parametrize("name", ["prompts[1].jsonl", "prompts?.jsonl", "prompts*.jsonl", "a, b.jsonl"])
    def test_a_file_whose_name_looks_like_a_pattern(self, tmp_path, name):
        """It is that file, not another one that the pattern fits."""
        write(tmp_path / "prompts1.jsonl", '{"prompt": "other"}\n')
        assert rows_of(write(tmp_path / name, LINE)) == [ROW]

    def test_pattern(self, tmp_path):
        for number in (2, 1):
            write(tmp_path / f"part-{number}.jsonl", f'{{"prompt": "{number}"}}\n')
        write(tmp_path / "other.jsonl", LINE)
        assert [row["prompt"] for row in rows_of(tmp_path / "part-*.jsonl")] == ["1", "2"]
        assert f"{tmp_path}/x*.jsonl: no file has a name of this pattern" in problem_of(tmp_path / "x*.jsonl")

    def test_several_files(self, tmp_path):
        first, second = write(tmp_path / "a.jsonl", LINE), write(tmp_path / "b.csv", "prompt\nb\n")
        assert [row["prompt"] for row in rows_of(f"{first},{second}")] == ["a", "b"]
        assert f"{tmp_path}/c.csv: no such file" in problem_of(f"{first}, {tmp_path}/c.csv")

    def test_places_name_the_file_where_there_are_several(self, tmp_path):
        files = [write(tmp_path / name, LINE * 2) for name in ("a.jsonl", "b.jsonl")]
        assert [place for place, _ in FileRows(files[:1], "x").numbered()] == ["row 0", "row 1"]
        places = [place for place, _ in FileRows(files, "x").numbered()]
        assert places == ["a.jsonl: row 0", "a.jsonl: row 1", "b.jsonl: row 0", "b.jsonl: row 1"]

    def test_every_file_counts_for_the_fingerprint(self, tmp_path):
        paths = [write(tmp_path / name, LINE) for name in ("a.jsonl", "b.jsonl")]
        source = f"{tmp_path}/*.jsonl"
        before = describe(load_split(source, "train"), source, "train")
        assert before["rows"] == 2
        write(paths[1], '{"prompt": "b"}\n')
        assert describe(load_split(source, "train"), source, "train")["fingerprint"] != before["fingerprint"]


class TestFolders:
    def test_two_files_of_one_split(self, tmp_path):
        write(tmp_path / "train.jsonl", LINE)
        write(tmp_path / "train.csv", "prompt\nb\n")
        message = problem_of(tmp_path)
        assert f"{tmp_path}: train.csv and train.jsonl are both the split 'train'; keep one" in message

    @pytest.mark.parametrize("folder", ["data", "."])
    def test_clone_of_a_hub_dataset(self, tmp_path, folder):
        for split, parts in (("train", 2), ("test", 1)):
            for part in range(parts):
                path = tmp_path / folder / f"{split}-{part:05}-of-{parts:05}.parquet"
                path.parent.mkdir(exist_ok=True)
                Dataset.from_list([{"prompt": f"{split} {part}"}]).to_parquet(str(path))
        write(tmp_path / "README.md", "# A dataset\n")
        assert [row["prompt"] for row in rows_of(tmp_path)] == ["train 0", "train 1"]
        assert list(load_split(str(tmp_path), "test")) == [{"prompt": "test 0"}]
        message = problem_of(tmp_path, "validation")
        assert "no validation.jsonl" in message and "its splits are train, test" in message

    def test_configurations_of_a_readme(self, tmp_path):
        described = "configs:\n" + "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in "ab")
        write(tmp_path / "README.md", f"---\n{described}---\n")
        for name in "ab":
            write(tmp_path / f"{name}.jsonl", f'{{"prompt": "{name}"}}\n')
        assert rows_of(tmp_path, config="b") == [{"prompt": "b"}]
        assert "dataset_config None: Config name is missing. Please pick one among" in problem_of(tmp_path)

    def test_files_of_one_name_in_several_folders(self, tmp_path):
        for name in "ab":
            write(tmp_path / name / "train.jsonl", LINE)
        places = [place for place, _ in load_split(str(tmp_path), "train").numbered()]
        assert places == ["a/train.jsonl: row 0", "b/train.jsonl: row 0"]

    def test_a_folder_whose_name_looks_like_a_pattern(self, tmp_path):
        folder = tmp_path / "data[1]"
        write(folder / "train.jsonl", LINE)
        assert rows_of(folder) == rows_of(folder / "*.jsonl") == [ROW]
        message = problem_of(folder, "test")
        assert "data[1]: `datasets` takes the brackets" in message and "name the files" in message

    def test_files_of_a_hub_id(self):
        assert local_files("trl-lib/ultrafeedback_binarized", "train") is None
