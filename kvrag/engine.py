"""The engine: the only place that wires rooms together.

    with Engine.open(Settings(model="smollm2-135m", home="~/kvrag-home")) as engine:
        engine.add([Document("Anna keeps the lamp of Karsk.", title="Karsk")])
        print(engine.answer("Who keeps the lamp?").text)

REST, the command line and the benchmarks all go through it. It knows no strategy, tier or family
by name.
"""

from __future__ import annotations

import json
import logging
import operator
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch

from kvrag.answer import Answer
from kvrag.blending import Blending
from kvrag.blocks import (
    ChunkBlocks,
    PlacedBlocks,
    SingleFlight,
    context_ids,
    fine_channels,
)
from kvrag.config import Settings
from kvrag.conversation import Conversation, Message
from kvrag.corpora.parts import CorpusParts
from kvrag.corpus import Corpus
from kvrag.encoded_texts import EncodedTexts
from kvrag.errors import (
    ClosedError,
    InputError,
    NothingFoundError,
    PromptTooLongError,
    SettingsError,
)
from kvrag.fixed import Fixed
from kvrag.fusion import FusionStrategy, Prompt, create
from kvrag.fusion.controller import Controller
from kvrag.fusion.device import DeviceCache, DeviceLoading
from kvrag.generation.graph import GraphedDecoding
from kvrag.generation.kv_memory import KVMemory
from kvrag.generation.params import GenerationParams
from kvrag.generation.prefix_cache import PrefixCache
from kvrag.home import Home
from kvrag.kernels.native import NativeUnpack
from kvrag.models.forward import extend
from kvrag.models.source import Model
from kvrag.opened_corpus import Opened, OpenedCorpus
from kvrag.opened_model import device_of, opened_model
from kvrag.passages import Passage, passage_chunks
from kvrag.precompute.job import PrecomputeJob, Progress
from kvrag.precompute.manifest import write_manifest
from kvrag.precompute.plan import Plan, plan
from kvrag.precompute.prune import prune
from kvrag.precompute.ray_workers import RayWorkers
from kvrag.precompute.shard import Shard
from kvrag.precompute.worker import Recipe
from kvrag.prefill import Prefill, Prefilled
from kvrag.prompting import PromptLayout
from kvrag.references import References
from kvrag.retrieval.catalog import Catalog, Counts, StoredDocument
from kvrag.retrieval.documents import Document
from kvrag.retrieval.embedder import Embedder
from kvrag.retrieval.hybrid import DenseIndex
from kvrag.retrieval.index import IndexRule
from kvrag.retrieval.loaders import ReadWhole, Skipped
from kvrag.retriever import RetrievedChunk
from kvrag.searching import Search, SearchMode
from kvrag.store.claims import Claims
from kvrag.store.codecs import Codec, codec
from kvrag.store.keys import KeyMaker
from kvrag.store.secret import load_or_create_secret
from kvrag.store.tiered import StoreStats, TieredStore
from kvrag.stream import AnswerStream, Context
from kvrag.text import check_text
from kvrag.tiers import open_sealer, tier_slots

if TYPE_CHECKING:
    from langchain_core.vectorstores import VectorStore

__all__ = ["Engine"]

T = TypeVar("T")

_log = logging.getLogger(__name__)


class Engine:
    """Answers questions over passages or a corpus. Open it with `Engine.open`.

    Thread-safe; requests that run at the same time share the processor.

    `blending` may be set at any time: where it is refused, requests that begin from then on are
    answered by full prefill, and their reports say so. `controller` has measured what this machine
    does, and chooses the ratio of answers whose request and settings leave it open.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        model: Model | None = None,
        embedder: Embedder | None = None,
        vectors: VectorStore | None = None,
    ) -> None:
        """Use `Engine.open`. `model`: one that is open already for these settings."""
        self.settings = settings
        self._vectors = vectors
        if vectors is not None:
            embedder = _embedder_of(vectors, embedder)
        #: What the corpus is searched with: an embedder, or the name of one.
        self.embedder: Embedder | str = settings.embedder if embedder is None else embedder
        self.blending = Blending()
        if settings.threads is not None:
            # torch knows one number of threads a process; the last engine opened sets it.
            torch.set_num_threads(settings.threads)
        device = device_of(settings.device)
        try:
            create(settings.strategy, settings.ratio)
        except InputError as exc:
            raise SettingsError(f"setting 'strategy' or 'ratio': {exc}") from exc
        self.model = model or opened_model(settings)
        self._texts = EncodedTexts(self.model.tokenizer)
        self._prefixes = PrefixCache(self.model.decoder)
        self._kv_memory = KVMemory()
        self.controller = Controller(self.model.decoder)
        self._on_device = DeviceLoading.of(self.model.decoder.device, settings.device_bytes)
        self._graphed = GraphedDecoding(self.model.decoder) if device.type == "cuda" else None
        self._home = home = Home(settings.home)
        try:
            # Texts of documents lie here: for nobody else to read.
            home.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as exc:
            raise SettingsError(f"home {home.path} cannot be made: {exc.strerror}") from exc
        sealer = open_sealer(settings)
        self._keys = KeyMaker(
            load_or_create_secret(home.secret),
            sealed_by=sealer.key_id if sealer is not None else "",
        )
        self.store = TieredStore(tier_slots(settings, sealer))
        self._flights = SingleFlight(Claims(home.claims))
        self._lock = threading.RLock()
        self._closed = False
        try:
            self._catalog = Catalog.open(home.catalog)
            self._fixed = Fixed(self._catalog, settings, self.model.tokenizer)
            self._codec = self._opened_codec()
            self._references = References(self._catalog, self.store)
            self.store.shrink()  # from here on it is known what must stay
            self._layout = self._fixed.layout(settings.instruction)
            #: Of the passages that requests bring, behind the prompt's own prefix.
            self.passage_blocks = self._blocks(self._layout.prefix_ids, self._fixed.context)
            self._corpus = self._new_corpus()
        except BaseException:
            self.store.close()
            raise

    @classmethod
    def open(
        cls,
        settings: Settings | None = None,
        *,
        embedder: Embedder | None = None,
        vectors: VectorStore | None = None,
    ) -> Self:
        """Open model and store; converts a packaged or GGUF model on first use.

        Args:
            embedder: one of the caller's own, instead of the setting's.
            vectors: a LangChain vector store in the place of the vector index, whose embeddings
                are the embedder: docs/langchain.md.

        Raises:
            InputError: embedder and vectors, or a vector store without embeddings.
            ModelError, SettingsError, StoreError: the message says which file or setting.
        """
        settings = settings if settings is not None else Settings()
        return cls(settings, embedder=embedder, vectors=vectors)

    # ---- questions -------------------------------------------------------------------------------

    def answer(
        self,
        question: str,
        *,
        passages: Sequence[Passage] | None = None,
        k: int | None = None,
        strategy: str | FusionStrategy | None = None,
        ratio: float | None = None,
        cancelled: Callable[[], bool] = lambda: False,
        search: Search | SearchMode | None = None,
        per_token: bool = False,
        **generation: Any,
    ) -> Answer:
        """Answer a question over `passages`, or over the `k` best chunks of the corpus.

        Args:
            strategy: name of a fusion strategy, see `kvrag.fusion.strategy_names()`, or one.
            ratio: recompute ratio, for strategies that select.
            cancelled: asked between layers and tokens; true ends the answer early.
            search: "hybrid", "dense" or "lexical", or a `kvrag.searching.Search` with a filter.
            per_token: whether the report tells of each context token.
            generation: see `GenerationParams`: max_tokens, temperature, top_p, top_k, seed, stop.

        Raises:
            InputError: the message says what was given and what is allowed.
        """
        stream = self.stream(
            question,
            passages=passages,
            k=k,
            strategy=strategy,
            ratio=ratio,
            cancelled=cancelled,
            search=search,
            per_token=per_token,
            **generation,
        )
        for _ in stream:
            pass
        return stream.answer

    def stream(
        self,
        question: str,
        *,
        passages: Sequence[Passage] | None = None,
        k: int | None = None,
        strategy: str | FusionStrategy | None = None,
        ratio: float | None = None,
        cancelled: Callable[[], bool] = lambda: False,
        search: Search | SearchMode | None = None,
        per_token: bool = False,
        **generation: Any,
    ) -> AnswerStream:
        """As `answer`, as an iterator over pieces of text; `.answer` is there at its end.

        Input is checked, and chunks are retrieved, before this returns.
        """
        params = self._params(generation)
        asked = self._strategy(strategy, ratio)
        adapt = self._adapts(strategy, ratio)
        context = self._context(
            question, passages, k, params.max_tokens, adapt=adapt, search=search
        )
        return self._begun(context, asked, params, cancelled, per_token=per_token)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        passages: Sequence[Passage] | None = None,
        k: int | None = None,
        strategy: str | FusionStrategy | None = None,
        ratio: float | None = None,
        cancelled: Callable[[], bool] = lambda: False,
        per_token: bool = False,
        search: Search | SearchMode | None = None,
        **generation: Any,
    ) -> AnswerStream:
        """Answer the last message of a conversation; the others are the prompt's prefix.

        Args:
            messages: `{"role": "system" | "user" | "assistant", "content": text}`, in order.
            passages: what the answer is to rest on; with `k` or `search`, chunks that are retrieved
                for the last message; with none of these, the conversation alone.

        The other arguments, and what is raised, as for `stream`.
        """
        conversation = Conversation.of(messages)
        params = self._params(generation)
        asked = self._strategy(strategy, ratio)
        layout = self._layout
        with_passages = any(given is not None for given in (passages, k, search))
        instruction = self.settings.instruction
        # A question alone has the prompt of `stream`, behind which the first block is exact.
        if not with_passages or conversation.turns not in ((), (("system", instruction),)):
            layout = conversation.layout(
                self.model.tokenizer, instruction, with_passages=with_passages
            )
        context = self._context(
            conversation.question,
            passages,
            k,
            params.max_tokens,
            adapt=self._adapts(strategy, ratio),
            search=search,
            layout=layout,
        )
        return self._begun(context, asked, params, cancelled, per_token=per_token)

    @torch.inference_mode()
    def logprobs(
        self,
        question: str,
        *,
        continuation: str | Sequence[int],
        passages: Sequence[Passage] | None = None,
        k: int | None = None,
        strategy: str | FusionStrategy | None = None,
        ratio: float | None = None,
        search: Search | SearchMode | None = None,
    ) -> torch.Tensor:
        """Natural logarithms of the next-token probabilities along a given continuation.

        The continuation's rows see the fused cache and take no part in choosing what is recomputed.

        Returns:
            float32 (tokens, vocab); row i is the distribution of continuation token i.

        Raises:
            InputError: as `answer`, and for a continuation that is empty or holds no token ids.
        """
        token_ids = self._continuation_ids(continuation)
        prefilled = self.prefill(
            question,
            new_tokens=len(token_ids),
            passages=passages,
            k=k,
            strategy=strategy,
            ratio=ratio,
            search=search,
        )
        return self.continuation_logprobs(prefilled, token_ids)

    def prefill(
        self,
        question: str,
        *,
        new_tokens: int,
        passages: Sequence[Passage] | None = None,
        k: int | None = None,
        strategy: str | FusionStrategy | None = None,
        ratio: float | None = None,
        search: Search | SearchMode | None = None,
        corpus_prefix: str | None = None,
    ) -> Prefilled:
        """Fill a KV cache with the prompt, with room for `new_tokens` more, and go no further.

        Args:
            corpus_prefix: text that the passages' blocks are computed behind; None is the
                prompt's own prefix.
        """
        context = self._context(question, passages, k, new_tokens, corpus_prefix, search=search)
        return self._filled(context, self._strategy(strategy, ratio), new_tokens)

    def fill(
        self, prompt: Prompt, *, new_tokens: int, strategy: str | FusionStrategy | None = None
    ) -> Prefilled:
        """`prefill` of a prompt whose token ids are given; its chunks count as passages."""
        self._check_open()
        vocab = self.model.decoder.config.vocab_size
        if not all(0 <= token_id < vocab for token_id in prompt.token_ids):
            raise InputError(
                f"the prompt has ids that are no tokens; they go from 0 to {vocab - 1}"
            )
        room = self.model.decoder.config.max_positions
        if prompt.length + new_tokens > room:
            raise PromptTooLongError(
                f"the prompt takes {prompt.length} tokens and the answer up to {new_tokens}; the "
                f"model's context holds {room}"
            )
        prefill = self._passages_prefill()
        fitted = prefill.placed(prompt)
        context = Context(prefill, fitted, begun=time.perf_counter(), retrieve_s=0.0)
        return self._filled(context, self._strategy(strategy, None), new_tokens)

    def prompt(self, question: str, passages: Sequence[Passage], *, new_tokens: int = 1) -> Prompt:
        """The prompt, the same under every strategy, with as many passages as fit."""
        return self._context(question, passages, None, new_tokens).fitted.prompt

    def prompt_ids(self, question: str, passages: Sequence[Passage]) -> tuple[int, ...]:
        """Token ids of the prompt."""
        return self.prompt(question, passages).token_ids

    @property
    def default_strategy(self) -> FusionStrategy:
        """What requests get that name none."""
        return self._strategy(None, None)

    @torch.inference_mode()
    def continuation_logprobs(self, prefilled: Prefilled, token_ids: Sequence[int]) -> torch.Tensor:
        """`logprobs` behind a prompt that is in its cache; the cache is left as it was."""
        rows, length = [prefilled.logits], prefilled.cache.length
        if len(token_ids) > 1:
            rows.append(extend(self.model.decoder, token_ids[:-1], prefilled.cache, every=True))
            prefilled.cache.truncate(length)
        return torch.cat(rows).log_softmax(dim=-1).float()

    # ---- the corpus ------------------------------------------------------------------------------

    def add(
        self,
        documents: Iterable[Document | Skipped | ReadWhole],
        report: Callable[[Progress], None] = lambda progress: None,
        cancelled: Callable[[], bool] = lambda: False,
        *,
        shard: Shard | None = None,
        rebuild: bool = False,
        workers: RayWorkers | None = None,
    ) -> Progress:
        """Add documents to the corpus and compute the KV that they lack for this model.

        A document that is there already changes nothing, but for KV that it still lacks: what was
        interrupted goes on here. One with an id of its own replaces what has that id.

        Args:
            documents: `Document`s, or what `kvrag.retrieval.load(paths)` yields; that of
                `kvrag.retrieval.read(paths)` also takes out what a file no longer holds. Taken
                in a thread of its own.
            report: called after each document and chunk, for a progress bar.
            cancelled: asked as often; true ends the job, and what was stored stays.
            shard: the part of the documents that is added here; None is all.
            rebuild: whether documents that other settings cut otherwise are replaced.
            workers: compute the KV instead of this process, on machines that share the home.

        Raises:
            StorageFullError: no durable tier takes a block.
            CorpusSettingsError: a corpus of another `chunk_tokens` or `embedder`.
            WorkersError: workers could not be had, or failed; what was stored before stays.
        """
        with self._job(shard, rebuild=rebuild, workers=workers) as job:
            corpus, _, _ = self._open_corpus()
            corpus.agree(rebuild=rebuild)
            progress = job.run(documents, report, self._unless_closed(cancelled))
        if rebuild and not progress.cancelled:
            corpus.rebuilt()
        if progress.documents_replaced:
            self._forget_decoded()
        return progress

    def prune(self, paths: Iterable[Path | str]) -> int:
        """Delete the documents below `paths` whose files are gone; how many that were.

        A document that another file holds, or that was added without one, stays.
        """
        corpus, _, _ = self._open_corpus()
        num_deleted = prune(corpus, self._references, paths)
        if num_deleted:
            corpus.save()
            self._forget_decoded()
        return num_deleted

    def plan(self, documents: Iterable[Document | Skipped | ReadWhole], shard: Shard) -> Plan:
        """What adding documents would take; stores nothing of them."""
        corpus, blocks, _ = self._open_corpus()
        kinds = partial(blocks.kinds, first=self.settings.first_blocks)
        return plan(self.model, corpus, kinds, documents, shard)

    def write_manifest(self, path: Path) -> None:
        """Write what the corpus holds to a file of JSON lines: see `kvrag.precompute.manifest`."""
        corpus, blocks, _ = self._open_corpus()
        made_with = {
            "corpus": self.settings.namespace,
            "model": self.model.fingerprint,
            "codec": self._codec.name,
            "chunk_tokens": self.settings.chunk_tokens,
            "prefixes": [list(prefix) for prefix in blocks.prefixes],
        }
        write_manifest(path, corpus, made_with)

    def complete(
        self,
        report: Callable[[Progress], None] = lambda progress: None,
        cancelled: Callable[[], bool] = lambda: False,
        *,
        workers: RayWorkers | None = None,
    ) -> Progress:
        """Compute the KV that the corpus lacks for this model. As `add`, without documents."""
        with self._job(workers=workers) as job:
            return job.run(None, report, self._unless_closed(cancelled))

    def corpus_parts(self) -> CorpusParts:
        """What the corpus is made of, for whoever checks, exports or imports one."""
        corpus, blocks, _ = self._open_corpus()
        return CorpusParts(
            self.settings,
            self._home,
            self.model,
            self._catalog,
            self._references,
            self.store,
            corpus,
            blocks,
            self._blocks_in,
        )

    def retrieve(
        self,
        question: str,
        *,
        k: int | None = None,
        prefetch: bool = False,
        search: Search | SearchMode | None = None,
    ) -> list[RetrievedChunk]:
        """The `k` best chunks of the corpus with handles on their KV, best first.

        Fewer, or none, where a filter or a search by words alone finds no more.

        Raises:
            InputError: an empty question, k below 1, a search that is not allowed, or an empty
                corpus.
        """
        _, _, retriever = self._open_corpus()
        settings = self.settings
        plan = Search.of(search).or_else(
            settings.search, settings.mmr, settings.distinct, settings.rerank
        )
        return retriever.retrieve(question, _first(k, settings.k), plan, prefetch=prefetch)

    def prepare(self) -> None:
        """Open what the first question to the corpus would wait for; nothing for an empty one."""
        if self.counts().chunks:
            self._open_corpus()[0].prepare()

    def documents(self, *, limit: int = 100, offset: int = 0) -> list[StoredDocument]:
        """Documents of the corpus in the order in which they were added."""
        corpus, _, _ = self._open_corpus()
        return corpus.documents(limit, offset)

    def document(self, document_id: str) -> StoredDocument | None:
        """One document of the corpus, or None."""
        corpus, _, _ = self._open_corpus()
        return corpus.catalog.document(corpus.namespace, document_id)

    def document_text(self, document_id: str) -> str | None:
        """The whole text of a document that was added with an id of its own, or None."""
        return self._open_corpus()[0].text(document_id)

    def delete(self, document_id: str) -> bool:
        """Delete a document, its vectors and blocks that nothing else needs; False if absent."""
        corpus, _, _ = self._open_corpus()
        if not self._references.delete_document(corpus.namespace, document_id):
            return False
        corpus.save()
        self._forget_decoded()
        return True

    def _forget_decoded(self) -> None:
        if self.device_cache is not None:
            self.device_cache.clear()

    def counts(self) -> Counts:
        """Documents, chunks, vectors and referenced blocks of the corpus."""
        corpus, _, _ = self._open_corpus()
        return corpus.catalog.counts(corpus.namespace)

    @property
    def corpus_prefixes(self) -> tuple[tuple[int, ...], ...]:
        """The ids that a chunk's blocks are computed behind, one tuple a block."""
        first, later = self._open_corpus()[1].prefixes
        return (later, first) if self.settings.first_blocks and later != first else (later,)

    def block_kinds(self) -> list[ChunkBlocks]:
        """What chunks of the corpus, and passages of requests, are looked for in, each once."""
        kinds = (*self._open_corpus()[1].all, *self.passage_blocks.all)
        return list({kind.scope: kind for kind in kinds}.values())

    @property
    def owed_deletions(self) -> int:
        """Blocks of deleted documents that a tier could not delete yet. Never waits."""
        return self._references.num_owed

    def stats(self) -> StoreStats:
        """Counters and sizes of the store's tiers."""
        self._check_open()
        return self.store.stats()

    @property
    def device_cache(self) -> DeviceCache | None:
        """Decoded KV on the device, with its own counters; None without `device_bytes`."""
        return None if self._on_device is None else self._on_device.cache

    # ---- life ------------------------------------------------------------------------------------

    def close(self) -> None:
        """Release everything. A second call does nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._corpus.close()
            if self.device_cache is not None:
                self.device_cache.clear()
            self._kv_memory.close()
            self._texts.clear()
            self._catalog.close()
            self.store.close()
            self._flights.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # ---- wiring ----------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the engine is closed")

    def _unless_closed(self, cancelled: Callable[[], bool]) -> Callable[[], bool]:
        """`cancelled`, for work that ends with `ClosedError` when the engine is closed under it."""

        def given_up() -> bool:
            self._check_open()
            return cancelled()

        return given_up

    def _opened_codec(self) -> Codec:
        native = self.model.decoder.kernels.native
        unpack = None if native is None else NativeUnpack(native)
        return codec(self.settings.codec, fine=self._fine_channels(), unpack=unpack)

    def _fine_channels(self) -> list[list[list[int]]]:
        """Where a codec is calibrated, as the first who opened it with this model had it."""
        name, model = self.settings.codec, self.model
        if name != "int4":
            return []
        calibrated = self._fixed.first(
            f"codec {name} {model.fingerprint}", lambda: json.dumps(fine_channels(model))
        )
        found: list[list[list[int]]] = json.loads(calibrated)
        return found

    def _blocks(self, prefix_ids: Sequence[int], context: str) -> PlacedBlocks:
        """Blocks of chunks as a prompt's first, and behind `context`."""
        first = self._blocks_behind(prefix_ids)
        passages = context_ids(context, self.model.tokenizer)
        later = self._blocks_behind((*prefix_ids, *passages)) if passages else first
        return PlacedBlocks(first, later, self.store.locate)

    def _blocks_behind(self, prefix_ids: Sequence[int]) -> ChunkBlocks:
        return self._blocks_in(self.settings.namespace, self._codec, prefix_ids)

    def _blocks_in(self, namespace: str, codec: Codec, prefix_ids: Sequence[int]) -> ChunkBlocks:
        return ChunkBlocks(
            self.model,
            self.store,
            self._keys,
            codec,
            self._prefixes,
            namespace=namespace,
            prefix_ids=prefix_ids,
            flights=self._flights,
        )

    def _open_corpus(self) -> Opened:
        self._check_open()
        return self._corpus.get()

    def _new_corpus(self) -> OpenedCorpus:
        settings, vectors = self.settings, self._vectors
        corpus = Corpus(
            self._catalog,
            self._home.corpus_index(settings.namespace),
            self.model.tokenizer,
            namespace=settings.namespace,
            embedder=self.embedder,
            cross_encoder=settings.cross_encoder,
            chunk_tokens=settings.chunk_tokens,
            index=IndexRule(settings.index) if vectors is None else partial(_in_store, vectors),
            replace=self._references.replace_document,
        )
        return OpenedCorpus(settings, corpus, self._fixed, self.store, self._blocks)

    def _strategy(
        self, strategy: str | FusionStrategy | None, ratio: float | None
    ) -> FusionStrategy:
        if isinstance(strategy, FusionStrategy):
            if ratio is not None:
                raise InputError(f"ratio is given, but the strategy has its own: {strategy!r}")
            return strategy
        name = _first(strategy, self.settings.strategy)
        # A ratio among the strategy's own options is nearer to the request than the setting.
        if ratio is None and not _names_ratio(name):
            ratio = self.settings.ratio
        return create(name, ratio)

    def _adapts(self, strategy: str | FusionStrategy | None, ratio: float | None) -> bool:
        """Whether nobody has fixed the ratio."""
        settings = self.settings
        name = _first(strategy, settings.strategy)
        given = ratio is not None or settings.ratio is not None
        by_name = isinstance(name, str) and not _names_ratio(name)
        return settings.controller and not given and by_name

    @contextmanager
    def _job(
        self,
        shard: Shard | None = None,
        *,
        rebuild: bool = False,
        workers: RayWorkers | None = None,
    ) -> Iterator[PrecomputeJob]:
        self._check_open()
        self._fixed.make_corpus()
        corpus, blocks, _ = self._open_corpus()
        kinds = partial(blocks.kinds, first=self.settings.first_blocks)
        with ExitStack() as stack:
            elsewhere = None
            if workers is not None:
                recipe = Recipe.of(self.settings, blocks.all, self._fine_channels())
                elsewhere = stack.enter_context(workers.opened(recipe))
            yield PrecomputeJob(
                corpus,
                kinds,
                self._references,
                self.store.holds_durably,
                shard=shard,
                rebuild=rebuild,
                elsewhere=elsewhere,
            )

    def _context(
        self,
        question: str,
        passages: Sequence[Passage] | None,
        k: int | None,
        new_tokens: int,
        corpus_prefix: str | None = None,
        *,
        adapt: bool = False,
        search: Search | SearchMode | None = None,
        layout: PromptLayout | None = None,
    ) -> Context:
        """layout: a conversation's, which needs neither passages nor `k`."""
        self._check_open()
        self._references.refresh()
        from_corpus = layout is None or k is not None or search is not None
        if passages is not None or not from_corpus:
            if k is not None:
                raise InputError("give passages or k, not both")
            if search is not None:
                raise InputError("give passages or search, not both")
            begun = time.perf_counter()
            chunks = [] if passages is None else passage_chunks(passages, self._texts)
            prefill = self._passages_prefill(corpus_prefix, layout)
            fitted = prefill.fit(question, chunks, new_tokens)
            return Context(prefill, fitted, begun=begun, retrieve_s=0.0, adapt=adapt)
        begun = time.perf_counter()
        found = self.retrieve(question, k=k, search=search)
        if not found:
            raise NothingFoundError(
                "no chunk of the corpus is found: none passes the filter, or none shares a word "
                "with the question"
            )
        retrieved = time.perf_counter()
        _, blocks, _ = self._open_corpus()
        prefill = self._prefill(blocks, layout)
        fitted = prefill.fit(question, [item.chunk for item in found], new_tokens)
        # Not the handles': a chunk may be alone because the others do not fit.
        self._references.add_for_query(
            (kind.key(chunk.token_ids), int(chunk.id), kind.scope)
            for kind, chunk in zip(fitted.blocks, fitted.chunks, strict=True)
        )
        retrieve_s = retrieved - begun
        return Context(prefill, fitted, begun=retrieved, retrieve_s=retrieve_s, adapt=adapt)

    def _params(self, generation: dict[str, Any]) -> GenerationParams:
        params = GenerationParams.of(generation)
        return params if params.stop else replace(params, stop=self._layout.stop)

    def _begun(
        self,
        context: Context,
        asked: FusionStrategy,
        params: GenerationParams,
        cancelled: Callable[[], bool],
        *,
        per_token: bool,
    ) -> AnswerStream:
        context, plan = self.blending.admit(context, asked)
        return AnswerStream(
            self.model,
            context,
            plan,
            params,
            self._unless_closed(cancelled),
            per_token=per_token,
            graphed=self._graphed,
        )

    def _passages_prefill(
        self, corpus_prefix: str | None = None, layout: PromptLayout | None = None
    ) -> Prefill:
        if corpus_prefix is None:
            return self._prefill(self.passage_blocks, layout)
        tokenizer = self.model.tokenizer
        text = check_text("the corpus prefix", corpus_prefix)
        prefix_ids = (*tokenizer.bos_ids, *tokenizer.encode(text))
        if not prefix_ids:
            raise InputError("the corpus prefix is empty, and the model has no token to begin with")
        return self._prefill(self._blocks(prefix_ids, self._fixed.context))

    def _prefill(self, blocks: PlacedBlocks, layout: PromptLayout | None = None) -> Prefill:
        return Prefill(
            self.model,
            layout or self._layout,
            blocks,
            self._prefixes,
            self.controller,
            self._on_device,
            self._kv_memory,
        )

    def _filled(self, context: Context, strategy: FusionStrategy, new_tokens: int) -> Prefilled:
        context, strategy = self.blending.admit(context, strategy)
        prefilled = context.prefill(
            strategy, new_tokens=new_tokens, cancelled=self._unless_closed(lambda: False)
        )
        if prefilled is None:
            raise RuntimeError("a prefill that nobody can cancel was cancelled")
        return prefilled

    def _continuation_ids(self, continuation: str | Sequence[int]) -> list[int]:
        vocab = self.model.decoder.config.vocab_size
        if isinstance(continuation, str):
            token_ids = self.model.tokenizer.encode(check_text("the continuation", continuation))
        else:
            try:
                # `index` takes whole numbers of any library, and no fractions.
                token_ids = [operator.index(token_id) for token_id in continuation]
            except TypeError as exc:
                raise InputError(
                    f"the continuation is {continuation!r:.80}; give a text or token ids"
                ) from exc
        if not token_ids or not all(0 <= token_id < vocab for token_id in token_ids):
            raise InputError(
                f"the continuation has {len(token_ids)} tokens; it needs at least one, with ids "
                f"between 0 and {vocab - 1}"
            )
        return token_ids


def _embedder_of(vectors: VectorStore, embedder: Embedder | None) -> Embedder:
    from kvrag.integrations.langchain.vectors import embedder_of

    if embedder is not None:
        raise InputError("give embedder or vectors, not both: a vector store brings its embeddings")
    return embedder_of(vectors)


def _in_store(
    vectors: VectorStore, catalog: Catalog, namespace: str, embedder: Embedder
) -> DenseIndex:
    from kvrag.integrations.langchain.vectors import StoredVectors

    return StoredVectors(vectors, catalog, namespace, embedder)


def _names_ratio(strategy: object) -> bool:
    """Whether a strategy's name brings a ratio among its options."""
    return isinstance(strategy, str) and "ratio=" in strategy


def _first(given: T | None, otherwise: T) -> T:
    return otherwise if given is None else given
