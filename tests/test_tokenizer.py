"""Tokenizers: the ids of transformers and sentencepiece, and text that streams without loss."""

import gzip
import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import pytest
import sentencepiece
import tokenizers
from gguf.constants import TokenType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from agentrt.errors import ModelNotFound, ModelUnsupported, WeightsInvalid
from agentrt.registry import locate
from agentrt.tokenizer import load_tokenizer

TRACES = Path(__file__).parents[2] / "shared" / "traces" / "tau_airline.jsonl.gz"
EXCERPTS = [
    "Trip type: Is it a one-way or round-trip?\n2. Cabin class: basic economy\n\n3. Passengers",
    '{"reservation_id": "4WQ150", "flights": [{"date": "2024-05-20", "price": 1,237}]}',
    "  two  spaces, 12345 digits 2024,\ttabs\r\n\r\nlines   \n   ends  ",
    "don't I'll WE'VE it'S naïve Ünïcödé 你好，世界 👩‍👩‍👧 Ⅷ ½ ٣ \u00a0 e\u0301 ſ",
    "<|im_start|>user\n<|im_end|> <repo_name> <|endoftext|>",
    "",
]
WORDS = "the flight of my family flies to new york at noon and the price is 120 dollars. "
text = st.text(max_size=60) | st.sampled_from(EXCERPTS)
relaxed = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def trace_texts():
    """Every message and tool argument of the real conversations, or a few excerpts of them."""
    if not TRACES.is_file():
        return EXCERPTS
    with gzip.open(TRACES, "rt") as lines:
        messages = [message for line in lines for message in json.loads(line)["messages"]]
    calls = [call for message in messages for call in message.get("tool_calls", [])]
    texts = {message["content"] for message in messages} | {call["arguments"] for call in calls}
    return sorted(texts) + EXCERPTS


@pytest.fixture(scope="module")
def smollm():
    return load_tokenizer(locate("smollm2-135m", Path("~/.cache/agentrt").expanduser()))


def byte_level(pre_tokenizer, normalizer=None):
    """A small byte-level BPE tokenizer, trained here, with two special tokens and one added."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizer
    trained.decoder = decoders.ByteLevel()
    if normalizer is not None:
        trained.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|bos|>", "<|im_end|>"],
        show_progress=False,
    )
    trained.train_from_iterator([WORDS * 5, *EXCERPTS], trainer)
    trained.add_tokens([tokenizers.AddedToken("<tool_call>", normalized=False)])
    return trained


def splitting(pattern):
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, last])


# As in the tokenizer.json of Llama 3, Qwen 2 and SmolLM 2.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = pre_tokenizers.Digits(individual_digits=True)
PRE_TOKENIZERS = {
    "gpt-2": (GPT2, None),
    "smollm": (pre_tokenizers.Sequence([DIGITS, GPT2]), None),
    "llama-bpe": (splitting(LLAMA3), None),
    "qwen2": (splitting(LLAMA3.replace("{1,3}", "")), normalizers.NFC()),
}


def write_gguf(path, tokens, types, *, model, pre=None, merges=None, scores=None, eos=1, flags=()):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if merges is not None:
        writer.add_token_merges(merges)
    if scores is not None:
        writer.add_token_scores(scores)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(eos)
    for key, value in flags:
        writer.add_bool(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def gguf_of(path, trained, pre):
    vocabulary = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    kinds = {
        0: TokenType.CONTROL,
        1: TokenType.CONTROL,
        len(vocabulary) - 1: TokenType.USER_DEFINED,
    }
    types = [kinds.get(index, TokenType.NORMAL) for _, index in vocabulary]
    merges = [" ".join(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    tokens = [token for token, _ in vocabulary]
    return write_gguf(path, tokens, types, model="gpt2", pre=pre, merges=merges)


def test_ids_of_the_default_model_equal_those_of_transformers(smollm):
    # transformers' own reading of the file leaves out the pre-tokenizer that it names, and differs
    # on "\n\n1."; with SmolLM's pre-tokenizer put in, all agree.
    reference = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(smollm.backend.to_str())
    )
    reference.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([DIGITS, GPT2])
    for sample in trace_texts():
        ids = smollm.encode(sample, allow_special=True)
        assert ids == reference.encode(sample, add_special_tokens=False)
        assert smollm.decode(smollm.encode(sample)) == sample


def test_known_ids_of_the_default_model(smollm):
    # From llama.cpp's and transformers' runs of the original tokenizer.
    assert smollm.encode("<|im_start|>system\n", allow_special=True) == [1, 9690, 198]
    assert smollm.encode("Hello world 2024") == [19556, 905, 216, 34, 32, 34, 36]
    assert smollm.eos_token_ids == {2}
    assert smollm.bos_token_id == 1
    assert smollm.vocab_size == 49152
    assert smollm.special_tokens["<|im_end|>"] == 2
    assert smollm.token_bytes(2) == b"<|im_end|>"
    assert smollm.token_bytes(49152) == smollm.token_bytes(-1) == b""


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_gguf_bpe_equals_the_tokenizer_it_came_from(tmp_path, pre):
    trained = byte_level(*PRE_TOKENIZERS[pre])
    trained.save(str(tmp_path / "tokenizer.json"))
    from_json = load_tokenizer(tmp_path)
    from_gguf = load_tokenizer(gguf_of(tmp_path / "a.gguf", trained, pre))
    assert from_gguf.special_tokens == from_json.special_tokens == {"<|bos|>": 0, "<|im_end|>": 1}
    for sample in trace_texts()[::20] + EXCERPTS:
        for name in ("", "<|im_end|>", "<tool_call>"):
            whole = trained.encode(sample + name + sample, add_special_tokens=False).ids
            assert from_json.encode(sample + name + sample, allow_special=True) == whole
            assert from_gguf.encode(sample + name + sample, allow_special=True) == whole
            assert from_json.encode(name + sample) == from_gguf.encode(name + sample)
    assert from_gguf.decode(range(from_gguf.vocab_size)) == from_json.decode(
        range(from_json.vocab_size)
    )


def test_the_default_pre_tokenizer_splits_as_llama_cpp_does(tmp_path):
    trained = byte_level(GPT2)
    tokenizer = load_tokenizer(gguf_of(tmp_path / "a.gguf", trained, "default"))
    cut = tokenizer.backend.pre_tokenizer.pre_tokenize_str("it's 12345 == ok...")
    assert [piece.replace("Ġ", " ") for piece, _ in cut] == [
        *("it", "'", "s", " ", "123", "45", " ", "==", " ok", "...")
    ]


@given(sample=text)
@relaxed
def test_special_tokens_in_plain_text_are_text(smollm, sample):
    for name in ("<|im_start|>", "<|im_end|>", "<|endoftext|>"):
        ids = smollm.encode(sample + name + sample)
        assert not set(ids) & set(smollm.special_tokens.values())
        # The model has no token for some control characters, and for bytes of rare planes.
        if smollm.decode(smollm.encode(sample)) == sample:
            assert smollm.decode(ids) == sample + name + sample
        assert smollm.special_tokens[name] in smollm.encode(name, allow_special=True)


@given(ids=st.lists(st.integers(-2, 49160), max_size=40), data=st.data())
@relaxed
def test_streamed_text_is_the_decoded_text(smollm, ids, data):
    assert_stream_is_whole(smollm, ids, data)
    raw = b"".join(map(smollm.token_bytes, ids))
    assert smollm.decode(ids) == raw.decode("utf-8", "replace")


@given(raw=st.binary(max_size=24), data=st.data())
@relaxed
def test_streamed_bytes_are_the_decoded_bytes(smollm, raw, data):
    # Single-byte tokens make every kind of broken UTF-8, cut at every place.
    by_bytes = {smollm.token_bytes(index): index for index in range(17, 273)}
    ids = [by_bytes[bytes([byte])] for byte in raw if bytes([byte]) in by_bytes]
    assert_stream_is_whole(smollm, ids, data)


def assert_stream_is_whole(tokenizer, ids, data):
    decoder, parts, rest = tokenizer.stream(), [], list(ids)
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        parts.append(decoder.push(rest[:size]))
        rest = rest[size:]
    assert "".join(parts) + decoder.flush() == tokenizer.decode(ids)


def test_a_character_is_never_cut(smollm):
    ids = smollm.encode("👩‍👧")
    assert len(ids) > 2
    decoder = smollm.stream()
    pushed = [decoder.push([index]) for index in ids]
    assert "".join(pushed) == "👩‍👧"
    assert "\ufffd" not in "".join(pushed)
    unfinished = smollm.stream()
    assert unfinished.push(ids[:1]) == ""
    assert unfinished.flush() == "\ufffd"


def test_threads_can_encode_at_once(smollm):
    def encode(index):
        return smollm.encode(f"{EXCERPTS[4]} {index}", allow_special=bool(index % 2))

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(encode, range(400)))
    assert together == [encode(index) for index in range(400)]


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
    """A folder with a tokenizer.model like Llama 2's: BPE, byte fallback, identity normaliser."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([WORDS] * 20 + EXCERPTS[:2]),
        model_writer=model,
        model_type="bpe",
        vocab_size=340,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        minloglevel=2,
    )
    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    (folder / "config.json").write_text('{"eos_token_id": [2, 7], "bos_token_id": 1}')
    return folder


def as_gguf(folder, path, **options):
    processor = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    tokens, types = [], []
    for index in range(processor.get_piece_size()):
        tokens.append(processor.id_to_piece(index))
        kinds = [
            (processor.is_unknown, TokenType.UNKNOWN),
            (processor.is_control, TokenType.CONTROL),
            (processor.is_byte, TokenType.BYTE),
        ]
        types.append(next((kind for test, kind in kinds if test(index)), TokenType.NORMAL))
    scores = [processor.get_score(index) for index in range(len(tokens))]
    return write_gguf(path, tokens, types, model="llama", scores=scores, eos=2, **options)


def test_sentencepiece_ids_equal_those_of_the_library(sentencepiece_model, tmp_path):
    processor = sentencepiece.SentencePieceProcessor(str(sentencepiece_model / "tokenizer.model"))
    from_model = load_tokenizer(sentencepiece_model)
    from_gguf = load_tokenizer(as_gguf(sentencepiece_model, tmp_path / "a.gguf"))
    for sample in [*trace_texts()[::10], *EXCERPTS, "<s> </s><unk>"]:
        ids = processor.encode(sample)
        assert from_model.encode(sample) == from_gguf.encode(sample) == ids
        assert from_model.decode(ids) == from_gguf.decode(ids) == sample
    assert from_model.eos_token_ids == {2, 7}
    assert from_gguf.eos_token_ids == {2}
    assert from_model.special_tokens == from_gguf.special_tokens
    assert from_gguf.token_bytes(processor.piece_to_id("<0x0A>")) == b"\n"
    assert from_model.backend is None


def test_sentencepiece_special_tokens_equal_those_of_transformers(sentencepiece_model):
    mine = load_tokenizer(sentencepiece_model)
    processor = sentencepiece.SentencePieceProcessor(str(sentencepiece_model / "tokenizer.model"))
    pieces = {processor.id_to_piece(index): index for index in range(processor.get_piece_size())}
    order = sorted(pieces, key=pieces.get)
    merges = [
        (left, piece[len(left) :])
        for piece in order
        for left in (piece[:cut] for cut in range(1, len(piece)))
        if left in pieces and piece[len(left) :] in pieces and not processor.is_byte(pieces[piece])
    ]
    theirs = LlamaTokenizer(vocab=pieces, merges=merges)
    for sample in [
        "<s>the flight</s> of my<s><s> family",
        "the price</s>",
        "</s>  noon",
        "a<unk>b",
    ]:
        ids = theirs.encode(sample, add_special_tokens=False)
        assert mine.encode(sample, allow_special=True) == ids
        assert mine.decode(ids) == theirs.decode(ids)


def test_gguf_without_the_leading_space(sentencepiece_model, tmp_path):
    flags = [("tokenizer.ggml.add_space_prefix", False)]
    tokenizer = load_tokenizer(as_gguf(sentencepiece_model, tmp_path / "a.gguf", flags=flags))
    ids = tokenizer.encode("the flight")
    assert tokenizer.token_bytes(ids[0])[:1] == b"t"
    assert tokenizer.decode(ids) == "the flight"
    assert tokenizer.decode(tokenizer.encode(" the")) == " the"


def test_tokens_added_beside_a_sentencepiece_model(sentencepiece_model, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(
        (sentencepiece_model / "tokenizer.model").read_bytes()
    )
    added = {"340": {"content": "<|end|>", "special": True}, "341": {"content": "<tool>"}}
    config = {"added_tokens_decoder": added, "eos_token": "<|end|>", "bos_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 342
    assert tokenizer.eos_token_ids == {340}
    assert tokenizer.bos_token_id is None
    plain = tokenizer.encode("the<|end|><tool>price")
    assert 340 not in plain
    assert 341 in plain
    ids = tokenizer.encode("the<|end|><tool>price", allow_special=True)
    assert [index for index in ids if index >= 340] == [340, 341]
    assert tokenizer.decode(ids) == tokenizer.decode(plain) == "the<|end|><tool>price"


@given(data=st.data(), ids=st.lists(st.integers(0, 339), max_size=30))
@relaxed
def test_sentencepiece_streams_what_it_decodes(sentencepiece_model, ids, data):
    assert_stream_is_whole(load_tokenizer(sentencepiece_model), ids, data)


def test_byte_fallback_tokenizer_json(sentencepiece_model, tmp_path):
    model = models.BPE(
        {"<unk>": 0, "<0xC3>": 1, "<0xA9>": 2, "▁": 3, "a": 4}, [], byte_fallback=True
    )
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("aé a")
    assert ids == [3, 4, 1, 2, 3, 4]
    assert tokenizer.decode(ids) == backend.decode(ids) == "aé a"


def test_end_ids_come_from_the_most_complete_config(tmp_path):
    byte_level(GPT2).save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).eos_token_ids == frozenset()
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|im_end|>"}}')
    assert load_tokenizer(tmp_path).eos_token_ids == {1}
    (tmp_path / "config.json").write_text('{"eos_token_id": 5}')
    assert load_tokenizer(tmp_path).eos_token_ids == {5}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert load_tokenizer(tmp_path).eos_token_ids == {5, 6}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(WeightsInvalid, match="'x'"):
        load_tokenizer(tmp_path)


def test_what_is_not_implemented_is_named(tmp_path):
    trained = byte_level(GPT2)
    with pytest.raises(ModelUnsupported, match="'tekken'"):
        load_tokenizer(gguf_of(tmp_path / "a.gguf", trained, "tekken"))
    with pytest.raises(ModelUnsupported, match="None"):
        load_tokenizer(gguf_of(tmp_path / "b.gguf", trained, None))
    with pytest.raises(ModelUnsupported, match="'bert'"):
        load_tokenizer(write_gguf(tmp_path / "c.gguf", ["a"], [1], model="bert"))
    trained.decoder = decoders.WordPiece()
    trained.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ModelUnsupported, match="WordPiece"):
        load_tokenizer(tmp_path)


def test_damaged_files_are_refused(tmp_path):
    with pytest.raises(ModelNotFound, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\xff nothing")
    with pytest.raises(WeightsInvalid, match=r"tokenizer\.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(WeightsInvalid, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
    twice = write_gguf(
        tmp_path / "a.gguf", ["a", "a"], [1, 1], model="gpt2", pre="gpt-2", merges=[]
    )
    with pytest.raises(WeightsInvalid, match="1 different"):
        load_tokenizer(twice)
    bad = write_gguf(
        tmp_path / "b.gguf", ["a", "b"], [1, 1], model="gpt2", pre="gpt-2", merges=["a c"]
    )
    with pytest.raises(WeightsInvalid, match="merges"):
        load_tokenizer(bad)
