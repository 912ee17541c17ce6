"""RCS that takes the factor of the KL's budget: what it weighs, by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.bundles import quick, run_bundle
from torch import Tensor

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.losses import KLLoss, RCSLoss, TokenizerObjective
from vaevq_med.losses.base import LossTerm
from vaevq_med.networks.outputs import QuantizerOutput, TokenizerOutput
from vaevq_med.networks.posterior import DiagonalGaussian
from vaevq_med.networks.quantizers.coherent import CoherentVQ

IMAGE = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
KL, RCS = 6.0, 1.5
"""Of three channels of mean 2 and deviation 1, whose codes stand 1 from the mean: 3/2 2², and 3/2 1²."""


def output_of(batch_size: int = 4) -> TokenizerOutput:
    mean = torch.full((batch_size, 3, 2, 2), 2.0, requires_grad=True)
    codes = torch.full((batch_size, 3, 2, 2), 3.0, requires_grad=True)
    indices = torch.zeros(batch_size, 2, 2, 1, dtype=torch.int64)
    posterior = DiagonalGaussian(mean, torch.zeros_like(mean))
    image = torch.zeros(batch_size, 1, 4, 4)
    return TokenizerOutput(image, image, mean, posterior, QuantizerOutput(codes, codes, indices))


def build(*names: str, rate: float = 0.05, **options: Any) -> TokenizerObjective:
    terms = {"kl": KLLoss(budget=1.0, num_embeddings=8, rate=rate), "rcs": RCSLoss()}
    terms = {name: terms[name] for name in names or terms}
    weights = {"kl": 0.5, "rcs": 0.25}
    return TokenizerObjective(terms=terms, weights={name: weights[name] for name in terms}, **options)


STEP = (KL / math.log(8)) ** 0.05
"""By which a batch of 6 nats a token moves the factor, at the rate of 0.05."""


@pytest.mark.parametrize("order", [("kl", "rcs"), ("rcs", "kl")], ids="-".join)
def test_rcs_weighs_what_the_budget_has_made_of_the_weight(order: tuple[str, str]) -> None:
    objective = build(*order, follows={"rcs": "kl"})
    for step in (1, 2, 3):
        output = output_of()
        loss = objective.generator(IMAGE, output)
        factor = STEP**step
        assert loss.total.item() == pytest.approx(0.5 * factor * KL + 0.25 * factor * RCS, rel=1e-5)
        # What is logged of RCS is RCS itself.
        assert loss.terms["rcs"].item() == pytest.approx(RCS, rel=1e-6)
        assert loss.terms["kl_factor"].item() == pytest.approx(factor, rel=1e-5)
        # (codes - mean) / σ² over the 16 tokens.
        (gradient,) = torch.autograd.grad(loss.total, output.quantizer.codes)
        torch.testing.assert_close(gradient, torch.full_like(gradient, 0.25 * factor / 16))


def test_without_following_its_weight_stays() -> None:
    for options in ({}, {"follows": None}, {"follows": {"rcs": None}}):
        loss = build(**options).generator(IMAGE, output_of())
        assert loss.total.item() == pytest.approx(0.5 * STEP * KL + 0.25 * RCS, rel=1e-5)


def test_at_a_factor_of_one_it_is_the_objective_without_to_the_bit() -> None:
    found = []
    for options in ({}, {"follows": {"rcs": "kl"}}):
        kl = KLLoss(budget=1.0, num_embeddings=8, rate=0.0)
        objective = TokenizerObjective(
            terms={"kl": kl, "rcs": RCSLoss()}, weights={"kl": 2.4e-4, "rcs": 2.4e-4}, **options
        )
        output = output_of()
        total = objective.generator(IMAGE, output).total
        found.append((total, *torch.autograd.grad(total, (output.latent, output.quantizer.codes))))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_a_kl_without_a_budget_steers_nothing() -> None:
    with pytest.raises(VaevqMedError, match=r"expected another term that steers a factor .found none., or null"):
        TokenizerObjective(
            terms={"kl": KLLoss(), "rcs": RCSLoss()}, weights={"kl": 1.0, "rcs": 1.0}, follows={"rcs": "kl"}
        )


def test_in_parts_of_a_batch_all_parts_have_the_factor_of_before_it() -> None:
    objective = build(follows={"rcs": "kl"})
    for step in (0, 1):
        with objective.one_update():
            totals = [objective.generator(part, output_of(2)).total.item() for part in IMAGE.split(2)]
        assert totals == pytest.approx([STEP**step * (0.5 * KL + 0.25 * RCS)] * 2, rel=1e-5)


def test_in_evaluation_it_has_the_factor_that_was_reached() -> None:
    objective = build(follows={"rcs": "kl"})
    objective.generator(IMAGE, output_of())
    objective.eval()
    for _ in range(2):
        loss = objective.generator(IMAGE, output_of())
        assert loss.total.item() == pytest.approx(STEP * (0.5 * KL + 0.25 * RCS), rel=1e-5)


def test_a_checkpoint_is_the_one_without_and_carries_what_is_followed() -> None:
    first, second = build(follows={"rcs": "kl"}), build(follows={"rcs": "kl"})
    assert first.state_dict().keys() == build().state_dict().keys()
    first.generator(IMAGE, output_of())
    state = first.control_state()
    assert state.keys() == build().control_state().keys() == {"kl"}
    second.load_control_state(state)
    total = second.eval().generator(IMAGE, output_of()).total
    assert total.item() == pytest.approx(STEP * (0.5 * KL + 0.25 * RCS), rel=1e-5)


def test_no_gradient_goes_to_what_is_followed() -> None:
    class Learned(LossTerm):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.tensor(3.0, requires_grad=True)

        def forward(self, target: Tensor, output: TokenizerOutput) -> Tensor:
            return self.scale * output.quantizer.codes.mean()

        def steered_factor(self) -> Tensor:
            return self.scale

    mine = Learned()
    objective = TokenizerObjective(
        terms={"rcs": RCSLoss(), "mine": mine}, weights={"rcs": 0.25, "mine": 1.0}, follows={"rcs": "mine"}
    )
    total = objective.generator(IMAGE, output_of()).total
    # 3 times the codes' mean of 3, and RCS thrice.
    assert total.item() == pytest.approx(9 + 3 * 0.25 * RCS)
    (gradient,) = torch.autograd.grad(total, mine.scale)
    assert gradient.item() == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"follows": {"rcs": "klx"}}, r"objective\.follows has 'klx', which is no term: did you mean 'kl'"),
        ({"follows": {"rsc": "kl"}}, r"objective\.follows has 'rsc', which is no term: did you mean 'rcs'"),
        ({"follows": {"kl": "rcs"}}, r"objective\.follows\.kl is 'rcs'; .* steers a factor \(found none\), or null"),
        ({"follows": {"kl": "kl"}}, r"objective\.follows\.kl is 'kl'; expected another term"),
        (
            {"follows": {"rcs": "kl"}, "weights": {"kl": 0.0, "rcs": 1.0}},
            r"objective\.follows\.rcs is 'kl', which has no weight; expected a term in use",
        ),
    ],
)
def test_what_cannot_be_followed_is_refused(options: dict[str, Any], said: str) -> None:
    given = {"terms": {"kl": KLLoss(), "rcs": RCSLoss()}, "weights": {"kl": 1.0, "rcs": 1.0}, **options}
    with pytest.raises(VaevqMedError, match=said):
        TokenizerObjective(**given)


def test_a_term_that_is_left_out_follows_nothing() -> None:
    weights = {"kl": 0.0, "rcs": 0.0}
    objective = TokenizerObjective(terms={"kl": KLLoss(), "rcs": RCSLoss()}, weights=weights, follows={"rcs": "kl"})
    assert objective.generator(IMAGE, output_of()).total.item() == 0.0


def test_the_overlay_steers_both_weights_of_the_default(toy_overrides: dict[str, Any]) -> None:
    overrides = quick(toy_overrides)
    parser = run_bundle("train.json", overrides, "coherent_budget", run_id="training")
    trainer = parser.get_parsed_content("train#trainer")
    objective, terms = trainer.objective, trainer.state.terms
    assert type(trainer.network.quantizer) is CoherentVQ
    assert objective.follows == {"rcs": "kl"}
    assert objective.weights["rcs"] == objective.weights["kl"] == 2.4e-4
    checkpoint = torch.load(Path(overrides["output_dir"], "checkpoints/last.pt"), weights_only=True)
    assert checkpoint["objective"]["kl"].shape == ()
    assert checkpoint["objective"]["kl"].item() != 1.0
    assert math.isfinite(terms["loss"])
