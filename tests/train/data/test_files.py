"""Own text: plain files, JSON and Parquet."""

import errno
import gzip
import json
import os

import pyarrow
import pyarrow.parquet
import pytest

from train.data.files import find_files, read_examples, read_files

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]


def lines(*objects) -> str:
    return "".join(json.dumps(x) + "\n\n" for x in objects)


def test_a_plain_file_is_a_document_and_each_json_object_is_one(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffone\n\ntwo\n")
    objects = [{"text": "drei", "url": "x"}, {"text": "vier ä", "prompt": None}]
    (tmp_path / "b.jsonl").write_text(lines(*objects))
    with gzip.open(tmp_path / "c.json.gz", "wt") as file:
        file.write(lines(*objects))
    (tmp_path / "d.json").write_text(json.dumps(objects, indent=2))
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{**x, "id": 1} for x in objects]), tmp_path / "e.parquet"
    )
    names = [str(tmp_path / name) for name in ("a.txt", "b.jsonl", "c.json.gz")]
    both = ["drei", "vier ä"]
    assert read_files(names) == ["one\n\ntwo\n", *both, *both]
    assert read_files([str(tmp_path / "d.json"), str(tmp_path / "e.parquet")]) == [*both, *both]


def test_examples_have_their_kind_in_json_and_parquet(tmp_path):
    objects = [{"prompt": "1 + 1 = ", "completion": "2"}, {"messages": CHAT}]
    (tmp_path / "a.jsonl").write_text(lines(*objects))
    for i, row in enumerate(objects):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / f"{i}.parquet")
    expected = [
        ("prompt", ("1 + 1 = ", "2")),
        ("messages", (("user", "Hi"), ("assistant", "Ho"))),
    ]
    for names in (["a.jsonl"], ["0.parquet", "1.parquet"]):
        found = read_examples([str(tmp_path / name) for name in names])
        assert [(x.kind, x.content) for x in found] == expected
    with pytest.raises(ValueError, match=r"a.jsonl:1 has `prompt` and `completion`, and only `te"):
        read_files([str(tmp_path / "a.jsonl")])


def test_folders_and_patterns_give_each_file_once_sorted_and_without_hidden_ones(tmp_path):
    for name in ("b.txt", "a.md", "sub/c.jsonl.gz", ".git/d.txt", "image.png", ".e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_files([str(tmp_path / "b.txt"), str(tmp_path), str(tmp_path / "*.md")])
    assert [str(p.relative_to(tmp_path)) for p in found] == ["b.txt", "a.md", "sub/c.jsonl.gz"]


def test_a_linked_folder_is_read_and_what_a_link_names_again_is_not(tmp_path):
    data, far = tmp_path / "data", tmp_path / "far"
    for path in (data / "own.txt", far / "a.txt", far / "sub/b.txt"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for name, target in (("part", far), ("back", data), ("sub", far / "sub")):
        (data / name).symlink_to(target)
    (data / "same.txt").symlink_to(data / "own.txt")
    wanted = ["own.txt", "part/a.txt", "part/sub/b.txt"]
    for names in ([str(data)], [str(data), f"{data}/**/*.txt", str(far)]):
        assert [str(p.relative_to(data)) for p in find_files(names)] == wanted


def test_a_folder_that_is_not_read_whole_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a.txt").touch()
    (tmp_path / "part").symlink_to(tmp_path / "not-mounted")
    with pytest.raises(ValueError, match="/part is a link that leads nowhere: restore"):
        find_files([str(tmp_path)])
    (tmp_path / "part").unlink()
    (tmp_path / "part").mkdir()
    (tmp_path / "part/b.jsonl.zst").touch()
    (tmp_path / "picture.zip").touch()
    with pytest.raises(ValueError, match=r"b\.jsonl\.zst is packed in a way that is not read: unp"):
        find_files([str(tmp_path)])
    (tmp_path / "part/b.jsonl").touch()  # unpacked
    assert find_files([str(tmp_path)]) == [tmp_path / "a.txt", tmp_path / "part/b.jsonl"]
    scan = os.scandir

    def refused(path):  # as for a user without the right; root has it
        if str(path).endswith("part"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(ValueError, match="/part cannot be read: Permission denied"):
        find_files([str(tmp_path)])


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        (
            "a.jsonl",
            b'{"text": "x"}\n{"body": "x", "id": 1}\n',
            "a.jsonl:2 has `body` and `id`: ex",
        ),
        ("a.jsonl", b'{"text": "x", "messages": []}\n', "a.jsonl:1 has `text` and `messages`: ex"),
        ("a.jsonl", b'{"prompt": "x"}\n', "a.jsonl:1 has no `completion`"),
        ("a.jsonl", b'{"text": 1}\n', "a.jsonl:1: `text` is a number, not a string"),
        ("a.jsonl", b'"text"\n', "a.jsonl:1 is a string, not an object with `text`"),
        ("a.json", b'{\n "text": "x"\n}\n', "a.json:1 is not JSON"),
        ("a.json", b'[{"text": "x"}, 3]\n', "a.json: element 1 is a number"),
        ("a.jsonl", b'{"messages": []}\n', "`messages` is an empty list"),
        (
            "a.jsonl",
            b'{"messages": [{"role": "user"}]}\n',
            r"`messages\[0\]`: `content` is missing",
        ),
        (
            "a.jsonl",
            b'{"messages": [{"role": "x", "content": "y", "tool_calls": [1]}]}\n',
            r"a.jsonl:1: `messages\[0\]` has `tool_calls`: only `role` and `content`",
        ),
        (
            "a.jsonl",
            b'{"messages": [{"role": "x", "content": "y"}], "tools": [1]}\n',
            "`tools` beside `messages` is not supported",
        ),
        (
            "a.jsonl",
            b'{"messages": [{"role": "x", "content": "y"}], "system": "z"}\n',
            "`system` beside `messages` is not supported",
        ),
        ("a.jsonl", b'{"text": "x", "text": "y"}\n', r"a.jsonl:1 .*'text' is there twice"),
        ("a.json", b'[{"text": "x", "text": null}]', r"a.json: .*'text' is there twice"),
        ("a.txt", b"ab\xff", r"a.txt is not text in UTF-8 \(at byte 2\)"),
        ("a.txt.gz", b"ab", "a.txt.gz: the gzip file is damaged"),
        ("a.parquet", b"ab", "a.parquet is not a readable Parquet file"),
        ("a.pdf", b"ab", "a.pdf has none of the names that are read, .txt, .md, .jsonl"),
        (
            "a.jsonl",
            b'{"messages": [], "prompt": "x"}\n',
            "a.jsonl:1 has `prompt` and `messages`: ex",
        ),
        ("b/a.txt", None, "a.txt cannot be read: No such file"),
        ("moved", None, "moved: there is no such file or folder"),
        ("*.txt", None, r"\*.txt is a pattern that matches no file"),
        (".", None, "has no file of .txt, .md"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, says):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=says):
        read_files([str(tmp_path / name)])


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_arrays([pyarrow.array(["x"])] * 2, names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet has the column `text` twice"):
        read_files([str(tmp_path)])
