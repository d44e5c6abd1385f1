"""GPT-2, ViT and ResNet, from their configuration with random weights, trained by other people's trainers.

Each function trains ``STEPS`` steps, with or without the one line, and returns the mean loss of the last ten. The tests
and ``benchmarks/micro/bench_trainers.py`` share them.
"""

import pytest
import torch
from torch.nn import functional

import consistency_ops as co

from . import frameworks

STEPS = 50
QUIET = dict(report_to=[], use_cpu=True, disable_tqdm=True)


def digits():
    """scikit-learn's 1797 handwritten digits: (n, 1, 8, 8) in [-1, 1], labels."""
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
    data = datasets.load_digits()
    return torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(data.target)


def sentences(words=64, length=32, count=800):
    """A language of bigrams: three words may follow a word, with probabilities .8, .15 and .05."""
    generator = torch.Generator().manual_seed(0)
    follows = torch.randint(words, (words, 3), generator=generator)
    text = torch.empty(count, length, dtype=torch.int64)
    text[:, 0] = torch.randint(words, (count,), generator=generator)
    weights = torch.tensor([0.8, 0.15, 0.05])
    for i in range(1, length):
        pick = torch.multinomial(weights, count, replacement=True, generator=generator)
        text[:, i] = follows[text[:, i - 1], pick]
    return text


def gpt2_trainer(folder, seed, steps=STEPS, weights=None, **options):
    """Two blocks of width 64; Hugging Face's Trainer, AdamW 1e-2 with linear decay. ``weights``: folder to load."""
    transformers, _ = frameworks.require("transformers", "accelerate")
    transformers.set_seed(seed)
    size = dict(vocab_size=64, n_positions=32, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    kind = transformers.GPT2LMHeadModel
    model = kind.from_pretrained(weights) if weights else kind(transformers.GPT2Config(**size))
    data = [{"input_ids": ids, "labels": ids} for ids in sentences()]
    return _trainer(transformers, model, data, folder, seed, steps, 1e-2, options)


def vit_config(transformers):
    size = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
    return transformers.ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=10, **size)


def vit_trainer(folder, seed, steps=STEPS, weights=None, **options):
    """Two blocks of width 64; Hugging Face's Trainer, AdamW 3e-3 with linear decay. ``weights``: folder to load."""
    transformers, _ = frameworks.require("transformers", "accelerate")
    transformers.set_seed(seed)
    kind = transformers.ViTForImageClassification
    model = kind.from_pretrained(weights) if weights else kind(vit_config(transformers))
    data = [{"pixel_values": x, "labels": int(y)} for x, y in zip(*digits(), strict=True)]
    return _trainer(transformers, model, data, folder, seed, steps, 3e-3, options)


def _trainer(transformers, model, data, folder, seed, steps, lr, options):
    options = {"max_steps": steps, "learning_rate": lr, "seed": seed, "save_strategy": "no", **QUIET, **options}
    arguments = transformers.TrainingArguments(folder, per_device_train_batch_size=32, logging_steps=10, **options)
    return transformers.Trainer(model, arguments, train_dataset=data)


def gpt2(folder, seed, on):
    """Hugging Face Trainer, AdamW 1e-2"""
    trainer = gpt2_trainer(folder, seed)
    if on:
        pre = co.Preconditioner(trainer.model, trainer.create_optimizer())
    trainer.train()
    if on:
        assert pre.steps == STEPS
        # c_attn, c_proj, c_fc and c_proj of both blocks; the head is tied to the embedding and left alone.
        assert sum(layer.capture is not None for layer in pre._layers) == 8
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1]


def vit(folder, seed, on):
    """Lightning, AdamW 3e-3"""
    lightning, transformers = frameworks.require("lightning", "transformers")

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = transformers.ViTForImageClassification(vit_config(transformers))
            self.losses = []

        def training_step(self, batch, index):
            loss = self.model(pixel_values=batch[0], labels=batch[1]).loss
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
            if on:
                self.pre = co.Preconditioner(self, optimizer)
            return optimizer

    lightning.seed_everything(seed, verbose=False)
    model = Classifier()
    data = torch.utils.data.TensorDataset(*digits())
    loader = torch.utils.data.DataLoader(data, batch_size=32, shuffle=True)
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    lightning.Trainer(max_steps=STEPS, accelerator="cpu", default_root_dir=folder, **quiet).fit(model, loader)
    if on:
        assert model.pre.steps == STEPS
        assert sum(layer.capture is not None for layer in model.pre._layers) == 14
    return sum(model.losses[-10:]) / 10


def resnet(folder, seed, on):
    """plain loop, timm, SGD 0.1, momentum 0.9"""
    (timm,) = frameworks.require("timm")
    x, y = digits()
    x = functional.interpolate(x, scale_factor=2)
    torch.manual_seed(seed)
    model = timm.create_model("test_resnet", num_classes=10, in_chans=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if on:
        pre = co.Preconditioner(model, optimizer)
    losses = []
    for _ in range(STEPS):
        batch = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x[batch]), y[batch])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if on:
        assert pre.steps == STEPS
        assert pre.stats()["failed_chunks"] == 0
    return sum(losses[-10:]) / 10


MODELS = {"gpt2": gpt2, "vit": vit, "resnet": resnet}
