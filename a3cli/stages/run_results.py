"""What `a3 run` returns: the results of every stage, for one solution or for each of several budgets."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from a3cli.errors import CheckFailed
from a3cli.report.manifest import Manifest
from a3cli.report.page import Report
from a3cli.report.serving import serving_of
from a3cli.settings.gates import raise_for_failures as raise_for_failed_gates
from a3cli.stages.publish import Exported, Pushed
from a3cli.stages.verify import raise_for_failures as raise_for_failed_checks
from a3cli.work.files import Json
from a3cli.work.manifests import CalibrationManifest, SolutionManifest


@dataclass
class SolutionResults:
    """The results of a solution's stages; None for a stage that did not run."""

    name: str | None
    out: Path
    solution: SolutionManifest
    export: Manifest
    warnings: list[str]
    memory: int | None = None  # of the machine that serves the result, to show what fits
    verification: Json | None = None
    evaluation: Json | None = None
    report: Report | None = None
    pushed: Pushed | None = None

    @property
    def exported(self) -> Exported:
        return Exported(self.export, self.pushed)

    @property
    def passed(self) -> bool:
        """Return whether no check and no gate failed."""
        return not self.failures()

    def plain(self) -> Json:
        """Return the results as JSON has them, by the stage's name."""
        page = self.report.plain() if self.report else None
        stages = {"verify": self.verification, "eval": self.evaluation, "report": page}
        served = serving_of(self.solution, self.memory)
        return {
            "solve": {**self.solution.plain(), **(served.plain() if served else {})},
            "export": self.exported.plain(),
            **{stage: result for stage, result in stages.items() if result is not None},
        }

    def failures(self) -> list[CheckFailed]:
        """Return the checks and the gates that failed, at most one error of each kind."""
        checks = []
        if self.verification is not None:
            checks.append(partial(raise_for_failed_checks, self.verification))
        if self.evaluation is not None:
            checks.append(partial(raise_for_failed_gates, self.evaluation["datasets"]))
        found = []
        for check in checks:
            try:
                check()
            except CheckFailed as failed:
                found.append(failed)
        return found


@dataclass
class RunResults:
    """The results of a recipe: of its only solution, or of one for each of its `several` budgets."""

    calibration: CalibrationManifest
    solutions: list[SolutionResults]
    several: bool
    finished_before: bool  # nothing was left to do

    def plain(self) -> Json:
        """Return the results as JSON has them; those of several solutions in a list."""
        if not self.several:
            return {"calibrate": self.calibration.plain(), **self.solutions[0].plain()}
        listed = [{"name": each.name, "out": str(each.out), **each.plain()} for each in self.solutions]
        return {"calibrate": self.calibration.plain(), "solutions": listed}

    def raise_for_failures(self) -> None:
        """Raise CheckFailed if a check or a gate failed; of several solutions, it names all that failed."""
        failed = [(each.name, failure) for each in self.solutions for failure in each.failures()]
        if failed and not self.several:
            raise failed[0][1]
        if failed:
            count = len({name for name, _ in failed})
            said = "; ".join(f"{name}: {failure}" for name, failure in failed)
            raise CheckFailed(f"{count} of {len(self.solutions)} solutions failed: {said}")
