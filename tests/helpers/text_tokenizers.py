"""Tokenizers that can spell every text, one of each kind that treats spaces in its own way."""

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

KINDS = ("bytes", "always", "first", "legacy")
# Like ChatML's, with a beginning-of-text token and trimmed contents.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for turn in messages %}<turn>{{ turn['role'] }}\n{{ turn['content'] | trim }}<end>\n"
    "{% endfor %}{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)
SPECIAL = ("<s>", "<end>", "<pad>", "<turn>")


def text_tokenizer(kind: str, frame: str = "$A") -> PreTrainedTokenizerFast:
    """A tokenizer of bytes, or of characters with SentencePiece's ways of putting a space before a text.

    `frame` is the tokenizer's frame around every text, such as `<s> $A`.
    """
    if kind == "bytes":
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    else:
        alphabet = [*map(chr, range(33, 127)), "\n", "\u2581"]
    vocabulary = {letter: index for index, letter in enumerate(alphabet)}
    merges = [(":", "\u0120" if kind == "bytes" else "\u2581"), ("i", "t")]
    vocabulary |= {"".join(pair): len(alphabet) + index for index, pair in enumerate(merges)}
    made = Tokenizer(models.BPE(vocabulary, merges))
    if kind == "bytes":
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    elif kind == "legacy":
        made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind)
        made.decoder = decoders.Metaspace(prepend_scheme=kind)
    made.add_special_tokens([AddedToken(name, special=True, normalized=kind == "first") for name in SPECIAL])
    special = [(name, made.token_to_id(name)) for name in SPECIAL]
    made.post_processor = processors.TemplateProcessing(single=frame, special_tokens=special)
    names = {"bos_token": "<s>", "eos_token": "<end>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=CHAT_TEMPLATE, **names)
