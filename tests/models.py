"""A zoo of small networks, each with one thing about it that a tool of this kind tends to get wrong."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

Inputs = tuple[Tensor, ...]


class TinyConv(nn.Module):
    """Convolutions with batch norm, stride, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 24, 3, stride=(2, 1), padding=1)
        self.bn2 = nn.BatchNorm2d(24)
        self.fc = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        return self.fc(functional.adaptive_avg_pool2d(x, 1).flatten(1))


class SharedResidual(nn.Module):
    """A residual net whose one block is run twice at different sizes and registered under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.again = self.block
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.block(x)
        x = functional.max_pool2d(x, 2)
        x = x + self.again(x)
        return self.head(x.mean((2, 3)))


class Conv1dNet(nn.Module):
    """A stack of one-dimensional convolutions, dilated."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv1d(4, 12, 5, padding=2)
        self.b = nn.Conv1d(12, 16, 3, padding=2, dilation=2, stride=2)
        self.out = nn.Conv1d(16, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.b(torch.tanh(self.a(x))))).mean(-1)


class Conv3dNet(nn.Module):
    """Three-dimensional convolutions, anisotropic."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv3d(2, 8, (1, 3, 3), padding=(0, 1, 1))
        self.b = nn.Conv3d(8, 12, 3, stride=(1, 2, 2), padding=1)
        self.fc = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.b(torch.relu(self.a(x)))).mean((2, 3, 4)))


class TwoInputs(nn.Module):
    """An image and a vector; returns a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3)
        self.image = nn.Linear(8, 12)
        self.vector = nn.Linear(6, 12)
        self.out = nn.Linear(24, 3)

    def forward(self, image: Tensor, vector: Tensor) -> dict[str, Tensor]:
        a = self.image(self.conv(image).mean((2, 3)))
        b = self.vector(vector)
        return {"logits": self.out(torch.cat((a, b), 1).relu()), "features": a}


class SequenceMlp(nn.Module):
    """Linear layers over (batch, time, features), and one that sees time folded into the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 32)
        self.norm = nn.LayerNorm(32)
        self.folded = nn.Linear(32, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(functional.gelu(self.up(x)))
        return self.folded(x.flatten(0, 1)).view(*x.shape[:2], -1)


class TiedAutoencoder(nn.Module):
    """Two linear layers with one weight, and a third beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.inner = nn.Linear(16, 16)
        self.decoder = nn.Linear(16, 20, bias=False)
        self.decoder.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decoder(torch.relu(self.inner(self.embed(tokens))))


class Decoder(nn.Module):
    """Transposed convolutions behind a plain one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 16, 3, padding=1)
        self.up = nn.ConvTranspose2d(16, 8, 4, stride=2, padding=1)
        self.out = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.up(torch.relu(self.conv(x)))))


class Generator(nn.Module):
    """Transposed convolutions: from one pixel, grouped, dilated, of lines and volumes; one that is told its size."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.ConvTranspose2d(12, 16, 4)
        self.twice = nn.ConvTranspose2d(16, 16, 3, stride=2, padding=1, output_padding=1, groups=2, bias=False)
        self.wide = nn.ConvTranspose2d(16, 8, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(2, 3))
        self.crop = nn.ConvTranspose2d(8, 8, 3, stride=2, padding=1)
        self.line = nn.ConvTranspose1d(8, 12, 4, stride=2, padding=1)
        self.volume = nn.ConvTranspose3d(12, 6, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.twice(torch.relu(self.start(x))))
        x = torch.relu(self.wide(x))
        x = self.crop(x, output_size=(2 * x.shape[2], 2 * x.shape[3]))
        x = self.line(x.mean(3))
        return self.volume(x[:, :, :4, None, None])


class Reparametrised(nn.Module):
    """Weight norm (both kinds) and spectral norm beside a plain layer."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(3, 12, 3, padding=1)
        self.new = nn.utils.parametrizations.weight_norm(nn.Conv2d(12, 12, 3, padding=1))
        self.old = nn.utils.weight_norm(nn.Conv2d(12, 12, 3, padding=1))
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(12, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.spectral(self.old(torch.relu(self.new(torch.relu(self.plain(x))))).mean((2, 3)))


class StandardisedConv2d(nn.Conv2d):
    """A convolution that changes its weight on the way."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class NamedConv2d(nn.Conv2d):
    """A subclass that computes what its parent does."""


class Subclasses(nn.Module):
    """A convolution subclass with its own forward, and one without."""

    def __init__(self) -> None:
        super().__init__()
        self.own = StandardisedConv2d(3, 12, 3, padding=1)
        self.same = NamedConv2d(12, 12, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.same(torch.relu(self.own(x)))


class DepthwiseSeparable(nn.Module):
    """A depthwise convolution, which no format makes smaller, and the pointwise one behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.pointwise = nn.Conv2d(16, 32, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(functional.relu6(self.depthwise(x)))


class NeverCalled(nn.Module):
    """A head that the forward pass does not use, and one whose result it throws away."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(16, 16)
        self.unused = nn.Linear(16, 16)
        self.dropped = nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        self.dropped(x)
        return x


class PaddingModes(nn.Module):
    """Grouped, dilated, strided, 'same', reflect, circular and replicate convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(8, 16, 3, padding=1, groups=2)
        self.dilated = nn.Conv2d(16, 16, 3, padding=2, dilation=2, bias=False)
        self.reflect = nn.Conv2d(16, 16, 3, padding=(1, 2), padding_mode="reflect", stride=(1, 2))
        self.circular = nn.Conv2d(16, 16, 3, padding=1, padding_mode="circular")
        self.same = nn.Conv2d(16, 16, (3, 5), padding="same")
        self.replicate = nn.Conv2d(16, 16, 3, padding=1, padding_mode="replicate", dilation=(1, 2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.grouped, self.dilated, self.reflect, self.circular, self.same, self.replicate):
            x = torch.relu(layer(x))
        return x


class Attention(nn.Module):
    """Multi-head attention, a bare parameter, and linear layers around them."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(0.1 * torch.randn(1, 6, 16))
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.position
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return x + self.down(functional.gelu(self.up(x)))


ZOO: dict[str, tuple[Callable[[], nn.Module], Callable[[], Inputs]]] = {
    "tiny_conv": (TinyConv, lambda: (torch.randn(4, 3, 12, 10),)),
    "shared_residual": (SharedResidual, lambda: (torch.randn(2, 3, 8, 8),)),
    "conv1d": (Conv1dNet, lambda: (torch.randn(3, 4, 20),)),
    "conv3d": (Conv3dNet, lambda: (torch.randn(2, 2, 4, 8, 6),)),
    "two_inputs": (TwoInputs, lambda: (torch.randn(3, 1, 9, 9), torch.randn(3, 6))),
    "sequence": (SequenceMlp, lambda: (torch.randn(2, 7, 12),)),
    "tied": (TiedAutoencoder, lambda: (torch.randint(0, 20, (2, 5)),)),
    "decoder": (Decoder, lambda: (torch.randn(2, 4, 6, 6),)),
    "generator": (Generator, lambda: (torch.randn(2, 12, 1, 1),)),
    "reparametrised": (Reparametrised, lambda: (torch.randn(2, 3, 6, 6),)),
    "subclasses": (Subclasses, lambda: (torch.randn(2, 3, 6, 6),)),
    "depthwise": (DepthwiseSeparable, lambda: (torch.randn(2, 16, 6, 6),)),
    "never_called": (NeverCalled, lambda: (torch.randn(3, 16),)),
    "padding_modes": (PaddingModes, lambda: (torch.randn(2, 8, 11, 10),)),
    "attention": (Attention, lambda: (torch.randn(2, 6, 16),)),
}


def make(name: str, seed: int = 0) -> tuple[nn.Module, Inputs]:
    """Return a network of the zoo in eval mode, with batch-norm statistics of its own, and a batch of inputs."""
    factory, inputs = ZOO[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = factory()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 2)
        return model.eval(), inputs()


def output(model: nn.Module, inputs: Inputs) -> Tensor:
    """Return what a model gives as one flat tensor."""
    with torch.no_grad():
        result = model(*inputs)
    parts = list(result.values()) if isinstance(result, dict) else [result]
    return torch.cat([part.flatten() for part in parts])
