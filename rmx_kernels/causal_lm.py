"""token_logprobs: statistics of the next token of any causal LM of transformers, without its logits.

It does not import transformers or PEFT. It recognises a model by its methods (get_output_embeddings, base_model or
get_decoder, config), and an adapter by the methods of its layers.
"""

import inspect
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from rmx_kernels import checks
from rmx_kernels.head_check import check_logits
from rmx_kernels.logits import LoRA, compute_dtype
from rmx_kernels.results import VocabStats
from rmx_kernels.statistics.api import linear_entropy_topk
from rmx_kernels.wrappers import gathered, inside

# The names in the configurations of transformers for what the model does to its logits.
MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")  # Cohere, Falcon-H1, Muse Spark
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")  # Granite, Inkling
MULTIPLY_ALL = ("hyperclovax",)  # model types that multiply by what the others divide by
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma 2, RecurrentGemma, xLSTM
ASKED = ("return_dict", "output_attentions", "output_hidden_states")  # of a model, and no input

CHECKED: WeakKeyDictionary[nn.Module, set[tuple[Any, ...]]] = WeakKeyDictionary()  # heads that were seen to be right


def token_logprobs(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    k: int = 0,
    temperature: float | Tensor = 1.0,
    logits_to_keep: int | None = None,
    early_gradient: bool = False,
    check: bool = True,
    impl: str | None = None,
    **kwargs: Any,
) -> VocabStats:
    r"""Log-prob of each next token, entropy and top-k of a causal LM, without storing its logits.

    .. math::
        \mathrm{logprob}_{b,p} = \log p(x_{b,p+1} \mid x_{b,0..p}), \quad
        p(\cdot \mid x_{b,0..p}) = \mathrm{softmax}(\mathrm{logits}_{b,p} / \mathrm{temperature}_{b,p})

    Position p predicts token p + 1, so L tokens have L - 1 results. logits are those that ``model(input_ids,
    attention_mask, **kwargs)`` would return, with the scale, softcap, bias and adapters of its head (see
    :func:`head_of`) and the model's own position ids. Most models count positions from the left edge, padding included:
    with padding on the left, pass ``position_ids``, as for the model itself.

    Args:
        model: a causal LM of transformers, plain, as a PeftModel, compiled, or in DistributedDataParallel.
        input_ids: [B, L], int64 or int32.
        attention_mask: [B, L], 1 at tokens and 0 at padding on either side; None for no padding. If token p or p + 1
            is padding, every result is 0 and has no gradient. On a GPU a mask costs one synchronisation.
        k: number of most probable tokens to return, 0 <= k <= V.
        temperature: divides the logits, > 0: a number, or a tensor with one value per row of the results, [B, L - 1] or
            [B, logits_to_keep], as in :func:`entropy_topk`; not read where a result is 0 for padding. For one
            temperature per sequence, [B]: ``temperature[:, None].expand(-1, L - 1)``.
        logits_to_keep: return only this many predicted tokens, the last ones, 1 to L - 1 (such as the length of a
            completion; transformers counts one more); None for all.
        early_gradient: for a loss that depends only on the log-probs, as in :func:`linear_entropy_topk`.
        check: as in :func:`head_of`.
        impl: None (best available), "reference", "cpu" or "triton".
        kwargs: further inputs of the model (position_ids, pixel_values, ...).

    Returns:
        :class:`VocabStats` with rows [B, L - 1] or [B, logits_to_keep], float32 (float64 for float64 models), in nats;
        topk_logprobs and topk_ids [B, rows, K]. All except topk_ids are differentiable with respect to
        everything that the model trains: body, head and adapters. Under ``torch.no_grad`` nothing is stored.

    Raises:
        TypeError, ValueError: a wrong argument, by name, or a model whose head is not supported.
        BackendUnavailable: ``impl`` cannot run here.

    Source: per-token log-probs of GRPO, arXiv 2402.03300, section 4.1; entropy gate of arXiv 2605.06241, section 3.

    >>> stats = token_logprobs(model, input_ids, attention_mask, k=8)  # doctest: +SKIP
    >>> ratio = (stats.logprob - old_logprob).exp()  # doctest: +SKIP
    """
    _check_inputs(input_ids, attention_mask, logits_to_keep, kwargs)
    head = head_of(model, check)
    operator = head.kwargs(temperature) | {"early_gradient": early_gradient, "k": k, "impl": impl}
    L = input_ids.shape[1]
    rows = slice(0 if logits_to_keep is None else L - 1 - logits_to_keep, L - 1)
    hidden = head.hidden(input_ids, attention_mask, **kwargs)[:, rows]
    target = input_ids[:, 1:][:, rows]
    if attention_mask is None:
        return linear_entropy_topk(hidden, target=target, **operator)
    tokens = attention_mask != 0
    live = (tokens[:, :-1] & tokens[:, 1:])[:, rows]
    operator["temperature"] = checks.temperature_of(operator["temperature"], hidden, live)
    # What is computed from padding can be NaN, which 0 times a gradient would keep, so those rows are left out.
    stats = linear_entropy_topk(hidden[live], target=target[live], **operator)
    return VocabStats._make(None if x is None else _placed(x, live) for x in stats)


def head_of(model: nn.Module, check: bool = True) -> "CausalLMHead":
    r"""The final hidden states of a causal LM and its head, as arguments for every linear operator.

    .. math:: \mathrm{logits} = \mathrm{cap}(\mathrm{scale} \, (h (W + \sum_j s_j B_j A_j)^\top + b))

    with cap(u) = softcap * tanh(u / softcap), or u without a softcap.

    Args:
        model: a causal LM of transformers, plain, as a PeftModel, compiled, or in DistributedDataParallel.
        check: for a head seen for the first time, run the model on 8 tokens in evaluation mode, and compare with the
            formula how the model transforms the output of its head, in float32 and for numbers of all sizes. False
            skips this run; a head that is visibly unsupported is still an error.

    Returns:
        :class:`CausalLMHead`.

    Raises:
        TypeError: model is not a module. ValueError: not a causal LM; a head that is not a plain linear layer, or is
        quantised; an adapter on it other than LoRA, or LoRA with a variant (DoRA), a bias, or dropout in training mode;
        prompt learning or activated LoRA; logits that differ from the model's own.

    Source: the heads of transformers 5.23 (Gemma 2, Cohere, Granite, ...) and the layers of PEFT 0.21.

    >>> head = head_of(model)  # doctest: +SKIP
    >>> hidden = head.hidden(input_ids, attention_mask)  # doctest: +SKIP
    >>> linear_entropy_topk(hidden, **head.kwargs(), k=8)  # doctest: +SKIP
    """
    head = CausalLMHead(model)
    linear, pairs = head.linear()
    seen = CHECKED.setdefault(head.causal_lm, set())
    key = (id(linear), *(id(A) for A, _, _ in pairs), head.scale, head.softcap)
    if check and key not in seen:
        check_logits(head)
        seen.add(key)
    return head


@dataclass(frozen=True)
class CausalLMHead:
    """Result of :func:`head_of`. It reads the model at every call, so it stays valid when adapters train or switch."""

    model: nn.Module

    def hidden(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Final hidden states [B, L, H], after the last norm, in the dtype of the head; inputs as the model takes them.

        Raises:
            ValueError: ``adapter_names``, which only works in the forward of a PeftModel; an input of the causal LM
                that its decoder does not take; or a module in DistributedDataParallel, whose gradients would not be
                averaged, since the forward of the wrapper does not run.
        """
        if "adapter_names" in kwargs:
            raise ValueError("adapter_names: expected one set of adapters for the batch, got names for each sequence")
        if torch.is_grad_enabled() and getattr(self.model, "require_backward_grad_sync", False):
            raise ValueError(
                "model: expected the module inside DistributedDataParallel, got the wrapper; gradients are recorded, "
                "but the wrapper's forward, which averages them, does not run; make this call in its forward "
                "(in_forward), or score under torch.no_grad()"
            )
        decoder = self.decoder
        known = (set(inspect.signature(part.forward).parameters) for part in (self.causal_lm, decoder))
        lost = sorted({name for name, value in kwargs.items() if value is not None} & next(known) - next(known))
        if lost := [name for name in lost if name not in ASKED]:
            raise ValueError(
                f"{lost[0]}: expected only inputs of {type(decoder).__name__}, which gives the hidden states, got an "
                f"input that only {type(self.causal_lm).__name__} takes"
            )
        kwargs.setdefault("use_cache", False)
        try:
            hidden = decoder(input_ids=input_ids, attention_mask=attention_mask, **kwargs)[0]
        except RuntimeError as error:
            if "mixed torch.Tensor and DTensor" not in str(error):
                raise
            raise ValueError(
                "model: expected a decoder with full parameters in its own forward, got parameters that fully_shard "
                f"gathers only in the forward of {type(self.outer).__name__}: make this call in that forward "
                "(in_forward), or apply fully_shard to the decoder too"
            ) from error
        weight = self.linear()[0].weight
        if hidden.shape[-1] != weight.shape[1]:
            raise ValueError(
                f"model: expected final hidden states with {weight.shape[1]} columns, as in the output head, "
                f"got shape {tuple(hidden.shape)} from {type(decoder).__name__}"
            )
        return hidden.to(weight.dtype)

    def kwargs(self, temperature: float | Tensor = 1.0) -> dict[str, Any]:
        """weight [V, H], bias [V] or None, lora or None, softcap and temperature: arguments of every linear operator.

        temperature: a number, or a tensor with one value per row that the operator will get. The scale of the logits
        is included in softcap and temperature. Several LoRA pairs become one pair, whose rank is the sum of their
        ranks, in the dtype of the head. Operators with a base use ``lora`` for the student only: compute base_hidden
        under ``model.disable_adapter()``. A trained head (modules_to_save) is used for the base too. A head that
        fully_shard has sharded over ranks is gathered, see :func:`gathered`.
        """
        checks.scaling(temperature, None, None)
        linear, pairs = self.linear()
        pairs = [(gathered(A), gathered(B), scale) for A, B, scale in pairs]
        if isinstance(temperature, Tensor):
            temperature = temperature.to(compute_dtype(linear.weight.dtype))
        # cap_c(s u) / T = cap_(c / s)(u) / (T / s), which rounds nothing, as scaled hidden states would
        return {
            "weight": gathered(linear.weight),
            "bias": None if linear.bias is None else gathered(linear.bias),
            "lora": _one_pair(pairs, linear.weight.dtype),
            "softcap": None if self.softcap is None else self.softcap / self.scale,
            "temperature": temperature / self.scale,
        }

    @property
    def outer(self) -> Any:
        """The model without the wrappers of DistributedDataParallel and torch.compile, but with PEFT's, if any."""
        model = self.model
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        while (inner := inside(model)) is not None:
            if "_fsdp_wrapped_module" in model._modules:
                raise ValueError(
                    "model: expected a module with full weights, got FullyShardedDataParallel, which gathers weights "
                    "and averages gradients only in its own forward: make this call in that forward (in_forward), or "
                    "use fully_shard"
                )
            model = inner
        return model

    @property
    def causal_lm(self) -> Any:
        """The causal LM of transformers itself."""
        model = self.outer
        for config in getattr(model, "peft_config", {}).values():
            if getattr(config, "is_prompt_learning", False) or getattr(config, "alora_invocation_tokens", None):
                raise ValueError(
                    f"model: expected adapters in the layers of the model, got {config.peft_type}, which changes "
                    f"the inputs in the forward of {type(model).__name__}"
                )
        if hasattr(model, "get_base_model"):
            model = CausalLMHead(model.get_base_model()).outer
        config = getattr(model, "config", None)
        if getattr(config, "is_encoder_decoder", False) or not hasattr(model, "get_output_embeddings"):
            raise ValueError(f"model: expected a causal LM of transformers, got {type(model).__name__}")
        return model

    @property
    def decoder(self) -> Any:
        """The part of the model that computes the final hidden states, with image encoders if it has any."""
        model = self.causal_lm
        decoder = getattr(model, "base_model", model)
        if decoder is model:
            decoder = model.get_decoder()
        if decoder is model:
            decoder = getattr(model, "model", model)
        if decoder is model:
            raise ValueError(f"model: expected a causal LM around a decoder, got {type(model).__name__}")
        if getattr(decoder, "get_output_embeddings", lambda: None)() is not None:  # a causal LM in a wrapper: Llama 4
            return CausalLMHead(decoder).decoder
        return decoder

    @property
    def scale(self) -> float:
        """The factor that multiplies the logits."""
        config, scale = self._config, 1.0
        for name in MULTIPLIERS:
            scale *= _number(config, name, 1.0)
        for name in DIVISORS:
            number = _number(config, name, 1.0)
            scale = scale * number if getattr(config, "model_type", "") in MULTIPLY_ALL else scale / number
        return scale

    @property
    def softcap(self) -> float | None:
        caps = [cap for name in SOFTCAPS if (cap := _number(self._config, name, None)) is not None]
        return caps[0] if caps else None

    @property
    def _config(self) -> Any:
        config = self.causal_lm.config
        return config.get_text_config() if hasattr(config, "get_text_config") else config

    def linear(self) -> tuple[Any, list[LoRA]]:
        """The linear layer of the head without its adapters, and the LoRA pairs that are active on it."""
        head = self.causal_lm.get_output_embeddings()
        pairs: list[LoRA] = []
        while True:
            active = [] if getattr(head, "disable_adapters", False) else list(getattr(head, "active_adapters", ()))
            copies = getattr(head, "modules_to_save", None)
            if isinstance(copies, nn.ModuleDict):
                head = copies[active[0]] if active and active[0] in copies else head.original_module  # one at a time
            elif hasattr(head, "base_layer") and hasattr(head, "active_adapters"):  # a layer of PEFT
                if head.merged and head.disable_adapters:
                    head.unmerge()  # as its forward would
                pairs += [] if head.merged else _active_pairs(head, active)
                head = head.base_layer
            else:
                break
        if getattr(type(head), "forward", None) is not nn.Linear.forward:
            raise ValueError(f"model: expected torch.nn.Linear as its output head, got {type(head).__name__}")
        weight = head.weight
        plain = type(weight) in (Tensor, nn.Parameter) or checks.is_sharded(weight)
        if not plain or weight.dtype not in checks.FLOATS or weight.dim() != 2:
            raise ValueError(
                f"model: expected an output head with a full floating-point weight [V, H], got "
                f"{type(weight).__name__} of {weight.dtype} and shape {tuple(weight.shape)}"
            )
        return head, pairs


def _check_inputs(input_ids: object, attention_mask: object, logits_to_keep: object, kwargs: dict[str, Any]) -> None:
    checks.is_tensor("input_ids", input_ids)
    assert isinstance(input_ids, Tensor)
    if input_ids.dtype not in checks.INTEGERS:
        raise TypeError(f"input_ids: expected int64 or int32 token ids, got {input_ids.dtype}")
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise ValueError(f"input_ids: expected shape [B, L] with L >= 1, got {tuple(input_ids.shape)}")
    if kwargs.get("past_key_values") is not None:
        raise ValueError("past_key_values: expected whole sequences without a cache, got a cache")
    if attention_mask is not None:
        checks.is_tensor("attention_mask", attention_mask)
        assert isinstance(attention_mask, Tensor)
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask: expected the shape of input_ids, {tuple(input_ids.shape)}, "
                f"got {tuple(attention_mask.shape)}"
            )
    if logits_to_keep is None:
        return
    if isinstance(logits_to_keep, bool) or not isinstance(logits_to_keep, int):
        raise TypeError(f"logits_to_keep: expected an int or None, got {type(logits_to_keep).__name__}")
    if not 1 <= logits_to_keep < input_ids.shape[1]:
        raise ValueError(
            f"logits_to_keep: expected 1 <= logits_to_keep <= L - 1 = {input_ids.shape[1] - 1}, got {logits_to_keep}"
        )


def _placed(values: Tensor, live: Tensor) -> Tensor:
    """The rows [n, ...] where live [B, rows] is True, and 0 elsewhere."""
    return values.new_zeros(*live.shape, *values.shape[1:]).index_put((live,), values)


def _number(config: Any, name: str, default: float | None) -> Any:
    value = getattr(config, name, None)
    if value is None:
        return default
    if not value > 0:
        raise ValueError(f"model: expected config.{name} above 0, got {value}")
    return float(value)


def _active_pairs(layer: Any, active: list[str]) -> list[LoRA]:
    """Of PEFT's layer around the output head."""
    if active and not (type(layer).__name__ == "Linear" and isinstance(getattr(layer, "lora_A", None), nn.ModuleDict)):
        kind = f"{type(layer).__module__}.{type(layer).__name__}"
        raise ValueError(f"model: expected LoRA on its output head, or no adapter, got {kind}")
    pairs = []
    for name in active:
        if name not in layer.lora_A:
            continue
        A, B, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
        if name in getattr(layer, "lora_variant", {}):
            variant = type(layer.lora_variant[name]).__name__
            raise ValueError(f"model: expected plain LoRA on its output head, got {variant} in adapter {name!r}")
        if B.bias is not None:
            raise ValueError(f"model: expected LoRA without a bias on its output head, got one in adapter {name!r}")
        if dropout.training and getattr(dropout, "p", 0) > 0:
            raise ValueError(
                f"model: expected LoRA without dropout on its output head, got p = {dropout.p} in adapter {name!r}, "
                "which is in training mode"
            )
        pairs.append((A.weight, B.weight, float(layer.scaling[name])))
    return pairs


def _one_pair(pairs: list[LoRA], dtype: torch.dtype) -> LoRA | None:
    """PEFT keeps adapters in float32, whatever the model; the operators multiply in one dtype."""
    pairs = [(A.to(dtype), B.to(dtype), scale) for A, B, scale in pairs]
    if len(pairs) < 2:
        return pairs[0] if pairs else None
    return torch.cat([scale * A for A, _, scale in pairs]), torch.cat([B for _, B, _ in pairs], dim=1), 1.0
