"""Tiny classifiers with random weights and tokenizers of their own, saved as the hub has theirs."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    ModernBertConfig,
    ModernBertForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

WORDS = "i can't help with that sure here is how to do it paris rome the answer".split()
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]
SIZES = {
    "vocab_size": len(WORDS) + len(SPECIAL), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "initializer_range": 0.5,
}  # fmt: skip


def tokenizer(room):
    words = Tokenizer(models.WordLevel({word: at for at, word in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        cls_token="<s>", sep_token="</s>", **({} if room is None else {"model_max_length": room}),
    )  # fmt: skip


def save_roberta(folder, labels=("NORMAL", "REJECTION"), room=None):
    """A classifier of texts, as ProtectAI/distilroberta-base-rejection-v1 is one."""
    torch.manual_seed(0)
    config = RobertaConfig(
        **SIZES, max_position_embeddings=40, type_vocab_size=1, num_labels=len(labels), id2label=dict(enumerate(labels))
    )
    RobertaForSequenceClassification(config).save_pretrained(folder)
    tokenizer(room).save_pretrained(folder)
    return str(folder)


def save_modernbert(folder, room=64):
    """A cross-encoder with one label, as dleemiller/ModernCE-base-sts is one."""
    torch.manual_seed(0)
    config = ModernBertConfig(
        **SIZES, cls_token_id=2, sep_token_id=3, max_position_embeddings=64, num_labels=1, reference_compile=False
    )
    ModernBertForSequenceClassification(config).save_pretrained(folder)
    tokenizer(room).save_pretrained(folder)
    return str(folder)
