"""A step of TDTrainer against the same step from the models' own logits, family by family.

Error budget, for each parameter tensor after one step, in the maximum norm:
``|fused - float64| <= |dense - float64| + ULPS``, where "float64" is the dense step on float64
copies, "dense" the same in the models' dtype, and an ulp that of the tensor's largest entry. The
learning rate makes the step about as large as the parameters, so that an error in the gradient is
not lost in theirs.
"""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
import transformers
from test_trainer import Batches, config, conversations
from torch.utils._python_dispatch import TorchDispatchMode

from tdkd import ops
from tdkd.errors import UserError
from tdkd.kernels import routes
from tdkd.models import check_head, last_hidden_state, lm_head, load_tokenizer
from tdkd.trainer import TDTrainer

peft = pytest.importorskip("peft")

SHAPE = {
    "vocab_size": 264,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WIDE = {"intermediate_size": 32, "num_key_value_heads": 1}
FAMILIES = {
    "llama": ("LlamaConfig", {**WIDE, "tie_word_embeddings": False}),
    "llama tied": ("LlamaConfig", {**WIDE, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {**WIDE, "head_dim": 8}),
    "gemma2": (
        "Gemma2Config",
        {**WIDE, "head_dim": 8, "final_logit_softcapping": 1.5, "query_pre_attn_scalar": 8},
    ),
    "granite": ("GraniteConfig", {**WIDE, "logits_scaling": 3.0, "residual_multiplier": 0.7}),
    "cohere": ("CohereConfig", {**WIDE, "logit_scale": 0.4}),
    "gpt2": ("GPT2Config", {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "phi": ("PhiConfig", {**WIDE, "num_key_value_heads": 2, "partial_rotary_factor": 0.5}),
}
RATE = 1.0
ULPS = {torch.float32: 8, torch.bfloat16: 2}


def built(family, *, layers, seed, **options):
    torch.manual_seed(seed)
    name, own = FAMILIES[family]
    made = getattr(transformers, name)(
        **{**SHAPE, "num_hidden_layers": layers, **own, **options}, attn_implementation="eager"
    )
    model = transformers.AutoModelForCausalLM.from_config(made)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.3)
    return model.eval()


def pair(family):
    return built(family, layers=2, seed=1), built(family, layers=3, seed=0)


def stepped(tmp_path, tokenizer, student, teacher, peft_config=None, **options):
    """A trainer after one step of SGD, and the micro-batch that it saw."""
    # before TRL patches its forward with a closure, which a later copy would share
    before = copy.deepcopy(student)
    options = {"max_steps": 1, "learning_rate": RATE, "lm_weight": 0.5, **options}
    run = TDTrainer(
        student,
        teacher,
        config(tmp_path, **options),
        train_dataset=conversations(),
        processing_class=load_tokenizer(tokenizer),
        peft_config=peft_config,
    )
    batches = Batches(run)
    run.train()
    (batch,) = batches.seen
    return run, before, batch


def dense_step(run, student, teacher, batch, dtype):
    """The parameters after the same step by the models' own logits and the reference ops."""
    student, teacher = (copy.deepcopy(model).to(dtype).eval() for model in (student, teacher))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    tokens = batch["labels"][:, 1:]
    items = (tokens != -100).sum()
    z = student(**inputs).logits[:, :-1]
    with torch.no_grad():
        t = teacher(**inputs).logits[:, :-1]
    out = ops.td_loss(
        z,
        t,
        tokens,
        objective=run.objective,
        q=run.args.q_level,
        k=run.args.action_top_k,
        top_p=run.args.action_top_p,
        gamma=run.args.gamma,
        successor=ops.successors(tokens, eos_token_id=[2]),
        num_items_in_batch=items,
        impl="reference",
    )
    lm = F.cross_entropy(z.flatten(0, 1), tokens.flatten(), reduction="sum") / items
    (out.loss + run.args.lm_weight * lm).backward()
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter -= RATE * parameter.grad
    return dict(student.named_parameters())


def assert_within_budget(run, before, teacher, batch):
    """Every parameter of the run against the dense step from ``before``; names what moved."""
    start = dict(before.named_parameters())
    (dtype,) = {parameter.dtype for parameter in start.values()}
    exact = dense_step(run, before, teacher, batch, torch.float64)
    dense = dense_step(run, before, teacher, batch, dtype)
    moved = set()
    for name, got in run.model.named_parameters():
        assert got.dtype == dtype
        wanted = exact[name].detach()
        budget = (dense[name].detach() - wanted).abs().max()
        budget += ULPS[dtype] * torch.finfo(dtype).eps * wanted.abs().max()
        worst = (got.detach() - wanted).abs().max()
        assert worst <= budget, (name, worst.item(), budget.item())
        if not torch.equal(got.detach(), start[name].detach()):
            moved.add(name)
    return moved


@pytest.mark.parametrize("dtype", ULPS)
@pytest.mark.parametrize("normaliser", ["exact", "batch", "sampled"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_is_the_dense_step(tmp_path, tiny_student, family, normaliser, dtype):
    student, teacher = (model.to(dtype) for model in pair(family))
    untouched = copy.deepcopy(teacher)
    # every column is sampled, so that the estimate is exact; by the rule log Z would be so too
    forced = routes.forced("sampled") if normaliser == "sampled" else nullcontext()
    with forced:
        run, before, batch = stepped(
            tmp_path,
            tiny_student,
            student,
            teacher,
            normaliser=normaliser,
            batch_vocabulary_extra=1000,
        )
    moved = assert_within_budget(run, before, teacher, batch)
    # attention does not change with the bias of its keys, so those may stay
    still = {name for name, _ in run.model.named_parameters() if name not in moved}
    assert all(name.endswith("k_proj.bias") for name in still)
    for got, kept in zip(run.teacher.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(got, kept)


def test_each_family_has_the_head_that_it_stands_for():
    """A family whose trait a new transformers drops would be tested for nothing."""
    heads = {family: lm_head(built(family, layers=1, seed=0)) for family in FAMILIES}
    assert heads["gemma2"].softcap == 1.5
    assert heads["granite"].logit_scale == pytest.approx(1 / 3)
    assert heads["cohere"].logit_scale == 0.4
    assert heads["phi"].bias.abs().min() > 0
    for family, tied in (("gpt2", True), ("llama tied", True), ("llama", False)):
        model = built(family, layers=1, seed=0)
        assert (lm_head(model).weight is model.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("q_level", ["log_prob", "logit"])
def test_student_and_teacher_of_two_families(tmp_path, tiny_student, q_level):
    """Each head with its own scale, softcap, bias and width."""
    student = built("phi", layers=2, seed=1)
    teacher = built("gemma2", layers=2, seed=0, hidden_size=32)
    run, before, batch = stepped(tmp_path, tiny_student, student, teacher, q_level=q_level)
    assert_within_budget(run, before, teacher, batch)


def test_a_tied_weight_gets_the_sum_of_both_gradients(tmp_path, tiny_student):
    teacher = built("llama", layers=3, seed=0)
    tied, untied = built("llama tied", layers=2, seed=1), built("llama", layers=2, seed=2)
    untied.load_state_dict(tied.state_dict())
    steps = []
    for student in (tied, untied):
        run, before, _ = stepped(tmp_path, tiny_student, student, teacher)
        start = before.state_dict()
        steps.append({n: p.detach() - start[n] for n, p in run.model.state_dict().items()})
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    both = steps[1][embedding] + steps[1][head]
    assert min(steps[1][name].abs().max() for name in (embedding, head)) > 0.05
    torch.testing.assert_close(steps[0][embedding], both, rtol=1e-5, atol=1e-6)


class Shapes(TorchDispatchMode):
    """The shape of every tensor that an operator returned."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.seen.add(tuple(x.shape))
        return result


@pytest.mark.parametrize("normaliser", ["exact", "batch"])
def test_the_head_sees_response_rows_alone(tmp_path, tiny_student, normaliser):
    student, teacher = pair("llama")
    run, _, batch = stepped(
        tmp_path, tiny_student, student, teacher, normaliser=normaliser, lm_weight=0.5
    )
    given, calls = [], []
    for model in (run.model, run.teacher):
        model.get_output_embeddings().register_forward_hook(lambda *_: calls.append(1))
    inner = run._td_loss

    def recording(hidden, head, teacher, tokens, successor, **extras):
        given.append([hidden, teacher["teacher_hidden"], tokens, successor])
        return inner(hidden, head, teacher, tokens, successor, **extras)

    run._td_loss = recording
    items = (batch["labels"][:, 1:] != -100).sum()
    with Shapes() as shapes:
        run.compute_loss(run.model, batch, num_items_in_batch=items).backward()
    assert not calls
    ((hidden, teacher_hidden, tokens, successor),) = given
    rows, width = int(items), student.config.hidden_size
    assert hidden.shape == teacher_hidden.shape == (rows, width)
    assert tokens.shape == successor.shape == (rows,)
    # prompts are most of these batches: a head over every position would show
    assert 2 * rows < batch["input_ids"].numel()
    vocab = student.config.vocab_size
    logits = {shape for shape in shapes.seen if shape[-1:] == (vocab,) and len(shape) > 1}
    assert all(torch.Size(shape[:-1]).numel() <= rows for shape in logits - {(width, vocab)})


# LoRA


def lora(**options):
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "init_lora_weights": False, **options})


def adapted(student, **options):
    torch.manual_seed(3)
    return peft.get_peft_model(student, lora(**options))


def injected(student, **options):
    """Adapters by transformers, without a ``PeftModel``, in which TRL refuses one on the head."""
    torch.manual_seed(3)
    student.add_adapter(lora(**options))
    return student


LORA = {
    "off the head": ({"target_modules": ["q_proj", "up_proj"]}, {"lora_"}),
    "on the head": ({"target_modules": ["q_proj", "lm_head"]}, {"lora_"}),
    "on the head alone": ({"target_modules": ["lm_head"], "use_rslora": True}, {"lora_"}),
    "head saved": (
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"lora_", "modules_to_save"},
    ),
}


@pytest.mark.parametrize("family", ["llama", "llama tied", "granite", "phi"])
@pytest.mark.parametrize("name", LORA)
def test_a_step_with_lora_is_the_dense_step(tmp_path, tiny_student, name, family):
    options, trained = LORA[name]
    if family == "phi":
        targets = [t.replace("up_proj", "fc1") for t in options["target_modules"]]
        options = {**options, "target_modules": targets}
    student, teacher = pair(family)
    adapt = injected if "lm_head" in options["target_modules"] else adapted
    run, before, batch = stepped(tmp_path, tiny_student, adapt(student, **options), teacher)
    moved = assert_within_budget(run, before, teacher, batch)
    for name, parameter in run.model.named_parameters():
        expected = any(part in name for part in trained)
        assert (name in moved) == expected, name
        assert expected or parameter.grad is None, name


def test_the_head_follows_its_adapters():
    """Switched off, several at once, merged, and merged but switched off."""
    model = adapted(built("llama", layers=1, seed=0), target_modules=["lm_head"]).eval()
    model.add_adapter(
        "other", peft.LoraConfig(r=2, target_modules=["lm_head", "v_proj"], init_lora_weights=False)
    )
    ids = torch.arange(5, 11)[None]

    @torch.no_grad()
    def agreed():
        logits = model(input_ids=ids).logits
        hidden = last_hidden_state(model, input_ids=ids)
        torch.testing.assert_close(lm_head(model).logits(hidden), logits, rtol=1e-5, atol=1e-5)
        return logits

    seen = [agreed()]
    with model.disable_adapter():
        seen.append(agreed())
    model.base_model.set_adapter(["default", "other"])
    seen.append(agreed())
    for one, two in ((0, 1), (0, 2), (1, 2)):
        assert not torch.allclose(seen[one], seen[two])
    model.merge_adapter()
    torch.testing.assert_close(agreed(), seen[2], rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        # read before the model's own forward takes the adapters out of the weight
        weight = lm_head(model).weight
        hidden = last_hidden_state(model, input_ids=ids)
        torch.testing.assert_close(hidden @ weight.T, seen[1], rtol=1e-4, atol=1e-4)


def test_a_small_adapter_is_not_rounded_away():
    """In bfloat16 the sum of a weight and a small product would be the weight."""
    model = adapted(built("llama", layers=1, seed=0).bfloat16(), target_modules=["lm_head"])
    layer = model.get_output_embeddings()
    with torch.no_grad():
        layer.lora_B["default"].weight.mul_(1e-4)
    delta = lm_head(model).weight.double() - layer.base_layer.weight.double()
    torch.testing.assert_close(
        delta, layer.get_delta_weight("default").double(), rtol=0.01, atol=1e-7
    )


@pytest.mark.parametrize(
    "options,kind",
    [
        ({"use_dora": True}, "Linear"),
        ({"lora_bias": True}, "Linear"),
        ({"lora_dropout": 0.1}, "Linear"),
    ],
)
def test_an_adapter_that_is_no_sum_is_refused(tmp_path, tiny_student, options, kind):
    student, teacher = pair("llama")
    if "lora_bias" in options:
        student = built("phi", layers=1, seed=0)
    student = injected(student, target_modules=["lm_head"], **options)
    with pytest.raises(UserError, match=f"lm_head: .*got {kind}; .*modules_to_save"):
        stepped(tmp_path, tiny_student, student, teacher)


def test_trl_refuses_a_peft_model_with_an_adapter_on_the_head(tmp_path, tiny_student):
    """What our docstring says of it; once TRL takes such a model, the cases above should use it."""
    student, teacher = pair("llama")
    with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
        stepped(tmp_path, tiny_student, student, teacher, lora(target_modules=["lm_head"]))


def test_a_teacher_with_an_adapter_on_the_head(tmp_path, tiny_student):
    student, teacher = pair("llama")
    teacher = adapted(teacher, target_modules=["v_proj", "lm_head"])
    run, before, batch = stepped(tmp_path, tiny_student, student, teacher)
    assert_within_budget(run, before, teacher, batch)


def test_dropout_off_the_head_or_in_a_frozen_adapter_is_fine():
    model = adapted(built("llama", layers=1, seed=0), target_modules=["q_proj"], lora_dropout=0.1)
    assert lm_head(model).weight.requires_grad is False
    frozen = adapted(built("llama", layers=1, seed=0), target_modules=["lm_head"], lora_dropout=0.1)
    frozen.requires_grad_(False)
    check_head(frozen)


# What is refused


class Twice(transformers.LlamaForCausalLM):
    """A model that does to its logits what no config says."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = 2 * out.logits
        return out


class Deaf(transformers.LlamaForCausalLM):
    """A model that four tokens do not start."""

    def forward(self, *args, **kwargs):
        raise ValueError("an image, please")


def llama_as(kind):
    model = built("llama", layers=1, seed=0)
    model.__class__ = kind
    return model


@pytest.mark.parametrize("role", ["model", "teacher_model"])
def test_a_model_whose_logits_we_misread_is_refused(tmp_path, tiny_student, role):
    models = {
        "model": built("llama", layers=1, seed=1),
        "teacher_model": built("llama", layers=1, seed=1),
    }
    models[role] = llama_as(Twice)
    with pytest.raises(UserError, match=f"^{role}: expected logits .* from llama"):
        stepped(tmp_path, tiny_student, models["model"], models["teacher_model"])


def test_a_bert_head_is_refused():
    """It transforms hidden states before the product."""
    made = transformers.BertConfig(
        **SHAPE, num_hidden_layers=1, intermediate_size=32, is_decoder=True
    )
    with pytest.raises(UserError, match="got other ones from bert"):
        check_head(transformers.BertLMHeadModel(made))


def test_a_prompt_that_the_body_does_not_see_is_refused():
    """Prompt tuning puts tokens before the body, which we would run without them."""
    made = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(UserError, match="got other ones from llama"):
        check_head(peft.get_peft_model(built("llama", layers=1, seed=0), made))


def test_a_model_that_four_tokens_do_not_start_is_not_judged(caplog):
    check_head(llama_as(Deaf))
    assert "head not checked, ValueError: an image, please" in caplog.text


def test_the_check_leaves_modes_and_gradients_alone():
    model = built("gpt2", layers=2, seed=0, resid_pdrop=0.5)
    model.train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    check_head(model)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_rounding_is_not_refused(family, dtype):
    check_head(built(family, layers=2, seed=0).to(dtype))
