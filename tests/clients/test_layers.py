"""Layers by name in tiny random language and vision models: jactri.taps and jactri.layer_jacobian.

pip install transformers
"""

import pytest
import torch
from helpers import client
from tolerances import assert_close

import jactri

transformers = client("transformers", "pip install transformers")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*:UserWarning:transformers"),
]

F32, F64 = torch.float32, torch.float64
SMALL = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
GPT2 = {"vocab_size": 50, "n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 32, "bos_token_id": None,
        "eos_token_id": None}  # fmt: skip
BERT = {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}
MOE = {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"}
MAMBA = {
    "vocab_size": 50,
    "hidden_size": 16,
    "state_size": 4,
    "num_hidden_layers": 3,
    "use_cache": False,
}

# the model, its config, a dtype that it computes in inside, attention, sources, target
MODELS = {
    "Llama": ("LlamaForCausalLM", SMALL, F32, "sdpa", "model.layers.*", "model.norm"),
    "Llama, eager": ("LlamaForCausalLM", SMALL, F32, "eager", "model.layers.*", "model.norm"),
    "Qwen2": ("Qwen2ForCausalLM", SMALL, F32, "sdpa", "model.layers.*:input", "model.norm"),
    "Gemma2": ("Gemma2ForCausalLM", {**SMALL, "head_dim": 4}, F32, "eager", "model.layers.?", "model.norm"),
    "GPT2": ("GPT2LMHeadModel", GPT2, F32, "sdpa", "transformer.h.*", "transformer.ln_f"),
    "Bert": ("BertModel", BERT, F32, "sdpa", "encoder.layer.*", "encoder.layer.2"),
    "Mistral": ("MistralForCausalLM", {**SMALL, "sliding_window": 3}, F32, "sdpa", "model.layers.*", "model.norm"),
    "Mamba": ("MambaForCausalLM", MAMBA, F32, None, "backbone.layers.*", "backbone.norm_f"),
    "Mixtral": ("MixtralForCausalLM", MOE, F32, "sdpa", "model.layers.*", "model.norm"),
}  # fmt: skip


def build(kind, options, attention, dtype=F64):
    torch.manual_seed(0)
    config = kind.removesuffix("ForCausalLM").removesuffix("LMHeadModel").removesuffix("Model")
    config = getattr(transformers, f"{config}Config")(**options, attn_implementation=attention)
    return getattr(transformers, kind)(config).to(dtype).eval()


def prompts():
    torch.manual_seed(1)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    return {"input_ids": torch.randint(50, (2, 6)), "attention_mask": mask}


def lens(model, inputs, names, target):
    """Row by row of torch.autograd.grad, of what the model itself runs on."""
    w = inputs["attention_mask"].to(F64)[..., None]
    with jactri.taps(model, [*names, target]) as taps:
        model(**inputs)
    z, sources = (taps[target] * w).sum((0, 1)), [taps[n] for n in names]
    rows = [
        torch.autograd.grad(e, sources, retain_graph=True, allow_unused=True) for e in z.unbind()
    ]
    return {
        n: torch.stack([(row[i] * w).sum((0, 1)) for row in rows]) / w.sum()
        for i, n in enumerate(names)
    }


@pytest.mark.parametrize("name", MODELS)
def test_the_lens_of_a_model(name):
    kind, options, inner, attention, sources, target = MODELS[name]
    model, inputs = build(kind, options, attention), prompts()
    found = jactri.layer_jacobian(model, inputs, sources, target)
    assert len(found) == 3
    truth = lens(model, inputs, list(found), target)
    for layer, J in found.items():
        assert_close(J, truth[layer], inner, length=16 * 12, what=layer)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    frozen = jactri.layer_jacobian(model.requires_grad_(False), inputs, sources, target)
    for layer, J in found.items():
        assert_close(frozen[layer], J, inner, length=16 * 12, what=layer)


def test_encoder_and_decoder_have_masks_of_their_own():
    options = {
        "vocab_size": 50,
        "d_model": 16,
        "d_kv": 4,
        "d_ff": 24,
        "num_layers": 2,
        "num_heads": 4,
    }
    torch.manual_seed(0)
    model = transformers.T5Model(transformers.T5Config(**options)).to(F64).eval()
    inputs = {**prompts(), "decoder_input_ids": torch.randint(50, (2, 6))}
    inputs["decoder_attention_mask"] = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]])
    sources = ["encoder.block.0", "decoder.block.0"]
    J = jactri.layer_jacobian(model, inputs, sources, "decoder.final_layer_norm")
    with jactri.taps(model, [*sources, "decoder.final_layer_norm"]) as taps:
        model(**inputs)
    of = inputs["decoder_attention_mask"].to(F64)[..., None]
    z = (taps["decoder.final_layer_norm"] * of).sum((0, 1))
    for name, mask in zip(sources, ("attention_mask", "decoder_attention_mask"), strict=True):
        w = inputs[mask].to(F64)[..., None]
        rows = [torch.autograd.grad(e, taps[name], retain_graph=True)[0] for e in z.unbind()]
        wanted = torch.stack([(row * w).sum((0, 1)) for row in rows]) / w.sum()
        assert_close(J[name], wanted, F32, length=16 * 12, what=name)
    with pytest.raises(RuntimeError, match="masks for an encoder and a decoder, and '' tells not"):
        jactri.layer_jacobian(model, inputs, sources)


def test_logits_of_tokens_in_patches_and_caches():
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, image_size=8, patch_size=4,
        num_labels=3,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config).to(F64).eval()
    images = torch.randn(1, 3, 8, 8, dtype=F64)
    name = (
        "vit.layers.0"
        if any(n == "vit.layers.0" for n, _ in model.named_modules())
        else "vit.encoder.layer.0"
    )
    J = jactri.layer_jacobian(model, {"pixel_values": images}, name, "", reduce=(None, None))[name]
    with jactri.taps(model, name) as taps:
        logits = model(images).logits
    rows = [
        torch.autograd.grad(e, taps[name], retain_graph=True)[0] for e in logits.flatten().unbind()
    ]
    assert_close(J, torch.stack(rows).reshape(J.shape), F32, length=80)

    language = build("LlamaForCausalLM", SMALL, "sdpa")
    cache = transformers.DynamicCache(config=language.config)
    with pytest.raises(RuntimeError, match="inputs hold past_key_values, a cache"):
        jactri.layer_jacobian(
            language, {**prompts(), "past_key_values": cache}, "model.layers.0", "model.norm"
        )


@pytest.mark.parametrize("kind, options", [("Mistral", {"sliding_window": 3}), ("Qwen2", {})])
def test_ways_to_compute_attention_give_the_same(kind, options):
    found = [
        jactri.layer_jacobian(
            build(f"{kind}ForCausalLM", {**SMALL, **options}, way), prompts(), "model.layers.*", "model.norm"
        )
        for way in ("eager", "sdpa")
    ]  # fmt: skip
    for layer, J in found[0].items():
        assert_close(J, found[1][layer], F32, length=16 * 12, what=layer)


@pytest.mark.parametrize("sources", ["model.layers.*", "model.layers.*.mlp"])
def test_checkpointed_layers(sources):
    model, inputs = build("LlamaForCausalLM", SMALL, "sdpa"), prompts()
    wanted = jactri.layer_jacobian(model, inputs, sources, "model.norm")
    model.gradient_checkpointing_enable()
    found = jactri.layer_jacobian(model.train(), inputs, sources, "model.norm")
    assert list(found) == list(wanted)
    for layer, J in found.items():
        assert_close(J, wanted[layer], F64, length=16 * 12, what=layer)


def test_devices_that_accelerate_chose():
    accelerate = client("accelerate", "pip install accelerate")
    inputs, names = prompts(), "model.layers.*"
    wanted = jactri.layer_jacobian(
        build("LlamaForCausalLM", SMALL, "sdpa"), inputs, names, "model.norm"
    )
    model = build("LlamaForCausalLM", SMALL, "sdpa")
    model = accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)  # it wraps each forward
    found = jactri.layer_jacobian(model, inputs, names, "model.norm")
    for layer, J in found.items():
        assert_close(J, wanted[layer], F64, length=16 * 12, what=layer)


def test_half_precision_weights():
    model, inputs = build("LlamaForCausalLM", SMALL, "sdpa", torch.bfloat16), prompts()
    found = jactri.layer_jacobian(model, inputs, "model.layers.*", "model.norm")
    truth = lens(model, inputs, list(found), "model.norm")
    for layer, J in found.items():
        assert J.dtype == torch.bfloat16
        error = (J.double() - truth[layer]).norm() / truth[layer].norm()
        assert error < 0.03, layer  # autograd's own rows are in bfloat16
