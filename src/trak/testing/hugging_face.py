"""Tiny Hugging Face models with random weights, for tests. Need transformers.

All have 8 features, layers of 12, two heads and 16 positions. Vocabularies begin with padding, begin and end: draw tokens from 3 on.

Arguments of all: `layers`; `vocabulary`, tokens that there are; `attention`, an `attn_implementation` or None for the library's choice;
`options`, further entries of the configuration.
"""

from __future__ import annotations

from typing import Any

TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LAYERS = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2}
WIDTHS = {**LAYERS, "max_position_embeddings": 16}


def bert(*, layers: int = 1, vocabulary: int = 19, attention: str | None = "eager", **options: Any) -> Any:
    """A text classifier of two classes."""
    import transformers

    config = transformers.BertConfig(
        **_shared(vocabulary, attention, num_hidden_layers=layers, **WIDTHS, **options)
    )
    return transformers.BertForSequenceClassification(config)


def masked_bert(
    *, layers: int = 1, vocabulary: int = 19, attention: str | None = "eager", **options: Any
) -> Any:
    """BERT that fills in masked tokens."""
    import transformers

    config = transformers.BertConfig(
        **_shared(vocabulary, attention, num_hidden_layers=layers, **WIDTHS, **options)
    )
    return transformers.BertForMaskedLM(config)


def gpt2(*, layers: int = 1, vocabulary: int = 19, attention: str | None = "eager", **options: Any) -> Any:
    """A causal language model with a table of positions and an output layer tied to the tokens."""
    import transformers

    widths = {"n_embd": 8, "n_layer": layers, "n_head": 2, "n_positions": 16}
    config = transformers.GPT2Config(**_shared(vocabulary, attention, **widths, **options))
    return transformers.GPT2LMHeadModel(config)


def llama(*, layers: int = 1, vocabulary: int = 19, attention: str | None = "eager", **options: Any) -> Any:
    """A causal language model with rotated positions. Norms and rotations are in float32 whatever its weights are in."""
    import transformers

    config = transformers.LlamaConfig(
        **_shared(vocabulary, attention, num_hidden_layers=layers, **WIDTHS, **options)
    )
    return transformers.LlamaForCausalLM(config)


def mixtral(*, layers: int = 1, vocabulary: int = 19, attention: str | None = "eager", **options: Any) -> Any:
    """A causal language model with four experts, of which two see each token; otherwise like `llama`."""
    import transformers

    experts = {"num_key_value_heads": 1, "num_local_experts": 4, "experts_implementation": "eager"}
    config = transformers.MixtralConfig(
        **_shared(vocabulary, attention, num_hidden_layers=layers, **WIDTHS, **experts, **options)
    )
    return transformers.MixtralForCausalLM(config)


def t5(*, layers: int = 1, vocabulary: int = 19, attention: str | None = "eager", **options: Any) -> Any:
    """An encoder and a decoder with tables of relative positions. Norms are in float32 whatever its weights are in."""
    import transformers

    widths = {"d_model": 8, "d_ff": 12, "d_kv": 4, "num_layers": layers, "num_heads": 2}
    config = transformers.T5Config(
        **_shared(vocabulary, attention, decoder_start_token_id=0, **widths, **options)
    )
    return transformers.T5ForConditionalGeneration(config)


def clip(*, layers: int = 1, vocabulary: int = 19, attention: str | None = "eager", **options: Any) -> Any:
    """Two towers, for texts and for images of 8 × 8 pixels in patches of 4; pairs meet in 6 dimensions."""
    import transformers

    tower = {"num_hidden_layers": layers, **LAYERS}
    towers: dict[str, Any] = {
        "text_config": {"vocab_size": vocabulary, "max_position_embeddings": 16, **tower, **TOKENS},
        "vision_config": {"image_size": 8, "patch_size": 4, **tower},
        "attn_implementation": attention,
    }
    return transformers.CLIPModel(transformers.CLIPConfig(projection_dim=6, **towers, **options))


def _shared(vocabulary: int, attention: str | None, **more: Any) -> dict[str, Any]:
    return {"vocab_size": vocabulary, "attn_implementation": attention, **TOKENS, **more}
