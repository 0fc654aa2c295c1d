"""Trains a small Falcon Mamba from scratch on one GPU and writes it as a Hugging Face checkpoint folder.

    python scripts/train/train.py --texts DIR --tokenizer DIR --held-out FILE -o OUT_DIR [--minutes 6]

The model is FalconMambaForCausalLM of transformers: bf16 weights, two eps, norms on dt, B and C. Its rows are multiples
of 256, as in the 7B, so that K types never fall back. `--texts` holds UTF-8 files (texts.py makes them), `--tokenizer`
a folder with tokenizer.json, which is copied. Every text is read in windows of `--ctx` tokens that start anywhere.

Only torch, numpy, safetensors and tokenizers are needed: the selective scan is plain torch, exact, in two levels.
The learning rate follows the clock, so that the run ends when `--minutes` are over. The end of each text, `--watch` of
it, is not trained on; its loss is measured every hundredth step, and the weights with the least of it are kept, so that
a run which is too long for the text does no harm. `log.json` has these losses and the perplexity of the held-out text,
by which nothing was chosen.
"""

import argparse
import contextlib
import json
import math
import pathlib
import shutil
import time

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn
from torch.utils.checkpoint import checkpoint

EPS, MIXER_EPS = 1e-5, 1e-6
D_STATE, D_CONV, DT_RANK = 16, 4, 256
SHARD_BYTES = 15_900_000
RUN = 16  # steps of a scan that go one after the other everywhere at once


def scan(a: torch.Tensor, b: torch.Tensor, run: int) -> torch.Tensor:
    """h[t] = a[t] h[t-1] + b[t] along dim 1, from h = 0: all runs of `run` steps at once, then from run to run."""
    n, t = a.shape[:2]
    a, b = (x.reshape(n, t // run, run, *x.shape[2:]) for x in (a, b))
    h, decay = torch.empty_like(b), torch.empty_like(a)
    h[:, :, 0], decay[:, :, 0] = b[:, :, 0], a[:, :, 0]
    for i in range(1, run):
        torch.addcmul(b[:, :, i], a[:, :, i], h[:, :, i - 1], out=h[:, :, i])
        torch.mul(decay[:, :, i - 1], a[:, :, i], out=decay[:, :, i])
    for j in range(1, t // run):
        h[:, j].addcmul_(decay[:, j], h[:, j - 1, -1:])
    return h.reshape(n, t, *h.shape[3:])


class Scan(torch.autograd.Function):
    """`scan` with its gradient, which is a scan in the other direction."""

    @staticmethod
    def forward(ctx, a, b, run):
        h = scan(a, b, run)
        ctx.save_for_backward(a, h)
        ctx.run = run
        return h

    @staticmethod
    def backward(ctx, grad):
        a, h = ctx.saved_tensors
        later = torch.cat([a[:, 1:], torch.zeros_like(a[:, :1])], 1)
        g = scan(later.flip(1), grad.flip(1), ctx.run).flip(1)
        before = torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], 1)
        return g * before, g, None


def rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


class Norm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms(x, EPS) * self.weight


class Mixer(nn.Module):
    def __init__(self, d_model: int, n_layer: int):
        super().__init__()
        d_inner = 2 * d_model
        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=False)
        self.conv1d = nn.Conv1d(d_inner, d_inner, D_CONV, groups=d_inner, padding=D_CONV - 1)
        self.x_proj = nn.Linear(d_inner, DT_RANK + 2 * D_STATE, bias=False)
        self.dt_proj = nn.Linear(DT_RANK, d_inner)
        self.A_log = nn.Parameter(torch.arange(1.0, D_STATE + 1).log().repeat(d_inner, 1))
        self.D = nn.Parameter(torch.ones(d_inner))
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)
        dt = torch.exp(torch.empty(d_inner).uniform_(math.log(1e-3), math.log(0.1)))
        with torch.no_grad():
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # its softplus is dt
            self.dt_proj.weight.uniform_(-(DT_RANK**-0.5), DT_RANK**-0.5)
            self.out_proj.weight.div_(math.sqrt(n_layer))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        t = x.shape[1]
        u, z = self.in_proj(x).chunk(2, -1)
        u = F.silu(self.conv1d(u.transpose(1, 2))[..., :t].transpose(1, 2))
        dt, b, c = (rms(v, MIXER_EPS) for v in self.x_proj(u).split([DT_RANK, D_STATE, D_STATE], -1))
        dt = F.softplus(F.linear(dt, self.dt_proj.weight).float() + self.dt_proj.bias.float())
        with torch.autocast(x.device.type, enabled=False):
            u = u.float()
            a = torch.exp(dt.unsqueeze(-1) * -torch.exp(self.A_log.float()))
            h = Scan.apply(a, (dt * u).unsqueeze(-1) * b.unsqueeze(2), RUN if t % RUN == 0 else 1)
            y = torch.einsum("btdn,btn->btd", h, c) + self.D * u
        return self.out_proj(y * F.silu(z.float()))


class Layer(nn.Module):
    def __init__(self, d_model: int, n_layer: int, dropout: float):
        super().__init__()
        self.norm = Norm(d_model)
        self.mixer = Mixer(d_model, n_layer)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dropout(self.mixer(self.norm(x)).float())


class Model(nn.Module):
    """The names of the parameters are those of the checkpoint, less the leading `backbone.`."""

    def __init__(self, vocab: int, d_model: int, n_layer: int, dropout: float):
        super().__init__()
        self.embeddings = nn.Embedding(vocab, d_model)
        self.layers = nn.ModuleList(Layer(d_model, n_layer, dropout) for _ in range(n_layer))
        self.norm_f = Norm(d_model)
        self.lm_head = nn.Linear(d_model, vocab, bias=False)
        nn.init.normal_(self.embeddings.weight, std=0.02)
        nn.init.normal_(self.lm_head.weight, std=d_model**-0.5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embeddings(ids).float()
        for layer in self.layers:
            # What a layer computed is computed again for the gradient: the states are 16 times its input.
            x = checkpoint(layer, x, use_reentrant=False) if torch.is_grad_enabled() else layer(x)
        return self.lm_head(self.norm_f(x)).float()


def loss_of(model: Model, ids: torch.Tensor) -> torch.Tensor:
    logits = model(ids[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def perplexity(model: Model, ids: np.ndarray, ctx: int, device: str, autocast) -> float:
    """Windows of `ctx` tokens, scored on their second half."""
    model.eval()
    windows = torch.from_numpy(ids[: len(ids) // ctx * ctx].reshape(-1, ctx))
    total = count = 0
    with torch.no_grad(), autocast():
        for w in windows.split(16):
            w = w.to(device)
            logits = model(w)[:, ctx // 2 : -1]
            total += F.cross_entropy(logits.flatten(0, 1), w[:, ctx // 2 + 1 :].flatten(), reduction="sum").item()
            count += logits.shape[0] * logits.shape[1]
    model.train()
    return math.exp(total / count)


def save(model: Model, args, out: pathlib.Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    shards, bytes_left = [], 0
    for name, p in model.state_dict().items():
        name = name if name.startswith("lm_head") else f"backbone.{name}"
        tensor = p.to(torch.bfloat16).cpu().contiguous()
        if bytes_left < tensor.nbytes:
            shards.append({})
            bytes_left = SHARD_BYTES
        shards[-1][name] = tensor
        bytes_left -= tensor.nbytes
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for file, shard in zip(files, shards):
        save_file(shard, out / file, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": sum(t.nbytes for s in shards for t in s.values())},
        "weight_map": {name: file for file, shard in zip(files, shards) for name in shard},
    }
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    config = dict(
        architectures=["FalconMambaForCausalLM"], model_type="falcon_mamba", torch_dtype="bfloat16",
        hidden_size=args.d_model, intermediate_size=2 * args.d_model, num_hidden_layers=args.n_layer,
        state_size=D_STATE, conv_kernel=D_CONV, time_step_rank=DT_RANK, vocab_size=model.embeddings.num_embeddings,
        expand=2, hidden_act="silu", layer_norm_epsilon=EPS, mixer_rms_eps=MIXER_EPS, residual_in_fp32=True,
        use_bias=False, use_conv_bias=True, tie_word_embeddings=False, bos_token_id=11, eos_token_id=11,
        pad_token_id=11,
    )  # fmt: skip
    (out / "config.json").write_text(json.dumps(config, indent=1))
    shutil.copy(args.tokenizer / "tokenizer.json", out / "tokenizer.json")


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--texts", type=pathlib.Path, required=True)
    p.add_argument("--tokenizer", type=pathlib.Path, required=True)
    p.add_argument("--held-out", type=pathlib.Path, required=True)
    p.add_argument("-o", "--out", type=pathlib.Path, required=True)
    p.add_argument("--minutes", type=float, default=6.0, help="of training, the rest comes on top")
    p.add_argument("--d-model", type=int, default=512)
    p.add_argument("--n-layer", type=int, default=10)
    p.add_argument("--ctx", type=int, default=512)
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--lr", type=float, default=1.5e-3)
    p.add_argument("--dropout", type=float, default=0.1)
    p.add_argument("--watch", type=float, default=0.03, help="share of each text that is kept for watching the loss")
    p.add_argument("--steps", type=int, default=1 << 30, help="at most, for a trial")
    return p.parse_args()


def main() -> None:
    args = arguments()
    torch.manual_seed(1)
    rng = np.random.default_rng(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    tokenizer = Tokenizer.from_file(str(args.tokenizer / "tokenizer.json"))
    encode = lambda text: np.array(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)
    texts = [encode(path.read_text()) for path in sorted(args.texts.glob("*.txt"))]
    ends = [len(text) - int(args.watch * len(text)) for text in texts]
    ids = np.concatenate([text[:end] for text, end in zip(texts, ends)])
    watched = np.concatenate([text[end:] for text, end in zip(texts, ends)])
    held_out = encode(args.held_out.read_bytes().decode(errors="ignore"))
    model = Model(tokenizer.get_vocab_size(), args.d_model, args.n_layer, args.dropout).to(device)
    n_params = sum(p.numel() for p in model.parameters())
    print(f"{len(ids)} tokens, {n_params} parameters, on {device}", flush=True)

    autocast = (lambda: torch.autocast("cuda", torch.bfloat16)) if device == "cuda" else contextlib.nullcontext
    matrices = [p for p in model.parameters() if p.dim() == 2 and p.shape[1] != D_STATE]
    others = [p for p in model.parameters() if p.dim() != 2 or p.shape[1] == D_STATE]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=device == "cuda")
    log, start, step = [], time.monotonic(), 0
    least, best = math.inf, None

    def watch() -> None:
        nonlocal least, best
        ppl = perplexity(model, watched, args.ctx, device, autocast)
        log.append({"step": step, "seconds": round(time.monotonic() - start, 1), "loss": round(loss.item(), 4),
                    "watched_perplexity": round(ppl, 3)})  # fmt: skip
        print(log[-1], flush=True)
        if ppl < least:
            least, best = ppl, {name: p.detach().clone() for name, p in model.state_dict().items()}

    while (done := (time.monotonic() - start) / (60 * args.minutes)) < 1 and step < args.steps:
        lr = args.lr * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        at = rng.integers(0, len(ids) - args.ctx - 1, args.batch)
        batch = torch.from_numpy(np.stack([ids[i : i + args.ctx + 1] for i in at])).to(device)
        with autocast():
            loss = loss_of(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 100 == 0:
            watch()
    watch()
    print(f"{step} steps, {step * args.batch * args.ctx / len(ids):.2f} times the text", flush=True)
    model.load_state_dict(best)
    with torch.no_grad():  # what is measured is what is saved
        for p in model.parameters():
            p.copy_(p.to(torch.bfloat16))
    save(model, args, args.out)
    ppl = perplexity(model, held_out, args.ctx, device, contextlib.nullcontext)
    summary = {"parameters": n_params, "tokens": len(ids), "steps": step, "held_out_perplexity": ppl, "log": log}
    (args.out / "log.json").write_text(json.dumps(summary, indent=1))
    print(f"held-out perplexity {ppl:.3f}", flush=True)


if __name__ == "__main__":
    main()
