"""The tokenizer, the towers and the preprocessing of pictures against transformers."""
import gzip
import json
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import clip
import data
from conftest import called
from data import ASSETS
from folders import UserError

transformers = pytest.importorskip("transformers")

HARD = ["", " ", "it's Don't !!'s 'stop' I'M they'LL", "1234 x2y ²½ Ⅷ", "naïve café e\u0301 Ünïcode", "😀 你好，世界 👩‍🚀", "a\x00b\x1cc\td\u3000e\x85f",
        "x" * 400, "many words " * 60, "<|endoftext|> hi <|startoftext|>x", "ΟΔΟΣ İstanbul ǅ ﬁ ẞ", "?!?!...---___",
        "\u0627\u0644\u0639 हिन्दी ไทย", "don''t ''s"]

HARDER = [
    # special tokens inside words, beside marks, in part, in capitals
    "a<|endoftext|>b", "<|startoftext|><|endoftext|>", "<|ENDOFTEXT|> a", "<|StartOfText|>", "<|endoftext|", "<|<|endoftext|>|>",
    "'<|endoftext|>'s", "e<|endoftext|>\u0301", "<|end oftext|>", "<|endo\u0301ftext|>", "</w> a</w>",
    # contractions and quotes
    "I'LL WE'VE YOU'RE HE'D IT'S CAN'T I'M", "'S'T'RE'VE'M'LL'D", "'''s ''''", "'lls 'res 'ded 'mm", "rock'n'roll y'all'd've", "1's 's1 x's",
    "ſ's 'ſ", "“it’s” ‘don’t’ «x» „y“ ‹z› 「日」", "it\u02bcs it\uff07s it`s it\u2032s", '"\'"\'s"\'',
    # digits, punctuation, markup
    "1,234.56 -7e10 0x1F 3rd 1990s", "½⅓¾ ①②③ ٠١٢ ۰۱ १२३ ⅫⅧ 𝟘𝟙", "~`!@#$%^&*()_+-={}[]|\\:\";'<>?,./", "a_b__c-d--e ... …", "C++ C# .NET",
    "www.x.com/?a=b&c=d#e", "&amp; &lt;b&gt; &#39;s &quot;x&quot; &nbsp; &amp;amp;", "<b>x</b> {a: [1]} (((red)))",
    # marks, what NFC changes, letters whose lower case is longer or depends on the word's end
    "\u0301", "a\u0301\u0302 b", "A\u030a \u212b K Ω ﷺ ㍿", "e\u0327\u0301 \u0344", "\u0345 \u0130\u0307", "İIıi", "ǅǆǄ ǈ", "ßẞ ΣΑΣ ς",
    "\u0149 \u01f0 \u1e96", "ﬀ ﬃ ⒶⒷⓐ Ⅳ", "Ꭰ ꭰ Ა ა 𐐀𐐨 𞤀", "Crème Brûlée, JALAPEÑO, Žižek, Øre, ŁÓDŹ",
    # scripts, emoji
    "\u1100\u1161\u11a8 각 안녕하세요", "こんにちは、カタカナ・ガ カ\u3099", "龍門石窟 㐂 𠀀𪛖", "नमस्ते दुनिया", "مرحبا بالعالم مَرْحَبًا", "שָׁלוֹם",
    "สวัสดีชาวโลก", "Привет, Мир! Й И\u0306", "Tiếng Việt", "👨‍👩‍👧‍👦 👍🏽 🇰🇷 ❤️ ❤ 1️⃣", "😀😀😀!!!", "x👩‍🚀y", "\U000e0001 \U0010ffff \ue000",
    # white space, controls, what is invisible
    "\n\r\t\v\f", " a  b\n\nc ", "\x1c\x1d\x1e\x1fa\x7f\x80\x84\x86", "\u2028\u2029\x85\xa0", "a\u1680b\u2000c\u200ad\u202fe\u205ff\u3000g",
    "\ufeffa \u180eb\u200bc\u200cd\u200de\u2060f", "\x00\x01",
    # long
    "a" * 5000, "!" * 300, "é" * 200, "\u0301" * 100, "1" * 100, "'s" * 80, " " * 500 + "end", "supercalifragilisticexpialidocious" * 9]


def mixtures(count):
    """Strings of pieces that meet at random: splitting goes wrong between kinds."""
    dice = random.Random(0)
    scripts = [[chr(c) for c in range(*ends)] for ends in ((0x20, 0x600), (0x300, 0x370), (0x900, 0x980), (0x1100, 0x1200), (0x1e00, 0x2400))]
    kinds = [*scripts, list("abcXYZ"), list("'sStTrReEvVmMlLdD "), list("0123456789.,!?-_½Ⅷ"), list("你好世界안녕こんガ"),
             list("😀👩🚀🏽❤🇰\u200d\ufe0f"), list(" \t\n\u3000\x85\x1f\u200b"), [clip.BOS, clip.EOS, "<|", "|>", "end"],
             ["&amp;", "&#39;", "'s", "'LL", "’s"]]
    return ["".join(dice.choice(dice.choice(some)) for _ in range(dice.randint(1, 40))) for some in (dice.sample(kinds, 3) for _ in range(count))]


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
    same_ids(tmp_path, captions + HARD + HARDER + mixtures(400))


def test_what_transformers_writes_is_read(tmp_path, trained, captions):
    """transformers 5 writes tokenizer.json alone, older ones vocab.json and merges.txt."""
    transformers = pytest.importorskip("transformers")
    trained.save_pretrained(tmp_path / "a")
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path / "a")
    theirs.pad_token = "!"
    theirs.save_pretrained(tmp_path / "b")
    again = clip.Tokenizer.from_pretrained(tmp_path, "b")
    assert again.vocab == trained.vocab and again.ranks == trained.ranks and again.pad_token == "!"


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
PICTURES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, projection_dim=24, image_size=32, patch_size=8)


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


@pytest.mark.parametrize("name", ["CLIPTextModel", "CLIPTextModelWithProjection", "CLIPVisionModel", "CLIPVisionModelWithProjection"])
def test_every_weight_learns_under_autocast(trained, name):
    tower, x = ((clip.CLIPText(dict(SIZE, eos_token_id=899, architectures=[name])), trained(["a cat", ""])) if "Text" in name else
                (clip.CLIPVision(dict(PICTURES, architectures=[name])), torch.randn(2, 3, 32, 32)))
    with torch.autocast("cpu", torch.bfloat16):
        out = tower(x)
    (out[0] if name == "CLIPTextModel" else out[-1]).float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tower.parameters())


@pytest.mark.parametrize("tower", [clip.CLIPText, clip.CLIPVision])
def test_a_new_model_starts_as_clip_does(tower):
    for key, value in tower(clip.CONFIGS["tiny"]).state_dict().items():
        if key.endswith("bias"):
            assert not value.any(), key
        elif "norm" in key:
            assert value.eq(1).all(), key
        elif key.endswith("class_embedding"):
            assert abs(value.std() - 128 ** -0.5) < 0.02, key
        else:
            assert abs(value.std() - 0.02) < 0.002, key


@pytest.mark.parametrize("name, theirs, size, published", [
    ("clip_l", "CLIPTextModel", 123_060_480, dict(
        num_attention_heads=12, num_hidden_layers=12, hidden_size=768, intermediate_size=3072, vocab_size=49408, max_position_embeddings=77,
        hidden_act="quick_gelu", layer_norm_eps=1e-5, projection_dim=768)),
    ("clip_bigg", "CLIPTextModelWithProjection", 694_659_840, dict(
        num_attention_heads=20, num_hidden_layers=32, hidden_size=1280, intermediate_size=5120, vocab_size=49408, max_position_embeddings=77,
        hidden_act="gelu", layer_norm_eps=1e-5, projection_dim=1280)),
    ("clip_l_vision", "CLIPVisionModelWithProjection", 303_966_208, dict(
        num_attention_heads=16, num_hidden_layers=24, hidden_size=1024, intermediate_size=4096, image_size=224, patch_size=14, num_channels=3,
        hidden_act="quick_gelu", layer_norm_eps=1e-5, projection_dim=768))])
def test_published_models_have_transformers_tensors(name, theirs, size, published):
    with torch.device("meta"):
        ours = (clip.CLIPVision if "Vision" in theirs else clip.CLIPText)(clip.CONFIGS[name])
        config = (transformers.CLIPVisionConfig if "Vision" in theirs else transformers.CLIPTextConfig)(**published)
        theirs = getattr(transformers, theirs)(config)
    prefix = "vision_model." if "vision" in name else "text_model."
    expected = {clip.prefixed(key, prefix): value.shape for key, value in theirs.state_dict().items()}
    assert {key: value.shape for key, value in ours.state_dict().items()} == expected
    assert sum(p.numel() for p in ours.parameters()) == size
    assert {key: ours.config[key] for key in published} == published  # shapes show neither heads nor activation


@pytest.mark.parametrize("end", [2, 899])
def test_bigg_at_reduced_width_equals_transformers(trained, end):
    """SDXL conditions on the penultimate states and on the pooled ones of a text that is padded with "!"."""
    config = {**clip.CONFIGS["clip_bigg"], **SIZE, "num_hidden_layers": 4, "eos_token_id": end}
    ours = clip.CLIPText(config).eval()
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(0.1 * torch.randn_like(p))
    theirs = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**config)).eval()
    theirs.load_state_dict(ours.state_dict())
    texts = ["woman cook, google style", "", "a cat", "cat " * 100]
    ids = clip.Tokenizer(trained.vocab, list(trained.ranks), pad_token="!")(texts)
    assert ids[1].tolist() == [trained.vocab[clip.BOS], trained.vocab[clip.EOS]] + [trained.vocab["!"]] * 75
    _, penultimate, pooled = ours(ids)
    out = theirs(ids, output_hidden_states=True)
    assert torch.allclose(penultimate, out.hidden_states[-2], atol=1e-5) and torch.allclose(pooled, out.text_embeds, atol=1e-5)
    assert pooled.shape == (4, 24) and torch.allclose(pooled[:3], ours(trained(texts))[2][:3], atol=1e-6)  # blind to the padding


def test_later_words_do_not_reach_earlier_positions(trained):
    text = clip.CLIPText(SIZE).eval()
    a, b = trained(["woman cook"]), trained(["woman judge"])
    same = (a == b)[0].int().cumprod(0).sum()
    assert torch.allclose(text(a)[0][0, :same], text(b)[0][0, :same], atol=1e-6) and not torch.allclose(text(a)[0][0, same], text(b)[0][0, same])


@pytest.mark.parametrize("key, value", [("hidden_act", "relu"), ("architectures", ["T5EncoderModel"]), ("num_attention_heads", 5)])
def test_what_is_not_implemented_is_named(key, value):
    with pytest.raises(UserError, match=key):
        clip.CLIPText({**SIZE, key: value})


def trained_vision(**changes):
    """A small image tower whose norms and biases are not those of the start."""
    tower = clip.CLIPVision({**PICTURES, **changes}).eval()
    with torch.no_grad():
        for p in tower.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return tower


@pytest.mark.parametrize("act, patch", [("quick_gelu", 8), ("gelu", 5)])  # 5 does not divide 32: the last rows and columns are not seen
@pytest.mark.parametrize("projects", [False, True])
def test_image_states_equal_transformers_and_folders_go_both_ways(tmp_path, act, patch, projects):
    name = "CLIPVisionModelWithProjection" if projects else "CLIPVisionModel"
    ours = trained_vision(hidden_act=act, architectures=[name], patch_size=patch)
    ours.save_pretrained(tmp_path / "a")
    assert all(key.startswith(("vision_model.", "visual_projection.")) for key in load_file(tmp_path / "a" / "model.safetensors"))
    theirs, info = getattr(transformers, name).from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    pixels = torch.randn(2, 3, 32, 32)
    last, pooled = ours(pixels)
    out = theirs.eval()(pixels)
    assert last.shape == (2, 1 + (32 // patch) ** 2, 32) and pooled.shape == (2, 24 if projects else 32)
    assert torch.allclose(last, out.last_hidden_state, atol=1e-5)
    assert torch.allclose(pooled, out.image_embeds if projects else out.pooler_output, atol=1e-5)
    theirs.save_pretrained(tmp_path / "b" / "image_encoder")
    again = clip.CLIPVision.from_pretrained(tmp_path / "b")
    assert again.state_dict().keys() == ours.state_dict().keys() and all(torch.equal(a, b) for a, b in zip(again(pixels), (last, pooled)))


def test_both_towers_are_read_from_a_whole_model(tmp_path, trained):
    """As openai/clip-vit-large-patch14 lies on the hub; with CLIP's score as transformers computes it."""
    config = transformers.CLIPConfig(text_config=dict(SIZE, eos_token_id=899, projection_dim=7), vision_config=PICTURES, projection_dim=20)
    theirs = transformers.CLIPModel(config).eval()
    theirs.save_pretrained(tmp_path)
    ids, pixels = trained(["a cat", "dog face"]), torch.randn(2, 3, 32, 32)
    text, pictures = clip.CLIPText.from_pretrained(tmp_path, "")(ids)[2], clip.CLIPVision.from_pretrained(tmp_path, "")(pixels)[1]
    assert text.shape == pictures.shape == (2, 20)
    scores = torch.cosine_similarity(text[:, None], pictures[None], dim=-1)
    expected = theirs(input_ids=ids, pixel_values=pixels).logits_per_text / theirs.logit_scale.exp()
    assert torch.allclose(scores, expected, atol=1e-5) and expected.std() > 1e-3


@pytest.mark.parametrize("change", [
    lambda weights: {key.removeprefix("vision_model."): value for key, value in weights.items()},
    lambda weights: {**weights, "vision_model.embeddings.position_ids": torch.arange(17)[None]}])
def test_both_layouts_and_old_buffers_of_an_image_tower_are_read(tmp_path, change):
    ours = trained_vision()
    ours.save_pretrained(tmp_path)
    weights = change(load_file(tmp_path / "model.safetensors"))
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    read, expected = clip.CLIPVision.from_pretrained(tmp_path, "").state_dict(), ours.state_dict()
    assert expected.keys() == read.keys() and all(torch.equal(expected[key], read[key]) for key in read)


@pytest.mark.parametrize("key, value", [("hidden_act", "relu"), ("architectures", ["CLIPModel"]), ("num_attention_heads", 5),
                                        ("image_size", [32, 64]), ("patch_size", [8, 8])])
def test_what_an_image_tower_does_not_implement_is_named(key, value):
    with pytest.raises(UserError, match=f"image encoder config: {key}"):
        clip.CLIPVision({**PICTURES, key: value})


@pytest.mark.parametrize("shape", [(3, 16, 64), (3, 35, 35), (1, 32, 32)])  # the first two have as many patches as the right size
def test_pictures_of_another_size_are_refused(shape):
    with pytest.raises(UserError, match="shape"):
        clip.CLIPVision(PICTURES)(torch.randn(1, *shape))


def noise(mode, width, height):
    channels = {"L": (), "LA": (2,), "RGB": (3,), "RGBA": (4,), "CMYK": (4,)}[mode]
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, *channels), dtype=np.uint8), mode)


def transparent_palette():
    picture = noise("RGB", 40, 40).quantize(16)
    picture.info["transparency"] = 3
    return picture


@pytest.mark.parametrize("size", [224, 33])
def test_preprocessing_equals_transformers(size):
    pictures = [noise("RGB", *wh) for wh in ((224, 224), (225, 224), (224, 231), (7, 5), (1, 3), (301, 200), (200, 457), (640, 480), (33, 100))]
    pictures += [noise(mode, 50, 37) for mode in ("L", "LA", "RGBA", "CMYK")] + [noise("L", 31, 64).convert("1"), transparent_palette()]
    theirs = transformers.CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    expected = theirs(pictures, return_tensors="pt").pixel_values
    ours = clip.preprocess(pictures, size)
    assert ours.shape == expected.shape == (len(pictures), 3, size, size) and ours.dtype == torch.float32
    for picture, a, b in zip(pictures, ours, expected):
        assert torch.equal(a, b), picture
    assert {p.mode for p in pictures} == {"1", "L", "LA", "P", "RGB", "RGBA", "CMYK"}  # the caller's pictures stay as they were


def test_a_vocabulary_without_special_tokens_is_refused():
    with pytest.raises(UserError, match="startoftext"):
        clip.Tokenizer({"a": 0}, [])


def test_what_a_text_tells_of():
    """A removal: the thing alone, on white, where it was in the source; else the target."""
    example = data.builtin("inpaint", "train")[3]
    thing, other = clip.spoken_of("inpaint", example), (example["target"] < 1).any(dim=0)
    assert torch.allclose(torch.minimum(thing, example["target"]), example["source"]) and (thing[:, other] == 1).all() and thing.min() < 0.9
    edit = data.builtin("edit", "train")[3]
    assert clip.spoken_of("edit", edit) is edit["target"]


@pytest.mark.slow
def test_the_miniatures_text_tower_learns_pictures(tmp_path):
    """Some 10 seconds of it tell a tenth of their components' variance, the first step none."""
    shares = []
    for steps in (1, 120):
        done = called("clip.py", "--out", tmp_path / str(steps), "--steps", steps, "--batch-size", 64)
        assert done.returncode == 0, done.stderr
        shares.append(int(re.search(r"tell (-?\d+) %", done.stdout)[1]))
    assert shares[0] < 5 and shares[1] > 8
    tower = clip.CLIPText.from_pretrained(tmp_path / "120")
    assert tower.config["vocab_size"] == len(clip.Tokenizer.from_pretrained(tmp_path / "120").vocab)


@pytest.mark.parametrize("words", [("--steps", 0), ("--components", 4000), ("--lr", 0), ("--seed", -1), ("--seed", 2 ** 65)])
def test_a_mistake_in_training_the_text_tower(tmp_path, words):
    done = called("clip.py", "--out", tmp_path / "a", *words)
    assert done.returncode == 2 and words[0] in done.stderr and not (tmp_path / "a").exists()


def test_a_trained_text_tower_is_not_overwritten(tmp_path):
    done = called("clip.py", "--out", tmp_path)
    assert done.returncode == 2 and "exists" in done.stderr
