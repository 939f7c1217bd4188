"""Recipes: everything that shapes a run, in sections. Each is imported when it is first used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from d2llm.core.lazy_names import lazy_names

if TYPE_CHECKING:
    from d2llm.recipe.data import DataConfig as DataConfig
    from d2llm.recipe.data import LabellingConfig as LabellingConfig
    from d2llm.recipe.data import MiningConfig as MiningConfig
    from d2llm.recipe.recipe import Recipe as Recipe
    from d2llm.recipe.sections import CompletionConfig as CompletionConfig
    from d2llm.recipe.sections import EndpointConfig as EndpointConfig
    from d2llm.recipe.sections import LoraConfig as LoraConfig
    from d2llm.recipe.sections import Quantization as Quantization
    from d2llm.recipe.sections import Section as Section
    from d2llm.recipe.sections import WarmUpConfig as WarmUpConfig
    from d2llm.recipe.student import AutoPooling as AutoPooling
    from d2llm.recipe.student import BackboneConfig as BackboneConfig
    from d2llm.recipe.student import ChangedPooling as ChangedPooling
    from d2llm.recipe.student import CustomBackbone as CustomBackbone
    from d2llm.recipe.student import Frozen as Frozen
    from d2llm.recipe.student import Full as Full
    from d2llm.recipe.student import InteractionConfig as InteractionConfig
    from d2llm.recipe.student import Lora as Lora
    from d2llm.recipe.student import Package as Package
    from d2llm.recipe.student import Pooling as Pooling
    from d2llm.recipe.student import StudentConfig as StudentConfig
    from d2llm.recipe.student import Tuning as Tuning
    from d2llm.recipe.student import shaping_student_settings as shaping_student_settings
    from d2llm.recipe.student import untuned_config as untuned_config
    from d2llm.recipe.teacher import AutoTeacherConfig as AutoTeacherConfig
    from d2llm.recipe.teacher import CausalTeacherConfig as CausalTeacherConfig
    from d2llm.recipe.teacher import ClassifierTeacherConfig as ClassifierTeacherConfig
    from d2llm.recipe.teacher import CosineTeacherConfig as CosineTeacherConfig
    from d2llm.recipe.teacher import EnsembleTeacherConfig as EnsembleTeacherConfig
    from d2llm.recipe.teacher import FusedTeacherConfig as FusedTeacherConfig
    from d2llm.recipe.teacher import GradedTeacherConfig as GradedTeacherConfig
    from d2llm.recipe.teacher import LikelihoodTeacherConfig as LikelihoodTeacherConfig
    from d2llm.recipe.teacher import ListEndpointConfig as ListEndpointConfig
    from d2llm.recipe.teacher import ListsConfig as ListsConfig
    from d2llm.recipe.teacher import ListTeacherConfig as ListTeacherConfig
    from d2llm.recipe.teacher import ListwiseTeacherConfig as ListwiseTeacherConfig
    from d2llm.recipe.teacher import LocalTeacherConfig as LocalTeacherConfig
    from d2llm.recipe.teacher import PromptedTeacherConfig as PromptedTeacherConfig
    from d2llm.recipe.teacher import RankedListsConfig as RankedListsConfig
    from d2llm.recipe.teacher import RecordedConfig as RecordedConfig
    from d2llm.recipe.teacher import RemoteConfig as RemoteConfig
    from d2llm.recipe.teacher import RemoteTeacherConfig as RemoteTeacherConfig
    from d2llm.recipe.teacher import Seq2SeqTeacherConfig as Seq2SeqTeacherConfig
    from d2llm.recipe.teacher import TeacherConfig as TeacherConfig
    from d2llm.recipe.teacher import TeacherEndpointConfig as TeacherEndpointConfig
    from d2llm.recipe.teacher import TeacherIdentity as TeacherIdentity
    from d2llm.recipe.teacher import VllmTeacherConfig as VllmTeacherConfig
    from d2llm.recipe.training import GateConfig as GateConfig
    from d2llm.recipe.training import Pretraining as Pretraining
    from d2llm.recipe.training import ReaderTuningConfig as ReaderTuningConfig
    from d2llm.recipe.training import ResidualConfig as ResidualConfig
    from d2llm.recipe.training import ScoreFeaturesConfig as ScoreFeaturesConfig
    from d2llm.recipe.training import TeacherTuningConfig as TeacherTuningConfig
    from d2llm.recipe.training import TokensConfig as TokensConfig
    from d2llm.recipe.training import TrainingConfig as TrainingConfig
    from d2llm.recipe.training import WriterTuningConfig as WriterTuningConfig
    from d2llm.recipe.writer import LocalWriterConfig as LocalWriterConfig
    from d2llm.recipe.writer import RemoteWriterConfig as RemoteWriterConfig
    from d2llm.recipe.writer import WriterConfig as WriterConfig
    from d2llm.recipe.writer import WriterEndpointConfig as WriterEndpointConfig

_NAMES = {
    "data": "DataConfig LabellingConfig MiningConfig",
    "recipe": "Recipe",
    "sections": "CompletionConfig EndpointConfig LoraConfig Quantization Section WarmUpConfig",
    "student": (
        "AutoPooling BackboneConfig ChangedPooling CustomBackbone Frozen Full InteractionConfig Lora Package "
        "Pooling shaping_student_settings StudentConfig Tuning untuned_config"
    ),
    "teacher": (
        "AutoTeacherConfig CausalTeacherConfig ClassifierTeacherConfig CosineTeacherConfig "
        "EnsembleTeacherConfig FusedTeacherConfig GradedTeacherConfig LikelihoodTeacherConfig "
        "ListEndpointConfig ListsConfig ListTeacherConfig ListwiseTeacherConfig LocalTeacherConfig "
        "PromptedTeacherConfig RankedListsConfig RecordedConfig RemoteConfig RemoteTeacherConfig "
        "Seq2SeqTeacherConfig TeacherConfig TeacherEndpointConfig TeacherIdentity VllmTeacherConfig"
    ),
    "training": (
        "GateConfig Pretraining ReaderTuningConfig ResidualConfig ScoreFeaturesConfig TeacherTuningConfig "
        "TokensConfig TrainingConfig WriterTuningConfig"
    ),
    "writer": "LocalWriterConfig RemoteWriterConfig WriterConfig WriterEndpointConfig",
}

_HOME_OF = {name: f"d2llm.recipe.{module}" for module, names in _NAMES.items() for name in names.split()}

__getattr__, __dir__ = lazy_names(globals(), _HOME_OF)
