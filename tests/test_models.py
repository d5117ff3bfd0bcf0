"""Loading with clear errors, the head, the backbone, the pruned student."""

import json
import shutil

import pytest
import torch
from tiny import shuffled_tokenizer

import tdkd.models
from tdkd.errors import UserError
from tdkd.models import (
    Head,
    backbone,
    check_head,
    check_packed,
    check_positions,
    check_tokenizer,
    last_hidden_state,
    lm_head,
    load_model,
    load_tokenizer,
    prune_layers,
)

transformers = pytest.importorskip("transformers")


def small(kind, **options):
    """A random model of another family."""
    torch.manual_seed(0)
    shape = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 5, "num_attention_heads": 2}
    wide = {"intermediate_size": 32, "num_key_value_heads": 1}
    config, model = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "gemma2": (transformers.Gemma2Config, transformers.Gemma2ForCausalLM),
        "cohere": (transformers.CohereConfig, transformers.CohereForCausalLM),
        "granite": (transformers.GraniteConfig, transformers.GraniteForCausalLM),
        "gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel),
    }[kind]
    if kind == "gpt2":
        wide = {}
    if kind == "gemma2":
        wide["head_dim"] = 8
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return model(config(**shape, **wide, **special, **options)).eval()


def test_load_model_reads_what_was_saved(tiny_teacher):
    model = load_model(tiny_teacher, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert not model.training


def copied(source, tmp_path):
    target = tmp_path / "model"
    shutil.copytree(source, target)
    return target


def test_a_missing_directory_is_refused(tmp_path):
    for load in (load_model, load_tokenizer):
        with pytest.raises(UserError, match="teacher: expected a model directory.*does not exist"):
            load(tmp_path / "nowhere", argument="teacher")


def test_a_file_is_refused(tmp_path):
    path = tmp_path / "file"
    path.write_text("x")
    with pytest.raises(UserError, match="got the file"):
        load_model(path)


def test_a_directory_without_config_is_refused(tmp_path):
    with pytest.raises(UserError, match="config.json"):
        load_model(tmp_path)


def spoil_config(path):
    (path / "config.json").write_text("{")


def change_architecture(path):
    (path / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))


def remove_weights(path):
    (path / "model.safetensors").unlink()


def pickle_weights(path):
    remove_weights(path)
    torch.save({}, path / "pytorch_model.bin")


def tear_weights(path):
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])


def ask_for_more_layers(path):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 6}))


def ask_for_nonsense(path):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "hidden_size": "x"}))


@pytest.mark.parametrize(
    "spoil",
    [
        spoil_config,
        change_architecture,
        remove_weights,
        pickle_weights,
        tear_weights,
        ask_for_more_layers,
        ask_for_nonsense,
    ],
)
def test_a_spoilt_model_is_one_line(tiny_teacher, tmp_path, spoil):
    path = copied(tiny_teacher, tmp_path)
    spoil(path)
    with pytest.raises(UserError, match="^model: expected ") as error:
        load_model(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("device", ["no-such-device", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(tiny_teacher, device):
    with pytest.raises(UserError, match=f"^device: expected .*got {device}"):
        load_model(tiny_teacher, device=device)


def test_a_tokenizer_without_a_template_is_refused_where_one_is_needed(tiny_teacher, tmp_path):
    path = copied(tiny_teacher, tmp_path)
    (path / "chat_template.jinja").unlink()
    assert load_tokenizer(path).chat_template is None
    with pytest.raises(UserError, match="chat template"):
        load_tokenizer(path, chat=True)


@pytest.mark.parametrize(
    "kind,options",
    [
        ("llama", {}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("gemma2", {"final_logit_softcapping": 0.5}),
        ("cohere", {"logit_scale": 0.25}),
        ("granite", {"logits_scaling": 8.0}),
        ("gpt2", {}),
    ],
)
def test_the_head_on_the_hidden_state_gives_the_logits(kind, options):
    model = small(kind, **options)
    ids = torch.arange(3, 15).reshape(2, 6)
    head = lm_head(model)
    with torch.no_grad():
        hidden = last_hidden_state(model, input_ids=ids)
        logits = torch.nn.functional.linear(hidden, head.weight, head.bias) * head.logit_scale
        if head.softcap is not None:
            logits = head.softcap * torch.tanh(logits / head.softcap)
        torch.testing.assert_close(logits, model(ids).logits)


@pytest.mark.parametrize(
    "name,value,scale",
    [
        ("output_multiplier", 3.0, 3.0),
        ("lm_head_multiplier", 0.5, 0.5),
        ("logits_scaling", 4.0, 0.25),
        ("logits_mup_width_multiplier", 4.0, 0.25),
        ("logit_scale", 0.0, 0.0),
        ("logit_scale", None, 1.0),
    ],
)
def test_every_name_of_a_logit_scale(name, value, scale):
    model = small("llama")
    setattr(model.config, name, value)
    assert lm_head(model).logit_scale == scale


@pytest.mark.parametrize(
    "name", ["final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"]
)
def test_every_name_of_a_softcap(name):
    model = small("llama")
    assert lm_head(model).softcap is None
    setattr(model.config, name, 30.0)
    assert lm_head(model).softcap == 30.0


@pytest.mark.parametrize("scale", ["inv_sqrt_d_model", 2.0])
def test_mpt_does_nothing_with_its_logit_scale(scale):
    shape = {"d_model": 16, "n_heads": 2, "n_layers": 1, "vocab_size": 50, "max_seq_len": 32}
    model = transformers.MptForCausalLM(transformers.MptConfig(**shape, logit_scale=scale))
    assert lm_head(model).logit_scale == 1.0
    check_head(model)


def test_a_body_of_another_name_is_found():
    shape = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    wide = {"intermediate_size": 32, "intermediate_size_mlp": 32, "num_local_experts": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0}
    made = transformers.Llama4TextConfig(**shape, **wide, **heads)
    model = transformers.Llama4ForCausalLM(made).eval()
    assert backbone(model) is model.model
    check_head(model)


@pytest.mark.parametrize("wrong", ["softcap", "logit_scale", "bias", "weight"])
def test_every_misread_number_of_a_head_is_found(monkeypatch, wrong):
    model = small("gemma2", final_logit_softcapping=0.5)
    check_head(model)
    head = lm_head(model)
    misread = {
        "softcap": None,
        "logit_scale": 1.1,
        "bias": torch.full((50,), 0.1),
        "weight": head.weight.flip(0),
    }
    monkeypatch.setattr(tdkd.models, "lm_head", lambda _: head._replace(**{wrong: misread[wrong]}))
    with torch.no_grad():
        # logits at which the softcap bends
        model.model.norm.weight.fill_(20.0)
    with pytest.raises(UserError, match="^model: expected logits that are .* from gemma2$"):
        check_head(model)


def test_a_head_that_is_wider_than_the_hidden_states_counts_in_its_own_dtype():
    """Hidden states of autocast, and a head with float32 adapters."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 4, generator=generator).bfloat16()
    head = Head(torch.randn(7, 4, generator=generator), torch.ones(7).bfloat16(), None, 1.0)
    torch.testing.assert_close(head.logits(hidden), hidden.float() @ head.weight.T + 1)


def test_hyperclovax_multiplies_by_logits_scaling():
    model = small("llama")
    model.config.logits_scaling = 4.0
    model.config.model_type = "hyperclovax"
    assert lm_head(model).logit_scale == 4.0


def test_last_hidden_state_of_a_peft_model_runs_the_adapter(tiny_student):
    peft = pytest.importorskip("peft")
    plain = load_model(tiny_student)
    ids = torch.arange(10, 20)[None]
    before = last_hidden_state(plain, input_ids=ids)
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(plain, config).eval()
    after = last_hidden_state(wrapped, input_ids=ids)
    assert not torch.allclose(before, after)
    head = lm_head(wrapped)
    torch.testing.assert_close(after @ head.weight.T, wrapped(input_ids=ids).logits)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "gpt2"])
def test_prune_keeps_evenly_spaced_layers(kind, tmp_path):
    model = small(kind)
    student = prune_layers(model, 3)
    assert student.config.num_hidden_layers == 3
    (old,), (new,) = (
        [c for c in m.base_model.children() if isinstance(c, torch.nn.ModuleList)]
        for m in (model, student)
    )
    for block, kept in zip(new, (0, 2, 4), strict=True):
        for name, weight in block.state_dict().items():
            torch.testing.assert_close(weight, old[kept].state_dict()[name], rtol=0, atol=0)
    if getattr(model.config, "layer_types", None) is not None:
        assert student.config.layer_types == [model.config.layer_types[i] for i in (0, 2, 4)]
    # a copy, not a view
    with torch.no_grad():
        next(student.parameters()).zero_()
    assert next(model.parameters()).any()
    student = prune_layers(model, 3)
    student.save_pretrained(tmp_path)
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path)(ids).logits, student(ids).logits)


def test_a_pruned_student_with_every_layer_is_the_teacher(tiny_teacher):
    model = load_model(tiny_teacher)
    ids = torch.arange(10, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(prune_layers(model, 4)(ids).logits, model(ids).logits)


def test_a_tied_head_stays_tied(tiny_teacher):
    student = prune_layers(load_model(tiny_teacher), 2)
    assert lm_head(student).weight is student.get_input_embeddings().weight


@pytest.mark.parametrize("layers", [0, 5])
def test_prune_refuses_a_number_of_layers_that_is_not_there(tiny_teacher, layers):
    with pytest.raises(UserError, match=f"layers: expected 1 to 4.*got {layers}"):
        prune_layers(load_model(tiny_teacher), layers)


def test_prune_refuses_a_model_whose_layers_it_cannot_find(tiny_teacher):
    model = load_model(tiny_teacher)
    model.config.num_hidden_layers = 7
    with pytest.raises(UserError, match="expected one list of 7 layers in LlamaModel, got 0"):
        prune_layers(model, 2)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_packed_sequences_are_kept_apart_by_their_positions(kind):
    model = small(kind).train()
    check_packed(model)
    assert model.training


@pytest.mark.parametrize("family", ["OPT", "Bloom"])
def test_a_model_that_reads_from_one_packed_sequence_into_the_next_is_refused(family):
    torch.manual_seed(0)
    shape = {"vocab_size": 50, "hidden_size": 16, "num_attention_heads": 2}
    if family == "OPT":
        shape |= {"ffn_dim": 32, "num_hidden_layers": 2, "word_embed_proj_dim": 16}
    else:
        shape |= {"n_head": 2, "n_layer": 2}
    config = getattr(transformers, f"{family}Config")(**shape, pad_token_id=0)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with pytest.raises(UserError, match=f"student: expected a model that .*got {family.lower()}"):
        check_packed(model, "student")


def test_a_model_that_cannot_be_packed_is_not_judged(monkeypatch, caplog):
    monkeypatch.setattr(tdkd.models, "last_hidden_state", lambda model, **inputs: 1 / 0)
    check_packed(small("llama"))
    assert "padding-free batches not checked" in caplog.text


def test_a_tokenizer_with_other_tokens_is_found(tiny_teacher, tiny_student, tmp_path):
    tokenizer = load_tokenizer(tiny_student)
    check_tokenizer(tiny_teacher, tokenizer)
    tokenizer.add_tokens(["<more>"])
    check_tokenizer(tiny_teacher, tokenizer)
    other = shuffled_tokenizer(tiny_teacher, tmp_path / "other")
    with pytest.raises(UserError, match=r"^teacher: expected the .* token \d+ is 'a', got 'b' in"):
        check_tokenizer(other, tokenizer)
    for file in other.glob("tokenizer*"):
        file.unlink()
    check_tokenizer(other, tokenizer)


def test_sequences_that_are_too_long_for_a_model(tiny_teacher):
    model = load_model(tiny_teacher)
    check_positions(512, "max-length", model)
    with pytest.raises(UserError, match="^max-length: expected sequences of at most 512 .* of 513"):
        check_positions(513, "max-length", model)
    model.config.max_position_embeddings = -1
    check_positions(513, "max-length", model)


@pytest.mark.parametrize(
    "scaling, limit",
    [
        ({"rope_type": "default"}, 64),
        ({"rope_type": "linear", "factor": 4.0}, 256),
        ({"rope_type": "dynamic", "factor": 1.5}, 96),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
        ({"rope_type": "yarn", "factor": 1.5, "original_max_position_embeddings": 32}, 64),
    ],
    ids=lambda value: None if isinstance(value, int) else value["rope_type"],
)
def test_scaled_positions_reach_further(tiny_student, scaling, limit):
    model = load_model(tiny_student)
    model.config.max_position_embeddings = 64
    for parameters in (scaling, {"full_attention": scaling, "sliding_attention": {"factor": None}}):
        model.config.rope_parameters = {"rope_theta": 1e4, **parameters}
        check_positions(limit, "max-length", model)
        with pytest.raises(UserError, match=f"at most {limit} tokens"):
            check_positions(limit + 1, "max-length", model)


@pytest.mark.parametrize(
    "targets, options",
    [
        (["embed_tokens"], {}),
        (["lm_head"], {}),
        (["embed_tokens", "lm_head"], {}),
        (["embed_tokens"], {"ensure_weight_tying": True}),
        (["lm_head"], {"modules_to_save": ["embed_tokens"]}),
    ],
    ids=["embeddings", "head", "both", "tied", "saved"],
)
def test_adapters_on_the_ends_of_a_tied_model_are_merged_apart(tmp_path, targets, options):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(
        load_model(tmp_path / "base"),
        peft.LoraConfig(target_modules=["q_proj", *targets], init_lora_weights=False, **options),
    ).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(9)[None]
    expected = adapted(ids).logits
    merged = load_model(tmp_path / "adapter")
    torch.testing.assert_close(merged(ids).logits, expected)
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(load_model(tmp_path / "merged")(ids).logits, expected)


@pytest.mark.parametrize("where", ["body", "head"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_of_numbers_that_are_none_is_told_so(where, value):
    model = small("llama", tie_word_embeddings=False)
    weight = model.model.norm.weight if where == "body" else model.lm_head.weight
    torch.nn.init.constant_(weight, value)
    with pytest.raises(UserError, match="^student: expected finite logits, got NaN or infinity"):
        check_head(model, "student")
