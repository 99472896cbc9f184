"""The official DiT in torch with fused attention, its optimizer and average.

As a script, `python benchmarks/torch_dit.py`, PyTorch's side of `make bench-accelerator` on a GPU:
the training step of DiT in bfloat16 (autocast), compiled by `torch.compile`.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "parity"))
import official_dit

SIZES = {
    "dit_xl_2": dict(depth=28, width=1152, num_heads=16),
    "dit_b_2": dict(depth=12, width=768, num_heads=12),
    "dit_s_2": dict(depth=12, width=384, num_heads=6),
}


def fused_attention(self, x):
    batch, tokens, width = x.shape
    qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(q, k, v)
    return self.proj(y.transpose(1, 2).reshape(batch, tokens, width))


official_dit.Attention.forward = fused_attention


class Trainer:
    """AdamW and the average of one network."""

    def __init__(self, model):
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.average = [p.detach().clone() for p in self.params]
        self.optimizer = torch.optim.AdamW(self.params, lr=1e-4, weight_decay=0.0, fused=True)

    def step(self):
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(self.average, [p.detach() for p in self.params], 1e-3)


def make(name):
    sizes = dict(patch_size=2, classes=1000, learn_sigma=True, **SIZES[name])
    return official_dit.DiT((4, 32, 32), **sizes).cuda()


def training_step(name, batch):
    model = make(name)
    trainer, apply = Trainer(model), torch.compile(model)
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0).cuda()
    x0 = torch.randn(batch, 4, 32, 32, device="cuda")
    labels = torch.zeros(batch, dtype=torch.long, device="cuda")

    def run():
        t = torch.randint(0, 1000, (batch,), device="cuda")
        y = torch.where(torch.rand(batch, device="cuda") < 0.1, 1000, labels)
        eps, a = torch.randn_like(x0), alpha_bar[t][:, None, None, None]
        with torch.autocast("cuda", torch.bfloat16):
            out = apply(a.sqrt() * x0 + (1 - a).sqrt() * eps, t, y)
        F.mse_loss(out[:, :4].float(), eps).backward()
        trainer.step()

    return run


def seconds(run, budget):
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    times = []
    while sum(times) < budget or len(times) < 3:
        begin = time.perf_counter()
        for _ in range(5):
            run()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) / 5)
    return statistics.median(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each case")
    parser.add_argument("--models", nargs="+", default=["dit_xl_2", "dit_b_2"])
    parser.add_argument("--batch", type=int, default=256)
    args = parser.parse_args()
    # Products of what autocast leaves in float32 go through TF32, as JAX's do by default.
    torch.backends.cuda.matmul.allow_tf32 = True
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for name in args.models:
        taken = seconds(training_step(name, args.batch), args.seconds)
        peak = torch.cuda.max_memory_allocated() / 2**30
        print(
            f"| {name} | {args.batch} | torch, training | {1e3 * taken:.1f} "
            f"| {args.batch / taken:.0f} | | | {peak:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
