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
# As far as VA-VAE lets the weight of an alignment rise (arXiv 2501.01423, the released code).
_MOST_AT_THE_LATENT = 1e8


class TokenizerObjective(nn.Module):
    """``sum_i weight_i term_i``, plus the adversarial term from its start step on.

    It owns no discriminator, optimizer or logging.

    Args:
        terms: loss terms by name; None for one that there is not, whose weight has to be 0 or None, or absent.
        weights: a weight for each term; 0 or None leaves the term out of the computation.
        adversarial: the GAN's settings, or None without one.
        follows: by a term's name, that of the term whose steered factor multiplies its weight too, without a gradient:
            with ``{"rcs": "kl"}`` and a KL budget RCS weighs what the KL weighs. None, or a term that is left out,
            follows nothing. What is logged of the term is without the factor.

    Raises:
        VaevqMedError: a weight without a term or a term without a weight, with the nearest valid name; or a term has
            a name that the log has for something else; or one that is None has a weight; or one follows a term that is
            not there, is left out, or steers nothing.
    """

    def __init__(
        self,
        *,
        terms: Mapping[str, LossTerm | None],
        weights: Mapping[str, float | None],
        adversarial: AdversarialTerm | None = None,
        follows: Mapping[str, str | None] | None = None,
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
        self.follows = self._following(terms, follows or {})

    def _following(self, terms: Mapping[str, LossTerm | None], follows: Mapping[str, str | None]) -> dict[str, str]:
        """Those of the terms in use that follow another one, which has to be in use and to steer something."""
        named: list[str | None] = [*follows, *follows.values()]
        for name in named:
            if name is not None and name not in terms:
                hint = did_you_mean(name, terms, f"expected some of {', '.join(terms)}")
                raise VaevqMedError(f"objective.follows has {name!r}, which is no term: {hint}")
        found = {name: other for name, other in follows.items() if other is not None and name in self.terms}
        steering = self._factors()
        for name, other in found.items():
            if other not in self.terms:
                raise VaevqMedError(
                    f"objective.follows.{name} is {other!r}, which has no weight; expected a term in use, or null"
                )
            if other not in steering or other == name:
                others = ", ".join(one for one in steering if one != name)
                raise VaevqMedError(
                    f"objective.follows.{name} is {other!r}; expected another term that steers a factor "
                    f"({others or 'found none'}), or null"
                )
        return found

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

    def check_adaptive(self, network: nn.Module, *, compiled: bool = False) -> None:
        """Refuse a layer at which an adaptive weight cannot be measured.

        Args:
            network: the tokenizer that is trained.
            compiled: whether its graph is compiled, which can be gone through once alone.

        Raises:
            VaevqMedError: naming the option.
        """
        asked = [(f"terms.{name}", "latent_layer") for name in self._steered()]
        if self.adversarial is not None and self.adversarial.adaptive:
            asked.append(("adversarial", "last_layer"))
        for option, layer in asked:
            if not getattr(network, layer).requires_grad:
                where = "decoder, at whose last layer" if layer == "last_layer" else "latent, at whose convolution"
                raise VaevqMedError(
                    f"objective.{option}.adaptive is true with a frozen {where} its weight is measured; expected "
                    f"false, or no objective.{option}"
                )
        if compiled and self._steered():
            raise VaevqMedError(
                f"compile is true with objective.terms.{self._steered()[0]}.adaptive, which goes through the decoder "
                "twice; expected one of them false"
            )

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

    def _steered(self) -> list[str]:
        """Terms whose weight is measured at the convolution before the latent."""
        return [name for name, term in self._named_terms() if term.adaptive]

    def _factors(self) -> dict[str, Tensor]:
        """What terms multiply themselves by, of those that steer it."""
        factors = ((name, term.steered_factor()) for name, term in self._named_terms())
        return {name: factor.detach() for name, factor in factors if factor is not None}

    def _weighted_sum(
        self, values: Mapping[str, Tensor], names: Iterable[str], target: Tensor, ratios: Mapping[str, Tensor]
    ) -> Tensor:
        """The weighted sum of the named terms, zero without any; all of them have been computed, and have steered."""
        total = torch.zeros((), device=target.device)
        factors = self._factors() if self.follows else {}
        for name in names:
            weight: float | Tensor = self.weights[name]
            if name in ratios:
                weight = weight * ratios[name]
            if name in self.follows:
                weight = weight * factors[self.follows[name]]
            total = total + weight * values[name]
        return total

    def generator(
        self,
        target: Tensor,
        output: TokenizerOutput,
        *,
        discriminator: nn.Module | None = None,
        step: int = 0,
        last_layer: Tensor | None = None,
        latent_layer: Tensor | None = None,
    ) -> LossOutput:
        """The tokenizer's loss.

        Args:
            target: images ``[B, C, H, W]`` in [-1, 1].
            output: of the training forward pass on them.
            discriminator: needed once the GAN has started.
            step: iteration, counted from 0.
            last_layer: weight of the decoder's last convolution; needed for the GAN's adaptive weight.
            latent_layer: weight of the last convolution before the latent; needed for the adaptive weight of a term.

        Returns:
            The total, and each term unweighted and detached; with the GAN also ``adversarial`` and, if adaptive,
            ``adaptive_weight``; and ``NAME_adaptive_weight`` of a term that has one.

        Raises:
            VaevqMedError: the GAN has started and the discriminator, or the last layer, is missing.
        """
        adversarial = self.adversarial if self.is_adversarial(step) else None
        if adversarial is not None and discriminator is None:
            raise VaevqMedError(f"the GAN started at step {adversarial.start_step}; found no discriminator")
        if adversarial is not None and adversarial.adaptive and last_layer is None:
            raise VaevqMedError("the adaptive weight needs the decoder's last layer; found none")
        weighed, steered = adversarial is not None and adversarial.adaptive, self._steered()
        if steered and latent_layer is None:
            raise VaevqMedError(f"the adaptive weight of {steered[0]} needs the layer before the latent; found none")
        # What the adaptive weight compares goes back to the images once, and from there as one gradient.
        judged = cut_at_reconstructions(output) if weighed else output
        values = {
            name: _scalar(name, term(target, judged if name in _LIKELIHOOD_TERMS else output))
            for name, term in self.terms.items()
        }
        likelihood = self._weighted_sum(values, [name for name in self.terms if name in _LIKELIHOOD_TERMS], target, {})
        graph: tuple[Sequence[Tensor], Sequence[Tensor] | None] = [likelihood], None
        if weighed and last_layer is not None:
            pairs = [pair for pair in zip(paths(output), paths(judged), strict=True) if pair[0].requires_grad]
            images, leaves = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
            # The perceptual loss' graph is gone before the discriminator's is made.
            graph = images, gradients(likelihood, leaves)
        ratios = self._ratios(values, graph, latent_layer) if steered and latent_layer is not None else {}
        others = [name for name in self.terms if name not in _LIKELIHOOD_TERMS]
        total = self._weighted_sum(values, others, target, ratios)
        if adversarial is None or discriminator is None:
            total = total + likelihood
        elif graph[1] is None or last_layer is None:
            values["adversarial"] = gan = adversarial.generator(output, discriminator)
            total = total + likelihood + adversarial.weight * gan
        else:
            of_likelihood = graph[1]
            values["adversarial"] = gan = adversarial.generator(judged, discriminator)
            of_gan = gradients(gan, leaves)
            values["adaptive_weight"] = adaptive_weight(
                _gradient_at(last_layer, images, of_likelihood), _gradient_at(last_layer, images, of_gan)
            )
            weight = adversarial.weight * values["adaptive_weight"]
            both = [one + weight.to(two.dtype) * two for one, two in zip(of_likelihood, of_gan, strict=True)]
            total = total + with_gradient(likelihood.detach() + weight * gan.detach(), images, both)
        terms = {name: value.detach() for name, value in values.items()}
        terms |= {f"{name}_adaptive_weight": ratio for name, ratio in ratios.items()}
        for name, term in self._named_terms():
            terms |= {f"{name}_{figure}": value.detach().clone() for figure, value in term.figures().items()}
        return LossOutput(total=total, terms=terms)

    def _ratios(
        self,
        values: Mapping[str, Tensor],
        likelihood: tuple[Sequence[Tensor], Sequence[Tensor] | None],
        layer: Tensor,
    ) -> dict[str, Tensor]:
        """The adaptive weights of the terms that have one.

        Args:
            values: the terms.
            likelihood: reconstruction and perceptual loss, as that scalar, or as the images and its gradient by each.
            layer: weight of the last convolution before the latent.
        """
        of_likelihood = _gradient_at(layer, *likelihood)
        return {
            name: adaptive_weight(of_likelihood, _gradient_at(layer, [values[name]]), maximum=_MOST_AT_THE_LATENT)
            for name in self._steered()
        }

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


def _gradient_at(layer: Tensor, outputs: Sequence[Tensor], known: Sequence[Tensor] | None = None) -> Tensor:
    """The gradient by a layer's weight of a loss, or of one whose gradients by ``outputs`` are known."""
    if not any(one.requires_grad for one in outputs):
        return torch.zeros_like(layer)
    (found,) = torch.autograd.grad(outputs, layer, known, retain_graph=True, materialize_grads=True)
    return found
