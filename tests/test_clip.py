"""The tokenizer and the text encoder against transformers."""
import gzip
import json
from pathlib import Path

import pytest
import torch

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
    assert trained.dropped("a cat") == []
    words = ["cat"] * 75 + ["zebra", "fox"]
    used = sum(len(trained.ids("cat")) for _ in range(75))
    assert trained.dropped(" ".join(words))[-2:] == ["zebra", "fox"] and used >= 75


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
    ids = trained(["woman cook, google style", "", "a cat"])
    last, penultimate, pooled = ours(ids)
    out = theirs.eval()(ids, output_hidden_states=True)
    assert torch.allclose(last, out.last_hidden_state, atol=1e-5) and torch.allclose(penultimate, out.hidden_states[-2], atol=1e-5)
    assert torch.allclose(pooled, out.text_embeds if projects else out.pooler_output, atol=1e-5)
    theirs.save_pretrained(tmp_path / "b")  # by now without the prefix "text_model."
    assert torch.equal(clip.CLIPText.from_pretrained(tmp_path / "b", "")(ids)[0], last)


def test_stable_diffusions_text_encoder_has_its_size():
    with torch.device("meta"):
        assert sum(p.numel() for p in clip.CLIPText(clip.CONFIGS["clip_l"]).parameters()) == 123_060_480


def test_later_words_do_not_reach_earlier_positions(trained):
    text = clip.CLIPText(SIZE).eval()
    a, b = trained(["woman cook"]), trained(["woman judge"])
    same = (a == b)[0].int().cumprod(0).sum()
    assert torch.allclose(text(a)[0][0, :same], text(b)[0][0, :same], atol=1e-6) and not torch.allclose(text(a)[0][0, same], text(b)[0][0, same])


@pytest.mark.parametrize("key, value", [("hidden_act", "relu"), ("architectures", ["T5EncoderModel"])])
def test_what_is_not_implemented_is_named(key, value):
    with pytest.raises(UserError, match=key):
        clip.CLIPText({**SIZE, key: value})


def test_a_vocabulary_without_special_tokens_is_refused():
    with pytest.raises(UserError, match="startoftext"):
        clip.Tokenizer({"a": 0}, [])
