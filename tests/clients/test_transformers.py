"""Tiny random language and vision models: d outputs / d embeddings.

pip install transformers
"""

import pytest
import torch
from helpers import assert_rows, client

import jactri

transformers = client("transformers", "pip install transformers")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # what the library says of itself while it builds a model
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*:UserWarning:transformers"),
]

LLAMA = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
BERT = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
F32, F64 = torch.float32, torch.float64

# name, its options, a dtype that it computes in inside (its norms are in float32), attentions
LANGUAGE = {
    "Llama": ("LlamaForCausalLM", LLAMA, F32, ("eager", "sdpa")),
    "GPT2": ("GPT2LMHeadModel", {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32,
             "bos_token_id": None, "eos_token_id": None}, None, ("eager", "sdpa")),
    "Bert": ("BertModel", BERT, None, ("eager", "sdpa")),
    "T5": ("T5EncoderModel", {"vocab_size": 50, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2,
           "num_heads": 4}, F32, ("eager", "sdpa")),
    "Gemma2": ("Gemma2ForCausalLM", {**LLAMA, "head_dim": 4}, F32, ("eager",)),
    "Mixtral": ("MixtralForCausalLM", {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}, F32,
                ("eager", "sdpa")),
}  # fmt: skip


def build(kind, config, attention, dtype, **options):
    torch.manual_seed(0)
    config = getattr(transformers, config)(**options, attn_implementation=attention)
    return getattr(transformers, kind)(config).to(dtype).eval()


@pytest.mark.parametrize(
    ("name", "attention"), [(n, a) for n, (*_, known) in LANGUAGE.items() for a in known]
)
def test_language_models(name, attention):
    kind, options, inner, _ = LANGUAGE[name]
    if name == "Mixtral":
        options = {**options, "experts_implementation": "eager"}
    model = build(kind, f"{name}Config", attention, F64, **options)

    def func(embeddings):
        found = model(inputs_embeds=embeddings)
        return found.logits if hasattr(found, "logits") else found.last_hidden_state

    x = torch.randn(2, 5, 16, dtype=F64)
    plan = assert_rows(func, x, inner=inner, factor=4.0)
    assert not plan.fallbacks


def test_experts_in_one_product_of_groups():
    """The default of the library, in float32: the kernel has no float64."""
    options = {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}
    model = build("MixtralForCausalLM", "MixtralConfig", "sdpa", F32, **options)
    x = torch.randn(2, 5, 16)
    assert_rows(lambda v: model(inputs_embeds=v).logits, x, factor=16.0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_vision_transformer(attention):
    options = {**BERT, "image_size": 8, "patch_size": 4}
    del options["vocab_size"]
    model = build("ViTModel", "ViTConfig", attention, F64, **options)
    x = torch.randn(2, 3, 8, 8, dtype=F64)
    inner = F32 if attention == "eager" else None  # its softmax
    assert not assert_rows(
        lambda v: model(pixel_values=v).last_hidden_state, x, inner=inner
    ).fallbacks


def test_relevances_of_a_language_model_add_up():
    """Without biases, by the rules of AttnLRP with frozen patterns (`jactri.overrides`)."""
    model = build("LlamaModel", "LlamaConfig", "eager", F64, **LLAMA)

    def func(embeddings):
        return model(inputs_embeds=embeddings).last_hidden_state

    x = torch.randn(1, 5, 16, dtype=F64)
    rules = {
        "softmax": jactri.zero, "rsqrt": jactri.zero, "silu": jactri.ratio, "mul": jactri.uniform,
        "bmm": jactri.uniform,
    }  # fmt: skip
    with jactri.overrides(rules):
        J = jactri.jacobian(func, x)
    torch.testing.assert_close((J * x).sum((-3, -2, -1)), func(x).detach(), rtol=0, atol=1e-5)
    with jactri.overrides({"layers.*.mlp": jactri.zero}, model=model):
        J = jactri.jacobian(func, x)
    handles = [
        m.mlp.register_forward_hook(lambda module, given, output: output.detach())
        for m in model.layers
    ]
    want = torch.autograd.functional.jacobian(func, x)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(J, want, rtol=0, atol=1e-5)  # norms are in float32
