"""Everything public, imported when the first of these names is used."""

from dataclasses import is_dataclass

from tdfx.api import merge, plan, rewrite
from tdfx.checkpoint.merging import merge_checkpoint
from tdfx.checkpoint.record import read, save, state
from tdfx.checkpoint.restore import load
from tdfx.cost.measured import Measured
from tdfx.cost.modelled import Modelled
from tdfx.errors import (
    CheckpointError,
    ExportError,
    InputError,
    KindError,
    MergeError,
    ModelError,
    ModelReferenceError,
    OptimizerError,
    PassError,
    PlanError,
    PolicyError,
    ReportError,
    TdfxError,
    TdfxWarning,
    WeightError,
)
from tdfx.factors.operation import Operation
from tdfx.factors.registry import register_scheme
from tdfx.factors.scheme import Scheme
from tdfx.factors.two_factors import TwoFactors
from tdfx.help_texts import describe_fields
from tdfx.kinds.kind import LayerKind
from tdfx.kinds.registry import register_kind
from tdfx.layers.factorized import Factorized
from tdfx.onnx_proof.export_model import export
from tdfx.onnx_proof.report import ExportReport, VerifyReport
from tdfx.onnx_proof.verify import verify
from tdfx.optim.states import register_optimizer
from tdfx.passes.analysis.moments import Moments
from tdfx.plans.decisions import Emit, Reason, SitePlan
from tdfx.plans.plan import Plan
from tdfx.policies.file import read_policy
from tdfx.policies.policy import Policy
from tdfx.ranks.budget import Budget, Target
from tdfx.ranks.energy import Energy
from tdfx.ranks.fixed import Fixed
from tdfx.ranks.ratio import Ratio
from tdfx.ranks.rule import Choice, RankRule
from tdfx.ranks.spectrum import Spectrum
from tdfx.ranks.stable import StableRank
from tdfx.ranks.threshold import Threshold
from tdfx.ranks.vbmf import VBMF
from tdfx.training.methods.decay import FrobeniusDecay
from tdfx.training.methods.factor_rate import FactorRate
from tdfx.training.methods.freeze import Freeze
from tdfx.training.methods.penalty import LowRankPenalty
from tdfx.training.methods.rewarm import Rewarm
from tdfx.training.step_check import StepCheck, check_step
from tdfx.training.switch.state import SwitchEvent
from tdfx.training.switch.switch import Switch
from tdfx.training.switch.when import AtEpoch, AtStep, Settled

__all__ = [
    "VBMF",
    "AtEpoch",
    "AtStep",
    "Budget",
    "CheckpointError",
    "Choice",
    "Emit",
    "Energy",
    "ExportError",
    "ExportReport",
    "FactorRate",
    "Factorized",
    "Fixed",
    "Freeze",
    "FrobeniusDecay",
    "InputError",
    "KindError",
    "LayerKind",
    "LowRankPenalty",
    "Measured",
    "MergeError",
    "ModelError",
    "ModelReferenceError",
    "Modelled",
    "Moments",
    "Operation",
    "OptimizerError",
    "PassError",
    "Plan",
    "PlanError",
    "Policy",
    "PolicyError",
    "RankRule",
    "Ratio",
    "Reason",
    "ReportError",
    "Rewarm",
    "Scheme",
    "Settled",
    "SitePlan",
    "Spectrum",
    "StableRank",
    "StepCheck",
    "Switch",
    "SwitchEvent",
    "Target",
    "TdfxError",
    "TdfxWarning",
    "Threshold",
    "TwoFactors",
    "VerifyReport",
    "WeightError",
    "check_step",
    "export",
    "load",
    "merge",
    "merge_checkpoint",
    "plan",
    "read",
    "read_policy",
    "register_kind",
    "register_optimizer",
    "register_scheme",
    "rewrite",
    "save",
    "state",
    "verify",
]

for _public in [value for name, value in globals().items() if name in __all__]:
    if is_dataclass(_public) and isinstance(_public, type):
        describe_fields(_public)
