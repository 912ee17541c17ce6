"""Codebooks of moving averages: by hand, with revival, in two processes, against a peer, and in the bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BUNDLE, OVERLAYS
from helpers import ddp_codebook
from helpers.bundles import evaluate, quick, run_bundle, states_equal
from helpers.processes import run_in_two
from ignite.engine import Events
from monai.bundle import ConfigWorkflow

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.quantizers import VectorQuantizerEMA
from vaevq_med.networks.quantizers.ema import assignment_totals, draw_replacements
from vaevq_med.trained.file import read_checkpoint


def on_a_line(*codewords: float, **options: Any) -> VectorQuantizerEMA:
    """Codewords of one dimension, with n = 1 and m = e."""
    quantizer = VectorQuantizerEMA(num_embeddings=len(codewords), embedding_dim=1, **options)
    table = torch.tensor(codewords).unsqueeze(1)
    quantizer.embedding.copy_(table)
    quantizer.embedding_sum.copy_(table)
    return quantizer


def test_an_update_by_hand() -> None:
    quantizer = on_a_line(0.0, 10.0, decay=0.75, epsilon=0.5)
    output = quantizer(torch.tensor([1.0, 2.0, 3.0, 8.0]).view(1, 1, 2, 2))
    # The output is that of the codebook before the update.
    assert output.indices.flatten().tolist() == [0, 0, 0, 1]
    assert output.quantized.flatten().tolist() == [0.0, 0.0, 0.0, 10.0]
    assert output.codebook is not None
    assert output.codebook.flatten().tolist() == [0.0, 10.0]
    assert set(output.losses) == {"commitment"}
    assert float(output.losses["commitment"]) == pytest.approx((1 + 4 + 9 + 4) / 4)
    # n = 3/4 (1, 1) + 1/4 (3, 1), m = 3/4 (0, 10) + 1/4 (6, 8)
    assert quantizer.cluster_size.tolist() == [1.5, 1.0]
    assert quantizer.embedding_sum.flatten().tolist() == [1.5, 9.5]
    # n' = (n + 1/2) / (2.5 + 1) * 2.5 = (10/7, 7.5/7)
    assert quantizer.codebook().flatten().tolist() == pytest.approx([1.5 * 7 / 10, 9.5 * 7 / 7.5])


def test_it_comes_to_rest_at_the_means_of_its_clusters() -> None:
    quantizer = on_a_line(-1.0, 1.0, decay=0.5)
    z = torch.tensor([-3.0, -5.0, 2.0, 3.0, 7.0, -4.0]).view(1, 1, 2, 3)
    for _ in range(40):
        quantizer(z)
    assert quantizer.codebook().flatten().tolist() == pytest.approx([-4.0, 4.0], rel=1e-4)
    assert quantizer.cluster_size.tolist() == pytest.approx([3.0, 3.0])


def test_an_unused_codeword_holds_its_place_until_the_smoothing_outweighs_it() -> None:
    quantizer = on_a_line(0.0, 10.0, decay=0.5)
    places = []
    for _ in range(40):
        quantizer(torch.zeros(1, 1, 1, 1))
        places.append(float(quantizer.codebook()[1]))
    assert places[4] == pytest.approx(10.0, rel=1e-3)
    assert abs(places[-1]) < 1e-4


def test_no_optimizer_sees_it_and_its_state_is_kept() -> None:
    quantizer = on_a_line(0.0, 10.0)
    assert list(quantizer.parameters()) == []
    assert set(quantizer.state_dict()) == {"embedding", "cluster_size", "embedding_sum"}
    z = torch.tensor([1.0, 8.0]).view(1, 1, 1, 2).requires_grad_()
    output = quantizer(z)
    assert not output.codes.requires_grad
    (gradient,) = torch.autograd.grad(output.losses["commitment"], z)
    assert gradient.flatten().tolist() == [1.0, -2.0]


def test_each_accumulated_chunk_is_an_update() -> None:
    quantizer = on_a_line(0.0, decay=0.5)
    for value in (4.0, 8.0):
        quantizer(torch.full((1, 1, 1, 1), value))
    assert quantizer.embedding_sum.item() == 5.0
    assert quantizer.cluster_size.item() == 1.0


def test_a_codeword_below_the_threshold_takes_a_latent_of_the_batch() -> None:
    quantizer = on_a_line(0.0, 10.0, 20.0, decay=0.5, revival_threshold=0.6, revival_count=2.0)
    z = torch.tensor([1.0, 2.0, 11.0, 12.0]).view(1, 1, 2, 2)
    quantizer(z)
    # The third is unused: its count fell to 0.5; the others have 1.5.
    assert quantizer.cluster_size.tolist() == [1.5, 1.5, 2.0]
    assert float(quantizer.codebook()[2]) in z.flatten().tolist()
    assert float(quantizer.embedding_sum[2]) == 2 * float(quantizer.codebook()[2])
    assert quantizer.embedding_sum[:2].flatten().tolist() == [1.5, 16.5]
    # With a latent's value it is used, and now it is an average like the others.
    assert 2 in quantizer.eval()(z).indices


def test_the_default_count_of_a_revived_codeword_is_the_threshold() -> None:
    quantizer = on_a_line(0.0, 100.0, decay=0.5, revival_threshold=0.75)
    quantizer(torch.ones(1, 1, 1, 1))
    assert quantizer.cluster_size.tolist() == [1.0, 0.75]
    assert quantizer.codebook()[1].item() == 1.0
    assert quantizer.embedding_sum[1].item() == 0.75


@pytest.mark.parametrize("copies", [1, 8])
def test_a_share_goes_by_the_mean_count(copies: int) -> None:
    """A batch of eight times as many tokens revives the same codewords, and gives them eight times the count."""
    quantizer = on_a_line(0.0, 10.0, 99.0, decay=0.5, revival_share=0.5, revival_count=0.75)
    quantizer.cluster_size.fill_(copies)
    quantizer.embedding_sum.mul_(copies)
    values = torch.tensor([1.0, -1.0, 2.0, 11.0, 12.0, 9.0])
    quantizer(values.repeat(copies).view(1, 1, -1))
    # Counts 1/2 + 3/2, 1/2 + 3/2 and 1/2, times the copies, of mean 1.5: the third is below half of it.
    assert quantizer.cluster_size.tolist() == [2 * copies, 2 * copies, 0.75 * 1.5 * copies]
    assert quantizer.codebook()[2].item() in values.tolist()
    assert quantizer.embedding_sum[2].item() == quantizer.cluster_size[2].item() * quantizer.codebook()[2].item()
    assert quantizer.embedding_sum[:2].flatten().tolist() == [1 * copies, 21 * copies]


def test_a_share_is_a_threshold_of_the_mean_count() -> None:
    """Where the mean count stays 4, an eighth and a half of it are the counts 0.5 and 2."""
    states = []
    for revival in (
        {"revival_share": 0.125, "revival_count": 0.5},
        {"revival_threshold": 0.5, "revival_count": 2.0},
    ):
        torch.manual_seed(0)
        quantizer = VectorQuantizerEMA(num_embeddings=16, embedding_dim=2, decay=0.5, **revival)
        draws = torch.Generator().manual_seed(1)
        revived = 0
        for _ in range(12):
            # A revived codeword raises the counts' sum: they are brought back to a mean of 4.
            quantizer.cluster_size.mul_(4 / quantizer.cluster_size.mean())
            unused = quantizer.cluster_size.clone()
            quantizer(torch.randn(4, 2, 4, 4, generator=draws) + 3)
            revived += int((quantizer.cluster_size > unused).sum())
        states.append(quantizer.state_dict())
        assert revived > 0
    assert not torch.equal(states[0]["embedding"], torch.zeros(16, 2))
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, msg=key)


def test_replacements_are_different_latents_and_repeat_with_the_generator() -> None:
    latents = torch.arange(50.0).unsqueeze(1)
    expired = torch.arange(30) % 3 == 0
    torch.manual_seed(0)
    state = torch.get_rng_state()
    revived, drawn = draw_replacements(latents, expired)
    assert torch.equal(revived, expired)
    drawn = drawn[revived]
    assert len(set(drawn.flatten().tolist())) == 10
    assert set(drawn.flatten().tolist()) < set(latents.flatten().tolist())
    assert not torch.equal(draw_replacements(latents, expired)[1][expired], drawn)
    torch.set_rng_state(state)
    assert torch.equal(draw_replacements(latents, expired)[1][expired], drawn)


@pytest.mark.parametrize("num_present", [0, 3, 30])
def test_a_latent_that_does_not_count_is_never_drawn(num_present: int) -> None:
    torch.manual_seed(0)
    latents = torch.arange(60.0).unsqueeze(1)
    present = torch.randperm(60) < num_present
    expired = torch.arange(40) % 2 == 1
    revived, drawn = draw_replacements(latents, expired, present)
    assert int(revived.sum()) == min(num_present, 20)
    assert not bool((revived & ~expired).any())
    found = drawn[revived].flatten().long().tolist()
    assert len(set(found)) == len(found)
    assert set(found) <= set(present.nonzero().flatten().tolist())
    if num_present == 3:
        assert revived.nonzero().flatten().tolist() != [1, 3, 5]


def test_more_expired_codewords_than_latents_share_none() -> None:
    torch.manual_seed(0)
    expired = torch.arange(40) % 2 == 1
    revived, drawn = draw_replacements(torch.tensor([[1.0], [2.0]]), expired)
    assert sorted(drawn[revived].flatten().tolist()) == [1.0, 2.0]
    assert int(revived.sum()) == 2
    assert not bool((revived & ~expired).any())
    assert revived.nonzero().flatten().tolist() != [1, 3]


def test_nothing_expired_draws_nothing() -> None:
    revived, drawn = draw_replacements(torch.ones(4, 3), torch.zeros(5, dtype=torch.bool))
    assert not bool(revived.any())
    assert tuple(drawn.shape) == (5, 3)


def test_revival_brings_a_collapsed_codebook_into_use() -> None:
    """All latents lie far from the codebook, where one codeword is nearest to nearly all of them."""
    used = {}
    for name, options in {"off": {}, "on": {"revival_threshold": 0.5, "revival_count": 1.0}}.items():
        torch.manual_seed(0)
        quantizer = VectorQuantizerEMA(num_embeddings=64, embedding_dim=4, decay=0.9, **options)
        z = 20 + torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        for _ in range(30):
            quantizer(z)
        used[name] = len(quantizer.eval()(z).indices.unique())
    assert used["off"] <= 6
    assert used["on"] >= 60


def test_totals_are_those_of_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(300, 5, generator=generator)
    indices = torch.randint(0, 7, (300,), generator=generator)
    counts, sums = assignment_totals(latents, indices, 9)
    assert counts.tolist() == [indices.tolist().count(k) for k in range(9)]
    for k in range(9):
        torch.testing.assert_close(sums[k].double(), latents[indices == k].double().sum(dim=0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"decay": 1.0}, r"decay is 1.0; expected a number in \(0, 1\)"),
        ({"epsilon": 0.0}, "epsilon is 0.0; expected a number above 0"),
        ({"revival_threshold": 0.0}, "revival_threshold is 0.0"),
        ({"revival_count": 1.0}, "revival_count is 1.0 with revival_threshold None"),
        ({"revival_share": 0.1, "revival_threshold": 0.2}, "0.2 with revival_share 0.1; expected one of the two"),
        ({"revival_share": 0.0}, "revival_share is 0.0 and revival_count 0.0; expected a share above 0"),
        ({"revival_share": 0.6, "revival_count": 0.5}, "revival_share is 0.6 and revival_count 0.5"),
        ({"revival_share": 0.6, "revival_count": 1.5}, "a count from it to 1"),
        ({"revival_threshold": 2.0, "revival_count": 1.0}, "expected a threshold and a count of at least it"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, float], said: str) -> None:
    with pytest.raises(VaevqMedError, match=said):
        VectorQuantizerEMA(num_embeddings=4, embedding_dim=2, **options)


@pytest.mark.slow
def test_two_processes_keep_the_codebook_of_one(tmp_path: Path) -> None:
    first, second = run_in_two(ddp_codebook, tmp_path)
    one = ddp_codebook.train(0, slice(None))
    start = {name: quantizer.state_dict() for name, quantizer in ddp_codebook.quantizers().items()}
    for name in one:
        assert states_equal(first[name], second[name]), name
        for key, value in one[name].items():
            torch.testing.assert_close(first[name][key], value, msg=lambda text, n=name, k=key: f"{n} {k}: {text}")
            assert not torch.equal(value, start[name][key]), f"{name} {key} never moved"


@pytest.mark.peer
@pytest.mark.parametrize("threshold", [None, 1.5])
def test_it_agrees_with_vector_quantize_pytorch(threshold: float | None) -> None:
    """Intended differences: none beside the start of the codebook, N(0, I) here, Kaiming uniform there.

    No more codewords than latents: of more, a random part is revived, which is drawn in another order here.
    """
    import vector_quantize_pytorch as peer

    torch.manual_seed(0)
    theirs = peer.VectorQuantize(
        dim=4,
        codebook_size=24,
        decay=0.9,
        accept_image_fmap=True,
        rotation_trick=False,
        threshold_ema_dead_code=threshold or 0,
    )
    ours = VectorQuantizerEMA(num_embeddings=24, embedding_dim=4, decay=0.9, revival_threshold=threshold)
    theirs.codebook = ours.codebook()
    theirs._codebook.embed_avg.copy_(ours.embedding_sum)
    for step in range(6):
        z = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(step))
        direction = torch.randn(z.shape, generator=torch.Generator().manual_seed(100 + step))
        found = []
        for quantizer in (theirs, ours):
            torch.manual_seed(step)
            latent = z.clone().requires_grad_()
            result = quantizer(latent)
            if quantizer is theirs:
                quantized, indices, commitment = result
            else:
                quantized, indices, commitment = result.quantized, result.indices[..., 0], result.losses["commitment"]
            (gradient,) = torch.autograd.grad((quantized * direction).sum() + 0.25 * commitment.sum(), latent)
            found.append((quantized, indices, commitment.reshape(()), gradient))
        assert len(found[0][1].unique()) > 3
        for peers, own in zip(*found, strict=True):
            torch.testing.assert_close(own, peers)
        torch.testing.assert_close(ours.codebook(), theirs.codebook)
        torch.testing.assert_close(ours.cluster_size, theirs._codebook.cluster_size[0])
        torch.testing.assert_close(ours.embedding_sum, theirs._codebook.embed_avg[0])
    assert (float(ours.cluster_size.min()) >= 1.5) == (threshold is not None)


@pytest.mark.parametrize("overlay", ["vqgan_ema", "rvq"])
def test_the_overlay_trains_and_evaluates(overlay: str, toy_overrides: dict[str, Any]) -> None:
    overrides = quick(toy_overrides)
    parser = run_bundle("train.json", overrides, overlay, run_id="training")
    terms = parser.get_parsed_content("train#trainer").state.terms
    assert terms["commitment"] > 0
    assert "codebook" not in terms
    network = parser.get_parsed_content("network")
    moved = [value for name, value in network.named_buffers() if name.endswith("cluster_size")]
    assert moved
    assert all(not bool((value == 1).all()) for value in moved)
    evaluate(overrides)


def test_the_overlay_with_revival_evaluates_and_resumes_as_an_unbroken_run(
    toy_overrides: dict[str, Any], tmp_path: Path
) -> None:
    overrides = {
        **quick(toy_overrides),
        "checkpoint_interval": 1,
        "network_def#quantizer#decay": 0.5,
        "network_def#quantizer#revival_share": None,
        "network_def#quantizer#revival_threshold": 20.0,
        "network_def#quantizer#revival_count": 40.0,
    }
    overlay = OVERLAYS / "vqgan_ema_revival.json"
    whole, broken = ({**overrides, "output_dir": str(tmp_path / name)} for name in ("whole", "broken"))
    run_bundle("train.json", whole, "vqgan_ema_revival", run_id="training")
    workflow = ConfigWorkflow(
        config_file=[str(BUNDLE / "train.json"), str(overlay)], workflow_type="train", run_id="training", **broken
    )
    workflow.initialize()
    trainer = workflow.parser.get_parsed_content("train#trainer")

    def stop(engine: Any) -> None:
        if engine.state.iteration == 2:
            raise KeyboardInterrupt

    trainer.add_event_handler(Events.ITERATION_COMPLETED, stop)
    with pytest.raises(SystemExit, match="130"):
        workflow.run()
    run_bundle("train.json", broken, "vqgan_ema_revival", run_id="training")
    first, second = (read_checkpoint(tmp_path / name / "checkpoints" / "last.pt") for name in ("whole", "broken"))
    assert first["iteration"] == second["iteration"] == 4
    for key in ("network", "ema", "optimizer", "rng"):
        assert states_equal(first[key], second[key]), key
    # Latents took the place of codewords between the stop and the end.
    assert 40.0 in first["network"]["quantizer.cluster_size"].tolist()
    evaluate(broken)
