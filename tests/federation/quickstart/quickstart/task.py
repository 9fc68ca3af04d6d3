"""Model, pictures, training and test."""

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.models import VisionTransformer


def net():
    """A small ViT for pictures of 32 × 32."""
    torch.manual_seed(7)  # every side starts with the same
    model = VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=10
    )
    nn.init.normal_(model.heads.head.weight, std=0.1)
    return model


class Pictures(Dataset):
    """Pictures with labels, one dictionary each; the first client is new and holds one."""

    def __init__(self, partition, seed):
        draw = torch.Generator().manual_seed(100 * seed + partition)
        count = 1 if partition == 0 else 8
        self.images = torch.rand(count, 3, 32, 32, generator=draw).mul(255).round().div(255)
        self.labels = torch.randint(10, (count,), generator=draw)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return {"img": (self.images[i] - 0.5) / 0.5, "label": self.labels[i]}


def load_data(partition, batch_size):
    train = DataLoader(Pictures(partition, 1), batch_size=batch_size, shuffle=True)
    return train, DataLoader(Pictures(partition, 2), batch_size=batch_size)


def train(model, loader, epochs, lr):
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    model.train()
    total = 0.0
    for _ in range(epochs):
        for batch in loader:
            optimizer.zero_grad()
            loss = criterion(model(batch["img"]), batch["label"])
            loss.backward()
            optimizer.step()
            total += loss.item()
    return total / (epochs * len(loader))


def test(model, loader):
    criterion = nn.CrossEntropyLoss()
    model.eval()
    loss, right = 0.0, 0
    with torch.no_grad():
        for batch in loader:
            logits = model(batch["img"])
            loss += criterion(logits, batch["label"]).item()
            right += int((logits.argmax(1) == batch["label"]).sum())
    return loss / len(loader), right / len(loader.dataset)
