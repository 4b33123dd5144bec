"""The tokenizer, the towers and the preprocessing of pictures against transformers."""
import gzip
import itertools
import json
import random
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from diffusers.loaders import TextualInversionLoaderMixin
from safetensors.torch import load_file, save_file

import clip
import data
from clip import BOS, EOS, CLIPText, CLIPVision, Tokenizer
from conftest import ROOT, assert_mistake, call, randomised, refused, same_tensors, shapes
from train_text_tower import Predictor, described

TINY = ROOT / "assets" / "tiny"

TEXTS = [
    "", " ", "it's Don't !!'s 'stop' I'M they'LL", "1234 x2y ²½ Ⅷ ٠١٢ 𝟘𝟙", "x" * 400, "?!.--__",
    "naïve café e\u0301 Ünïcode", "😀 你好，世界 👩‍🚀 ❤️ 1️⃣", "a\x00b\x1cc\td\u3000e\x85f", "don''t ''s",
    "ΟΔΟΣ İstanbul ǅ ﬁ ẞ ΣΑΣ ς", "\u0627\u0644\u0639 हिन्दी ไทย", "wow!", "a cat!! and a dog",
    # Special tokens inside words, beside marks, in part, in capitals.
    "<|endoftext|> hi <|startoftext|>x", "a<|endoftext|>b", "<|startoftext|><|endoftext|>",
    "<|ENDOFTEXT|> a", "<|endoftext|", "<|<|endoftext|>|>", "<|end oftext|>", "'<|endoftext|>'s",
    "<|ENDOFTEXT|>!a!<|STARTOFTEXT|>!<|StartOfText|>", "e<|endoftext|>\u0301", "<|endo\u0301ftext|>", "</w> a</w>",
    # Contractions, quotes, punctuation, markup.
    "I'LL WE'VE YOU'RE HE'D IT'S CAN'T I'M", "'S'T'RE'VE'M'LL'D", "'''s ''''", "1's 's1 x's",
    "'lls 'res 'ded 'mm", "rock'n'roll y'all'd've", "ſ's 'ſ", "it\u02bcs it\uff07s it`s it\u2032s",
    "“it’s” ‘don’t’ «x» „y“ 「日」", "1,234.56 -7e10 1990s", "a_b__c-d--e ... …", "&amp; &#39;s",
    "~`!@#$%^&*()_+-={}[]|\\:\";'<>?,./", "<b>x</b> {a: [1]} (((red)))",
    # Marks, what NFC changes, scripts.
    "\u0301", "a\u0301\u0302 b", "A\u030a \u212b K Ω ﷺ ㍿", "\u0345 \u0130\u0307", "\u0149 ⒶⒷⓐ Ⅳ",
    "Ꭰ ꭰ Ა ა 𐐀𐐨 𞤀", "\u1100\u1161\u11a8 각", "ガ カ\u3099 龍門石窟 𠀀", "مَرْحَبًا שָׁלוֹם", "\U0010ffff",
    # White space, controls, what is invisible; long texts.
    "\n\r\t\v\f", "\x1c\x1d\x1e\x1fa\x7f\x80\x84", "\u2028\u2029\x85\xa0", "a\u1680b\u2000c\u202fd",
    "\ufeffa \u180eb\u200bc\u200cd\u200de\u2060f",
    "!" * 300, "\u0301" * 100, "'s" * 80, "many " * 80, "\ue000"]


def mixtures(count):
    """Strings of pieces that meet at random: splitting goes wrong between kinds."""
    dice = random.Random(0)
    ranges = ((0x20, 0x600), (0x300, 0x370), (0x900, 0x980), (0x1100, 0x1200), (0x1e00, 0x2400))
    kinds = [
        *[[chr(c) for c in range(*ends)] for ends in ranges], "abcXYZ", "'sStTrReEvVmMlLdD ",
        "0123456789.,!?-_½Ⅷ", "你好世界안녕こんガ", "😀👩🚀🏽❤🇰\u200d\ufe0f", " \t\n\u3000\x85\x1f\u200b",
        [BOS, EOS, "<|", "|>", "end"], ["&amp;", "&#39;", "'s", "'LL", "’s"]]
    for _ in range(count):
        some = dice.sample(kinds, 3)
        yield "".join(dice.choice(dice.choice(some)) for _ in range(dice.randint(1, 40)))


@pytest.fixture(scope="module")
def captions():
    dataset = data.builtin("t2i", "train")
    return [dataset[i]["prompt"] for i in range(0, len(dataset), 8)]


@pytest.fixture(scope="module")
def base():
    """A small vocabulary: the symbols and merges that the miniature learned first."""
    whole = Tokenizer.from_pretrained(TINY)
    symbols = list(whole.base)[:898]
    merges = [pair for pair in whole.ranks if "".join(pair) in symbols]
    return Tokenizer({s: i for i, s in enumerate([*symbols, BOS, EOS])}, merges)


def assert_same_ids(folder, texts):
    """The folder's ids are transformers', and stay so when we save it, for both to read."""
    theirs = transformers.CLIPTokenizer.from_pretrained(folder)
    expected = theirs(texts, padding="max_length", max_length=77, truncation=True).input_ids
    ours = Tokenizer.from_pretrained(folder, "")
    ours.save_pretrained(folder / "saved")
    again = transformers.CLIPTokenizer.from_pretrained(folder / "saved")
    saved = again(texts, padding="max_length", max_length=77, truncation=True).input_ids
    ours_again = Tokenizer.from_pretrained(folder / "saved", "")(texts).tolist()
    shutil.rmtree(folder / "saved")
    rows = zip(texts, ours(texts).tolist(), expected, saved, ours_again, strict=True)
    for text, a, b, c, d in rows:
        assert a == b, text
        assert b == c == d, f"saved: {text}"


# -------------------------------------------------------------------------------------------------
# Byte-pair encoding

@pytest.mark.parametrize("pad", [EOS, "!"])
def test_a_small_vocabulary_equals_transformers(tmp_path, base, captions, pad):
    """SDXL's second tokenizer pads with "!", which makes any "!" of a text padding too."""
    Tokenizer(base.vocab, list(base.ranks), pad_token=pad).save_pretrained(tmp_path)
    assert_same_ids(tmp_path, captions[:200] + TEXTS + list(mixtures(300)))


def test_the_shipped_tokenizer_equals_transformers(tmp_path, captions):
    shutil.copytree(TINY / "tokenizer", tmp_path, dirs_exist_ok=True)
    assert_same_ids(tmp_path, captions[:200] + TEXTS)


def test_clips_own_vocabulary_equals_transformers(tmp_path, captions):
    """With the vocabulary that the package clip-anytorch carries, where it is installed."""
    file = Path(transformers.__file__).parent.parent / "clip" / "bpe_simple_vocab_16e6.txt.gz"
    if not file.is_file():
        pytest.skip("clip-anytorch is not installed")
    lines = gzip.open(file).read().decode().split("\n")[1:49152 - 256 - 2 + 1]
    merges = [tuple(line.split()) for line in lines]
    symbols = list(clip.byte_symbols().values())
    symbols += [symbol + "</w>" for symbol in symbols]
    vocab = {s: i for i, s in enumerate([*symbols, *map("".join, merges), BOS, EOS])}
    tokenizer = Tokenizer(vocab, merges)
    expected = [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer(["a photo of a cat"])[0, :7].tolist() == expected
    tokenizer.save_pretrained(tmp_path)
    assert_same_ids(tmp_path, captions + TEXTS + list(mixtures(400)))


def test_padding_truncation_and_what_they_drop(base):
    ids = base(["cat", "cat " * 100])
    assert (ids[:, 0] == base.vocab[BOS]).all() and (ids[:, -1] == base.vocab[EOS]).all()
    assert (ids == base.vocab[EOS]).sum(dim=1).tolist() == [75, 1]
    assert len(base.encode("cat")) == 1 and base.dropped("a cat") == base.dropped("") == []
    assert base.dropped("cat " * 75) == [] and base.dropped("cat " * 76) == ["cat"]
    # The first of these two words fits in part.
    assert base.dropped("cat " * 74 + "zzzz fox") == ["zzzz", "fox"]


def test_a_vocabulary_without_special_tokens_is_refused():
    with refused("startoftext"):
        Tokenizer({"a": 0}, [])


# -------------------------------------------------------------------------------------------------
# The files beside a vocabulary

def token(content, normalized=False, special=False, single_word=False, **more):
    return dict(content=content, normalized=normalized, special=special, single_word=single_word,
                lstrip=False, rstrip=False, **more)


def write_tokenizer(folder, base, files):
    """Vocabulary, merges, and the named JSON files. tokenizer.json also gets fewer merges."""
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(base.vocab))
    (folder / "merges.txt").write_text("".join(f"{a} {b}\n" for a, b in base.ranks))
    for name, value in files.items():
        if name == "tokenizer":
            model = dict(type="BPE", vocab=base.vocab, merges=list(base.ranks)[:250],
                         end_of_word_suffix="</w>", unk_token=EOS)
            value = dict(version="1.0", model=model, added_tokens=value)
        (folder / f"{name}.json").write_text(json.dumps(value))


# What the files of released models say, and what textual inversion and users add; None leaves a
# file or a list out. The start token lies at 898, and the end token at 899.
ENDS = dict(bos_token=token(BOS, True), eos_token=token(EOS, True), unk_token=token(EOS, True))
NAMES = dict(bos_token=BOS, eos_token=EOS, unk_token=EOS)
TYPED = {name: dict(value, __type="AddedToken") for name, value in ENDS.items()}
OTHERS = dict(add_prefix_space=False, do_lower_case=True, errors="replace", model_max_length=77,
              tokenizer_class="CLIPTokenizer", clean_up_tokenization_spaces=True)
LISTED = {"898": token(BOS, True, special=True), "899": token(EOS, special=True)}
WORDS = {"900": token("<toy>", True), "901": token("<toy>_1", True)}
MAPS = [
    None, dict(ENDS, pad_token=EOS), dict(ENDS, pad_token="!"),         # 1.x; 2.x and XL
    dict(NAMES, pad_token="!"), dict(pad_token=token(EOS, True), unk_token=EOS),
    dict(pad_token="<pad>", eos_token=token(EOS, True), additional_special_tokens=["<Cap>"])]
CONFIGS = [
    None, dict(TYPED, **OTHERS, pad_token=EOS), dict(pad_token="!"),    # 1.x and 2.x; XL
    dict(NAMES, **OTHERS, pad_token="!", additional_special_tokens=[]), dict(OTHERS),
    dict(pad_token=EOS, additional_special_tokens=["<new>"]),
    dict(pad_token=token("<odd>", True, __type="AddedToken"), extra_special_tokens={})]
DECODERS = [
    None, {}, LISTED, {"0": token("!", special=True), **LISTED}, LISTED | WORDS,
    {"899": token(EOS, special=True), "902": token("<Toy>", True), "900": token("a  New", True),
     "0": token("!", special=True)}]
ADDED = [None, {BOS: 898, EOS: 899}, {"<toy>": 901, "<toy>-2": 900, "<pad>": 902},
         {"<toy>": 900, "<toy>_1": 901, "<toy>_2": 902}]
WHOLE = [None, [dict(value, id=int(id)) for id, value in (LISTED | WORDS).items()],
         [token(EOS, special=True, id=899), token("<Cap>", True, id=900),
          token("toy", id=901, single_word=True)]]
COMBINATIONS = list(itertools.product(CONFIGS, DECODERS, MAPS, ADDED, WHOLE))


@pytest.mark.parametrize("first", [
    0, *[pytest.param(first, marks=pytest.mark.slow) for first in range(1, 11)]])
def test_all_files_count_as_in_transformers(tmp_path, base, first, monkeypatch):
    """Every eleventh combination, in which each file's versions meet all others', and the rest.

    The pad tokens of Stable Diffusion 2's two files differ (huggingface/diffusers#2201).
    """
    texts = ["a <toy> b", "<TOY>! toy toys toy", "a new a  New A\tNEW!", "<toy>-2 <toy>-2! <cap>",
             "<|ENDOFTEXT|> a <|endoftext|>x", "cat <Cap><pad> <PAD>! <new><ODD>", "atoy toy_ toy",
             "<toy>_1<toy>_2 <Toy>_1", "<|startoftext|> ! <|STARTOFTEXT|>!"]
    names = ("tokenizer_config", "special_tokens_map", "added_tokens", "tokenizer")
    monkeypatch.setattr("os.fsync", lambda file: None)      # thousands of files need no safety
    for number, (config, decoder, *files) in enumerate(COMBINATIONS[first::11]):
        if decoder is not None:
            config = dict(config or {}, added_tokens_decoder=decoder)
        files = {name: value for name, value in zip(names, (config, *files)) if value is not None}
        write_tokenizer(tmp_path / str(number), base, files)
        assert_same_ids(tmp_path / str(number), texts)


@pytest.mark.parametrize("files", [
    dict(added_tokens={"<toy>": 900}),
    dict(tokenizer_config=dict(added_tokens_decoder={"900": token("<toy>", True)})),
    dict(tokenizer=[token("<toy>", True, id=900)])])
def test_a_word_of_textual_inversion_is_one_id(tmp_path, base, files):
    """huggingface/diffusers#2182"""
    write_tokenizer(tmp_path / "a", base, files)
    Tokenizer.from_pretrained(tmp_path, "a").save_pretrained(tmp_path / "b")
    for name in "ab":
        tokenizer = Tokenizer.from_pretrained(tmp_path, name)
        ids = [base.vocab[BOS], base.vocab["a</w>"], 900, base.vocab[EOS]]
        assert tokenizer(["a <toy>"])[0, :4].tolist() == ids
        assert tokenizer.base == base.vocab
        assert tokenizer.vocab == {**base.vocab, "<toy>": 900}
        assert tokenizer.dropped("a " * 75 + "<toy>") == ["<toy>"]


def test_what_transformers_writes_is_read(tmp_path, base):
    """transformers 5 writes tokenizer.json alone, older ones vocab.json and merges.txt."""
    base.save_pretrained(tmp_path / "a")
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path / "a")
    theirs.pad_token = "!"
    theirs.add_tokens(["<toy>", "<toy>_1", "style"])
    theirs.add_tokens(["<Key>"], special_tokens=True)
    theirs.save_pretrained(tmp_path / "b")
    again = Tokenizer.from_pretrained(tmp_path, "b")
    assert again.ranks == base.ranks and again.base == base.vocab
    assert again.special["pad_token"] == "!" and again.vocab["<toy>"] == 900
    assert_same_ids(tmp_path / "b", ["a <toy>!", "<TOY>_1 <toy>_1", "Style <key> <Key>"])


def test_a_word_of_several_tokens_is_written_out_as_by_diffusers(base):
    """A pipeline turns <toy> into <toy> <toy>_1 .. before it encodes a prompt."""
    words = ["<toy>", "<toy>_1", "<toy>_2", "<toy>_4", "<cat>", "a_1"]
    added = [clip.AddedToken.read(token(word, True)) for word in words]
    tokenizer = Tokenizer(base.vocab, list(base.ranks), added)
    theirs = SimpleNamespace(added_tokens_encoder=tokenizer.vocab, tokenize=lambda text: [
        piece for piece, _ in tokenizer.pieces(text) if piece in tokenizer.added])
    for text in ("a <toy> and <cat>, a <toy>!", "<TOY> <toy", "", "cat"):
        expected = TextualInversionLoaderMixin._maybe_convert_prompt(None, text, theirs)
        assert tokenizer.expand(text) == expected
    assert tokenizer.expand("<toy>") == "<toy> <toy>_1 <toy>_2"
    assert tokenizer.expand("my <toy>_1") == "my <toy>_1"       # one part by itself


DAMAGED = [("pad_token", 5), ("eos_token", ["<|endoftext|>"]), ("pad_token", dict(content=5)),
           ("additional_special_tokens", [5]), ("additional_special_tokens", "<a>")]


@pytest.mark.parametrize("config, special", [
    (dict(pad_token="", odd_token="", add_bos_token=True), {}),
    ({}, dict(pad_token="", odd_token="", add_bos_token=True)),
    *[(config, dict(additional_special_tokens=["<Cap>"])) for config in (
        {}, dict(additional_special_tokens=[]), dict(extra_special_tokens={}))]])
def test_an_empty_text_is_no_token_and_an_empty_list_overrules_another(
        tmp_path, base, config, special):
    write_tokenizer(tmp_path, base, dict(tokenizer_config=config, special_tokens_map=special))
    assert_same_ids(tmp_path, ["a cat", "", "a <Cap> <cap>"])


@pytest.mark.parametrize("config", [
    {}, dict(additional_special_tokens=["<toy>"]),
    dict(added_tokens_decoder={"900": token("<toy>", True)})])
def test_further_tokens_may_have_names(tmp_path, base, config):
    named = dict(extra_special_tokens=dict(image_token="<Cap>", other="<new>"))
    write_tokenizer(tmp_path, base, dict(tokenizer_config=named | config))
    assert_same_ids(tmp_path, ["a <Cap> <cap> <toy> <new> image_token"])


@pytest.mark.parametrize("files, message", [
    (dict(tokenizer_config=dict(added_tokens_decoder={"x": token("<toy>")})), "tokenizer"),
    (dict(added_tokens=[1]), "added_tokens.json"), (dict(special_tokens_map=1), "special_tokens"),
    *[(dict(special_tokens_map={key: value}), "tokenizer") for key, value in DAMAGED],
    *[(dict(tokenizer_config={key: value}), "tokenizer") for key, value in DAMAGED]])
def test_files_with_anything_else_are_named(tmp_path, base, files, message):
    write_tokenizer(tmp_path / "tokenizer", base, files)
    with pytest.raises((AttributeError, TypeError, ValueError)):
        transformers.CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    with refused(message):
        Tokenizer.from_pretrained(tmp_path)


# -------------------------------------------------------------------------------------------------
# The towers

SIZE = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
            projection_dim=24)
TEXT = dict(SIZE, vocab_size=900)
VISION = dict(SIZE, image_size=32, patch_size=8)
BOTH = pytest.mark.parametrize("kind", [CLIPText, CLIPVision])


def small(kind, **changes):
    return randomised(kind({**(TEXT if kind is CLIPText else VISION), **changes}))


@pytest.mark.parametrize("end", [2, 899])
@pytest.mark.parametrize("act, patch", [("quick_gelu", 8), ("gelu", 5)])
@pytest.mark.parametrize("projects", [False, True])
@BOTH
def test_states_equal_transformers_and_folders_go_both_ways(
        tmp_path, base, kind, projects, act, patch, end):
    # A patch of 5 does not divide 32: the last rows and columns are not seen.
    own = dict(eos_token_id=end) if kind is CLIPText else dict(patch_size=patch)
    ours = small(kind, hidden_act=act, architectures=[kind.class_names[projects]], **own)
    ours.save_pretrained(tmp_path / "a")
    theirs, info = getattr(transformers, kind.class_names[projects]).from_pretrained(
        tmp_path / "a", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    x = torch.randn(2, 3, 32, 32)
    if kind is CLIPText:
        assert theirs.config.eos_token_id == end
        padded = Tokenizer(base.vocab, list(base.ranks), pad_token="!")     # as in SDXL
        texts = ["woman cook, google style", "", "a cat"]
        x = torch.cat([base(texts), padded(texts)])
    last, *penultimate, pooled = ours(x)
    out = theirs.eval()(x, output_hidden_states=True)
    assert torch.allclose(last, out.last_hidden_state, atol=1e-5)
    for states in penultimate:
        assert torch.allclose(states, out.hidden_states[-2], atol=1e-5)
    expected = out[0] if projects else out.pooler_output
    assert pooled.shape == (len(x), ours.width) and torch.allclose(pooled, expected, atol=1e-5)
    theirs.save_pretrained(tmp_path / kind.folder)
    assert same_tensors(kind.from_pretrained(tmp_path).state_dict(), ours.state_dict())


def test_both_towers_are_read_from_a_whole_model(tmp_path, base):
    """As openai/clip-vit-large-patch14 lies on the hub; with CLIP's score as in transformers."""
    text_config = dict(TEXT, eos_token_id=899, projection_dim=7)
    theirs = randomised(transformers.CLIPModel(transformers.CLIPConfig(
        text_config=text_config, vision_config=VISION, projection_dim=20)))
    theirs.save_pretrained(tmp_path)
    ids = base(["a cat", "dog face"])
    pixels = torch.randn(2, 3, 32, 32)
    text = CLIPText.from_pretrained(tmp_path, "")(ids)[2]
    pictures = CLIPVision.from_pretrained(tmp_path, "")(pixels)[1]
    assert text.shape == pictures.shape == (2, 20)
    scores = torch.cosine_similarity(text[:, None], pictures[None], dim=-1)
    expected = theirs(input_ids=ids, pixel_values=pixels).logits_per_text / theirs.logit_scale.exp()
    assert torch.allclose(scores, expected, atol=1e-5) and expected.std() > 1e-3


@BOTH
@pytest.mark.parametrize("layout", ["without the prefix", "with position_ids"])
def test_keys_of_all_versions_are_read(tmp_path, kind, layout):
    """transformers 5.6 leaves the prefix out, and before 4.31 there were position_ids.

    Half precision on disk is single precision in memory.
    """
    tower = small(kind).half()
    tower.float().save_pretrained(tmp_path, torch.float16)
    weights = load_file(tmp_path / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float16}
    prefix = f"{kind.kind}_model."
    assert all(key.startswith((prefix, "visual_projection.")) for key in weights)
    if layout == "without the prefix":
        weights = {key.removeprefix(prefix): value for key, value in weights.items()}
    else:
        weights[f"{prefix}embeddings.position_ids"] = torch.arange(77)[None]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert same_tensors(kind.from_pretrained(tmp_path, "").state_dict(), tower.state_dict())


@pytest.mark.parametrize("projects", [False, True])
@BOTH
def test_every_weight_learns_under_autocast(base, kind, projects):
    tower = small(kind, architectures=[kind.class_names[projects]])
    x = base(["a cat", ""]) if kind is CLIPText else torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        out = tower(x)
    # The last states do not depend on the image tower's last norm, nor the pooled on less.
    (out[0] if kind is CLIPText and not projects else out[-1]).float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tower.parameters())


PUBLISHED = dict(vocab_size=49408, max_position_embeddings=77, layer_norm_eps=1e-5)


@pytest.mark.parametrize("name, model, size, published", [
    ("clip_l", "CLIPTextModel", 123_060_480, dict(
        PUBLISHED, num_attention_heads=12, num_hidden_layers=12, hidden_size=768,
        intermediate_size=3072, hidden_act="quick_gelu", projection_dim=768)),
    ("clip_bigg", "CLIPTextModelWithProjection", 694_659_840, dict(
        PUBLISHED, num_attention_heads=20, num_hidden_layers=32, hidden_size=1280,
        intermediate_size=5120, hidden_act="gelu", projection_dim=1280)),
    (None, "CLIPVisionModelWithProjection", 303_966_208, dict(
        num_attention_heads=16, num_hidden_layers=24, hidden_size=1024, intermediate_size=4096,
        image_size=224, patch_size=14, num_channels=3, hidden_act="quick_gelu",
        layer_norm_eps=1e-5, projection_dim=768))])
def test_published_models_have_transformers_tensors(name, model, size, published):
    kind = CLIPVision if "Vision" in model else CLIPText
    with torch.device("meta"):
        ours = kind({"architectures": [model], **clip.CONFIGS.get(name, published)})
        theirs = getattr(transformers, model)
        theirs = theirs(theirs.config_class(**published))
    expected = {kind.rename(key): value.shape for key, value in theirs.state_dict().items()}
    assert shapes(ours) == expected
    assert sum(p.numel() for p in ours.parameters()) == size
    # Shapes show neither heads nor activation.
    assert {key: ours.config[key] for key in published} == published


def test_later_words_do_not_reach_earlier_positions(base):
    tower = small(CLIPText)
    ids = base(["woman cook", "woman judge"])
    first = (ids[0] != ids[1]).int().argmax()
    a, b = tower(ids)[0]
    assert torch.allclose(a[:first], b[:first], atol=1e-6)
    assert not torch.allclose(a[first], b[first])


@pytest.mark.parametrize("key, value", [
    ("hidden_act", "relu"), ("architectures", ["T5EncoderModel"]), ("architectures", []),
    ("num_attention_heads", 5)])
@BOTH
def test_what_is_not_implemented_is_named(kind, key, value):
    with pytest.raises(ValueError, match=key):
        small(kind, **{key: value})


@pytest.mark.parametrize("key, value", [
    ("image_size", [32, 64]), ("patch_size", [8, 9]), ("hidden_size", "wide"), ("patch_size", 0),
    ("num_attention_heads", 5), ("num_hidden_layers", None), ("hidden_act", {})])
def test_an_impossible_config_is_the_files_fault(tmp_path, key, value):
    small(CLIPVision).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    with refused("config"):
        CLIPVision.from_pretrained(tmp_path, "")


# The first two have as many patches as the right size.
@pytest.mark.parametrize("shape", [(3, 16, 64), (3, 35, 35), (1, 32, 32)])
def test_pictures_of_another_size_are_refused(shape):
    with refused("shape"):
        small(CLIPVision)(torch.randn(1, *shape))


# -------------------------------------------------------------------------------------------------
# The miniature's text tower

def test_a_new_text_tower_starts_as_clip_does(base):
    for key, value in Predictor(base, 8).tower.state_dict().items():
        if key.endswith("bias"):
            assert not value.any(), key
        elif "norm" in key:
            assert value.eq(1).all(), key
        else:
            assert abs(value.std() - 0.02) < 0.002, key


def test_what_a_text_describes():
    """A removal: the thing alone, on white, where it was in the source; else the target."""
    example = data.builtin("inpaint", "train")[3]
    thing = described("inpaint", example)
    other = (example["target"] < 1).any(dim=0)
    assert torch.allclose(torch.minimum(thing, example["target"]), example["source"])
    assert (thing[:, other] == 1).all() and thing.min() < 0.9
    edit = data.builtin("edit", "train")[3]
    assert described("edit", edit) is edit["target"]


@pytest.mark.slow
def test_the_miniatures_text_tower_learns_pictures(tmp_path):
    """Some 10 seconds explain a tenth of the components' variance, the first step nothing."""
    shares = []
    for steps in (1, 120):
        done = call("train_text_tower.py", "--out", tmp_path / str(steps), "--steps", steps,
                    "--batch-size", 64)
        assert done.returncode == 0, done.stderr
        shares.append(int(re.search(r"explain (-?\d+) %", done.stdout)[1]))
    assert shares[0] < 5 and shares[1] > 8
    tower = CLIPText.from_pretrained(tmp_path / "120")
    assert tower.config["vocab_size"] == len(Tokenizer.from_pretrained(tmp_path / "120").vocab)


@pytest.mark.parametrize("option, value", [
    ("--steps", 0), ("--components", 4000), ("--lr", 0), ("--seed", -1), ("--seed", 2 ** 65)])
def test_a_mistake_in_training_the_text_tower(tmp_path, option, value):
    assert_mistake(call("train_text_tower.py", "--out", tmp_path / "a", option, value), option)
    assert not (tmp_path / "a").exists()


def test_a_trained_text_tower_is_not_overwritten(tmp_path):
    assert_mistake(call("train_text_tower.py", "--out", tmp_path), "exists")
