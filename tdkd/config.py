"""TDConfig: what the trainer is told, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Literal, get_args, get_type_hints

import torch

from tdkd import ops
from tdkd.errors import UserError, missing
from tdkd.objectives import CrossEntropy, ForwardKL, IQLearn, Objective, ReverseKL, parse
from tdkd.objectives.inverse import PHIS

try:
    from transformers.utils import is_liger_kernel_available
    from trl import SFTConfig
except (ImportError, RuntimeError) as error:  # lazy modules raise the latter
    raise missing(error) from error

Imitation = Literal["forward_kl", "reverse_kl", "cross_entropy", "none"]
IMITATION = {"forward_kl": ForwardKL, "reverse_kl": ReverseKL, "cross_entropy": CrossEntropy}

CHOICES: dict[str, tuple[str, ...]] = {
    "teacher": ("live", "cache"),
    "q_level": get_args(ops.Level),
    "normaliser": get_args(ops.Normaliser),
    "batch_vocabulary_law": ("student", "uniform"),
    "imitation": get_args(Imitation),
    "td_phi": tuple(PHIS),
    "td_expectation": ("token", "teacher"),
    "target_network": ("none", "ema"),
}
"""Words that fields of :class:`TDConfig` may be."""
ONLINE = (
    "max_completion_length", "temperature", "top_k", "top_p", "teacher_mixture",
    "generation_batch_size", "use_vllm", "vllm_gpu_memory_utilization", "replay_",
)  # fmt: skip
"""Fields, or how they begin, that say how the student answers."""
MEANT = {
    "temperature": " (see student_temperature, teacher_temperature)",
    "top_k": " (see action_top_k)",
    "top_p": " (see action_top_p)",
}
RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "action_top_k": (lambda x: x >= 1, ">= 1"),
    "action_top_p": (lambda x: 0 < x <= 1, "in (0, 1]"),
    "gamma": (lambda x: 0 <= x <= 1, "in [0, 1]"),
    "batch_vocabulary_extra": (lambda x: x >= 0, ">= 0"),
    "imitation_weight": (lambda x: 0 <= x < inf, ">= 0 and finite"),
    "td_weight": (lambda x: 0 <= x < inf, ">= 0 and finite"),
    "td_alpha": (lambda x: 0 < x < inf, "> 0 and finite"),
    "target_decay": (lambda x: 0 <= x < 1, "in [0, 1)"),
    "target_every": (lambda x: x >= 1, ">= 1"),
    "lm_weight": (lambda x: 0 <= x < inf, ">= 0 and finite"),
    "student_temperature": (lambda x: 0 < x < inf, "> 0 and finite"),
    "teacher_temperature": (lambda x: 0 < x < inf, "> 0 and finite"),
    "vocab_size": (lambda x: x >= 1, ">= 1"),
    "lmbda": (lambda x: 0 <= x <= 1, "in [0, 1]"),
    "max_completion_length": (lambda x: x >= 1, ">= 1"),
    "temperature": (lambda x: x >= 0, ">= 0"),
    "top_k": (lambda x: x >= 0, ">= 0"),
    "top_p": (lambda x: 0 < x <= 1, "in (0, 1]"),
    "teacher_mixture": (lambda x: 0 <= x <= 1, "in [0, 1]"),
    "generation_batch_size": (lambda x: x >= 1, ">= 1"),
    "vllm_gpu_memory_utilization": (lambda x: 0 < x <= 1, "in (0, 1]"),
    "replay_size": (lambda x: x >= 0, ">= 0"),
    "replay_ratio": (lambda x: 0 <= x < 1, "in [0, 1)"),
    # of transformers, which finds them at the first step, or never
    "learning_rate": (lambda x: 0 <= x < inf, ">= 0 and finite"),
    "weight_decay": (lambda x: 0 <= x < inf, ">= 0 and finite"),
    "adam_beta1": (lambda x: 0 <= x < 1, "in [0, 1)"),
    "adam_beta2": (lambda x: 0 <= x < 1, "in [0, 1)"),
    "adam_epsilon": (lambda x: 0 <= x < inf, ">= 0 and finite"),
    "per_device_train_batch_size": (lambda x: x >= 1, ">= 1"),
    "per_device_eval_batch_size": (lambda x: x >= 1, ">= 1"),
    "gradient_accumulation_steps": (lambda x: x >= 1, ">= 1"),
    "dataloader_num_workers": (lambda x: x >= 0, ">= 0"),
    "num_train_epochs": (lambda x: 0 < x < inf, "> 0 and finite"),
    "max_length": (lambda x: x >= 1, ">= 1"),
    "neftune_noise_alpha": (lambda x: 0 <= x < inf, ">= 0 and finite"),
}
"""Whether a number will do for a field of :class:`TDConfig`, and which would, in words."""


@dataclass
class TDConfig(SFTConfig):
    """:class:`trl.SFTConfig` with what TD distillation adds.

    The loss of a step is ``imitation_weight * imitation + td_weight * IQ-Learn + lm_weight * LM``,
    or ``objective + lm_weight * LM`` with any sum of the objectives of :mod:`tdkd.objectives`.
    With ``lmbda`` > 0 the student's own answers take the place of some of the data's
    (``docs/teachers.md``). The defaults are what taught the best student in ``docs/quality.md``:
    forward KL on the 64 likeliest tokens and one bucket for the rest; no TD term beside it did
    better there, so that ``td_weight`` is 0. With no term at all the trainer is a plain supervised
    warm start and needs no teacher.

    On a machine without an accelerator ``bf16`` defaults to False (TRL's default is True).
    ``torch_compile`` compiles the bodies of student and teacher; heads and losses have kernels of
    their own.
    """

    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Directory of the teacher."}
    )
    teacher: str = field(
        default="live",
        metadata={
            "help": "Where action sets come from: a 'live' model, or the 'cache' that tdkd cache "
            "made."
        },
    )
    teacher_cache: str | None = field(
        default=None, metadata={"help": "Folder of the cache, with teacher: cache."}
    )
    teacher_cache_verify: bool = field(
        default=True,
        metadata={
            "help": "Compare the cache with its checksums, which reads all of it at the start; "
            "otherwise only sizes are compared."
        },
    )
    action_top_k: int = field(
        default=64, metadata={"help": "Cap of an action set (GPU kernels take 1024 at most)."}
    )
    action_top_p: float = field(
        default=1.0, metadata={"help": "Teacher probability that an action set must reach."}
    )
    gamma: float = field(default=0.99, metadata={"help": "Discount of the TD term."})
    q_level: str = field(
        default="log_prob",
        metadata={
            "help": "What Q is: the student's 'log_prob', its 'logit' (the paper), or its logit "
            "'shifted' by the set's largest (the authors' code)."
        },
    )
    normaliser: str = field(
        default="batch",
        metadata={
            "help": "log Z over all columns ('exact'), over the batch vocabulary ('batch'), or "
            "from each row's own set and sampled columns ('sampled')."
        },
    )
    batch_vocabulary_extra: int = field(
        default=1024,
        metadata={"help": "Columns that are sampled, by 'batch' beside the union of the sets."},
    )
    batch_vocabulary_law: str = field(
        default="student",
        metadata={
            "help": "How they are sampled: by the 'student's mean probabilities, or 'uniform'ly, "
            "which spares a product of 64 rows with the head and estimates far less well."
        },
    )
    objective: str | None = field(
        default=None,
        metadata={
            "help": "In place of the imitation and td fields: a sum of objectives by name, such as "
            "\"ForwardKL(tail=True) + 0.1 * IQLearn('js', alpha=1.0)\"."
        },
    )
    imitation: str = field(
        default="forward_kl",
        metadata={"help": "'forward_kl', 'reverse_kl' or 'cross_entropy' on the set, or 'none'."},
    )
    imitation_tail: bool = field(
        default=True,
        metadata={"help": "Add a bucket for the mass outside the set to the imitation term."},
    )
    imitation_weight: float = field(default=1.0, metadata={"help": "Weight of the imitation term."})
    td_weight: float = field(default=0.0, metadata={"help": "Weight of the IQ-Learn term."})
    td_phi: str = field(default="chi2", metadata={"help": f"One of {', '.join(PHIS)}."})
    td_alpha: float = field(
        default=1.0, metadata={"help": "Strength of phi (the paper's 0.1 is much stronger)."}
    )
    td_expectation: str = field(
        default="token", metadata={"help": "'token' (the taken one) or 'teacher' (over the set)."}
    )
    td_stop_gradient: bool = field(
        default=True, metadata={"help": "Keep gradients out of the value of the next state."}
    )
    target_network: str = field(
        default="none",
        metadata={
            "help": "Whose V' is the target of a state: the student's own ('none'), or that of an "
            "exponential moving average of the student ('ema')."
        },
    )
    target_decay: float = field(
        default=0.99, metadata={"help": "Share of the average that each of its updates keeps."}
    )
    target_every: int = field(
        default=1,
        metadata={"help": "Optimizer steps from one update to the next; copies, at decay 0."},
    )
    value_head: bool = field(
        default=False,
        metadata={"help": "Learn a level v(s) for Q: one vector, added to Q and V of its state."},
    )
    lm_weight: float = field(
        default=0.0, metadata={"help": "Weight of the cross-entropy on the response tokens."}
    )
    student_temperature: float = field(
        default=1.0, metadata={"help": "Divides the student's logits in the TD loss."}
    )
    teacher_temperature: float = field(
        default=1.0, metadata={"help": "Divides the teacher's logits."}
    )
    vocab_size: int | None = field(
        default=None,
        metadata={"help": "Columns at and above it are padding; for models that pad differently."},
    )
    lmbda: float = field(
        default=0.0,
        metadata={
            "help": "Probability that a sequence of a batch is the student's own answer to the "
            "example's prompt, in place of the example's (0: offline; 1: on-policy)."
        },
    )
    max_completion_length: int = field(
        default=512, metadata={"help": "Cap of an answer, tokens; max_length does not bound it."}
    )
    temperature: float = field(
        default=1.0, metadata={"help": "Divides the logits that answers are drawn from; 0: greedy."}
    )
    top_k: int = field(
        default=0,
        metadata={"help": "Answers are drawn from so many tokens (0: all); see action_top_k."},
    )
    top_p: float = field(
        default=1.0, metadata={"help": "Answers are drawn from this nucleus; see action_top_p."}
    )
    teacher_mixture: float = field(
        default=0.0,
        metadata={"help": "Probability that a token of an answer is drawn from the teacher."},
    )
    generation_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Answers that are written at once, over all processes (by default all of a "
            "step): what bounds the memory of keys and values."
        },
    )
    use_vllm: bool = field(
        default=False,
        metadata={"help": "vLLM in the training process writes the answers (docs/teachers.md)."},
    )
    vllm_gpu_memory_utilization: float = field(
        default=0.3, metadata={"help": "Share of the GPU's memory that vLLM takes."}
    )
    replay_size: int = field(
        default=0, metadata={"help": "Answers that are kept to be learned from again."}
    )
    replay_ratio: float = field(
        default=0.0,
        metadata={"help": "Share of the steps that take kept answers in place of new ones."},
    )

    def __post_init__(self) -> None:
        self._check_values()
        if (self.teacher == "cache") != (self.teacher_cache is not None):
            raise UserError(
                "teacher_cache: expected a folder with teacher: cache, and none otherwise, got "
                f"{self.teacher_cache} with teacher: {self.teacher}"
            )
        if self.teacher == "cache" and self.lmbda:
            raise UserError(
                "lmbda: expected 0 with teacher: cache, which knows nothing of other answers, got "
                f"{self.lmbda}"
            )
        if self.teacher == "cache" and self.teacher_model_name_or_path is not None:
            raise UserError(
                "teacher_model_name_or_path: expected none with teacher: cache, got "
                f"{self.teacher_model_name_or_path}"
            )
        if self.loss_type != "nll" or self.label_smoothing_factor:
            raise UserError(
                "loss_type: expected 'nll' and no label_smoothing_factor, got "
                f"{self.loss_type!r} and {self.label_smoothing_factor}"
            )
        if self.normaliser == "sampled" and self.batch_vocabulary_extra < 1:
            raise UserError(
                "batch_vocabulary_extra: expected a number >= 1 with normaliser: sampled, got 0"
            )
        if bool(self.replay_size) != bool(self.replay_ratio):
            raise UserError(
                "replay_size: expected it together with replay_ratio, got "
                f"{self.replay_size} and {self.replay_ratio}"
            )
        self._check_of_use()
        if self.use_vllm and (self.teacher_mixture or self.vocab_size is not None):
            raise UserError(
                "use_vllm: expected False with teacher_mixture or vocab_size, which vLLM's sampler "
                "does not know, got True"
            )
        if self.build_objective() is None and self.lm_weight == 0:
            raise UserError(
                "lm_weight: expected a number > 0 where td_weight and the imitation term are 0, "
                "got 0"
            )
        if self.trust_remote_code:
            raise UserError(
                "trust_remote_code: expected False, since code of a model is never run, got True"
            )
        template = self.chat_template_path
        if template is not None and not Path(template).exists():  # nothing is downloaded
            raise UserError(
                f"chat_template_path: expected a .jinja file or a model's directory, got {template}"
            )
        for name in ("use_liger_kernel", "activation_offloading"):
            if getattr(self, name) and (self.use_cpu or not torch.accelerator.is_available()):
                raise UserError(f"{name}: expected False without an accelerator, got True")
        if self.use_liger_kernel and not is_liger_kernel_available():
            raise UserError(
                "use_liger_kernel: expected False without liger-kernel (pip install liger-kernel), "
                "got True"
            )
        if self.bf16 is None and not torch.accelerator.is_available():  # type: ignore[has-type]
            self.bf16 = False
        super().__post_init__()

    def _check_of_use(self) -> None:
        """Refuses fields that would have no say."""
        unused = (
            (self.objective is not None, ("imitation", "td_"), "beside objective"),
            (not self.td_weight, ("td_",), "with td_weight: 0"),
            (self.imitation == "none", ("imitation_",), "with imitation: none"),
            (self.target_network == "none", ("target_decay", "target_every"),
             "without target_network"),
            (not self.lmbda, ONLINE, "with lmbda: 0, which has no answers drawn"),
        )  # fmt: skip
        for so, names, why in unused:
            for name, known in self.__dataclass_fields__.items():
                given = getattr(self, name)
                if so and name.startswith(names) and given != known.default:
                    raise UserError(
                        f"{name}: expected it to be left out {why}{MEANT.get(name, '')}, got "
                        f"{given!r}"
                    )

    def _check_values(self) -> None:
        """Each field by itself: one of the words that it may be, or a number in its range."""
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise UserError(
                    f"{name}: expected one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )
        for name, kind in TDConfig.__annotations__.items():
            if kind == "bool" and not isinstance(getattr(self, name), bool):
                raise UserError(f"{name}: expected true or false, got {getattr(self, name)!r}")
        kinds = get_type_hints(TDConfig)
        for name, (fits, expected) in RANGES.items():
            value, kind = getattr(self, name), kinds[name]
            if value is None and type(None) in get_args(kind):
                continue
            whole = int in (kind, *get_args(kind))
            if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
                number = "an integer" if whole else "a number"
                raise UserError(f"{name}: expected {number} {expected}, got {value!r}")
            if not fits(value):
                raise UserError(f"{name}: expected a number {expected}, got {value}")

    def build_objective(self) -> Objective | None:
        """The objective that the fields describe; None for a plain warm start.

        Raises:
            UserError: ``objective`` is no sum of objectives.
        """
        if self.objective is not None:
            try:
                return parse(self.objective)
            except ValueError as error:
                raise UserError(str(error)) from error
        terms: list[Objective] = []
        if self.imitation != "none" and self.imitation_weight:
            terms.append(
                self.imitation_weight * IMITATION[self.imitation](tail=self.imitation_tail)
            )
        if self.td_weight:
            iq = IQLearn(
                self.td_phi,  # type: ignore[arg-type]
                alpha=self.td_alpha,
                expectation=self.td_expectation,  # type: ignore[arg-type]
                stop_gradient="next" if self.td_stop_gradient else None,
            )
            terms.append(self.td_weight * iq)
        if not terms:
            return None
        return terms[0] if len(terms) == 1 else terms[0] + terms[1]
