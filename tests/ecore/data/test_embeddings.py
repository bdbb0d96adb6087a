import gzip
import re
import zipfile

import numpy as np
import pytest

from ecore.data.embeddings import coverage, load_vectors
from ecore.errors import InputError

WORDS = ("<pad>", "sad", "dog", ". .")
TEXT = "the 1 2 3\nsad 0.5 -1e-1 2\n. . 7 8 9\nsad 9 9 9\n"
VECTORS = [[np.nan] * 3, [0.5, -0.1, 2], [np.nan] * 3, [7, 8, 9]]


def written(tmp_path, text, name="glove.txt"):
    path = tmp_path / name
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    elif path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme.md", "hello")
            archive.writestr("glove.txt", text)
    else:
        path.write_text(text)
    return path


@pytest.mark.parametrize("name", ["glove.txt", "glove.txt.gz", "glove.zip"])
def test_text_files(name, tmp_path):
    vectors = load_vectors([written(tmp_path, TEXT, name)], WORDS, progress=False)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, VECTORS, rtol=1e-6)


def test_npz_beside_text(tmp_path):
    arrays = {"words": np.array(["dog", "cat", "dog"]), "vectors": np.array([[1.0, 2], [3, 4], [5, 6]])}
    np.savez(tmp_path / "g.npz", **arrays)
    vectors = load_vectors([tmp_path / "g.npz", written(tmp_path, TEXT)], WORDS, progress=False)
    np.testing.assert_allclose(vectors[:, 2:], VECTORS, rtol=1e-6)
    np.testing.assert_array_equal(vectors[:, :2], [[np.nan] * 2, [np.nan] * 2, [1, 2], [np.nan] * 2])
    assert coverage(vectors, np.array([0, 6, 1, 0])) == (1.0, 1.0)
    assert coverage(vectors[:, :2], np.array([0, 6, 2, 0])) == (0.5, 0.25)


@pytest.mark.parametrize(
    "text, match",
    [
        ("", "glove.txt: empty; expected GloVe text"),
        ("sad\n", ":1: expected a word and its vector's numbers"),
        ("sad 1 2 3\ndog 1 2\n", ":2: 2 numbers, expected 3 as on the first line"),
        ("sad 1 2 3\ndog 1 2 3 4\n", ":2: 4 numbers, expected 3"),
        ("the 1 2 3\nsad 1 x 3\n", ":2: expected 3 numbers after the word"),
        ("sad 1 inf 3\n", ":1: a vector's number is not finite"),
        ("the 1 2 3\nsad 1 2 nan\n", ":2: a vector's number is not finite"),
        ("sad 1 1e38 3\n", ":1: a vector's number is not finite or over 1e"),
        ("sad" + " 1" * 10**6 + "\n", ":1: 1,000,000 numbers; expected at most 10,000"),
        ("the 1 2 3\n", "no vector for any word of the vocabulary"),
    ],
)
def test_malformed_text(text, match, tmp_path):
    with pytest.raises(InputError, match=match):
        load_vectors([written(tmp_path, text)], WORDS, progress=False)


def refuses(path, match):
    with pytest.raises(InputError) as caught:
        load_vectors([path], WORDS, progress=False)
    assert re.search(match, str(caught.value)), caught.value


def test_archives_that_cannot_be_used(tmp_path):
    path = written(tmp_path, TEXT, "two.zip")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("other.txt", TEXT)
    refuses(path, r"two\.zip: expected one \.txt file inside, found glove\.txt, other\.txt")
    with zipfile.ZipFile(tmp_path / "none.zip", "w") as archive:
        archive.writestr("readme.md", "")
    refuses(tmp_path / "none.zip", "found none")
    for name in ("gone.txt", "gone.gz", "gone.zip", "gone.npz"):
        refuses(tmp_path / name, f"{name}: no such file")
    for name in ("bad.gz", "bad.zip", "bad.npz"):
        (tmp_path / name).write_bytes(b"not an archive")
        refuses(tmp_path / name, f"{name}: cannot be read")
    whole = gzip.compress(TEXT.encode() * 100)
    (tmp_path / "torn.gz").write_bytes(whole[:-20])
    refuses(tmp_path / "torn.gz", "cannot be read")


def test_npz_that_cannot_be_used(tmp_path):
    np.savez(tmp_path / "keys.npz", words=np.array(["sad"]))
    refuses(tmp_path / "keys.npz", "expected arrays words and vectors")
    np.savez(tmp_path / "shape.npz", words=np.array(["sad"]), vectors=np.zeros((2, 3)))
    refuses(tmp_path / "shape.npz", r"expected \[W\] and \[W, g\]")
    np.savez(tmp_path / "object.npz", words=np.array(["sad"], dtype=object), vectors=np.zeros((1, 3)))
    refuses(tmp_path / "object.npz", "cannot be read")


def test_real_vectors(real_data):
    folder = real_data / "glove"
    files = [folder / "glove_6B_100d_ed.npz", folder / "glove_6B_50d_ed.npz"]
    vectors = load_vectors(files, ("happy", "qqqqzz", "dog"), progress=False)
    assert vectors.shape == (3, 150)
    assert np.isnan(vectors).all(axis=1).tolist() == [False, True, False]
