"""A byte-level tokenizer small enough for a test: one token per byte and the end-of-sequence token."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 257


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """256 bytes and ``<|endoftext|>``, which is token 256."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>")


def with_post_processor(single: str) -> PreTrainedTokenizerFast:
    """The same with a post-processor that writes a text as ``single`` says, such as ``<|endoftext|> $A``."""
    tokenizer = byte_tokenizer()
    special_tokens = [("<|endoftext|>", 256)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special_tokens)
    return tokenizer


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One that is no byte-level BPE: whole words, with the decoder of WordPiece."""
    words = ["[UNK]", "once", "upon", "a", "time"]
    tokenizer = Tokenizer(models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")
