"""The tokenizer and the text encoder against transformers."""
import gzip
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import clip
import data
from data import ASSETS
from unet import UserError

transformers = pytest.importorskip("transformers")

HARD = ["", " ", "it's Don't !!'s 'stop' I'M they'LL", "1234 x2y ²½ Ⅷ", "naïve café e\u0301 Ünïcode", "😀 你好，世界 👩‍🚀", "a\x00b\x1cc\td\u3000e\x85f",
        "x" * 400, "many words " * 60, "<|endoftext|> hi <|startoftext|>x", "ΟΔΟΣ İstanbul ǅ ﬁ ẞ", "?!?!...---___", "\u0627\u0644\u0639 हिन्दी ไทย", "don''t ''s"]


@pytest.fixture(scope="module")
def captions():
    dataset = data.builtin("t2i", "train")
    return [dataset[i]["prompt"] for i in range(0, len(dataset), 8)]


@pytest.fixture(scope="module")
def trained(captions):
    return clip.Tokenizer.train(captions, 900)


def same_ids(folder, texts):
    theirs = transformers.CLIPTokenizer.from_pretrained(folder)
    expected = theirs(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    ours = clip.Tokenizer.from_pretrained(folder, "")(texts)
    assert ours.shape == expected.shape == (len(texts), 77)
    for text, a, b in zip(texts, ours, expected):
        assert torch.equal(a, b), text


def test_a_trained_tokenizer_equals_transformers(tmp_path, trained, captions):
    trained.save_pretrained(tmp_path)
    same_ids(tmp_path, captions[:200] + HARD)


def test_the_shipped_tokenizer_equals_transformers(captions):
    same_ids(ASSETS / "tiny" / "tokenizer", captions[:200] + HARD)


def test_clips_own_vocabulary_equals_transformers(tmp_path, captions):
    """With the vocabulary that the package clip-anytorch carries, where it is installed."""
    file = Path(transformers.__file__).parent.parent / "clip" / "bpe_simple_vocab_16e6.txt.gz"
    if not file.is_file():
        pytest.skip("clip-anytorch is not installed")
    lines = gzip.open(file).read().decode().split("\n")[1:49152 - 256 - 2 + 1]
    merges = [tuple(line.split()) for line in lines]
    symbols = list(clip.byte_symbols().values())
    vocab = symbols + [s + "</w>" for s in symbols] + ["".join(m) for m in merges] + [clip.BOS, clip.EOS]
    tokenizer = clip.Tokenizer({s: i for i, s in enumerate(vocab)}, merges)
    assert tokenizer(["a photo of a cat"])[0, :7].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407]
    tokenizer.save_pretrained(tmp_path)
    same_ids(tmp_path, captions + HARD)


def test_training_is_deterministic_and_compresses(trained, captions):
    again = clip.Tokenizer.train(captions, 900)
    assert again.vocab == trained.vocab and again.ranks == trained.ranks and len(trained.vocab) == 900
    assert trained(["woman cook, google style"]).ne(trained.vocab[clip.EOS]).sum() < 10


def test_merges_by_hand():
    """The most frequent pair first; among equals the alphabet decides, whatever the order of the texts."""
    for texts in (["ab abc abd"], ["abd abc ab"]):
        tokenizer = clip.Tokenizer.train([*texts, "abe abe"], 512 + 4 + 2)
        assert list(tokenizer.ranks) == [("a", "b"), ("ab", "e</w>"), ("a", "b</w>"), ("ab", "c</w>")]


def test_padding_with_another_token_equals_transformers(tmp_path, trained, captions):
    """SDXL's second tokenizer pads with "!", which makes any "!" of the text a padding token too."""
    clip.Tokenizer(trained.vocab, list(trained.ranks), pad_token="!").save_pretrained(tmp_path)
    same_ids(tmp_path, captions[:50] + HARD + ["wow!", "a cat!! and a dog"])


def test_padding_and_truncation(tmp_path, trained):
    row = trained(["cat"])[0]
    assert row[0] == trained.vocab[clip.BOS] and (row[-1] == trained.vocab[clip.EOS])
    long = trained(["cat " * 100])[0]
    assert long[-1] == trained.vocab[clip.EOS] and (long == trained.vocab[clip.EOS]).sum() == 1
    trained.save_pretrained(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(dict(pad_token=dict(content="!"))))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert clip.Tokenizer.from_pretrained(tmp_path, "")(["cat"])[0, -1] == trained.vocab["!"]


def test_dropped_words(trained):
    assert len(trained.ids("cat")) == 1 and trained.dropped("a cat") == trained.dropped("") == []
    assert trained.dropped("cat " * 75) == [] and trained.dropped("cat " * 76) == ["cat"]
    assert trained.dropped("cat " * 74 + "zzzz fox") == ["zzzz", "fox"]  # the first only in part


SIZE = dict(vocab_size=900, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, projection_dim=24)


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("end", [2, 899])
@pytest.mark.parametrize("projects", [False, True])
def test_states_equal_transformers_and_folders_go_both_ways(tmp_path, trained, act, end, projects):
    name = "CLIPTextModelWithProjection" if projects else "CLIPTextModel"
    ours = clip.CLIPText(dict(SIZE, hidden_act=act, eos_token_id=end, architectures=[name])).eval()
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(0.1 * torch.randn_like(p))
    ours.save_pretrained(tmp_path / "a")
    theirs, info = getattr(transformers, name).from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert theirs.config.eos_token_id == end
    ids = trained(["woman cook, google style", "", "a cat"])
    last, penultimate, pooled = ours(ids)
    out = theirs.eval()(ids, output_hidden_states=True)
    assert torch.allclose(last, out.last_hidden_state, atol=1e-5) and torch.allclose(penultimate, out.hidden_states[-2], atol=1e-5)
    assert torch.allclose(pooled, out.text_embeds if projects else out.pooler_output, atol=1e-5)
    theirs.save_pretrained(tmp_path / "b")
    assert torch.equal(clip.CLIPText.from_pretrained(tmp_path / "b", "")(ids)[0], last)


def saved(folder, change):
    """A folder with a text encoder, and a second one whose weights went through `change`."""
    clip.CLIPText(SIZE).save_pretrained(folder / "a")
    shutil.copytree(folder / "a", folder / "b")
    weights = load_file(folder / "a" / "model.safetensors")
    assert all(key.startswith("text_model.") for key in weights)
    save_file(change(weights), folder / "b" / "model.safetensors", metadata={"format": "pt"})
    return [clip.CLIPText.from_pretrained(folder / name, "").state_dict() for name in "ab"]


@pytest.mark.parametrize("change", [
    lambda weights: {key.removeprefix("text_model."): value for key, value in weights.items()},  # as transformers 5.6 writes a new model
    lambda weights: {**weights, "text_model.embeddings.position_ids": torch.arange(77)[None]}])  # as transformers wrote before 4.31
def test_both_layouts_and_old_buffers_are_read(tmp_path, change):
    expected, read = saved(tmp_path, change)
    assert expected.keys() == read.keys() and all(torch.equal(expected[key], read[key]) for key in read)


def test_a_new_model_of_transformers_is_read(tmp_path, trained):
    theirs = transformers.CLIPTextModel(transformers.CLIPTextConfig(**SIZE, eos_token_id=899)).eval()
    theirs.save_pretrained(tmp_path)
    ids = trained(["a cat"])
    assert torch.allclose(clip.CLIPText.from_pretrained(tmp_path, "")(ids)[0], theirs(ids).last_hidden_state, atol=1e-5)


def test_half_precision_on_disk_is_float32_in_memory(tmp_path):
    clip.CLIPText(SIZE).save_pretrained(tmp_path, torch.float16)
    assert {v.dtype for v in load_file(tmp_path / "model.safetensors").values()} == {torch.float16}
    text = clip.CLIPText.from_pretrained(tmp_path, "")
    assert {v.dtype for v in text.state_dict().values()} == {torch.float32}
    assert not any(v.is_meta for v in (*text.parameters(), *text.buffers()))


@pytest.mark.parametrize("name", ["CLIPTextModel", "CLIPTextModelWithProjection"])
def test_every_weight_learns_under_autocast(trained, name):
    text = clip.CLIPText(dict(SIZE, eos_token_id=899, architectures=[name]))
    with torch.autocast("cpu", torch.bfloat16):
        last, penultimate, pooled = text(trained(["a cat", ""]))
    (last if name == "CLIPTextModel" else pooled).float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in text.parameters())


def test_a_new_model_starts_as_clip_does():
    for key, value in clip.CLIPText(clip.CONFIGS["tiny"]).state_dict().items():
        if key.endswith("bias"):
            assert not value.any(), key
        elif "norm" in key:
            assert value.eq(1).all(), key
        else:
            assert abs(value.std() - 0.02) < 0.002, key


def test_stable_diffusions_text_encoder_has_its_size():
    with torch.device("meta"):
        assert sum(p.numel() for p in clip.CLIPText(clip.CONFIGS["clip_l"]).parameters()) == 123_060_480


def test_later_words_do_not_reach_earlier_positions(trained):
    text = clip.CLIPText(SIZE).eval()
    a, b = trained(["woman cook"]), trained(["woman judge"])
    same = (a == b)[0].int().cumprod(0).sum()
    assert torch.allclose(text(a)[0][0, :same], text(b)[0][0, :same], atol=1e-6) and not torch.allclose(text(a)[0][0, same], text(b)[0][0, same])


@pytest.mark.parametrize("key, value", [("hidden_act", "relu"), ("architectures", ["T5EncoderModel"]), ("num_attention_heads", 5)])
def test_what_is_not_implemented_is_named(key, value):
    with pytest.raises(UserError, match=key):
        clip.CLIPText({**SIZE, key: value})


def test_a_vocabulary_without_special_tokens_is_refused():
    with pytest.raises(UserError, match="startoftext"):
        clip.Tokenizer({"a": 0}, [])
