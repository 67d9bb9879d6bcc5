"""M2 in Pyro: two contestants of ``semi.py``, under a Python of their own, with PyTorch.

    /path/to/python experiments/benchmarks/semi_pyro.py --num-steps 100

It prints the seconds of one step, after ``WARM_UP`` steps that do not count. It has the sizes, the
number of images, the batches and the Adam of ``semi.py``. The images stay in memory. Every epoch
has a new order, and every step binarises its images anew. No image has a label. The sum over labels
is Pyro's: the guide's label is enumerated in parallel.

By default the program is like Pyro's own example. The encoder sees an image and a label side by
side, the decoder gives probabilities, and Pyro checks all values. ``--same-arithmetic`` does what
``models/semi_supervised.py`` does. The image's part of the encoder's first layer is computed once
for all labels, and the decoder gives logits. Pyro's checks are off then.
"""

import argparse
import time

import pyro  # pyright: ignore[reportMissingImports]
import pyro.distributions as dist  # pyright: ignore[reportMissingImports]
import torch  # pyright: ignore[reportMissingImports]
from pyro.infer import SVI, TraceEnum_ELBO  # pyright: ignore[reportMissingImports]
from pyro.optim import Adam  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]
from torch.nn.functional import one_hot, softplus  # pyright: ignore[reportMissingImports]

NUM_PIXELS, NUM_CLASSES = 784, 10
WARM_UP = 3


class Encoder(nn.Module):
    """From x and a one-hot label to the mean and the deviation of z.

    Args:
        hidden: units of the hidden layer.
        num_latents: the dimensions of z.
        shares: whether the image's part of the first layer is computed once for all labels.
    """

    def __init__(self, hidden: int, num_latents: int, shares: bool):
        super().__init__()
        self.shares = shares
        self.of_image = nn.Linear(NUM_PIXELS + (0 if shares else NUM_CLASSES), hidden)
        self.of_label = nn.Linear(NUM_CLASSES, hidden, bias=False) if shares else None
        self.last = nn.Linear(hidden, 2 * num_latents)

    def forward(self, x, label):
        """Mean and deviation."""
        if self.of_label is None:
            h = self.of_image(beside(x, label))
        else:
            h = self.of_image(x) + self.of_label(label)
        loc, raw = self.last(softplus(h)).chunk(2, -1)
        return loc, softplus(raw) + 1e-4


class M2(nn.Module):
    """The networks, and the two programs that use them.

    Args:
        hidden: units of the one hidden layer of each network.
        num_latents: the dimensions of z.
        shares: as in ``Encoder``. Then the decoder gives logits too, and else probabilities.
    """

    def __init__(self, hidden: int, num_latents: int, shares: bool):
        super().__init__()
        self.num_latents, self.shares = num_latents, shares
        self.classifier = mlp(NUM_PIXELS, hidden, NUM_CLASSES)
        self.encoder = Encoder(hidden, num_latents, shares)
        self.decoder = mlp(num_latents + NUM_CLASSES, hidden, NUM_PIXELS)

    def model(self, x):
        """The program p(x, y, z)."""
        pyro.module("m2", self)
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(logits=x.new_zeros(NUM_CLASSES)))
            prior = dist.Normal(x.new_zeros(self.num_latents), 1.0).to_event(1)
            z = pyro.sample("z", prior)
            logits = self.decoder(beside(z, one_hot(y, NUM_CLASSES).to(x)))
            if self.shares:
                pixels = dist.Bernoulli(logits=logits)
            else:
                pixels = dist.Bernoulli(logits.sigmoid().clamp(1e-6, 1 - 1e-6))
            pyro.sample("x", pixels.to_event(1), obs=x)

    def guide(self, x):
        """The program q(y | x) q(z | x, y)."""
        pyro.module("m2", self)
        with pyro.plate("data", len(x)):
            q = dist.Categorical(logits=self.classifier(x))
            y = pyro.sample("y", q, infer={"enumerate": "parallel"})
            loc, scale = self.encoder(x, one_hot(y, NUM_CLASSES).to(x))
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))


def mlp(num_inputs: int, hidden: int, num_outputs: int):
    """A network of one hidden layer."""
    return nn.Sequential(
        nn.Linear(num_inputs, hidden), nn.Softplus(), nn.Linear(hidden, num_outputs)
    )


def beside(a, b):
    """Both arrays side by side, along the last axis."""
    shape = torch.broadcast_shapes(a.shape[:-1], b.shape[:-1])
    return torch.cat([a.expand(*shape, -1), b.expand(*shape, -1)], -1)


def main() -> None:
    """Trains, and prints the seconds of a step."""
    parser = argparse.ArgumentParser(description="Time M2 in Pyro.")
    parser.add_argument("--hidden", type=int, default=500)
    parser.add_argument("--num-latents", type=int, default=50)
    parser.add_argument("--num-images", type=int, default=60_000)
    parser.add_argument("--batch-size", type=int, default=200)
    parser.add_argument("--num-steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--same-arithmetic", action="store_true")
    config = parser.parse_args()
    torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    if config.same_arithmetic:
        pyro.enable_validation(False)
    images = torch.randint(0, 256, (config.num_images, NUM_PIXELS), dtype=torch.uint8)
    m2 = M2(config.hidden, config.num_latents, config.same_arithmetic)
    svi = SVI(m2.model, m2.guide, Adam({"lr": 1e-3}), TraceEnum_ELBO(max_plate_nesting=1))
    order = torch.empty(0, dtype=torch.long)
    began = 0.0
    for step in range(WARM_UP + config.num_steps):
        if step == WARM_UP:
            began = time.perf_counter()
        if len(order) < config.batch_size:
            order = torch.randperm(config.num_images)
        rows, order = order[: config.batch_size], order[config.batch_size :]
        svi.step(torch.bernoulli(images[rows].float() / 255))
    print((time.perf_counter() - began) / config.num_steps)


if __name__ == "__main__":
    main()
