"""Latents and text states of your own pictures, encoded once: train.py --data FOLDER --cache DIR reads them in the place of pictures and words.

    cache.json                   what all of it depends on; a folder in which that differs is refused
    latents-00000.safetensors    latents (n, 2, C, h, w): mean and logvar of q(z | picture), unscaled
    texts-00000.safetensors      context (n, S, D) and, for SDXL, pooled (n, P): a row for each text, "" among them

All in fp16, SHARD rows a file. Shards that are missing are made, by each rank its own: making that was interrupted goes on. What is drawn at
random is drawn in training as ever: the latent from its moments, dropout, and sr's source, for which its pictures are still opened.

Letters: n rows of a shard, B batch, C channels, h w latent, S text length, D and P text widths.
"""
import copy
import functools
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from data import Encoder, to_tensor
from folders import UserError, blaming, read_json, write_file, write_json

SHARD = 512
FORMAT = 1  # of the files, and of how a picture is cropped and resized


@functools.lru_cache(maxsize=None)
def opened(path):
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({str(error).splitlines()[0]}); delete it and it is made again") from None


class Cache:
    """The rows of a folder by picture and by text. It holds no open file, so that it can go to worker processes."""

    def __init__(self, folder, root, pictures, texts, device):
        """pictures: paths relative to the folder `root`; both in the order of their rows."""
        self.folder, self.root, self.device = Path(folder), root, device
        self.pictures, self.texts = ({key: i for i, key in enumerate(keys)} for keys in (pictures, texts))

    def path(self, kind, i):
        return self.folder / f"{kind}-{i // SHARD:05d}.safetensors"

    def row(self, kind, i):
        """-> name -> tensor. float() copies: the storage of a slice is the whole file, which a worker process would send."""
        path = self.path(kind, i)
        with blaming(path):
            return {name: opened(path).get_slice(name)[i % SHARD].float() for name in opened(path).keys()}

    def applied(self, datasets):
        """task -> data.Folder -> the same, but their examples hold moments in the place of pictures"""
        copies = {task: copy.copy(dataset) for task, dataset in datasets.items()}
        for dataset in copies.values():
            dataset.cached = self.latents
        return copies

    def latents(self, path):
        """-> mean and logvar of that picture, (2, C, h, w)"""
        return self.row("latents", self.pictures[os.path.relpath(path, self.root)])["latents"]

    def states(self, prompts):
        """list of B strings -> context (B, S, D), pooled (B, P) or None, as Model.encode_text"""
        rows = [self.row("texts", self.texts[prompt]) for prompt in prompts]
        return tuple(torch.stack([row[name] for row in rows]).to(self.device) if name in rows[0] else None for name in ("context", "pooled"))


def digest(value, network=None):
    """Of what JSON can hold, and of a network's configuration and weights."""
    told = hashlib.sha256(json.dumps([value, network and network.config], sort_keys=True).encode())
    for name, tensor in network.state_dict().items() if network else ():
        told.update(name.encode())
        told.update(tensor.detach().float().cpu().flatten().numpy())
    return told.hexdigest()


def open_cache(args, model, datasets, rank=0, world=1):
    """The cache --cache of all that the data sets (data.Folder) hold; shards that it lacks are made, by all ranks together. Texts are not in it
    where their encoder trains. UserError where it was made from anything else."""
    folder, device, frozen = Path(args.cache), next(model.unet.parameters()).device, bool(model.texts) and not model.text_encoder.training
    readers = {os.path.relpath(d.root / row[column], args.data): functools.partial(d.picture, row[column])
               for d in datasets for row in d.items for column in d.columns if column != "text"}
    pictures = sorted(readers)
    texts = sorted({"", *(row["text"] for d in datasets if "text" in d.columns for row in d.items)}) if frozen else []
    stats = [(Path(args.data) / name).stat() for name in pictures]
    depends = {  # in words that complete "made with another"
        "format": [FORMAT, SHARD], "picture size": datasets[0].size, "autoencoder": digest("", model.vae),
        "set of pictures": digest([(name, s.st_size, s.st_mtime_ns) for name, s in zip(pictures, stats)]), "set of texts": digest(texts),
        "text encoder or tokenizer": [digest([t.vocab, list(t.ranks), t.pad_token, t.length], encoder) for t, encoder in model.texts] * frozen,
        "state of the empty text": len(model.texts) == 2 and model.index.get("force_zeros_for_empty_prompt", True)}
    if rank == 0 and (not folder.exists() or folder.is_dir() and all(path.suffix == ".part" for path in folder.iterdir())):
        write_json(folder / "cache.json", depends)
    if world > 1:
        dist.barrier()
    if not (folder / "cache.json").is_file():
        raise UserError(f"--cache {folder} is no cache, it has no cache.json: name another folder, or one that is new")
    told = read_json(folder / "cache.json")
    if differ := [name for name in depends if told.get(name) != depends[name]]:
        raise UserError(f"--cache {folder} was made with another {' and another '.join(differ)}: delete it or name another")

    encode = Encoder(model.vae, limit=0)

    def latents(names):
        with ThreadPoolExecutor(max(args.workers, 1)) as threads:
            parts = (threads.map(lambda name: to_tensor(readers[name]()), names[i:i + 16]) for i in range(0, len(names), 16))
            return dict(latents=torch.cat([torch.stack(encode.moments(list(part), device), dim=1) for part in parts]))

    def states(prompts):
        context, pooled = zip(*(model.encode_text(prompts[i:i + 16]) for i in range(0, len(prompts), 16)))
        return dict(context=torch.cat(context)) | ({} if pooled[0] is None else dict(pooled=torch.cat(pooled)))

    cache = Cache(folder, args.data, pictures, texts, device)
    shards = [(cache.path(kind, i), make, rows[i:i + SHARD]) for kind, make, rows in (("latents", latents, pictures), ("texts", states, texts))
              for i in range(0, len(rows), SHARD)]
    missing = [shard for shard in shards if not shard[0].is_file()]
    if world > 1:
        dist.barrier()  # all have seen the same
    missing = missing[rank::world]
    for path, make, rows in tqdm(missing, desc=f"{folder}", disable=rank > 0 or not missing):
        tensors = {name: value.half().cpu().contiguous() for name, value in make(rows).items()}
        write_file(path, lambda beside: save_file(tensors, beside))
    if world > 1:
        dist.barrier()
    opened.cache_clear()  # of an earlier run in this process
    for path, _, _ in shards:  # a damaged one shows now
        opened(path)
    return cache
