import hashlib
import http.server
import io
import json
import re
import tarfile
import threading
from pathlib import Path

import pytest

from ecore.data.corpus import SPLIT_NAMES, download, read_corpus, read_split
from ecore.errors import InputError


def edit_line(path, number, change):
    """Replace line ``number`` of ``path`` by what ``change`` makes of it."""
    lines = path.read_text(encoding="utf-8").split("\n")
    lines[number - 1] = change(lines[number - 1])
    path.write_text("\n".join(lines), encoding="utf-8")


def edit_record(path, number, change):
    def apply(line):
        record = json.loads(line)
        change(record)
        return json.dumps(record)

    edit_line(path, number, apply)


def refuses(match, function, *arguments, **options):
    """The call raises InputError with one line that matches."""
    with pytest.raises(InputError) as caught:
        function(*arguments, **options)
    message = str(caught.value)
    assert re.search(match, message), message
    assert "\n" not in message


def test_json_lines_and_csv_hold_the_same(jsonl_folder, csv_folder):
    json_corpus, csv_corpus = read_corpus(jsonl_folder), read_corpus(csv_folder)
    for name in SPLIT_NAMES:
        assert getattr(json_corpus, name) == getattr(csv_corpus, name)
    assert csv_corpus.emotions == ("joyful", "sad")
    first = csv_corpus.train[0]
    assert (first.conv_id, first.emotion, first.situation) == ("t:0", "sad", "My dog died.")
    assert first.turns[2] == "Thanks, I miss him."
    assert [len(c.turns) for c in csv_corpus.train] == [4, 2, 3, 1]
    assert csv_corpus.skipped == {"train.csv": 0, "valid.csv": 0, "test.csv": 0}


def test_a_folder_may_mix_the_formats(jsonl_folder, csv_folder):
    (jsonl_folder / "test.jsonl").unlink()
    (csv_folder / "test.csv").rename(jsonl_folder / "test.csv")
    assert read_corpus(jsonl_folder).test == read_corpus(jsonl_folder).test


def test_blank_lines_and_other_separators_do_not_count(jsonl_folder):
    edit_record(
        jsonl_folder / "train.jsonl", 1, lambda r: r["utterances"][0].update(text="a\u2028b\x85c, \u00e9")
    )
    edit_line(jsonl_folder / "train.jsonl", 2, lambda line: "\n \n" + line)
    corpus = read_corpus(jsonl_folder)
    assert len(corpus.train) == 4
    assert corpus.train[0].turns[0] == "a\u2028b\x85c, \u00e9"


def test_byte_order_mark_and_ninth_field(csv_folder):
    path = csv_folder / "valid.csv"
    edit_line(path, 1, lambda line: "\ufeff" + line)
    edit_line(path, 3, lambda line: line + ",one candidate|another_comma_ candidate\r")
    assert read_corpus(csv_folder).valid[0].turns == ("I lost my job", "That must be awful.")


def test_missing_folder_file_and_both_formats(jsonl_folder, csv_folder):
    refuses("nowhere: no such folder; expected", read_corpus, jsonl_folder / "nowhere")
    refuses("train.jsonl: no such folder", read_corpus, jsonl_folder / "train.jsonl")
    (csv_folder / "test.csv").rename(jsonl_folder / "test.csv")
    refuses(r"test\.jsonl: lies beside test\.csv; expected either", read_corpus, jsonl_folder)
    refuses(r"test\.jsonl: no such file; expected either", read_corpus, csv_folder)
    refuses(r"gone\.jsonl: no such file", read_split, jsonl_folder / "gone.jsonl")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_empty_file(suffix, tmp_path):
    path = tmp_path / f"train{suffix}"
    path.write_text("")
    refuses(f"train{suffix}: empty; expected conversations", read_split, path)


def test_no_listener_turn_at_all(jsonl_folder, csv_folder):
    edit_record(jsonl_folder / "test.jsonl", 1, lambda r: r["utterances"].pop())
    refuses(r"test\.jsonl: no listener turn; expected", read_corpus, jsonl_folder)
    edit_line(csv_folder / "test.csv", 3, lambda line: "")
    refuses(r"test\.csv: no listener turn; expected", read_corpus, csv_folder)


def test_not_utf8(jsonl_folder):
    path = jsonl_folder / "valid.jsonl"
    path.write_bytes(path.read_bytes().replace(b"job", b"j\xffb"))
    refuses(r"valid\.jsonl:1: expected UTF-8", read_corpus, jsonl_folder)


def _drop(key):
    return lambda record: record.pop(key)


def _put(**values):
    return lambda record: record.update(values)


BAD_RECORDS = [
    (_drop("conv_id"), "missing key 'conv_id'; expected"),
    (_drop("emotion"), "missing key 'emotion'"),
    (_drop("situation"), "missing key 'situation'"),
    (_drop("utterances"), "missing key 'utterances'"),
    (_put(emotion=3), "expected an emotion's name, got 3"),
    (_put(emotion=" "), "expected an emotion's name"),
    (_put(utterances=[]), "expected a list of at least one utterance"),
    (_put(utterances={}), "expected a list"),
    (lambda r: r["utterances"][1].pop("text"), "utterance 2: expected an object with speaker and text"),
    (lambda r: r["utterances"][1].update(text=None), "utterance 2: expected an object"),
    (lambda r: r["utterances"].insert(0, "hello"), "utterance 1: expected an object"),
    (lambda r: r["utterances"].pop(0), "utterance 1: expected the speaker's"),
    (lambda r: r["utterances"][1].pop("speaker"), "utterance 2: expected the listener's"),
    (lambda r: r["utterances"].pop(1), "utterance 2: expected the listener's .* got speaker 'speaker'"),
    (lambda r: r["utterances"][0].update(text="\ud83d"), "not valid Unicode"),
    (_put(conv_id=[1]), "expected conv_id to be text or a whole number"),
    (_put(conv_id=True), "expected conv_id to be text or a whole number"),
    (_put(situation=None), "situation to be text"),
]


@pytest.mark.parametrize("change, match", BAD_RECORDS)
def test_bad_json_record(change, match, jsonl_folder):
    path = jsonl_folder / "train.jsonl"
    edit_record(path, 1, change)
    refuses(r"train\.jsonl:1: .*" + match, read_corpus, jsonl_folder)
    corpus = read_corpus(jsonl_folder, skip_bad=True)
    assert len(corpus.train) == 3
    assert corpus.skipped == {"train.jsonl": 1, "valid.jsonl": 0, "test.jsonl": 0}


@pytest.mark.parametrize(
    "line, match",
    [
        ('{"conv_id": "t', "not valid JSON"),
        ("[1]", "expected a JSON object"),
        ("NaN", "expected a finite number"),
        ("[" * 10**5, "nested deeper"),
    ],
)
def test_invalid_json(line, match, jsonl_folder):
    edit_line(jsonl_folder / "train.jsonl", 3, lambda _: line)
    refuses(r"train\.jsonl:3: .*" + match, read_corpus, jsonl_folder)
    assert read_corpus(jsonl_folder, skip_bad=True).skipped["train.jsonl"] == 1


def test_emotion_that_training_does_not_have(jsonl_folder, csv_folder):
    edit_record(jsonl_folder / "valid.jsonl", 1, _put(emotion="bored"))
    refuses(
        r"valid\.jsonl:1: unknown emotion 'bored'; expected one of .*joyful, sad", read_corpus, jsonl_folder
    )
    edit_line(csv_folder / "test.csv", 2, lambda line: line.replace(",joyful,", ",bored,"))
    refuses(r"test\.csv:2: unknown emotion 'bored'", read_corpus, csv_folder)


@pytest.mark.parametrize(
    "number, change, match, turns",
    [
        # A torn line; after it, the rest of its conversation cannot be recognised.
        (4, lambda line: line[:20], "torn line: expected 8 fields", [2, 2, 3, 1]),
        (4, lambda line: line + ",x,y", "torn line: expected 8 fields.* got 10", [2, 2, 3, 1]),
        (4, lambda line: line.replace("t:0,3", "t:0,x"), "torn line", [2, 2, 3, 1]),
        (2, lambda line: "", "expected utterance 1 of t:0, got 2", [2, 3, 1]),
        (3, lambda line: "", "expected utterance 2 of t:0, got 3", [1, 2, 3, 1]),
        (3, lambda line: line.replace(",8,", ",7,"), "expected the listener's turn", [1, 2, 3, 1]),
        (4, lambda line: line.replace(",7,", ",8,"), "expected speaker 7", [2, 2, 3, 1]),
        (5, lambda line: line.replace(",8,", ",9,"), "expected speaker 8", [3, 2, 3, 1]),
        (4, lambda line: line.replace("t:0,3", "t:0," + "9" * 5000), "torn line", [2, 2, 3, 1]),
        (4, lambda line: line.replace("_comma_", ","), "fields out of place.*selfeval", [2, 2, 3, 1]),
        (4, lambda line: line.replace(",7,", ",Oh no,"), "fields out of place.*got 'Oh no'", [2, 2, 3, 1]),
        (4, lambda line: line.replace("5|5|5_2|2|5", ""), "fields out of place", [2, 2, 3, 1]),
        (
            4,
            lambda line: (
                line.replace("Thanks", 'So ""well""').replace(",7,So", ',7,"So', 1).replace(".,5", '.",5')
            ),
            "quotes as another program saves them",
            [2, 2, 3, 1],
        ),
        (4, lambda line: line.replace("Thanks_comma_ I miss him.", " "), "utterance 3: empty", [2, 2, 3, 1]),
        (
            4,
            lambda line: line.replace("Thanks_comma_ I miss him.", "_comma_"),
            "utterance 3: empty",
            [2, 2, 3, 1],
        ),
        (4, lambda line: ",", "torn line", [2, 2, 3, 1]),
    ],
)
def test_bad_csv_line(number, change, match, turns, csv_folder):
    edit_line(csv_folder / "train.csv", number, change)
    where = number + (change("") == "" and change("t:0") == "")  # a line taken out shows at the next
    refuses(rf"train\.csv:{where}: .*{match}", read_corpus, csv_folder)
    corpus = read_corpus(csv_folder, skip_bad=True)
    assert [len(c.turns) for c in corpus.train] == turns
    assert corpus.skipped["train.csv"] > 0


def test_csv_without_header_is_refused_even_when_skipping(csv_folder):
    edit_line(csv_folder / "train.csv", 1, lambda line: line.replace("prompt", "situation"))
    refuses(r"train\.csv:1: expected the header conv_id,", read_corpus, csv_folder, skip_bad=True)


# download


@pytest.fixture
def archive(csv_folder):
    """An archive as the official one, with files that must not be taken."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name in SPLIT_NAMES:
            tar.add(csv_folder / f"{name}.csv", f"empatheticdialogues/{name}.csv")
        tar.add(csv_folder / "train.csv", "../../outside.csv")
        link = tarfile.TarInfo("empatheticdialogues/link/valid.csv")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    return buffer.getvalue()


@pytest.fixture
def serve():
    """Serves bytes on 127.0.0.1: serve(bytes) gives their address."""
    servers = []

    def start(content: bytes) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                found = self.path == "/archive.tar.gz"
                self.send_response(200 if found else 404)
                self.send_header("Content-Length", str(len(content) if found else 0))
                self.end_headers()
                if found:
                    self.wfile.write(content)

            def log_message(self, *arguments):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}/archive.tar.gz"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def everything_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


def test_download(archive, serve, csv_folder, tmp_path):
    folder = tmp_path / "a" / "b"
    download(folder, serve(archive), hashlib.sha256(archive).hexdigest(), progress=False)
    assert read_corpus(folder) == read_corpus(csv_folder)
    assert set(everything_in(folder)) == {f"{name}.csv" for name in SPLIT_NAMES}
    assert not list(tmp_path.rglob("outside.csv"))


def test_download_of_another_archive_leaves_nothing(archive, serve, tmp_path):
    refuses(
        "SHA-256 is [0-9a-f]{64}, expected 0",
        download,
        tmp_path / "d",
        serve(archive),
        "0" * 64,
        progress=False,
    )
    assert everything_in(tmp_path / "d") == []


def test_download_without_network_or_file(archive, serve, tmp_path):
    address = serve(archive)
    refuses("cannot be fetched .*expected a network", download, tmp_path / "d", address + "x", progress=False)
    refuses(
        "cannot be fetched .*expected a network",
        download,
        tmp_path / "d",
        "http://127.0.0.1:1/x",
        progress=False,
    )
    assert everything_in(tmp_path / "d") == []


def test_download_of_broken_archives(serve, tmp_path):
    def fetch(content):
        download(tmp_path / "d", serve(content), hashlib.sha256(content).hexdigest(), progress=False)

    refuses("not a readable archive", fetch, b"no archive at all")
    empty = io.BytesIO()
    tarfile.open(fileobj=empty, mode="w:gz").close()
    refuses(r"the archive lacks test\.csv, train\.csv, valid\.csv", fetch, empty.getvalue())


def test_real_counts(real_data):
    corpus = read_corpus(real_data / "ed")
    assert [len(getattr(corpus, name)) for name in SPLIT_NAMES] == [19533, 2770, 2547]
    answers = [sum(len(c.turns) // 2 for c in getattr(corpus, name)) for name in SPLIT_NAMES]
    assert answers == [40254, 5738, 5259]
    assert len(corpus.emotions) == 32
