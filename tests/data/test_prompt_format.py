"""One rendering of prompts and completions: separate ids, one EOS at the end, the same in every stage."""

import copy

import pytest
from helpers.text_tokenizers import KINDS, text_tokenizer

from instructgpt_hf.config.data import PLAIN_TEMPLATES
from instructgpt_hf.data.prompts import PromptFormat
from instructgpt_hf.errors import InstructGPTError

# Writes a turn marker before each turn, and more text behind the EOS of a turn, as ChatML's newline is.
CHAT = (
    "{% for turn in messages %}{{ 'u ' if turn['role'] == 'user' else 'v ' }}{{ turn['content'] }}<eos> z "
    "{% endfor %}{% if add_generation_prompt %}v {% endif %}"
)


@pytest.fixture
def chat_tokenizer(tokenizer):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = CHAT
    return changed


def words(tokenizer, text):
    return tokenizer.convert_tokens_to_ids(text.split())


class TestPlain:
    def test_raw_adds_only_eos(self, tokenizer):
        made = PromptFormat.create("raw", tokenizer)
        assert made.prompt_ids("a b", tokenizer) == words(tokenizer, "a b")
        assert made.completion_ids("a b", "c d", tokenizer) == words(tokenizer, "c d <eos>")

    def test_named_template_and_its_separator(self, tokenizer):
        made = PromptFormat.create("user-assistant", tokenizer)
        assert made.prompt_text("a b", tokenizer) == "User: a b\nAssistant:"
        assert made.completion_prefix == " "
        assert made.completion_ids("a b", "c", tokenizer) == words(tokenizer, "c <eos>")

    def test_prompt_with_braces_is_kept_as_it_is(self, tokenizer):
        made = PromptFormat.create("instruction", tokenizer)
        assert "### Instruction:\n{x} {prompt}{\n" in made.prompt_text("{x} {prompt}{", tokenizer)

    @pytest.mark.parametrize("answer", ["c d", "c d<eos>", "c d <eos>\n", "c d <eos><eos>", "c d <eos> <eos>"])
    def test_completion_ends_with_exactly_one_eos(self, tokenizer, answer):
        ids = PromptFormat.create("raw", tokenizer).completion_ids("a", answer, tokenizer)
        assert ids == words(tokenizer, "c d <eos>")

    def test_start_token_comes_once(self, tokenizer):
        """A tokenizer that starts texts with a token does so in the prompt only."""
        from tokenizers.processors import TemplateProcessing

        starting = copy.deepcopy(tokenizer)
        starting._tokenizer.post_processor = TemplateProcessing(
            single="z $A", special_tokens=[("z", words(tokenizer, "z")[0])]
        )
        made = PromptFormat.create("raw", starting)
        assert made.prompt_ids("a", starting) == words(tokenizer, "z a")
        assert made.completion_ids("a", "b", starting) == words(tokenizer, "b <eos>")

    @pytest.mark.parametrize(
        ("frame", "before"), [("$A <eos>", ""), ("z $A <eos>", "z"), ("<eos> $A <eos> z", "<eos>"), ("$A", "")]
    )
    def test_nothing_comes_between_prompt_and_completion(self, tokenizer, frame, before):
        """Some tokenizers end every text with EOS; a prompt goes on with its completion."""
        from tokenizers.processors import TemplateProcessing

        framing = copy.deepcopy(tokenizer)
        specials = [(token, words(tokenizer, token)[0]) for token in ("z", "<eos>")]
        framing._tokenizer.post_processor = TemplateProcessing(single=frame, special_tokens=specials)
        made = PromptFormat.create("raw", framing)
        assert made.prompt_ids("a b", framing) == words(tokenizer, f"{before} a b")
        assert made.completion_ids("a b", "c", framing) == words(tokenizer, "c <eos>")

    def test_conversation_in_a_plain_template(self, tokenizer):
        made = PromptFormat.create("raw", tokenizer)
        one = [{"role": "user", "content": "a b"}]
        assert made.prompt_text(one, tokenizer) == "a b"
        several = [*one, {"role": "assistant", "content": "c"}, {"role": "user", "content": "d"}]
        assert made.prompt_text(several, tokenizer) == "User: a b\nAssistant: c\nUser: d"
        message = [{"role": "assistant", "content": "e"}]
        assert made.completion_ids(several, message, tokenizer) == words(tokenizer, "e <eos>")

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("raw", "System: s\nUser: a\nAssistant: b\nUser: c"),
            ("user-assistant", "System: s\nUser: a\nAssistant: b\nUser: c\nAssistant:"),
            ("instruction", "### Instruction:\nSystem: s\nUser: a\nAssistant: b\nUser: c\n\n### Response:\n"),
        ],
    )
    def test_every_turn_is_named_once(self, tokenizer, name, text):
        turns = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c")]
        messages = [{"role": role, "content": content} for role, content in turns]
        assert PromptFormat.create(name, tokenizer).prompt_text(messages, tokenizer) == text

    def test_unfinished_completion_has_no_eos(self, tokenizer):
        made = PromptFormat.create("user-assistant", tokenizer)
        assert made.completion_ids("a b", "c d", tokenizer, finished=False) == words(tokenizer, "c d")
        assert made.completion_ids("a b", "", tokenizer, finished=False) == []

    def test_text_of_a_completion(self, tokenizer):
        made = PromptFormat.create("raw", tokenizer)
        assert made.completion_text("a", words(tokenizer, "c d <eos> <pad>"), tokenizer) == "c d"


class TestChat:
    def test_prompt_and_completion_join_to_the_template(self, chat_tokenizer):
        made = PromptFormat.create("chat", chat_tokenizer)
        assert made.prompt_ids("a b", chat_tokenizer) == words(chat_tokenizer, "u a b <eos> z v")
        assert made.completion_ids("a b", "c", chat_tokenizer) == words(chat_tokenizer, "c <eos>")
        messages = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]
        whole = chat_tokenizer(chat_tokenizer.apply_chat_template(messages, tokenize=False))["input_ids"]
        joined = made.prompt_ids("a b", chat_tokenizer) + made.completion_ids("a b", "c", chat_tokenizer)
        assert joined == whole[: len(joined)] and len(whole) == len(joined) + 1

    @pytest.mark.parametrize("end", ["<eos> z ", " y z ", " y <eos> z ", ""])
    @pytest.mark.parametrize("answer", ["c", "y", "z", ""])
    def test_unfinished_completion_has_no_end_of_turn(self, tokenizer, end, answer):
        changed = copy.deepcopy(tokenizer)
        changed.chat_template = CHAT.replace("<eos> z ", end)
        made = PromptFormat.create("chat", changed)
        assert made.completion_ids("a b", answer, changed, finished=False) == words(tokenizer, answer)

    def test_messages_as_prompt(self, chat_tokenizer):
        made = PromptFormat.create("chat", chat_tokenizer)
        turns = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
        ]
        assert made.prompt_ids(turns, chat_tokenizer) == words(chat_tokenizer, "u a <eos> z v b <eos> z u c <eos> z v")

    def test_a_template_recorded_elsewhere_wins(self, chat_tokenizer):
        made = PromptFormat.create("chat", chat_tokenizer)
        other = copy.deepcopy(chat_tokenizer)
        other.chat_template = "{% for turn in messages %}w1 {{ turn['content'] }}{% endfor %}"
        assert made.prompt_ids("a", other) == made.prompt_ids("a", chat_tokenizer)

    def test_template_that_rewrites_the_prompt(self, tokenizer):
        changed = copy.deepcopy(tokenizer)
        changed.chat_template = (
            "{{ messages | length }} {% for turn in messages %}{{ turn['content'] }}<eos>{% endfor %}"
        )
        made = PromptFormat.create("chat", changed)
        with pytest.raises(InstructGPTError, match="continuation of its prompt"):
            made.completion_ids("a", "b", changed)

    @pytest.mark.parametrize(
        ("template", "sentence"),
        [
            ("{{ raise_exception('System role not supported') }}", "System role not supported"),
            ("{{ messages[7]['content'] | trim + 1 }}", ".*"),
        ],
    )
    def test_template_that_refuses_a_conversation(self, tokenizer, template, sentence):
        changed = copy.deepcopy(tokenizer)
        changed.chat_template = template
        turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]
        with pytest.raises(
            InstructGPTError, match=f"refuses a conversation with the roles system, user: {sentence}. Change its turns"
        ):
            PromptFormat.create("chat", changed).prompt_ids(turns, changed)


class TestCompletionText:
    """The inverse of `completion_ids`: what the format writes goes, what the completion holds stays."""

    TEXTS = ("  if x:\n    y\n", "\n\nSo it is. ", "it", " it", "", "  ")

    @pytest.mark.parametrize("text", TEXTS)
    @pytest.mark.parametrize("finished", [True, False])
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("name", PLAIN_TEMPLATES)
    def test_plain(self, name, kind, finished, text):
        tokenizer = text_tokenizer(kind)
        made = PromptFormat.create(name, tokenizer)
        ids = made.completion_ids("a", text, tokenizer, finished=finished)
        read = made.completion_text("a", [*ids, tokenizer.pad_token_id], tokenizer)
        # These tokenizers give one space at the start and none the same ids.
        joined = kind in ("always", "first") and name != "user-assistant"
        assert read == (text.removeprefix(" ") if joined and not text.startswith("  ") else text)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("end", ["<end>", " <end>", "<turn>\n<end>", "<turn>\n"])
    @pytest.mark.parametrize("start", ["", "<turn>think\n\n"])
    def test_chat(self, kind, start, end):
        tokenizer = text_tokenizer(kind)
        tokenizer.chat_template = (
            "{% for turn in messages %}{% if turn['role'] == 'user' %}<turn>{{ turn['content'] }}\n{% else %}"
            f"{start}{{{{ turn['content'] }}}}{end}{{% endif %}}{{% endfor %}}"
        )
        made, text = PromptFormat.create("chat", tokenizer), "So:\n  if x:\n    y\n "
        ids = made.completion_ids("a", text, tokenizer)
        assert made.completion_text("a", ids, tokenizer) == text

    def test_template_that_renders_prompts_only(self, tokenizer):
        changed = copy.deepcopy(tokenizer)
        changed.chat_template = "{{ messages | length }}"
        made = PromptFormat.create("chat", changed)
        assert made.completion_text("a", words(tokenizer, "c d"), changed) == "c d"


class TestCreate:
    def test_padding_equal_to_eos(self, tokenizer):
        changed = copy.deepcopy(tokenizer)
        changed.pad_token = changed.eos_token
        with pytest.raises(
            InstructGPTError, match=r"eos_token '<eos>' and pad_token '<eos>' must both exist and differ"
        ):
            PromptFormat.create("raw", changed)

    @pytest.mark.parametrize("missing", ["pad_token", "eos_token"])
    def test_missing_token(self, tokenizer, missing):
        changed = copy.deepcopy(tokenizer)
        setattr(changed, missing, None)
        with pytest.raises(InstructGPTError, match=f"{missing} None"):
            PromptFormat.create("raw", changed)

    @pytest.mark.parametrize(("name", "text"), [("chat", "default a"), ("chat:rag", "rag a")])
    def test_one_of_several_chat_templates(self, tokenizer, name, text):
        changed = copy.deepcopy(tokenizer)
        changed.chat_template = {key: f"{key} {{{{ messages[0]['content'] }}}}" for key in ("default", "rag")}
        made = PromptFormat.create(name, changed)
        assert made.prompt_text("a", changed) == text
        assert PromptFormat.from_dict(made.to_dict()) == made and made.name == "chat"

    def test_unknown_names_of_chat_templates(self, tokenizer):
        changed = copy.deepcopy(tokenizer)
        changed.chat_template = {"tool_use": "a", "rag": "b"}
        with pytest.raises(InstructGPTError, match="has no default one; choose chat:rag, chat:tool_use, or a plain"):
            PromptFormat.create("chat", changed)
        with pytest.raises(InstructGPTError, match="'chat:tools' is not known; did you mean 'chat:tool_use'"):
            PromptFormat.create("chat:tools", changed)

    def test_unknown_name(self, tokenizer):
        with pytest.raises(InstructGPTError, match="'user_assistant' is not known; did you mean 'user-assistant'"):
            PromptFormat.create("user_assistant", tokenizer)

    def test_chat_without_a_template(self, tokenizer):
        with pytest.raises(
            InstructGPTError, match=r"needs a chat template.*Choose a plain template: instruction, raw"
        ):
            PromptFormat.create("chat", tokenizer)


class TestRecord:
    def test_round_trip(self, chat_tokenizer):
        made = PromptFormat.create("chat", chat_tokenizer)
        record = made.to_dict()
        assert PromptFormat.from_dict(record) == made
        assert record["sha256"] != PromptFormat.create("raw", chat_tokenizer).to_dict()["sha256"]

    def test_same_format_passes(self, tokenizer):
        PromptFormat.create("raw", tokenizer).check_same(PromptFormat.create("raw", tokenizer), "here")

    def test_mismatch_names_the_fields_and_both_values(self, tokenizer):
        first, second = PromptFormat.create("raw", tokenizer), PromptFormat.create("user-assistant", tokenizer)
        with pytest.raises(InstructGPTError) as caught:
            first.check_same(second, "reward.yaml: prompt_template")
        message = str(caught.value)
        assert message.startswith("reward.yaml: prompt_template: ")
        assert "name: 'raw' there, 'user-assistant' here" in message
        assert "template: '{prompt}' there" in message and "completion_prefix: '' there, ' ' here" in message
        assert "eos_token" not in message and "pad_token" not in message
