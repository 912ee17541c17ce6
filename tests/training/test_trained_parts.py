"""What is trained is a part of the network: a loss reads it from there, and trained parts elsewhere are refused."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from helpers.toy_networks import tokenizer, toy
from torch import Tensor, nn

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.losses.base import LossTerm
from vaevq_med.losses.objective import TokenizerObjective
from vaevq_med.networks.generators.losses import TokenLoss
from vaevq_med.networks.outputs import TokenizerOutput
from vaevq_med.networks.tokenizer import VisualTokenizer
from vaevq_med.training.ema import exponential_moving_average
from vaevq_med.training.generator import GeneratorTrainer
from vaevq_med.training.tokenizer import TokenizerTrainer


@dataclass(frozen=True)
class AlignedOutput(TokenizerOutput):
    aligned: Tensor


class AlignedTokenizer(VisualTokenizer):
    """One with a trained head on the latent, as docs/adding_a_method.md says."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.head = nn.Conv2d(self.embedding_dim, 1, 1)

    def reconstruct_full(self, *args: Any, **kwargs: Any) -> AlignedOutput:
        output = super().reconstruct_full(*args, **kwargs)
        values = {entry.name: getattr(output, entry.name) for entry in fields(output)}
        return AlignedOutput(**values, aligned=self.head(output.latent))


class AlignmentLoss(LossTerm):
    """The head's output is to be 1."""

    def forward(self, target: Tensor, output: TokenizerOutput) -> Tensor:
        assert isinstance(output, AlignedOutput)
        return (output.aligned - 1).square().mean()


class OwnHead(LossTerm):
    """A head that belongs to nobody but the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 1)

    def forward(self, target: Tensor, output: TokenizerOutput) -> Tensor:
        return self.head(output.latent.mean(dim=(2, 3))).square().mean()


def with_head() -> AlignedTokenizer:
    plain = tokenizer()
    parts = {"encoder": plain.encoder, "decoder": plain.decoder, "quantizer": plain.quantizer}
    return AlignedTokenizer(**parts, embedding_dim=4)


def trainer(network: VisualTokenizer, term: LossTerm, further: tuple[nn.Parameter, ...] = ()) -> TokenizerTrainer:
    return TokenizerTrainer(
        device="cpu",
        max_epochs=1,
        train_data_loader=[{"image": torch.rand(2, 1, 16, 16) * 2 - 1}] * 3,
        epoch_length=3,
        network=network,
        optimizer=torch.optim.SGD([*network.parameters(), *further], lr=0.1),
        objective=TokenizerObjective(terms={"align": term}, weights={"align": 1.0}),
        ema=exponential_moving_average(network, decay=0.5),
        micro_batch_size=1,
    )


def test_a_part_of_the_network_is_trained_averaged_and_kept() -> None:
    network = with_head()
    engine = trainer(network, AlignmentLoss())
    before = network.head.weight.detach().clone()
    averaged = engine.ema.module.head.weight.clone()
    engine.run()
    assert not torch.equal(network.head.weight, before)
    assert not torch.equal(engine.ema.module.head.weight, averaged)
    assert "head.weight" in engine.ema.module.state_dict()


def test_a_loss_with_a_trained_part_of_its_own_is_refused() -> None:
    with pytest.raises(VaevqMedError, match=r"objective: .*terms\.align\.head\.weight.*network_def"):
        trainer(tokenizer(), OwnHead())


def test_a_frozen_part_of_a_loss_is_its_own_affair() -> None:
    trainer(tokenizer(), OwnHead().requires_grad_(False)).run()


def test_an_optimizer_of_parts_that_no_checkpoint_keeps_is_refused() -> None:
    outside = tuple(nn.Linear(2, 2).parameters())
    with pytest.raises(VaevqMedError, match=r"optimizer: found 2 of \d+ parameters outside"):
        trainer(tokenizer(), OwnHead().requires_grad_(False), outside)


def test_a_generators_loss_with_a_trained_part_is_refused() -> None:
    network = toy()

    class Weighted(TokenLoss):
        def __init__(self) -> None:
            super().__init__(network=network)
            self.weight = nn.Parameter(torch.ones(()))

    def made(loss: TokenLoss) -> GeneratorTrainer:
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        options: dict[str, Any] = {"device": "cpu", "max_epochs": 1, "epoch_length": 1, "train_data_loader": []}
        return GeneratorTrainer(**options, network=network, optimizer=optimizer, loss=loss)

    made(TokenLoss(network=network))
    with pytest.raises(VaevqMedError, match=r"loss_def: .*parameter weight"):
        made(Weighted())
