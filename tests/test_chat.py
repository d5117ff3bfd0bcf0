"""How chat templates write prompts and answers, and which tokens that makes."""

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from tdkd import records
from tdkd.errors import UserError
from tdkd.models import eos_beside, load_tokenizer

transformers = pytest.importorskip("transformers")

ASKED = [{"role": "user", "content": "Hi"}]
TOLD = [{"role": "assistant", "content": "Hello"}]
RECORD = {"prompt": ASKED, "completion": TOLD}
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + "
    "' [/INST]' }}{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
TINY_LLAMA = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' "
    "%}{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def tokenizer(tiny_student):
    return load_tokenizer(tiny_student)


@pytest.fixture
def sentence_piece():
    """Puts a space before every text, as Llama's and Mistral's do."""
    letters = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters += ["▁", *map(chr, range(33, 127)), "▁H", "▁He"]
    core = Tokenizer(
        models.BPE(
            vocab={letter: i for i, letter in enumerate(letters)},
            merges=[("▁", "H"), ("▁H", "e")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = [AddedToken(text, special=True, normalized=False) for text in letters[:3]]
    core.add_special_tokens(special)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.mark.parametrize(
    "template, answer",
    [
        (LLAMA2, ["▁He", "l", "l", "o", "▁", "</s>"]),
        (TINY_LLAMA, ["H", "e", "l", "l", "o", "</s>"]),
    ],
    ids=["llama2", "tiny_llama"],
)
def test_an_answer_has_the_tokens_that_it_has_behind_its_prompt(sentence_piece, template, answer):
    sentence_piece.chat_template = template
    chat = records.Chat(sentence_piece)
    encoded = chat.encode(RECORD)
    assert sentence_piece.convert_ids_to_tokens(encoded.completion) == answer
    text = sentence_piece.apply_chat_template(ASKED + TOLD, tokenize=False)
    whole = sentence_piece(text, add_special_tokens=False).input_ids
    both = encoded.prompt + encoded.completion
    assert whole[: len(both)] == both
    closing = 2 if template is LLAMA2 else 1
    cut = chat.encode({**RECORD, "truncated": True})
    assert cut.completion == encoded.completion[:-closing]


def test_a_block_of_thoughts_belongs_to_the_answer(tokenizer):
    tokenizer.chat_template = THINKING
    chat = records.Chat(tokenizer)
    assert tokenizer.decode(chat.encode(RECORD).completion) == "Hello<|im_end|>"
    prompt = tokenizer.decode(chat.prompt(RECORD))
    assert prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_a_turn_may_end_with_an_added_token_that_is_not_special(tokenizer, tiny_student):
    tokenizer.chat_template = TINY_LLAMA.replace("eos_token", "'\n<fin>'")
    # a vocabulary with added tokens for white space, as Gemma's
    tokenizer.add_tokens(["<fin>", AddedToken("\n", normalized=False)])
    end = tokenizer.convert_tokens_to_ids("<fin>")
    chat = records.Chat(tokenizer)
    assert chat.end == end
    assert tokenizer.decode(chat.encode(RECORD).completion) == "Hello\n<fin>"
    assert end in eos_beside(tiny_student, tokenizer)


@pytest.mark.parametrize(
    "template",
    [None, "{% if messages[0]['role'] != 'system' %}{{ raise_exception('system') }}{% endif %}"],
    ids=["none", "system"],
)
def test_without_a_template_of_plain_turns_answers_end_with_eos(tokenizer, tiny_student, template):
    tokenizer.chat_template = template
    chat = records.Chat(tokenizer)
    assert (chat.end, chat.closing, chat.between) == (2, "<|im_end|>", "")
    assert eos_beside(tiny_student, tokenizer) == [2]


def test_tokens_that_merge_across_the_border_are_left_apart(tiny_student):
    """A model goes on from the prompt's own tokens."""
    core = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2, "$": 3}, merges=[("a", "b")]))
    core.add_special_tokens([AddedToken("$", special=True)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="$")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    encoded = records.Chat(tokenizer).encode({"prompt": "ba", "completion": "ba"})
    assert encoded == ([1, 0], [1, 0, 3])


def test_it_is_at_most_as_long_as_told(tokenizer):
    chat = records.Chat(tokenizer)
    prompt, completion = chat.encode(RECORD)
    assert chat.encode(RECORD, len(prompt) + 2) == (prompt, completion[:2])
    assert chat.encode(RECORD, 3) == (prompt[:3], [])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"completion": TOLD * 2}, "^completion: expected one message, got 2; those before"),
        ({"completion": ASKED}, "^completion: expected a message of the assistant, got one of 'us"),
        (
            {"completion": [{"role": "assistant", "content": None}]},
            "^completion: expected content that is text, got 'None'$",
        ),
        (
            {"completion": [{**TOLD[0], "tool_calls": [{"function": {"name": "f"}}]}]},
            "^completion: expected a message of content alone, got one with tool_calls;",
        ),
        (
            {"completion": [{**TOLD[0], "reasoning_content": "hm"}]},
            "^completion: expected a message of content alone, got one with reasoning_content;",
        ),
        ({"truncated": 1}, "^truncated: expected true or false, got 1$"),
        ({"tools": "{"}, "^tools: expected a list or its JSON, got "),
        ({"chat_template_kwargs": []}, r"^chat_template_kwargs: expected an object, got '\[\]'$"),
        (
            {"chat_template_kwargs": {"tokenize": True}},
            "^prompt: expected messages that the chat template takes, got TypeError: ",
        ),
    ],
)
def test_records_that_are_refused(tokenizer, change, message):
    with pytest.raises(UserError, match=message):
        records.Chat(tokenizer).encode({**RECORD, **change})


def test_what_data_sets_put_for_absent_fields_is_none_of_them(tokenizer):
    filled = [{**TOLD[0], "tool_calls": None, "reasoning_content": ""}]
    chat = records.Chat(tokenizer)
    assert chat.encode({**RECORD, "completion": filled}) == chat.encode(RECORD)


def test_null_stands_for_an_absent_field(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(
        '{"prompt": "a", "completion": null, "references": ["b"]}\n'
        '{"prompt": "a", "completion": "b", "references": null}\n'
    )
    assert len(records.read(path, answered=True)) == 2
    path.write_text('{"prompt": "a", "completion": null, "references": null}\n')
    with pytest.raises(UserError, match='^data: expected "completion" or "references" on line 1'):
        records.read(path, answered=True)
