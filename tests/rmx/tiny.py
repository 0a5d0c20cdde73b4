"""A tiny random Llama that speaks digits, saved as a Hugging Face directory, and the settings of a run with it."""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rmx.config import Config

WORDS = ["<unk>", "<s>", "</s>", "<user>", "<model>", *"0123456789", "sum", "of", "and", "is", "Question:", "Answer:"]
TEMPLATE = (
    "<s> {% for m in messages %}<user> {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}<model>{% endif %}"
)


def save_tiny_model(path: Path, **config: object) -> Path:
    vocab = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=TEMPLATE
    )
    fast.save_pretrained(path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings = {"vocab_size": len(vocab), "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, **sizes}
    tiny = LlamaForCausalLM(LlamaConfig(**{**settings, "initializer_range": 0.3, **config}))
    tiny.save_pretrained(path)
    return path


def tiny_run(model: Path, problems: Path, run_dir: Path) -> Config:
    """A run of all stages in seconds."""
    return Config.model_validate(
        {
            "run_dir": str(run_dir),
            "model": {"name": str(model), "dtype": "float32", "device": "cpu"},
            "problems": {"sources": [{"jsonl": str(problems)}], "train_count": 20, "evaluate_count": 20},
            "rollouts": {"samples": 12, "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 4},
            "select": {"max_problems": 8, "budget": 0.5},
            "lora": {"r": 2, "alpha": 4},
            "train": {"epochs": 1, "sequences_per_step": 8, "warmup_steps": 2, "learning_rate": 0.01},
            "evaluate": {"samples": 2, "temperature": 1.0, "max_new_tokens": 4, "bootstrap": 200},
        }
    )
