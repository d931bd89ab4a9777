"""The typed schema of every configuration value.

YAML under ``conf/`` holds the values; these dataclasses hold types, meaning and checks, a module for each family of
verbs. They import neither torch nor Hydra, so that a config error is answered at once. Field comments are the
reference that the README points to.
"""

from kncompress.config.distillation import ObjectiveConfig, OptimizerConfig
from kncompress.config.factoring import (
    CalibrationConfig,
    CompressConfig,
    FactorConfig,
    FactoringConfig,
    FactorsConfig,
    FitConfig,
    FittingConfig,
    RepairConfig,
)
from kncompress.config.glue import FineTuningConfig, GlueConfig, GlueDataConfig
from kncompress.config.measurement import BenchConfig, EvaluateConfig
from kncompress.config.placement import PlacedModelConfig
from kncompress.config.planning import InspectConfig, PlanConfig
from kncompress.config.reports import DashboardConfig, DoctorConfig, ReportConfig
from kncompress.config.run import DataConfig, ModelConfig, ModelRunConfig, RunConfig
from kncompress.config.training import LoggerConfig, SamplesConfig, TrainConfig, TrainerConfig
from kncompress.config.use import ExportConfig, GenerateConfig

__all__ = [
    "BenchConfig",
    "CalibrationConfig",
    "CompressConfig",
    "DashboardConfig",
    "DataConfig",
    "DoctorConfig",
    "EvaluateConfig",
    "ExportConfig",
    "FactorConfig",
    "FactoringConfig",
    "FactorsConfig",
    "FineTuningConfig",
    "FitConfig",
    "FittingConfig",
    "GenerateConfig",
    "GlueConfig",
    "GlueDataConfig",
    "InspectConfig",
    "LoggerConfig",
    "ModelConfig",
    "ModelRunConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "PlacedModelConfig",
    "PlanConfig",
    "RepairConfig",
    "ReportConfig",
    "RunConfig",
    "SamplesConfig",
    "TrainConfig",
    "TrainerConfig",
]
