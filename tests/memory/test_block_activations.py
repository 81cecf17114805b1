"""What one transformer block keeps for the backward pass, derived by hand, byte for byte.

With B clips, N tokens, D channels, H heads and a hidden width of 4 D, in fp32, a timm block keeps (BND = B x N x D):

    norm1       output, the qkv layer's input            BND       and two statistics per token     2 BN
    qkv         fused: its output, of which q, k and v
                are views that the kernel keeps          3 BND
                eager: copies of scaled q, of k and of v
                that the batched products keep           3 BND     (its own output is freed)
    attention   fused: the output, which the projection
                takes as it is                           BND       and the log-sum-exp of a row     BNH
                eager: the output, copied into token
                order for the projection                 BND       and the softmax                  BHNN
    residual    their sum, norm2's input                 BND
    norm2       output, the first layer's input          BND       and two statistics per token     2 BN
    mlp         gelu's input and output                  4 + 4 BND
    residual    their sum, the next block's input        BND

The input of norm1 is the block before's. In sum 16 BND + 4 BN, and BNH fused or BHNN eager.
"""

import pytest

from everest_ds.config.schema import ModelConfig
from everest_ds.memory.trace import TraceSpec, trace_step

FP32 = 4
B, N, D, H = 5, 28, 96, 3  # vit_micro at 48 px: a tenth of 288 tokens are visible


def saved_by_a_block(attention: str, precision: str = "fp32") -> int:
    model = ModelConfig(size="vit_micro", image_size=48, decoder_depth=1, attention=attention)
    trace = trace_step(TraceSpec(model=model, precision=precision, device_type="cpu"))
    return trace.saved_bytes("encoder.blocks.1", B)


def test_fused_attention():
    assert saved_by_a_block("fused") == FP32 * (16 * B * N * D + 4 * B * N + B * N * H)


def test_eager_attention():
    assert saved_by_a_block("eager") == FP32 * (16 * B * N * D + 4 * B * N + B * H * N * N)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_halves_all_but_the_log_sum_exp(precision):
    assert saved_by_a_block("fused", precision) == 2 * (16 * B * N * D + 4 * B * N) + FP32 * B * N * H
