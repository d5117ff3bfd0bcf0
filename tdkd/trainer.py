"""TDTrainer: TRL's SFTTrainer with a TD distillation loss on the response tokens.

Data sets, chat templates, packing, PEFT, checkpoints, distributed training and logging are TRL's.
What is ours is one step: hidden states of teacher and student, their heads, ``ops.linear_td_loss``.
"""

from __future__ import annotations

import logging
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tdkd import bootstrap, checkpoints, online, ops, records
from tdkd.config import TDConfig
from tdkd.diagnostics import Drift, diagnostics, share
from tdkd.errors import UserError, missing
from tdkd.lm_loss import lm_cross_entropy
from tdkd.models import (
    Head,
    backbone,
    check_head,
    check_model_path,
    check_packed,
    check_positions,
    check_tokenizer,
    eos_token_ids,
    has_added_adapter,
    is_adapter,
    last_hidden_state,
    lm_head,
    load_added_adapter,
    load_model,
    positions,
)
from tdkd.objectives import CrossEntropy, IQLearn, ObjectiveLike, as_objective

try:
    from accelerate import PartialState
    from accelerate.utils import DynamoBackend
    from datasets import Dataset
    from transformers import PreTrainedModel
    from trl import SFTTrainer
    from trl.models.utils import _ForwardRedirection

    from tdkd.cache import Cache, Collator, extent
except (ImportError, RuntimeError) as error:  # lazy modules raise the latter
    raise missing(error) from error

__all__ = ["TDConfig", "TDTrainer", "response_rows"]

logger = logging.getLogger("tdkd")

NEVER_CALLED = ("compute_metrics", "compute_loss_func", "preprocess_logits_for_metrics")
"""What ``SFTTrainer`` takes and would give logits to."""


class TDTrainer(SFTTrainer):
    """:class:`trl.SFTTrainer` whose loss is TD distillation.

    LoRA may sit on the head too, but TRL refuses it there in a ``PeftModel``: put it in with
    ``model.add_adapter(LoraConfig(...))`` and leave out ``peft_config``.

    Args:
        model: the student, or its directory (of an adapter: merged into its base model).
        teacher_model: the teacher, or its directory; None takes the one that ``args`` name, which
            may be a cache of its action sets. A cache brings its own data, without
            ``train_dataset``; given, it must be (a part of) :meth:`tdkd.cache.Cache.dataset`.
        args: a :class:`TDConfig`.
        objective: any objective of :mod:`tdkd.objectives` or a function of ``Rows``, in place of
            the one that ``args`` describe.
        trainer: what ``SFTTrainer`` takes (``train_dataset``, ``processing_class``, ...). Records
            of chat messages may say ``truncated``, as those of ``tdkd generate`` do: an answer that
            was cut is not closed. One that says false ends with the token that ends a turn, and
            what the chat template writes behind it, such as a line break, is not learned; without
            ``truncated`` it is, as TRL has it. Both follow the generation prompt verbatim.
    Raises:
        UserError: there is no teacher although the objective needs one, vocabularies or (of
            directories) tokenizers differ, or a model does something to its logits that the ops do
            not know.
    """

    _tag_names = ["trl", "tdkd"]
    data_collator: Any
    _aside: str | None = None
    """Where checkpoints go in place of the output directory."""
    _templates_must_agree = True
    """Whether conversations of a cache are refused to a student with another chat template."""

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        teacher_model: str | Path | PreTrainedModel | None = None,
        args: TDConfig | None = None,
        *,
        objective: ObjectiveLike | None = None,
        **trainer: Any,
    ) -> None:
        args = TDConfig() if args is None else args
        if not isinstance(args, TDConfig):
            raise UserError(f"args: expected a TDConfig, got {type(args).__name__}")
        for name in NEVER_CALLED:
            if trainer.get(name) is not None:
                raise UserError(f"{name}: expected None, since no logits exist here, got one")
        if teacher_model is model and not isinstance(model, str | Path):
            raise UserError("teacher_model: expected another model than the student, got the same")
        if isinstance(model, str | Path) and is_adapter(check_model_path(model)):
            model = load_model(model)
        elif isinstance(model, str | Path):
            # TRL loads it, from what we would load
            model = str(model)
            options = {**(args.model_init_kwargs or {}), "use_safetensors": True}
            if options.get("trust_remote_code"):
                raise UserError(
                    "model_init_kwargs: expected no trust_remote_code, since code of a model is "
                    "never run, got True"
                )
            args.model_init_kwargs = options
        self._cache: Cache | None = None
        if args.teacher == "cache":
            if teacher_model is not None:
                raise UserError("teacher_model: expected none with teacher: cache, got a model")
            self._cache = _opened_cache(args)
            if trainer.get("train_dataset") is None:
                trainer["train_dataset"] = self._cache.dataset()
        masked = args.assistant_only_loss
        try:
            if self._cache is not None:
                # its labels are masked already, and TRL would ask for conversations
                args.assistant_only_loss = False
            super().__init__(model=model, args=args, **trainer)
        finally:
            args.assistant_only_loss = masked
        # the losses below honour num_items_in_batch, whatever the model's forward accepts
        self.model_accepts_loss_kwargs = True
        self.objective = args.build_objective() if objective is None else as_objective(objective)
        by_fields = objective is None and args.objective is None
        if by_fields and args.action_top_k == 1 and args.imitation == "forward_kl":
            logger.warning(
                "action_top_k: 1 makes the KL that of a coin; a student near its teacher learns "
                "more by objective: CrossEntropy(tail=True) + SoftTD(huber=1), with gamma: 0 "
                "(docs/teachers.md)"
            )
        extras: dict[str, Any] = {
            "target_network": args.target_network,
            "value_head": args.value_head,
        }
        bootstrap.check_of_use(self.objective, gamma=args.gamma, **extras)
        looks_ahead = bool(args.gamma and self.objective and self.objective.looks_ahead)
        self._drift = Drift(args.q_level, value_head=args.value_head, looks_ahead=looks_ahead)
        self._redirect = _ForwardRedirection()
        student = self._unwrapped(self.model)
        # weights that are sharded from the start cannot run without their wrapper
        self._whole = not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        bootstrap.check_whole(self._whole, **extras)
        if self._whole:
            check_head(student)
            if self.padding_free:
                check_packed(student)
        if self.aux_loss_enabled:
            raise UserError(
                "router_aux_loss_coef: expected 0 with a mixture of experts, whose load-balancing "
                f"loss is no part of this one, got {self.router_aux_loss_coef}"
            )
        self._compile(student)
        if args.value_head:
            bootstrap.add_value_head(student, lm_head(student).weight.shape[1])
        else:
            bootstrap.remove_value_head(student)
        self.target: bootstrap.TargetNetwork | None = None
        if args.target_network == "ema":
            self.target = bootstrap.TargetNetwork(student, args.target_decay, args.target_every)
            self._compile(self.target.network)
            self.add_callback(self.target)
        self._eos = eos_token_ids(student, self._tokenizer)
        self._clock = online.Clock(self.accelerator.device)
        self._rollouts: online.Rollouts | None = None
        self.teacher: nn.Module | None = None
        if self._cache is not None:
            self._read(self._cache, lm_head(student))
        elif self.objective is None and teacher_model is not None:
            raise UserError("teacher_model: expected none without an objective, got a model")
        elif self.objective is not None:
            self.teacher = self._prepared_teacher(teacher_model, student, args)
        if self.objective is not None:
            size = tuple(lm_head(student).weight.shape) if self._whole else ()
            rule = ops.routes(self.accelerator.device.type, *size)
            logger.info("heads: normaliser %s; %s", args.normaliser, rule)
            if args.q_level == "log_prob" and not args.value_head and self.objective.free_level:
                logger.warning(
                    "q_level: %r asks for a level of Q that log_prob has not; set q_level: logit "
                    "or value_head: true (docs/objectives.md)",
                    self.objective,
                )
        if args.lmbda:
            self._go_online(args, student)
        models = [student] if self.teacher is None else [student, self._unwrapped(self.teacher)]
        for name, dataset in self._datasets():
            # of a stream, and of what others collate, nothing is known
            if isinstance(dataset, Dataset) and {"input_ids", "labels"} <= {*dataset.column_names}:
                self._check_data(dataset, name, models)

    def _datasets(self) -> list[tuple[str, Any]]:
        """What is learned from and evaluated on, and what errors call it."""
        found = []
        for name, given in (("train", self.train_dataset), ("eval", self.eval_dataset)):
            parts = given.values() if isinstance(given, dict) else [given]
            found += [(f"{name}_dataset", part) for part in parts if part is not None]
        return found

    def _check_data(self, dataset: Dataset, name: str, models: list[nn.Module]) -> None:
        """Refuses examples that the models cannot be given, and those that teach nothing."""
        longest, largest, states = extent(dataset)
        if not len(dataset) or not (states or self.args.lmbda):  # which writes answers
            raise UserError(
                f"{name}: expected a token to learn that has others before it, got none: every "
                f"response is empty, or cut off at max_length ({self.args.max_length})"
            )
        check_positions(longest, "max_length", *models)
        rows = min(model.config.get_text_config().vocab_size for model in models)  # type: ignore[union-attr,operator]
        if largest >= rows:
            raise UserError(
                f"{name}: expected tokens below {rows}, the vocabulary of the model, got {largest}"
            )
        if self.args.vocab_size is not None and largest >= self.args.vocab_size:
            raise UserError(
                f"vocab_size: expected more than {largest}, the largest token of {name}, got "
                f"{self.args.vocab_size}"
            )
        cut = None if self._cache is None else self._cache.manifest.max_length
        wanted = self.args.max_length
        # of packed rows it is the length of the row, and None takes examples as they are
        if cut == longest and wanted is not None and wanted > cut and not self.args.packing:
            raise UserError(
                f"max_length: expected at most the {cut} that examples of {self._cache.path} were "  # type: ignore[union-attr]
                f"cut at, got {wanted}; set max_length: {cut}, or give tdkd cache a larger one"
            )

    def _go_online(self, args: TDConfig, student: nn.Module) -> None:
        teacher = None if self.teacher is None else self._unwrapped(self.teacher)
        online.check(args, self.objective, self.data_collator, teacher, whole=self._whole)
        assert teacher is not None
        self._at_once: int | None = None
        if args.generation_batch_size is not None:
            self._at_once = args.generation_batch_size // args.world_size
        self._sampling = online.Sampling(
            args.max_completion_length,
            args.temperature,
            args.top_k,
            args.top_p,
            args.teacher_mixture,
            args.vocab_size,
            positions(student, teacher),
        )
        self._vllm: online.VLLM | None = None
        if args.use_vllm:
            self._vllm = online.VLLM(
                student,
                self.accelerator,
                self._tokenizer,
                self._sampling,
                eos=self._eos,
                gpu_memory_utilization=args.vllm_gpu_memory_utilization,
                batch_size=self._at_once,
            )
        self._rollouts = online.Rollouts(
            self.data_collator,
            lmbda=args.lmbda,
            replay_size=args.replay_size,
            replay_ratio=args.replay_ratio,
            eos=self._eos,
            seed=args.seed,
            rank=args.process_index,
            total=lambda x: self.accelerator.reduce(x.to(self.accelerator.device), "sum"),
        )

    def _read(self, cache: Cache, student: Head) -> None:
        """Makes batches carry the sets of a cache."""
        cache.check_tokenizer(self._tokenizer, "processing_class")
        if self._templates_must_agree:
            cache.check_template(self._tokenizer, "processing_class")
        if self.args.vocab_size is None:
            cache.check_vocabulary(student.weight.shape[0], "model")
        else:
            cache.check_vocabulary(self.args.vocab_size, "vocab_size")
        collator = Collator(self.data_collator, cache)
        self.data_collator = collator
        for name, dataset in self._datasets():
            first = next(iter(dataset), None)
            if first is None:
                raise UserError(
                    f"{name}: expected at least one example, got none that max_length "
                    f"({self.args.max_length}) leaves an answer of"
                )
            # says at once where examples are of another origin
            collator([first])

    def _prepared_teacher(
        self, given: str | Path | PreTrainedModel | None, student: nn.Module, args: TDConfig
    ) -> nn.Module:
        head = lm_head(student)
        argument = "teacher_model_name_or_path" if given is None else "teacher_model"
        given = args.teacher_model_name_or_path if given is None else given
        if given is None:
            raise UserError(
                "teacher_model: expected a teacher for this objective, got none; "
                "set teacher_model_name_or_path"
            )
        if isinstance(given, str | Path):
            check_tokenizer(given, self._tokenizer, argument)
            teacher = load_model(
                given,
                dtype=head.weight.dtype,
                device=self.accelerator.device if self._whole else "cpu",
                argument=argument,
            )
        else:
            teacher = given
            if {*map(id, teacher.parameters())} & {*map(id, student.parameters())}:
                raise UserError(
                    "teacher_model: expected weights of its own, got some that the student learns; "
                    "give a copy"
                )
        sizes = head.weight.shape[0], lm_head(teacher).weight.shape[0]
        if sizes[0] != sizes[1] and args.vocab_size is None:
            raise UserError(
                f"teacher_model: expected the student's vocabulary of {sizes[0]}, got {sizes[1]}; "
                "where they differ by padding alone, set vocab_size"
            )
        if args.vocab_size is not None and args.vocab_size > min(sizes):
            raise UserError(
                f"vocab_size: expected at most {min(sizes)}, the smaller vocabulary, got "
                f"{args.vocab_size}"
            )
        if self._whole:
            check_head(teacher, "teacher_model")
            if self.padding_free:
                check_packed(teacher, "teacher_model")
        self._compile(teacher)
        teacher.requires_grad_(False)
        return self.accelerator.prepare_model(teacher, evaluation_mode=True).eval()

    def _prepare_dataset(
        self,
        dataset: Any,
        processing_class: Any,
        args: Any,
        packing: bool,
        formatting_func: Any,
        dataset_name: str,
    ) -> Any:
        """TRL's, but that answers which say ``truncated`` are not closed by the chat template, and
        that what the template refuses is told in one line."""
        argument = f"{dataset_name}_dataset"
        if formatting_func is None:
            state = PartialState()
            # as TRL does: one process makes what the others find in the cache of datasets
            with state.main_process_first(), state.local_main_process_first():
                encoded = records.encode_truncated(
                    dataset, self._tokenizer, argument, args.dataset_num_proc
                )
            if encoded is not dataset and args.assistant_only_loss:
                raise UserError(
                    f"assistant_only_loss: expected False where records of {argument} say "
                    "truncated, got True"
                )
            dataset = encoded
        try:
            return super()._prepare_dataset(
                dataset, processing_class, args, packing, formatting_func, dataset_name
            )
        except records.UNRENDERED:
            if formatting_func is None:
                _check_columns(dataset, argument, args.dataset_text_field)
                records.check_rendered(dataset, self._tokenizer, argument, self.chat_template)
            raise

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """A micro-batch forward and backward; its seconds enter the log."""
        with self._clock("learn"):
            return super().training_step(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of one micro-batch; outputs are not built, since logits do not exist."""
        if return_outputs:
            raise NotImplementedError(
                "return_outputs: expected False, since no logits exist here; set "
                "prediction_loss_only=True for evaluation"
            )
        student = self._unwrapped(model)
        # through the wrapper's forward, so that DDP reduces the gradients of what runs inside; not
        # through a compiled one, which would trace the losses (the body is compiled by itself)
        loss, metrics = self._redirect(
            getattr(model, "_orig_mod", model),
            student,
            self._loss,
            student,
            inputs,
            num_items_in_batch,
        )
        recorded = self._metrics["train" if self.model.training else "eval"]
        for name, value in metrics.items():
            recorded[name].append(value)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # num_items_in_batch counts the tokens of every rank, and DDP averages over ranks
            loss = loss * self.accelerator.num_processes
        return loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """Evaluation gives the loss and the logged metrics; there are no logits to return."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs), None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluation and prediction: each is the same when it is done again, and takes nothing
        from training, neither random numbers nor room in the log."""
        self._metrics["eval"].clear()
        device = self.accelerator.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self.args.seed)
            return super().evaluation_loop(*args, **kwargs)

    def _loss(
        self,
        student: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        args: TDConfig = self.args
        labels = inputs["labels"]
        expert = inputs.get("expert_weight")
        ours = ("labels", "expert_weight", "action_ids", "action_log_probs")
        forwarded = {name: value for name, value in inputs.items() if name not in ours}
        tokens = labels[:, 1:]
        keep, successor = response_rows(tokens, self._eos)
        taken = tokens.reshape(-1)[keep]
        if expert is not None:
            expert = expert[:, 1:].reshape(-1)[keep]

        def rows(model: nn.Module) -> Tensor:
            with self.accelerator.autocast():
                hidden = last_hidden_state(model, **forwarded)[:, :-1]
            return hidden.reshape(-1, hidden.shape[-1])[keep]

        hidden = rows(student)
        head = lm_head(student)
        # evaluation knows no number: that of the states, as in training
        items = taken.numel() if num_items_in_batch is None else num_items_in_batch
        items = torch.as_tensor(items).clamp(min=1)
        loss = hidden.new_zeros((), dtype=torch.float32)
        metrics: dict[str, Tensor] = {}
        folded = self._lm_is_folded()
        if args.lm_weight and not folded:
            states, targets, weight = hidden, taken, 1.0
            if expert is not None:  # the student's own answers are nothing to imitate
                states, targets = hidden[expert > 0], taken[expert > 0]
                weight = expert.max() if taken.numel() else 0.0
            with self.accelerator.autocast():  # as the bodies do
                lm_loss = lm_cross_entropy(states, head, targets)
            loss = loss + args.lm_weight * weight * lm_loss / items
            metrics["lm_loss"] = share(lm_loss, torch.full_like(lm_loss, targets.numel()))
        if self.objective is not None:
            if self._cache is None:
                assert self.teacher is not None
                timed = self._clock("score") if self.model.training else nullcontext()
                with torch.no_grad(), timed:
                    teacher_hidden = rows(self.teacher)
                teacher = self._live(teacher_hidden, lm_head(self._unwrapped(self.teacher)))
            else:
                ids, log_probs = (inputs[name][:, 1:].flatten(0, 1)[keep] for name in ours[2:])
                count = (ids >= 0).sum(-1).int()
                teacher = {"actions": ops.ActionSet(ids, log_probs, count)}
            extras: dict[str, Any] = {}
            if args.value_head:
                extras["state_value"] = bootstrap.state_value(student, hidden)
            if self.target is not None:
                with torch.no_grad():
                    teacher = {"actions": self._selected(teacher, taken)}
                    slow = rows(self.target.network)
                    extras["target_value"] = self._target_value(slow, teacher, taken, successor)
            extras |= {"num_items_in_batch": items, "expert_weight": expert}
            if folded:
                assert self.objective is not None
                extras["objective"] = self.objective + args.lm_weight * CrossEntropy(tail=True)
            out = self._td_loss(hidden, head, teacher, taken, successor, **extras)
            loss = loss + out.loss
            if folded:
                data = torch.ones_like(taken, dtype=torch.bool) if expert is None else expert > 0
                metrics["lm_loss"] = share(-torch.where(data, out.q, 0.0).sum(), data.sum())
            metrics.update(
                diagnostics(
                    out,
                    taken,
                    successor,
                    log_prob=args.q_level == "log_prob",
                    gamma=args.gamma,
                    state_value=extras.get("state_value"),
                )
            )
        return loss, metrics

    def _lm_is_folded(self) -> bool:
        """Whether the LM loss is a term of the objective, whose log Z then serves both: an exact
        one, of the student's own logits, on every row."""
        args: TDConfig = self.args
        return (
            bool(args.lm_weight)
            and self.objective is not None
            and not self.objective.bootstraps
            and args.normaliser == "exact"
            and args.q_level == "log_prob"
            and args.student_temperature == 1
            and not args.value_head
            and args.vocab_size is None
        )

    def _live(self, hidden: Tensor, head: Head) -> dict[str, Any]:
        """What :func:`tdkd.ops.linear_td_loss` takes of a live teacher."""
        args: TDConfig = self.args
        return {
            "teacher_hidden": hidden,
            "teacher_weight": head.weight,
            "teacher_bias": head.bias,
            "teacher_temperature": args.teacher_temperature,
            "teacher_softcap": head.softcap,
            "teacher_logit_scale": head.logit_scale,
            # no set holds more, and memory would be taken for k
            "k": min(args.action_top_k, head.weight.shape[0]),
            "top_p": args.action_top_p,
        }

    def _selected(self, teacher: dict[str, Any], tokens: Tensor) -> ops.ActionSet:
        """The sets of a teacher, live or not, that more than one loss is taken of."""
        given = {name.removeprefix("teacher_"): value for name, value in teacher.items()}
        if "actions" in given:
            actions: ops.ActionSet = given["actions"]
            return actions
        with self.accelerator.autocast():  # as the bodies do
            return ops.linear_select_actions(
                **given, include=tokens, vocab_size=self.args.vocab_size
            )

    def _td_loss(
        self,
        hidden: Tensor,
        head: Head,
        teacher: dict[str, Any],
        tokens: Tensor,
        successor: Tensor,
        **extras: Any,
    ) -> ops.TDOutput:
        """The objective on the response rows ``[N]``, from ``[N, H]`` hidden states and heads.

        ``teacher``: of :meth:`_live`, or its ``actions``; ``extras``: whatever else the op takes.
        """
        args: TDConfig = self.args
        law = None if args.normaliser == "exact" else args.batch_vocabulary_law
        with self.accelerator.autocast():  # as the bodies do
            return ops.linear_td_loss(
                hidden,
                head.weight,
                tokens,
                bias=head.bias,
                normaliser=args.normaliser,  # type: ignore[arg-type]
                extra=args.batch_vocabulary_extra,
                law=law,  # type: ignore[arg-type]
                successor=successor,
                **teacher,
                **{**self._td_options(head), **extras},
            )

    def _target_value(
        self, hidden: Tensor, teacher: dict[str, Any], tokens: Tensor, successor: Tensor
    ) -> Tensor:
        """V of the target network, ``[N]``."""
        assert self.target is not None
        network = self.target.network
        value = bootstrap.state_value(network, hidden)
        # of its loss nothing is wanted: the cheapest one
        extras = {"state_value": value, "objective": IQLearn()}
        return self._td_loss(hidden, lm_head(network), teacher, tokens, successor, **extras).value

    def _td_options(self, head: Head) -> dict[str, Any]:
        """What :func:`tdkd.ops.td_loss` takes as well, of the student."""
        args: TDConfig = self.args
        return {
            "objective": self.objective,
            "q": args.q_level,
            "gamma": args.gamma,
            "temperature": args.student_temperature,
            "softcap": head.softcap,
            "logit_scale": head.logit_scale,
            "vocab_size": args.vocab_size,
        }

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The student, and beside it the value head, if there is one."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            folder = Path(self.args.output_dir if output_dir is None else output_dir)
            bootstrap.save_value_head(self._unwrapped(self.model), folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.target is not None and self.args.should_save:
            self.target.save(Path(output_dir))

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        student = self._unwrapped(self.model)
        if has_added_adapter(student):  # which transformers writes and does not read
            load_added_adapter(student, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        bootstrap.load_value_head(student, Path(resume_from_checkpoint))
        if self.target is not None:
            self.target.load(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        student = self._unwrapped(self.model)
        best = Path(self.state.best_model_checkpoint)
        if has_added_adapter(student):
            load_added_adapter(student, best)
        else:
            super()._load_best_model()
        bootstrap.load_value_head(student, best)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Transformers', that says which metrics there are.

        Raises:
            UserError: ``metric_for_best_model`` is none of them.
        """
        known = sorted(name.removeprefix("eval_") for name in metrics if name.startswith("eval_"))
        wanted = self.args.metric_for_best_model
        if wanted is not None and wanted.removeprefix("eval_") not in known:
            raise UserError(
                f"metric_for_best_model: expected one of {', '.join(known)}, got {wanted!r}"
            )
        return super()._determine_best_metric(metrics, trial)

    def _get_output_dir(self, trial: Any) -> str:
        return self._aside or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """A checkpoint appears whole or not at all: it is written aside, and renamed.

        Raises:
            UserError: the disk takes no more.
        """
        if trial is not None or self.args.push_to_hub:
            # an upload reads the checkpoint where it was written
            super()._save_checkpoint(model, trial)
            return
        output, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        aside = output / checkpoints.UNFINISHED
        with checkpoints.writing(output):
            if self.args.should_save:
                checkpoints.clear(output)
            self.accelerator.wait_for_everyone()
            self._aside = str(aside)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._aside = None
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                if self.state.best_model_checkpoint == str(aside / name):
                    self.state.best_model_checkpoint = str(output / name)
                    self.state.save_to_json(str(aside / name / checkpoints.STATE))
                checkpoints.publish(output, name)
                best = Path(self.state.best_model_checkpoint or name).name
                checkpoints.rotate(output, self.args.save_total_limit, {name, best})
        self.accelerator.wait_for_everyone()

    def _send_telemetry(self) -> None:
        """TRL would tell its makers of every run; nothing is sent from here."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL's card of the output directory, which appears whole or not at all."""
        if not self.is_world_process_zero():
            return
        given = self.args.output_dir
        if self._aside is None:  # within a checkpoint that is being written, it is clear
            checkpoints.clear(Path(given))
        aside = Path(given) / checkpoints.UNFINISHED / "card"
        self.args.output_dir = str(aside)
        try:
            super().create_model_card(*args, **kwargs)
        finally:
            self.args.output_dir = given
        os.replace(aside / "README.md", Path(given) / "README.md")
        aside.rmdir()
        if self._aside is None:  # not within a checkpoint, which takes the folder away
            aside.parent.rmdir()

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """The batches of a step, with the student's answers in them where ``lmbda`` is not 0.

        None for a run that goes on from its last step, which would do one step too many.
        """
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return [], None
        self._clock.steps += 1
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._rollouts is not None and batches:
            if self._vllm is None:
                self._clock.expect("prefill")
            with self._clock("generate"):
                batches, metrics = self._rollouts(batches, self.state.global_step, self._answers)
            for name, value in metrics.items():
                self._metrics["train"][name].append(value)
            items = self._get_num_items_in_batch(batches, device)
        return batches, items

    def _answers(self, prompts: list[list[int]], generator: torch.Generator) -> list[list[int]]:
        """The student's answer to each prompt, or that of the student and the teacher together."""
        if self._vllm is not None:
            return self._vllm(prompts, generator)
        assert self.teacher is not None
        with self.accelerator.autocast():
            return online.sample(
                self._unwrapped(self.model),
                prompts,
                self._sampling,
                eos=self._eos,
                pad_token_id=self.data_collator.pad_token_id,
                generator=generator,
                teacher=self._unwrapped(self.teacher),
                batch_size=self._at_once,
                clock=self._clock,
            )

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self._rollouts is not None and self.args.replay_size:
            self._rollouts.save(Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self._rollouts is not None and checkpoint is not None:
            self._rollouts.load(Path(checkpoint))

    def _compile(self, model: nn.Module) -> None:
        """Compiles the body in place; accelerate compiles a wrapper, which would run the head."""
        plugin = self.accelerator.state.dynamo_plugin
        if plugin.backend != DynamoBackend.NO:
            backbone(model).compile(**plugin.to_kwargs())

    def _unwrapped(self, model: nn.Module) -> nn.Module:
        return self.accelerator.unwrap_model(model, keep_torch_compile=False)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL averages what the steps recorded; here it leaves the device, once a log."""
        recorded = self._metrics["train" if self.model.training else "eval"]
        if self.model.training:
            for name, seconds in self._clock.read().items():
                recorded[f"time/{name}"] = [seconds]
        for name, values in recorded.items():
            kept = torch.stack([torch.as_tensor(value, dtype=torch.float32) for value in values])
            # a mean of each micro-batch, or a sum and what it is to be divided by
            kept = kept.mean(0).to(self.accelerator.device)
            reduced = self.accelerator.reduce(kept, "mean")
            if reduced.dim():
                reduced = reduced[0] / reduced[1].clamp(min=torch.finfo(torch.float32).tiny)
            recorded[name] = [reduced.item()]
            if name == self._drift.metric and self.model.training:
                self._drift.see(recorded[name][0], self.state.log_history)
        super().log(logs, start_time)


def _opened_cache(args: TDConfig) -> Cache:
    """The cache, if its sets are those that the configuration asks for."""
    # one process reads it all for the checksums
    verify = args.teacher_cache_verify and args.process_index == 0
    cache = Cache(args.teacher_cache or "", verify=verify)
    of_the_cache = ("action_top_k", "action_top_p", "teacher_temperature", "assistant_only_loss")
    for name in of_the_cache:
        kept, wanted = getattr(cache.manifest, name), getattr(args, name)
        if kept != wanted:
            raise UserError(
                f"{name}: expected {kept} as in {cache.path}, got {wanted}; tdkd cache has an "
                "option of that name"
            )
    if args.completion_only_loss is False:
        raise UserError(
            f"completion_only_loss: expected None or True with teacher: cache, whose labels are in "
            f"{cache.path}, got False"
        )
    return cache


def _check_columns(dataset: Any, argument: str, text: str) -> None:
    """Refuses a data set that TRL finds nothing to train on in; ``text``: what it calls text."""
    found = dataset.column_names or list(next(iter(dataset), {}))
    wanted = ["completion"] if "prompt" in found else ["messages", "conversations", text]
    if not {"input_ids", *wanted} & {*found}:
        raise UserError(
            f"{argument}: expected columns prompt and completion, messages, {text} or input_ids, "
            f"got {', '.join(sorted(found))}"
        )


def response_rows(tokens: Tensor, eos: list[int]) -> tuple[Tensor, Tensor]:
    """The rows that the head must see, and their successors among themselves.

    Args:
        tokens: taken tokens ``[B, T]``, -100 on rows that are no states. Packed sequences are kept
            apart by the -100 that TRL puts at the first token of each.
        eos: tokens that end a response.
    Returns:
        ``(keep, successor)``, int64 ``[N]``: flat positions, and for each the row of the next state
        among the N, -1 or -2. Successors are found in the full layout, because two responses
        become neighbours when the rows between them go.
    """
    state = (tokens != -100).reshape(-1)
    keep = state.nonzero().squeeze(-1)
    rank = state.cumsum(0) - 1
    successor = ops.successors(tokens, eos_token_id=eos).reshape(-1)[keep]
    if not keep.numel():
        return keep, successor
    return keep, torch.where(successor >= 0, rank[successor.clamp(min=0)], successor)
