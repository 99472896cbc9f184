"""The job over text: it trains both networks, measures and writes; bad input is one message."""

import json

import jax
import numpy as np
import pytest

from eqxldm import models
from experiments.train.terminal import UserError
from experiments.words.__main__ import main
from experiments.words.corpus import Corpus, Vocabulary, entropies, open_corpus

from children import run_together
from helpers import filled, llada_folder

TINY = """--tokens bytes --length 8 --steps 2 --batch-size 4 --depth 1 --width 8 --num-heads 2
    --windows 2 --draws 2 --samples 2 --calls 2 --samplers random""".split()


@pytest.fixture
def text(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "a.txt"
    path.write_text("".join(rng.choice(list("abcé "), 400)))
    return path


def test_a_run_leaves_its_table_page_and_networks_that_write(text, tmp_path, capsys):
    run = tmp_path / "run"
    main(["train", "--text", str(text), "--run-dir", str(run), *TINY])
    found = json.loads((run / "metrics.json").read_text())
    assert {"masked", "twin", "unigram", "bigram"} <= found["likelihood"].keys()
    assert [row["texts"] for row in found["table"]] == ["held out", "twin", "random"]
    # Two steps in, all bytes are still nearly alike: eight bits each, of about 1.2 a character.
    assert 8 < found["likelihood"]["masked"]["bits_per_character"] < 12
    assert "<script>" in (run / "appearing.html").read_text()
    capsys.readouterr()
    page = tmp_path / "a.html"
    main(["generate", "--model", str(run), "--prompt", "ab", "--length", "6", "--out", str(page)])
    written = capsys.readouterr().out
    assert written.startswith("ab") and "2 calls" in written and page.exists()
    with pytest.raises(UserError, match="--text: the folder has"):
        text.write_text(text.read_text() * 2)
        main(["train", "--text", str(text), "--run-dir", str(run), *TINY])
    ask = lambda *options: main(["generate", "--model", str(run), *options])
    for prompt, message in (
        ("abcabcabc", "longer than the context of 8"), ("abcdefgh", "nothing"),
        ("a\udcff", "bytes that are no UTF-8"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            ask("--prompt", prompt)
    for path in (tmp_path, text / "a.html", tmp_path / ("x" * 300)):
        with pytest.raises(UserError, match="--out"):
            ask("--prompt", "a", "--out", str(path))
    for written, message in (
        ({"characters": "abc"}, "do not belong together"), ({"characters": 5}, "is damaged"),
        ({"tokenizer": {"model": 5}}, "is no tokenizer"), (5, "is damaged"),
    ):  # fmt: skip
        (run / "vocabulary.json").write_text(json.dumps(written))
        with pytest.raises(UserError, match=message):
            ask("--prompt", "a")
    network = bytearray((run / "masked.safetensors").read_bytes())
    network[-1] ^= 1
    (run / "masked.safetensors").write_bytes(network)
    (run / "vocabulary.json").write_text('{"characters": ""}')
    with pytest.raises(UserError, match="not what was written"):
        ask("--prompt", "a")


def test_a_folder_of_llada_writes_the_same_on_one_device_and_on_two(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: i for i, word in enumerate("a b c d [MASK]".split())}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "a"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    sizes = dict(depth=1, width=16, num_heads=2, hidden=24, max_length=8, rope_theta=5e5)
    make = lambda: models.TokenTransformer(5, **sizes, key=jax.random.key(0))
    llada_folder(tmp_path, filled(make), mask_token_id=4)
    asked = ["-m", "experiments.words", "generate", "--model", tmp_path, "--prompt", "b c"]
    asked += ["--length", 6, "--calls", 2, "--temperature", 0]
    one, two, bad = run_together(
        asked, [*asked, "--mesh", "tensor=2"], [*asked, "--mesh", "tensor=3"], devices=2
    )
    assert (one.code, two.code) == (0, 0), two.err
    assert one.out == two.out and one.out.startswith("b c ") and "2 calls" in one.out
    assert len(one.out.splitlines()[0].split()) == 6
    assert bad.code == 2 and "--mesh: " in bad.err
    (tmp_path / "tokenizer.json").write_text('{"model": 5}')
    with pytest.raises(UserError, match=r"tokenizer\.json is no tokenizer"):
        main(["generate", "--model", str(tmp_path)])


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b"aaaa" * 50, "one character only"), (b"\xff", "no text in UTF-8"),
     (b"ab", "too few")],
)  # fmt: skip
def test_a_text_that_cannot_be_learned_from_is_refused(content, message, tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_corpus(path, "characters", 8)


def test_tokens_are_characters_bytes_or_a_file(text, tmp_path):
    letters = open_corpus(text, "characters", 8)
    assert letters.vocabulary.characters == " abcé" and letters.vocabulary.mask_id == 5
    assert letters.vocabulary.decode([1, 5, 4]) == "a_é"
    with pytest.raises(UserError, match="'x' is not among the 5 characters"):
        letters.vocabulary.encode("ax")
    by_bytes = Vocabulary("")
    assert by_bytes.decode(by_bytes.encode("é!")) == "é!" and by_bytes.mask_id == 256
    with pytest.raises(UserError, match="unknown tokenizer"):
        open_corpus(text, "words", 8)
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(UserError, match="no tokenizer file"):
        open_corpus(text, str(tmp_path / "t.json"), 8)
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, "?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "t.json"))
    words = open_corpus(text, str(tmp_path / "t.json"), 4).vocabulary
    gaps = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 9, "?": 7}, "?"))
    gaps.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    gaps.save(str(tmp_path / "gaps.json"))
    with pytest.raises(UserError, match="makes tokens up to 9, and says that it has 3"):
        open_corpus(text, str(tmp_path / "gaps.json"), 4)
    assert words.mask_id == 3 and words.encode("b a").tolist() == [1, 0]
    assert words.decode([0, 3, 1]) == "a_b"


def test_entropies_are_those_of_the_counts():
    tokens = np.tile(np.array([0, 1], np.int32), 5000)
    found = entropies(tokens, tokens, 2)
    assert abs(found["unigram"] - 1) < 1e-3 and found["bigram"] < 1e-2
    corpus = Corpus("", Vocabulary("ab"), tokens, tokens, 1.0)
    assert corpus.windows(4, 3).shape == (3, 4)
    batch = next(corpus.batches(4, 2, seed=0, rows=None))["x0"]
    assert batch.shape == (2, 4) and (np.diff(batch) != 0).all()
