"""Recipes: everything that shapes a run, in sections."""

from __future__ import annotations

from d2llm.recipe.data import DataConfig, LabellingConfig, MiningConfig
from d2llm.recipe.recipe import Recipe
from d2llm.recipe.sections import CompletionConfig, EndpointConfig, LoraConfig, Quantization, Section, WarmUpConfig
from d2llm.recipe.student import (
    BackboneConfig,
    InteractionConfig,
    PoolingConfig,
    RemoteBackboneConfig,
    StudentConfig,
    shaping_student_settings,
    untuned_config,
)
from d2llm.recipe.teacher import (
    LIST_KINDS,
    REMOTE_KINDS,
    ListsConfig,
    RecordedConfig,
    RemoteConfig,
    TeacherConfig,
    VllmConfig,
)
from d2llm.recipe.training import (
    EvidenceConfig,
    GateConfig,
    PretrainingConfig,
    PretrainingObjective,
    ResidualConfig,
    TokensConfig,
    TrainingConfig,
)
from d2llm.recipe.tuning import ReaderTuningConfig, TeacherTuningConfig, WriterTuningConfig
from d2llm.recipe.writer import LocalWriterConfig, RemoteWriterConfig, WriterConfig, WriterEndpointConfig

__all__ = [
    "LIST_KINDS",
    "REMOTE_KINDS",
    "BackboneConfig",
    "CompletionConfig",
    "DataConfig",
    "EndpointConfig",
    "EvidenceConfig",
    "GateConfig",
    "InteractionConfig",
    "LabellingConfig",
    "ListsConfig",
    "LocalWriterConfig",
    "LoraConfig",
    "MiningConfig",
    "PoolingConfig",
    "PretrainingConfig",
    "PretrainingObjective",
    "Quantization",
    "ReaderTuningConfig",
    "Recipe",
    "RecordedConfig",
    "RemoteBackboneConfig",
    "RemoteConfig",
    "RemoteWriterConfig",
    "ResidualConfig",
    "Section",
    "StudentConfig",
    "TeacherConfig",
    "TeacherTuningConfig",
    "TokensConfig",
    "TrainingConfig",
    "VllmConfig",
    "WarmUpConfig",
    "WriterConfig",
    "WriterEndpointConfig",
    "WriterTuningConfig",
    "shaping_student_settings",
    "untuned_config",
]
