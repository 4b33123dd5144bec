"""CLIP (Radford et al. 2021, arXiv 2103.00020): byte-pair tokenizer, text and image tower, under transformers' names. `python clip.py` trains
the miniature's text tower.

Stable Diffusion 1.x conditions on the text tower's last hidden states, all 77 positions, without an attention mask; SDXL on the
penultimate ones of two towers, and on the second's pooled state.

Letters: B batch, S = 77 positions, N patches, D width.
"""
import functools
import json
import re
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from folders import UserError, blaming, command, fetch, load_weights, read_json, save_weights, write_file

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
WHITE_SPACE = set("\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000") | {chr(c) for c in range(0x2000, 0x200B)}


@functools.lru_cache
def byte_symbols():
    """byte -> a printable character, so that any text is a string of the 256 base symbols (GPT-2's table)."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [b for b in range(256) if b not in kept]
    return {b: chr(b) for b in kept} | {b: chr(256 + i) for i, b in enumerate(moved)}


def split_words(text):
    """Normalised text -> words: contractions, runs of letters, single digits, runs of anything else but white space."""
    def kind(c):
        return "space" if c in WHITE_SPACE else {"L": "letter", "N": "digit"}.get(unicodedata.category(c)[0], "other")

    text = "".join(c.lower() for c in unicodedata.normalize("NFC", text))
    words, i = [], 0
    while i < len(text):
        end, of = i + 1, kind(text[i])
        contraction = next((c for c in CONTRACTIONS if text.startswith(c, i)), None)
        if contraction:
            end = i + len(contraction)
        elif of in ("letter", "other"):
            while end < len(text) and kind(text[end]) == of:
                end += 1
        if of != "space":
            words.append(text[i:end])
        i = end
    return words


def merge_pair(symbols, pair):
    """Join every occurrence of the pair of neighbours, from left to right."""
    out, i = [], 0
    while i < len(symbols):
        if symbols[i:i + 2] == pair:
            out.append(symbols[i] + symbols[i + 1])
            i += 2
        else:
            out.append(symbols[i])
            i += 1
    return tuple(out)


def to_symbols(word):
    symbols = [byte_symbols()[b] for b in word.encode(errors="replace")]
    return (*symbols[:-1], symbols[-1] + "</w>")


class Tokenizer:
    """vocab: symbol -> id; merges: pairs in order of priority. Padding is the model's own: the end token, or "!" for SDXL's second."""
    length = 77

    def __init__(self, vocab, merges, pad_token=EOS):
        for token in (BOS, EOS, pad_token):
            if token not in vocab:
                raise UserError(f"the tokenizer's vocabulary has no {token}")
        self.vocab, self.ranks, self.pad_token = vocab, {tuple(m): i for i, m in enumerate(merges)}, pad_token
        self.special = dict.fromkeys((BOS, EOS, pad_token))
        self.ids = functools.lru_cache(maxsize=65536)(self._ids)

    def _ids(self, word):
        if word in self.special:
            return (self.vocab[word],)
        symbols = to_symbols(word)
        while len(symbols) > 1:
            pair = min(zip(symbols, symbols[1:]), key=lambda p: self.ranks.get(p, float("inf")))
            if pair not in self.ranks:
                break
            symbols = merge_pair(symbols, pair)
        return tuple(self.vocab.get(s, self.vocab[EOS]) for s in symbols)

    def words(self, text):
        """Words, where special tokens stay whole; the padding is one, so that SDXL's second tokenizer reads any "!" as padding."""
        parts = re.split(f"({'|'.join(map(re.escape, self.special))})", text)
        return [word for part in parts for word in ([part] if part in self.special else split_words(part))]

    def __call__(self, texts):
        """list of B strings -> (B, 77) long: start, tokens, end, padding; what does not fit is cut off (see `dropped`)."""
        rows = []
        for text in texts:
            ids = [i for word in self.words(text) for i in self.ids(word)][:self.length - 2]
            ids = [self.vocab[BOS], *ids, self.vocab[EOS]]
            rows.append(ids + [self.vocab[self.pad_token]] * (self.length - len(ids)))
        return torch.tensor(rows, dtype=torch.long)

    def dropped(self, text):
        """The words of a text that do not fit, or fit only in part."""
        words, used = self.words(text), 0
        for i, word in enumerate(words):
            used += len(self.ids(word))
            if used > self.length - 2:
                return words[i:]
        return []

    @classmethod
    def train(cls, texts, vocab_size):
        """Byte-pair encoding on a corpus (Sennrich et al. 2016, arXiv 1508.07909); ties are broken by the alphabet."""
        counts = Counter(word for text in texts for word in split_words(text))
        split = {word: to_symbols(word) for word in counts}
        symbols = list(byte_symbols().values())
        vocab, merges = symbols + [s + "</w>" for s in symbols], []
        while len(vocab) < vocab_size - 2:
            pairs = Counter()
            for word, parts in split.items():
                for pair in zip(parts, parts[1:]):
                    pairs[pair] += counts[word]
            if not pairs:
                break
            best = min(pairs, key=lambda p: (-pairs[p], p))
            merges.append(best)
            vocab.append("".join(best))
            split = {word: merge_pair(parts, best) if best[0] in parts else parts for word, parts in split.items()}
        return cls({s: i for i, s in enumerate([*dict.fromkeys(vocab), BOS, EOS])}, merges)

    @classmethod
    def from_pretrained(cls, path_or_hub_id, subfolder="tokenizer"):
        """From vocab.json and merges.txt, or from tokenizer.json, which is all that transformers 5 writes."""
        folder = fetch(path_or_hub_id, subfolder)
        with blaming(folder):
            if (folder / "merges.txt").is_file():
                lines, vocab = (folder / "merges.txt").read_text(encoding="utf-8").split("\n"), read_json(folder / "vocab.json")
            elif (folder / "tokenizer.json").is_file():
                whole = read_json(folder / "tokenizer.json")["model"]
                lines, vocab = [m if isinstance(m, str) else " ".join(m) for m in whole["merges"]], whole["vocab"]
            else:
                raise UserError(f"no merges.txt and no tokenizer.json in {folder}")
            merges = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
            pad = EOS
            for name in ("special_tokens_map.json", "tokenizer_config.json"):
                if (folder / name).is_file():
                    pad = read_json(folder / name).get("pad_token", pad)
            return cls(vocab, merges, pad["content"] if isinstance(pad, dict) else pad)

    def save_pretrained(self, folder):
        special = dict(bos_token=BOS, eos_token=EOS, unk_token=EOS, pad_token=self.pad_token)
        config = dict(tokenizer_class="CLIPTokenizer", model_max_length=self.length, do_lower_case=True, errors="replace",
                      add_prefix_space=False, **special)
        for name, text in (("vocab.json", json.dumps(self.vocab, ensure_ascii=False)),
                           ("merges.txt", "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in self.ranks)),
                           ("special_tokens_map.json", json.dumps(special, indent=2)),
                           ("tokenizer_config.json", json.dumps(config, indent=2))):
            write_file(Path(folder) / name, lambda beside, text=text: beside.write_text(text, encoding="utf-8"))


# ---------------------------------------------------------------------------------------------------------------------
# Towers

# transformers' defaults (CLIP ViT-B/32)
TEXT_DEFAULTS = dict(
    vocab_size=49408, hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8, max_position_embeddings=77,
    hidden_act="quick_gelu", layer_norm_eps=1e-5, projection_dim=512, bos_token_id=49406, eos_token_id=49407, pad_token_id=1,
    architectures=["CLIPTextModel"])
VISION_DEFAULTS = dict(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, num_channels=3, image_size=224, patch_size=32,
    hidden_act="quick_gelu", layer_norm_eps=1e-5, projection_dim=512, architectures=["CLIPVisionModelWithProjection"])
CONFIGS = {
    "tiny": dict(hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, projection_dim=128),
    # SD 1.x, and SDXL's first
    "clip_l": dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12, projection_dim=768),
    # OpenCLIP ViT-bigG/14, SDXL's second; its tokenizer pads with "!", id 0
    "clip_bigg": dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280,
                      hidden_act="gelu", architectures=["CLIPTextModelWithProjection"]),
    # the image tower beside clip_l, ViT-L/14
    "clip_l_vision": dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14,
                          projection_dim=768, architectures=["CLIPVisionModelWithProjection"]),
}
ACTIVATIONS = {"quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "gelu": F.gelu}


class Attention(nn.Module):
    """Self-attention; causal: a position sees itself and the ones before."""

    def __init__(self, c, causal):
        super().__init__()
        D, self.heads, self.causal = c["hidden_size"], c["num_attention_heads"], causal
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(D, D) for _ in range(4))

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.act = ACTIVATIONS[c["hidden_act"]]
        self.fc1 = nn.Linear(c["hidden_size"], c["intermediate_size"])
        self.fc2 = nn.Linear(c["intermediate_size"], c["hidden_size"])

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Layer(nn.Module):
    def __init__(self, c, causal):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(c["hidden_size"], c["layer_norm_eps"])
        self.self_attn = Attention(c, causal)
        self.layer_norm2 = nn.LayerNorm(c["hidden_size"], c["layer_norm_eps"])
        self.mlp = MLP(c)

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    def __init__(self, c, causal):
        super().__init__()
        self.layers = nn.ModuleList([Layer(c, causal) for _ in range(c["num_hidden_layers"])])

    def forward(self, x):
        """(B, S, D) -> the states after the last layer, and those before it."""
        before = x
        for layer in self.layers:
            before, x = x, layer(x)
        return x, before


class Tower(nn.Module):
    """What both towers share: the config's checks, the first weights, the folder. The config's "architectures" says whether it projects."""

    def __init__(self, config):
        super().__init__()
        self.config = c = {**self.defaults, **{k: v for k, v in config.items() if k in self.defaults}}
        name, models = self.subfolder.replace("_", " "), [f"CLIP{self.kind}Model", f"CLIP{self.kind}ModelWithProjection"]
        if c["hidden_act"] not in ACTIVATIONS:
            raise UserError(f"{name} config: hidden_act = {c['hidden_act']!r} is not implemented; use {' or '.join(ACTIVATIONS)}")
        if c["architectures"] not in ([model] for model in models):
            raise UserError(f"{name} config: architectures = {c['architectures']} is not implemented; use {' or '.join(models)}")
        if c["hidden_size"] % c["num_attention_heads"]:
            raise UserError(f"{name} config: num_attention_heads = {c['num_attention_heads']} does not divide hidden_size = {c['hidden_size']}")

    @property
    def width(self):
        """Of the pooled state."""
        return self.config["projection_dim" if self.config["architectures"][0].endswith("WithProjection") else "hidden_size"]

    def projection(self):
        projects = self.config["architectures"][0].endswith("WithProjection")
        return nn.Linear(self.config["hidden_size"], self.width, bias=False) if projects else None

    def start(self):
        """As CLIP starts: narrow normals, biases zero."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding, nn.Conv2d)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    @classmethod
    def from_pretrained(cls, path_or_hub_id, subfolder=None, dtype=torch.float32):
        """subfolder: by default a pipeline's, text_encoder or image_encoder; "" for openai/clip-vit-large-patch14 and other whole CLIPModels,
        of which this tower is read. dtype: of the parameters in memory."""
        folder = fetch(path_or_hub_id, cls.subfolder if subfolder is None else subfolder)
        config, whole = read_json(folder / "config.json"), ()
        with torch.device("meta"), blaming(folder / "config.json"):
            if f"{cls.kind.lower()}_config" in config:
                whole = "logit_scale", *(("vision_model.", "visual_projection.") if cls.kind == "Text" else ("text_model.", "text_projection."))
                config = config[f"{cls.kind.lower()}_config"] | dict(projection_dim=config.get("projection_dim", 512),
                                                                     architectures=[f"CLIP{cls.kind}ModelWithProjection"])
            tower = cls(config)
        load_weights(tower, folder, lambda key: None if key.startswith(whole) else prefixed(key, f"{cls.kind.lower()}_model."), dtype)
        return tower

    def save_pretrained(self, folder, dtype=None):
        save_weights(self, folder, {**self.config, "model_type": f"clip_{self.kind.lower()}_model"}, "model.safetensors", dtype)


def prefixed(key, prefix):
    """transformers 5.6 and later write the keys without "text_model." or "vision_model."; older files hold position_ids, which are no weights."""
    if key.endswith("position_ids"):
        return None
    return key if key.startswith((prefix, "text_projection.", "visual_projection.")) else prefix + key


# ---------------------------------------------------------------------------------------------------------------------
# Text

class TextEmbeddings(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.token_embedding = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.position_embedding = nn.Embedding(c["max_position_embeddings"], c["hidden_size"])

    def forward(self, ids):
        return self.token_embedding(ids) + self.position_embedding.weight[:ids.shape[1]]


class TextTransformer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.embeddings = TextEmbeddings(c)
        self.encoder = Encoder(c, causal=True)
        self.final_layer_norm = nn.LayerNorm(c["hidden_size"], c["layer_norm_eps"])


class CLIPText(Tower):
    """transformers' CLIPTextModel or CLIPTextModelWithProjection."""
    kind, subfolder, defaults = "Text", "text_encoder", TEXT_DEFAULTS

    def __init__(self, config):
        super().__init__(config)
        self.text_model = TextTransformer(self.config)
        self.text_projection = self.projection()
        self.start()

    def forward(self, ids):
        """ids (B, S) -> last (B, S, D) after the final norm, penultimate (B, S, D) without it, pooled (B, D or projection_dim)
        at the first end token."""
        x, penultimate = self.text_model.encoder(self.text_model.embeddings(ids))
        last = self.text_model.final_layer_norm(x)
        # Old configs give 2 as end token and mean the largest id, which is the end token of CLIP's vocabulary.
        end = ids.argmax(dim=1) if self.config["eos_token_id"] == 2 else (ids == self.config["eos_token_id"]).int().argmax(dim=1)
        pooled = last[torch.arange(len(ids), device=ids.device), end]
        return last, penultimate, pooled if self.text_projection is None else self.text_projection(pooled)


# ---------------------------------------------------------------------------------------------------------------------
# Images

class VisionEmbeddings(nn.Module):
    def __init__(self, c):
        super().__init__()
        D, patch = c["hidden_size"], c["patch_size"]
        self.class_embedding = nn.Parameter(torch.randn(D) * D ** -0.5)
        self.patch_embedding = nn.Conv2d(c["num_channels"], D, patch, patch, bias=False)
        self.position_embedding = nn.Embedding(1 + (c["image_size"] // patch) ** 2, D)

    def forward(self, pixels):
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)                                   # (B, N, D)
        x = torch.cat([self.class_embedding.expand(len(pixels), 1, -1), patches], dim=1)                    # (B, 1+N, D)
        return x + self.position_embedding.weight


class VisionTransformer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.embeddings = VisionEmbeddings(c)
        self.pre_layrnorm = nn.LayerNorm(c["hidden_size"], c["layer_norm_eps"])  # transformers' spelling
        self.encoder = Encoder(c, causal=False)
        self.post_layernorm = nn.LayerNorm(c["hidden_size"], c["layer_norm_eps"])


class CLIPVision(Tower):
    """transformers' CLIPVisionModelWithProjection or CLIPVisionModel."""
    kind, subfolder, defaults = "Vision", "image_encoder", VISION_DEFAULTS

    def __init__(self, config):
        super().__init__(config)
        for key in ("image_size", "patch_size"):
            if not isinstance(self.config[key], int):
                raise UserError(f"image encoder config: {key} = {self.config[key]} is not implemented; use one number, the side of a square")
        self.vision_model = VisionTransformer(self.config)
        self.visual_projection = self.projection()
        self.start()

    def forward(self, pixels):
        """pixels (B, 3, H, W) as `preprocess` gives them, H = W = image_size -> last (B, 1+N, D) without a final norm, the class token before
        the patches, pooled (B, projection_dim or D), the class token after it. UserError at another size."""
        size = self.config["num_channels"], self.config["image_size"], self.config["image_size"]
        if pixels.shape[1:] != size:
            raise UserError(f"the image encoder takes pictures of shape {size}, not {tuple(pixels.shape[1:])}")
        last, _ = self.vision_model.encoder(self.vision_model.pre_layrnorm(self.vision_model.embeddings(pixels)))
        pooled = self.vision_model.post_layernorm(last[:, 0])
        return last, pooled if self.visual_projection is None else self.visual_projection(pooled)


# OpenAI's, in transformers' image_utils and in every CLIP's preprocessor_config.json
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def preprocess(pictures, size=224):
    """list of B PIL pictures -> (B, 3, size, size), equal to transformers' CLIPImageProcessorPil: transparency becomes white, the shortest side
    `size` (bicubic), then the centre is cut out, scaled to [0, 1] and normalised."""
    cut = []
    for picture in pictures:
        if "A" in picture.getbands() or picture.info.get("transparency") is not None:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        width, height = (size * side // min(picture.size) for side in picture.size)
        picture = picture.convert("RGB").resize((width, height), Image.BICUBIC)
        left, top = (width - size) // 2, (height - size) // 2
        cut.append(torch.from_numpy(np.array(picture.crop((left, top, left + size, top + size)))))
    x = torch.stack(cut).movedim(-1, 1) / 255
    return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


# ---------------------------------------------------------------------------------------------------------------------
# The miniature's text tower

def tiny_config(tokenizer):
    """Of a text tower for the miniature, which reads this tokenizer's ids."""
    return CONFIGS["tiny"] | dict(vocab_size=len(tokenizer.vocab), bos_token_id=tokenizer.vocab[BOS], eos_token_id=tokenizer.vocab[EOS])


def spoken_of(task, example):
    """The picture (3, H, W) that a text tells of: a caption's, what an instruction leads to, the thing to be removed on white."""
    return example["source"] - example["target"] + 1 if task == "inpaint" else example["target"]


def main():
    """Stable Diffusion's text tower was trained beside an image tower, on 400 million captions. The miniature's learns from the built-in texts to
    tell, by a linear head on its pooled state, the principal components of the picture meant; these are fixed, as LiT's tower (arXiv 2111.07991)."""
    import argparse

    import data
    from folders import HelpFormatter, new_folder, pick_device

    parser = argparse.ArgumentParser(description="Train the miniature's text tower on the built-in data.", formatter_class=HelpFormatter)
    parser.add_argument("--out", default="runs/clip", help="folder that gets text_encoder/ and assets/tiny's tokenizer/")
    parser.add_argument("--steps", type=int, default=4000, help="of training")
    parser.add_argument("--batch-size", type=int, default=128, help="texts a step")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak; 100 steps of warm-up, cosine to zero")
    parser.add_argument("--components", type=int, default=128, help="principal components of a picture at 32 x 32 that are to be told")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="bf16 autocast or fp32")
    parser.add_argument("--device", help="default: cuda, else mps, else cpu")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random")
    args = parser.parse_args()
    if min(args.steps, args.batch_size) < 1 or not 1 <= args.components <= 3072 or not 0 <= args.seed < 2 ** 62 or not 0 < args.lr < float("inf"):
        raise UserError("--steps and --batch-size are at least 1, --components 1 to 3072, --seed at least 0, --lr above 0")
    if Path(args.out).exists():
        raise UserError(f"{args.out} exists; choose another --out")
    Path(args.out).absolute().parent.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(args.seed)
    device, tokenizer = pick_device(args.device), Tokenizer.from_pretrained(data.ASSETS / "tiny")
    tower = CLIPText(tiny_config(tokenizer)).to(device)
    head = nn.Linear(tower.width, args.components).to(device)
    params = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(params, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0)

    def pixels(pictures):  # (3, 64, 64) each -> (B, 3072)
        return F.avg_pool2d(torch.stack(pictures), 2).flatten(1)

    sets, (captions, pictures) = {task: data.builtin(task, "train") for task in ("t2i", "edit", "inpaint")}, data.plain("train")
    pictures = pixels([data.to_tensor(picture) for picture in pictures])
    mean = pictures.mean(dim=0)
    _, S, V = torch.linalg.svd(pictures - mean, full_matrices=False)
    V = V[:args.components].T * (len(pictures) / (S[:args.components] ** 2).mean()).sqrt()  # (3072, components), codes of mean variance 1

    def told(texts):
        """-> (B, components). Cut after the longest text: the pooled state of a causal tower does not depend on what follows its end token."""
        ids = tokenizer(texts)
        return head(tower(ids[:, :(ids == tokenizer.vocab[EOS]).int().argmax(dim=1).max() + 1].to(device))[2])

    for step in (bar := tqdm(range(args.steps), desc="clip")):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min((step + 1) / 100, 0.5 * (1 + np.cos(np.pi * step / args.steps)))
        rng = np.random.default_rng((args.seed, step))
        tasks = rng.choice(list(sets), size=args.batch_size, p=(0.75, 0.1, 0.15))
        examples = [sets[task].get(int(rng.integers(len(sets[task]))), rng) for task in tasks]
        code = (pixels([spoken_of(*pair) for pair in zip(tasks, examples)]) - mean) @ V
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            loss = F.mse_loss(told([example["prompt"] for example in examples]).float(), code.to(device))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    with new_folder(args.out) as folder:
        tower.save_pretrained(folder / "text_encoder")
        tokenizer.save_pretrained(folder / "tokenizer")
    with torch.no_grad():
        code, given = (pictures - mean) @ V, torch.cat([told(captions[i:i + 256]) for i in range(0, len(captions), 256)]).cpu()
    nearest = (torch.cdist(given, code).argmin(dim=1) == torch.arange(len(code))).float().mean()
    print(f"{len(code)} training captions tell {100 - 100 * F.mse_loss(given, code):.0f} % of the components' variance, {100 * nearest:.0f} % are "
          f"nearest to their own picture; saved in {args.out}. Next: python train.py --task t2i --model scratch --text-encoder {args.out}")


if __name__ == "__main__":
    command(main)
