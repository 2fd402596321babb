"""JSON shards become the data set c4/en that TFDS reads; bad input leaves nothing behind."""

import gzip
import http.server
import json
import random
import re
import socket
import subprocess
import sys
import threading
from functools import partial

import pytest
from paths import ROOT

from train import prepare_c4
from train.data.text import load_text
from train.prepare_c4 import PrepareC4, main


def write_shard(path, texts, opener=gzip.open):
    with opener(path, "wt", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"text": text, "timestamp": "", "url": ""}) + "\n")
    return str(path)


def prepare(data_dir, *inputs):
    main(PrepareC4(input=inputs, data_dir=data_dir))


def read(data_dir, split):
    return list(load_text("c4", split, data_dir))


def run_command(*words, before=()):
    return subprocess.run(
        [*before, sys.executable, "-m", "train.prepare_c4", *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_shards_become_the_splits_that_their_names_say(tmp_path):
    train = [[f"shard {shard} document {i}" for i in range(5)] for shard in range(2)]
    for shard, texts in enumerate(train):
        write_shard(tmp_path / f"c4-train.{shard:05}-of-00002.json.gz", texts)
    held_out = write_shard(tmp_path / "c4-validation.00000-of-00001.json.gz", ["held out"])
    prepare(tmp_path / "data", f"{tmp_path}/c4-train.*.json.gz", held_out)
    assert read(tmp_path / "data", "train") == train[0] + train[1]
    assert read(tmp_path / "data", "validation") == ["held out"]


def test_one_document_in_a_hundred_is_held_out_where_no_shard_is(tmp_path):
    texts = [f"document {i}" for i in range(250)]
    prepare(tmp_path, write_shard(tmp_path / "some.json", texts, opener=open))
    assert read(tmp_path, "validation") == ["document 0", "document 100", "document 200"]
    assert read(tmp_path, "train") == [text for i, text in enumerate(texts) if i % 100]


def test_text_comes_back_to_the_letter(tmp_path):
    texts = ["", " \u2028\n\t", "höher 漢字 🙂", "\x00", "x" * 100_000, '{"text": 1}']
    validation = write_shard(tmp_path / "c4-validation.json.gz", ["half a pair: \ud83d"])
    prepare(tmp_path, write_shard(tmp_path / "c4-train.json.gz", texts), validation)
    assert read(tmp_path, "train") == texts
    assert read(tmp_path, "validation") == ["half a pair: ?"]


def test_the_layout_is_that_of_tfds(shared_data, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_c4, "DOCUMENTS_PER_FILE", 4)
    prepare(tmp_path, write_shard(tmp_path / "c4-train.json.gz", map(str, range(11))))
    ours, theirs = tmp_path / "c4" / "en" / "3.0.1", shared_data / "c4" / "en" / "3.0.1"
    assert sorted(path.name for path in ours.iterdir()) == [
        *(f"c4-train.array_record-0000{i}-of-00003" for i in range(3)),
        "c4-validation.array_record-00000-of-00001",
        "dataset_info.json",
        "features.json",
    ]
    for name in ("features.json", "dataset_info.json"):
        got, expected = (json.loads((folder / name).read_text()) for folder in (ours, theirs))
        if name == "dataset_info.json":
            own = ("description", "configDescription", "location", "moduleName")
            got, expected = ({k: v for k, v in x.items() if k not in own} for x in (got, expected))
            assert [split.pop("shardLengths") for split in got["splits"]] == [
                ["4", "4", "2"],
                ["1"],
            ]
            for split in (*got["splits"], *expected["splits"]):
                split.pop("numBytes", None)
                split.pop("shardLengths", None)
        assert got == expected


def test_documents_are_written_as_they_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_c4, "DOCUMENTS_IN_MEMORY", 10)
    texts = [f"document {i}" for i in range(1, 96)]
    held_out = write_shard(tmp_path / "c4-validation.json.gz", ["held out"])
    prepare(tmp_path, write_shard(tmp_path / "c4-train.json.gz", texts), held_out)
    assert read(tmp_path, "train") == texts


def test_overlapping_patterns_name_a_file_once(tmp_path):
    shard = write_shard(tmp_path / "a.json.gz", ["one", "two", "three"])
    (tmp_path / "b.json.gz").symlink_to(shard)
    prepare(tmp_path, f"{tmp_path}/*.json.gz", shard)
    assert read(tmp_path, "train") == ["two", "three"]


def test_shards_are_fetched_from_urls(tmp_path):
    (tmp_path / "web").mkdir()
    write_shard(tmp_path / "web" / "c4-train.00000-of-00001.json.gz", ["from afar"])
    write_shard(tmp_path / "web" / "c4-validation.00000-of-00001.json.gz", ["held out"])

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = partial(Quiet, directory=tmp_path / "web")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/c4-{{}}.00000-of-00001.json.gz"
        prepare(tmp_path / "data", url.format("train"), url.format("validation"))
        with pytest.raises(ValueError, match=r"c4-test.*cannot be downloaded"):
            prepare(tmp_path / "other", url.format("test"))
        server.shutdown()
    assert read(tmp_path / "data", "train") == ["from afar"]
    assert read(tmp_path / "data", "validation") == ["held out"]


def test_an_address_that_does_not_answer_is_an_error(tmp_path, caplog):
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}/c4-train.json"
    with pytest.raises(ValueError, match=r"c4-train.json' cannot be downloaded: .*refused"):
        prepare(tmp_path / "data", url)
    assert not caplog.records


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b'{"text": "a"}\n{"text": "b"\n',
            r"c4\.json:2: not a JSON object with a string in 'text'",
        ),
        (b'{"text": "a"}\n{"txt": "b"}\n', r"c4\.json:2: not a JSON object"),
        (b'{"text": 3}\n', r"c4\.json:1: not a JSON object"),
        (b'["text"]\n', r"c4\.json:1: not a JSON object"),
        (b'{"text": "\xff"}\n', r"c4\.json:1: not a JSON object"),
        (b'{"text": "a"}\n' + b"[" * 10**6 + b"\n", r"c4\.json:2: not a JSON object"),
        (b"", r"c4\.json: the file is empty"),
        (b"\n \r\n", r"c4\.json: the file is empty"),
        (b'{"text": "alone"}\n', "no document is left for the split 'train'"),
        # The time would be part of the test's name, which all workers have to agree on.
        (
            gzip.compress(b'{"text": "a"}\n' * 9, mtime=0)[:-9],
            r"c4\.json:\d+: the gzip file is damaged",
        ),
        (b"\x28\xb5\x2f\xfd\x04", r"c4\.json: compressed by Zstandard: unpack it"),
        (b"\x1f\x8bnothing", r"c4\.json:1: the gzip file is damaged"),
    ],
)
def test_a_bad_shard_is_named_with_its_line_and_leaves_nothing(tmp_path, content, message):
    (tmp_path / "c4.json").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        prepare(tmp_path / "data", str(tmp_path / "c4.json"))
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "data").rglob("3.0.1*"))


def test_blank_lines_are_passed_over_and_counted(tmp_path):
    lines = [b"", b'{"text": "a"}', b" \t\r", b'{"text": "b"}', b'{"text": "c"}', b"", b""]
    (tmp_path / "c4.json").write_bytes(b"\n".join(lines))
    prepare(tmp_path / "data", str(tmp_path / "c4.json"))
    assert read(tmp_path / "data", "validation") + read(tmp_path / "data", "train") == [*"abc"]
    (tmp_path / "c4.json").write_bytes(b"\n".join([*lines, b"{"]))
    with pytest.raises(ValueError, match=r"c4\.json:8: not"):
        prepare(tmp_path / "other", str(tmp_path / "c4.json"))


def test_inputs_that_are_no_training_shards_are_refused(tmp_path):
    shard = write_shard(tmp_path / "c4-validation.json.gz", ["held out"])
    for given, message in (
        (f"{tmp_path}/c4-train.*", "matches no file"),
        (str(tmp_path), "is not a file"),
        (shard, "names no training shard"),
    ):
        with pytest.raises(ValueError, match=re.escape(given) + ".*" + message):
            prepare(tmp_path / "data", given)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("there", ["3.0.1", "2.0.0", "3.0.1.incomplete"])
def test_an_existing_data_set_is_refused_and_not_touched(tmp_path, there):
    shard = write_shard(tmp_path / "c4-train.json.gz", ["one", "two"])
    prepare(tmp_path, shard)
    home = tmp_path / "c4" / "en"
    (home / "3.0.1").rename(home / there)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    result = run_command("--input", shard, "--data-dir", tmp_path)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert there in result.stderr
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_run_that_is_interrupted_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    texts = prepare_c4.texts_of

    def interrupted(file, path):
        for i, text in enumerate(texts(file, path)):
            if i == 15:
                raise KeyboardInterrupt
            yield text

    monkeypatch.setattr(prepare_c4, "texts_of", interrupted)
    monkeypatch.setattr(prepare_c4, "DOCUMENTS_IN_MEMORY", 10)
    shard = write_shard(tmp_path / "c4-train.json.gz", map(str, range(30)))
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path, shard)
    assert not list((tmp_path / "c4" / "en").iterdir())
    monkeypatch.undo()
    prepare(tmp_path, shard)
    assert len(read(tmp_path, "train")) == 29


def test_a_full_disk_ends_in_one_line_and_leaves_nothing(tmp_path):
    noise = (random.Random(i).randbytes(500).hex() for i in range(1_000))
    shard = write_shard(tmp_path / "c4-train.json.gz", noise)
    # Files end at 200 blocks of 512 bytes, as they would on a disk with no more room.
    limited = ["sh", "-c", 'ulimit -f 200 && exec "$@"', "-"]
    result = run_command("--input", shard, "--data-dir", tmp_path / "data", before=limited)
    assert result.returncode == 2, result
    assert result.stderr.count("\n") == 1
    assert "cannot write to" in result.stderr
    assert not list((tmp_path / "data" / "c4" / "en").iterdir())


def test_the_command_says_what_it_wrote_or_what_is_wrong(tmp_path):
    shards = [
        write_shard(tmp_path / f"c4-train.{i}.json.gz", [f"{i} {k}" for k in range(60)])
        for i in range(2)
    ]
    result = run_command("--input", *shards, "--data-dir", tmp_path)
    assert result.returncode == 0, result.stderr
    assert "118 training and 2 validation documents" in " ".join(result.stdout.split())
    result = run_command("--input", tmp_path / "none.json", "--data-dir", tmp_path / "other")
    assert result.returncode == 2
    assert "none.json' matches no file" in result.stderr
    assert result.stderr.count("\n") == 1
