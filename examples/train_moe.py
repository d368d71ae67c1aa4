"""A small language model of experts (2 of 8 a token) that learns real text, with the load of each expert printed.

    make demo-moe                                # installs what it needs, then runs this
    python examples/train_moe.py --device cuda --dtype bfloat16 --steps 1000
    python examples/train_moe.py --compare       # the same training with the reference loop over experts, side by side

The text is Python's own reference manual, which every Python carries (pydoc_data.topics, half a million characters), read as bytes.
Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import fastattn
from fastattn import reference
from fastattn.nn.moe import Experts

NUM_EXPERTS, TOP_K = 8, 2
VOCAB_SIZE = 256  # bytes
PROMPT = "The import statement "


class Layer(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.attention_norm, self.moe_norm = fastattn.nn.RMSNorm(hidden_size), fastattn.nn.RMSNorm(hidden_size)
        self.attention = fastattn.nn.Attention(hidden_size, num_heads)
        self.moe = fastattn.nn.MoE.mixtral(hidden_size, hidden_size, NUM_EXPERTS, TOP_K)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, fastattn.nn.MoEAux]:
        x = x + self.attention(self.attention_norm(x), cos=cos, sin=sin)
        out, aux = self.moe(self.moe_norm(x))
        return x + out, aux


class Model(nn.Module):
    """Tokens (B, S) → hidden states (B, S, H), and what each layer's router did."""

    def __init__(self, hidden_size: int = 128, num_heads: int = 4, num_layers: int = 2, max_seqlen: int = 256) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB_SIZE, hidden_size)
        self.rotary = fastattn.nn.RotaryEmbedding(hidden_size // num_heads, max_seqlen=max_seqlen)
        self.layers = nn.ModuleList(Layer(hidden_size, num_heads) for _ in range(num_layers))
        self.norm = fastattn.nn.RMSNorm(hidden_size)
        nn.init.normal_(self.embedding.weight, std=hidden_size**-0.5)  # logits of the order of 1: the head is the embedding

    def forward(self, tokens: Tensor) -> tuple[Tensor, list[fastattn.nn.MoEAux]]:
        x, auxes = self.embedding(tokens), []
        cos, sin = self.rotary.cos[: tokens.shape[1]], self.rotary.sin[: tokens.shape[1]]
        for layer in self.layers:
            x, aux = layer(x, cos, sin)
            auxes.append(aux)
        return self.norm(x), auxes


class ReferenceExperts(Experts):
    """The experts as a naive loop over them."""

    def forward(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return reference.moe(x, top_k_index, top_k_weights, self.gate_up_proj, self.down_proj, **self.options)


def text() -> Tensor:
    """The manual's bytes, (N,) int64."""
    from pydoc_data.topics import topics

    return torch.tensor(list("\n\n".join(topics[name] for name in sorted(topics)).encode()), dtype=torch.int64)


def make(seed: int, device: str, dtype: torch.dtype, experts: type[Experts] = Experts) -> Model:
    torch.manual_seed(seed)
    model = Model().to(device, dtype)
    for module in model.modules():
        if isinstance(module, Experts):
            module.__class__ = experts
    return model


def train(model: Model, steps: int, batch: int = 8, seqlen: int = 128, lr: float = 3e-3) -> Iterator[tuple[float, list[Tensor]]]:
    """Each step's loss, in nats a byte, and the share of slots that each layer's experts had."""
    data, device = text(), model.embedding.weight.device
    draw = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=max(steps, 2))
    for _ in range(steps):
        starts = torch.randint(len(data) - seqlen, (batch, 1), generator=draw)
        tokens = data[starts + torch.arange(seqlen + 1)].to(device)
        hidden, auxes = model(tokens[:, :-1])
        loss = fastattn.linear_cross_entropy(hidden, model.embedding.weight, tokens[:, 1:])
        balance = torch.stack([aux.load_balancing_loss for aux in auxes]).mean()
        (loss + 0.01 * balance).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield loss.item(), [aux.expert_counts / aux.expert_counts.sum() for aux in auxes]


@torch.no_grad()
def write(model: Model, prompt: str, length: int, temperature: float = 0.7) -> str:
    """The prompt, continued by `length` bytes."""
    tokens = torch.tensor([list(prompt.encode())], device=model.embedding.weight.device)
    for _ in range(length):
        hidden, _ = model(tokens[:, -128:])
        logits = hidden[:, -1] @ model.embedding.weight.T
        tokens = torch.cat([tokens, fastattn.sample(logits, temperature=temperature)[:, None]], 1)
    return bytes(tokens[0].tolist()).decode(errors="replace")


def describe(shares: list[Tensor]) -> str:
    return "\n".join(f"    layer {i}: " + " ".join(f"{100 * share:5.1f}%" for share in layer.tolist()) for i, layer in enumerate(shares))


def run(model: Model, steps: int) -> None:
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters / 1e6:.1f} M parameters, {NUM_EXPERTS} experts, {TOP_K} a token; loss in nats a byte, load of each expert")
    start = time.perf_counter()
    for step, (loss, shares) in enumerate(train(model, steps), 1):
        if step in (1, steps) or step % 50 == 0:
            print(f"step {step:4d}  loss {loss:.3f}  {1024 * step / (time.perf_counter() - start):,.0f} tokens/s\n{describe(shares)}")
    print(write(model, PROMPT, 200))


def compare(steps: int, device: str) -> float:
    """Print the losses of three trainings: by fastattn, by the reference loop, by the loop from weights that are one rounding off. Returns
    how far the first two are apart, over what the last two are (at least a rounding of a loss)."""
    models = [make(0, device, torch.float32, experts) for experts in (Experts, ReferenceExperts, ReferenceExperts)]
    with torch.no_grad():
        for p in models[2].parameters():
            p.copy_(torch.nextafter(p, torch.full_like(p, torch.inf)))
    losses = torch.tensor([[loss for loss, _ in train(model, steps)] for model in models])
    print("step   fastattn  reference  reference, weights one rounding off")
    for step in sorted({0, *range(49, steps, 50), steps - 1}):
        print(f"{step + 1:4d}  " + "  ".join(f"{loss:9.5f}" for loss in losses[:, step].tolist()))
    ours, noise = (losses[0] - losses[1]).abs().max().item(), (losses[1] - losses[2]).abs().max().item()
    print(f"largest difference: {ours:.1e} from the reference, whose own from one rounding of its weights is {noise:.1e}")
    return ours / max(noise, torch.finfo(torch.float32).eps * losses.max().item())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--compare", action="store_true", help="train with the reference loop too, and compare the losses")
    options = parser.parse_args()
    if options.steps < 1:
        parser.error("--steps must be 1 or more")
    if options.compare:
        compare(options.steps, options.device)
    else:
        run(make(0, options.device, getattr(torch, options.dtype)), options.steps)


if __name__ == "__main__":
    main()
