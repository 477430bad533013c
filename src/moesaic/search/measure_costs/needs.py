"""Whether ``measure_costs`` can work on a parent. It takes one block at a time, and a plan counts nothing for it."""

from typing import TYPE_CHECKING

from moesaic.search.measure_costs.stage import MeasureCostsConfig

if TYPE_CHECKING:
    from moesaic.data.inputs import Inputs


def check_inputs(config: MeasureCostsConfig, inputs: "Inputs") -> None:
    """Raise ConfigError if what is to be costed does not fit the parent, or cannot be costed here."""
    from moesaic.search.measure_costs.run import check_costed  # it loads torch

    check_costed(config, inputs.parent)
