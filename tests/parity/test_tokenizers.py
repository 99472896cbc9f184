"""Tokenizers against transformers: CLIP's real vocabulary, pieces of two kinds trained here."""

import gzip
import importlib.util
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from transformers import BertTokenizerFast, CLIPTokenizer, T5Tokenizer

from eqxldm.text import load_tokenizer

from harness import SEED

COUNT = 2000
POOLS = [
    (0x20, 0x7F), (0xA0, 0x250), (0x300, 0x370), (0x370, 0x500), (0x600, 0x700), (0x900, 0xA00),
    (0x2000, 0x2070), (0x3040, 0x3100), (0x4E00, 0x9FFF), (0xAC00, 0xD7A0), (0x1F300, 0x1FA00),
    (1, 0x110000),
]  # fmt: skip
WORDS = [
    "<|endoftext|>", "<|startoftext|>", "<|EndOfText|>", "it's", "I'LL", "!", "!!", "a photo", "  ",
    "\t\n", "\u00a0", "É", "e\u0301", "ﬁ", "İ", "ẞ", "ǅ", "123", "<toy>", "<Toy>", "<b>", "</s>",
    "<pad>", "<extra_id_3>", "▁", "\u200b",
]  # fmt: skip


def strings():
    """Random texts of all scripts, with special tokens, blanks and marks in between."""
    rng = np.random.default_rng(SEED)

    def part():
        if rng.random() < 0.4:
            return WORDS[rng.integers(len(WORDS))]
        low, high = POOLS[rng.integers(len(POOLS))]
        numbers = rng.integers(low, high, rng.integers(1, 12))
        return "".join(chr(n) for n in numbers if not 0xD800 <= n < 0xE000)

    def text():
        return "".join(part() + " " * rng.integers(0, 2) for _ in range(rng.integers(0, 16)))

    return [text() for _ in range(COUNT)]


STRINGS = strings()


def clip_vocabulary():
    """`{token: id}` and the merges, from the list that ships with OpenCLIP."""
    package = importlib.util.find_spec("open_clip").submodule_search_locations[0]
    packed = (Path(package) / "bpe_simple_vocab_16e6.txt.gz").read_bytes()
    lines = gzip.decompress(packed).decode().split("\n")
    merges = [tuple(line.split()) for line in lines[1:48895]]
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printed]
    letters = [chr(b) for b in printed] + [chr(256 + i) for i in range(len(others))]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(tokens)}, merges


@pytest.fixture(scope="module")
def clip_folders(tmp_path_factory):
    """A function that writes the forms of a tokenizer's folder, of several years."""
    vocabulary, merges = clip_vocabulary()

    def write(padding, form):
        folder = tmp_path_factory.mktemp("clip")
        if form == "tokenizer.json":
            made = CLIPTokenizer(
                vocab=vocabulary, merges=merges, pad_token=padding, model_max_length=77
            )
            made.save_pretrained(folder)
            return folder
        (folder / "vocab.json").write_text(json.dumps(vocabulary))
        lines = [" ".join(merge) for merge in merges]
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]))
        token = lambda content, normalized: dict(
            content=content, normalized=normalized, lstrip=False, rstrip=False, single_word=False
        )
        config = dict(tokenizer_class="CLIPTokenizer", pad_token=padding, model_max_length=77)
        if form != "plain":
            record = {"__type": "AddedToken"}
            config["bos_token"] = token("<|startoftext|>", True) | record
            config["eos_token"] = token("<|endoftext|>", True) | record
        n = len(vocabulary)
        if form == "added_tokens.json":
            (folder / form).write_text(json.dumps({"<toy>": n, "<b>": n + 1}))
        if form in ("added_tokens_decoder", "added, saved again"):
            listed = {
                n - 2: token("<|startoftext|>", True),
                n - 1: token("<|endoftext|>", False),
                n: token("<toy>", True),
                n + 1: token("<b>", False),
            }
            listed |= {0: token("!", False)} if padding == "!" else {}
            special = lambda i: {"special": i < n}
            config["added_tokens_decoder"] = {
                str(i): listed[i] | special(i) for i in sorted(listed)
            }
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        if form == "added, saved again":
            again = tmp_path_factory.mktemp("again")
            CLIPTokenizer.from_pretrained(folder).save_pretrained(again)
            return again
        return folder

    return write


def differing(theirs, ours, length):
    """The texts of which ids or masks differ."""
    expected = theirs(
        STRINGS, padding="max_length", truncation=True, max_length=length, return_tensors="np"
    )
    found = ours(STRINGS, length)
    wrong = (expected["input_ids"] != found.ids).any(1)
    wrong |= (expected["attention_mask"] != found.mask).any(1)
    return [STRINGS[i] for i in np.nonzero(wrong)[0]]


@pytest.mark.parametrize(
    "form",
    ["plain", "records", "tokenizer.json", "added_tokens.json", "added_tokens_decoder",
     "added, saved again"],
)  # fmt: skip
@pytest.mark.parametrize("padding", ["<|endoftext|>", "!"])
def test_clip(clip_folders, padding, form):
    folder = clip_folders(padding, form)
    theirs, ours = CLIPTokenizer.from_pretrained(folder), load_tokenizer(folder)
    assert differing(theirs, ours, 77) == []
    assert differing(theirs, ours, 16) == []
    assert ours.vocabulary == len(theirs)


def test_the_published_ids(clip_folders):
    for padding, number in (("<|endoftext|>", 49407), ("!", 0)):
        tokens = load_tokenizer(clip_folders(padding, "plain"))(["a photo of a cat"])
        text = [49406, 320, 1125, 539, 320, 2368, 49407]
        assert tokens.ids[0].tolist() == text + 70 * [number]
        assert tokens.mask[0].tolist() == 7 * [True] + 70 * [False]


def test_ten_thousand_words(clip_folders):
    prompt = "a photo of a cat, " * 2500
    tokens = load_tokenizer(clip_folders("!", "plain"))([prompt, prompt.strip()])
    assert (tokens.ids[0] == tokens.ids[1]).all() and tokens.ids[0, -1] == 49407
    assert prompt.endswith(tokens.cut[0])
    words = prompt.removesuffix(tokens.cut[0])
    assert words.count(" ") == 63  # 12 times six tokens and three more


def texts():
    root = Path(__file__).parents[2]
    pages = [root / "README.md", root / "docs" / "derivations.md"]
    return [line for page in pages for line in page.read_text().split("\n")]


@pytest.fixture(scope="module", params=[800, 400])
def pieces(request, tmp_path_factory):
    """Two folders of one model: `spiece.model`, and what transformers makes of it."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts()), model_writer=written, vocab_size=request.param,
        minloglevel=2, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, normalization_rule_name="nmt_nfkc",
        hard_vocab_limit=False,
    )  # fmt: skip
    folder, converted = (tmp_path_factory.mktemp("t5") for _ in range(2))
    (folder / "spiece.model").write_bytes(written.getvalue())
    config = dict(tokenizer_class="T5Tokenizer", model_max_length=512, extra_ids=100)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    T5Tokenizer.from_pretrained(folder).save_pretrained(converted)
    return folder, converted


def test_t5_by_tokenizer_json(pieces):
    theirs, ours = T5Tokenizer.from_pretrained(pieces[1]), load_tokenizer(pieces[1])
    assert differing(theirs, ours, 128) == []
    assert differing(theirs, ours, 16) == []
    assert ours.vocabulary == len(theirs)
    both = shutil.copy(pieces[0] / "spiece.model", pieces[1])
    assert load_tokenizer(pieces[1]).vocabulary == ours.vocabulary, both


def test_t5_by_spiece_model(pieces):
    """As sentencepiece itself has it. The library of transformers normalises combining marks in
    another way, and finds special tokens in texts."""
    core = sentencepiece.SentencePieceProcessor(model_file=str(pieces[0] / "spiece.model"))
    ours = load_tokenizer(pieces[0])
    found = ours(STRINGS, 1024)
    for row, mask, text in zip(found.ids, found.mask, STRINGS, strict=True):
        assert row[mask].tolist() == [*core.encode(text), 1]
    special = ("</s>", "<pad>", "<extra_id_3>")
    theirs = T5Tokenizer.from_pretrained(pieces[0])
    wrong = [t for t in differing(theirs, ours, 128) if not any(s in t for s in special)]
    assert len(wrong) < 0.02 * COUNT


def test_bert(tmp_path):
    """Of word pieces trained here; the folder is what transformers writes."""
    core = tokenizers.BertWordPieceTokenizer(lowercase=True)
    core.train_from_iterator(texts(), vocab_size=600, show_progress=False)
    core.save_model(str(tmp_path))
    made = BertTokenizerFast(vocab=str(tmp_path / "vocab.txt"), model_max_length=64)
    made.save_pretrained(tmp_path)
    theirs, ours = BertTokenizerFast.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    assert ours.longest == 64 and ours.vocabulary == len(theirs) > 500
    assert differing(theirs, ours, 64) == []
    assert differing(theirs, ours, 16) == []
