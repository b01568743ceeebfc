"""SparseOpt and dynamic sparse training around any optax optimizer."""

from types import ModuleType as _ModuleType

from sparseopt_jax.bcsr import bcsr_matmul as bcsr_matmul
from sparseopt_jax.bcsr import to_bcsr as to_bcsr
from sparseopt_jax.compact import load_compact as load_compact
from sparseopt_jax.compact import load_compact_masks as load_compact_masks
from sparseopt_jax.compact import save_compact as save_compact
from sparseopt_jax.constraints import keep_params_masked as keep_params_masked
from sparseopt_jax.constraints import zero_inactive as zero_inactive
from sparseopt_jax.criteria import Momentum as Momentum
from sparseopt_jax.data_parallel import active_counts as active_counts
from sparseopt_jax.data_parallel import active_indices as active_indices
from sparseopt_jax.data_parallel import psum_active as psum_active
from sparseopt_jax.dead_neurons import Removal as Removal
from sparseopt_jax.dead_neurons import remove_dead_neurons as remove_dead_neurons
from sparseopt_jax.diagnostics import GradientSkew as GradientSkew
from sparseopt_jax.diagnostics import MaskChurn as MaskChurn
from sparseopt_jax.diagnostics import TopEigenvalue as TopEigenvalue
from sparseopt_jax.diagnostics import gradient_norm as gradient_norm
from sparseopt_jax.diagnostics import gradient_skew as gradient_skew
from sparseopt_jax.diagnostics import hessian_top_eigenvalue as hessian_top_eigenvalue
from sparseopt_jax.diagnostics import mask_churn as mask_churn
from sparseopt_jax.distributions import ER as ER
from sparseopt_jax.distributions import ERK as ERK
from sparseopt_jax.distributions import Global as Global
from sparseopt_jax.distributions import PerLayer as PerLayer
from sparseopt_jax.distributions import Uniform as Uniform
from sparseopt_jax.drop_and_grow import SET as SET
from sparseopt_jax.drop_and_grow import RigL as RigL
from sparseopt_jax.flops import flops as flops
from sparseopt_jax.grown_warmup import adam_bias_correction as adam_bias_correction
from sparseopt_jax.ham import HamState as HamState
from sparseopt_jax.ham import ham as ham
from sparseopt_jax.initial_masks import init_masks as init_masks
from sparseopt_jax.keep_top_k import KeepTopKState as KeepTopKState
from sparseopt_jax.keep_top_k import keep_top_k as keep_top_k
from sparseopt_jax.layers import Layer as Layer
from sparseopt_jax.layers import describe_layers as describe_layers
from sparseopt_jax.manual_update import update_topology as update_topology
from sparseopt_jax.masks import Distribution as Distribution
from sparseopt_jax.masks import apply_masks as apply_masks
from sparseopt_jax.masks import check_masks as check_masks
from sparseopt_jax.masks import density as density
from sparseopt_jax.masks import fan_in as fan_in
from sparseopt_jax.masks import scale_to_fan_in as scale_to_fan_in
from sparseopt_jax.model_flops import LayerFLOPs as LayerFLOPs
from sparseopt_jax.model_flops import ModelFLOPs as ModelFLOPs
from sparseopt_jax.one_shot import masks_from_scores as masks_from_scores
from sparseopt_jax.preconditioner import MissingMasksError as MissingMasksError
from sparseopt_jax.preconditioner import scale_by_sparseopt as scale_by_sparseopt
from sparseopt_jax.preconditioner import sparseopt as sparseopt
from sparseopt_jax.prunable import default_prunable as default_prunable
from sparseopt_jax.pruning import ACDC as ACDC
from sparseopt_jax.pruning import Prune as Prune
from sparseopt_jax.recipes import sparseopt_adamw as sparseopt_adamw
from sparseopt_jax.recipes import sparseopt_ham as sparseopt_ham
from sparseopt_jax.recipes import sparseopt_lion as sparseopt_lion
from sparseopt_jax.recipes import sparseopt_muon as sparseopt_muon
from sparseopt_jax.schedules import Cubic as Cubic
from sparseopt_jax.schedules import Linear as Linear
from sparseopt_jax.schedules import OneShot as OneShot
from sparseopt_jax.schedules import Schedule as Schedule
from sparseopt_jax.schedules import from_optax as from_optax
from sparseopt_jax.scores import grasp_scores as grasp_scores
from sparseopt_jax.scores import snip_scores as snip_scores
from sparseopt_jax.scores import synflow_scores as synflow_scores
from sparseopt_jax.selection import random_mask as random_mask
from sparseopt_jax.selection import top_k_mask as top_k_mask
from sparseopt_jax.sharding import state_shardings as state_shardings
from sparseopt_jax.sparse_training import sparse_training as sparse_training
from sparseopt_jax.state import NeverSparse as NeverSparse
from sparseopt_jax.state import SparseTrainingState as SparseTrainingState
from sparseopt_jax.state import get_explored as get_explored
from sparseopt_jax.state import get_masks as get_masks
from sparseopt_jax.state import itop_rate as itop_rate
from sparseopt_jax.state import set_masks as set_masks
from sparseopt_jax.straight_through import straight_through as straight_through
from sparseopt_jax.structures import NM as NM
from sparseopt_jax.structures import Blocks as Blocks
from sparseopt_jax.structures import ConstantFanIn as ConstantFanIn
from sparseopt_jax.structures import Neurons as Neurons
from sparseopt_jax.structures import Split as Split
from sparseopt_jax.structures import Structure as Structure
from sparseopt_jax.summary import FanInStatistics as FanInStatistics
from sparseopt_jax.summary import fan_in_statistics as fan_in_statistics
from sparseopt_jax.summary import summary as summary
from sparseopt_jax.topology import Static as Static
from sparseopt_jax.topology import Topology as Topology
from sparseopt_jax.training_flops import training_flops as training_flops

__version__ = "0.1.0"

# The names above, without the modules that they come from: what help, dir and import * show.
__all__ = sorted(
    name
    for name, value in globals().items()
    if not name.startswith("_") and not isinstance(value, _ModuleType)
)


def __dir__() -> list[str]:
    return __all__
