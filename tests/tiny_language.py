"""A causal language model of two layers with its tokenizer, and instructions for it, as files."""

import json
from pathlib import Path

import numpy as np
import torch

WORDS = "cat dog house river stone apple green seven".split()
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTEXT = 128  # tokens


def tiny_language(folder, *, template=True, seed=0, tied=True) -> Path:
    """Save a Llama of width 32 with a byte-pair tokenizer, and a chat template unless it is to have none."""
    import tokenizers
    import transformers

    transformers.utils.logging.disable_progress_bar()
    folder = Path(folder)
    pieces = tokenizers.Tokenizer(tokenizers.models.BPE())
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    pieces.pre_tokenizer = byte_level(add_prefix_space=False)
    pieces.decoder = tokenizers.decoders.ByteLevel()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=byte_level.alphabet(), show_progress=False
    )
    pieces.train_from_iterator([f"What is the sum of {word}?\nuser assistant system" for word in WORDS] * 3, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=pieces, pad_token=special[0], eos_token=special[2], chat_template=CHAT if template else None
    )
    tokenizer.save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=pieces.get_vocab_size(), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=CONTEXT, initializer_range=0.1,
        tie_word_embeddings=tied, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def instructions(folder, n, *, sources=("sums", "words"), seed=0, name="instructions.jsonl") -> Path:
    """Write n prompts with completions, source by source in turn: a sum of two digits, or a word to repeat."""
    draws = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        source = sources[i % len(sources)]
        if source == "sums":
            a, b = draws.integers(10, size=2)
            prompt, completion = f"What is {a} + {b}?", f"{a + b}"
        else:
            word = draws.choice(WORDS)
            prompt, completion = f"Repeat {word}", f"{word} {word}"
        rows.append({"prompt": prompt, "completion": completion, "source": source})
    file = Path(folder) / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
