"""Perplexity as the papers measure it, and the distance of a model from its source.

Text is cut into consecutive blocks of `seq_len` (the last one shorter); in each block every token but the
first is predicted once. Perplexity is the exponential of the mean over all predicted tokens. Results are kept as sums
per block, from which the bootstrap resamples.
"""

import math
import time
from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import torch

from a3cli.errors import A3Error
from a3cli.models.checkpoint import Checkpoint, resolve_model
from a3cli.models.families import usual_entries
from a3cli.models.model import check_size
from a3cli.report.junit import Case
from a3cli.settings import EvalSettings, TextSettings
from a3cli.settings.gates import describe
from a3cli.settings.generation import GenerateSettings
from a3cli.stages.answers import Answers, LoadedModel, batches, open_models, short_name
from a3cli.stages.continuations import Choice, accuracies, encode, measure_choices
from a3cli.stages.tasks import open_tasks, run_tasks
from a3cli.text.blocks import CONTEXT, check_fit, evaluation_blocks
from a3cli.text.counted import counting
from a3cli.text.documents import TextRead
from a3cli.text.passages import read_passages
from a3cli.text.sources import check_texts
from a3cli.text.tokenizer import load_tokenizer
from a3cli.work.files import Json
from a3cli.work.machine import choose_machine
from a3cli.work.progress import Progress, reporting, silent

CONFIDENCE = 0.95
FIGURES = (
    *("perplexity", "source_perplexity", "perplexity_increase", "kl", "top1_agreement"),
    *("continuation_accuracy", "last_word_accuracy"),
)


class Text(NamedTuple):
    """What is measured on: the blocks of a data set, the record of what was read, and continuations to choose."""

    settings: TextSettings
    blocks: list[torch.Tensor]
    read: TextRead
    choices: list[Choice]


@torch.inference_mode()
def evaluate(settings: EvalSettings, *, progress: Progress = silent) -> Json:
    """Return a model's perplexity; with `against`, also the source's, KL(source ‖ model) in nats and top-1 agreement.

    `datasets` has figures, intervals and gates of each data set; those of a single one are at the top level as well.
    Raises A3Error for a model that does not load completely, too little text, or a loss that is not finite.
    """
    check_settings(settings)
    tasks = open_tasks(settings)
    checkpoints = open_checkpoints(settings)
    settings = for_context(settings, checkpoints)
    for checkpoint in checkpoints:
        check_size(checkpoint)  # before transformers reads it
    machine = choose_machine(settings.device, settings.dtype, checkpoints[0].dtype)
    tokenizer = load_tokenizer(checkpoints[0].folder, trust_remote_code=settings.trust_remote_code)
    texts = [read_text(text, tokenizer, checkpoints[0], settings, progress) for text in settings.texts]
    models = open_models(checkpoints, machine, settings, progress)
    check_vocabularies(models)

    datasets = [measure(models, text, settings, progress) for text in texts]
    result: Json = {
        "model": models[0].name,
        "device": str(machine.device),
        "dtype": str(machine.dtype).removeprefix("torch."),
    }
    if settings.against:
        result["against"] = models[1].name
    if tasks is not None:
        loaded = [each for each in models if isinstance(each, LoadedModel)]
        found = [run_tasks(tasks, each.model, tokenizer, settings, each.name) for each in loaded]
        result["tasks"] = dict(zip(("model", "against"), found, strict=False))
    return result | (datasets[0] if len(datasets) == 1 else {}) | {"datasets": datasets}


def check_settings(settings: EvalSettings) -> None:
    """Check that there is something to measure, that gates have figures and that texts can be read. Raises A3Error."""
    if not settings.texts and not settings.tasks:
        raise A3Error("nothing to measure: give --dataset or --tasks")
    if settings.fail_if and not settings.texts:
        raise A3Error("--fail-if needs a figure to compare; give a --dataset")
    if settings.continuations and not settings.texts:
        raise A3Error("--continuations needs a text to cut into passages; give a --dataset")
    for needed, given, option in (
        ("needs_source", settings.against, "--against SOURCE"),
        ("needs_continuations", settings.continuations, "--continuations NUMBER"),
    ):
        if not given and (unknown := [gate.text for gate in settings.fail_if if getattr(gate, needed)]):
            raise A3Error(f"--fail-if {', '.join(map(repr, unknown))}: this figure needs {option}")
    check_texts(settings.texts)


def open_checkpoints(settings: EvalSettings | GenerateSettings) -> list[Checkpoint]:
    """Return the model's checkpoint and, with `against`, its source's. Raises A3Error for code that may not run."""
    models = [(settings.model, settings.revision)]
    if settings.against:
        models.append((settings.against, settings.against_revision))
    checkpoints = [resolve_model(*each, follow_symlinks=settings.follow_symlinks) for each in models]
    for each in checkpoints:
        if "per_layer_config" in each.config and not settings.trust_remote_code:
            raise A3Error(
                f"{each.name}: its layers differ in size, and only the code in its folder builds them; "
                "use --trust-remote-code to run that code"
            )
    return checkpoints


def for_models(settings: EvalSettings) -> EvalSettings:
    """Return settings whose texts have their tokens per block; opens the models only if that is left to them."""
    known = all(text.seq_len is not None for text in settings.texts)
    return settings if known else for_context(settings, open_checkpoints(settings))


def for_context(settings: EvalSettings, checkpoints: Sequence[Checkpoint]) -> EvalSettings:
    """Return settings whose texts have their tokens per block: the default is the shorter context's."""
    contexts = [usual_entries(each.config).get(CONTEXT) for each in checkpoints]
    shortest = min((context for context in contexts if isinstance(context, int)), default=None)
    return settings.model_copy(update={"texts": tuple(text.for_context(shortest) for text in settings.texts)})


def read_text(
    text: TextSettings, tokenizer: Any, checkpoint: Checkpoint, settings: EvalSettings, progress: Progress
) -> Text:
    """Return what to measure on. Raises A3Error if the model cannot read the text."""
    blocks, read = read_blocks(text, tokenizer, checkpoint, progress)
    choices = []
    if settings.continuations:
        choices = encode(tokenizer, read_passages(tokenizer, text, settings.continuations), checkpoint)
    return Text(text, blocks, read, choices)


def read_blocks(
    text: TextSettings, tokenizer: Any, checkpoint: Checkpoint, progress: Progress
) -> tuple[list[torch.Tensor], TextRead]:
    """Return a data set's blocks and the record of what was read."""
    read = TextRead()
    limit = None if text.samples is None else text.samples * text.block_tokens
    with counting(progress, f"reading {short_name(text.dataset)}", tokenizer, limit) as counted:
        blocks = evaluation_blocks(counted, text, read)
    check_fit(blocks, usual_entries(checkpoint.config), checkpoint.name)
    return blocks, read


def measure(models: Sequence[Answers], text: Text, settings: EvalSettings, progress: Progress) -> Json:
    """Return the figures of one data set, their intervals and the results of the gates."""
    name = short_name(text.settings.dataset)
    source = models[1] if len(models) > 1 else None
    with reporting(progress, f"evaluating {short_name(models[0].name)} on {name}", len(text.blocks), "blocks") as done:
        sums, seconds = sum_blocks(models[0], source, text.blocks, settings.batch_size, done)
    tokens = sum(len(block) for block in text.blocks)
    result: Json = {
        "dataset": text.settings.dataset,
        "text_files": text.read.files,
        "text_read": text.read.describe(),
        "seq_len": text.settings.block_tokens,
        "blocks": len(text.blocks),
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        **describe_sums(sums),
    }
    if settings.bootstrap:
        result["confidence"] = bootstrap(sums, resamples=settings.bootstrap, seed=settings.seed)
    if text.choices:
        add_continuations(result, measure_choices(models, text.choices, name, settings.batch_size, progress), settings)
    if settings.fail_if:
        result["gates"] = [gate.judge(result) for gate in settings.fail_if]
    return result


def add_continuations(result: Json, sums: torch.Tensor, settings: EvalSettings) -> None:
    """Add the accuracies of a data set's continuations and their intervals."""
    result["passages"], result["words"] = (int(count) for count in sums.sum(0)[:2])
    result.update({key: value.item() for key, value in accuracies(sums.sum(0)).items()})
    if settings.bootstrap:
        found = bootstrap(sums, resamples=settings.bootstrap, seed=settings.seed, figures=accuracies)
        result["confidence"].update(found)


@torch.inference_mode()
def sum_blocks(
    model: Answers,
    source: Answers | None,
    blocks: Sequence[torch.Tensor],
    batch_size: int,
    finished: Callable[[], object] = lambda: None,
) -> tuple[torch.Tensor, float]:
    """Return sums per block, `[N, 2]` or with a source `[N, 5]` float64, and the seconds of the model's forwards.

    A row has a block's number of predicted tokens and the sums over them of: the negative log-likelihood; the
    source's; KL(source ‖ model); the tokens on which both agree. `finished` is called after each block.
    Raises A3Error if a likelihood is not finite.
    """
    rows, seconds = [], 0.0
    answers = model.logits(blocks, batch_size)
    others = repeat(None) if source is None else source.logits(blocks, batch_size)
    for batch in batches(blocks, batch_size):
        started = time.perf_counter()
        logits = next(answers)
        if logits.device.type == "cuda":
            torch.cuda.synchronize()
        seconds += time.perf_counter() - started
        source_logits = next(others)
        for row, tokens in enumerate(batch):
            if source is None or source_logits is None:
                rows.append(sum_tokens(tokens, logits[row, :-1], model.name))
            else:
                rows.append(sum_tokens(tokens, logits[row, :-1], model.name, source_logits[row, :-1], source.name))
            finished()
    return torch.tensor(rows, dtype=torch.float64), seconds


def sum_tokens(
    tokens: torch.Tensor,
    logits: torch.Tensor,
    name: str,
    source_logits: torch.Tensor | None = None,
    source_name: str = "",
) -> list[float]:
    """Return the row of `sum_blocks` for tokens `[T]` and the logits `[T − 1, V]` that predict all but the first."""
    log_p = logits.float().log_softmax(-1)
    sums = [len(tokens) - 1, negative_log_likelihood(log_p, tokens, name)]
    if source_logits is None:
        return sums
    log_q = source_logits.float().log_softmax(-1)
    return [*sums, negative_log_likelihood(log_q, tokens, source_name), *divergence(log_p, log_q)]


def divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> tuple[float, int]:
    """Return KL(q ‖ p) summed over the tokens `[T, V]`, and the number of tokens with the same top-1 token."""
    kl = (log_q.exp() * (log_q - log_p)).sum(dtype=torch.float64).item()
    return kl, int((log_p.argmax(-1) == log_q.argmax(-1)).sum())


def describe_sums(sums: torch.Tensor) -> Json:
    """Return the figures of all blocks together."""
    figures = {key: value.item() for key, value in figures_of(sums.sum(0)).items()}
    return {"predicted_tokens": int(sums[:, 0].sum()), **figures}


def figures_of(total: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the figures for sums `[..., 2 or 5]` over blocks (see `sum_blocks`)."""
    predicted, *sums = total.unbind(-1)
    perplexity = (sums[0] / predicted).exp()
    if len(sums) == 1:
        return {"perplexity": perplexity}
    source = (sums[1] / predicted).exp()
    return {
        "perplexity": perplexity,
        "source_perplexity": source,
        "perplexity_increase": perplexity - source,
        "perplexity_increase_percent": 100 * (perplexity / source - 1),
        "kl": sums[2] / predicted,
        "top1_agreement": sums[3] / predicted,
    }


def bootstrap(
    sums: torch.Tensor,
    *,
    resamples: int,
    seed: int,
    figures: Callable[[torch.Tensor], dict[str, torch.Tensor]] = figures_of,
) -> Json:
    """Return 95 % intervals of all figures by resampling whole blocks with replacement; None for a single block.

    Tokens of one block are not independent, blocks nearly are, and both models see the same ones. So it is with
    passages.
    """
    described: Json = {"level": CONFIDENCE, "resamples": resamples, "seed": seed}
    generator = torch.Generator().manual_seed(seed)
    draws = (torch.randint(len(sums), (len(sums),), generator=generator) for _ in range(resamples))
    found = figures(torch.stack([sums[draw].sum(0) for draw in draws]))
    tails = torch.tensor([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], dtype=torch.float64)
    for key, values in found.items():
        described[key] = values.quantile(tails).tolist() if len(sums) > 1 else None
    return described


def cases(result: Json) -> list[Case]:
    """Return an evaluation as test cases: one per gate and data set; a data set or task without gates passes."""
    found = []
    for each in result["datasets"]:
        figures = ", ".join(f"{key} {each[key]:.6g}" for key in FIGURES if key in each)
        gates = each.get("gates", [])
        found += [Case(each["dataset"], g["gate"], "failed" if g["failed"] else "passed", describe(g)) for g in gates]
        if not gates:
            found.append(Case(each["dataset"], "measured", "passed", figures))
    for task, figures in result.get("tasks", {}).get("model", {}).items():
        found.append(Case("tasks", task, "passed", ", ".join(f"{key} {value}" for key, value in figures.items())))
    return found


def negative_log_likelihood(log_p: torch.Tensor, tokens: torch.Tensor, name: str) -> float:
    """Return the sum over the predicted tokens of one block. Raises A3Error if it is not finite."""
    targets = tokens[1:].to(log_p.device)
    total = -log_p.gather(-1, targets[:, None]).sum(dtype=torch.float64).item()
    if not math.isfinite(total):
        raise A3Error(f"{name}: the loss is not finite; use --dtype float32; if that fails too, the model is damaged")
    return total


def check_vocabularies(models: Sequence[Answers]) -> None:
    sizes = [each.vocabulary for each in models]
    if len(set(sizes)) > 1:
        raise A3Error(
            f"{models[0].name} and {models[1].name} have vocabularies of {sizes[0]} and {sizes[1]} tokens; "
            "only models with the same tokenizer can be compared"
        )
