"""Checkpoints: names, numbers and order as in Hugging Face, and damage found before it is read."""

import json
import struct

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from safetensors.torch import save_file

from agentrt.errors import ModelError, ModelNotFound, ModelUnsupported, WeightsInvalid
from agentrt.weights import load_tensors, open_checkpoint, read_config

HIDDEN, INNER, HEADS, KV_HEADS, VOCAB = 256, 512, 4, 2, 32
KV = HIDDEN // HEADS * KV_HEADS
LAYER = {
    "attn_norm.weight": ("input_layernorm.weight", (HIDDEN,)),
    "attn_q.weight": ("self_attn.q_proj.weight", (HIDDEN, HIDDEN)),
    "attn_q.bias": ("self_attn.q_proj.bias", (HIDDEN,)),
    "attn_k.weight": ("self_attn.k_proj.weight", (KV, HIDDEN)),
    "attn_v.weight": ("self_attn.v_proj.weight", (KV, HIDDEN)),
    "attn_output.weight": ("self_attn.o_proj.weight", (HIDDEN, HIDDEN)),
    "ffn_norm.weight": ("post_attention_layernorm.weight", (HIDDEN,)),
    "ffn_gate.weight": ("mlp.gate_proj.weight", (INNER, HIDDEN)),
    "ffn_up.weight": ("mlp.up_proj.weight", (INNER, HIDDEN)),
    "ffn_down.weight": ("mlp.down_proj.weight", (HIDDEN, INNER)),
}
NAMES = {
    "token_embd.weight": ("model.embed_tokens.weight", (VOCAB, HIDDEN)),
    "output_norm.weight": ("model.norm.weight", (HIDDEN,)),
} | {f"blk.0.{name}": (f"model.layers.0.{to}", shape) for name, (to, shape) in LAYER.items()}


def random_tensors(seed=0):
    generator = np.random.default_rng(seed)
    return {
        name: generator.standard_normal(shape, np.float32) for name, (_, shape) in NAMES.items()
    }


def write_gguf(path, tensors, *, arch="llama", quantise=None, metadata=None, raw=None):
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(3)
    for key, value in (metadata or {}).items():
        writer.add_string(key, value) if isinstance(value, str) else writer.add_float32(key, value)
    for name, tensor in tensors.items():
        if quantise is not None and tensor.ndim == 2:
            writer.add_tensor(name, gguf.quantize(tensor, quantise), raw_dtype=quantise)
        else:
            writer.add_tensor(name, tensor)
    for name, (content, kind) in (raw or {}).items():
        writer.add_tensor(name, content, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_folder(folder, tensors, config=None):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    save_file(tensors, folder / "model.safetensors")
    return folder


def write_shards(folder):
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file({"a": torch.ones(2, 3)}, folder / "one.safetensors")
    save_file({"b": torch.zeros(4), "spare": torch.zeros(1)}, folder / "two.safetensors")
    write_index(folder, {"a": "one.safetensors", "b": "two.safetensors"})
    return folder


def write_index(folder, names):
    index = {"metadata": {}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def permuted(weight, heads):
    """What the converter of llama models does to the rows of q and k."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
        .swapaxes(1, 2)
        .reshape(weight.shape)
    )


def test_gguf_has_the_names_rows_and_config_of_hugging_face(tmp_path):
    original = random_tensors()
    stored = dict(original)
    for name, heads in [
        ("attn_q.weight", HEADS),
        ("attn_q.bias", HEADS),
        ("attn_k.weight", KV_HEADS),
    ]:
        stored[f"blk.0.{name}"] = permuted(original[f"blk.0.{name}"], heads)
    with open_checkpoint(write_gguf(tmp_path / "a.gguf", stored)) as checkpoint:
        assert checkpoint.tensor_names == {to for to, _ in NAMES.values()}
        for name, (to, shape) in NAMES.items():
            assert checkpoint.shape(to) == shape
            loaded = checkpoint.tensor(to, torch.float32)
            assert torch.equal(loaded, torch.from_numpy(original[name])), to
        config = checkpoint.config
        assert not checkpoint.is_quantised
    assert config["num_attention_heads"] == HEADS
    assert config["num_key_value_heads"] == KV_HEADS
    assert config["head_dim"] == HIDDEN // HEADS
    assert config["rms_norm_eps"] == 1e-5
    assert config["rope_theta"] == 500000.0
    assert config["rope_scaling"] is None
    assert config["vocab_size"] == VOCAB
    assert config["tie_word_embeddings"] is True
    assert config["attention_bias"] is True
    assert config["eos_token_id"] == [2, 3]


def test_qwen_rows_are_left_as_they_are(tmp_path):
    original = random_tensors()
    with open_checkpoint(write_gguf(tmp_path / "a.gguf", original, arch="qwen2")) as checkpoint:
        loaded = checkpoint.tensor("model.layers.0.self_attn.q_proj.weight", torch.float32)
        assert checkpoint.config["architectures"] == ["Qwen2ForCausalLM"]
    assert torch.equal(loaded, torch.from_numpy(original["blk.0.attn_q.weight"]))


def test_frequency_factors_become_rope_scaling(tmp_path):
    factors = np.linspace(1, 8, HIDDEN // HEADS // 2, dtype=np.float32)
    tensors = random_tensors() | {"rope_freqs.weight": factors}
    with open_checkpoint(write_gguf(tmp_path / "a.gguf", tensors)) as checkpoint:
        scaling = checkpoint.config["rope_scaling"]
        assert "rope_freqs.weight" not in checkpoint.tensor_names
    assert scaling == {"rope_type": "factors", "factors": factors.tolist()}


def test_named_rope_scaling_is_kept(tmp_path):
    metadata = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    path = write_gguf(tmp_path / "a.gguf", random_tensors(), metadata=metadata)
    assert read_config(path)["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_1"])
def test_quantised_tensors_are_dequantised(tmp_path, name):
    kind = GGMLQuantizationType[name]
    original = random_tensors()
    path = write_gguf(tmp_path / "a.gguf", original, arch="qwen2", quantise=kind)
    want = gguf.dequantize(gguf.quantize(original["blk.0.ffn_up.weight"], kind), kind)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.is_quantised
        loaded = checkpoint.tensor("model.layers.0.mlp.up_proj.weight", torch.float32)
        half = checkpoint.tensor("model.layers.0.mlp.up_proj.weight", torch.bfloat16)
    assert torch.equal(loaded, torch.from_numpy(want))
    assert torch.equal(half, loaded.to(torch.bfloat16))


@pytest.mark.parametrize("name", ["Q4_K", "Q5_K", "Q6_K"])
def test_k_quants_are_dequantised(tmp_path, name):
    # The library cannot quantise to these, but any bytes are valid blocks of theirs.
    kind = GGMLQuantizationType[name]
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    shape = (INNER, HIDDEN // block * block_bytes)
    blocks = np.random.default_rng(1).integers(0, 100, shape, np.uint8)
    tensors = random_tensors()
    del tensors["blk.0.ffn_up.weight"]
    path = write_gguf(tmp_path / "a.gguf", tensors, raw={"blk.0.ffn_up.weight": (blocks, kind)})
    with open_checkpoint(path) as checkpoint:
        loaded = checkpoint.tensor("model.layers.0.mlp.up_proj.weight", torch.float32)
    assert torch.equal(loaded, torch.from_numpy(gguf.dequantize(blocks, kind)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sixteen_bit_gguf_tensors_are_exact(tmp_path, dtype):
    original = random_tensors()
    kind = {torch.float16: "F16", torch.bfloat16: "BF16"}.get(dtype, "F32")
    path = write_gguf(
        tmp_path / "a.gguf", original, arch="qwen2", quantise=GGMLQuantizationType[kind]
    )
    with open_checkpoint(path) as checkpoint:
        loaded = checkpoint.tensor("model.layers.0.mlp.up_proj.weight", torch.float32)
    assert torch.equal(loaded, torch.from_numpy(original["blk.0.ffn_up.weight"]).to(dtype).float())


def test_other_types_and_tensors_are_refused_by_name(tmp_path):
    tensors = random_tensors()
    del tensors["blk.0.ffn_up.weight"]
    kind = GGMLQuantizationType.Q2_K
    blocks = np.zeros((INNER, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
    path = write_gguf(tmp_path / "a.gguf", tensors, raw={"blk.0.ffn_up.weight": (blocks, kind)})
    with (
        open_checkpoint(path) as checkpoint,
        pytest.raises(ModelUnsupported, match=r"blk\.0\.ffn_up\.weight.*Q2_K"),
    ):
        checkpoint.tensor("model.layers.0.mlp.up_proj.weight", torch.float32)
    tensors = random_tensors() | {"blk.0.ffn_gate_inp.weight": np.zeros((2, 32), np.float32)}
    with pytest.raises(ModelUnsupported, match=r"ffn_gate_inp"):
        open_checkpoint(write_gguf(tmp_path / "b.gguf", tensors))
    with pytest.raises(ModelUnsupported, match="'phi3'"):
        open_checkpoint(write_gguf(tmp_path / "c.gguf", random_tensors(), arch="phi3"))


def test_folder_tensors_equal_what_was_saved(tmp_path):
    saved = {"a": torch.randn(3, 5), "b": torch.randn(7).to(torch.bfloat16), "c": torch.tensor(2.0)}
    with open_checkpoint(write_folder(tmp_path / "m", saved)) as checkpoint:
        assert checkpoint.tensor_names == saved.keys()
        for name, tensor in saved.items():
            assert checkpoint.shape(name) == tuple(tensor.shape)
            assert torch.equal(checkpoint.tensor(name, tensor.dtype), tensor)
        kept = checkpoint.tensor("a", torch.float32)
    assert torch.equal(kept, saved["a"])
    with pytest.raises(ValueError, match="closed"):
        checkpoint.tensor("a", torch.float32)


def test_shards_are_one_checkpoint(tmp_path):
    with open_checkpoint(write_shards(tmp_path / "m")) as checkpoint:
        assert checkpoint.tensor_names == {"a", "b"}
        assert checkpoint.tensor("a", torch.float32).sum() == 6


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ({"a": "one.safetensors", "z": "two.safetensors"}, "'z'"),
        ({"a": "gone.safetensors"}, r"gone\.safetensors, which is missing"),
        ({"a": "../m/one.safetensors"}, "no file name"),
        ({"a": 7}, "no file name"),
        ("text", "no index"),
    ],
)
def test_a_wrong_index_is_refused(tmp_path, names, said):
    folder = write_shards(tmp_path / "m")
    write_index(folder, names)
    with pytest.raises(WeightsInvalid, match=said):
        open_checkpoint(folder)


def test_folders_without_usable_weights_say_what_to_do(tmp_path):
    with pytest.raises(ModelNotFound, match=r"config\.json"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size": 5}')
    assert read_config(tmp_path) == {"vocab_size": 5}
    with pytest.raises(ModelNotFound, match=r"model\.safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelUnsupported, match="convert"):
        open_checkpoint(tmp_path)
    with pytest.raises(ModelNotFound, match=r"nowhere\.gguf"):
        open_checkpoint(tmp_path / "nowhere.gguf")
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    with pytest.raises(ModelUnsupported, match="gptq"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("[1")
    with pytest.raises(WeightsInvalid, match=r"config\.json"):
        open_checkpoint(tmp_path)


def cuts(size):
    """Some twenty lengths to cut a file to: its first bytes, all over it, and its last one."""
    return sorted({0, 1, 3, 4, 7, 8, 23, 24, 25, size - 1, *range(40, size, size // 14)})


def test_a_cut_gguf_file_is_refused_at_every_point(tmp_path):
    whole = write_gguf(tmp_path / "whole.gguf", random_tensors()).read_bytes()
    used = len(whole.rstrip(b"\0"))  # the file may end in padding, which may be missing
    for size in cuts(used):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(WeightsInvalid, match=rf"\b{size} bytes|begins with"):
            open_checkpoint(tmp_path / "cut.gguf")


def test_a_cut_header_is_refused_at_every_byte(tmp_path):
    whole = write_gguf(tmp_path / "whole.gguf", {"token_embd.weight": np.zeros((1, 32), "f4")})
    content = whole.read_bytes()
    for size in range(len(content)):
        (tmp_path / "cut.gguf").write_bytes(content[:size])
        with pytest.raises(WeightsInvalid):
            open_checkpoint(tmp_path / "cut.gguf")


def test_a_cut_safetensors_file_is_refused_at_every_point(tmp_path):
    folder = write_folder(tmp_path / "m", {"a": torch.randn(20, 20), "b": torch.randn(3)})
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for size in cuts(len(whole)):
        file.write_bytes(whole[:size])
        with pytest.raises(WeightsInvalid, match=r"model\.safetensors"):
            open_checkpoint(folder)
    file.write_bytes(whole + b"x")
    with pytest.raises(WeightsInvalid, match=f"has {len(whole) + 1} bytes"):
        open_checkpoint(folder)


def test_flipped_header_bytes_never_escape_as_other_errors(tmp_path):
    tiny = {"token_embd.weight": np.zeros((1, 32), np.float32)}
    whole = write_gguf(tmp_path / "whole.gguf", tiny).read_bytes()
    path = tmp_path / "bad.gguf"
    for at in range(len(whole) - 128):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        try:
            open_checkpoint(path).close()
        except ModelError as error:
            assert str(path) in str(error)  # noqa: PT017  # many flips do no harm


@pytest.mark.parametrize("offset", [1 << 40, (1 << 64) - 32])
def test_tensor_offsets_past_the_end_are_refused(tmp_path, offset):
    path = write_gguf(tmp_path / "a.gguf", {"token_embd.weight": np.zeros((1, 32), np.float32)})
    whole = bytearray(path.read_bytes())
    at = whole.index(b"token_embd.weight") + len("token_embd.weight") + 4 + 16 + 4
    whole[at : at + 8] = struct.pack("<Q", offset)
    path.write_bytes(whole)
    with pytest.raises(WeightsInvalid, match=r"'token_embd\.weight' lies at bytes"):
        open_checkpoint(path)


@pytest.mark.parametrize("kind", ["gguf", "folder"])
def test_a_file_that_shrinks_while_open_is_an_error_not_a_crash(tmp_path, kind):
    if kind == "gguf":
        file = source = write_gguf(tmp_path / "a.gguf", random_tensors())
        name = "model.embed_tokens.weight"
    else:
        source, name = write_folder(tmp_path / "m", {"a": torch.zeros(5000)}), "a"
        file = source / "model.safetensors"
    with open_checkpoint(source) as checkpoint:
        with file.open("r+b") as writer:
            writer.truncate(100)
        with pytest.raises(WeightsInvalid, match="has 100"):
            checkpoint.tensor(name, torch.float32)


def test_bad_safetensors_headers_are_refused(tmp_path):
    folder = write_folder(tmp_path / "m", {"a": torch.zeros(2)})
    bad = [
        b"[]",
        b"{",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}',
    ]
    for header in bad:
        content = struct.pack("<Q", len(header)) + header + bytes(8)
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(WeightsInvalid):
            open_checkpoint(folder)


def test_the_digest_tells_checkpoints_apart(tmp_path):
    def digest(path):
        with open_checkpoint(path) as checkpoint:
            return checkpoint.digest

    one = digest(write_gguf(tmp_path / "a.gguf", random_tensors(0)))
    assert one == digest(write_gguf(tmp_path / "b.gguf", random_tensors(0)))
    assert one != digest(write_gguf(tmp_path / "c.gguf", random_tensors(1)))
    assert len(one) == 32
    base = digest(write_folder(tmp_path / "d", {"a": torch.zeros(4)}))
    assert base == digest(write_folder(tmp_path / "e", {"a": torch.zeros(4)}))
    assert base != digest(write_folder(tmp_path / "f", {"a": torch.zeros(2, 2)}))
    assert base != digest(write_folder(tmp_path / "g", {"b": torch.zeros(4)}))
    assert base != digest(write_folder(tmp_path / "h", {"a": torch.zeros(4)}, {"rope_theta": 2}))


def test_loading_is_strict(tmp_path):
    tensors = {"a": torch.ones(2), "lm_head.weight": torch.ones(3)}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(1)
    folder = write_folder(tmp_path / "m", tensors, {"tie_word_embeddings": True})
    seen = []
    with open_checkpoint(folder) as checkpoint:
        loaded = dict(
            load_tensors(
                checkpoint, {"a": (2,)}, torch.float16, lambda *done_of: seen.append(done_of)
            )
        )
        assert loaded["a"].dtype == torch.float16
        assert seen == [(1, 1)]
        wrong = {"a": (3,), "gone": (1,)}
        with pytest.raises(WeightsInvalid, match=r"missing: gone; a has shape \(2,\), not \(3,\)"):
            next(load_tensors(checkpoint, wrong, torch.float16))
    write_folder(tmp_path / "m", tensors, {"tie_word_embeddings": False})
    with (
        open_checkpoint(folder) as checkpoint,
        pytest.raises(WeightsInvalid, match=r"unexpected: lm_head\.weight"),
    ):
        next(load_tensors(checkpoint, {"a": (2,)}, torch.float16))
