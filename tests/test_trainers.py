"""One line in the training scripts of others: Hugging Face Trainer, Accelerate, Lightning, a plain loop with timm."""

import re
from pathlib import Path

import frameworks
import pytest
import torch
from torch.nn import functional

import consistency_ops as co

ROOT = Path(__file__).resolve().parents[1]
STEPS = 50


def small():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def train(model, optimizer, steps=4, backward=torch.Tensor.backward):
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(32, 8, generator=generator), torch.randint(4, (32,), generator=generator)
    for _ in range(steps):
        optimizer.zero_grad()
        backward(functional.cross_entropy(model(x), y))
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


class Wrapper(torch.optim.Optimizer):
    """As Accelerate wraps an optimizer: it has the type, but not what torch.optim.Optimizer.__init__ sets up."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def __getattr__(self, name):
        if name.startswith("_optimizer_step"):
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def zero_grad(self):
        self.optimizer.zero_grad()

    def step(self, closure=None):
        self.optimizer.step(closure)


def test_a_wrapped_optimizer_is_the_wrapped_one():
    model, optimizer = small()
    co.Preconditioner(model, optimizer)
    expected = train(model, optimizer)
    model, optimizer = small()
    wrapped = Wrapper(Wrapper(optimizer))
    pre = co.Preconditioner(model, wrapped)
    assert all(map(torch.equal, train(model, wrapped), expected))
    assert pre.steps == 4
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    pre.remove()
    assert not optimizer._optimizer_step_pre_hooks


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


def gpt2_trainer(folder, seed, steps=STEPS, **options):
    transformers, _ = frameworks.require("transformers", "accelerate")
    transformers.set_seed(seed)
    size = dict(vocab_size=64, n_positions=32, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**size))
    options = {"save_strategy": "no", **options}
    arguments = transformers.TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=32,
        learning_rate=1e-2,
        logging_steps=10,
        seed=seed,
        report_to=[],
        use_cpu=True,
        **options,
    )
    data = [{"input_ids": ids, "labels": ids} for ids in sentences()]
    return transformers.Trainer(model, arguments, train_dataset=data)


def gpt2_loss(folder, seed, on):
    """Mean loss of the last ten steps; Hugging Face's Trainer with its own AdamW and linear decay."""
    trainer = gpt2_trainer(folder, seed)
    if on:
        pre = co.Preconditioner(trainer.model, trainer.create_optimizer())
    trainer.train()
    if on:
        assert pre.steps == STEPS
        # c_attn, c_proj, c_fc and c_proj of both blocks; the head is tied to the embedding and left alone.
        assert sum(layer.capture is not None for layer in pre.layers) == 8
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1]


def vit_loss(folder, seed, on):
    """Mean loss of the last ten steps; Lightning, AdamW."""
    lightning, transformers = frameworks.require("lightning", "transformers")

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            size = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
            config = transformers.ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=10, **size)
            self.model = transformers.ViTForImageClassification(config)
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
        assert sum(layer.capture is not None for layer in model.pre.layers) == 14
    return sum(model.losses[-10:]) / 10


def resnet_loss(folder, seed, on):
    """Mean loss of the last ten steps; a plain loop, SGD with momentum."""
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


@pytest.mark.slow
@pytest.mark.parametrize("final_loss", [gpt2_loss, vit_loss, resnet_loss])
def test_one_line_lowers_the_loss(final_loss, tmp_path):
    """GPT-2, ViT and ResNet from config, 50 steps by their own trainers: the same seeds with and without the line."""
    plain = [final_loss(str(tmp_path), seed, False) for seed in range(3)]
    corrected = [final_loss(str(tmp_path), seed, True) for seed in range(3)]
    print(final_loss.__name__, "plain", plain, "corrected", corrected)
    assert sum(corrected) < sum(plain)


@pytest.mark.slow
def test_huggingface_resumes_bit_for_bit(tmp_path):
    """A run from the Trainer's own checkpoint ends where the uninterrupted one does."""
    ends = []
    for resume in (None, str(tmp_path / "checkpoint-4")):
        trainer = gpt2_trainer(str(tmp_path), 0, steps=8, save_strategy="steps", save_steps=4)
        pre = co.Preconditioner(trainer.model, trainer.create_optimizer(), decay=0.5)
        trainer.train(resume_from_checkpoint=resume)
        assert pre.steps == 8
        ends.append([p.detach().clone() for p in trainer.model.parameters()])
    assert all(map(torch.equal, *ends))


@pytest.mark.slow
@pytest.mark.parametrize("first", ["preconditioner", "prepare"])
def test_accelerate(first):
    """The line may stand before or after `prepare`."""
    (accelerate,) = frameworks.require("accelerate")
    model, optimizer = small()
    co.Preconditioner(model, optimizer)
    expected = train(model, optimizer)

    model, optimizer = small()
    accelerator = accelerate.Accelerator(cpu=True)
    if first == "preconditioner":
        pre = co.Preconditioner(model, optimizer)
    model, optimizer = accelerator.prepare(model, optimizer)
    if first == "prepare":
        pre = co.Preconditioner(model, optimizer)
    assert all(map(torch.equal, train(model, optimizer, backward=accelerator.backward), expected))
    assert pre.steps == 4


def readme_examples():
    readme = ROOT / "README.md"
    blocks = re.findall(r"```python\n(.*?)```", readme.read_text(), re.DOTALL) if readme.exists() else []
    return [block for block in blocks if frameworks.used_by(block)]


@pytest.mark.slow
@pytest.mark.parametrize("example", readme_examples())
def test_examples_of_the_readme(example, tmp_path, monkeypatch):
    """Each runs alone, as somebody who copies it would run it."""
    frameworks.require(*frameworks.used_by(example))
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
