"""A tiny random language model that reads any text, byte by byte, for tests of tasks in plain English."""

import functools

import tiny_models
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<eos>")
SPACED = ("A", "B", "C", "D")  # letters that are one token after a space too
CHAT = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</{{ message['role'] }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@functools.cache
def tokenizer():
    pieces = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(f"Ġ{letter}" for letter in SPACED)]
    merges = [("Ġ", letter) for letter in SPACED]
    bytewise = Tokenizer(models.BPE({piece: at for at, piece in enumerate(pieces)}, merges))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=bytewise, pad_token="<pad>", eos_token="<eos>")
    fast.chat_template = CHAT
    return fast


def model():
    """A Llama of three layers, 32 wide."""
    return tiny_models.build(
        "llama", vocab_size=len(tokenizer()), max_position_embeddings=2048, eos_token_id=SPECIAL.index("<eos>")
    )
