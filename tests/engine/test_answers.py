"""The engine from the outside: passages in, answer out, whatever is stored and whoever asks."""

from __future__ import annotations

import json
import shutil
import threading

import pytest
import torch

from kvrag import Engine, Settings
from kvrag.errors import ClosedError, PromptTooLongError
from kvrag.fusion import strategy_names
from kvrag.passages import passage_chunks
from kvrag.retrieval.chunking import render_chunk
from kvrag.stream import UnfinishedError

PASSAGES = [
    "Anna keeps the lamp of Karsk.",
    {"title": "Karsk", "text": "The ferry leaves when the lamp is lit."},
    {"text": "It burns all night. 東京 <|im_end|>"},
]
QUESTION = "Who keeps the lamp?"


def open_engine(folder, home, **settings):
    options = {"dtype": "float64", "threads": 1, "strategy": "cacheblend"} | settings
    return Engine.open(
        Settings(model=str(folder), home=home, models_dir=home.parent / "models", **options)
    )


@pytest.fixture
def engine(tiny, tmp_path):
    with open_engine(tiny("qwen3", "llama3"), tmp_path / "home") as engine:
        yield engine


def ask(engine, question=QUESTION, passages=PASSAGES, **options):
    return engine.answer(question, passages=passages, **({"max_tokens": 8} | options))


def check_report(answer, *, passages=3):
    report, tokens = answer.report, answer.report.tokens
    assert tokens.prompt == tokens.reused + tokens.recomputed + tokens.computed
    assert min(tokens.reused, tokens.recomputed, tokens.computed) >= 0
    spans = report.spans
    assert min(spans.retrieve, spans.load, spans.stall, spans.compute, spans.decode) >= 0
    assert 0 < report.ttft_s < 60
    assert report.effective_ratio >= 0
    assert len(answer.sources) == passages


# ---- the prompt ----------------------------------------------------------------------------------


def test_prompt_is_the_concatenation_of_stored_ids(engine, tiny):
    """Prefix, chunks and question encoded alone: whatever stands around a chunk, its ids hold."""
    tokenizer = engine.model.tokenizer
    template = tokenizer.render_chat(
        [
            {"role": "system", "content": engine.settings.instruction},
            {"role": "user", "content": "@@"},
        ]
    )
    head, tail = template.split("@@")
    chunks = [
        render_chunk("", PASSAGES[0]),
        render_chunk("Karsk", PASSAGES[1]["text"]),
        render_chunk("", PASSAGES[2]["text"]),
    ]
    expected = (
        *tokenizer.encode_template(head + "Passages:\n\n"),
        *(token_id for chunk in chunks for token_id in tokenizer.encode(chunk)),
        *tokenizer.encode(f"Question: {QUESTION}"),
        *tokenizer.encode_template(tail),
    )
    assert engine.prompt_ids(QUESTION, PASSAGES) == expected
    assert list(expected).count(2) == 2, "the passage's own <|im_end|> must stay text"


def test_every_strategy_has_the_same_prompt(engine):
    length = len(engine.prompt_ids(QUESTION, PASSAGES))
    for name in strategy_names():
        prefilled = engine.prefill(QUESTION, passages=PASSAGES, strategy=name, new_tokens=1)
        assert prefilled.tokens.prompt == prefilled.cache.length == length
    for ratio in (0.0, 0.3, 1.0):
        assert ask(engine, ratio=ratio).report.tokens.prompt == length


def test_logits_equal_a_plain_pass_over_the_prompt(engine, tiny):
    from tests.models.tiny_models import reference_model

    ids = engine.prompt_ids(QUESTION, PASSAGES)
    hf = reference_model(tiny("qwen3", "llama3"))
    with torch.inference_mode():
        expected = hf(torch.tensor([ids])).logits[0, -1:]
    for options in ({"strategy": "full"}, {"strategy": "cacheblend", "ratio": 1.0}):
        prefilled = engine.prefill(QUESTION, passages=PASSAGES, new_tokens=1, **options)
        torch.testing.assert_close(prefilled.logits, expected, atol=1e-8, rtol=0)


def test_a_text_and_a_mapping_are_the_same_passage(engine):
    text = "Anna keeps the lamp."
    forms = [text, {"text": text}, {"title": "", "text": text}, {"title": None, "text": text}]
    made = passage_chunks(forms, engine.model.tokenizer)
    assert len({chunk.token_ids for chunk in made}) == 1
    assert ask(engine, passages=forms[:1]).text == ask(engine, passages=tuple(forms[1:2])).text


# ---- the report ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", strategy_names())
def test_report(engine, name):
    first = ask(engine, strategy=name)
    second = ask(engine, strategy=name)
    for answer in (first, second):
        check_report(answer)
        assert answer.report.strategy == name
        assert answer.report.prefix_match
        assert answer.report.dropped == ()
        assert answer.report.warnings == ()
        assert [source.id for source in answer.sources] == ["passage-0", "passage-1", "passage-2"]
        assert answer.sources[1].title == "Karsk"
        assert answer.sources[1].document is None
        assert answer.sources[1].score is None
    assert first.text == second.text
    assert first.token_ids == second.token_ids
    if name == "full":
        assert {s.tier for s in first.sources} == {"none"}
        assert second.report.effective_ratio == 1
    else:
        assert {s.tier for s in first.sources} == {"computed"}
        assert {s.tier for s in second.sources} == {"ram"}
        assert second.report.effective_ratio < first.report.effective_ratio
        assert second.report.tokens.reused > 0
    content = json.loads(json.dumps(second.to_dict()))
    assert content["answer"] == second.text
    assert content["report"]["tokens"]["prompt"] == second.report.tokens.prompt


def test_stream_is_the_answer_in_pieces(engine):
    stream = engine.stream(QUESTION, passages=PASSAGES, max_tokens=20)
    with pytest.raises(UnfinishedError):
        _ = stream.answer
    assert [source.tier for source in stream.sources] == ["", "", ""]
    pieces = list(stream)
    assert len(pieces) > 1
    assert "".join(pieces) == stream.answer.text == ask(engine, max_tokens=20).text
    assert [source.tier for source in stream.sources] == ["computed"] * 3
    assert stream.answer.sources == stream.sources


@pytest.mark.parametrize("after", [0, 1, 3, 6, 20])
def test_cancelled_anywhere(engine, after):
    """Between blocks, layers and tokens; nothing stays open and the report still adds up."""
    asked = []

    def cancelled():
        asked.append(True)
        return len(asked) > after

    answer = ask(engine, max_tokens=50, cancelled=cancelled)
    assert answer.finish_reason == "cancelled"
    assert engine.stats().open_blocks == 0
    tokens = answer.report.tokens
    assert tokens.prompt == tokens.reused + tokens.recomputed + tokens.computed
    assert ask(engine).finish_reason == "length"


def test_stream_cancelled_by_its_reader(engine):
    whole = ask(engine, max_tokens=30)
    stream = engine.stream(QUESTION, passages=PASSAGES, max_tokens=30)
    pieces = []
    for piece in stream:
        pieces.append(piece)
        stream.cancel()
    assert stream.answer.finish_reason == "cancelled"
    assert whole.text.startswith("".join(pieces))
    unread = engine.stream(QUESTION, passages=PASSAGES)
    unread.cancel()
    assert list(unread) == []
    assert unread.answer.finish_reason == "cancelled"


def test_abandoned_stream_holds_nothing(engine):
    stream = engine.stream(QUESTION, passages=PASSAGES, max_tokens=30)
    next(iter(stream))
    del stream
    assert engine.stats().open_blocks == 0


# ---- logprobs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"strategy": "full"}, {"ratio": 0.3}, {"strategy": "reuse"}])
def test_continuation_takes_no_part_in_the_selection(engine, options):
    """Row 0 is the same bits for all continuations; row i depends on the tokens before it only."""
    ids = engine.model.tokenizer.encode("the lamp of Karsk is lit when the ferry leaves")

    def rows(token_ids):
        return engine.logprobs(QUESTION, passages=PASSAGES, continuation=token_ids, **options)

    whole = rows(ids)
    assert whole.shape == (len(ids), 400)
    assert whole.dtype is torch.float32
    torch.testing.assert_close(whole.exp().sum(-1), torch.ones(len(ids)))
    assert torch.equal(rows(ids[:1])[0], whole[0])
    assert torch.equal(rows([300])[0], whole[0])
    assert torch.equal(rows([300, 301, 302])[0], whole[0])
    for n in (2, 5, len(ids) - 1):
        torch.testing.assert_close(rows(ids[:n]), whole[:n], atol=1e-6, rtol=0)
        changed = rows([*ids[:n], 300, *ids[n + 1 :]])
        torch.testing.assert_close(changed[: n + 1], whole[: n + 1], atol=1e-6, rtol=0)


def test_logprobs_are_those_that_decoding_samples_from(engine):
    answer = ask(engine, max_tokens=12, ratio=0.3)
    rows = engine.logprobs(QUESTION, passages=PASSAGES, continuation=answer.token_ids, ratio=0.3)
    assert tuple(rows.argmax(-1).tolist()) == answer.token_ids


def test_logprobs_of_a_text_are_those_of_its_ids(engine):
    ids = engine.model.tokenizer.encode("Anna")
    a = engine.logprobs(QUESTION, passages=PASSAGES, continuation="Anna")
    b = engine.logprobs(QUESTION, passages=PASSAGES, continuation=torch.tensor(ids))
    assert torch.equal(a, b)


def test_scoring_first_does_not_disturb_answering(tiny, tmp_path):
    """Scoring runs in inference mode; the prefix it leaves in the cache serves other requests."""
    folder = tiny("qwen3", "llama3")
    with open_engine(folder, tmp_path / "one") as engine:
        expected = ask(engine)
    with open_engine(folder, tmp_path / "two") as engine:
        engine.logprobs(QUESTION, passages=PASSAGES, continuation="Anna")
        assert ask(engine).token_ids == expected.token_ids
        engine.logprobs(QUESTION, passages=PASSAGES, continuation="Anna")


# ---- homes ---------------------------------------------------------------------------------------


def test_restart_reuses_what_is_stored(tiny, tmp_path):
    folder, home = tiny("llama"), tmp_path / "home"
    with open_engine(folder, home) as engine:
        first = engine.prefill(QUESTION, passages=PASSAGES, new_tokens=1, ratio=0.3)
        answer = ask(engine)
    with open_engine(folder, home) as engine:
        again = engine.prefill(QUESTION, passages=PASSAGES, new_tokens=1, ratio=0.3)
        assert again.tiers == ("disk",) * 3
        assert torch.equal(again.logits, first.logits)
        assert {s.tier for s in ask(engine).sources} == {"ram"}
        assert ask(engine).token_ids == answer.token_ids
        assert ask(engine, passages=PASSAGES[::-1]).report.tokens.computed < 40


def test_blocks_behind_a_template_with_a_date_are_found_again(tiny, tmp_path):
    """A chat template may write today's date (Llama 3 does): the prefix changed every day.

    The prefix is part of every block key, so a day later nothing of a corpus was found any more.
    A corpus prefix is fixed when the corpus is made.
    """
    folder = shutil.copytree(tiny("llama"), tmp_path / "model")
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }} at {{ strftime_now('%H:%M:%S.%f') }}\n"
        "{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    )
    (folder / "chat_template.jinja").write_text(template)
    home = tmp_path / "home"
    with open_engine(folder, home) as engine:
        ask(engine)
    with open_engine(folder, home) as engine:
        assert {s.tier for s in ask(engine).sources} == {"disk"}


def test_models_and_dtypes_in_one_home_never_answer_for_one_another(tiny, tmp_path):
    home = tmp_path / "home"
    cases = [
        (tiny("llama"), "float32"),
        (tiny("llama"), "float64"),
        (tiny("llama", seed=1), "float32"),
        (tiny("llama", "llama3"), "float32"),
        (tiny("qwen2"), "bfloat16"),
    ]
    answers = []
    for folder, dtype in cases:
        with open_engine(folder, home, dtype=dtype) as engine:
            answer = ask(engine)
        assert {s.tier for s in answer.sources} == {"computed"}
        with open_engine(folder, tmp_path / "alone" / str(len(answers)), dtype=dtype) as engine:
            assert ask(engine).token_ids == answer.token_ids
        answers.append(answer)
    for (folder, dtype), answer in zip(cases, answers, strict=True):
        with open_engine(folder, home, dtype=dtype) as engine:
            again = ask(engine)
        assert {s.tier for s in again.sources} == {"disk"}
        assert again.token_ids == answer.token_ids
    assert len(list(home.rglob("*.kv"))) == 3 * len(cases)


def test_namespaces_in_one_home_share_nothing(tiny, tmp_path):
    folder, home = tiny("llama"), tmp_path / "home"
    for namespace in ("one", "two"):
        with open_engine(folder, home, namespace=namespace) as engine:
            assert {s.tier for s in ask(engine).sources} == {"computed"}
    tags = {path.parent.parent.name for path in home.rglob("*.kv")}
    assert len(tags) == 2


def test_another_instruction_is_another_prefix(tiny, tmp_path):
    folder, home = tiny("llama"), tmp_path / "home"
    for instruction in ("Be brief.", "Be long."):
        with open_engine(folder, home, instruction=instruction) as engine:
            answer = ask(engine)
            assert {s.tier for s in answer.sources} == {"computed"}
            assert answer.report.prefix_match


# ---- lengths -------------------------------------------------------------------------------------


def test_passages_that_do_not_fit_are_left_out_from_the_end(engine):
    passages = [f"Lamp {i}: " + "Anna keeps the lamp of Karsk. " * 4 for i in range(12)]
    answer = ask(engine, passages=passages)
    kept = len(answer.sources)
    assert 0 < kept < 12
    assert answer.report.dropped == tuple(f"passage-{i}" for i in range(kept, 12))
    (warning,) = answer.report.warnings
    assert f"{12 - kept} of 12" in warning
    assert "passage-11" in warning
    limit = engine.model.decoder.config.max_positions
    assert answer.report.tokens.prompt + 8 <= limit
    assert answer.token_ids == ask(engine, passages=passages[:kept]).token_ids
    assert len(ask(engine, passages=passages, max_tokens=150).sources) < kept


def test_prompt_that_fits_exactly(engine):
    """To the last position, and one token more is one passage less."""
    limit = engine.model.decoder.config.max_positions
    room = limit - len(engine.prompt_ids(QUESTION, PASSAGES))
    exact = ask(engine, max_tokens=room)
    assert len(exact.sources) == 3
    assert len(exact.token_ids) == room
    assert exact.finish_reason == "length"
    assert len(ask(engine, max_tokens=room + 1).sources) == 2


def test_nothing_fits_but_the_question(engine):
    passages = ["Anna keeps the lamp of Karsk. " * 100]
    answer = ask(engine, passages=passages)
    assert answer.sources == ()
    assert answer.report.dropped == ("passage-0",)
    assert answer.report.effective_ratio == 0
    check_report(answer, passages=0)


def test_question_that_alone_is_too_long(engine):
    with pytest.raises(PromptTooLongError, match="the question takes"):
        ask(engine, "Who keeps the lamp? " * 100)
    with pytest.raises(PromptTooLongError, match="the answer up to 600"):
        ask(engine, max_tokens=600)
    with pytest.raises(PromptTooLongError, match="passage 0 takes"):
        ask(engine, passages=["lamp ferry night " * 1500])
    with pytest.raises(PromptTooLongError):
        engine.logprobs(QUESTION, passages=PASSAGES, continuation=[5] * 600)


# ---- a full disk ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ram_bytes", [0, 2**30])
def test_no_room_on_disk_is_a_warning(tiny, tmp_path, ram_bytes):
    folder = tiny("llama")
    with open_engine(folder, tmp_path / "roomy") as engine:
        expected = ask(engine)
    with open_engine(folder, tmp_path / "full", disk_bytes=0, ram_bytes=ram_bytes) as engine:
        for tier in ("computed", "ram" if ram_bytes else "computed"):
            answer = ask(engine)
            assert answer.token_ids == expected.token_ids
            assert {s.tier for s in answer.sources} == {tier}
            assert bool(answer.report.warnings) == (tier == "computed")
            for warning in answer.report.warnings:
                assert "disk" in warning
                assert "not stored durably" in warning
    assert not list((tmp_path / "full").rglob("*.kv"))


# ---- threads and the end -------------------------------------------------------------------------


def test_eight_threads_at_once_answer_as_one_does(tiny, tmp_path):
    """Missing, shared and reordered blocks, other strategies and seeds, all at once."""
    folder = tiny("qwen3", "llama3")
    questions = ["Who keeps the lamp?", "When does the ferry leave?", "Where?", "Why?"]
    jobs = [
        (q, PASSAGES[i % 3 :] + PASSAGES[: i % 3], strategy, seed)
        for i, q in enumerate(questions)
        for strategy in strategy_names()
        for seed in (1, 2)
    ]

    def run(engine, job):
        question, passages, strategy, seed = job
        options = {"strategy": strategy, "seed": seed, "temperature": 0.7, "max_tokens": 10}
        return ask(engine, question, passages, **options).token_ids

    with open_engine(folder, tmp_path / "one") as engine:
        expected = [run(engine, job) for job in jobs]
    with open_engine(folder, tmp_path / "many") as engine:
        barrier, results, failures = threading.Barrier(8), {}, []

        def work(first):
            barrier.wait()
            try:
                for index in range(first, len(jobs), 8):
                    results[index] = run(engine, jobs[index])
            except BaseException as exc:
                failures.append(exc)

        threads = [threading.Thread(target=work, args=(first,)) for first in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert [results[index] for index in range(len(jobs))] == expected
        stats = engine.stats()
        assert stats.open_blocks == 0
        assert sum(tier.damaged + tier.errors for tier in stats.tiers) == 0
        assert stats.tiers[1].blocks == 3
    assert not [t for t in threading.enumerate() if t.name.startswith("kvrag")]


def test_close_twice_and_use_after_close(tiny, tmp_path):
    engine = open_engine(tiny("llama"), tmp_path / "home")
    stream = engine.stream(QUESTION, passages=PASSAGES)
    engine.close()
    engine.close()
    calls = [
        lambda: ask(engine),
        lambda: engine.stream(QUESTION, passages=PASSAGES),
        lambda: engine.logprobs(QUESTION, passages=PASSAGES, continuation="x"),
        lambda: engine.retrieve(QUESTION),
        lambda: engine.add([]),
        lambda: engine.documents(),
        lambda: engine.document("x"),
        lambda: engine.delete("x"),
        lambda: engine.stats(),
        # A stream that was begun before: also told that the engine is closed.
        lambda: list(stream),
    ]
    for call in calls:
        with pytest.raises(ClosedError, match="closed"):
            call()


def test_a_ratio_among_the_strategys_options_is_stronger_than_the_setting(tmp_path, tiny):
    with open_engine(tiny("llama"), tmp_path, ratio=0.5) as engine:
        named = ask(engine, strategy="cacheblend:ratio=0.25")
        default = ask(engine, strategy="cacheblend")
    assert (named.report.control.ratio, default.report.control.ratio) == (0.25, 0.5)


# ---- memory that requests pass on ----------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3", "qwen2-window"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_an_answer_never_shows_what_another_request_left(tiny, tmp_path, family, dtype):
    """The KV cache's memory goes from request to request, whoever they are, and is not cleared."""
    passages = [f"{n} lamps burn at the keeper's house in Karsk." for n in range(6)]
    with open_engine(tiny(family), tmp_path / "home", dtype=dtype) as engine:
        ask(engine, passages=passages)
        for strategy in strategy_names():
            answers = []
            for byte in (0, 255):  # Zeros and NaN.
                idle = {piece.data_ptr(): piece for piece in engine._kv_memory._idle}
                for piece in idle.values():
                    piece.fill_(byte)
                answers.append(ask(engine, passages=passages, strategy=strategy).token_ids)
                used = {piece.data_ptr() for piece in engine._kv_memory._idle}
                assert idle
                assert idle.keys() == used
            assert answers[0] == answers[1]
    assert engine._kv_memory.idle_bytes == 0
