"""SmolLM2-135M in `transformers`, as an oracle."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import transformers

from gpu_service.model.gguf_file import GgufFile
from gpu_service.model.spec import read_spec, resolve_model
from gpu_service.model.weights import HEAD, GgufSource, model_tensors


@lru_cache(maxsize=2)
def smollm2_reference(dtype: torch.dtype = torch.float32) -> Any:
    """The packaged model with `transformers`' own mathematics and eager attention.

    Its weights are read by our loader, in 2 s instead of 13; a slow test compares them with those
    that `transformers` reads from the file.
    """
    spec = read_spec("smollm2")
    config = transformers.LlamaConfig(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.query_heads,
        num_key_value_heads=spec.kv_heads,
        max_position_embeddings=spec.max_context_tokens,
        rms_norm_eps=spec.norm_eps,
        rope_theta=spec.rope.theta,
        tie_word_embeddings=True,
        bos_token_id=spec.bos_token_id,
        eos_token_id=spec.eos_token_ids[0],
        attn_implementation="eager",
    )
    source = GgufSource(GgufFile(resolve_model("smollm2")), spec)
    state = {name: source.read(name) for name in model_tensors(spec)}
    state[HEAD] = state["model.embed_tokens.weight"]
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model.to_empty(device="cpu")
    # Not part of the state, and so left empty by to_empty.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.load_state_dict(state)
    return model.to(dtype).eval()
