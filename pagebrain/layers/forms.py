"""The base class of layers: weights are declared first and loaded later, and a form is chosen once."""

from torch import Tensor, empty, nn


class Layer(nn.Module):
    """A module with weights of its own.

    A new layer has shapes only. :func:`pagebrain.models.weights.load_weights` gives it tensors, and :meth:`prepare` then
    chooses how it computes.
    """

    def prepare(self, *, kernels: bool, owned: bool) -> None:
        """Choose the form for the device and dtype of the weights. The default form works on every device.

        Args:
            kernels: whether this layer and the others compute with the Triton kernels.
            owned: whether the weights belong to the layer alone. It may then drop their original layout.
        """


def prepare(model: nn.Module, *, kernels: bool, owned: bool) -> None:
    """Prepare the layers of ``model`` one after the other, so that at most one layer holds its weights twice at a time."""
    for layer in model.modules():
        if isinstance(layer, Layer):
            layer.prepare(kernels=kernels, owned=owned)


def declared(*shape: int) -> nn.Parameter:
    """A weight that is not loaded yet: a shape without memory."""
    weight: Tensor = empty(shape, device="meta")
    return nn.Parameter(weight, requires_grad=False)
