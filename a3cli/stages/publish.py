"""Upload a finished export to the Hugging Face Hub: the files of its manifest and nothing else, in one commit.

Token, name and the right to write are checked by `open_repository`, before any long work. An upload that fails leaves
the export as it is, and the next one sends only what is missing.
"""

import logging
import shlex
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from a3cli.errors import A3Error, first_line
from a3cli.report.commands import command
from a3cli.report.figures import human_bytes, percent
from a3cli.report.manifest import MANIFEST, Manifest
from a3cli.settings import DEFAULT_WORK, ExportSettings
from a3cli.stages.export import export
from a3cli.stages.solution import describe_missing
from a3cli.text.reach import unreachable
from a3cli.work.files import Json, hash_json
from a3cli.work.folder import Work
from a3cli.work.interrupt import Stop
from a3cli.work.progress import Progress, reporting, silent
from a3cli.work.sealed import read_if_request_matches, write_manifest

log = logging.getLogger(__name__)

# Files of an earlier upload that loaders would read beside the new ones.
LOADED = ("*.safetensors", "*.safetensors.index.json", "modeling_a3_*.py")
WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "*.pt", "*.pth")
REFUSALS = {  # by status: what failed, and what to do
    401: ("the Hub refused the token", "run `hf auth login` (a token in HF_TOKEN has precedence)"),
    403: ("the token has no right to write there", "run `hf auth login` with one that has, or use another repository"),
}


@dataclass(frozen=True)
class Repository:
    """A repository on the Hub to which this machine's token may write; `files` are those that it has."""

    name: str
    url: str
    private: bool
    files: list[str]


@dataclass(frozen=True)
class Pushed:
    """What was uploaded, and where it is."""

    repository: str
    url: str
    commit: str
    private: bool

    def plain(self) -> Json:
        return asdict(self)


@dataclass(frozen=True)
class Exported:
    """An export, and its place on the Hub if it was uploaded."""

    manifest: Manifest
    pushed: Pushed | None = None

    def plain(self) -> Json:
        """Return the manifest as JSON has it, with `hub` after an upload."""
        return self.manifest.plain() | ({"hub": self.pushed.plain()} if self.pushed else {})


def export_and_push(
    out: Path, settings: ExportSettings, work: Work, *, progress: Progress = silent, stop: Stop | None = None
) -> Exported:
    """Export as `export` does and, with `push_to_hub`, upload the result; a finished export is only uploaded.

    Raises A3Error as `export` does, before it for a repository that cannot be written to, and after it, naming the
    command that continues, if the upload fails.
    """
    of_name = work.named(settings.name)
    if not of_name.solution_manifest.is_file():
        raise A3Error(describe_missing(of_name))
    repository = open_repository(settings)
    manifest = export(out, settings, work, progress=progress, stop=stop)
    if repository is None:
        return Exported(manifest)
    return Exported(manifest, push(out, manifest, repository, settings, work, progress))


def open_repository(settings: ExportSettings) -> Repository | None:
    """Create the repository of `push_to_hub` unless it exists, and check that the export may be uploaded to it.

    Returns None without that setting. Raises A3Error if the Hub or the token does not allow it, and for a repository
    that is public without `public`, or that holds another model.
    """
    name = settings.push_to_hub
    if name is None:
        if settings.public:
            raise A3Error("--public is about the repository of --push-to-hub: give both, or neither")
        return None
    from huggingface_hub import HfApi, constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise A3Error(f"--push-to-hub {name}: HF_HUB_OFFLINE=1 forbids uploads; unset it, or leave out --push-to-hub")
    if get_token() is None:
        raise A3Error(f"--push-to-hub {name}: there is no token; run `hf auth login`, or set HF_TOKEN")
    if reason := unreachable():
        raise A3Error(f"--push-to-hub {name}: {reason}; rerun the same command later, or leave out --push-to-hub")
    try:
        api = HfApi()
        url = api.create_repo(name, private=not settings.public, exist_ok=True)
        info = api.model_info(url.repo_id)
        with suppress(TypeError):  # older clients cannot ask for the right to write
            api.auth_check(url.repo_id, write=True)
    except Exception as error:  # HTTP, the Hub's client
        raise A3Error(f"--push-to-hub {name}: {explain(error)}") from error
    files = [each.rfilename for each in info.siblings or []]
    repository = Repository(url.repo_id, str(url), bool(info.private), files)
    check_held(repository, settings)
    return repository


def check_held(repository: Repository, settings: ExportSettings) -> None:
    """Raise A3Error for a repository that would publish the export unasked, or whose model is not an a3 export."""
    name = repository.name
    if not repository.private and not settings.public:
        raise A3Error(f"--push-to-hub {name}: this repository is public; add --public to publish there, or use another")
    if repository.private and settings.public:
        log.warning("%s exists and stays private; its settings on the Hub make it public", name)
    held = next((file for file in repository.files if any(fnmatch(file, form) for form in WEIGHTS)), None)
    if held and MANIFEST not in repository.files:
        raise A3Error(
            f"--push-to-hub {name}: it holds a model that is not an a3 export ({held}); use another repository"
        )


def push(
    out: Path,
    manifest: Manifest,
    repository: Repository,
    settings: ExportSettings,
    work: Work,
    progress: Progress = silent,
) -> Pushed:
    """Upload the files of an export's manifest, and the manifest, in one commit; weights that are stale are removed.

    Raises A3Error, naming the command that continues, if that fails.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    names = [*manifest.files, MANIFEST]
    stale = [file for file in repository.files if file not in names and is_loaded(file)]
    size = human_bytes(sum((out / name).stat().st_size for name in names))
    try:
        with reporting(progress, f"uploading {size} to {repository.name}"), quiet_client():
            commit = HfApi().create_commit(
                repository.name,
                [
                    *(CommitOperationAdd(name, out / name) for name in names),
                    *(CommitOperationDelete(name) for name in stale),
                ],
                commit_message=f"a3 export: {percent(manifest.solution.budget_reached)} of linear weights removed",
            )
    except Exception as error:  # HTTP, the Hub's client, its threads
        raise A3Error(
            f"{out} is complete, but its upload to {repository.name} failed: {explain(error)}; "
            f"to continue: {push_command(out, settings, work)}"
        ) from error
    log.info("uploaded %s to %s", out, repository.url)
    return Pushed(repository.name, repository.url, str(commit.oid), repository.private)


def is_loaded(file: str) -> bool:
    """Return whether loaders would read a repository's file; they read none in a subfolder."""
    return "/" not in file and any(fnmatch(file, form) for form in LOADED)


def push_command(out: Path, settings: ExportSettings, work: Work) -> str:
    """Return the command that finds this export finished and only uploads it."""
    usual, given = ExportSettings().model_dump(), settings.model_dump(exclude={"evaluations"})
    once = ("overwrite", "check_reproducible")  # these would write the export again
    options: dict[str, Any] = {k: v for k, v in given.items() if v != usual[k] and k not in once}
    options |= {"work": None if work.folder == DEFAULT_WORK else work.folder}
    figures = "".join(f" --eval {shlex.quote(str(file))}" for file in settings.evaluations)
    return command("export", str(out), options) + figures


def kept_push(manifest: Manifest, settings: ExportSettings, work: Work) -> Pushed | None:
    """Return where a recipe has uploaded this export, or None if it has not."""
    found = read_if_request_matches(work.publication, describe_request(manifest, settings))
    return Pushed(**found["result"]) if found else None


def keep_push(pushed: Pushed, manifest: Manifest, settings: ExportSettings, work: Work) -> None:
    """Record an upload in the work folder, so that a rerun of the recipe does not repeat it."""
    with work.locked():
        write_manifest(work.publication, {"request": describe_request(manifest, settings), "result": pushed.plain()})


def describe_request(manifest: Manifest, settings: ExportSettings) -> Json:
    """Return everything that an upload depends on."""
    from huggingface_hub import constants

    return {
        "repository": settings.push_to_hub,
        "public": settings.public,
        "endpoint": constants.ENDPOINT,
        "export": hash_json(manifest.plain()),
    }


def explain(error: Exception) -> str:
    """Return why a request failed, in words, from the first error of its chain that has the Hub's answer."""
    chain = [error]
    while isinstance(cause := chain[-1].__cause__, Exception):
        chain.append(cause)
    answered = next((each for each in chain if getattr(each, "response", None) is not None), None)
    if answered is None:
        return first_line(chain[-1])
    status = answered.response.status_code  # type: ignore[attr-defined]
    said = first_line(answered) if (message := getattr(answered, "server_message", None)) is None else str(message)
    if status not in REFUSALS:
        return f"the Hub answered {status}: {said}"
    what, remedy = REFUSALS[status]
    return f"{what} ({' '.join(said.split())}); {remedy}"


@contextmanager
def quiet_client() -> Iterator[None]:
    """Turn off the client's log lines and warnings, which would be mixed into a3's."""
    from huggingface_hub.utils import logging as client

    verbosity = client.get_verbosity()
    client.set_verbosity(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        client.set_verbosity(verbosity)
