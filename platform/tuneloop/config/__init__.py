"""The configuration: strict models, loading, dotted overrides, and all mistakes reported at once.

Two kinds of parameter live here. What changes the result (data, seed, learning rate, global
batch, maximum length) is fingerprinted by the step that uses it. How it is executed is in
`ResourcesConfig` and `ServingConfig` (workers, micro-batch, ZeRO stage, port): recorded, never
fingerprinted. Defaults live only in these models.
"""

from tuneloop.config.data import DataConfig as DataConfig
from tuneloop.config.data import DecontaminationConfig as DecontaminationConfig
from tuneloop.config.data import DedupConfig as DedupConfig
from tuneloop.config.data import FiltersConfig as FiltersConfig
from tuneloop.config.data import InputSourceConfig as InputSourceConfig
from tuneloop.config.data import MixedSourceConfig as MixedSourceConfig
from tuneloop.config.data import SourceConfig as SourceConfig
from tuneloop.config.data import SourceFormat as SourceFormat
from tuneloop.config.data import SplitConfig as SplitConfig
from tuneloop.config.evaluation import NO_DIFFERENCE as NO_DIFFERENCE
from tuneloop.config.evaluation import ArmConfig as ArmConfig
from tuneloop.config.evaluation import ArmName as ArmName
from tuneloop.config.evaluation import BudgetConfig as BudgetConfig
from tuneloop.config.evaluation import DottedPath as DottedPath
from tuneloop.config.evaluation import EvaluationConfig as EvaluationConfig
from tuneloop.config.evaluation import FloorConfig as FloorConfig
from tuneloop.config.evaluation import ForgettingConfig as ForgettingConfig
from tuneloop.config.evaluation import JudgeConfig as JudgeConfig
from tuneloop.config.evaluation import MetricConfig as MetricConfig
from tuneloop.config.evaluation import PriceConfig as PriceConfig
from tuneloop.config.generation import GenerationConfig as GenerationConfig
from tuneloop.config.loading import field_names as field_names
from tuneloop.config.loading import load_config as load_config
from tuneloop.config.loading import to_yaml as to_yaml
from tuneloop.config.loading import with_override as with_override
from tuneloop.config.loading import with_value as with_value
from tuneloop.config.resources import ResourcesConfig as ResourcesConfig
from tuneloop.config.section import Name as Name
from tuneloop.config.section import Section as Section
from tuneloop.config.serving import API_KEY_VARIABLE as API_KEY_VARIABLE
from tuneloop.config.serving import EngineName as EngineName
from tuneloop.config.serving import ServingConfig as ServingConfig
from tuneloop.config.serving import VllmConfig as VllmConfig
from tuneloop.config.sweep import DistributionConfig as DistributionConfig
from tuneloop.config.sweep import SweepBudgetConfig as SweepBudgetConfig
from tuneloop.config.sweep import SweepConfig as SweepConfig
from tuneloop.config.task import MixedTaskConfig as MixedTaskConfig
from tuneloop.config.task import MixedTaskType as MixedTaskType
from tuneloop.config.task import ModelConfig as ModelConfig
from tuneloop.config.task import OneTaskConfig as OneTaskConfig
from tuneloop.config.task import TaskConfig as TaskConfig
from tuneloop.config.task import TaskName as TaskName
from tuneloop.config.task import TaskType as TaskType
from tuneloop.config.training import LoraConfig as LoraConfig
from tuneloop.config.training import TrainingConfig as TrainingConfig
from tuneloop.config.whole import Origin as Origin
from tuneloop.config.whole import TuneloopConfig as TuneloopConfig
from tuneloop.config.whole import grad_accum_steps as grad_accum_steps
from tuneloop.config.whole import micro_batch_size as micro_batch_size
