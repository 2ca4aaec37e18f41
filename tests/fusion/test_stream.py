"""Stored, missing and damaged blocks on their way into a cache: same bits, true accounts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvrag.errors import InputError, UnknownStrategyError
from kvrag.fusion import Fused, FusionRun, Prompt, create, fuse, strategy_names
from kvrag.fusion.cacheblend import CacheBlend
from kvrag.fusion.full import Full
from kvrag.fusion.layerwise import LayerwiseStrategy
from kvrag.fusion.reuse import Reuse
from kvrag.fusion.stream import BlockStream
from kvrag.store.errors import StoreError
from tests.fusion.checks import check_released, check_same_cache
from tests.fusion.rooms import CHUNKS, OTHER_PREFIX, PREFIX, QUESTION, Room
from tests.models.tiny_models import token_ids

PATTERNS = [(), (0,), (1,), (2,), (0, 2), (0, 1, 2)]


def check_accounts(room, prompt, prefilled, *, missing=(), strategy, prefix_cached):
    """The counts by their definition in `TokenCounts`."""
    tokens = prefilled.tokens
    assert tokens.prompt == tokens.reused + tokens.recomputed + tokens.computed
    assert min(tokens.reused, tokens.recomputed, tokens.computed) >= 0
    computed = len(prompt.question_ids) + (0 if prefix_cached else len(prompt.prefix_ids))
    if strategy.uses_blocks:
        computed += sum(len(prompt.chunks[i].token_ids) for i in missing)
    else:
        computed += prompt.context_tokens
    assert tokens.computed == computed
    expected = ["computed" if i in missing else "ram" for i in range(len(prompt.chunks))]
    if strategy.uses_blocks:
        assert list(prefilled.tiers) == expected
    else:
        assert set(prefilled.tiers) <= {"none"}


# ---- stored, missing and in any order ------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("strategy", [Reuse(), CacheBlend(ratio=0.3), CacheBlend(ratio=1.0)])
def test_missing_blocks_give_the_same_bits_as_stored_ones(tiny, dtype, strategy):
    """A request that computes a block goes on with what later ones will load."""
    folder = tiny("qwen3", "llama3")
    stored = Room(folder, dtype=dtype)
    stored.add(*CHUNKS)
    expected = stored.run(CHUNKS, strategy)
    for missing in PATTERNS:
        room = Room(folder, dtype=dtype)
        room.add(*(chunk for i, chunk in enumerate(CHUNKS) if i not in missing))
        first = room.run(CHUNKS, strategy)
        second = room.run(CHUNKS, strategy)
        for prefilled in (first, second):
            assert torch.equal(prefilled.logits, expected.logits), missing
            for ours, theirs in zip(prefilled.cache.k, expected.cache.k, strict=True):
                assert torch.equal(
                    ours[:, : expected.cache.length], theirs[:, : expected.cache.length]
                )
        assert first.tiers == tuple("computed" if i in missing else "ram" for i in range(3))
        assert second.tiers == ("ram",) * 3
        check_released(room)


def test_order_changes_neither_keys_nor_stored_bytes(tiny, tmp_path):
    def files(root):
        return {p.name: p.read_bytes() for p in root.rglob("*.kv")}

    folder = tiny("llama")
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        root = tmp_path / "".join(map(str, order))
        room = Room(folder, root=root)
        room.run([CHUNKS[i] for i in order], CacheBlend(ratio=0.3))
        room.run([CHUNKS[i] for i in order], Full())
    assert len(files(root)) == 3
    assert files(tmp_path / "012") == files(tmp_path / "210") == files(tmp_path / "120")


def test_stored_bytes_are_of_the_isolated_chunk(tiny):
    """Whatever prompt made the block: also one with another prefix, behind other chunks."""
    folder = tiny("qwen2")
    alone, within = Room(folder), Room(folder)
    alone.add(CHUNKS[1])
    within.run([CHUNKS[0], CHUNKS[1]], CacheBlend(ratio=1.0), prefix=OTHER_PREFIX)
    blocks = []
    for room in (alone, within):
        with room.blocks.open(CHUNKS[1]) as reader:
            blocks.append([bytes(view) for view in reader.read(0, 4)])
    assert blocks[0] == blocks[1]


def test_fusion_leaves_stored_kv_as_it_was(tiny):
    """Decoded tensors alias the store's memory; fusion must not write into them."""
    room = Room(tiny("llama"))
    room.add(*CHUNKS)
    with room.blocks.open(CHUNKS[1]) as reader:
        before = [bytes(view) for view in reader.read(0, 4)]
    for name in strategy_names():
        room.run(CHUNKS, create(name, 0.5))
    with room.blocks.open(CHUNKS[1]) as reader:
        assert [bytes(view) for view in reader.read(0, 4)] == before


def test_one_chunk_twice_in_a_prompt(tiny):
    folder = tiny("llama")
    room, other = Room(folder), Room(folder)
    chunks = [CHUNKS[0], CHUNKS[1], CHUNKS[0]]
    first = room.run(chunks, CacheBlend(ratio=0.3))
    other.add(*CHUNKS)
    second = other.run(chunks, CacheBlend(ratio=0.3))
    assert torch.equal(first.logits, second.logits)
    assert first.tokens.prompt == sum(
        (first.tokens.reused, first.tokens.recomputed, first.tokens.computed)
    )
    check_released(room)


def test_no_chunks_at_all(tiny):
    """Every passage may have been too long for the context."""
    room = Room(tiny("llama"))
    results = [room.run([], create(name)) for name in strategy_names()]
    for prefilled in results:
        torch.testing.assert_close(prefilled.logits, results[0].logits, atol=1e-10, rtol=0)
        assert prefilled.effective_ratio == 0
        assert prefilled.tiers == ()


# ---- accounts ------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    data=st.data(),
    lengths=st.lists(st.integers(1, 30), max_size=5),
    name=st.sampled_from(strategy_names()),
    ratio=st.floats(0, 1),
    match=st.booleans(),
)
def test_token_accounts_add_up(tiny, data, lengths, name, ratio, match):
    room = Room(tiny("llama"))
    chunks = [token_ids(length, seed=100 + i) for i, length in enumerate(lengths)]
    missing = data.draw(st.sets(st.integers(0, len(chunks) - 1)) if chunks else st.just(set()))
    room.add(*(chunk for i, chunk in enumerate(chunks) if i not in missing))
    prefix = PREFIX if match else OTHER_PREFIX
    warm = data.draw(st.booleans(), "prefix cached")
    if warm:
        room.run([], Reuse(), prefix=prefix)
    # Adding the stored blocks computes their corpus prefix.
    stored = len(missing) < len(chunks)
    prefix_cached = warm or (match and stored)
    strategy = create(name, ratio)
    prompt = room.prompt(chunks, prefix=prefix)
    prefilled = room.run(chunks, strategy, prefix=prefix)
    if match and missing and not prefix_cached and strategy.uses_blocks:
        return  # see test_prefix_computed_by_this_request_is_not_reused
    check_accounts(
        room, prompt, prefilled, missing=missing, strategy=strategy, prefix_cached=prefix_cached
    )
    if strategy.uses_blocks and not missing and chunks and match and len(chunks) == 1:
        assert prefilled.tokens.recomputed == 0


def test_prefix_computed_by_this_request_is_not_reused(tiny):
    """The first request of a process computed everything and reported its prefix as reused.

    Computing a missing chunk puts the corpus prefix into the prefix cache, where the same request
    then finds it.
    """
    prefilled = Room(tiny("llama")).run(CHUNKS, Reuse())
    assert prefilled.tokens.computed == prefilled.tokens.prompt
    assert prefilled.tokens.reused == 0


def test_effective_ratio_counts_isolated_computation(tiny):
    room = Room(tiny("llama"))
    assert room.run(CHUNKS, Reuse()).effective_ratio == 1.0
    assert room.run(CHUNKS, Reuse()).effective_ratio == 0.0
    assert room.run(CHUNKS, Full()).effective_ratio == 1.0
    fresh = Room(tiny("llama"))
    fresh.add(CHUNKS[0], CHUNKS[1])
    share = len(CHUNKS[2]) / sum(map(len, CHUNKS))
    assert fresh.run(CHUNKS, Reuse()).effective_ratio == pytest.approx(share)


# ---- damage --------------------------------------------------------------------------------------


def damage(root, room, chunk, where):
    """Flip one bit of the chunk's file; `where` is a share of its bytes behind the header."""
    (path,) = root.rglob(f"{room.blocks.key(chunk).digest}.kv")
    with room.blocks.open(chunk) as reader:
        segments = reader.header.segments
    at = segments[where].offset + 5
    content = bytearray(path.read_bytes())
    content[at] ^= 0x10
    path.write_bytes(content)


@pytest.mark.parametrize("segment", [0, 2, 3])
@pytest.mark.parametrize("damaged", [(0,), (2,), (0, 1, 2)])
@pytest.mark.parametrize("strategy", [Reuse(), CacheBlend(ratio=0.3)])
def test_block_damaged_on_the_way(tiny, tmp_path, segment, damaged, strategy):
    """Found when the layer is read, amid the run: the same answer, counted as computed."""
    folder = tiny("qwen3")
    room = Room(folder, root=tmp_path)
    room.add(*CHUNKS)
    expected = room.run(CHUNKS, strategy)
    assert expected.tiers == ("disk",) * 3
    for index in damaged:
        damage(tmp_path, room, CHUNKS[index], segment)
    prefilled = room.run(CHUNKS, strategy)
    assert torch.equal(prefilled.logits, expected.logits)
    check_same_cache(prefilled, expected)
    assert prefilled.tiers == tuple("computed" if i in damaged else "disk" for i in range(3))
    tokens = prefilled.tokens
    assert tokens.computed == len(QUESTION) + sum(len(CHUNKS[i]) for i in damaged)
    assert tokens.prompt == tokens.reused + tokens.recomputed + tokens.computed
    (tier,) = room.store.stats().tiers
    assert tier.damaged == len(damaged)
    assert room.run(CHUNKS, strategy).tiers == ("disk",) * 3
    check_released(room)


def test_file_gone_on_the_way(tiny, tmp_path):
    folder = tiny("llama")
    room = Room(folder, root=tmp_path)
    room.add(*CHUNKS)
    expected = room.run(CHUNKS, Reuse())
    sources = [room.blocks.open(chunk) for chunk in CHUNKS]
    for path in tmp_path.rglob("*.kv"):
        path.unlink()
    stream = BlockStream(
        sources,
        room.blocks.codec,
        lambda i: room.blocks.layers(room.blocks.compute(CHUNKS[i])),
        [0] * 4,
    )
    layers = [stream.next_layer() for _ in range(4)]
    stream.close()
    assert stream.computed == {0, 1, 2}
    assert len(layers[3]) == 3
    assert torch.equal(room.run(CHUNKS, Reuse()).logits, expected.logits)
    check_released(room)


# ---- the stream's life ---------------------------------------------------------------------------


def open_stream(room, *, recompute=None, num_layers=4):
    sources = [room.blocks.open(chunk) for chunk in CHUNKS]
    return BlockStream(sources, room.blocks.codec, recompute or pytest.fail, [0] * num_layers)


@pytest.fixture
def room(tiny, tmp_path):
    room = Room(tiny("llama"), root=tmp_path / "kv")
    room.add(*CHUNKS)
    yield room
    check_released(room)


@pytest.mark.parametrize("layers_read", [0, 1, 3, 4])
def test_close_at_any_point(room, layers_read):
    stream = open_stream(room)
    for _ in range(layers_read):
        assert len(stream.next_layer()) == 3
    stream.close()
    stream.close()
    with pytest.raises(RuntimeError, match=f"layer {layers_read}"):
        stream.next_layer()


def test_no_layer_behind_the_last(room):
    stream = open_stream(room)
    for _ in range(4):
        stream.next_layer()
    with pytest.raises(RuntimeError, match="layer 4"):
        stream.next_layer()
    stream.close()


class Broken(RuntimeError):
    pass


def test_error_in_the_reader_thread_reaches_the_caller(room, monkeypatch):
    def fail(self, segment, header):
        raise Broken("decoding failed")

    monkeypatch.setattr(type(room.blocks.codec), "decode", fail)
    with pytest.raises(Broken):
        room.run(CHUNKS, Reuse())


class BrokenRun(FusionRun):
    def __init__(self, layers, steps):
        self.layers, self.steps, self.cancelled = layers, steps, 0

    def step(self) -> Fused | None:
        self.layers.next_layer()
        self.steps -= 1
        if not self.steps:
            raise Broken("in a step")
        return None

    def cancel(self) -> None:
        self.cancelled += 1
        self.layers.close()


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_error_in_a_step_frees_the_run(room, steps):
    run = BrokenRun(open_stream(room), steps)
    with pytest.raises(Broken):
        fuse(run)
    assert run.cancelled == 1


def test_error_in_a_strategy_frees_the_run(room):
    class Failing(CacheBlend):
        name = "failing"

        def narrow(self, state):
            if state.index == 2:
                raise Broken("in a strategy")
            return CacheBlend.narrow(self, state)

    with pytest.raises(Broken):
        room.run(CHUNKS, Failing(ratio=0.5))


def test_error_at_the_start_frees_the_readers(room):
    class Failing(LayerwiseStrategy):
        name = "failing"

        def candidates(self, prompt):
            raise Broken("at the start")

    with pytest.raises(Broken):
        room.run(CHUNKS, Failing())


def test_error_between_the_decision_and_loading_frees_the_readers(room):
    """Nothing closed what was opened if the strategy failed before the stream had it."""

    class Failing(LayerwiseStrategy):
        name = "failing"

        def expected_visits(self, decoder, prompt):
            return None

        def first_chunks(self, decoder, prompt):
            raise Broken("after the decision")

    with pytest.raises(Broken):
        room.run(CHUNKS, Failing())


def test_error_of_the_stream_itself_frees_the_readers(room, monkeypatch):
    def fail():
        raise Broken("no threads")

    monkeypatch.setattr("kvrag.fusion.stream.block_stream.io_threads", fail)
    with pytest.raises(Broken):
        room.run(CHUNKS, Reuse())


def test_error_while_a_missing_block_is_computed_frees_the_others(room, monkeypatch):
    def fail(token_ids):
        raise Broken("out of memory")

    monkeypatch.setattr(room.blocks, "compute", fail)
    with pytest.raises(Broken):
        room.run([*CHUNKS, token_ids(5, seed=99)], Reuse())


@pytest.mark.parametrize("after", range(9))
def test_cancel_at_any_point(room, after):
    """Asked before the blocks are opened, and before each of the four layers."""
    asked = []

    def cancelled():
        asked.append(True)
        return len(asked) > after

    prefilled = room.run(CHUNKS, CacheBlend(ratio=0.3), cancelled=cancelled)
    assert (prefilled is None) == (after < 5)


def test_store_outage_during_a_put_is_a_warning(tiny, tmp_path):
    """The answer does not depend on the disk taking the block."""
    folder = tiny("llama")
    expected = Room(folder, root=tmp_path / "sound").run(CHUNKS, Reuse())
    room = Room(folder, root=tmp_path / "broken")
    (tmp_path / "broken" / "blocks").rename(tmp_path / "gone")
    (tmp_path / "broken" / "blocks").write_text("no folder")
    prefilled = room.run(CHUNKS, Reuse())
    assert torch.equal(prefilled.logits, expected.logits)
    assert prefilled.tiers == ("computed",) * 3
    assert len(prefilled.warnings) == 1
    assert "not stored" in prefilled.warnings[0]
    assert "disk" in prefilled.warnings[0]


def test_closed_store_is_an_error(room):
    room.store.close()
    with pytest.raises(StoreError, match="closed"):
        room.run(CHUNKS, Reuse())


# ---- prompts and strategies ----------------------------------------------------------------------


def test_prompt_positions():
    prompt = Prompt.build([1, 2], [[3], [4, 5]], [6], prefix_match=True)
    assert prompt.token_ids == (1, 2, 3, 4, 5, 6)
    assert [(c.start, c.end) for c in prompt.chunks] == [(2, 3), (3, 5)]
    assert (prompt.question_start, prompt.length, prompt.context_tokens) == (5, 6, 3)
    assert prompt.repairable.start == 3
    assert Prompt.build([1], [[3]], [6], prefix_match=False).repairable.start == 1
    assert Prompt.build([1], [], [6], prefix_match=True).repairable.start == 1


@pytest.mark.parametrize("parts", [([], [[1]], [1]), ([1], [[1]], []), ([1], [[1], []], [1])])
def test_prompt_with_an_empty_part(parts):
    with pytest.raises(ValueError, match="empty"):
        Prompt.build(*parts, prefix_match=True)


@given(ratio=st.one_of(st.floats(max_value=-1e-9), st.floats(min_value=1.0001)))
@example(ratio=float("nan"))
@example(ratio=float("inf"))
def test_ratio_out_of_range(ratio):
    for name in strategy_names():
        with pytest.raises(InputError, match="ratio"):
            create(name, ratio)


def test_unknown_strategy_names_the_known():
    with pytest.raises(UnknownStrategyError, match=r", fast, full, .*, reuse, true"):
        create("magic")
