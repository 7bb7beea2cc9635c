"""Models in the shapes people run, with random weights: Llama-2-13B inference and training, ResNet-50 training, inference
of a UNet in the shape of Stable Diffusion's.

One line a step to --out: number, SHA-256 of the step's result, monotonic time in ns. The file is opened and closed for
each line: a checkpointed program must not hold a file whose length changes behind its back.
"""
import argparse
import hashlib
import os
import time

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

parser = argparse.ArgumentParser()
parser.add_argument("--model", choices=["llama13b-infer", "llama13b-train", "resnet-train", "unet-infer"], required=True)
parser.add_argument("--layers", type=int, default=0, help="decoder layers; 0: 40 for inference, 18 for training")
parser.add_argument("--steps", type=int, default=0, help="stop after so many; 0: go on until --stop exists")
parser.add_argument("--out", required=True)
parser.add_argument("--stop", default="", help="end when this file exists")
parser.add_argument("--idle", default="", help="wait as long as this file exists")
args = parser.parse_args()

torch.use_deterministic_algorithms(True)
torch.backends.cudnn.deterministic = True
torch.backends.cudnn.benchmark = False
device = torch.device("cuda")
torch.manual_seed(1)
WIDTH, HEADS, HIDDEN, WORDS = 5120, 40, 13824, 32000  # Llama-2-13B


def norm(x):
    return F.rms_norm(x, (x.shape[-1],))


class Decoder:
    """A decoder layer. The attention is written out: its backward pass is deterministic that way."""

    def __init__(self, dtype):
        def weight(rows, columns):
            return torch.randn(rows, columns, device=device, dtype=dtype).mul_(columns**-0.5)

        self.qkv, self.o = weight(3 * WIDTH, WIDTH), weight(WIDTH, WIDTH)
        self.gate, self.up, self.down = weight(HIDDEN, WIDTH), weight(HIDDEN, WIDTH), weight(WIDTH, HIDDEN)
        self.weights = [self.qkv, self.o, self.gate, self.up, self.down]

    def __call__(self, x, cache=None, at=0):
        batch, length, _ = x.shape
        q, k, v = (norm(x) @ self.qkv.T).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        if cache is not None:
            cache[0][:, :, at : at + length], cache[1][:, :, at : at + length] = k, v
            k, v = cache
        scores = (q @ k.transpose(-1, -2)) * (WIDTH // HEADS) ** -0.5
        x = x + (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, WIDTH) @ self.o.T
        y = norm(x)
        return x + (F.silu(y @ self.gate.T) * (y @ self.up.T)) @ self.down.T


def llama_infer():
    batch, context = 4, 512
    layers = [Decoder(torch.bfloat16) for _ in range(args.layers or 40)]
    words = torch.randn(WORDS, WIDTH, device=device, dtype=torch.bfloat16) * 0.02
    caches = [torch.zeros(2, batch, HEADS, context, WIDTH // HEADS, device=device, dtype=torch.bfloat16) for _ in layers]
    token = torch.arange(batch, device=device)

    @torch.no_grad()
    def step(number):
        nonlocal token
        x = words[token].view(batch, 1, WIDTH)
        for layer, cache in zip(layers, caches):
            x = layer(x, cache, number % context)
        logits = norm(x)[:, 0] @ words.T
        token = logits.argmax(-1)
        return torch.cat([logits.float().view(-1)[::97], token.float()])

    return step


def llama_train():
    batch, length, rate = 2, 256, 1e-4
    layers = [Decoder(torch.bfloat16) for _ in range(args.layers or 18)]
    words = torch.randn(WORDS, WIDTH, device=device, dtype=torch.bfloat16) * 0.02
    head = torch.randn(WORDS, WIDTH, device=device, dtype=torch.bfloat16) * 0.02
    weights = [w.requires_grad_() for layer in layers for w in layer.weights] + [words.requires_grad_(), head.requires_grad_()]
    # Adam with its moments in single precision, one weight after the other.
    moments = [(torch.zeros_like(w, dtype=torch.float32), torch.zeros_like(w, dtype=torch.float32)) for w in weights]
    for w in weights:
        w.grad = torch.zeros_like(w)

    def step(number):
        data = (torch.arange(batch * (length + 1), device=device) * 7919 + number * 104729) % WORDS
        data = data.view(batch, length + 1)
        x = F.one_hot(data[:, :-1], WORDS).to(torch.bfloat16) @ words  # an embedding whose backward pass is a matrix product
        for layer in layers:
            x = layer(x)
        loss = F.cross_entropy((norm(x) @ head.T).float().view(-1, WORDS), data[:, 1:].reshape(-1))
        loss.backward()
        with torch.no_grad():
            for w, (m, v) in zip(weights, moments):
                m.lerp_(w.grad.float(), 0.1)
                v.mul_(0.95).addcmul_(w.grad.float(), w.grad.float(), value=0.05)
                w.sub_((rate * m / (v.sqrt() + 1e-8)).to(w.dtype))
                w.grad.zero_()
        return torch.cat([loss.detach().view(1), weights[number % len(weights)].detach().view(-1)[:1024].float()])

    return step


def resnet_train():
    import torchvision

    model = torchvision.models.resnet50(num_classes=1000).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    images = torch.randn(64, 3, 224, 224, device=device)
    labels = torch.arange(64, device=device)

    def step(number):
        optimizer.zero_grad(set_to_none=False)
        loss = F.cross_entropy(model(images.roll(number, 0)), labels)
        loss.backward()
        optimizer.step()
        return torch.cat([loss.detach().view(1), model.fc.weight.detach().view(-1)[::997]])

    return step


class Block(nn.Module):
    """Two convolutions and, where `attend`, attention over the positions."""

    def __init__(self, inner, outer, attend):
        super().__init__()
        self.first, self.second = nn.Conv2d(inner, outer, 3, padding=1), nn.Conv2d(outer, outer, 3, padding=1)
        self.norms = nn.ModuleList([nn.GroupNorm(32, inner), nn.GroupNorm(32, outer), nn.GroupNorm(32, outer)])
        self.skip = nn.Conv2d(inner, outer, 1)
        self.qkv, self.o = (nn.Conv2d(outer, 3 * outer, 1), nn.Conv2d(outer, outer, 1)) if attend else (None, None)

    def forward(self, x):
        y = self.second(F.silu(self.norms[1](self.first(F.silu(self.norms[0](x))))))
        y = y + self.skip(x)
        if self.qkv is not None:
            q, k, v = self.qkv(self.norms[2](y)).flatten(2).transpose(1, 2).chunk(3, -1)
            split = lambda t: t.view(t.shape[0], t.shape[1], 8, -1).transpose(1, 2)  # noqa: E731
            z = F.scaled_dot_product_attention(split(q), split(k), split(v)).transpose(1, 2).flatten(2)
            y = y + self.o(z.transpose(1, 2).reshape(y.shape))
        return y


def unet_infer():
    widths = [320, 640, 1280, 1280]
    inner = [320] + widths[:-1]
    down = nn.ModuleList([Block(a, b, n < 3) for n, (a, b) in enumerate(zip(inner, widths))])
    middle = Block(1280, 1280, True)
    up = nn.ModuleList([Block(2 * b, a, n < 3) for n, (a, b) in enumerate(zip(inner, widths))][::-1])
    ends = nn.ModuleList([nn.Conv2d(4, 320, 3, padding=1), nn.Conv2d(320, 4, 3, padding=1)])
    model = nn.ModuleList([down, middle, up, ends]).to(device, torch.bfloat16).eval()
    latent = torch.randn(4, 4, 64, 64, device=device, dtype=torch.bfloat16)

    @torch.no_grad()
    def step(number):
        nonlocal latent
        x, skips = model[3][0](latent), []
        for block in model[0]:
            x = block(x)
            skips.append(x)
            x = F.avg_pool2d(x, 2)
        x = model[1](x)
        for block in model[2]:
            x = block(torch.cat([x.repeat_interleave(2, 2).repeat_interleave(2, 3), skips.pop()], 1))
        latent = F.group_norm(latent + 0.1 * model[3][1](x), 1)
        return latent.float().view(-1)[::13]

    return step


advance = {"llama13b-infer": llama_infer, "llama13b-train": llama_train, "resnet-train": resnet_train, "unet-infer": unet_infer}[args.model]()
step = 0
while (args.steps == 0 or step < args.steps) and not (args.stop and os.path.exists(args.stop)):
    while args.idle and os.path.exists(args.idle):
        time.sleep(0.02)
    digest = hashlib.sha256(advance(step).cpu().numpy().tobytes()).hexdigest()[:16]
    with open(args.out, "a") as out:
        out.write(f"{step} {digest} {time.monotonic_ns()}\n")
    step += 1
