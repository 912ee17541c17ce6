"""The weighted sum of loss terms that training minimizes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.core.names import did_you_mean
from vaevq_med.losses.adversarial import AdversarialTerm, adaptive_weight
from vaevq_med.losses.base import LossTerm, no_continuous_path, paths
from vaevq_med.losses.known_gradient import cut_at_reconstructions, gradients, with_gradient
from vaevq_med.networks.outputs import LossOutput, TokenizerOutput

# What VQGAN's adaptive weight measures the GAN's gradient against.
_TAKEN = frozenset(
    {
        *("loss", "adversarial", "adaptive_weight", "gradient_norm", "images_per_second"),
        *("discriminator_loss", "discriminator_gradient_norm"),
    }
)
"""What a step logs beside the terms."""
_LIKELIHOOD_TERMS = ("reconstruction", "perceptual")


class TokenizerObjective(nn.Module):
    """``sum_i weight_i term_i``, plus the adversarial term from its start step on.

    It owns no discriminator, optimizer or logging.

    Args:
        terms: loss terms by name; None for one that there is not, whose weight has to be 0 or None, or absent.
        weights: a weight for each term; 0 or None leaves the term out of the computation.
        adversarial: the GAN's settings, or None without one.

    Raises:
        VaevqMedError: a weight without a term or a term without a weight, with the nearest valid name; or a term has
            a name that the log has for something else; or one that is None has a weight.
    """

    def __init__(
        self,
        *,
        terms: Mapping[str, LossTerm | None],
        weights: Mapping[str, float | None],
        adversarial: AdversarialTerm | None = None,
    ) -> None:
        super().__init__()
        taken = sorted({*terms} & _TAKEN)
        if taken:
            raise VaevqMedError(f"objective.terms has {taken[0]!r}, which the log has already; expected another name")
        for name in weights:
            if name not in terms:
                hint = did_you_mean(name, terms, f"expected some of {', '.join(terms)}")
                raise VaevqMedError(f"objective.weights has {name!r}, which is no term: {hint}")
            if weights[name] and terms[name] is None:
                raise VaevqMedError(
                    f"objective.terms.{name} is null; expected a term, since its weight is {weights[name]}"
                )
        if adversarial is not None and not isinstance(adversarial, AdversarialTerm):
            raise VaevqMedError(f"objective.adversarial is {adversarial!r}; expected the GAN's settings, or null")
        missing = [name for name, term in terms.items() if term is not None and name not in weights]
        if missing:
            raise VaevqMedError(
                f"objective.weights has no {', '.join(missing)}; expected a weight for each term (0 leaves one out)"
            )
        self.weights = {name: float(weight) for name, weight in weights.items() if weight}
        used = {name: term for name, term in terms.items() if term is not None and name in self.weights}
        self.terms = nn.ModuleDict(used)
        self.adversarial = adversarial

    def check_paths(self, network: nn.Module) -> None:
        """Refuse a tokenizer without the continuous path, or without the patches, that a term is of.

        Args:
            network: the tokenizer that is trained.

        Raises:
            VaevqMedError: it has none.
        """
        if not getattr(network, "patchwise", True):
            for name, term in self.terms.items():
                if getattr(term, "needs_patches", False):
                    raise VaevqMedError(
                        f"objective.terms.{name}.tokens is 'content' with tokens that have no patch; expected 'all'"
                    )
        asked = [getattr(term, "paths", None) for term in (*self.terms.values(), self.adversarial)]
        if "continuous" in asked and not getattr(network, "variational", True):
            raise no_continuous_path()

    @contextmanager
    def one_update(self) -> Iterator[None]:
        """Count the calls inside as parts of one batch: what steers the terms moves once, and not after an error."""
        with ExitStack() as stack:
            for _, term in self._named_terms():
                stack.enter_context(term.one_update())
            yield

    def control_state(self) -> dict[str, Tensor]:
        """What steers the terms (the KL budget's factor, the empirical prior), for checkpoints; no network weights."""
        controls = ((name, term.control()) for name, term in self._named_terms())
        return {name: control.clone() for name, control in controls if control is not None}

    def load_control_state(self, state: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`control_state` gave."""
        for name, term in self._named_terms():
            if name in state:
                term.load_control(state[name])

    def _named_terms(self) -> Iterator[tuple[str, LossTerm]]:
        """Those that have the interface's hooks: a plain module may be a term too, and has none."""
        yield from ((name, term) for name, term in self.terms.items() if isinstance(term, LossTerm))

    def is_adversarial(self, step: int) -> bool:
        """Whether the GAN takes part at iteration ``step``, counted from 0."""
        return self.adversarial is not None and step >= self.adversarial.start_step

    def _weighted_sum(self, values: Mapping[str, Tensor], names: Iterable[str], target: Tensor) -> Tensor:
        """The weighted sum of the named terms, zero without any."""
        total = torch.zeros((), device=target.device)
        for name in names:
            total = total + self.weights[name] * values[name]
        return total

    def generator(
        self,
        target: Tensor,
        output: TokenizerOutput,
        *,
        discriminator: nn.Module | None = None,
        step: int = 0,
        last_layer: Tensor | None = None,
    ) -> LossOutput:
        """The tokenizer's loss.

        Args:
            target: images ``[B, C, H, W]`` in [-1, 1].
            output: of the training forward pass on them.
            discriminator: needed once the GAN has started.
            step: iteration, counted from 0.
            last_layer: weight of the decoder's last convolution; needed for the adaptive weight.

        Returns:
            The total, and each term unweighted and detached; with the GAN also ``adversarial`` and, if adaptive,
            ``adaptive_weight``.

        Raises:
            VaevqMedError: the GAN has started and the discriminator, or the last layer, is missing.
        """
        adversarial = self.adversarial if self.is_adversarial(step) else None
        if adversarial is not None and discriminator is None:
            raise VaevqMedError(f"the GAN started at step {adversarial.start_step}; found no discriminator")
        if adversarial is not None and adversarial.adaptive and last_layer is None:
            raise VaevqMedError("the adaptive weight needs the decoder's last layer; found none")
        weighed = adversarial is not None and adversarial.adaptive
        # What the adaptive weight compares goes back to the images once, and from there as one gradient.
        judged = cut_at_reconstructions(output) if weighed else output
        values = {
            name: _scalar(name, term(target, judged if name in _LIKELIHOOD_TERMS else output))
            for name, term in self.terms.items()
        }
        likelihood = self._weighted_sum(values, [name for name in self.terms if name in _LIKELIHOOD_TERMS], target)
        total = self._weighted_sum(values, [name for name in self.terms if name not in _LIKELIHOOD_TERMS], target)
        if adversarial is None or discriminator is None:
            total = total + likelihood
        elif not weighed or last_layer is None:
            values["adversarial"] = gan = adversarial.generator(output, discriminator)
            total = total + likelihood + adversarial.weight * gan
        else:
            pairs = [pair for pair in zip(paths(output), paths(judged), strict=True) if pair[0].requires_grad]
            images, leaves = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
            # The perceptual loss' graph is gone before the discriminator's is made.
            of_likelihood = gradients(likelihood, leaves)
            values["adversarial"] = gan = adversarial.generator(judged, discriminator)
            of_gan = gradients(gan, leaves)
            values["adaptive_weight"] = _ratio_at(last_layer, images, of_likelihood, of_gan)
            weight = adversarial.weight * values["adaptive_weight"]
            both = [one + weight.to(two.dtype) * two for one, two in zip(of_likelihood, of_gan, strict=True)]
            total = total + with_gradient(likelihood.detach() + weight * gan.detach(), images, both)
        terms = {name: value.detach() for name, value in values.items()}
        for name, term in self._named_terms():
            terms |= {f"{name}_{figure}": value.detach().clone() for figure, value in term.figures().items()}
        return LossOutput(total=total, terms=terms)

    def discriminator(
        self, target: Tensor, output: TokenizerOutput, *, discriminator: nn.Module, step: int = 0
    ) -> LossOutput:
        """The discriminator's loss; the output's images are detached.

        Args:
            target: images ``[B, C, H, W]`` in [-1, 1].
            output: of the training forward pass on them.
            discriminator: gives logits ``[B, 1, h, w]``.
            step: iteration, counted from 0.

        Raises:
            VaevqMedError: the objective has no GAN, or it has not started.
        """
        if self.adversarial is None or not self.is_adversarial(step):
            raise VaevqMedError(f"step {step}: found no adversarial term in use, expected one")
        values = self.adversarial.discriminator(target, output, discriminator)
        return LossOutput(
            total=values["loss"],
            terms={name: value.detach() for name, value in values.items() if name != "loss"},
        )


def _scalar(name: str, value: Tensor) -> Tensor:
    if not isinstance(value, Tensor) or value.ndim:
        found = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise VaevqMedError(f"objective.terms.{name}: found {found}, expected a scalar")
    return value


def _ratio_at(layer: Tensor, images: Sequence[Tensor], *known: Sequence[Tensor]) -> Tensor:
    """The adaptive weight of two losses whose gradients by the images are known, at the weight that makes these."""
    return adaptive_weight(*(torch.autograd.grad(images, layer, of_one, retain_graph=True)[0] for of_one in known))
