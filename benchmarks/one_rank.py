"""Tokens per second of one rank against a plain PyTorch loop of the same model, step by step in turn.

    python benchmarks/one_rank.py [-o FILE]

Both train the same GPT in fp32 with AdamW (the plain loop with torch's fused one) and gradient clipping. CPU time of the process is compared, so
other work on the machine counts for neither.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from plans import make_plan  # noqa: E402
from torch import nn  # noqa: E402

from executor.data import Data  # noqa: E402
from executor.mesh import make_mesh  # noqa: E402
from executor.train import RunOptions, Trainer  # noqa: E402
from planner.model import ModelSpec, load_model, replace  # noqa: E402

BATCH, LENGTH = 4, 256


class Block(nn.Module):
    """A pre-norm transformer block as one writes it with torch.nn."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        h, f = spec.hidden_size, spec.ffn_hidden_size
        self.heads = spec.num_attention_heads
        self.norm1, self.norm2 = nn.LayerNorm(h), nn.LayerNorm(h)
        self.qkv, self.output = nn.Linear(h, 3 * h), nn.Linear(h, h)
        self.up, self.down = nn.Linear(h, f), nn.Linear(f, h)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, h = x.shape
        q, k, v = (part.view(batch, length, self.heads, -1).transpose(1, 2) for part in self.qkv(self.norm1(x)).split(h, 2))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.output(mixed.transpose(1, 2).reshape(batch, length, h))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class Plain(nn.Module):
    """The whole model, with a tied head and its loss."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(spec.vocab_size, spec.hidden_size), nn.Embedding(LENGTH, spec.hidden_size)
        self.blocks = nn.Sequential(*(Block(spec) for _ in range(spec.num_layers)))
        self.norm = nn.LayerNorm(spec.hidden_size)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        logits = F.linear(self.norm(self.blocks(x)), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-o", "--output", metavar="FILE", help="write the figures there as JSON")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    spec = replace(load_model("tiny-gpt"), num_layers=4, hidden_size=256, head_dim=32, num_attention_heads=8, num_key_value_heads=8)
    spec = replace(spec, ffn_hidden_size=1024, vocab_size=2048)
    plan = make_plan(spec, "cpu:1", micro=BATCH, m=1, sequence_length=LENGTH, precision="fp32")
    trainer = Trainer(plan, make_mesh(plan.decisions, 0), RunOptions(), torch.device("cpu"))
    data = Data(None, spec.vocab_size, LENGTH, BATCH, 0)
    model = Plain(spec)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def ours() -> None:
        trainer.load(data)
        trainer.step().loss.item()

    def plain(step: int) -> None:
        tokens, targets = (part.view(BATCH, LENGTH) for part in data.batch(step, range(BATCH), 1))
        loss = model(tokens, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    seconds: dict[str, list[float]] = {"plain": [], "ours": []}
    for step in range(options.steps + 3):
        for name, run in (("plain", lambda step=step: plain(step)), ("ours", ours)):
            started = time.process_time()
            run()
            seconds[name].append(time.process_time() - started)
    rates = {name: BATCH * LENGTH / statistics.median(values[3:]) for name, values in seconds.items()}
    figures = {"tokens_per_cpu_second": rates, "ours_over_plain": rates["ours"] / rates["plain"], "steps": options.steps}
    print(f"plain {rates['plain']:,.0f}, ours {rates['ours']:,.0f} tokens per CPU second: {figures['ours_over_plain']:.3f} of the plain loop")
    if options.output:
        Path(options.output).write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
