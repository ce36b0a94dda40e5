"""Query and key maps that are tried for one layer: whatever is found of them is kept in the work folder.

None of it depends on the budget. A result is found again by its layer's calibration and by all that is listed here.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property

from a3cli.methods import maps
from a3cli.methods.analysis import BestLayer
from a3cli.methods.attention import Effort
from a3cli.methods.base import AttentionError, Projection, Slots
from a3cli.methods.maps import MapSolver
from a3cli.solvers.moments import Tensors
from a3cli.solvers.slots import SlotMaps
from a3cli.work.files import Json


@dataclass(frozen=True)
class Trial:
    """One layer's maps for given RoPE slots."""

    solver: MapSolver
    layer: BestLayer
    slots: Slots

    @cached_property
    def closed(self) -> SlotMaps:
        """Return the closed form's maps. They are computed only for results that are not kept yet."""
        return self.solver.closed_form(self.layer, self.slots)

    def score_loss(self) -> float:
        """Return the loss of score errors with the closed form's maps."""
        return self._loss("score loss", lambda: self.solver.score_loss(self.layer, self.closed))

    def predicted_loss(self) -> float:
        """Return the loss of the closed form's maps, to which refinement is compared."""
        return self._loss("predicted loss", lambda: self.solver.predicted_loss(self.layer, self.slots, self.closed))

    def closed_error(self) -> float:
        """Return the error of attention with the closed form's maps."""
        return self._loss("closed error", lambda: self.solver.closed_error(self.layer, self.slots, self.closed))

    def quick_error(self) -> AttentionError:
        """Return the error of attention after a quick refinement of the closed form's maps."""
        error = self.refined(maps.QUICK).attention_error
        assert error is not None
        return error

    def refined(self, effort: Effort) -> Projection:
        """Return refined maps with their error."""

        def find() -> tuple[Tensors, Json]:
            found = self.solver.refine(self.layer, self.slots, self.closed, effort)
            return found.tensors(), asdict(found.error)

        tensors, error = self.layer.inputs().kept.tensors(self._made_from("refined maps", effort), find)
        return Projection(tensors, AttentionError(**error))

    def _loss(self, what: str, find: Callable[[], float]) -> float:
        made_from = self._made_from(what, maps.UNREFINED)
        return float(self.layer.inputs().kept.figures(made_from, lambda: {"loss": find()})["loss"])

    def _made_from(self, what: str, effort: Effort) -> Json:
        """Return everything that a result depends on beside the calibration."""
        start = self.slots.start
        assert start is not None  # only heads that keep their size have none
        return {
            "result": what,
            "effort": asdict(effort),
            "slots": self.slots.pairs,
            "bands": [asdict(band) for band in start.bands],
            "centred_for": start.layers,
            **describe_solver(self.solver),
        }


def loss_of_nothing(solver: MapSolver, layer: BestLayer) -> float:
    """Return the loss of attention that weighs all keys alike."""
    made_from = {"result": "loss of nothing", **describe_solver(solver)}
    return float(layer.inputs().kept.figures(made_from, lambda: {"loss": solver.loss_of_nothing(layer)})["loss"])


def describe_solver(solver: MapSolver) -> Json:
    return {"context": solver.context, "eigenvalue_floor": solver.form.floor, "device": solver.device.type}
