"""A training example is a function of (seed, step, index in the batch) alone; held-out examples are fixed, and losses are averaged over them.

Letters: B batch, M held-out examples, C channels, H W picture, h w latent.
"""
import numpy as np
import torch

import merge
from data import TASKS

BINS = 4  # the loss is told in this many equal ranges of timesteps


class Examples(torch.utils.data.Dataset):
    """Example i is sample k = i mod B of step i div B: picture, words, dropout, timestep and noise follow from (seed, step, k)."""

    def __init__(self, datasets, batch_size, seed, num_timesteps, latent_shape, t_range=None, p_global=0.0, antithetic=False, drop=None,
                 shares=None):
        """datasets: task -> its data set. drop: task -> conditioning dropout, default data.TASKS'. shares: the tasks of samples 0, 1, .. in
        turn, default each once."""
        self.shares, self.datasets, self.t_range, self.p_global, self.antithetic = shares or list(datasets), datasets, t_range, p_global, antithetic
        self.batch_size, self.seed, self.T, self.latent_shape = batch_size, seed, num_timesteps, latent_shape
        self.drop = drop or {task: TASKS[task].drop for task in datasets}
        if t_range:  # a mistake shows now
            merge.sample_timesteps(t_range, num_timesteps, p_global, np.random.default_rng(0), 1)

    def __getitem__(self, i):
        step, k = divmod(i, self.batch_size)
        rng = np.random.default_rng((self.seed, step, k))
        task = self.shares[k % len(self.shares)]
        dataset = self.datasets[task]
        example = self.condition(dataset.get(int(rng.integers(len(dataset))), rng), task, rng.random())
        draw = (np.random.default_rng((self.seed, step, self.batch_size)), self.batch_size, True) if self.antithetic else (rng, 1)
        t = rng.integers(self.T) if self.t_range is None else merge.sample_timesteps(self.t_range, self.T, self.p_global, *draw)[k % draw[1]]
        return self.noised(example, int(t), int(rng.integers(2 ** 62)))

    def held_out(self, datasets, count):
        """Fixed examples, timesteps (spread evenly) and noise, `count` per task, in the tasks' order again and again."""
        for i in range(count):
            for task, dataset in datasets.items():
                yield self.noised(self.condition(dataset[i * len(dataset) // count], task, 1.0), int((i + 0.5) * self.T / count), i)

    def condition(self, example, task, r):
        """Conditioning dropout: r in [0, 1) nulls the text, both, or the picture (InstructPix2Pix: 5 % each); a joint task's x
        counts as its picture."""
        text, both, image = self.drop[task]
        prompt = "" if r < text + both else example["prompt"]
        keep = 0.0 if text <= r < text + both + image else 1.0
        return dict(task=task, prompt=prompt, target=example["target"], source=example.get("source"), x=example.get("x"), keep=keep)

    def noised(self, example, t, seed):
        noise, sample_noise = torch.randn(2, *self.latent_shape, generator=torch.Generator().manual_seed(seed))
        return dict(example, t=t, noise=noise, sample_noise=sample_noise)


def collate(examples):
    batch = {key: [e[key] for e in examples] for key in examples[0]}
    for key in ("t", "keep"):
        batch[key] = torch.tensor(batch[key])
    for key in ("noise", "sample_noise", "target"):
        batch[key] = torch.stack(batch[key])
    return batch


def per_sample_loss(denoiser, encode, model, batch, device):
    """A collated batch -> its losses (B,), of a joint task (B, 1 + modalities), and weighted losses (B,)."""
    x0, source = encode(batch, device)
    rows = torch.tensor([model.tasks.index(task) for task in batch["task"]], device=device)
    trains, prompts = model.text_encoder is not None and model.text_encoder.training, batch["prompt"]
    text, pooled = (model.tokenizer(prompts).to(device), None) if trains else (encode.texts or model.encode_text)(prompts)
    added = model.added(pooled, *[model.native_size] * 2)
    return denoiser(x0, source, text, batch["t"].to(device), batch["noise"].to(device), rows, added)


@torch.no_grad()
def held_out_losses(denoiser, encode, model, examples, batch_size, device):
    """The loss of each of the fixed examples, which have their timesteps and noise: (M,), of a joint task (M, 1 + modalities)"""
    batches = [collate(examples[i:i + batch_size]) for i in range(0, len(examples), batch_size)]
    return np.array([loss for batch in batches for loss in per_sample_loss(denoiser, encode, model, batch, device)[0].tolist()])


def mean_by_task(examples, losses, modalities=()):
    """-> task -> its mean loss, and modality -> the mean of its term, a column each of a joint task's losses."""
    tasks, (loss, *terms) = np.array([example["task"] for example in examples]), losses[:, None].T if losses.ndim == 1 else losses.T
    return {task: float(loss[tasks == task].mean()) for task in dict.fromkeys(tasks.tolist())} | {
        name: float(term.mean()) for name, term in zip(modalities, terms) if len(term)}


def mean_by_task_and_t(examples, losses, T, modalities=()):
    """-> task -> its mean loss in each of BINS ranges of timesteps, None where there is none."""
    bins = np.array([example["t"] for example in examples]) * BINS // T
    each = [mean_by_task([e for e, b in zip(examples, bins) if b == i], losses[bins == i], modalities) for i in range(BINS)]
    return {name: [mean.get(name) for mean in each] for name in dict.fromkeys([*(e["task"] for e in examples), *modalities])}
