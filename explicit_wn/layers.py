"""Which layers of torch are meant where none is named, and what a weight is called within a model."""

from torch import nn

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
"""Those whose output channels are dim 1 of the weight."""

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)


def qualified(path: str, name: str) -> str:
    """The name, in a model, of what is called `name` in the module at `path`."""
    return f"{path}.{name}" if path else name
