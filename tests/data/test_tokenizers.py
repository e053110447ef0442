"""Tokenizers: round trips, byte lengths, streaming, and what they refuse."""

import json
import sys

import numpy as np
import pytest

from memjax.data import BPETokenizer, ByteTokenizer, StreamDecoder, Tokenizer, make_tokenizer

TEXT = "def f(x):\n    return x + 1  # naïve, 記憶 🧠 <|eos|> \t\r\n" * 3


@pytest.fixture(scope="module")
def bpe():
    return BPETokenizer.train([TEXT, b"memory " * 20], 300)


@pytest.fixture(params=["byte", "bpe"])
def tokenizer(request):
    return ByteTokenizer() if request.param == "byte" else request.getfixturevalue("bpe")


def check_lengths(tokenizer, ids, text):
    assert tokenizer.byte_lengths[ids].sum() == len(text.encode())


def test_round_trip_and_byte_lengths(tokenizer):
    assert isinstance(tokenizer, Tokenizer)
    for text in (TEXT, "", "a", "\x00\n", "🧠"):
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32
        assert ids.ndim == 1
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode_bytes(ids) == text.encode()
        np.testing.assert_array_equal(tokenizer.encode(text.encode()), ids)
        check_lengths(tokenizer, ids, text)
        assert not np.isin(ids, [tokenizer.eos, tokenizer.pad]).any()
    with pytest.raises(AssertionError):
        check_lengths(tokenizer, np.append(tokenizer.encode(TEXT), 65), TEXT)


def test_vocabulary(tokenizer):
    assert tokenizer.vocab % 128 == 0
    assert tokenizer.byte_lengths.shape == (tokenizer.vocab,)
    assert tokenizer.byte_lengths[tokenizer.eos] == tokenizer.byte_lengths[tokenizer.pad] == 0
    assert tokenizer.eos != tokenizer.pad
    specials = [tokenizer.eos, tokenizer.pad, tokenizer.vocab - 1]
    assert tokenizer.decode(specials) == ""
    for bad in (-1, tokenizer.vocab):
        with pytest.raises(ValueError, match=rf"token id {bad} is outside"):
            tokenizer.decode([65, bad])


def test_bytes_are_any_bytes():
    data = bytes(range(256))
    tokenizer = ByteTokenizer()
    assert tokenizer.decode_bytes(tokenizer.encode(data)) == data
    assert tokenizer.vocab == 384


def test_decode_never_raises_on_partial_characters(tokenizer):
    ids = tokenizer.encode("記憶🧠é")
    for i in range(len(ids)):
        for j in range(i, len(ids) + 1):
            assert isinstance(tokenizer.decode(ids[i:j]), str)


def test_stream_decoder_holds_back(tokenizer):
    ids = tokenizer.encode(TEXT)
    stream = StreamDecoder(tokenizer)
    pieces = [stream.push(int(i)) for i in ids]
    assert "".join(pieces) + stream.flush() == TEXT
    assert all("\ufffd" not in piece for piece in pieces)
    # The fault that it is for: decoding token by token breaks characters.
    assert "".join(tokenizer.decode([i]) for i in ByteTokenizer().encode("é")) != "é"


def test_stream_decoder_flushes_an_incomplete_character():
    tokenizer = ByteTokenizer()
    stream = StreamDecoder(tokenizer)
    assert stream.push(tokenizer.encode("a記")[:-1]) == "a"
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


def test_bpe_saves_and_loads(bpe, tmp_path):
    path = tmp_path / "bpe.json"
    bpe.save(path)
    again = make_tokenizer(str(path))
    np.testing.assert_array_equal(again.encode(TEXT), bpe.encode(TEXT))
    assert (again.name, again.vocab, again.eos, again.pad) == (
        bpe.name,
        bpe.vocab,
        bpe.eos,
        bpe.pad,
    )
    assert len(bpe.encode(TEXT)) < len(TEXT.encode())
    assert BPETokenizer.train([TEXT], 290).name != bpe.name


def test_bpe_names_the_byte_that_is_not_utf8(bpe):
    with pytest.raises(ValueError, match=r"byte 3 \(0xff\) is not UTF-8"):
        bpe.encode(b"abc\xff")


def test_bpe_training_needs_room_for_bytes():
    with pytest.raises(ValueError, match="vocab 200 must be at least 258"):
        BPETokenizer.train([TEXT], 200)


def test_bpe_bad_files(bpe, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json.*BPETokenizer\.train"):
        make_tokenizer(str(tmp_path / "nowhere.json"))
    broken = tmp_path / "broken.json"
    broken.write_text("{}")
    with pytest.raises(ValueError, match=r"broken\.json.*is not a tokenizer json"):
        make_tokenizer(str(broken))
    bpe.save(broken)
    spec = json.loads(broken.read_text())
    broken.write_text(json.dumps(spec | {"decoder": None}))
    with pytest.raises(ValueError, match="not byte-level"):
        make_tokenizer(str(broken))
    broken.write_text(json.dumps(spec | {"added_tokens": spec["added_tokens"][:1]}))
    with pytest.raises(ValueError, match="no end-of-document token"):
        make_tokenizer(str(broken))


def test_bpe_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r'pip install "memjax\[text\]"'):
        BPETokenizer.train([TEXT], 300)
