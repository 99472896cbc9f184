"""The official DiT in plain torch, with its names, written from Peebles & Xie (2023).

A latent may be of any shape: its positions are counted by rows and columns.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


class DiT(nn.Module):
    def __init__(
        self, shape, *, patch_size, depth, width, num_heads, classes, learn_sigma, ratio=4.0
    ):
        super().__init__()
        channels, self.height, self.width = shape
        self.patch, self.out = patch_size, channels * (1 + learn_sigma)
        self.x_embedder = nn.ModuleDict(
            {"proj": nn.Conv2d(channels, width, patch_size, patch_size)}
        )
        self.t_embedder = nn.ModuleDict({"mlp": mlp(256, width, width, nn.SiLU())})
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(classes + 1, width)})
        positions = table(self.height // patch_size, self.width // patch_size, width)
        self.pos_embed = nn.Parameter(positions[None], requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, num_heads, ratio) for _ in range(depth))
        last = nn.Linear(width, patch_size * patch_size * self.out)
        self.final_layer = nn.ModuleDict(
            {
                "linear": last,
                "adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width)),
            }
        )

    def forward(self, x, timestep, label):
        x = self.x_embedder["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed
        c = self.t_embedder["mlp"](waves(timestep, 256))
        c = c + self.y_embedder["embedding_table"](label)
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.final_layer["adaLN_modulation"](c).chunk(2, dim=1)
        x = self.final_layer["linear"](modulate(x, shift, scale))
        rows, columns, p = self.height // self.patch, self.width // self.patch, self.patch
        x = x.reshape(len(x), rows, columns, p, p, self.out).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(len(x), self.out, self.height, self.width)


class Block(nn.Module):
    def __init__(self, width, heads, ratio):
        super().__init__()
        self.attn = Attention(width, heads)
        hidden = int(width * ratio)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        b1, a1, g1, b2, a2, g2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + g1[:, None] * self.attn(modulate(x, b1, a1))
        y = self.mlp["fc1"](modulate(x, b2, a2))
        return x + g2[:, None] * self.mlp["fc2"](F.gelu(y, approximate="tanh"))


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        weight = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), -1)
        return self.proj((weight @ v).transpose(1, 2).reshape(batch, tokens, width))


def mlp(fan_in, hidden, out, activation):
    return nn.Sequential(nn.Linear(fan_in, hidden), activation, nn.Linear(hidden, out))


def modulate(x, shift, scale):
    x = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return x * (1 + scale[:, None]) + shift[:, None]


def waves(timestep, size):
    half = size // 2
    # Of float64, rounded: what torch's exp makes of float32 depends on the processor by a bit.
    exponents = -math.log(10000) * torch.arange(half, dtype=torch.float32) / half
    frequencies = torch.exp(exponents.double()).float()
    angles = timestep[:, None].float() * frequencies.to(timestep.device)
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


def table(rows, columns, width):
    """Half of the features for the column, half for the row; sines, then cosines."""
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    angles = [grid[:, axis, None] * frequencies for axis in (1, 0)]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1).float()
