"""Layer rules: per-example gradients of each kind of layer, from its inputs and the gradient of its outputs.

A new rule is one file here and one entry of `RULES`; or pass your own to `Hooked(rules=(MyRule(), *RULES))`.
"""

from trak.gradients.layers.base import LayerCall, LayerRule, SteppedRule
from trak.gradients.layers.batch_norm import BatchNormRule
from trak.gradients.layers.conv import ConvRule
from trak.gradients.layers.conv1d_transformers import TransformersConv1DRule
from trak.gradients.layers.embedding import EmbeddingRule
from trak.gradients.layers.experts_transformers import TransformersExpertsRule
from trak.gradients.layers.group_norm import GroupNormRule
from trak.gradients.layers.instance_norm import InstanceNormRule
from trak.gradients.layers.layer_norm import LayerNormRule
from trak.gradients.layers.linear import LinearRule
from trak.gradients.layers.multihead_attention import InProjectionRule
from trak.gradients.layers.norms_vision import TimmGlobalResponseNormRule, TimmNormActRule, VisionNormRule
from trak.gradients.layers.prelu import PReLURule
from trak.gradients.layers.rms_norm import RMSNormRule
from trak.gradients.layers.rms_norm_transformers import TransformersRMSNormRule
from trak.gradients.layers.scaled_blocks import ScaledBlockRule
from trak.gradients.layers.scales import LayerScaleRule

RULES: tuple[LayerRule, ...] = (
    LinearRule(),
    ConvRule(),
    EmbeddingRule(),
    BatchNormRule(),
    LayerNormRule(),
    GroupNormRule(),
    InstanceNormRule(),
    RMSNormRule(),
    PReLURule(),
    InProjectionRule(),
    TransformersConv1DRule(),
    TransformersRMSNormRule(),
    TransformersExpertsRule(),
    VisionNormRule(),
    TimmNormActRule(),
    TimmGlobalResponseNormRule(),
    LayerScaleRule(),
    ScaledBlockRule(),
)
"""Every rule there is; a module is given to the first that covers any of its attributed parameters."""

__all__ = ["RULES", "LayerCall", "LayerRule", "SteppedRule"]
