"""Recipes: everything that shapes a run, in sections."""

from __future__ import annotations

from d2llm.recipe.backbone import BackboneConfig, CustomBackbone, Frozen, Full, Lora, Package, Tuning
from d2llm.recipe.data import DataConfig, LabellingConfig, MiningConfig
from d2llm.recipe.pooling import AutoPooling, ChangedPooling, Pooling
from d2llm.recipe.pretraining import Pretraining
from d2llm.recipe.recipe import Recipe
from d2llm.recipe.sections import CompletionConfig, EndpointConfig, LoraConfig, Quantization, Section, WarmUpConfig
from d2llm.recipe.student import InteractionConfig, StudentConfig, shaping_student_settings, untuned_config
from d2llm.recipe.teacher import (
    AutoTeacherConfig,
    CausalTeacherConfig,
    ClassifierTeacherConfig,
    CosineTeacherConfig,
    EnsembleTeacherConfig,
    GradedTeacherConfig,
    ListEndpointConfig,
    ListsConfig,
    ListTeacherConfig,
    ListwiseTeacherConfig,
    LocalTeacherConfig,
    PromptedTeacherConfig,
    RankedListsConfig,
    RecordedConfig,
    RemoteConfig,
    RemoteTeacherConfig,
    Seq2SeqTeacherConfig,
    TeacherConfig,
    TeacherEndpointConfig,
    TeacherIdentity,
    VllmTeacherConfig,
)
from d2llm.recipe.training import (
    GateConfig,
    ResidualConfig,
    ScoreFeaturesConfig,
    TokensConfig,
    TrainingConfig,
)
from d2llm.recipe.tuning import ReaderTuningConfig, TeacherTuningConfig, WriterTuningConfig
from d2llm.recipe.writer import LocalWriterConfig, RemoteWriterConfig, WriterConfig, WriterEndpointConfig

__all__ = [
    "AutoPooling",
    "AutoTeacherConfig",
    "BackboneConfig",
    "CausalTeacherConfig",
    "ChangedPooling",
    "ClassifierTeacherConfig",
    "CompletionConfig",
    "CosineTeacherConfig",
    "CustomBackbone",
    "DataConfig",
    "EndpointConfig",
    "EnsembleTeacherConfig",
    "Frozen",
    "Full",
    "GateConfig",
    "GradedTeacherConfig",
    "InteractionConfig",
    "LabellingConfig",
    "ListEndpointConfig",
    "ListTeacherConfig",
    "ListsConfig",
    "ListwiseTeacherConfig",
    "LocalTeacherConfig",
    "LocalWriterConfig",
    "Lora",
    "LoraConfig",
    "MiningConfig",
    "Package",
    "Pooling",
    "Pretraining",
    "PromptedTeacherConfig",
    "Quantization",
    "RankedListsConfig",
    "ReaderTuningConfig",
    "Recipe",
    "RecordedConfig",
    "RemoteConfig",
    "RemoteTeacherConfig",
    "RemoteWriterConfig",
    "ResidualConfig",
    "ScoreFeaturesConfig",
    "Section",
    "Seq2SeqTeacherConfig",
    "StudentConfig",
    "TeacherConfig",
    "TeacherEndpointConfig",
    "TeacherIdentity",
    "TeacherTuningConfig",
    "TokensConfig",
    "TrainingConfig",
    "Tuning",
    "VllmTeacherConfig",
    "WarmUpConfig",
    "WriterConfig",
    "WriterEndpointConfig",
    "WriterTuningConfig",
    "shaping_student_settings",
    "untuned_config",
]
