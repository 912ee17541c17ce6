"""Sampling by static steps and captured graphs: the tokens of the growing cache, whatever is captured when."""

from __future__ import annotations

import contextlib
import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers.graphs import Recorder
from helpers.toy_networks import HEIGHT, WIDTH, K, grid, toy
from torch import Tensor

from vaevq_med.networks.generators import captured
from vaevq_med.networks.generators.autoregressive import generate_indices
from vaevq_med.networks.generators.captured import CudaGraphs, Replayed
from vaevq_med.networks.generators.llamagen import LlamaGen
from vaevq_med.networks.generators.static_steps import StepStore

BUCKET = 4
"""Narrower than a sequence of the tests, so that each crosses borders."""

GUIDED = {"guidance_scale": 2.5}
FILTERED = {"temperature": 1.5, "top_k": 7, "top_p": 0.8}


def store(**options: Any) -> StepStore:
    """Static steps that draw each place by itself, as the growing cache does."""
    return StepStore(**{"bucket": BUCKET, "places_at_once": 1, **options})


def sample(network: LlamaGen, seed: int = 0, **options: Any) -> Tensor:
    labels = torch.tensor([2, 0, 3])
    return generate_indices(network, **{"labels": labels, "generator": torch.Generator().manual_seed(seed), **options})


def inpainting(network: LlamaGen) -> dict[str, Tensor]:
    mask = torch.rand(3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(4)) < 0.4
    assert 0 < int(mask.sum()) < mask.numel()
    return {"known": grid(network, seed=5), "mask": mask}


@pytest.mark.parametrize("num_codebooks", [1, 2, 3])
def test_logits_are_those_of_the_growing_cache_at_every_place(num_codebooks: int) -> None:
    network = toy(num_codebooks=num_codebooks)
    tokens = grid(network).flatten(1)
    static = network.new_static_cache(3)
    with torch.no_grad():
        for labels in (torch.tensor([2, 0, 4]), torch.tensor([1, 1, 3])):  # the second finds what the first left
            growing = network.new_cache(3)
            static.restart()
            inputs = labels
            for place in range(network.sequence_length):
                end = (place // BUCKET + 1) * BUCKET
                options = {"codebook": place % num_codebooks, "end": end, "first": place == 0}
                found = network.static_step(inputs, static, **options)
                torch.testing.assert_close(found, network.step(inputs, growing), atol=2e-5, rtol=1e-5)
                assert static.place.tolist() == [place]
                static.place.add_(1)
                inputs = tokens[:, place]
    # The class token is turned to zero here too.
    assert not bool(static.keys[..., 0, :].any())


def test_what_lies_beyond_the_place_counts_for_nothing() -> None:
    network = toy()
    clean, dirty = network.new_static_cache(2), network.new_static_cache(2)
    dirty.keys.fill_(50.0)
    dirty.values.fill_(1e4)
    labels = torch.tensor([0, 1])
    with torch.no_grad():
        found = [network.static_step(labels, cache, codebook=0, end=16, first=True) for cache in (clean, dirty)]
    assert torch.equal(*found)


@pytest.mark.parametrize("num_codebooks", [1, 2])
@pytest.mark.parametrize("options", [{}, GUIDED, FILTERED, {**GUIDED, **FILTERED}, {"labels": None, "num_samples": 3}])
@pytest.mark.parametrize("inpaint", [False, True])
def test_tokens_are_those_of_the_growing_cache(num_codebooks: int, options: dict[str, Any], inpaint: bool) -> None:
    network = toy(num_codebooks=num_codebooks)
    options = {**options, **(inpainting(network) if inpaint else {})}
    expected = sample(network, **options)
    recorder = Recorder()
    for kept in (store(), store(graphs=recorder)):
        assert torch.equal(sample(network, store=kept, **options), expected)
        # Again, in memory that has been used.
        sample(network, seed=1, store=kept, **options)
        assert torch.equal(sample(network, store=kept, **options), expected)
    assert recorder.replays > 2 * network.sequence_length / 3
    if inpaint:
        assert torch.equal(expected[options["mask"]], options["known"][options["mask"]])


def test_memory_that_was_never_written_counts_for_nothing() -> None:
    network = toy(num_codebooks=2)
    expected = sample(network)
    torch.use_deterministic_algorithms(True)  # what is taken without a value is filled with NaN
    try:
        assert bool(torch.empty(3).isnan().all())
        found = sample(network, store=store())
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(found, expected)


def test_a_generator_for_each_sample() -> None:
    network = toy()

    def generators(seeds: list[int]) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    expected = sample(network, generator=generators([7, 8, 9]))
    assert torch.equal(sample(network, generator=generators([7, 8, 9]), store=store()), expected)
    # Whatever the number of places drawn together, a sample is alone in its batch.
    together = sample(network, generator=generators([7, 8, 9]), store=store(places_at_once=None))
    alone = sample(network, generator=generators([9]), labels=torch.tensor([3]), store=store(places_at_once=None))
    assert torch.equal(together[2:], alone)


def test_numbers_of_several_places_are_independent() -> None:
    """Untrained, every token is a draw from the uniform distribution: no index repeats from place to place."""
    torch.manual_seed(0)
    network = LlamaGen(num_embeddings=1000, grid_size=8, width=8, depth=1, num_heads=2).eval()
    kept = StepStore(places_at_once=16)
    tokens = generate_indices(network, num_samples=4, generator=torch.Generator().manual_seed(0), store=kept).flatten()
    assert len(tokens.unique()) == pytest.approx(1000 * (1 - math.exp(-0.256)), rel=0.1)


def test_the_network_runs_in_another_type_in_a_copy_that_is_kept() -> None:
    network = toy().train()
    kept = store()
    found = sample(network, dtype=torch.bfloat16, top_k=1, store=kept)
    assert network.training
    assert kept.last is not None
    copied = kept.last.network
    assert {parameter.dtype for parameter in copied.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    half = copy.deepcopy(network).bfloat16()
    assert torch.equal(sample(half, top_k=1, store=store()), found)
    assert torch.equal(sample(network, dtype=torch.bfloat16, top_k=1, store=kept), found)
    assert kept.last.network is copied


def test_each_key_is_captured_once_and_replayed_ever_after() -> None:
    network = toy(num_codebooks=2)  # 12 places; of 0 to 3, 4 to 7, 8 to 11 two of each codebook, but for the first
    recorder = Recorder()
    kept = store(graphs=recorder)
    sample(network, store=kept)
    # Place 0 has no graph. 1 to 3 warm up, as three do before the first capture; 4, 5, 8 and 9 are the first of their
    # keys; 6, 7, 10 and 11 are captured.
    assert (recorder.warm_ups, recorder.captures, recorder.replays) == (7, 4, 4)
    steps = kept.last
    assert steps is not None
    sample(network, store=kept)  # those of 1 and 2 are captured now
    assert (recorder.warm_ups, recorder.captures, recorder.replays) == (7, 6, 15)
    sample(network, store=kept)
    assert kept.last is steps
    assert (recorder.warm_ups, recorder.captures, recorder.replays) == (7, 6, 26)
    assert steps.replayed.replays == recorder.replays


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 1.1},
        {"guidance_scale": 2.0},
        {"top_k": 3},
        {"labels": torch.tensor([1, 2])},
        {"dtype": torch.bfloat16},
    ],
)
def test_another_setting_takes_other_steps(change: dict[str, Any]) -> None:
    network = toy()
    kept = store(graphs=Recorder())
    sample(network, store=kept)
    before = kept.last
    if "dtype" not in change:
        assert torch.equal(sample(network, store=kept, **change), sample(network, **change))
    else:
        sample(network, store=kept, **change)
    assert kept.last is not before


def test_other_weights_take_other_steps() -> None:
    network = toy()
    kept = store(graphs=Recorder())
    halves = sample(network, dtype=torch.bfloat16, store=kept)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(-1.5)
    changed = sample(network, dtype=torch.bfloat16, store=kept)
    assert torch.equal(changed, sample(network, dtype=torch.bfloat16, store=store()))
    assert not torch.equal(changed, halves)
    # Moved, as by ``network.to``: graphs would read where the weights were.
    before = kept.last
    network.norm.weight.data = network.norm.weight.data.clone()
    sample(network, dtype=torch.bfloat16, store=kept)
    assert kept.last is not before


def test_without_a_capture_sampling_goes_on() -> None:
    class Failing(Recorder):
        def capture(self, work: Callable[[], None]) -> Callable[[], None]:
            if self.captures == 1:
                raise RuntimeError("operation not permitted when stream is capturing")
            return super().capture(work)

    network = toy(num_codebooks=2)
    failing = Failing()
    kept = store(graphs=failing)
    with pytest.warns(UserWarning, match="no CUDA graph could be captured.*lower speed.*not permitted"):
        found = sample(network, store=kept)
    assert torch.equal(found, sample(network))
    replays = failing.replays
    assert torch.equal(sample(network, seed=1, store=kept), sample(network, seed=1))
    assert failing.replays == replays


def test_an_interruption_between_tokens_leaves_nothing_behind() -> None:
    network = toy()
    kept = store(graphs=Recorder())
    calls = []

    def interrupt(done: int, total: int) -> None:
        calls.append((done, total))
        if done == 5:
            raise KeyboardInterrupt

    network.train()
    with pytest.raises(KeyboardInterrupt):
        sample(network, store=kept, progress=interrupt)
    assert calls == [(done, 6) for done in range(1, 6)]
    assert network.training
    assert torch.equal(sample(network, store=kept), sample(network))


def test_works_are_done_once_a_call_whatever_is_captured() -> None:
    recorder = Recorder()
    replayed = Replayed(recorder, warm_ups=2)
    done: Counter[str] = Counter()
    for key in "aabbabba":
        replayed(key, lambda key=key: done.update(key))
    assert done == {"a": 4, "b": 4}
    # a warms up twice, as two do before the first capture, and b once.
    assert (recorder.warm_ups, recorder.captures, recorder.replays) == (3, 2, 5)
    replayed("c", lambda: done.update("c"))
    replayed("c", lambda: done.update("c"))
    assert (recorder.warm_ups, recorder.captures, done["c"]) == (4, 3, 2)


def test_the_recipe_of_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams wait for one another around the warm-up; a capture takes the shared pool, the own stream and no other."""
    events: list[Any] = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            events.append((self.name, "waits for", other.name))

    class Graph:
        def replay(self) -> None:
            events.append("replay")

    names = iter(["side", "capturing"])

    @contextlib.contextmanager
    def inside(what: Any) -> Iterator[None]:
        events.append(("enter", getattr(what, "name", what)))
        yield
        events.append(("leave", getattr(what, "name", what)))

    @contextlib.contextmanager
    def graph(made: Graph, *, pool: str, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        assert isinstance(made, Graph)
        events.append(("capture", pool, stream.name, capture_error_mode))
        yield
        events.append("captured")

    fakes = {
        "Stream": lambda: Stream(next(names)),
        "current_stream": lambda: Stream("current"),
        "graph_pool_handle": lambda: "pool",
        "CUDAGraph": Graph,
        "stream": inside,
        "device": inside,
        "graph": graph,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(captured.torch.cuda, name, fake)
    graphs = CudaGraphs("gpu")  # type: ignore[arg-type]
    device = [("enter", "gpu"), ("leave", "gpu")]
    assert events == device
    events.clear()
    graphs.warm_up(lambda: events.append("work"))
    waits = [("side", "waits for", "current"), ("current", "waits for", "side")]
    assert events == [device[0], waits[0], ("enter", "side"), "work", ("leave", "side"), waits[1], device[1]]
    events.clear()
    replay = graphs.capture(lambda: events.append("work"))
    assert events == [device[0], ("capture", "pool", "capturing", "thread_local"), "work", "captured", device[1]]
    events.clear()
    replay()
    assert events == ["replay"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("num_codebooks", [1, 2])
@pytest.mark.parametrize("options", [{}, {**GUIDED, **FILTERED}])
@pytest.mark.parametrize("inpaint", [False, True])
def test_graphs_on_a_gpu_draw_what_eager_steps_draw(num_codebooks: int, options: dict[str, Any], inpaint: bool) -> None:
    network = toy(num_codebooks=num_codebooks).cuda()
    options = {**options, **(inpainting(network) if inpaint else {})}

    def draw(kept: StepStore | None, seed: int) -> Tensor:
        generators = [torch.Generator("cuda").manual_seed(seed + number) for number in range(3)]
        return sample(network, store=kept, generator=generators, **options)

    graphs, eager = StepStore(bucket=BUCKET), StepStore(bucket=BUCKET, eager=True)
    for seed in (0, 10):
        found = draw(graphs, seed)
        assert torch.equal(found, draw(eager, seed))
        assert torch.equal(found, draw(graphs, seed))
        assert torch.equal(found, draw(None, seed))
    assert graphs.last is not None
    assert eager.last is not None
    assert graphs.last.replayed.replays > 2 * network.sequence_length
    assert eager.last.replayed.replays == 0
    if inpaint:
        mask = options["mask"]
        assert torch.equal(found.cpu()[mask], options["known"][mask])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_bf16_graphs_of_a_gpu_cross_buckets() -> None:
    torch.manual_seed(0)
    network = LlamaGen(num_embeddings=512, grid_size=20, width=128, depth=2, num_heads=2, num_classes=4).cuda().eval()
    with torch.no_grad():
        network.heads[0].weight.normal_(std=0.2)
    labels = torch.arange(4, device="cuda")

    def draw(kept: StepStore) -> Tensor:
        generator = torch.Generator("cuda").manual_seed(0)
        options = {"guidance_scale": 2.0, "top_k": 50, "top_p": 0.9, "dtype": torch.bfloat16}
        return generate_indices(network, labels=labels, generator=generator, store=kept, **options)

    graphs = StepStore()
    found = draw(graphs)
    assert torch.equal(found, draw(StepStore(eager=True)))
    assert graphs.last is not None
    assert graphs.last.replayed.replays > 390 - 10
    # No wait for the device between tokens: a second call, all replays, reads nothing back.
    with torch.cuda.device("cuda"):
        torch.cuda.set_sync_debug_mode("error")
        try:
            again = draw(graphs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(again, found)


def test_the_tests_cross_borders() -> None:
    assert 1 < HEIGHT * WIDTH / BUCKET
    assert K > FILTERED["top_k"] > 1
