"""CLIP: the byte-pair tokenizer, the text tower and the image tower, under transformers' names.

Radford et al. 2021, arXiv 2103.00020. Stable Diffusion 1.x conditions on the text tower's last
hidden states, all 77 of them, without a mask for the padding. SDXL conditions on the states before
the last layer of two towers, and on the pooled state of the second.

    Tokenizer      text -> ids (B, 77), by byte-pair encoding
    CLIPText       ids -> hidden states, and a pooled state
    CLIPVision     pictures as transformers' CLIPImageProcessor makes them -> the same

Letters: B batch, S = 77 positions, N patches of a picture, D width.
"""
import functools
import itertools
import json
import re
import unicodedata
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from hub import Network, UserError, blaming, complete, fetch, read_json, save_weights, write_json
from hub import write_text

# -------------------------------------------------------------------------------------------------
# Byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909). A text is cut into words, and a word
# into bytes. Then neighbours are joined, pair by pair, in the order in which training found them
# common. A frequent word ends as one symbol and a rare one as several, and since every byte is a
# symbol, no text is ever unknown.

BOS = "<|startoftext|>"
EOS = "<|endoftext|>"

# Unicode's white space. Python's \s would also take the control characters 1c to 1f.
SPACES = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")

# CLIP's words: an English ending, letters, one digit, or a run of anything else but spaces. Before
# these, a special token's name, which in capitals is no token, and falls into three words.
WORDS = re.compile(r"(<\|)((?:start|end)oftext)(\|>)|"
                   "('s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^ a-z0-9]+)")


def normalize(text):
    """Compose accents, make any white space one blank, and turn all letters to lower case."""
    text = SPACES.sub(" ", unicodedata.normalize("NFC", text))
    # Letter by letter, because in a whole text Python writes a sigma at the end of a word as ς.
    return "".join(c.lower() for c in text)


def split_words(text):
    """Cut normalised text into words."""
    # Python's regular expressions have no class for the letters of all scripts. So they search a
    # copy, in which z stands for a letter beyond ASCII, 0 for a number, and ! for the rest.
    copy = ""
    for c in text:
        category = unicodedata.category(c)[0]
        copy += c if c.isascii() else {"L": "z", "N": "0"}.get(category, "!")
    return [text[match.start(i):match.end(i)] for match in WORDS.finditer(copy)
            for i in range(1, 5) if match[i]]


@functools.cache
def byte_symbols():
    """Give each of the 256 bytes a printable character (GPT-2's table): most have one already."""
    printable = [byte for byte in range(256) if chr(byte).isprintable() and byte != ord(" ")]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{byte: chr(byte) for byte in printable},
            **{byte: chr(256 + i) for i, byte in enumerate(others)}}


def to_symbols(word):
    """Cut a word into bytes. The last is marked, so that the cat of catch is not the word cat."""
    symbols = [byte_symbols()[byte] for byte in word.encode(errors="replace")]
    symbols[-1] += "</w>"
    return symbols


def merge_pair(symbols, pair):
    """Join every occurrence of a pair of neighbours, from left to right."""
    merged = []
    for symbol in symbols:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


# -------------------------------------------------------------------------------------------------
# Added tokens are looked for before byte-pair encoding, and stay whole: the start, the end and the
# padding, and the words that textual inversion learns. Four files may name them.

class AddedToken(NamedTuple):
    """transformers' class, without lstrip and rstrip: blanks separate words here anyway."""
    content: str
    special: bool
    normalized: bool    # looked for in normalised text, so that case does not matter
    single_word: bool   # not found where a letter or a digit touches it

    @classmethod
    def read(cls, value):
        """Make one from what stands in a file, an object or, for a special token, a string."""
        flags = dict(content=value) if isinstance(value, str) else value
        special = flags.get("special", True)
        return cls(flags["content"], special, flags.get("normalized", not special),
                   flags.get("single_word", False))


# What CLIP's special tokens are unless a file says otherwise.
SPECIAL = dict(bos_token=BOS, eos_token=EOS, unk_token=EOS, pad_token=EOS)


def read_added_tokens(folder):
    """Read the tokens beside a vocabulary -> list of AddedToken, and the special ones by name.

    What counts is as in transformers. tokenizer_config.json stands alone if it holds a list,
    added_tokens_decoder. Older models have none: there special_tokens_map.json overrules it, and
    added_tokens.json and tokenizer.json bring further tokens.
    """
    def read(name):
        return read_json(folder / name) if (folder / name).is_file() else {}

    config = read("tokenizer_config.json")
    listed = config.get("added_tokens_decoder")
    older = read("special_tokens_map.json") if listed is None else {}
    # Beside the tokens there are switches, such as add_bos_token; null and "" stand for no token.
    named = {name: value for name, value in {**config, **older}.items()
             if name.endswith("_token") and value not in (None, "", True, False)}
    more = config.get("extra_special_tokens")
    if isinstance(more, dict):
        # Late versions of transformers 4 write further tokens by name: {"image_token": "<image>"}.
        named |= more
        more = None
    more = more or config.get("additional_special_tokens")
    if listed is None:
        # transformers overlooks the objects, other than strings, that tokenizer_config.json names.
        plain = [value for name, value in named.items() if name in older or isinstance(value, str)]
        special = {AddedToken.read(value).content for value in (*plain, *(more or []))}
        listed = {id: dict(content=content, special=content in special)
                  for content, id in read("added_tokens.json").items()}
        for token in read("tokenizer.json").get("added_tokens", []):
            listed[token["id"]] = token
    if more is None:
        more = older.get("additional_special_tokens") or []
    if not isinstance(more, list):
        raise ValueError("further special tokens are no list")

    named = SPECIAL | named
    # The order matters: new tokens get their ids in it, the listed ones first. Where a token comes
    # twice, a dict keeps its first place and its last flags, so a list has the last word.
    by_id = [listed[id] for id in sorted(listed, key=int)]
    values = [*by_id, *named.values(), *more, *by_id]
    added = {token.content: token for token in map(AddedToken.read, values)}
    return list(added.values()), {name: AddedToken.read(named[name]).content for name in named}


def read_vocabulary(folder):
    """Read a vocabulary, symbol -> id, and its merges in order.

    transformers 5 writes both into tokenizer.json, which goes before the two files of older models.
    """
    if (folder / "tokenizer.json").is_file():
        model = read_json(folder / "tokenizer.json")["model"]
        vocab = model["vocab"]
        lines = model["merges"]
    elif (folder / "merges.txt").is_file():
        vocab = read_json(folder / "vocab.json")
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    else:
        raise UserError(f"no merges.txt and no tokenizer.json in {folder}")
    if any(type(id) is not int or id < 0 for id in vocab.values()):
        raise UserError(f"the vocabulary in {folder} has ids that are no row numbers")
    # A merge is a line "a b" or, in the latest files, a list ["a", "b"].
    merges = [line.split() if isinstance(line, str) else line for line in lines]
    return vocab, [pair for pair in merges if pair and pair[0] != "#version:"]


def split_at(text, tokens):
    """Cut a text at added tokens -> list of (part, the token that it is, or None).

    tokens: string to look for -> AddedToken. Where several fit at one place, the longest counts.
    """
    patterns = []
    for content in sorted(tokens, key=len, reverse=True):
        pattern = re.escape(content)
        patterns.append(rf"(?<!\w){pattern}(?!\w)" if tokens[content].single_word else pattern)
    # re.split puts what the brackets matched at the odd places. (?!) matches nothing.
    parts = re.split(f"({'|'.join(patterns) or '(?!)'})", text)
    return [(part, tokens[part] if i % 2 else None) for i, part in enumerate(parts)]


# -------------------------------------------------------------------------------------------------
# The tokenizer

class Tokenizer:
    """transformers' CLIPTokenizer.

    vocab: symbol -> id. merges: pairs of symbols, in order of priority. added: AddedTokens.
    special: bos_token="..", eos_token, pad_token and so on. What a text is padded with is a model's
    own choice: the end token or, for SDXL's second tokenizer, "!".
    """
    length = 77

    def __init__(self, vocab, merges, added=(), **special):
        self.ranks = {(a, b): rank for rank, (a, b) in enumerate(merges)}
        self.special = {**SPECIAL, **special}
        self.added = {token.content: token for token in added if token.content}
        for name in ("bos_token", "eos_token"):
            if self.special[name] not in {**vocab, **self.added}:
                raise UserError(f"the tokenizer's vocabulary has no {self.special[name]}")
        for token in self.special.values():
            self.added.setdefault(token, AddedToken.read(token))
        # self.base is what byte-pair encoding knows, self.vocab all ids. A token that is new gets
        # the next id, whatever id its file gives: so does transformers 5.
        self.base = vocab
        self.vocab = dict(vocab)
        for token in self.added:
            self.vocab.setdefault(token, len(self.vocab))
        tokens = self.added.values()
        self.raw = {token.content: token for token in tokens if not token.normalized}
        self.normalized = {normalize(token.content): token for token in tokens if token.normalized}
        # The same words come again and again.
        self.encode = functools.lru_cache(maxsize=65536)(self.encode_word)

    def encode_word(self, word):
        """Encode one word: join the pair that was learned first, as long as one is left -> ids."""
        symbols = to_symbols(word)
        while len(symbols) > 1:
            pair = min(zip(symbols, symbols[1:]), key=lambda p: self.ranks.get(p, float("inf")))
            if pair not in self.ranks:
                break
            symbols = merge_pair(symbols, pair)
        unknown = self.vocab[self.special["unk_token"]]
        return [self.base.get(symbol, unknown) for symbol in symbols]

    def pieces(self, text):
        """Cut a text into words and added tokens -> list of (piece, its ids)."""
        pieces = []
        for part, token in split_at(text, self.raw):
            inner = [(part, token)] if token else split_at(normalize(part), self.normalized)
            for part, token in inner:
                if token:
                    pieces.append((part, [self.vocab[token.content]]))
                else:
                    pieces += [(word, self.encode(word)) for word in split_words(part)]
        return pieces

    def expand(self, text):
        """Write out the words that textual inversion learned as several tokens, as diffusers does.

        <toy> becomes "<toy> <toy>_1 <toy>_2" where these are added tokens. An encoder's caller
        does this first; the tokenizer itself takes <toy> for one token, as transformers does.
        """
        for word in self.added:
            names = [word]
            while f"{word}_{len(names)}" in self.added:
                names.append(f"{word}_{len(names)}")
            if len(names) > 1:
                # A part that is named by itself stays as it is.
                text = re.sub(rf"{re.escape(word)}(?!_\d)", lambda _: " ".join(names), text)
        return text

    def __call__(self, texts):
        """Encode a list of B strings -> (B, 77) long: start, tokens, end, padding.

        What does not fit is cut off; `dropped` tells what that is.
        """
        bos, eos, pad = (self.vocab[self.special[name]]
                         for name in ("bos_token", "eos_token", "pad_token"))
        rows = []
        for text in texts:
            ids = [id for _, ids in self.pieces(text) for id in ids]
            row = [bos, *ids[:self.length - 2], eos]
            rows.append(row + [pad] * (self.length - len(row)))
        return torch.tensor(rows, dtype=torch.long)

    def dropped(self, text):
        """List the words of a text that do not fit, or fit only in part."""
        pieces = self.pieces(text)
        ends = itertools.accumulate(len(ids) for _, ids in pieces)
        return [word for (word, _), end in zip(pieces, ends) if end > self.length - 2]

    @classmethod
    def from_pretrained(cls, path_or_hub_id, subfolder="tokenizer"):
        """Load a tokenizer from a model folder, in any layout that transformers has written."""
        folder = fetch(path_or_hub_id, subfolder)
        with blaming(folder):
            vocab, merges = read_vocabulary(folder)
            added, special = read_added_tokens(folder)
            return cls(vocab, merges, added, **special)

    def save_pretrained(self, folder):
        """Write vocabulary, merges and added tokens into a folder, as transformers reads them."""
        listed = {self.vocab[token.content]: token._asdict() for token in self.added.values()}
        merges = "".join(f"{a} {b}\n" for a, b in self.ranks)
        folder = Path(folder)
        write_text(folder / "vocab.json", json.dumps(self.base, ensure_ascii=False))
        write_text(folder / "merges.txt", f"#version: 0.2\n{merges}")
        write_json(folder / "special_tokens_map.json", self.special)
        write_json(folder / "tokenizer_config.json", dict(
            self.special, tokenizer_class="CLIPTokenizer", model_max_length=self.length,
            added_tokens_decoder=listed))


# -------------------------------------------------------------------------------------------------
# What the two towers share: transformers whose layers normalise before each of their halves

# transformers' defaults, those of CLIP ViT-B/32.
TEXT_DEFAULTS = dict(
    vocab_size=49408, hidden_size=512, intermediate_size=2048, num_hidden_layers=12,
    num_attention_heads=8, max_position_embeddings=77, hidden_act="quick_gelu",
    layer_norm_eps=1e-5, projection_dim=512, eos_token_id=49407, architectures="CLIPTextModel",
    bos_token_id=None, pad_token_id=None)       # these two are only passed on to transformers
VISION_DEFAULTS = dict(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
    num_channels=3, image_size=224, patch_size=32, hidden_act="quick_gelu", layer_norm_eps=1e-5,
    projection_dim=512, architectures="CLIPVisionModelWithProjection")
CONFIGS = {
    "tiny": dict(hidden_size=128, intermediate_size=512, num_hidden_layers=2,
                 num_attention_heads=4, projection_dim=128),
    # The text tower of ViT-L/14: Stable Diffusion 1.x's, and SDXL's first.
    "clip_l": dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12,
                   projection_dim=768),
    # OpenCLIP's ViT-bigG/14: SDXL's second. Its tokenizer pads with "!", id 0.
    "clip_bigg": dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32,
                      num_attention_heads=20, projection_dim=1280, hidden_act="gelu",
                      architectures=["CLIPTextModelWithProjection"]),
}

# OpenAI trained with the first, an approximation of the second, which OpenCLIP's models use.
ACTIVATIONS = {"quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "gelu": F.gelu}


def layer_norm(config):
    return nn.LayerNorm(config["hidden_size"], config["layer_norm_eps"])


class Attention(nn.Module):
    """Self-attention. In a causal tower a position sees itself and those before it."""

    def __init__(self, config, causal):
        super().__init__()
        D = config["hidden_size"]
        self.heads = config["num_attention_heads"]
        self.causal = causal
        if D % self.heads:
            raise ValueError(f"num_attention_heads = {self.heads} does not divide {D}")
        self.q_proj = nn.Linear(D, D)
        self.k_proj = nn.Linear(D, D)
        self.v_proj = nn.Linear(D, D)
        self.out_proj = nn.Linear(D, D)

    def forward(self, x):
        q, k, v = (project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for project in (self.q_proj, self.k_proj, self.v_proj))  # (B, heads, S, D/heads)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out_proj(y.transpose(1, 2).flatten(2))                  # (B, S, D)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.act = ACTIVATIONS[config["hidden_act"]]
        self.fc1 = nn.Linear(config["hidden_size"], config["intermediate_size"])
        self.fc2 = nn.Linear(config["intermediate_size"], config["hidden_size"])

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Layer(nn.Module):
    def __init__(self, config, causal):
        super().__init__()
        self.layer_norm1 = layer_norm(config)
        self.self_attn = Attention(config, causal)
        self.layer_norm2 = layer_norm(config)
        self.mlp = MLP(config)

    def forward(self, x):
        # First the positions exchange what they hold, then each is transformed by itself.
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    def __init__(self, config, causal):
        super().__init__()
        self.layers = nn.ModuleList(
            [Layer(config, causal) for _ in range(config["num_hidden_layers"])])

    def forward(self, x):
        """Run the layers: (B, S, D) -> the states after the last one, and those before it."""
        before = x
        for layer in self.layers:
            before = x
            x = layer(x)
        return x, before


class Tower(Network):
    """What both towers share: the config, the projection, first weights, and the model folder.

    config: transformers' keys, as far as they differ from the defaults; "architectures" says
    whether the pooled state is projected. Keys that do not change the output are ignored.
    """

    def __init__(self, config):
        super().__init__()
        if f"{self.kind}_config" in config:
            # In a whole CLIPModel both towers project, to a width that is said at the top.
            config = dict(config[f"{self.kind}_config"], architectures=self.class_names[1],
                          projection_dim=config.get("projection_dim", 512))
        known = {key: value for key, value in config.items() if key in self.defaults}
        implemented = dict(hidden_act=ACTIVATIONS, architectures=self.class_names)
        self.config = complete(known, self.defaults, implemented, f"{self.folder} config")

    @property
    def projects(self):
        return self.config["architectures"].endswith("WithProjection")

    @property
    def width(self):
        """The width of the pooled state."""
        return self.config["projection_dim" if self.projects else "hidden_size"]

    def projection(self):
        """Make the layer that takes the pooled state to the space that both towers share."""
        if self.projects:
            return nn.Linear(self.config["hidden_size"], self.width, bias=False)
        return nn.Identity()

    @classmethod
    def rename(cls, key):
        """Turn a key of any version's file into ours, those of transformers up to 5.5.

        Later versions leave out "text_model." and "vision_model."; older ones stored position_ids,
        which are no weights. Of a whole CLIPModel, such as openai/clip-vit-large-patch14, the other
        tower is left out.
        """
        if key.endswith("position_ids") or key.startswith(cls.other_keys):
            return None
        prefix = f"{cls.kind}_model."
        ours = key.startswith((prefix, "text_projection.", "visual_projection."))
        return key if ours else prefix + key

    def save_pretrained(self, folder, dtype=None):
        """Write weights and config.json into a folder, as transformers does."""
        config = dict(self.config, architectures=[self.config["architectures"]],
                      model_type=f"clip_{self.kind}_model")
        save_weights(self, folder, config, "model.safetensors", dtype)


# -------------------------------------------------------------------------------------------------
# The text tower

class TextEmbeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        D = config["hidden_size"]
        self.token_embedding = nn.Embedding(config["vocab_size"], D)
        self.position_embedding = nn.Embedding(config["max_position_embeddings"], D)

    def forward(self, ids):
        # The positions are learned: there are no more than these 77.
        return self.token_embedding(ids) + self.position_embedding.weight[:ids.shape[1]]


class TextTransformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embeddings = TextEmbeddings(config)
        self.encoder = Encoder(config, causal=True)
        self.final_layer_norm = layer_norm(config)


class CLIPText(Tower):
    """transformers' CLIPTextModel or CLIPTextModelWithProjection."""
    kind = "text"
    class_names = ("CLIPTextModel", "CLIPTextModelWithProjection")
    folder = "text_encoder"
    defaults = TEXT_DEFAULTS
    other_keys = ("logit_scale", "vision_model.", "visual_projection.")

    def __init__(self, config):
        super().__init__(config)
        self.text_model = TextTransformer(self.config)
        self.text_projection = self.projection()

    def forward(self, ids):
        """Encode ids (B, S) -> last (B, S, D), penultimate (B, S, D), pooled (B, width).

        last is after the final norm; penultimate, from before the last layer, is without a norm.
        pooled is the state at the first end token, which in a causal tower has seen all the text.
        """
        x, penultimate = self.text_model.encoder(self.text_model.embeddings(ids))
        last = self.text_model.final_layer_norm(x)
        end = self.config["eos_token_id"]
        # Old configs say 2 and mean the largest id, which is the end token of CLIP's vocabulary.
        score = ids if end == 2 else (ids == end).int()
        pooled = last[torch.arange(len(ids), device=ids.device), score.argmax(dim=1)]
        return last, penultimate, self.text_projection(pooled)


# -------------------------------------------------------------------------------------------------
# The image tower, a vision transformer (Dosovitskiy et al. 2021, arXiv 2010.11929)

class VisionEmbeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        D = config["hidden_size"]
        patch = config["patch_size"]
        num_patches = (config["image_size"] // patch) ** 2
        self.class_embedding = nn.Parameter(torch.randn(D) * D ** -0.5)
        self.patch_embedding = nn.Conv2d(config["num_channels"], D, patch, patch, bias=False)
        # One position for the class token, whose state sums the picture up, and one per patch.
        self.position_embedding = nn.Embedding(1 + num_patches, D)

    def forward(self, pixels):
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)    # (B, N, D)
        first = self.class_embedding.expand(len(pixels), 1, -1)              # (B, 1, D)
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight


class VisionTransformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        # The missing letter is transformers' spelling, and so belongs to the file format.
        self.pre_layrnorm = layer_norm(config)
        self.encoder = Encoder(config, causal=False)
        self.post_layernorm = layer_norm(config)


class CLIPVision(Tower):
    """transformers' CLIPVisionModelWithProjection or CLIPVisionModel."""
    kind = "vision"
    class_names = ("CLIPVisionModel", "CLIPVisionModelWithProjection")
    folder = "image_encoder"
    defaults = VISION_DEFAULTS
    other_keys = ("logit_scale", "text_model.", "text_projection.")

    def __init__(self, config):
        super().__init__(config)
        self.vision_model = VisionTransformer(self.config)
        self.visual_projection = self.projection()

    def forward(self, pixels):
        """Encode pixels (B, 3, H, W) -> last (B, 1+N, D), pooled (B, width).

        H = W = image_size, else UserError. last holds the class token and then the patches, before
        the final norm; pooled is the class token after it.
        """
        size = self.config["image_size"]
        expected = (self.config["num_channels"], size, size)
        if pixels.shape[1:] != expected:
            raise UserError(f"the image encoder takes pictures of shape {expected}, not "
                            f"{tuple(pixels.shape[1:])}")
        x = self.vision_model.pre_layrnorm(self.vision_model.embeddings(pixels))
        last, _ = self.vision_model.encoder(x)
        return last, self.visual_projection(self.vision_model.post_layernorm(last[:, 0]))
