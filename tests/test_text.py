"""Tokenizers read from folders: rows of ids, what is cut, and files that are wrong or damaged.

The real vocabulary and the comparison with transformers are in tests/parity/test_tokenizers.py.
"""

import io
import json
import sys

import numpy as np
import pytest
import sentencepiece
import tokenizers

from eqxldm.text import TokenizerError, load_tokenizer
from eqxldm.text.clip import BEGIN, END

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TOKENS = [*"!'", *LETTERS, "!</w>", *(f"{letter}</w>" for letter in LETTERS)]
MERGES = [("a", "t</w>"), ("c", "at</w>")]
TOKENS += ["".join(merge) for merge in MERGES] + [BEGIN, END]
IDS = {token: i for i, token in enumerate(TOKENS)}
TEXTS = ["a photo of a cat", "the cat sat on the mat", "a red fox in the snow", "dogs and cats"]


def clip_folder(path, *, config=None, vocabulary=IDS, merges=MERGES, header="#version: 0.2\n"):
    path.mkdir(exist_ok=True)
    (path / "vocab.json").write_text(json.dumps(vocabulary))
    (path / "merges.txt").write_text(header + "".join(f"{a} {b}\n" for a, b in merges))
    if config is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def pieces():
    """A sentencepiece model with T5's first three ids."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 5), model_writer=written, vocab_size=27, minloglevel=2,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, normalization_rule_name="nmt_nfkc",
    )  # fmt: skip
    return written.getvalue()


def t5_folder(path, pieces, *, form="spiece.model"):
    path.mkdir(exist_ok=True)
    if form == "spiece.model":
        (path / form).write_bytes(pieces)
        return path
    core = sentencepiece.SentencePieceProcessor(model_proto=pieces)
    scores = [(core.id_to_piece(i), core.get_score(i)) for i in range(core.get_piece_size())]
    whole = tokenizers.Tokenizer(tokenizers.models.Unigram(scores, unk_id=2))
    whole.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    whole.enable_truncation(4)  # what a file says of lengths does not count
    whole.enable_padding(length=30)
    whole.save(str(path / form))
    return path


def test_a_row_is_begin_text_end_and_padding(tmp_path):
    tokens = load_tokenizer(clip_folder(tmp_path))(["Cat  AT!", ""], 8)
    text = [IDS[t] for t in ("cat</w>", "at</w>", "!</w>")]
    assert tokens.ids.tolist() == [
        [IDS[BEGIN], *text, *4 * [IDS[END]]],
        [IDS[BEGIN], *7 * [IDS[END]]],
    ]
    assert tokens.ids.dtype == np.int32 and tokens.mask.sum(1).tolist() == [5, 2]
    assert tokens.mask[:, 0].all() and tokens.cut == ("", "")


def test_the_padding_is_the_one_that_the_folder_names(tmp_path):
    """And it is found in texts, as transformers does: "!" is then another token than "!</w>"."""
    config = {"tokenizer_class": "CLIPTokenizer", "pad_token": "!", "model_max_length": 7}
    tokens = load_tokenizer(clip_folder(tmp_path, config=config))(["at!", "at"])
    assert tokens.ids.shape == (2, 7)
    assert tokens.ids[0].tolist() == [IDS[BEGIN], IDS["at</w>"], 0, IDS[END], 0, 0, 0]
    assert tokens.mask.sum(1).tolist() == [4, 3]
    as_record = config | {"pad_token": {"content": "!", "lstrip": False}}
    again = load_tokenizer(clip_folder(tmp_path, config=as_record))(["at!", "at"])
    assert (again.ids == tokens.ids).all()


def test_what_is_cut_is_handed_back_as_written(tmp_path):
    tokenizer = load_tokenizer(clip_folder(tmp_path))
    tokens = tokenizer(["Cat at  CAT a", "cat " * 10_000, "cat at cat a"], 5)
    assert tokens.cut == ("a", ("cat " * 9_997), "a")
    assert tokens.mask.all() and (tokens.ids[:, -1] == IDS[END]).all()
    assert tokenizer(["cat " * 75]).cut == ("",)
    assert tokenizer(["cat " * 76]).cut == ("cat ",)


@pytest.mark.parametrize("form", ["spiece.model", "tokenizer.json"])
def test_t5_ends_its_texts_and_pads_with_zero(tmp_path, pieces, form):
    tokenizer = load_tokenizer(t5_folder(tmp_path, pieces, form=form))
    core = sentencepiece.SentencePieceProcessor(model_proto=pieces)
    tokens = tokenizer(["the cat sat", ""], 20)
    row = core.encode("the cat sat")
    assert tokens.ids[0].tolist() == [*row, 1, *(19 - len(row)) * [0]]
    assert tokens.ids[1].tolist() == [1, *19 * [0]]
    assert tokens.mask.sum(1).tolist() == [len(row) + 1, 1]
    assert tokenizer(["cat"]).ids.shape == (1, 512)
    assert tokenizer(["cat"], 600).ids.shape == (1, 600)  # T5 has no last position
    long = tokenizer(["the cat sat on the mat"], 6)
    assert long.ids[0, -1] == 1 and "the cat sat on the mat".endswith(long.cut[0]) and long.cut[0]


def test_added_tokens_are_found_in_texts(tmp_path):
    n = len(IDS)
    listed = {str(n): {"content": "<toy>", "normalized": True}, str(n + 1): {"content": "<b>"}}
    inverted = load_tokenizer(clip_folder(tmp_path, config={"added_tokens_decoder": listed}))
    assert inverted(["cat<toy><b>"], 6).ids[0, 1:4].tolist() == [IDS["cat</w>"], n, n + 1]
    assert inverted.vocabulary == n + 2
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<b>": n + 1, "<toy>": n}))
    assert load_tokenizer(tmp_path)(["<b>"], 4).ids[0, 1] == n + 1
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<b>": n + 1}))
    with pytest.raises(TokenizerError, match=rf"'<b>' has the id {n + 1}, the vocabulary of {n}"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "prompts, length, message",
    [
        ("a cat", None, "needs a list of prompts"),
        ([], None, "at least one prompt"),
        (["a", 3], None, "parameter 'prompts'|prompt 1 must be a string, got 3"),
        (["a", "b\udc80"], None, r"prompt 1 is no valid text: '\\udc80' at character 1"),
        (["a"], 2, "length must be at least 3 and at most 77, got 2"),
        (["a"], 78, "length must be at least 3 and at most 77, got 78"),
    ],
)
def test_prompts_and_lengths_that_make_no_sense(tmp_path, prompts, length, message):
    with pytest.raises(ValueError, match=message):
        load_tokenizer(clip_folder(tmp_path))(prompts, length)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda p: (p / "merges.txt").unlink(), "lacks merges.txt"),
        (lambda p: (p / "vocab.json").unlink(), "lacks vocab.json"),
        (lambda p: (p / "vocab.json").write_text('{"a": 0'), "vocab.json is damaged, not JSON"),
        (lambda p: (p / "vocab.json").write_text("[1]"), "must hold a JSON object"),
        (lambda p: (p / "vocab.json").write_text('{"a": "0"}'), "each token its number"),
        (lambda p: (p / "merges.txt").write_text("a b c\n"), "its merges two tokens"),
        (lambda p: (p / "merges.txt").write_bytes(b"a \xff"), "is not UTF-8"),
        (lambda p: (p / "merges.txt").write_text("q q\n"), "do not belong together"),
        (lambda p: clip_folder(p, vocabulary={"a</w>": 0}, merges=[]), r"lacks <\|startoftext"),
        (lambda p: clip_folder(p, config={"pad_token": "<none>"}), "no padding token '<none>'"),
        (
            lambda p: clip_folder(p, config={"tokenizer_class": "XLNetTokenizer"}),
            "unknown tokenizer 'XLNetTokenizer'; known are CLIPTokenizer",
        ),
        (
            lambda p: clip_folder(p, config={"tokenizer_class": "T5Tokenizer"}),
            "neither tokenizer.json nor spiece.model",
        ),
        (
            lambda p: clip_folder(p, config={"added_tokens_decoder": {"x": "y"}}),
            "an added token has the odd number 'x'",
        ),
    ],
)
def test_clip_files_that_are_wrong_or_damaged(tmp_path, change, message):
    config = {"tokenizer_class": "CLIPTokenizer"}
    change(clip_folder(tmp_path, config=config))
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(tmp_path)


def test_t5_files_that_are_wrong_or_damaged(tmp_path, pieces):
    path = t5_folder(tmp_path / "cut", pieces) / "spiece.model"
    path.write_bytes(pieces[:100])
    with pytest.raises(TokenizerError, match="damaged or no sentencepiece model"):
        load_tokenizer(path.parent)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "Unigram"}}')
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is damaged or no tokenizer"):
        load_tokenizer(tmp_path)
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5TokenizerFast"}')
    with pytest.raises(TokenizerError, match="is of the kind BPE; T5 and umT5 have Unigram"):
        load_tokenizer(tmp_path)
    other = tokenizers.Tokenizer(tokenizers.models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    other.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="has no token </s>: it is another model's"):
        load_tokenizer(tmp_path)


def test_folders_that_hold_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(TokenizerError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    clip_folder(tmp_path / "tokenizer")
    with pytest.raises(TokenizerError, match="Load one of its folders: tokenizer"):
        load_tokenizer(tmp_path)


def test_without_its_libraries_a_tokenizer_says_what_to_install(tmp_path, pieces, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(TokenizerError, match=r"need tokenizers.* pip install 'eqxldm\[text\]'"):
        load_tokenizer(clip_folder(tmp_path / "clip"))
    with pytest.raises(TokenizerError, match=r"need sentencepiece.* pip install 'eqxldm\[text\]'"):
        load_tokenizer(t5_folder(tmp_path / "t5", pieces))
