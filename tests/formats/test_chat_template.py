"""Chat templates: rendered as transformers does, sandboxed, every failure one clear line."""

import pytest

from minilora.errors import MiniloraError
from minilora.formats.chat_template import render_chat

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def render(template, messages=CHAT, add_generation_prompt=True, **special_tokens):
    return render_chat(template, messages, add_generation_prompt, special_tokens)


def test_messages_special_tokens_and_the_prompt_reach_the_template():
    template = (
        "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    assert render(template, bos_token="<s>") == "<s>[user]hi[assistant]hello[assistant]"
    assert render(template, add_generation_prompt=False, bos_token="<s>") == "<s>[user]hi[assistant]hello"


def test_the_line_break_and_the_indent_of_a_block_do_not_show():
    assert render(
        "{% for m in messages %}\n    {% if m.role == 'user' %}\nuser\n    {% endif %}\n{% endfor %}\nend"
    ) == ("user\nend")


def test_loop_controls_and_generation_blocks_are_understood():
    template = (
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}"
        "{% generation %}{{ m.content }}{% endgeneration %}!{% endfor %}"
    )
    assert render(template) == "hello!"


def test_json_keeps_its_characters():
    message = {"role": "user", "content": "", "call": {"name": "naïve", "html": "<a>&'"}}
    assert render("{{ messages[0].call | tojson }}", [message]) == '{"name": "naïve", "html": "<a>&\'"}'
    assert render("{{ messages[0].call | tojson(indent=1) }}", [message]).startswith('{\n "name"')


def test_a_template_can_ask_for_the_date():
    assert len(render("{{ strftime_now('%Y-%m-%d') }}")) == len("2024-01-31")


def test_tools_and_documents_are_absent_not_undefined():
    assert render("{% if tools is none and documents is none %}none{% endif %}") == "none"


def test_the_refusal_of_a_template_comes_in_its_own_words():
    with pytest.raises(MiniloraError, match="refused these messages: roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content + 1 }}",
        "{{ messages[9].content.strip() }}",
        "{{ 1 / 0 }}",
        "{{ missing.field }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{{ range(999999999) }}",
        "{{ 'a' | nosuchfilter }}",
    ],
)
def test_whatever_a_template_does_wrong_is_one_clear_line(template):
    with pytest.raises(MiniloraError, match="chat template") as caught:
        render(template)
    assert "\n" not in str(caught.value)


def test_a_malformed_template_names_its_line():
    with pytest.raises(MiniloraError, match="chat template is malformed: line 2: "):
        render("ok\n{% for m in messages %}")


def test_a_template_cannot_change_the_caller_s_messages():
    messages = [{"role": "user", "content": "hi", "tags": ["a"]}]
    with pytest.raises(MiniloraError):
        render("{% set _ = messages[0].tags.append('b') %}", messages)
    assert messages == [{"role": "user", "content": "hi", "tags": ["a"]}]


@pytest.mark.parametrize(
    ("messages", "found"),
    [
        ("hi", "messages are a str, expected a list"),
        ({"role": "user", "content": "hi"}, "messages are a dict, expected a list"),
        (["hi"], "message 1 is 'hi', expected"),
        ([CHAT[0], {"content": "hi"}], "message 2 is {'content': 'hi'}, expected"),
        ([{"role": "user", "content": {1, 2}}], "something that JSON cannot"),
    ],
)
def test_malformed_messages_are_named(messages, found):
    with pytest.raises(MiniloraError, match=found):
        render("{{ messages }}", messages)
