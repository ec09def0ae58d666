"""How channels pass through each operator: the only such table.

A rule is ``rule(call) -> TensorInfo``: what is known of the first output, or a list where others have labels too. An
operator without a rule freezes every channel that reaches it; nothing is ever assumed to be element-wise. New
operators are added by naming them in `RULES`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from lightning_prune.graph.labels import TensorInfo
from lightning_prune.graph.operator_call import OperatorCall
from lightning_prune.graph.rules import (
    contractions,
    indexed,
    movement,
    pointwise,
    recurrent,
    spatial,
    statistics,
    weights,
)

Rule = Callable[[OperatorCall], "TensorInfo | list[TensorInfo]"]

_GROUPS: dict[Rule, str] = {
    pointwise.elementwise: (
        "add sub mul div rsub neg abs sqrt rsqrt square pow exp exp2 log log2 log1p expm1 reciprocal sin cos tan sinh "
        "cosh tanh asinh atan atan2 erf sign sgn floor ceil round trunc frac clamp clamp_min clamp_max maximum minimum "
        "where masked_fill addcmul addcdiv lerp relu relu6 leaky_relu elu celu selu silu gelu mish softplus sigmoid "
        "log_sigmoid_forward hardsigmoid hardswish hardtanh hardshrink softshrink threshold rrelu_with_noise "
        "_prelu_kernel eq ne lt le gt ge logical_and logical_or logical_xor logical_not bitwise_and bitwise_or "
        "bitwise_xor bitwise_not remainder fmod floor_divide isnan isinf isfinite nan_to_num xlogy"
    ),
    pointwise.gate: "glu",
    pointwise.factory: (
        "empty zeros ones full rand randn randint scalar_tensor empty_like zeros_like ones_like full_like rand_like "
        "randn_like new_empty new_zeros new_ones new_full fill uniform exponential empty_strided new_empty_strided"
    ),
    pointwise.pattern: "eye arange linspace randperm triu_indices tril_indices",
    pointwise.triangle: "tril triu",
    pointwise.sample: "bernoulli normal",
    pointwise.clear: "zero",
    pointwise.copy_into: "copy",
    pointwise.write: "index_put",
    pointwise.same_elements: "clone detach alias _to_copy lift_fresh contiguous native_dropout",
    pointwise.restride: "as_strided_",
    movement.movement: "t transpose permute unsqueeze squeeze flip pixel_unshuffle",
    movement.repetition: "repeat",
    movement.expansion: "expand",
    movement.view: "view _unsafe_view reshape _reshape_alias",
    movement.selection: "slice select split split_with_sizes unbind narrow",
    movement.index: "index",
    movement.pick: "index_select roll embedding unfold",
    indexed.gathering: "gather",
    indexed.scattering: "scatter scatter_add index_add",
    movement.shuffle: "channel_shuffle native_channel_shuffle",
    movement.unfold_depth: "pixel_shuffle",
    spatial.patches: "im2col",
    spatial.unpatches: "col2im",
    movement.concatenation: "cat",
    movement.stack: "stack",
    movement.padding: "constant_pad_nd",
    contractions.convolution: (
        "convolution _convolution cudnn_convolution mkldnn_convolution miopen_convolution miopen_depthwise_convolution "
        "convolution_overrideable"
    ),
    contractions.deformable_convolution: "torchvision.deform_conv2d",
    contractions.matrix_product: "mm addmm bmm baddbmm",
    contractions.vector_product: "mv dot vdot",
    recurrent.gates: "unsafe_split _thnn_fused_lstm_cell _thnn_fused_gru_cell",
    recurrent.fused: "mkldnn_rnn_layer _cudnn_rnn",
    recurrent.pack: "_pack_padded_sequence",
    weights.weight_norm: "_weight_norm_interface",
    weights.fake_quantization: (
        "_fused_moving_avg_obs_fq_helper fake_quantize_per_tensor_affine_cachemask "
        "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams fake_quantize_per_channel_affine_cachemask "
        "_fake_quantize_learnable_per_tensor_affine _fake_quantize_learnable_per_channel_affine"
    ),
    statistics.batch_norm: (
        "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm "
        "miopen_batch_norm _batch_norm_with_update _batch_norm_no_update batch_norm"
    ),
    statistics.layer_norm: "native_layer_norm _fused_rms_norm",
    statistics.group_norm: "native_group_norm",
    statistics.reduction: (
        "mean sum amax amin max min var std var_mean std_mean linalg_vector_norm norm prod logsumexp "
        "argmax argmin all any median nanmedian kthvalue mode"
    ),
    statistics.loss: "mse_loss smooth_l1_loss huber_loss binary_cross_entropy",
    statistics.likelihood: "nll_loss_forward nll_loss2d_forward",
    statistics.along: "_softmax _log_softmax _safe_softmax cumsum cumprod cummax cummin sort topk",
    spatial.pooling: (
        "max_pool2d_with_indices max_pool2d max_pool3d_with_indices max_pool3d avg_pool1d avg_pool2d avg_pool3d "
        "_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d adaptive_avg_pool1d "
        "adaptive_max_pool1d max_pool1d mkldnn_max_pool2d upsample_nearest1d upsample_nearest2d upsample_nearest3d "
        "_upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d upsample_linear1d "
        "upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa "
        "reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d"
    ),
    spatial.unpooling: "max_unpool2d max_unpool3d",
    spatial.sampling: "torchvision.roi_align torchvision.roi_pool grid_sampler_2d grid_sampler_3d",
}
RULES: dict[str, Rule] = {name: rule for rule, names in _GROUPS.items() for name in names.split()}


@cache
def rule_for(func: Any) -> Rule | None:
    """The rule of an operator; in-place variants follow their plain twin."""
    namespace, name = func.overloadpacket._qualified_op_name.split("::")
    if namespace != "aten":
        return RULES.get(f"{namespace}.{name}")
    return RULES.get(name) or RULES.get(name.removesuffix("_"))
