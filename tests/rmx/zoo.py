"""Tiny random models of every causal-LM architecture of the installed transformers, and what rmx does with each.

python tests/rmx/zoo.py > docs/architectures.md
"""

import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rmx.config import LoraConfig
from rmx.errors import RmxError
from rmx.models import forward, lora, model
from rmx.models.model import CausalLM
from rmx.sampling import engines
from rmx_kernels import token_logprobs

V, H, LAYERS, HEADS = 61, 32, 2, 4
# Settings of transformers' configurations by name, where they are numbers; what is not here keeps its default.
SIZES: dict[str, int] = {
    **dict.fromkeys(("vocab_size", "text_vocab_size", "org_vocab_size"), V),
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim", "embedding_size", "lru_width"), H
    ),
    **dict.fromkeys(("emb_dim", "hidden_dim", "attention_hidden_size", "embedding_dim"), H),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_blocks"), LAYERS),
    **dict.fromkeys(("encoder_layers", "num_encoder_layers", "num_decoder_layers", "num_mem_blocks"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), HEADS),
    **dict.fromkeys(("encoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "kv_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("intermediate_size_mlp", "moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("shared_intermediate_size", "dense_intermediate_size", "expert_intermediate_size"), 16),
    **dict.fromkeys(("dff", "inner_dim", "feed_forward_size", "ffn_hidden_size"), 48),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_seq_len"), 64),
    **dict.fromkeys(("head_dim", "v_head_dim", "qk_head_dim", "kv_channels", "d_kv"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_d_head", "mamba_head_dim"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "moe_top_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "mamba_n_groups", "n_groups", "num_expert_groups"), 1),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "mamba_d_state", "ssm_state_size", "state_size", "mamba_num_heads"), 8),
    **dict.fromkeys(("qk_rope_head_dim",), 4),
    **dict.fromkeys(("linear_num_key_heads",), 2),
    **dict.fromkeys(("linear_num_value_heads",), 4),
    **dict.fromkeys(("mamba_n_heads",), 8),
    **dict.fromkeys(("mamba_d_ssm",), 64),
    **dict.fromkeys(("sliding_window", "attention_window_size", "local_attention", "attention_chunk_size"), 16),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), 1),
    **dict.fromkeys(("pad_token_id", "bos_token_id"), 1),
    **dict.fromkeys(("eos_token_id",), 2),
    **dict.fromkeys(("hidden_size_per_layer_input", "num_kv_shared_layers", "num_nextn_predict_layers"), 0),
    **dict.fromkeys(("rotary_dim",), 4),
}
LATENT = {"head_dim": 4, "qk_head_dim": 12, "num_key_value_heads": HEADS}  # multi-head latent attention: of its parts
MORE: dict[str, dict[str, Any]] = {  # what an architecture asks for beyond sizes
    "bamba": {"attn_layer_indices": [1]},
    "deepseek_v2": {"topk_group": 1, "n_group": 1, "topk_method": "greedy"},
    "gemma3n_text": {"hidden_size_per_layer_input": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    "nemotron": {"head_dim": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"is_decoder": True},
    "xlnet": {"d_head": 8},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(model_type: str) -> Any:
    """With 2 layers and 32 columns; lists of layers are made anew from these by the configuration itself."""
    default = AutoConfig.for_model(model_type)
    given = _shrunk(default.to_dict()) | MORE.get(model_type, {})
    return type(default).from_dict(given)


def _shrunk(settings: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    sizes = SIZES | (LATENT if "qk_rope_head_dim" in settings else {})
    for name, value in settings.items():
        if isinstance(value, dict) and ("model_type" in value or name.endswith("_config")):
            found[name] = _shrunk(value)
        elif name == "per_layer_config":
            found[name] = {}
        elif name in sizes and (type(value) is int or (name == "head_dim" and value is None)):
            found[name] = sizes[name]
        elif isinstance(value, list) and len(value) == settings.get("num_hidden_layers") and len(value) > LAYERS:
            found[name] = _ends(value)
        else:
            found[name] = value
    return found


def _ends(values: list[Any]) -> list[Any]:
    """The first kind of layer and another one, where there is one."""
    return [values[0], next((value for value in values if value != values[0]), values[0])]


def tiny_model(model_type: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    try:
        built = AutoModelForCausalLM.from_config(tiny_config(model_type), dtype=dtype)
    except ValueError as fault:
        if "attention implementation" not in str(fault):
            raise
        built = AutoModelForCausalLM.from_config(tiny_config(model_type), dtype=dtype, attn_implementation="eager")
    return built.eval().requires_grad_(False)


def wrapped(model_type: str) -> CausalLM:
    """As rmx has it; refusals of the head are ModelErrors."""
    return model.wrap(tiny_model(model_type), _Tokens())


class _Tokens(list[str]):
    eos_token_id = 2


@torch.no_grad()
def head(model_type: str) -> None:
    """Log-probs of the head are those of the model's own logits, or it is refused."""
    lm = wrapped(model_type)
    ids = torch.randint(3, V, (2, 7), generator=torch.Generator().manual_seed(0))
    logits = lm.model(input_ids=ids, use_cache=False)[0].float()
    close(lm.logits(lm.hidden(ids, use_cache=False)), logits)
    close(token_logprobs(lm.model, ids).logprob, logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0])


@torch.no_grad()
def packing(model_type: str) -> None:
    """States of packed sequences are those of the same sequences alone, or the check refuses them."""
    lm = wrapped(model_type)
    forward.check(lm)
    sequences = [[(11 * i + 5 * j) % V for j in range(n)] for i, n in enumerate((7, 3, 12, 5))]
    alone = [lm.hidden(torch.tensor([ids]), use_cache=False)[0] for ids in sequences]
    close(forward.final_hidden(lm, sequences), torch.cat(alone))


@torch.no_grad()
def decoding(model_type: str) -> None:
    """A greedy completion, token by token, is that of whole sequences, or the engine refuses the model."""
    lm = wrapped(model_type)
    engines.check_decoding(lm, padded=True)
    prompts = [[5, 6, 7, 8], [9, 10]]
    decoder, tokens = engines.Decoder(lm, prompts, 1), [list(prompt) for prompt in prompts]
    for _ in range(3):
        close(decoder.hidden, torch.cat([lm.hidden(torch.tensor([t]), use_cache=False)[:, -1] for t in tokens]))
        chosen = lm.logits(decoder.hidden).argmax(-1)
        tokens = [[*t, int(token)] for t, token in zip(tokens, chosen, strict=True)]
        decoder.read(chosen)


@torch.no_grad()
def adapters(model_type: str) -> None:
    """The logits with an adapter are those with the same one in PEFT, or its layers are refused."""
    lm = wrapped(model_type)
    ids = torch.randint(3, V, (2, 7), generator=torch.Generator().manual_seed(0))
    output, body = lm.model.get_output_embeddings(), model.text_decoder(lm.model)
    names = [n for n, m in body.named_modules() if isinstance(m, torch.nn.Linear) and m is not output]
    targets = sorted({name.rsplit(".", 1)[-1] for name in names})
    targets = [name for name in targets if "_proj" in name or "query" in name or name in ATTENTION] or targets
    if not targets:
        raise lora.AdapterError("no linear layers")
    settings = LoraConfig(r=2, alpha=4, targets=targets)
    adapter = lora.attach(lm.model, settings, seed=0)
    for layer in adapter.layers.values():
        layer.lora_B.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    ours = lm.model(input_ids=ids, use_cache=False)[0]
    with tempfile.TemporaryDirectory() as folder:
        lora.save_adapter(adapter, Path(folder) / "adapter", "zoo")
        lora.detach(lm.model, adapter)
        theirs = PeftModel.from_pretrained(lm.model, f"{folder}/adapter")
        close(theirs(input_ids=ids, use_cache=False)[0], ours)


ATTENTION = ("q", "k", "v", "o", "qkv", "Wqkv", "query", "key", "value", "dense", "c_attn", "fc1", "fc2", "out_lin")
CHECKS = {"head": head, "packing": packing, "loop engine": decoding, "adapter": adapters}


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got.float(), expected.float(), rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def outcome(model_type: str, name: str) -> str:
    """ "yes", or the refusal; anything else is an error."""
    try:
        CHECKS[name](model_type)
    except RmxError as refusal:
        return str(refusal)
    return "yes"


def architectures() -> list[str]:
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def why_not_built(model_type: str) -> str:
    """What the architecture itself says to sizes as small as these; empty where it runs."""
    try:
        tiny_model(model_type)(input_ids=torch.arange(3, 11)[None], use_cache=False)
    except Exception as fault:  # of transformers, whatever it is
        return type(fault).__name__
    return ""


def table() -> None:
    print(HEADER.format(version=transformers.__version__))
    for kind in architectures():
        if why := why_not_built(kind):
            print(f"| {kind} | not built ({why}) | | | |")
            continue
        cells = ("yes" if outcome(kind, name) == "yes" else "refused" for name in CHECKS)
        print(f"| {kind} | {' | '.join(cells)} |", flush=True)


HEADER = """# Architectures

For each causal LM of transformers {version}, a tiny random model was tried in float32 on a CPU. The table says
whether it is served, or refused with an error that names the reason. Served means:

* head: log-probs by `head_of` equal those of the model's own logits.
* packing: packed sequences have the same states as these sequences alone. If refused, set `model.packing: false`.
* loop engine: it decodes prompts padded on the left like whole sequences. If refused, use another engine.
* adapter: an adapter on all layers of attention and MLP gives the same logits as in PEFT. If refused, use fewer
  targets; the error names the one to leave out.

The table is written by `python tests/rmx/zoo.py > docs/architectures.md`. `pytest -m slow` checks that every model is
either served correctly or refused. Models that are not built do not run in transformers at such sizes, or need packages
that are not installed.

| model type | head | packing | loop engine | adapter |
|---|---|---|---|---|"""

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    table()
