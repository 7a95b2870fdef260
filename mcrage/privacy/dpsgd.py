"""The clipped sum of patients' gradients, for the price of an ordinary one: the only file that imports Opacus.

Opacus' hooks catch what every linear layer saw (A) and the gradient of its outputs (G), and its norm samplers give
each patient's gradient norm from them ("ghost clipping", Li et al., 2022). Opacus then asks for a second backward pass
over the rescaled losses. Here the one pass is enough: with c the patients' clipping factors, the clipped sum of a
layer is (c ∘ G)ᵀ A, which is the product that an ordinary backward pass makes of it anyway.

Shape: B patients with K draws each are B·K rows, the draws of a patient one after the other.
"""

import logging
import warnings
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from mcrage.errors import PrivacyError

_root = logging.getLogger()
_handlers, _level = [*_root.handlers], _root.level
from opacus.grad_sample import GradSampleHooksFastGradientClipping  # noqa: E402

_root.handlers[:] = _handlers  # Opacus sets up the log of the whole program when it is imported
_root.setLevel(_level)

_SAFETY = 1e-6  # shortens clipped gradients by as much as float32 may make them longer
_FAINT = 1e-17  # added to norms: below it, float32 loses squares
_LOST = 1e-4  # share of a squared norm that draws may lose in float32 when they cancel, generously


def linear_norms(layer: nn.Linear, activations: list[Tensor], gradients: Tensor) -> dict[Tensor, Tensor]:
    """Norm of each patient's gradient of a linear layer; a norm sampler as Opacus registers them.

    Opacus' own takes products of single rows, which are a third of the whole step. Here what float32 may have lost is
    added: where the draws of a patient cancel each other, the difference of large numbers is known less well.
    """
    seen = activations[0]
    weight, bias = layer.weight, layer.bias
    if gradients.dim() == 2:
        of_gradients, of_seen = (torch.linalg.vector_norm(part, dim=1) + _FAINT for part in (gradients, seen))
        return {bias: of_gradients, weight: of_gradients * of_seen}
    of_gradients, of_seen = (torch.bmm(part, part.mT) for part in (gradients, seen))
    for products in (of_gradients, of_seen):
        products.diagonal(dim1=1, dim2=2).add_(_FAINT**2)
    return {bias: _root_of_sum(of_gradients), weight: _root_of_sum(of_gradients * of_seen)}


def _root_of_sum(products: Float[Tensor, "patients draws draws"]) -> Float[Tensor, " patients"]:
    alone = products.diagonal(dim1=1, dim2=2).clamp(min=0.0).sqrt().sum(1)
    return (products.sum((1, 2)).clamp_(min=0.0) + _LOST * alone**2).sqrt_()


class ClippedSum(GradSampleHooksFastGradientClipping):  # type: ignore[misc]
    """Adds up clipped gradients of all trainable parameters of a module in their ``grad``.

    *Guarantee*: adding or removing one patient changes what all ``grad`` together hold after :meth:`add` by at most
    ``max_grad_norm`` in L2 norm, whatever is in the patient's rows: a gradient that is not finite counts as zero.

    Args:
        module: Its trainable parameters are all weights and biases of linear layers, each called once per pass.
        max_grad_norm: The clipping norm.
        draws: Rows per patient, averaged before the gradient is clipped.

    Raises:
        PrivacyError: If a parameter is of another kind of layer: its gradient would be known by no norm sampler.
    """

    NORM_SAMPLERS: ClassVar = {nn.Linear: linear_norms}

    def __init__(self, module: nn.Module, *, max_grad_norm: float, draws: int = 1) -> None:
        require_linear(module)
        super().__init__(module, loss_reduction="sum", strict=False, max_grad_norm=max_grad_norm)
        self.draws = draws
        self._seen: list[tuple[nn.Linear, Tensor, Tensor]] = []
        self._biases = [p for p in module.parameters() if p.requires_grad and p.dim() == 1]

    def add(self, losses: Float[Tensor, " rows"]) -> None:
        """Adds the clipped gradients of these rows' patients.

        Args:
            losses: One loss per row, the draws of a patient one after the other; no row's depends on another row.
        """
        sums = [_grad(parameter) for parameter in self._biases]
        for parameter in self._biases:
            parameter.grad = None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Full backward hook is firing")  # the first layer's inputs are data
            # What the biases need passes every layer; the products for the weights are left out of it.
            torch.autograd.backward(losses.sum() / self.draws, inputs=self._biases)
        for parameter, kept in zip(self._biases, sums, strict=True):
            parameter.grad = kept
        factors = self._factors()
        of_rows = factors.repeat_interleave(self.draws)
        all_count = bool((factors > 0).all())
        for layer, seen, gradient in self._seen:
            if not all_count:  # nothing times infinity is not nothing
                seen, gradient = (torch.where(of_rows[:, None] > 0, part, 0.0) for part in (seen, gradient))
            # the narrower side is scaled
            if layer.in_features < layer.out_features:
                _grad(layer.weight).addmm_(gradient.T, seen * of_rows[:, None])
            else:
                _grad(layer.weight).addmm_((gradient * of_rows[:, None]).T, seen)
            _grad(layer.bias).addmv_(gradient.T, of_rows)
        self._seen.clear()

    def rearrange_grad_samples(self, **told: object) -> tuple[list[Tensor], Tensor]:
        """Opacus' step before the norms: what a layer saw and its gradients, by patient; both are kept."""
        activations, gradients = super().rearrange_grad_samples(**told)
        layer = told["module"]
        assert isinstance(layer, nn.Linear)
        seen = activations[0]
        self._seen.append((layer, seen, gradients))
        if self.draws == 1:
            return activations, gradients
        by_patient = (-1, self.draws)
        return [seen.unflatten(0, by_patient)], gradients.unflatten(0, by_patient)

    def cleanup(self) -> None:
        """Takes all hooks off the module, and what they left on it."""
        super().cleanup()
        for layer in self._module.modules():
            vars(layer).pop("activations", None)

    def _factors(self) -> Float[Tensor, " patients"]:
        norms = self.get_norm_sample()
        factors = (self.max_grad_norm * (1 - _SAFETY) / norms).clamp_(max=1.0)
        return torch.where(torch.isfinite(norms), factors.nan_to_num_(nan=0.0, posinf=1.0), 0.0)


def _grad(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def require_linear(module: nn.Module) -> None:
    """Raises unless every trainable parameter is the weight or the bias of a linear layer with both.

    Layers that normalise by the batch are refused without parameters too: they mix patients, or remember them.

    Raises:
        PrivacyError: Naming the parameters of other layers, or the layers.
    """
    mixing = sorted(name or "it" for name, layer in module.named_modules() if isinstance(layer, _NormBase))
    if mixing:
        raise PrivacyError(f"layers that normalise by the batch let patients into each other's gradients: {mixing}")
    known = {
        f"{name}.{part}" if name else part
        for name, layer in module.named_modules()
        if type(layer) is nn.Linear and layer.bias is not None
        for part in ("weight", "bias")
    }
    other = sorted({name for name, parameter in module.named_parameters() if parameter.requires_grad} - known)
    if other:
        raise PrivacyError(f"gradients per patient are exact for linear layers with biases only; not for {other}")
