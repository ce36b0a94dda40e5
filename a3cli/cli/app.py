"""The command line: each command parses, calls one library function and prints what it returns.

Heavy imports stay inside the commands, so that `a3 --help` answers at once.
"""

import errno
import importlib.metadata
import os
import platform
import sys
import traceback
from collections.abc import Callable
from io import TextIOWrapper
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

from a3cli import __version__
from a3cli.errors import INTERNAL_ERROR, A3Error
from a3cli.work.processes import hand_over, is_main, launch, launched

if TYPE_CHECKING:
    from a3cli.work.folder import Work

F = TypeVar("F", bound=Callable[..., Any])
# The parser's errors: typer has its own copy of click in newer versions, and gives this class no name.
UsageError: Any = typer.BadParameter.__base__
# Disk full, quota, file too large, no permission, read-only file system: not our bugs.
MENDABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS)


class ErrorsToExitCodes(TyperGroup):
    """Turn errors into one line and an exit code; a bug keeps its traceback."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        from a3cli.work.interrupt import terminated_as_interrupted

        try:
            with terminated_as_interrupted():
                return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except A3Error as error:
            fail(str(error), error.exit_code)
        except UsageError as error:
            command = error.ctx.command_path if error.ctx else "a3"
            fail(f"{error.format_message()} (see {command} --help)", 2)
        except KeyboardInterrupt:
            fail("interrupted; nothing was left half-written, run the same command again", 3)
        except BrokenPipeError:  # the parser ends the process without a word
            raise
        except Exception as error:
            if problem := mendable(error):
                fail(str(problem), problem.exit_code)
            report_bug()


def mendable(error: Exception) -> A3Error | None:
    """Return what the user can do about an error that is not ours; None if it is a bug."""
    if isinstance(error, OSError) and error.errno in MENDABLE:
        where = f" ({error.filename})" if error.filename else ""
        return A3Error(
            f"{error.strerror}{where}; nothing was left half-written: mend it and run the same command again"
        )
    if isinstance(error, RuntimeError):
        from a3cli.work.machine import out_of_memory

        return out_of_memory(error)
    return None


# What to do instead of naming several data sets.
ONE_DATASET = {
    "calibrate": "a3 calibrate takes one data set; run it once for each with its own --work, and add the calibrations "
    "up with a3 stats merge",
    "pareto": "a3 pareto measures on one data set; run it once for each",
}


class OnceCommand(TyperCommand):
    """A command that refuses a second value for an option that takes one, which the parser would ignore."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        _, _, given = self.make_parser(ctx).parse_args(args=list(args))
        for option in dict.fromkeys(given):
            once = option.param_type_name == "option" and not (option.multiple or getattr(option, "is_flag", False))
            if once and (count := given.count(option)) > 1:
                hint = ONE_DATASET.get(str(ctx.info_name), "") if option.name == "dataset" else ""
                raise UsageError(f"{option.opts[0]} was given {count} times; {hint or 'give it once'}", ctx=ctx)
        return super().parse_args(ctx, args)


class OnceTyper(typer.Typer):
    """Commands that are each an `OnceCommand`."""

    def command(self, *arguments: Any, **options: Any) -> Callable[[F], F]:
        return super().command(*arguments, **{"cls": OnceCommand, **options})


app = OnceTyper(
    cls=ErrorsToExitCodes,
    help="Smaller language models in closed form: calibrate, solve, export.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

WorkOption = Annotated[Path, typer.Option("--work", envvar="A3_WORK", help="Work folder, shared by the stages.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier run with other settings made.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the full result as JSON on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress, only results, warnings and errors.")]
Dataset = Annotated[
    str,
    typer.Option(
        help="wikitext2, wikitext103, c4, slimpajama, a hub id[:config], or a .txt/.jsonl/.parquet file or folder."
    ),
]
Datasets = Annotated[
    list[str] | None,
    typer.Option("--dataset", help="As for calibrate (default: wikitext2); may be given several times."),
]
TextField = Annotated[str | None, typer.Option(help="Field of a row that holds the text (default: text).")]
Split = Annotated[str | None, typer.Option(help="Split of a hub set.")]
Chat = Annotated[bool, typer.Option("--chat", help="Render each row's messages or conversations as a chat.")]
SeqLen = Annotated[int, typer.Option(help="Tokens a block.")]
BatchSize = Annotated[int, typer.Option(help="Blocks a forward.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option(help="auto (float32 on CPU, the checkpoint's on GPU), float32, bfloat16, float16.")]
HeadMultiple = Annotated[int, typer.Option(help="Head size is a multiple of this.")]
MlpMultiple = Annotated[int, typer.Option(help="MLP width is a multiple of this.")]
Sensitivity = Annotated[
    str, typer.Option(help="What a loss counts for: residual (predicted, free) or probe (KL measured in one sweep).")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
FollowSymlinks = Annotated[
    bool, typer.Option("--follow-symlinks", help="Read files that are symbolic links out of the model's folder.")
]
RemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
NumProcesses = Annotated[int, typer.Option(min=1, help="Processes on this machine, each with a share of the work.")]
MaxMinutes = Annotated[
    float | None, typer.Option(min=0, help="Stop after the step in which this time is over; exit code 3.")
]
Junit = Annotated[Path | None, typer.Option(help="Write the outcome to this JUnit file.")]
FullCheck = Annotated[bool, typer.Option("--full-check", help="Hash the source's weights in full, not samples.")]
Evaluations = Annotated[
    list[Path] | None,
    typer.Option("--eval", help="Show the figures that `a3 eval --json` wrote to this file; repeatable."),
]
DEFAULT_WORK = Path("a3-work")


@app.command()
def calibrate(
    model: Annotated[str, typer.Argument(help="Local folder or hub id of a safetensors checkpoint.")],
    work: WorkOption = DEFAULT_WORK,
    dataset: Dataset = "wikitext2",
    text_field: TextField = None,
    split: Split = None,
    chat: Chat = False,
    samples: Annotated[int, typer.Option(help="Number of blocks.")] = 128,
    seq_len: SeqLen = 2048,
    seed: Annotated[int, typer.Option(help="Seed of the blocks' places in the text.")] = 0,
    revision: Revision = None,
    device: Device = "auto",
    devices: Annotated[
        str | None, typer.Option(help="Several in a row, like cuda:0,cuda:1: consecutive layers.")
    ] = None,
    dtype: Dtype = "auto",
    batch_size: Annotated[str, typer.Option(help="Blocks a forward, or auto: as many as fit.")] = "auto",
    hidden_states: Annotated[
        str, typer.Option(help="Between layers on disk; or, faster, in memory or on the device.")
    ] = "disk",
    num_processes: NumProcesses = 1,
    mlp_stats: Annotated[str, typer.Option(help="full Gram matrix, or its diagonal (enough for --method paper).")] = (
        "full"
    ),
    trust_remote_code: RemoteCode = False,
    follow_symlinks: FollowSymlinks = False,
    max_minutes: MaxMinutes = None,
    full_check: FullCheck = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Run text through the model, layer by layer, and keep each layer's statistics.

    Stopped at any moment, the same command goes on at the layer where it was.
    """
    display = open_display(quiet=quiet)
    from a3cli.settings import CalibrateSettings, make_settings

    settings = make_settings(
        CalibrateSettings,
        model=model,
        revision=revision,
        text=text_settings(dataset, text_field, split, chat, samples, seq_len, seed),
        device=device,
        devices=devices,
        dtype=dtype,
        batch_size=batch_size,
        hidden_states=hidden_states,
        mlp_stats=mlp_stats,
        trust_remote_code=trust_remote_code,
        follow_symlinks=follow_symlinks,
        full_check=full_check,
        num_processes=num_processes,
    )
    if num_processes > 1 and not launched():
        launch(num_processes, sys.argv[1:])
        return
    from a3cli.stages.calibrate import calibrate as run
    from a3cli.work.interrupt import stopping

    with stopping(max_minutes) as stop, display.sweep_progress(quiet=quiet or not is_main()) as progress:
        manifest = run(settings, open_work(work), overwrite=overwrite, progress=progress, stop=stop)
    if is_main():
        display.print_json(manifest) if as_json else display.print_calibration(manifest)


@app.command()
def solve(
    work: WorkOption = DEFAULT_WORK,
    budget: Annotated[float | None, typer.Option(help="Fraction of the decoder's linear weights to remove.")] = None,
    attention_budget: Annotated[float | None, typer.Option(help="Fraction of q, k, v, o to remove.")] = None,
    mlp_budget: Annotated[float | None, typer.Option(help="Fraction of the MLP's linear weights to remove.")] = None,
    method: Annotated[str, typer.Option(help="best: slots, refinement, refits; paper: the published method.")] = "best",
    shape: Annotated[
        str, typer.Option(help="stock: one head size and MLP width; per-layer: each layer its own, needs remote code.")
    ] = "stock",
    context: Annotated[int | None, typer.Option(help="Longest text to serve (default: the model's limit).")] = None,
    components: Annotated[str, typer.Option(help="What may be cut, of qk,ov,mlp.")] = "qk,ov,mlp",
    head_multiple: HeadMultiple = 16,
    mlp_multiple: MlpMultiple = 64,
    min_head: Annotated[int, typer.Option(help="No head size below this.")] = 1,
    min_mlp: Annotated[int, typer.Option(help="No MLP width below this.")] = 1,
    rope_form: Annotated[
        str, typer.Option(help="RoPE of smaller heads: auto (theta if it costs little), theta, linear or longrope.")
    ] = "auto",
    eigenvalue_floor: Annotated[
        float, typer.Option(help="Raise smaller eigenvalues to this, relative to the largest.")
    ] = 1e-10,
    ridge: Annotated[float, typer.Option(help="Damping of the refits, relative to the Gram's mean diagonal.")] = 1e-6,
    sensitivity: Sensitivity = "residual",
    probe_blocks: Annotated[int, typer.Option(help="Calibration blocks that probes are measured on.")] = 8,
    probe_points: Annotated[int, typer.Option(help="Sizes probed of each component of each layer.")] = 4,
    sequential: Annotated[
        bool, typer.Option("--sequential", help="Sweep once more: refit each layer on what the cuts before it left.")
    ] = False,
    refit_rounds: Annotated[
        int, typer.Option(help="Gauss-Newton rounds for gate and up in --sequential; 0 refits output projections only.")
    ] = 2,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: BatchSize = 1,
    num_processes: Annotated[
        int | None,
        typer.Option(help="Layers at a time (default: as many as cores); those of over 4096 MLP channels go singly."),
    ] = None,
    max_minutes: MaxMinutes = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Choose head and MLP sizes for a budget and compute the projections, from statistics and the source's weights."""
    display = open_display(quiet=quiet)
    from a3cli.settings import SolveSettings, make_settings

    settings = make_settings(
        SolveSettings,
        budget=budget,
        attention_budget=attention_budget,
        mlp_budget=mlp_budget,
        method=method,
        shape=shape,
        context=context,
        components=tuple(part.strip() for part in components.split(",") if part.strip()),
        head_multiple=head_multiple,
        mlp_multiple=mlp_multiple,
        min_head=min_head,
        min_mlp=min_mlp,
        rope_form=rope_form,
        eigenvalue_floor=eigenvalue_floor,
        ridge=ridge,
        sensitivity=sensitivity,
        probe_blocks=probe_blocks,
        probe_points=probe_points,
        sequential=sequential,
        refit_rounds=refit_rounds,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        num_processes=num_processes,
    )
    from a3cli.report.long_range import solution_warnings
    from a3cli.stages.solve import solve as run
    from a3cli.work.interrupt import stopping

    with stopping(max_minutes) as stop, display.sweep_progress(quiet=quiet) as progress:
        manifest = run(settings, open_work(work), overwrite=overwrite, progress=progress, stop=stop)
    if as_json:
        display.print_json({**manifest, "warnings": solution_warnings(manifest)})
    else:
        display.print_solution(manifest)


@app.command()
def pareto(
    work: WorkOption = DEFAULT_WORK,
    budgets: Annotated[str, typer.Option(help="first:last:step, or a list like 0.1,0.25,0.4.")] = "0.1:0.5:0.05",
    plot: Annotated[Path | None, typer.Option(help="Write a plot to this .png or .svg file.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Measure each point on this text (as for eval).")] = None,
    text_field: TextField = None,
    split: Split = None,
    samples: Annotated[int | None, typer.Option(help="At most so many blocks (default: all).")] = None,
    seq_len: SeqLen = 2048,
    head_multiple: HeadMultiple = 16,
    mlp_multiple: MlpMultiple = 64,
    sensitivity: Sensitivity = "residual",
    sequential: Annotated[bool, typer.Option("--sequential", help="Measure best so corrected, not paper.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: BatchSize = 1,
    max_minutes: MaxMinutes = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Loss against size at many budgets, for every method, from one calibration."""
    display = open_display(quiet=quiet)
    from a3cli.settings import ParetoSettings, make_settings

    settings = make_settings(
        ParetoSettings,
        budgets=budgets,
        head_multiple=head_multiple,
        mlp_multiple=mlp_multiple,
        sensitivity=sensitivity,
        sequential=sequential,
        text=dataset and text_settings(dataset, text_field, split, False, samples, seq_len, 0),
        device=device,
        dtype=dtype,
        batch_size=batch_size,
    )
    from a3cli.stages.pareto import check_plot, draw
    from a3cli.stages.pareto import pareto as run
    from a3cli.work.interrupt import stopping

    check_plot(plot)
    with stopping(max_minutes) as stop, display.sweep_progress(quiet=quiet) as progress:
        result = run(settings, open_work(work), progress=progress, stop=stop)
    if plot:
        draw(result, plot)
    display.print_json(result) if as_json else display.print_pareto(result)


@app.command()
def export(
    out: Annotated[Path, typer.Argument(help="Folder to write: empty or not there yet.")],
    work: WorkOption = DEFAULT_WORK,
    dtype: Annotated[str, typer.Option(help="source, float32, bfloat16 or float16.")] = "source",
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file, like 5GB.")] = "5GB",
    num_processes: Annotated[int, typer.Option(help="Weight files written at a time.")] = 1,
    check_reproducible: Annotated[
        bool, typer.Option("--check-reproducible", help="Write twice and compare hashes; exit 1 if they differ.")
    ] = False,
    full_check: FullCheck = False,
    evaluation: Evaluations = None,
    max_minutes: MaxMinutes = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write the smaller model as a standard checkpoint that stock loaders read."""
    display = open_display(quiet=quiet)
    from a3cli.settings import ExportSettings, make_settings

    settings = make_settings(
        ExportSettings,
        dtype=dtype,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        num_processes=num_processes,
        full_check=full_check,
        check_reproducible=check_reproducible,
        evaluations=evaluation or (),
    )
    from a3cli.stages.export import export as run
    from a3cli.work.interrupt import stopping

    with stopping(max_minutes) as stop:
        manifest = run(out, settings, open_work(work), stop=stop)
    display.print_json(manifest) if as_json else display.print_export(manifest, str(out))


@app.command(name="eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="Local folder or hub id.")],
    dataset: Datasets = None,
    against: Annotated[str | None, typer.Option(help="The source, for KL and top-1 agreement.")] = None,
    fail_if: Annotated[
        list[str] | None,
        typer.Option(help="Exit code 1 if so: perplexity, ppl_increase, kl or top1_agreement, like 'kl > 0.1'."),
    ] = None,
    text_field: Annotated[
        list[str] | None, typer.Option(help="Field of a row that holds the text: for all sets, or given for each.")
    ] = None,
    split: Annotated[list[str] | None, typer.Option(help="Split of a hub set: for all, or given for each.")] = None,
    chat: Chat = False,
    samples: Annotated[int | None, typer.Option(help="At most so many blocks of each set (default: all).")] = None,
    seq_len: SeqLen = 2048,
    bootstrap: Annotated[int, typer.Option(help="Resamples for the 95 % intervals; 0 for none.")] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of the resamples.")] = 0,
    tasks: Annotated[str, typer.Option(help="Tasks of the lm-evaluation-harness, like arc_challenge,boolq.")] = "",
    tasks_path: Annotated[
        Path | None, typer.Option(help="Folder with task files of your own; their code runs.")
    ] = None,
    task_limit: Annotated[int | None, typer.Option(help="At most so many documents of each task.")] = None,
    revision: Revision = None,
    against_revision: Annotated[str | None, typer.Option(help="Revision of --against.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: BatchSize = 1,
    trust_remote_code: RemoteCode = False,
    follow_symlinks: FollowSymlinks = False,
    junit: Junit = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure perplexity, and with --against the distance from the source; --fail-if makes it a gate."""
    display = open_display(quiet=quiet)
    from a3cli.settings import EvalSettings, make_settings

    task_names = tuple(part.strip() for part in tasks.split(",") if part.strip())
    names = dataset or ([] if task_names else ["wikitext2"])
    settings = make_settings(
        EvalSettings,
        model=model,
        revision=revision,
        against=against,
        against_revision=against_revision,
        texts=[
            text_settings(name, field, part, chat, samples, seq_len, 0)
            for name, field, part in zip(
                names, for_each("--text-field", text_field, names), for_each("--split", split, names), strict=True
            )
        ],
        fail_if=fail_if or [],
        bootstrap=bootstrap,
        seed=seed,
        tasks=task_names,
        tasks_path=tasks_path,
        task_limit=task_limit,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        trust_remote_code=trust_remote_code,
        follow_symlinks=follow_symlinks,
    )
    from a3cli.report.junit import check_junit, write_junit
    from a3cli.settings.gates import raise_for_failures
    from a3cli.stages.evaluate import cases
    from a3cli.stages.evaluate import evaluate as run

    check_junit(junit)
    result = run(settings)
    if junit:
        write_junit(junit, "a3 eval", cases(result))
    display.print_json(result) if as_json else display.print_evaluation(result)
    raise_for_failures(result["datasets"])


@app.command()
def verify(
    out: Annotated[Path, typer.Argument(help="Folder that a3 export wrote.")],
    work: WorkOption = DEFAULT_WORK,
    require_reference: Annotated[
        bool, typer.Option("--require-reference", help="Fail if the work folder that it was made from is not there.")
    ] = False,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="To compute in: auto (float32), float32, bfloat16, float16.")] = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run a per-layer export's code, if it is what a3 ships.")
    ] = False,
    junit: Junit = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Check an export as its users will load it: whole, unaltered, finite, and what the solution says."""
    display = open_display(quiet=quiet)
    from a3cli.settings import VerifySettings, make_settings

    settings = make_settings(
        VerifySettings,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        require_reference=require_reference,
    )
    from a3cli.report.junit import check_junit, write_junit
    from a3cli.stages.verify import cases, raise_for_failures
    from a3cli.stages.verify import verify as run

    check_junit(junit)
    result = run(out, settings, open_work(work))
    if junit:
        write_junit(junit, "a3 verify", cases(result))
    display.print_json(result) if as_json else display.print_verification(result)
    raise_for_failures(result)


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="Local folder or hub id; no weights are downloaded.")],
    budget: Annotated[float, typer.Option(help="Fraction of the decoder's linear weights to remove.")] = 0.25,
    shape: Annotated[str, typer.Option(help="stock or per-layer, as for solve.")] = "stock",
    samples: Annotated[int, typer.Option(help="Number of blocks.")] = 128,
    seq_len: SeqLen = 2048,
    batch_size: Annotated[str, typer.Option(help="Blocks a forward, or auto, as for calibrate.")] = "auto",
    mlp_stats: Annotated[str, typer.Option(help="full or diagonal, as for calibrate.")] = "full",
    head_multiple: HeadMultiple = 16,
    mlp_multiple: MlpMultiple = 64,
    revision: Revision = None,
    follow_symlinks: FollowSymlinks = False,
    dtype: Dtype = "auto",
    devices: Annotated[str, typer.Option(help="cpu, cuda, or a list like cuda:0,cuda:1.")] = "cpu",
    num_processes: Annotated[int, typer.Option(help="Processes that share the blocks.")] = 1,
    start_seconds: Annotated[
        float | None, typer.Option(help="Seconds until a stage begins to work (default: 4.2).")
    ] = None,
    disk_gbps: Annotated[float | None, typer.Option(help="GB/s of the disk (default: 2).")] = None,
    tflops: Annotated[
        float | None, typer.Option(help="TFLOP/s that products reach in --dtype (default: CPU 0.3, GPU 200).")
    ] = None,
    solve_tflops: Annotated[
        float | None, typer.Option(help="The same in float64, for solve (default: CPU 0.15, GPU 10).")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure here what is not given: seconds, and a file in this folder.")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Say what a run will take and give, before it: sizes, disk, memory, time, and what loads the result."""
    display = open_display(quiet=quiet)
    from a3cli.settings import PlanSettings, make_settings

    settings = make_settings(
        PlanSettings,
        model=model,
        revision=revision,
        follow_symlinks=follow_symlinks,
        budget=budget,
        shape=shape,
        samples=samples,
        seq_len=seq_len,
        batch_size=batch_size,
        mlp_stats=mlp_stats,
        head_multiple=head_multiple,
        mlp_multiple=mlp_multiple,
        dtype=dtype,
        devices=devices,
        num_processes=num_processes,
        start_seconds=start_seconds,
        disk_gbps=disk_gbps,
        tflops=tflops,
        solve_tflops=solve_tflops,
        measure=measure,
    )
    from a3cli.stages.plan import plan as run

    result = run(settings)
    display.print_json(result) if as_json else display.print_plan(result)


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="YAML file with the settings of all stages (see configs/).")],
    work: Annotated[Path | None, typer.Option(help="Work folder, in place of the recipe's.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the export, in place of the recipe's.")] = None,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Check the export after it was written.")] = True,
    max_minutes: MaxMinutes = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Do all stages anew.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Run all stages of a recipe: calibrate, solve, export, verify, eval.

    Stopped at any moment, the same command goes on where it was; a finished run is left as it is. Exit code 1 if one
    of the recipe's gates (fail_if) failed, also in a run that was finished before, or a check of verify.
    """
    display = open_display(quiet=quiet)
    from a3cli.stages.recipe import read_recipe

    settings = read_recipe(recipe, work=work, out=out)
    from functools import partial

    from a3cli.settings.gates import raise_for_failures
    from a3cli.stages.run import run_recipe
    from a3cli.stages.verify import raise_for_failures as raise_for_failed_checks
    from a3cli.work.interrupt import stopping

    if not verify:
        settings = settings.model_copy(update={"verify": False})
    progress = partial(display.sweep_progress, quiet=quiet)
    with stopping(max_minutes) as stop:
        results = run_recipe(settings, overwrite=overwrite, progress=progress, stop=stop, quiet=quiet)
    display.print_json(results) if as_json else display.print_run(results, str(settings.out))
    if "verify" in results:
        raise_for_failed_checks(results["verify"])
    if "eval" in results:
        raise_for_failures(results["eval"]["datasets"])


stats = OnceTyper(help="Statistics of finished calibrations.", no_args_is_help=True)
app.add_typer(stats, name="stats")


@stats.command()
def merge(
    works: Annotated[list[Path], typer.Argument(help="Work folders with finished calibrations of one model.")],
    into: Annotated[Path, typer.Option(help="Work folder to write: the calibration on all of their text.")],
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Add up calibrations of one model on different text, made by different jobs."""
    display = open_display(quiet=quiet)
    from a3cli.stages.merge import merge as run

    manifest = run([open_work(work) for work in works], open_work(into), overwrite=overwrite)
    display.print_json(manifest) if as_json else display.print_calibration(manifest)


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(envvar="A3_WORK", help="Work folder or export.")] = DEFAULT_WORK,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Show each layer's sizes, losses and statistics, the calibration text, and what may hurt."""
    display = open_display(quiet=quiet)
    from a3cli.report.inspection import describe

    found = describe(folder)
    display.print_json(found) if as_json else display.print_inspection(found)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(envvar="A3_WORK", help="Work folder or export.")] = DEFAULT_WORK,
    html: Annotated[Path | None, typer.Option("--html", help="Write the page to this file.")] = None,
    evaluation: Evaluations = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write one self-contained HTML page: before and after, curves, sizes, RoPE, provenance, warnings."""
    display = open_display(quiet=quiet)
    from a3cli.report.inspection import describe
    from a3cli.report.page import check_place, read_evaluations, write_report

    place = check_place(html)
    result = write_report(describe(folder), read_evaluations(evaluation or []), place)
    display.print_json(result) if as_json else display.print_report(result)


def text_settings(
    dataset: str, text_field: str | None, split: str | None, chat: bool, samples: int | None, seq_len: int, seed: int
) -> dict[str, Any]:
    """What TextSettings is made of; it is checked with the settings that it is a part of."""
    return {
        "dataset": dataset,
        "text_field": text_field,
        "split": split,
        "chat": chat,
        "samples": samples,
        "seq_len": seq_len,
        "seed": seed,
    }


def for_each(option: str, values: list[str] | None, datasets: list[str]) -> list[str] | list[None]:
    """A value for every data set. Raises A3Error if there are neither as many nor one for all."""
    if not values:
        return [None] * len(datasets)
    if len(values) == 1:
        return values * len(datasets)
    if len(values) != len(datasets):
        raise A3Error(
            f"{option} was given {len(values)} times for {len(datasets)} data sets; give it once, or once for each"
        )
    return values


def open_work(folder: Path) -> "Work":
    from a3cli.work.folder import Work

    return Work(folder)


def version(show: bool) -> None:
    if show:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    _version: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """The group carries --version, and refuses what several processes would do at once, against each other."""
    if launched() and context.invoked_subcommand != "calibrate":
        raise A3Error(
            f"a3 {context.invoked_subcommand} works in one process, and a launcher started it in several "
            "(RANK and WORLD_SIZE are set); only a3 calibrate shares its work among them: start this one on its own"
        )


def open_display(*, quiet: bool) -> ModuleType:
    """Our own output set up, that of the libraries underneath switched off: it would end up between ours."""
    silence_libraries()
    from a3cli.cli import display

    display.set_up_logging(quiet=quiet or not is_main())
    return display


def silence_libraries() -> None:
    """What they have to say of bad input is in our errors. They read this when they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars of the evaluation harness


def fail(message: str, code: int) -> NoReturn:
    if not hand_over(message):
        from a3cli.cli import display

        display.print_error(message)
    sys.exit(code)


def report_bug() -> NoReturn:
    """End the process after an error of our own: its traceback, and a last line that asks to report it."""
    traceback.print_exc()
    versions = ", ".join(f"{name} {version}" for name, version in installed_versions().items())
    sys.stderr.write(
        f"error: this is a bug in a3 (exit code {INTERNAL_ERROR}); please report it with the traceback above and these "
        f"versions: {versions}\n"
    )
    sys.exit(INTERNAL_ERROR)


def installed_versions() -> dict[str, str]:
    """Return the versions that a bug report needs; read here, since a module of ours may be what is broken."""
    versions = {"a3": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def main() -> None:
    """Run the `a3` command; a character that the output's encoding lacks is printed as an escape."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except Exception:
        report_bug()
