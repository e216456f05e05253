"""Text that comes token by token, prompts, and how `seqpar generate` tells of them: pure, without models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from seqpar.launch.prompts import encode_prompts, left_padded
from seqpar.launch.telling import Result, Telling, tell
from seqpar.launch.text import SEPARATOR, ByteText, Text, TokenizerText

WORDS = ["Ähre über Möwe", "語る言葉", "plain words, and more", "🙂 smiles 🙂🙂"]


def _tokenizer(kind: str, **special: str) -> PreTrainedTokenizerFast:
    """Trained on a few words: of bytes; or of letters, with marks for spaces and one token for all that is unknown."""
    if kind == "bytes":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet, words = pre_tokenizers.ByteLevel.alphabet(), WORDS
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        alphabet, words = [*"▁abcdefghijklmnopqrstuvwxyz"], ["plain words and more words"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>", "<unk>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(words, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


TEXTS: dict[str, Text] = {
    "bytes": ByteText(),
    "tokenizer of bytes": TokenizerText(_tokenizer("bytes", bos_token="<s>", eos_token="</s>")),
    "tokenizer with spaces": TokenizerText(_tokenizer("spaces", bos_token="<s>", eos_token="</s>")),
}


@pytest.mark.parametrize("name", TEXTS)
@given(words=st.text(st.sampled_from("ab or,é語🙂 \n"), max_size=30))
def test_a_stream_says_what_the_whole_says(name: str, words: str) -> None:
    text = TEXTS[name]
    before = text.prompt("and more")
    tokens = text.encode("and more" + words)[len(before) : -1].tolist()
    stream = text.stream(before)
    pieces = [stream.put(token) for token in tokens]
    assert "".join(pieces) + stream.end() == text.decode([*before, *tokens])[len(text.decode(before)) :]
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)


@pytest.mark.parametrize("name", ["bytes", "tokenizer of bytes"])
def test_a_character_comes_when_it_is_whole(name: str) -> None:
    text = TEXTS[name]
    stream = text.stream(text.prompt("x"))
    tokens = text.prompt("𝄞a")[1:]
    assert len(tokens) == 5, "a byte each"
    assert [stream.put(token) for token in tokens] == ["", "", "", "𝄞", "a"]
    assert [stream.put(token) for token in tokens[:2]] == ["", ""]
    assert stream.end() == "\N{REPLACEMENT CHARACTER}"


def test_bytes_that_are_no_text_do_not_hold_back_what_follows() -> None:
    tokens = TEXTS["tokenizer of bytes"].prompt("𝄞")[1:]
    stream = TEXTS["tokenizer of bytes"].stream([])
    said = "".join(stream.put(token) for token in tokens[1:] * 20)
    assert said.count("\N{REPLACEMENT CHARACTER}") > 50


def test_special_tokens_say_nothing() -> None:
    for text in TEXTS.values():
        assert text.after(text.prompt("a"), [*text.ends, *text.prompt("b")]).strip() == "b"


def test_prompts_are_opened_as_in_training_or_as_the_tokenizer_does() -> None:
    tokenizer = _tokenizer("bytes", bos_token="<s>", eos_token="</s>")
    plain = tokenizer("words", add_special_tokens=False).input_ids
    assert TokenizerText(tokenizer).prompt("words") == [tokenizer.bos_token_id, *plain]
    assert TokenizerText(tokenizer, as_documents=False).prompt("words") == plain
    assert ByteText().prompt("é") == [SEPARATOR, 0xC3, 0xA9]


def test_a_saved_tokenizer_is_the_same(tmp_path: Path) -> None:
    before = TEXTS["tokenizer of bytes"]
    before.save(tmp_path)
    after = TokenizerText.load(tmp_path)
    assert after.encode(WORDS[0]).tolist() == before.encode(WORDS[0]).tolist()
    assert (after.ends, after.padding, after.vocabulary) == (before.ends, before.padding, before.vocabulary)


def test_prompts_of_a_batch_are_padded_on_the_left() -> None:
    tokens, mask = left_padded([[1, 2, 3], [4]], padding=9)
    assert tokens.tolist() == [[1, 2, 3], [9, 9, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert tokens.dtype == torch.int64


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        (["", "a"], "--prompt: prompt 1 of 2 has no tokens; expected one or more: write some text"),
        (["abc"], "--max-new-tokens is 8 after 3 tokens of the prompt; expected 7 at most, for the model has 10"),
        (["a", "x" * 12], "12 tokens of prompt 2 of 2; expected 0 at most, for the model has 10 positions"),
        (["zz"], "makes token 122 of the prompt, and embeddings of 120 tokens; expected one for each"),
    ],
    ids=["no tokens", "too long", "much too long", "unknown token"],
)
def test_prompts_that_cannot_be(prompts: list[str], words: str) -> None:
    class Bare(ByteText):
        def prompt(self, text: str) -> list[int]:
            return super().prompt(text)[1:]

    with pytest.raises(ValueError, match="expected") as refusal:
        encode_prompts(prompts, Bare(), max_new_tokens=8, positions=10, embeddings=120 if "zz" in prompts else 256)
    assert words in str(refusal.value)


def test_as_many_tokens_as_there_are_positions_fit() -> None:
    assert encode_prompts(["a"], ByteText(), max_new_tokens=8, positions=10, embeddings=264) == [[SEPARATOR, 97]]
    assert len(encode_prompts(["a" * 99], ByteText(), max_new_tokens=8, positions=None, embeddings=264)[0]) == 100


def test_a_single_prompt_s_text_is_told_as_it_comes(capsys: pytest.CaptureFixture[str]) -> None:
    telling = Telling(ByteText().stream([]), silent=(SEPARATOR,), steps=5, shows=False)
    told = []
    for tokens in [torch.tensor([[97, 98]]), *map(torch.tensor, ([0xC3], [0xA9], [99], [SEPARATOR]))]:
        telling.put(tokens)
        told.append(capsys.readouterr().out)
    telling.end()
    assert told == ["", "", "é", "c", ""]
    assert capsys.readouterr().out == "\n"


RESULT = Result(
    texts=["one", "two\n"],
    tokens=[[1, 2], [3]],
    finished=["length", "end"],
    prompt_tokens=[100, 2],
    generated_tokens=[2, 1],
    prefilled_tokens=100,
    prefill_seconds=0.5,
    decode_seconds=0.1,
    decode_bytes={"out": 4000, "lse": 500},
    cache_bytes=2_000_000,
    ranks=2,
    device="cpu",
)


def test_several_texts_stand_under_their_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    tell(RESULT, ["first\nline", "x" * 99], as_json=False)
    out, err = capsys.readouterr()
    assert out == f"--- prompt 1 of 2: first line\none\n--- prompt 2 of 2: {'x' * 60}…\ntwo\n\n"
    assert err == (
        "102 prompt tokens · 3 generated · prefill 200 tokens/s · decode 30.0 tokens/s · "
        "1.5 KB sent per rank and token · cache 2.0 MB per rank\n"
    )


def test_json_is_all_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    tell(RESULT, ["a", "b"], as_json=True)
    out, err = capsys.readouterr()
    assert err == ""
    told = json.loads(out)
    assert told["texts"] == ["one", "two\n"]
    assert told["tokens"] == [[1, 2], [3]]
    assert told["prefill_tokens_per_second"] == 200
    assert told["bytes_per_token"] == 1500
