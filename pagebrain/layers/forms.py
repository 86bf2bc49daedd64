"""What all layers share: weights that are declared first and loaded later, and a form that is chosen once."""

from torch import Tensor, empty, nn


class Layer(nn.Module):
    """A module with weights of its own.

    A layer that was made has shapes only. :func:`pagebrain.models.weights.load_weights` gives it tensors, shared or its own,
    and :meth:`prepare` then decides how it computes.
    """

    def prepare(self, *, kernels: bool, owned: bool) -> None:
        """Choose the form for the device and dtype that the weights now have. The default form serves everywhere.

        Args:
            kernels: whether the layer may compute with the Triton kernels, and must work with layers that do.
            owned: whether the weights belong to the layer alone, which may then drop their original layout.
        """


def prepare(model: nn.Module, *, kernels: bool, owned: bool) -> None:
    """Prepare the layers of ``model`` one after the other, so that at most one has its weights twice."""
    for layer in model.modules():
        if isinstance(layer, Layer):
            layer.prepare(kernels=kernels, owned=owned)


def declared(*shape: int) -> nn.Parameter:
    """A weight that is yet to be loaded: a shape without memory."""
    weight: Tensor = empty(shape, device="meta")
    return nn.Parameter(weight, requires_grad=False)
