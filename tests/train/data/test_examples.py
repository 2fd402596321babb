"""Examples for fine-tuning: what is predicted, and how rows are filled."""

import json
from itertools import islice

import numpy as np
import pytest
from tokenizer_file import with_first, write_tokenizer

from train.data.chat import FILE, load_template
from train.data.examples import (
    ExampleData,
    chat_prompt,
    encode_examples,
    example_batches,
    prompts_of,
)
from train.data.files import Example
from train.data.sequences import Position
from train.data.tokenizer import ByteTokenizer, load_tokenizer

# As Llama 3's, with a token before a text and one that ends a turn.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<h> {{ m.role }} </h> {% generation %}{{ m.content }}"
    "{% endgeneration %} <eot> {% endfor %}{% if add_generation_prompt %}<h> assistant </h> "
    "{% endif %}"
)
SPECIAL = ("<s>", "<eot>", "<h>", "</h>")
WORDS = ("<unk>", "user", "assistant", "hi", "ho", "2")


@pytest.fixture
def chat(tmp_path):
    """A tokenizer.json with a chat template beside it."""
    vocabulary = {name: i for i, name in enumerate((*SPECIAL, *WORDS))}
    path = tmp_path / "tokenizer.json"
    write_tokenizer(path, vocabulary, special=SPECIAL, post_processor=with_first("<s>", 0))
    settings = {"bos_token": {"content": "<s>"}, "eos_token": "<eot>", "chat_template": TEMPLATE}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_tokenizer(path)


def encoded(example, tokenizer, seq_len=64, template=None):
    def load():
        return load_template(tokenizer, template)

    return encode_examples([example], tokenizer, load, seq_len)


def targets(document, tokenizer) -> list[str]:
    """The tokens that are to be predicted."""
    return [tokenizer.name_of(int(i)) for i in document[1:] if i >= 0]


def messages(*contents, first="user") -> Example:
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    pairs = tuple((roles[i % 2], content) for i, content in enumerate(contents))
    return Example("messages", pairs, "a.jsonl:1")


def test_a_text_is_predicted_whole_and_a_long_one_cut_into_rows():
    tokenizer = ByteTokenizer()
    (whole,) = encoded(Example("text", ("abc",), ""), tokenizer).examples
    assert list(whole) == [~256, 97, 98, 99, 256]
    found = encoded(Example("plain", ("abcdefgh",), ""), tokenizer, seq_len=4)
    assert [list(x) for x in found.examples] == [
        [~256, 97, 98, 99, 100],
        [100, 101, 102, 103, 104],
        [104, 256],
    ]
    assert (found.cut, found.dropped) == (0, 0)
    assert encoded(Example("text", (" \n",), ""), tokenizer).dropped == 1


def test_of_a_prompt_only_the_completion_and_its_end_are_predicted():
    tokenizer = ByteTokenizer()
    example = Example("prompt", ("ab", "c"), "")
    (found,) = encoded(example, tokenizer).examples
    assert list(found) == [~256, ~97, ~98, 99, 256]
    assert encoded(example, tokenizer, seq_len=3)[1:] == (1, 0)
    assert encoded(example, tokenizer, seq_len=2) == ([], 1, 1)  # nothing of the answer is left


def test_of_messages_only_the_answers_are_predicted_each_to_its_end(chat):
    (found,) = encoded(messages("hi", "ho", "2", "hi"), chat).examples
    text = chat.as_written.decode([i if i >= 0 else ~i for i in found], skip_special_tokens=False)
    turns = "<h> user </h> hi <eot> <h> assistant </h> ho <eot> "
    assert text == f"<s> {turns}<h> user </h> 2 <eot> <h> assistant </h> hi <eot>"
    assert targets(found, chat) == ["ho", "<eot>", "hi", "<eot>"]
    ((prompt, answer),) = prompts_of([found])
    assert chat.as_written.decode(prompt.tolist(), skip_special_tokens=False) == (
        "<s> <h> user </h> hi <eot> <h> assistant </h>"
    )
    assert chat.decode(answer) == "ho"


def test_the_prompt_of_a_chat_is_what_precedes_its_answer(chat):
    (found,) = encoded(messages("hi", "ho"), chat).examples
    ((prompt, _),) = prompts_of([found])
    template = load_template(chat, None)
    asked = chat_prompt([{"role": "user", "content": "hi"}], chat, template)
    assert asked.tolist() == prompt.tolist()
    with pytest.raises(ValueError, match="contains <eot>"):
        chat_prompt([{"role": "user", "content": "<eot>"}], chat, template)


def test_an_end_that_a_template_does_not_write_is_appended_and_after_one_nothing_counts(chat):
    (chat.path.parent / "tokenizer_config.json").write_text('{"eos_token": "<eot>"}')
    template = chat.path.parent / FILE
    template.write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    assert targets(encoded(messages("hi", "ho"), chat).examples[0], chat) == ["ho", "<eot>"]
    other = chat.path.parent / "other.jinja"
    other.write_text("{% for m in messages %}{{ m.content }} <eot> user {% endfor %}")
    found = encoded(messages("hi", "ho"), chat, template=str(other)).examples[0]
    assert targets(found, chat) == ["ho", "<eot>"]


def test_a_token_across_the_border_of_prompt_and_completion_is_two():
    class Pairs(ByteTokenizer):
        def encode(self, text):
            return np.array(
                [
                    300 if text[i : i + 2] == "bc" else ord(text[i])
                    for i in range(len(text))
                    if text[i - 1 : i + 1] != "bc"
                ],
                np.int32,
            )

    (found,) = encoded(Example("prompt", ("ab", "cbc"), ""), Pairs()).examples
    assert list(found) == [~256, ~97, ~98, 99, 300, 256]

    class Begun(Pairs):  # as SentencePiece puts a space before each text
        def encode(self, text):
            return np.array([301, *super().encode(text)], np.int32)

    (found,) = encoded(Example("prompt", ("ab", "cbc"), ""), Begun()).examples
    assert list(found) == [~256, ~301, ~97, ~98, 99, 300, 256]


@pytest.mark.parametrize(
    ("example", "template", "says"),
    [
        (messages("hi <eot>", "ho"), None, "a.jsonl:1: a message contains <eot>, which would be a"),
        (messages("hi"), None, "no message has the role `assistant`"),
        (messages("hi", "ho", "hi", "ho"), "{{ messages | length }}", "differently once more"),
        (messages("hi", "ho"), "{{ messages[0].content }}", r"not write `messages\[1\]`, which is"),
        (messages("hi", "ho"), "{% for m in messages %}{{ m.role }}{{ m.text }}{% endfor %}",
         r"does not write `messages\[1\]`, which is to be learnt"),
        (messages("hi", ""), "{{ messages[0].content }}", r"does not write `messages\[1\]`"),
        (messages("hi", "ho"), "{{ raise_exception('no') }}", r"cannot write the messages \(no\)"),
        (messages("hi", "ho"), "{% for %}", r"^--chat-template .*t.jinja cannot be .* valid Jinja"),
        (messages("hi", "ho"), "{{ strftime_now('%d') }}", "'strftime_now' is undefined"),
        (messages("hi", "ho"), "{{ messages.__class__.__mro__ }}", "unsafe"),
        (messages("hi", "ho"), "{% for i in range(10**9) %}a{% endfor %}", "Range too big"),
        (messages("hi", "ho"), "{{ 1 // 0 }}", "messages .ZeroDivisionError: "),
        (messages("hi", "ho"), "{{ '{a}'.format() }}", "messages .KeyError: 'a'"),
        (messages("hi", "ho"), "{{ messages | dictsort }}", "messages .AttributeError: "),
        (messages("hi", "ho"), "{% break %}", "not valid Jinja: SyntaxError: "),
        (messages("hi", "ho"), "{{ 'a' * 10**18 }}", "needs more memory than there is"),
    ],
)  # fmt: skip
def test_messages_that_cannot_be_written_are_named(chat, tmp_path, example, template, says):
    if template is not None:
        (tmp_path / "t.jinja").write_text(template)
    with pytest.raises(ValueError, match=says):
        encoded(example, chat, template=template and str(tmp_path / "t.jinja"))


def test_a_template_gets_the_names_of_tokens_from_all_files_and_the_token_that_ends_a_text(chat):
    """As transformers has them; --end-token overrides, and exports say it."""
    folder = chat.path.parent
    source = "{{ bos_token }} {{ x_token }} {{ eos_token }}"
    said = {"chat_template": [{"name": "default", "template": source}], "bos_token": None}
    own = {"extra_special_tokens": {"x_token": "<h>"}, "bos_token": {"content": "<s>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    (folder / "special_tokens_map.json").write_text(json.dumps(own))
    assert load_template(load_tokenizer(chat.path, "</h>"), None).render([]) == "<s> <h> </h>"


@pytest.mark.parametrize(
    "source", [1, {"default": "x"}, ["x"], [{"name": "default", "template": 1}]]
)
def test_chat_templates_of_another_form_are_refused(chat, source):
    said = {"eos_token": "<eot>", "chat_template": source}
    (chat.path.parent / "tokenizer_config.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match=r"chat_template beside .* cannot be used: neither a text"):
        encoded(messages("hi", "ho"), chat)


def test_two_chat_templates_that_differ_are_refused_unless_one_is_named(chat):
    file, named = chat.path.parent / FILE, chat.path.parent / "named.jinja"
    file.write_text(TEMPLATE + "\n")
    assert encoded(messages("hi", "ho"), chat).examples
    for path in (file, named):
        path.write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    said = r"chat_template.jinja cannot be used: tokenizer_config.json .* another chat_template"
    with pytest.raises(ValueError, match=said):
        encoded(messages("hi", "ho"), chat)
    assert encoded(messages("hi", "ho"), chat, template=str(named)).examples


def test_without_a_chat_template_messages_are_an_error(chat):
    (chat.path.parent / "tokenizer_config.json").write_text('{"eos_token": "<eot>"}')
    with pytest.raises(ValueError, match=r"need a chat template.*--chat-template"):
        encoded(messages("hi", "ho"), chat)
    with pytest.raises(ValueError, match="the tokenizer has none"):
        encoded(messages("hi", "ho"), ByteTokenizer())


def documents(*sizes):
    """Examples that fill so many places of a row, each with its own numbers."""
    return [np.arange(size + 1, dtype=np.int32) + 100 * i for i, size in enumerate(sizes, 1)]


def test_examples_fill_the_first_row_with_room_whole_and_apart():
    made = list(
        example_batches(
            documents(5, 4, 3, 2, 6, 8), separator=7, batch_size=2, seq_len=8, packed=True
        )
    )
    assert [position for _, position in made] == [Position(4), Position(6)]
    first = made[0][0]
    assert first["inputs"].tolist() == [
        [100, 101, 102, 103, 104, 300, 301, 302],
        [200, 201, 202, 203, 400, 401, 7, 7],
    ]
    assert first["targets"][1].tolist() == [201, 202, 203, 204, 401, 402, 7, 7]
    assert first["segment_ids"].tolist() == [[1] * 5 + [2] * 3, [1] * 4 + [2] * 2 + [0] * 2]
    assert first["positions"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 3, 0, 1, 0, 0]]
    assert first["weights"].tolist() == [[1] * 8, [1] * 6 + [0] * 2]
    alone = example_batches(documents(2, 3, 1), separator=7, batch_size=2, seq_len=4, packed=False)
    assert [batch["segment_ids"].max(axis=1).tolist() for batch, _ in alone] == [[1, 1], [1, 0]]


def test_what_is_not_to_be_predicted_has_no_weight_and_its_own_id():
    example = np.array([~256, ~97, 98, 256], np.int32)
    ((batch, _),) = example_batches([example], separator=256, batch_size=1, seq_len=4, packed=True)
    assert batch["inputs"].tolist() == [[256, 97, 98, 256]]
    assert batch["targets"].tolist() == [[97, 98, 256, 256]]
    assert batch["weights"].tolist() == [[0, 1, 1, 0]]


def test_any_position_resumes_the_same_batches_and_epochs_give_the_steps():
    sizes = np.random.default_rng(0).integers(1, 9, 40)
    data = ExampleData(documents(*sizes), batch_size=2, seq_len=8, separator=0, seed=3)
    made = list(islice(data.batches(), 40))
    for at in (0, 5, 21):
        again = list(islice(data.batches(made[at][1]), 3))
        for (a, p), (b, q) in zip(again, made[at + 1 :], strict=False):
            assert p == q
            for name in a:
                np.testing.assert_array_equal(a[name], b[name])
    steps = data.steps(2)
    assert made[steps - 2][1][0].documents < 80 <= made[steps - 1][1][0].documents
    first = np.concatenate([batch["inputs"].ravel() for batch, _ in made[: data.steps(1)]])
    assert {*range(1, 41)} <= {*(first // 100)}
