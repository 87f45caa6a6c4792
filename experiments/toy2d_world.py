"""The world of ``experiments.toy2d``: two mixtures of Gaussians, a linear reward, its exact optima, scores and pictures.

Axes: b points, k components of a mixture.
"""

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from lensmini.sampling import sample_ode, time_grid

__all__ = [
    "OFFSETS",
    "FlowNet",
    "data_means",
    "draw",
    "draw_data",
    "draw_tilt",
    "fresh_net",
    "paint",
    "rewards_of",
    "score",
    "tilt",
]

STD = 0.2
DIRECTIONS = torch.tensor([[1.0, 0.0], [-0.6, 0.8]])
OFFSETS = torch.tensor([0.0, 5.0])


class FlowNet(nn.Module):
    """Velocity of a point, given time and prompt.

    Example:
        >>> FlowNet(8)(torch.zeros(3, 2), torch.ones(3), torch.tensor([0, 1, 1])).shape
        torch.Size([3, 2])
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(2 + 8 + 2, width), nn.SiLU()]
        for _ in range(2):
            layers += [nn.Linear(width, width), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(width, 2))

    def forward(self, x: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        """``[b, 2]``, ``[b]`` and ``[b]`` to ``[b, 2]``."""
        angles = t[:, None] * math.pi * 2.0 ** torch.arange(-1, 3, device=x.device)
        one_hot = nn.functional.one_hot(prompt, 2).to(x.dtype)
        return self.layers(torch.cat([x, angles.sin(), angles.cos(), one_hot], 1))


def data_means(prompt: int) -> Tensor:
    """Centres of a prompt's components, ``[k, 2]``, all of weight 1 / k and std 0.2: a ring of 8, or a grid of 9.

    Example:
        >>> data_means(0).shape, data_means(1).shape
        (torch.Size([8, 2]), torch.Size([9, 2]))
    """
    if prompt == 0:
        angle = torch.arange(8) * math.pi / 4
        return 2 * torch.stack([angle.cos(), angle.sin()], 1)
    return 1.5 * torch.cartesian_prod(torch.arange(-1.0, 2), torch.arange(-1.0, 2))


def draw_data(prompt: Tensor, generator: torch.Generator) -> Tensor:
    """Points of the data, ``[b]`` prompts to ``[b, 2]``.

    Example:
        >>> draw_data(torch.tensor([0, 1]), torch.Generator().manual_seed(0)).shape
        torch.Size([2, 2])
    """
    choice, centres = torch.rand(len(prompt), generator=generator), torch.empty(len(prompt), 2)
    for p in (0, 1):
        rows, means = prompt == p, data_means(p)
        centres[rows] = means[(choice[rows] * len(means)).long()]
    return centres + STD * torch.randn(len(prompt), 2, generator=generator)


def rewards_of(points: Tensor, prompt: Tensor) -> Tensor:
    """``[b]``: linear, in a direction and from an offset of the prompt's own.

    Example:
        >>> rewards_of(torch.tensor([[1.0, 0.0]]), torch.tensor([1]))
        tensor([4.4000])
    """
    return (points * DIRECTIONS[prompt]).sum(1) + OFFSETS[prompt]


def tilt(prompt: int, height: float) -> tuple[Tensor, Tensor]:
    """The data times ``exp(lambda d.x)``, with the lambda that gives ``E[d.x] = height``: shares ``[k]``, centres ``[k, 2]``.

    A Gaussian times ``exp(lambda d.x)`` is the Gaussian moved by ``lambda s^2 d``, with mass ``exp(lambda d.mu + ...)``.

    Example:
        >>> shares, centres = tilt(1, 1.2)
        >>> round(float((shares * (centres @ DIRECTIONS[1].double())).sum()), 4)
        1.2
    """
    means, direction = data_means(prompt).double(), DIRECTIONS[prompt].double()
    along = means @ direction
    low, high = -60.0, 60.0
    for _ in range(80):  # the mean rises with lambda
        middle = (low + high) / 2
        reached = ((middle * along).softmax(0) * (along + middle * STD**2)).sum().item()
        low, high = (middle, high) if reached < height else (low, middle)
    return (low * along).softmax(0), means + low * STD**2 * direction


def fresh_net(width: int, generator: torch.Generator) -> FlowNet:
    """A network with weights from a generator."""
    net = FlowNet(width)
    with torch.no_grad():
        for layer in net.layers:
            if isinstance(layer, nn.Linear):
                bound = 1 / math.sqrt(layer.in_features)
                for parameter in layer.parameters():
                    parameter.uniform_(-bound, bound, generator=generator)
    return net


@torch.no_grad()
def paint(net: FlowNet, prompt: int, num: int, seed: int) -> Tensor:
    """Points ``[num, 2]`` of a prompt, by forty Heun steps."""
    noise = torch.randn(num, 2, generator=torch.Generator().manual_seed(seed + 2))
    prompts = torch.full((num,), prompt)
    return sample_ode(lambda x, t: net(x, t, prompts), noise, time_grid(40), step="heun")


def score(points: Tensor, prompt: int) -> dict[str, float]:
    """How far along the reward, how close to the data's components, how varied, and how far from the tilt as high."""
    means = data_means(prompt)
    height = (points @ DIRECTIONS[prompt]).mean().item()
    distance, nearest = torch.cdist(points, means).min(1)
    shares = torch.bincount(nearest, minlength=len(means)).double() / len(points)
    wanted, _ = tilt(prompt, height)
    kl = (shares * (shares.clamp_min(1e-12) / wanted.clamp_min(1e-12)).log()).sum().item()
    return {
        "height": height,
        "on_support": (distance < 3.5 * STD).double().mean().item(),
        "entropy": -(shares * shares.clamp_min(1e-12).log()).sum().item(),
        "kl_to_tilt": kl,
    }


def draw_tilt(prompt: int, height: float, num: int, generator: torch.Generator) -> Tensor:
    """Points ``[num, 2]`` of the best policy that earns ``height``.

    Example:
        >>> draw_tilt(0, 1.0, 5, torch.Generator().manual_seed(0)).shape
        torch.Size([5, 2])
    """
    shares, centres = tilt(prompt, height)
    rows = torch.multinomial(shares, num, replacement=True, generator=generator)
    return centres[rows].float() + STD * torch.randn(num, 2, generator=generator)


def draw(
    points: dict[str, list[Tensor]], scores: dict[str, list[dict[str, float]]], path: Path, columns: int = 6
) -> None:
    """Densities of both prompts, one above the other, arm beside arm; the arrow is the reward's direction."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    blocks = math.ceil(len(points) / columns)
    figure, axes = plt.subplots(2 * blocks, columns, figsize=(2.1 * columns, 4.7 * blocks), squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for index, (name, both) in enumerate(points.items()):
        for prompt in (0, 1):
            axis = axes[2 * (index // columns) + prompt, index % columns]
            x, y = both[prompt].T.numpy()
            axis.hist2d(x, y, bins=80, range=[[-3, 3], [-3, 3]], cmap="magma")
            axis.set_aspect("equal")
            values = scores[name][prompt]
            title = f"reward {values['height']:+.2f}, on data {values['on_support']:.0%}"
            axis.set_title(f"{name}\n{title}" if prompt == 0 else title, fontsize=8)
            dx, dy = (1.2 * DIRECTIONS[prompt]).tolist()
            if name in ("data", "base"):
                axis.arrow(-dx / 2, -dy / 2, dx, dy, color="white", width=0.04, head_width=0.25)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
