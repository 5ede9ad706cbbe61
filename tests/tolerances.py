"""The only tolerances of the test suite, each with its reason."""

import torch

# fp32 against float64 over 50 MuonH steps: rounding of one step (1e-7), amplified by Newton-Schulz on small singular
# values (up to a factor 500 on the direction, of which a step moves the weights by a hundredth).
OPTIMIZER_FP32 = 1e-5

# One sharded Newton-Schulz against one rank, fp32: other summation orders in the same products.
SHARDED_NEWTON_SCHULZ = 5e-6

# A fused attention kernel against the unfused one, fp32, of the largest element: the softmax is summed in blocks, and
# where it is sharp a gradient is a difference of larger numbers; 2e-6 is typical.
FUSED_ATTENTION = 1e-5

# Newton-Schulz in fp16 against fp32: three digits, amplified on small singular values.
NEWTON_SCHULZ_FP16 = 2e-2

# Loss of another layout over 20 fp32 training steps: tensor and data parallelism sum in another order, and training
# amplifies it; 3e-6 is typical.
LAYOUT_LOSS = 1e-4

# Loss of the next five steps under another layout than the one that saved: rounding, not yet amplified.
RESHARDED_LOSS = 1e-5

# | ||W||/R - 1 | after retraction in fp32 masters: rounding of the elements averages out.
RADIUS_DRIFT = 1e-6

# Weight-decay theorem: the residual falls by 4 when the learning rate halves, up to third-order terms.
WEIGHT_DECAY_FACTOR = 0.1

# Logits of one model in two implementations, fp32: sums in another order; 1e-6 is typical.
EXPORTED_LOGITS = 1e-4

# Loss of one model on one corpus, in two implementations, fp32, absolute: sums in another order, of which one is
# printed with seven digits.
EVALUATED_LOSS = 1e-5

# Measured over predicted error of Newton-Schulz in Gram form: the prediction is a root mean square over random noise,
# and one matrix is one draw; leaving out how a product's partial sums round. 0.4 to 3 are typical.
PREDICTED_ROUNDING = (0.2, 5.0)

# Newton-Schulz against float64 where singular values fall as 1/k, 1/k^2 or 10^0 to 10^-4, or vanish: unit roundoff
# times the product of slopes at 0 (500 for five quintic steps, 80,000 for ten of deepseekv4), of which a part is seen.
NEWTON_SCHULZ_ON_SPECTRA = {torch.float32: 1e-3, torch.float16: 0.6, torch.bfloat16: 1.0}

# The same on matrices without full rank, in the directions that they have: no slope at 0 lifts the rounding there.
NEWTON_SCHULZ_RANK_DEFICIENT = {torch.float32: 1e-4, torch.float16: 0.1, torch.bfloat16: 0.3}
