"""The ``tdkd`` command. Commands load their libraries when they run, not before."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from tdkd.errors import UserError, absent, missing

app = typer.Typer(
    help="Temporal-difference distillation of language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# typer may carry its own copy of click: this is the UsageError of the one that it uses
USAGE_ERROR: Any = typer.BadParameter.__base__

# The functions have names of their own: tdkd.cli.generate is the module.
Device = Annotated[str, typer.Option(help="torch device")]
Seed = Annotated[int, typer.Option(help="seed of what is sampled", min=0, max=2**32 - 1)]


@app.command("info")
def _info() -> None:
    """Versions, devices, implementations of the ops, missing extras."""
    from tdkd.cli.info import run

    run()


@app.command("generate")
def _generate(
    model: Annotated[str, typer.Option(help="directory of the teacher")],
    output: Annotated[str, typer.Option(help="JSONL to write; goes on where it was left")],
    prompts: Annotated[
        str | None, typer.Option(help='JSONL with "prompt"; without it the teacher writes its own')
    ] = None,
    num_examples: Annotated[int, typer.Option(help="prompts to write")] = 512,
    max_prompt_tokens: Annotated[int, typer.Option(help="longer prompts are dropped")] = 256,
    max_new_tokens: Annotated[int, typer.Option(help="longer answers are cut")] = 256,
    batch_size: Annotated[int, typer.Option(help="sequences at a time")] = 64,
    top_k: Annotated[int, typer.Option(help="sample among so many tokens")] = 50,
    temperature: Annotated[float, typer.Option(help="0 is greedy")] = 1.0,
    seed: Seed = 0,
    device: Device = "cpu",
) -> None:
    """Let a teacher answer prompts, or write prompts and answers by itself."""
    from tdkd.cli.generate import run

    run(
        model=model,
        output=output,
        prompts=prompts,
        num_examples=num_examples,
        max_prompt_tokens=max_prompt_tokens,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        top_k=top_k,
        temperature=temperature,
        seed=seed,
        device=device,
    )


@app.command("cache")
def _cache(
    output: Annotated[
        str | None, typer.Option(help="folder to write; goes on where it was left")
    ] = None,
    model: Annotated[str | None, typer.Option(help="directory of the teacher")] = None,
    data: Annotated[
        str | None, typer.Option(help="JSONL of prompt and completion, or of messages")
    ] = None,
    served: Annotated[
        str | None,
        typer.Option(help="in place of both: JSONL of what a serving engine returned"),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="directory of the student's, beside --served")
    ] = None,
    action_top_k: Annotated[int, typer.Option(help="cap of an action set")] = 64,
    action_top_p: Annotated[
        float, typer.Option(help="teacher probability that a set must reach")
    ] = 1.0,
    teacher_temperature: Annotated[float, typer.Option(help="divides the teacher's logits")] = 1.0,
    max_length: Annotated[int, typer.Option(help="tokens of an example")] = 1024,
    tail: Annotated[bool, typer.Option(help="keep the mass outside each set")] = True,
    log_probs: Annotated[str, typer.Option(help="float16, or bfloat16")] = "float16",
    model_dtype: Annotated[
        str,
        typer.Option(
            help="the teacher's weights: float32, bfloat16, float16, or auto: the checkpoint's own "
            "on a GPU, float32 on a CPU"
        ),
    ] = "auto",
    vocab_size: Annotated[
        int | None, typer.Option(help="columns at and above it are padding, of teacher or student")
    ] = None,
    assistant_only_loss: Annotated[
        bool, typer.Option("--assistant-only-loss", help="of messages, what the assistant says")
    ] = False,
    batch_size: Annotated[int, typer.Option(help="sequences at a time")] = 16,
    shard_examples: Annotated[int, typer.Option(help="examples of a file")] = 1024,
    device: Annotated[
        str | None, typer.Option(help="torch device; without it a GPU where there is one")
    ] = None,
    verify: Annotated[
        str | None, typer.Option(help="only compare a cache with its checksums")
    ] = None,
) -> None:
    """Keep a teacher's action sets on disk, for students to learn from (teacher: cache)."""
    from tdkd.cli import cache

    if verify is not None:
        cache.verify(verify)
        return
    if output is None:
        raise UserError("output: expected a folder to write, got none")
    cache.run(
        model=model,
        data=data,
        served=served,
        tokenizer=tokenizer,
        output=output,
        action_top_k=action_top_k,
        action_top_p=action_top_p,
        teacher_temperature=teacher_temperature,
        max_length=max_length,
        tail=tail,
        log_probs=log_probs,
        model_dtype=model_dtype,
        vocab_size=vocab_size,
        assistant_only_loss=assistant_only_loss,
        batch_size=batch_size,
        shard_examples=shard_examples,
        device=device,
    )


@app.command("evaluate")
def _evaluate(
    model: Annotated[str, typer.Option(help="directory of the student")],
    teacher: Annotated[str, typer.Option(help="directory of the teacher")],
    data: Annotated[str, typer.Option(help="JSONL with prompt and completion, or references")],
    output: Annotated[str, typer.Option(help="JSON to write")],
    max_examples: Annotated[int | None, typer.Option(help="the first so many records")] = None,
    max_length: Annotated[int, typer.Option(help="tokens of prompt and completion")] = 512,
    vocab_size: Annotated[
        int | None, typer.Option(help="columns at and above it are padding, of either model")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="sequences at a time")] = 16,
    max_new_tokens: Annotated[int, typer.Option(help="length of an answer")] = 128,
    temperature: Annotated[float, typer.Option(help="of the answers; 0 is greedy")] = 0.0,
    rouge: Annotated[bool, typer.Option(help="let the student answer, and score it")] = True,
    samples: Annotated[int, typer.Option(help="answers to keep in the JSON")] = 0,
    seed: Seed = 0,
    device: Device = "cpu",
) -> None:
    """Measure a student against its teacher on held-out responses."""
    from tdkd.cli.evaluate import run

    run(
        model=model,
        teacher=teacher,
        data=data,
        output=output,
        max_examples=max_examples,
        max_length=max_length,
        vocab_size=vocab_size,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        rouge=rouge,
        samples=samples,
        seed=seed,
        device=device,
    )


@app.command("inspect")
def _inspect(
    model: Annotated[str, typer.Option(help="directory of the teacher")],
    data: Annotated[
        str, typer.Option(help="JSONL with prompts; the teacher answers where no completion is")
    ],
    output: Annotated[str | None, typer.Option(help="JSON to write, and a PNG beside it")] = None,
    max_examples: Annotated[int | None, typer.Option(help="the first so many records")] = None,
    mass: Annotated[
        float, typer.Option(help="mean probability that the recommended k must hold")
    ] = 0.95,
    gamma: Annotated[float, typer.Option(help="discount, of the bound kappa")] = 0.99,
    max_k: Annotated[int, typer.Option(help="tokens of a position that are looked at")] = 1024,
    teacher_temperature: Annotated[float, typer.Option(help="divides the teacher's logits")] = 1.0,
    vocab_size: Annotated[
        int | None, typer.Option(help="columns at and above it are padding")
    ] = None,
    max_length: Annotated[int, typer.Option(help="tokens of prompt and completion")] = 512,
    batch_size: Annotated[int, typer.Option(help="sequences at a time")] = 16,
    max_new_tokens: Annotated[int, typer.Option(help="length of an answer")] = 128,
    seed: Seed = 0,
    device: Device = "cpu",
) -> None:
    """Measure how a teacher spreads its probability, and choose action_top_k and action_top_p."""
    from tdkd.cli.inspect import run

    run(
        model=model,
        data=data,
        output=output,
        max_examples=max_examples,
        mass=mass,
        gamma=gamma,
        max_k=max_k,
        teacher_temperature=teacher_temperature,
        vocab_size=vocab_size,
        max_length=max_length,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        seed=seed,
        device=device,
    )


@app.command("bench")
def _bench(
    suite: Annotated[
        str,
        typer.Option(
            help="quick, cpu, small, head, linear, routes, sampled, adversarial, gpu, gpu-routes"
        ),
    ] = "quick",
    op: Annotated[str | None, typer.Option(help="the cases of this op alone")] = None,
    vocab: Annotated[
        list[int] | None, typer.Option(help="in place of the suite's; may be repeated")
    ] = None,
    rows: Annotated[int | None, typer.Option(help="in place of the suite's")] = None,
    k: Annotated[list[int] | None, typer.Option(help="likewise; may be repeated")] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="float32, bfloat16, float16; may be repeated")
    ] = None,
    logits: Annotated[
        list[str] | None, typer.Option(help="random, peaked, ascending ...; may be repeated")
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option(help="real, random, or a file of benchmarks/real_sets.py; may be repeated"),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(help="times of each rival, 10, or 20 on a GPU; slow ones get fewer"),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="of torch; its own choice without")] = None,
    output: Annotated[str, typer.Option(help="directory to write to")] = "benchmarks/results",
    name: Annotated[str | None, typer.Option(help="of the files, without extension")] = None,
    compile: Annotated[bool, typer.Option(help="also time what torch.compile makes")] = True,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    budget: Annotated[
        float | None, typer.Option(help="seconds after which no new case begins")
    ] = None,
) -> None:
    """Time the ops, and count their memory, against what else one could call."""
    from tdkd.benchmark.run import Options
    from tdkd.cli.bench import run

    run(
        Options(
            suite=suite,
            op=op,
            vocab=vocab or [],
            rows=rows,
            k=k or [],
            dtype=dtype or [],
            logits=logits or [],
            sets=sets or [],
            rounds=rounds,
            threads=threads,
            output=output,
            name=name,
            compile=compile,
            device=device,
            budget=budget,
        )
    )


@app.command("verify")
def _verify(
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    dtype: Annotated[
        list[str] | None, typer.Option(help="float32, bfloat16, float16; may be repeated")
    ] = None,
    op: Annotated[list[str] | None, typer.Option(help="this op alone; may be repeated")] = None,
    objective: Annotated[
        str | None,
        typer.Option(help="in place of the ops: module:name of an objective, or a sum of ours"),
    ] = None,
    full: Annotated[
        bool, typer.Option("--full/--quick", help="200 cases of each op and dtype, not 12")
    ] = False,
    cases: Annotated[int | None, typer.Option(help="in place of those numbers")] = None,
    seed: Seed = 0,
    json: Annotated[str | None, typer.Option(help="file to write; - is stdout")] = None,
) -> int:
    """Hold the kernels of this machine to the reference in float64; exit code 1 on a failure."""
    from tdkd.cli.verify import run

    return run(
        device=device,
        dtype=dtype or [],
        op=op or [],
        cases=cases,
        full=full,
        seed=seed,
        output=json,
        objective=objective,
    )


@app.command(
    "distill",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def _distill(context: typer.Context) -> None:
    """Train a student: tdkd distill config.yaml [--flag value ...]; --help lists every flag."""
    from tdkd.cli.distill import run

    run(context.args)


def main() -> None:
    """Entry point: what the user can mend is one line and exit code 2."""
    try:
        status = app(standalone_mode=False)
    except UserError as error:
        _refuse(str(error))
    except USAGE_ERROR as error:
        _refuse(error.format_message())
    except (KeyboardInterrupt, typer.Abort):
        _refuse("interrupted", code=130)
    except (ModuleNotFoundError, RuntimeError) as error:  # lazy modules raise the latter
        module = absent(error)
        if module is None or module.split(".")[0] == "tdkd":
            raise
        _refuse(str(missing(error)))
    except OSError as error:
        # a disk or a folder; libraries that mean something else by it give no number
        if error.errno is None:
            raise
        where = "a file" if error.filename is None else str(error.filename)
        _refuse(f"expected to read or write {where}, got {error.strerror or error}")
    sys.exit(status if isinstance(status, int) else 0)


def _refuse(message: str, code: int = 2) -> None:
    if "tqdm" in sys.modules:
        # an open bar of a library would share its line
        for bar in list(sys.modules["tqdm"].tqdm._instances):
            bar.close()
    if message:  # typer has printed its help already where it has nothing to say
        print("tdkd: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(code)
