"""Which leaves are kernels, on names that models have: Flax, Haiku, Equinox, and PyTorch's."""

import jax
import numpy as np
import pytest

import sparseopt_jax as sx

TABLE = """
sparse
  kernel w 0/0 Dense_0/kernel Conv_0/kernel/value layers/0/kernel/value mlp/~/linear_0/w
  conv2_d/w layers/0/weight conv/weight .layers[0].weight ['params']['Dense_0']['kernel']
  transformer/h/0/attn/c_attn/kernel attention/query/kernel attention/value/kernel
  attention/value/kernel/value attention/query_proj/weight attention/value
  attn/attn_vec_einsum/w mlp/gating_einsum mlp/wi_0/kernel LSTMCell_0/hf/kernel cell/weight_ih
  lstm/recurrent_kernel lm_head/kernel lm_head/weight unembed/W_U head/kernel cls/kernel
  cls_head/weight classifier/weight text_projection upscale/conv/kernel upscale/kernel
  upscale/weight multiscale/0/weight rescaled normalizing_flow/coupling/kernel
  normalizing_flow/weight normal_head/kernel normal_head/weight abnormality/weight
  platform/weight unbiased/kernel unbiased/weight debiased BatchEnsemble_0/kernel
  batch_ensemble/weight lnet/weight bnb/weight embedded/weight member/weight
  position_wise_ffn/w_1/weight positionwise/weight pos_net/kernel pos_net/weight postnet/weight
  tokenizer/weight token_mixer/kernel token_mixer/Dense_0/kernel token_mixing/linear/weight
  token_mixer/weight betas_net/weight gammatone/weight ConvBN_0/Conv_0/kernel
  PreNorm_0/Attention_0/to_qkv/kernel norm1/linear/weight embed_proj/kernel patch_embed/kernel
  patch_embed/proj/weight embeddings/patch_embeddings/projection/kernel embedding/kernel
  time_embedding/linear_1/weight scale/kernel bias_net/kernel
dense
  Embed_0/embedding token_embed/embedding embed/embedding/value transformer/wte/embedding
  transformer/wpe/embedding wte/weight wpe/weight shared/embedding token_embedder/embedding
  embedder/input_embedding embedder_block/token_embedder/weight embed/embeddings
  embed_tokens/weight embed_positions/weight tok_embeddings/weight tok/weight tok_emb/weight
  embedding/weight word_embeddings/weight wordEmbeddings/weight EMBEDDING_TABLE
  token_embedding_table/weight relative_attention_bias/embedding relative_attention_bias/weight
  query_embed/weight label_emb/weight class_embedding positional_embedding
  positional_encoding/weight position_embeddings/weight position/weight pos pos/weight pos_embed
  pos_embedding pos_enc perceiver_encoder/~/trainable_position_encoding/pos_embs
  relative_position_bias_table attn/rel_pos_h cls cls_token class_token mask_token
  register_tokens query_tokens tokens/0 latents quantizer/codebook LayerNorm_0/scale
  LayerNorm_0/bias blocks/LayerNorm_0/scale/value BatchNorm_0/scale RMSNorm_0/scale
  layer_norm/scale layer_norm/offset res_net/~/initial_batchnorm/scale
  res_net/~/initial_batchnorm/offset batch_norm/w batch_normalization/gamma
  batch_normalization/beta norm/weight norm1/weight norm_f/weight h/0/ln_1/g ln_f/weight
  bn1/weight gn/weight input_layernorm/weight rms_att_weight rms/w q_norm/weight
  WeightNorm_0/Dense_0/kernel/scale Dense_0/kernel_scale Dense_0/bias Dense_0/bias/value
  attention/query/bias in_proj_bias cell/bias_ih_l0 hidden/biases scale_shift_table logit_scale
  ls1/gamma fast_weight_alpha fast_weight_gamma
"""
KERNELS, NOT_KERNELS = (part.split() for part in TABLE.removeprefix("\nsparse").split("dense\n"))

MATRIX = np.zeros((4, 8), np.float32)


def test_kernels_by_name():
    assert [path for path in KERNELS if not sx.default_prunable(path, MATRIX)] == []
    assert sx.default_prunable("", MATRIX)


def test_embeddings_tokens_norms_and_biases_by_name():
    assert [path for path in NOT_KERNELS if sx.default_prunable(path, MATRIX)] == []


@pytest.mark.parametrize("shape", [(), (8,), (0,)])
def test_vectors_are_no_kernels(shape):
    leaf = jax.ShapeDtypeStruct(shape, np.float32)
    assert not any(sx.default_prunable(path, leaf) for path in KERNELS)


# --- what is no such function ------------------------------------------------------------------


def sparse_training(**options):
    return sx.sparse_training(sx.sparseopt(0.1), topology=sx.Static(), **options)


@pytest.mark.parametrize(
    ("prunable", "message"),
    [
        (
            "*/kernel",
            r"got '\*/kernel'; for a pattern: lambda path, leaf: fnmatch.fnmatchcase\(path, ",
        ),
        (["a/kernel"], r"got \['a/kernel'\]"),
        (None, "got None"),
        (lambda path: True, "too many positional arguments"),
    ],
)
def test_a_prunable_that_is_no_function_of_path_and_leaf(prunable, message):
    """Wherever one is given, and at once."""
    params, masks = {"w": MATRIX}, {"w": MATRIX == 0}
    for use in (
        lambda: sparse_training(distribution=sx.ERK(0.5), prunable=prunable),
        lambda: sparse_training(masks=masks, prunable=prunable),
        lambda: sx.init_masks(jax.random.key(0), params, sx.ERK(0.5), prunable=prunable),
        lambda: sx.mask_churn(masks, masks, prunable=prunable),
    ):
        with pytest.raises(
            TypeError, match=r"prunable must be a function of \(path, leaf\), .*" + message
        ):
            use()


def test_other_predicates_that_are_none():
    message = "layers must be a function of a leaf's path, or None, got "
    pattern = r"'head/\*'; for a pattern: lambda path: fnmatch"
    with pytest.raises(TypeError, match=message + pattern):
        sx.sparseopt(0.1, layers="head/*")
    with pytest.raises(TypeError, match=message + ".*missing a required argument"):
        sx.sparseopt(0.1, layers=lambda path, leaf: True)


def test_functions_without_a_signature_are_taken():
    sparse_training(distribution=sx.ERK(0.5), prunable=max)
