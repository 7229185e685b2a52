"""What the rooms of autorank pass each other: frozen dataclasses, standard library only.

Ratios are named for what they are (``macs_kept`` is compressed divided by dense), and MACs are multiply-accumulates.
"""

from autorank.types.layers import (
    CallSize,
    Cost,
    Kind,
    LayerCost,
    LayerSpec,
    LeftAlone,
    ModelProfile,
    Scalar,
    bit_operations,
)
from autorank.types.plans import (
    ACTIVATION_BITS,
    DENSE,
    WEIGHT_BITS,
    Choice,
    Fidelity,
    Plan,
    Proposal,
    Want,
    canonical_json,
    lineage_of,
    trial_key,
)
from autorank.types.predictions import Errors, Spectrum
from autorank.types.records import (
    Constraint,
    DenseFigures,
    Direction,
    Evaluation,
    FrontPoint,
    LayerResult,
    Objective,
    Status,
    SweepHeader,
    TrialRecord,
    tally,
)

__all__ = [
    "ACTIVATION_BITS",
    "DENSE",
    "WEIGHT_BITS",
    "CallSize",
    "Choice",
    "Constraint",
    "Cost",
    "DenseFigures",
    "Direction",
    "Errors",
    "Evaluation",
    "Fidelity",
    "FrontPoint",
    "Kind",
    "LayerCost",
    "LayerResult",
    "LayerSpec",
    "LeftAlone",
    "ModelProfile",
    "Objective",
    "Plan",
    "Proposal",
    "Scalar",
    "Spectrum",
    "Status",
    "SweepHeader",
    "TrialRecord",
    "Want",
    "bit_operations",
    "canonical_json",
    "lineage_of",
    "tally",
    "trial_key",
]
