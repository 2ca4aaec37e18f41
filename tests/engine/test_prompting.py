"""Prompt layouts: every kind of chat template as transformers renders it, and none at all."""

from __future__ import annotations

import json

import pytest
from tokenizers import processors

from kvrag.config import Settings
from kvrag.engine import Engine
from kvrag.errors import ModelError
from kvrag.models.tokenizer import Tokenizer
from kvrag.prompting import PromptLayout
from kvrag.retrieval.chunking import render_chunk
from tests.models.tiny_models import CHATML, SPECIAL, make_tokenizer
from tests.tiny import make_tiny_model

INSTRUCTION = "Answer <b>briefly</b>."
QUESTION = "Who keeps the lamp?"
BOS = SPECIAL[0]

#: Templates that do what those of the families do, each in its own words, and the form of the
#: messages that each of them needs.
TEMPLATES = {
    # Mistral 7B v0.3: the system text goes into the last user turn; roles must take turns.
    "mistral v0.3": (
        "{%- if messages[0]['role'] == 'system' %}{%- set rules = messages[0]['content'] %}"
        "{%- set turns = messages[1:] %}{%- else %}{%- set turns = messages %}{%- endif %}"
        "{%- if not tools is defined %}{%- set tools = none %}{%- endif %}"
        "{%- set ns = namespace(n=0) %}{{- bos_token }}"
        "{%- for turn in turns %}"
        "{%- if (turn['role'] == 'user') != (ns.n % 2 == 0) %}"
        "{{- raise_exception('roles must take turns') }}{%- endif %}"
        "{%- set ns.n = ns.n + 1 %}"
        "{%- if loop.last and rules is defined %}{{- '[I] ' + rules + '\\n\\n' }}"
        "{%- else %}{{- '[I] ' }}{%- endif %}{{- turn['content'] + '[/I]' }}{%- endfor %}",
        "system",
    ),
    # Mistral 7B v0.1 and Gemma 2: no system role.
    "mistral v0.1": (
        "{{ bos_token }}{% for turn in messages %}"
        "{% if (turn['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must take turns user/assistant') }}{% endif %}"
        "{{ '[I] ' + turn['content'] + ' [/I]' }}{% endfor %}",
        "folded",
    ),
    "gemma 2": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for turn in messages %}{{ '<turn>' + turn['role'] + '\\n' + turn['content'] | trim + "
        "'<end>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<turn>model\\n' }}{% endif %}",
        "folded",
    ),
    # Gemma 3: the system text in front of the first user turn; a content is a text or parts.
    "gemma 3": (
        "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}"
        "{%- if messages[0]['content'] is string -%}{%- set first = messages[0]['content'] + '\n\n'"
        " -%}{%- else -%}{%- set first = messages[0]['content'][0]['text'] + '\n\n' -%}"
        "{%- endif -%}"
        "{%- set turns = messages[1:] -%}{%- else -%}{%- set first = '' -%}"
        "{%- set turns = messages -%}{%- endif -%}"
        "{%- for turn in turns -%}{{ '<turn>' + turn['role'] + '\n' + (first if loop.first else '')"
        " }}{%- if turn['content'] is string -%}{{ turn['content'] | trim }}"
        "{%- elif turn['content'] is iterable -%}{%- for part in turn['content'] -%}"
        "{%- if part['type'] == 'text' -%}{{ part['text'] | trim }}{%- endif -%}{%- endfor -%}"
        "{%- else -%}{{ raise_exception('bad content') }}{%- endif -%}{{ '<end>\n' }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<turn>model\n' }}{%- endif -%}",
        "system",
    ),
    # Llama 3.1: the date, and tools that are none.
    "llama 3.1": (
        "{{- bos_token }}{%- if custom_tools is defined %}{%- set tools = custom_tools %}"
        "{%- endif %}{%- if not date_string is defined %}"
        "{%- if strftime_now is defined %}{%- set date_string = strftime_now('%Y') %}"
        "{%- else %}{%- set date_string = '2024' %}{%- endif %}{%- endif %}"
        "{%- if not tools is defined %}{%- set tools = none %}{%- endif %}"
        "{%- if messages[0]['role'] == 'system' %}"
        "{%- set rules = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}"
        "{%- else %}{%- set rules = '' %}{%- endif %}"
        "{{- '<h>system</h>\\n\\nToday: ' + date_string + '\\n\\n' }}"
        "{%- if tools is not none %}{{- 'TOOLS ' + (tools | tojson(indent=4)) }}{%- endif %}"
        "{{- rules + '<e>' }}{%- for turn in messages %}"
        "{{- '<h>' + turn['role'] + '</h>\\n\\n' + turn['content'] | trim + '<e>' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<h>assistant</h>\\n\\n' }}{%- endif %}",
        "system",
    ),
    # Qwen 2.5: a default system text unless there is one; `tools` asked for its truth.
    "qwen 2.5": (
        "{%- if tools %}{{- 'TOOLS' }}{%- elif messages[0]['role'] == 'system' %}"
        "{{- '<s>system\\n' + messages[0]['content'] + '<e>\\n' }}"
        "{%- else %}{{- '<s>system\\nYou are kind.<e>\\n' }}{%- endif %}"
        "{%- for message in messages %}"
        "{%- if (message.role == 'user') or (message.role == 'system' and not loop.first) %}"
        "{{- '<s>' + message.role + '\\n' + message.content + '<e>' + '\\n' }}{%- endif %}"
        "{%- endfor %}{%- if add_generation_prompt %}{{- '<s>assistant\\n' }}{%- endif %}",
        "system",
    ),
    # Qwen 3: walks backwards, asks for types, cuts and strips; `enable_thinking` is not given.
    "qwen 3": (
        "{%- set ns = namespace(looking=true, last=messages | length - 1) %}"
        "{%- for message in messages[::-1] %}"
        "{%- set place = (messages | length - 1) - loop.index0 %}"
        "{%- if ns.looking and message.role == 'user' and message.content is string and not "
        "(message.content.startswith('<tool>') and message.content.endswith('</tool>')) %}"
        "{%- set ns.looking = false %}{%- set ns.last = place %}{%- endif %}{%- endfor %}"
        "{%- for message in messages %}{%- if message.content is string %}"
        "{%- set content = message.content %}{%- else %}{%- set content = '' %}{%- endif %}"
        "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}"
        "{{- '<s>' + message.role + '\\n' + content + '<e>\\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<s>assistant\\n' }}"
        "{%- if enable_thinking is defined and enable_thinking is false %}"
        "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}",
        "system",
    ),
    # Phi-3: knows user and assistant alone and leaves out what else there is.
    "phi 3 first": (
        "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') %}"
        "{{ '<user>' + '\n' + message['content'] + '<e>' + '\n' + '<assistant>' + '\n' }}"
        "{% elif (message['role'] == 'assistant') %}{{ message['content'] + '<e>' + '\n' }}"
        "{% endif %}{% endfor %}",
        "folded",
    ),
    "phi 4": (
        "{% for message in messages %}"
        "{% if message['role'] == 'system' and 'tools' in message and message['tools'] is not none "
        "%}{{ '<' + message['role'] + '>' + message['content'] + message['tools'] + '<e>' }}"
        "{% else %}{{ '<' + message['role'] + '>' + message['content'] + '<e>' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% else %}{{ eos_token }}"
        "{% endif %}",
        "system",
    ),
    # SmolLM3: a mode of thinking by default, the date, replace and rstrip, a generation tag.
    "smollm 3": (
        "{%- if enable_thinking is not defined -%}{%- set enable_thinking = true -%}{%- endif -%}"
        "{%- if messages[0].role == 'system' -%}{%- set rules = messages[0].content -%}"
        "{%- if '/no_think' in rules -%}{%- set mode = '/no_think' -%}{%- else -%}"
        "{%- set mode = '/think' if enable_thinking else '/no_think' -%}{%- endif -%}"
        "{%- set rules = rules.replace('/no_think', '').rstrip() -%}{%- endif -%}"
        "{{- '<s>system\\nToday Date: ' ~ strftime_now('%Y') ~ '\\nMode: ' ~ mode ~ '\\n\\n' -}}"
        "{{- rules + '<e>\\n' -}}"
        "{%- for message in messages -%}"
        "{%- set content = message.content if message.content is string else '' -%}"
        "{%- if message.role == 'user' -%}{{ '<s>user\\n' + content + '<e>\\n' }}"
        "{%- elif message.role == 'assistant' -%}{% generation %}{{ content }}{% endgeneration %}"
        "{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<s>assistant\\n' }}{%- endif -%}",
        "system",
    ),
    # Granite 3: tools, documents and the date; a loop that breaks and continues.
    "granite 3": (
        "{%- if messages[0]['role'] == 'system' %}{%- set rules = messages[0]['content'] %}"
        "{%- set turns = messages[1:] %}{%- else %}{%- set rules = 'Today: ' + "
        "strftime_now('%B %d, %Y') %}{%- set turns = messages %}{%- endif %}"
        "{%- if tools and documents %}{%- set rules = rules + ' both' %}"
        "{%- elif documents %}{%- set rules = rules + ' docs' %}{%- endif %}"
        "{{- '<r>system</r>' + rules + '<e>\n' }}"
        "{%- if documents %}{%- for d in documents %}{{- d.text }}{%- endfor %}{%- endif %}"
        "{%- for turn in turns %}{%- if not turn.content %}{%- continue %}{%- endif %}"
        "{{- '<r>' + turn['role'] + '</r>' + turn['content'] + '<e>\n' }}"
        "{%- if loop.last and add_generation_prompt %}{{- '<r>assistant' }}"
        "{%- if controls %}{{- ' ' + controls | tojson() }}{%- endif %}{{- '</r>' }}"
        "{%- break %}{%- endif %}{%- endfor %}",
        "system",
    ),
    # OLMo 2: BOS, which it calls by the token's name.
    "olmo 2": (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}"
        "{{ '<|system|>\n' + message['content'] + '\n' }}{% elif message['role'] == 'user' %}"
        "{{ '<|user|>\n' + message['content'] + '\n' }}{% endif %}"
        "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
        "{% endfor %}",
        "system",
    ),
    # Vision models: parts alone.
    "parts": (
        "{% for message in messages %}{{ '<' + message['role'] + '>' }}"
        "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
        "{% else %}{{ '<image>' }}{% endif %}{% endfor %}{{ '<e>' }}{% endfor %}",
        "system parts",
    ),
    "parts without a system": (
        "{% for message in messages %}{% if message.role != 'user' %}"
        "{{ raise_exception('only users') }}{% endif %}{% for part in message.content %}"
        "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}<answer>",
        "folded parts",
    ),
    "no bos defined": (
        "{% if bos_token is defined %}{{ bos_token }}{% endif %}"
        "{% if sep_token is defined %}SEP{% endif %}{% for message in messages %}"
        "{{ message.role }}: {{ message.content }}\n{% endfor %}",
        "system",
    ),
}


def parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def messages_of(form: str, user: str):
    """The messages that a template of this form is to be given."""
    content = parts if "parts" in form else str
    if "folded" in form:
        return [{"role": "user", "content": content(f"{INSTRUCTION}\n\n{user}")}]
    system = {"role": "system", "content": content(INSTRUCTION)}
    return [system, {"role": "user", "content": content(user)}]


def transformers_tokenizer(folder):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)


def whole_prompt(layout: PromptLayout) -> list[int]:
    return [*layout.prefix_ids, *layout.question_ids(QUESTION)]


@pytest.mark.parametrize("bos", [None, BOS], ids=["no bos", "bos"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_layout_is_what_transformers_renders(tmp_path, name, bos):
    """Instruction, passages and question in one turn, cut where the chunks go; BOS is its own."""
    template, form = TEMPLATES[name]
    if bos is None and "{ bos_token" in template and "is defined" not in template:
        template = template.replace("{{ bos_token }}", "").replace("{{- bos_token }}", "")
    make_tokenizer(tmp_path, template=template, bos_token=bos, add_bos_token=bos is not None)
    tokenizer, theirs = Tokenizer(tmp_path), transformers_tokenizer(tmp_path)
    text = theirs.apply_chat_template(
        messages_of(form, f"Passages:\n\nQuestion: {QUESTION}"),
        tokenize=False,
        add_generation_prompt=True,
    )
    head, question, tail = text.partition(f"Question: {QUESTION}")
    assert question
    # Each part is encoded by itself; transformers encodes a rendered template so as well.
    expected = [
        *theirs.encode(head, add_special_tokens=False),
        *theirs.encode(question, add_special_tokens=False),
        *theirs.encode(tail, add_special_tokens=False),
    ]
    layout = PromptLayout.of(tokenizer, INSTRUCTION)
    assert whole_prompt(layout) == expected
    shown = tokenizer.decode(expected)
    assert shown.count(INSTRUCTION) == shown.count(QUESTION) == 1
    assert expected.count(0) == text.count(BOS) <= 1


@pytest.mark.parametrize("writes", [True, False])
def test_bos_is_the_templates_own(tmp_path, writes):
    """One that the template writes gets no second; where it writes none, none is added."""
    start = "{{ bos_token }}" if writes else ""
    template = start + "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    make_tokenizer(tmp_path, template=template, bos_token=BOS, add_bos_token=True)
    ids = whole_prompt(PromptLayout.of(Tokenizer(tmp_path), INSTRUCTION))
    assert ids.count(0) == int(writes)
    assert (ids[0] == 0) is writes


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ messages[0].role }}", ["shows the user's message 0 times, not once"]),
        (
            "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}",
            ["shows the user's message 2 times, not once"],
        ),
        (
            "{% if messages|length > 1 %}{{ raise_exception('no system') }}{% endif %}",
            ["no system", "shows the user's message 0 times"],
        ),
        ("{% for m in messages %}", ["chat template failed"]),
        ("{{ raise_exception('never') }}", ["chat template failed: never"]),
    ],
)
def test_templates_that_show_no_user(tmp_path, template, expected):
    make_tokenizer(tmp_path, template=template)
    with pytest.raises(ModelError) as caught:
        PromptLayout.of(Tokenizer(tmp_path), INSTRUCTION)
    for part in expected:
        assert str(caught.value).count(part) == 1


def test_an_instruction_is_text_in_any_form(tmp_path):
    """White space around it is a template's to strip, and it may look like a template."""
    make_tokenizer(tmp_path, template=TEMPLATES["gemma 2"][0], bos_token=BOS)
    tokenizer = Tokenizer(tmp_path)
    instruction = "  {{ bos_token }} and {% break %}\nAnswer. \n"
    text = tokenizer.decode(PromptLayout.of(tokenizer, instruction).prefix_ids)
    assert instruction.strip() in text


# ---- no chat template ----------------------------------------------------------------------------


def bos_processor(folder, *, last: bool = False):
    """Let tokenizer.json put BOS in front, and a token behind."""
    from tokenizers import Tokenizer as FastTokenizer

    path = str(folder / "tokenizer.json")
    tokenizer = FastTokenizer.from_file(path)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A" + (f" {SPECIAL[2]}" if last else ""),
        special_tokens=[(BOS, 0), (SPECIAL[2], 2)],
    )
    tokenizer.save(path)


@pytest.mark.parametrize(
    ("processor", "options", "leading"),
    [
        (None, {}, ()),
        (None, {"bos_token": BOS}, ()),
        (None, {"bos_token": BOS, "add_bos_token": True}, (0,)),
        (None, {"bos_token": BOS, "add_bos_token": False}, ()),
        (None, {"bos_token": None, "add_bos_token": True}, ()),
        ("bos", {"bos_token": BOS}, (0,)),
        ("bos", {}, (0,)),
        ("bos and eos", {"bos_token": BOS}, (0,)),
        ("bos", {"bos_token": BOS, "add_bos_token": True}, (0,)),
        ("bos", {"bos_token": BOS, "add_bos_token": False}, (0,)),
        ("bos", {"bos_token": BOS, "add_eos_token": True}, (0,)),
    ],
)
def test_a_model_without_a_chat_template_gets_plain_text(tmp_path, processor, options, leading):
    """BOS where the tokenizer adds one: by the rule of tokenizer.json, or where the options ask.

    The options alone count for transformers before 5, tokenizer.json alone since.
    """
    make_tokenizer(tmp_path, template=None, **options)
    if processor is not None:
        bos_processor(tmp_path, last="eos" in processor)
    tokenizer = Tokenizer(tmp_path)
    if processor is not None or not leading:
        theirs = transformers_tokenizer(tmp_path).encode("lamp")
        assert theirs[: len(leading) + 1] == [*leading, tokenizer.encode("lamp")[0]]
    layout = PromptLayout.of(tokenizer, INSTRUCTION)
    assert layout.prefix_ids == (
        *leading,
        *tokenizer.encode(f"{INSTRUCTION}\n\nPassages:\n\n"),
    )
    assert layout.question_ids(f" {QUESTION}\n") == tuple(
        tokenizer.encode(f"Question: {QUESTION}\nAnswer:")
    )
    assert PromptLayout.loads(layout.dumps(), tokenizer) == layout


def test_an_engine_answers_without_a_chat_template(tmp_path):
    """The whole prompt is what a person would write for a model that continues a text."""
    folder = make_tiny_model(tmp_path / "model")
    options = json.loads((folder / "tokenizer_config.json").read_text())
    del options["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    settings = Settings(
        model=str(folder), home=tmp_path / "home", dtype="float32", instruction=INSTRUCTION
    )
    with Engine.open(settings) as engine:
        tokenizer = engine.model.tokenizer
        ids = engine.prompt_ids(QUESTION, ["Anna does."])
        assert tokenizer.decode(ids) == (
            f"{INSTRUCTION}\n\nPassages:\n\n{render_chunk('', 'Anna does.')}"
            f"Question: {QUESTION}\nAnswer:"
        )
        answer = engine.answer(QUESTION, passages=["Anna does."], max_tokens=4)
        again = engine.answer(QUESTION, passages=["Anna does."], max_tokens=4, strategy="full")
        assert answer.report.tokens.prompt == again.report.tokens.prompt == len(ids)


@pytest.mark.parametrize(("template", "expected"), [(CHATML, ()), (None, ("\n\n",))])
def test_a_continued_text_ends_with_its_paragraph(tmp_path, template, expected):
    make_tokenizer(tmp_path, template=template)
    assert PromptLayout.of(Tokenizer(tmp_path), INSTRUCTION).stop == expected


def test_the_layouts_stop_holds_where_a_request_names_none(tmp_path, monkeypatch):
    settings = Settings(
        model=str(make_tiny_model(tmp_path / "model")), home=tmp_path / "home", dtype="float32"
    )
    with Engine.open(settings) as engine:

        def text(**options):
            return engine.answer(QUESTION, passages=["Anna."], max_tokens=24, **options).text

        whole = text()
        middle, later = whole[len(whole) // 2], whole[-1]
        monkeypatch.setattr(PromptLayout, "stop", (middle,))
        assert text() == whole[: whole.index(middle)]
        assert text(stop=later) == whole[: whole.index(later)]


def test_plain_text_writes_no_control_tokens(tmp_path):
    make_tokenizer(tmp_path, template=None)
    tokenizer = Tokenizer(tmp_path)
    layout = PromptLayout.of(tokenizer, f"Stop at {SPECIAL[2]}.")
    assert not {0, 1, 2} & {*layout.prefix_ids, *layout.question_ids(f"{SPECIAL[1]}?")}


def test_a_stored_layout_is_not_used_for_another_bos(tmp_path):
    """The digest that a stored layout goes by knows all that a layout depends on."""
    digests = set()
    for option in (False, True):
        make_tokenizer(tmp_path, template=None, bos_token=BOS, add_bos_token=option)
        digests.add(Tokenizer(tmp_path).template_digest)
    make_tokenizer(tmp_path, template="{{ messages[0].content }}", bos_token=BOS)
    digests.add(Tokenizer(tmp_path).template_digest)
    assert len(digests) == 3


# ---- the packaged model --------------------------------------------------------------------------


@pytest.mark.models
def test_the_prompt_of_the_packaged_model_stays_as_it_is(models_dir):
    """Stored blocks are found by these ids: a change of one would make all of them strangers."""
    from kvrag.models.source import model_folder

    tokenizer = Tokenizer(model_folder("smollm2-135m", models_dir))
    layout = PromptLayout.of(tokenizer, "Answer briefly.")
    assert json.loads(layout.dumps()) == [
        [1, 9690, 198, 21350, 13099, 30, 2, 198, 1, 4093, 198, 17911, 969, 42, 1116],
        [2, 198, 1, 520, 9531, 198],
    ]
