"""The planted bugs: mistakes that people make in derivatives, caches, masks, optimisers, and in the checker itself."""

from __future__ import annotations

from .mutant import Mutant


def primitive(*names: str) -> tuple[str, ...]:
    test = "tests/ops/test_primitives.py::test_the_vjp_is_autograd_of_the_composition_is_finite_differences"
    return tuple(f"{test}[{name}]" for name in names)


def kernel(name: str) -> tuple[str, ...]:
    tests = (
        "test_a_kernel_is_its_definition",
        "test_a_kernel_is_its_definition_however_its_work_is_cut",
        "test_a_kernel_is_its_definition_on_large_arrays",
    )
    return tuple(f"tests/kernels/test_cpu.py::{test}[{name}]" for test in tests)


def law(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/lora/test_laws.py::test_{name}" for name in names)


def network(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/models/test_whole_models.py::test_{name}" for name in names)


def checker(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/test_gradcheck.py::test_{name}" for name in names)


OPTIM = ("tests/test_optim.py",)
TENSOR = ("tests/test_tensor.py",)

ARITHMETIC = [
    Mutant(
        "ops/arithmetic.py",
        "unbroadcast(dy, shape_a) if needs[0] else None), (unbroadcast(dy, shape_b)",
        "unbroadcast(dy, shape_a) if needs[0] else None), (unbroadcast(-dy, shape_b)",
        "add: wrong sign for b",
        primitive("add"),
    ),
    Mutant(
        "ops/arithmetic.py",
        "(unbroadcast(-dy, shape_b) if needs[1]",
        "(unbroadcast(dy, shape_b) if needs[1]",
        "sub: sign of b forgotten",
        primitive("sub"),
    ),
    Mutant(
        "ops/arithmetic.py",
        "axis < added or (shape[axis - added] == 1 and grad.shape[axis] != 1)",
        "axis < added",
        "broadcasting: axes of length 1 are not summed",
        primitive("add", "mul"),
    ),
    Mutant(
        "ops/arithmetic.py",
        "return grad.sum(axis=repeated, keepdims=True).reshape(shape)",
        "return grad.mean(axis=repeated, keepdims=True).reshape(shape)",
        "broadcasting: a mean instead of a sum over repeated axes",
        primitive("add", "sub", "mul"),
    ),
    Mutant(
        "ops/arithmetic.py",
        "unbroadcast(dy * a, shape_b)",
        "unbroadcast(dy, shape_b)",
        "mul: the other factor is forgotten",
        primitive("mul"),
    ),
    Mutant(
        "ops/arithmetic.py",
        "unbroadcast(-scaled * saved, shape_b)",
        "unbroadcast(scaled * saved, shape_b)",
        "div: wrong sign for the denominator",
        primitive("div"),
    ),
    Mutant(
        "ops/arithmetic.py",
        "dy * exponent * x ** (exponent - 1)",
        "dy * exponent * x**exponent",
        "power: the exponent is not lowered",
        primitive("power"),
    ),
    Mutant("ops/arithmetic.py", "dy * exponent * x", "dy * x", "power: the factor p is dropped", primitive("power")),
    Mutant(
        "ops/arithmetic.py", "return dy / (2 * y)", "return dy / y", "sqrt: the factor 2 is dropped", primitive("sqrt")
    ),
    Mutant(
        "ops/arithmetic.py",
        "return dy / x\n",
        "return dy / (x + 1e-6)\n",
        "log: an ε that is not there",
        primitive("log"),
    ),
    Mutant(
        "ops/arithmetic.py",
        "return dy * (1 - y * y)",
        "return dy * (1 - y)",
        "tanh: y is not squared",
        primitive("tanh"),
    ),
    Mutant(
        "ops/arithmetic.py",
        "xp.where(condition, 0, dy)",
        "xp.where(condition, dy, 0)",
        "where: both branches take the first one's gradient",
        primitive("where"),
    ),
    Mutant(
        "ops/arithmetic.py",
        "share = (a > b) + 0.5 * (a == b)",
        "share = (a < b) + 0.5 * (a == b)",
        "maximum: the smaller one takes the gradient",
        primitive("maximum"),
    ),
    Mutant(
        "ops/arithmetic.py",
        "return xp.broadcast_to(dy.reshape(shape_kept), shape)",
        "return xp.broadcast_to(dy.reshape(shape_kept), shape) / max(shape_kept, default=1)",
        "sum: a mean's factor",
        primitive("sum"),
    ),
    Mutant(
        "ops/arithmetic.py",
        "(max(total.size, 1) / max(x.size, 1))",
        "(1 / max(x.size, 1))",
        "mean: divides by all entries, whatever the axis",
        ("tests/ops/test_primitives.py::test_the_mean_over_an_axis_divides_by_what_it_sums",),
    ),
]

MATRICES = [
    Mutant(
        "ops/linalg.py",
        "product(dy, b.swapaxes(-1, -2))",
        "product(dy, b.reshape(*b.shape[:-2], b.shape[-1], b.shape[-2]))",
        "matmul: reshaped instead of transposed",
        primitive("matmul"),
    ),
    Mutant(
        "ops/linalg.py",
        "db = unbroadcast(product(a.swapaxes(-1, -2), dy), shape_b)",
        "db = product(a.swapaxes(-1, -2), dy)[(0,) * (dy.ndim - len(shape_b))].reshape(shape_b)",
        "matmul: only the first of the broadcast matrices counts",
        primitive("matmul"),
    ),
    Mutant(
        "ops/linalg.py",
        "dweight = product(dy.T, rows(x)) if needs[1] else None",
        "dweight = product(dy.T, rows(x)) / len(dy) if needs[1] else None",
        "linear: dW is averaged over tokens",
        primitive("linear"),
    ),
    Mutant(
        "ops/linalg.py",
        "dbias = dy.sum(axis=0) if needs_bias else None",
        "dbias = dy.sum(axis=0) if needs[1] else None",
        "linear: db is given when dW is needed, not when db is",
        primitive("linear"),
    ),
    Mutant(
        "ops/linalg.py",
        "    x = x if needs[1] else None\n\n    def vjp(dy):\n        dy = rows(dy)",
        "    x = x if needs[0] else None\n\n    def vjp(dy):\n        dy = rows(dy)",
        "linear: x is kept for dx, not for dW",
        primitive("linear"),
    ),
    Mutant(
        "ops/linalg.py",
        "    if bias is not None:\n        y += bias\n    x = x",
        "    x = x",
        "linear: no bias",
        primitive("linear"),
    ),
]

NARROW = ("tests/ops/test_narrow_weights.py",)

MOVES = [
    Mutant(
        "ops/linalg.py",
        "return product(x, cast(weight, x.dtype).T)",
        "return product(x.astype(weight.dtype), weight.T)",
        "products in the weight's narrow dtype",
        NARROW,
    ),
    Mutant(
        "ops/embedding.py",
        "cast(weight[tokens], before if dtype is None else dtype)",
        "cast(weight[tokens], before)",
        "embedding: the rows keep the table's narrow dtype",
        NARROW,
    ),
    Mutant(
        "ops/shape.py",
        "inverse = tuple(sorted(range(len(order)), key=order.__getitem__))",
        "inverse = order",
        "transpose: turned by the same order again, not by its inverse",
        primitive("transpose"),
    ),
    Mutant(
        "ops/shape.py",
        "            xp.add.at(dx, index, dy)",
        "            dx[index] = dy",
        "getitem: repeated indices overwrite each other",
        primitive("getitem"),
    ),
    Mutant(
        "ops/shape.py",
        "        dx[index] = dy\n        return dx\n\n    return x[index], vjp\n\n\n@primitive\ndef add_rows",
        "        dx[: len(dy)] = dy\n        return dx\n\n    return x[index], vjp\n\n\n@primitive\ndef add_rows",
        "select_rows: the gradient goes to the first rows",
        primitive("select_rows"),
    ),
    Mutant(
        "ops/shape.py",
        "    y = x.copy()\n    y[index] += rows",
        "    y = x\n    y[index] += rows",
        "add_rows: writes into its input",
        primitive("add_rows"),
    ),
    Mutant(
        "ops/shape.py",
        "return dy, dy[index]",
        "return dy, dy[: len(index)]",
        "add_rows: the gradient comes from the first rows",
        primitive("add_rows"),
    ),
    Mutant(
        "ops/shape.py",
        "xp.split(dy, ends[:-1], axis=axis)",
        "xp.split(dy, ends[:-1], axis=axis)[::-1]",
        "concatenate: the parts' gradients in reverse order",
        primitive("concatenate"),
    ),
    Mutant(
        "ops/embedding.py",
        "add_at(dweight, tokens.reshape(-1), cast(dy, before).reshape(-1, shape[1]))",
        "dweight[tokens.reshape(-1)] = cast(dy, before).reshape(-1, shape[1])",
        "embedding: a token that comes twice counts once",
        primitive("embedding"),
    ),
]

FUSED = [
    Mutant(
        "ops/activation.py",
        "return dy * (s * (1 + x * (1 - s)))",
        "return dy * (s * (1 + x * s))",
        "silu: σ instead of 1 − σ",
        primitive("silu"),
    ),
    Mutant(
        "ops/activation.py",
        "return dh * up * (s * (1 + gate * (1 - s))), dh * (gate * s)",
        "return dh * up * s, dh * (gate * s)",
        "silu_mul: the derivative of σ is dropped",
        primitive("silu_mul"),
    ),
    Mutant(
        "ops/activation.py",
        "return dh * up * (s * (1 + gate * (1 - s))), dh * (gate * s)",
        "return dh * (gate * s), dh * up * (s * (1 + gate * (1 - s)))",
        "silu_mul: the two gradients are swapped",
        primitive("silu_mul"),
    ),
    Mutant(
        "ops/activation.py",
        "(1 + 3 * 0.044715 * x * x)",
        "(1 + 0.044715 * x * x)",
        "gelu: the derivative of the cube lacks its 3",
        primitive("gelu_tanh"),
    ),
    Mutant(
        "ops/activation.py",
        "    e = xp.exp(-xp.abs(x))\n    return xp.where(x >= 0, 1, e) / (1 + e)",
        "    e = xp.exp(x)\n    return e / (1 + e)",
        "sigmoid: overflows far out",
        ("tests/ops/test_primitives.py::test_activations_far_out_are_finite_and_right",),
    ),
    Mutant(
        "ops/norm.py",
        "dx = cast((g - n * xp.mean(g * n, axis=-1, keepdims=True)) * inverse, dtype)",
        "dx = cast(g * inverse, dtype)",
        "rms_norm: ρ is taken for a constant",
        primitive("rms_norm"),
    ),
    Mutant(
        "ops/norm.py",
        "dx = cast((g - n * xp.mean(g * n, axis=-1, keepdims=True)) * inverse, dtype)",
        "dx = cast((g - n * xp.sum(g * n, axis=-1, keepdims=True)) * inverse, dtype)",
        "rms_norm: a sum instead of the mean",
        primitive("rms_norm"),
    ),
    Mutant(
        "ops/norm.py",
        "inverse = 1 / xp.sqrt(xp.mean(wide * wide, axis=-1, keepdims=True) + eps)",
        "inverse = 1 / (xp.sqrt(xp.mean(wide * wide, axis=-1, keepdims=True)) + eps)",
        "rms_norm: eps outside the root",
        primitive("rms_norm"),
    ),
    Mutant(
        "ops/norm.py",
        "xp.sqrt(xp.mean(wide * wide, axis=-1, keepdims=True) + eps)",
        "xp.sqrt(xp.mean(wide * wide, axis=-1, keepdims=True) + 1e-6)",
        "rms_norm: a fixed eps",
        primitive("rms_norm"),
    ),
    Mutant(
        "ops/norm.py",
        "            g = dy * cast(weight, inverse.dtype)\n            dx = cast((g - n",
        "            g = dy\n            dx = cast((g - n",
        "rms_norm: the weight is missing in dx",
        primitive("rms_norm"),
    ),
    Mutant(
        "ops/norm.py",
        "means = xp.mean(g, axis=-1, keepdims=True) + n * xp.mean(g * n, axis=-1, keepdims=True)",
        "means = n * xp.mean(g * n, axis=-1, keepdims=True)",
        "layer_norm: the mean of g is dropped",
        primitive("layer_norm"),
    ),
    Mutant(
        "ops/norm.py",
        "dbias = dy.reshape(-1, n.shape[-1]).sum(axis=0)",
        "dbias = (dy * n).reshape(-1, n.shape[-1]).sum(axis=0)",
        "layer_norm: db is dw",
        primitive("layer_norm"),
    ),
    Mutant(
        "ops/norm.py",
        "    wide = cast(x, compute_dtype(dtype))\n    inverse = 1 / xp.sqrt(xp.mean(wide * wide",
        '    wide = cast(x, xp.dtype("float32"))\n    inverse = 1 / xp.sqrt(xp.mean(wide * wide',
        "rms_norm: statistics in float32 in a float64 model",
        primitive("rms_norm"),
    ),
    Mutant(
        "ops/rotary.py",
        "return rotate(dy, cos, -sin)",
        "return rotate(dy, cos, sin)",
        "rotary: turned on instead of back",
        primitive("rotary"),
    ),
    Mutant(
        "ops/rotary.py",
        "first * cos - second * sin, second * cos + first * sin",
        "first * cos - second * sin, second * cos - first * sin",
        "rotary: a reflection",
        primitive("rotary"),
    ),
    Mutant(
        "ops/loss.py",
        "dz[xp.arange(len(labels)), labels] -= factor[:, 0]",
        "dz[xp.arange(len(labels)), labels] -= weights",
        "cross_entropy: dL is forgotten at the label",
        primitive("cross_entropy"),
    ),
    Mutant(
        "ops/loss.py",
        "    logits -= logits.max(axis=1, keepdims=True)\n    at_label = logits[row, labels]",
        "    at_label = logits[row, labels]\n    logits -= logits.max(axis=1, keepdims=True)",
        "cross_entropy: the label's logit is read before the maximum is taken off",
        primitive("cross_entropy"),
    ),
    Mutant(
        "ops/loss.py",
        "        p *= weights[part, None]",
        "        p *= weights[:1, None]",
        "linear_cross_entropy: every token has the first one's weight",
        primitive("linear_cross_entropy"),
    ),
    Mutant(
        "ops/loss.py",
        "            dweight += product(p.T, cast(x[part], wide))",
        "            dweight = product(p.T, cast(x[part], wide))",
        "linear_cross_entropy: dW of the last chunk only",
        primitive("linear_cross_entropy"),
    ),
    Mutant(
        "ops/loss.py",
        "loss = loss + (losses * weights[part]).sum()",
        "loss = (losses * weights[part]).sum()",
        "linear_cross_entropy: the loss of the last chunk only",
        primitive("linear_cross_entropy"),
    ),
    Mutant(
        "ops/loss.py",
        "    p, losses = softmax_and_losses(logits.astype(wide), labels)",
        "    p, losses = softmax_and_losses(logits, labels)",
        "cross_entropy: overwrites its input",
        primitive("cross_entropy"),
    ),
    Mutant(
        "ops/loss.py",
        "(None if dx is None else cast(dx * dloss, dtype))",
        "(None if dx is None else dx)",
        "linear_cross_entropy: dL is forgotten",
        primitive("linear_cross_entropy"),
    ),
]

ATTENTION = [
    Mutant(
        "ops/attention.py",
        "ds = p * (product(do_, shared(v).swapaxes(-1, -2)) - (do_ * grouped(o)).sum(axis=-1, keepdims=True))",
        "ds = p * product(do_, shared(v).swapaxes(-1, -2))",
        "attention: the softmax's row term is dropped",
        primitive("attention"),
    ),
    Mutant(
        "ops/attention.py",
        "dq = scale * product(ds, shared(k))",
        "dq = product(ds, shared(k))",
        "attention: dq lacks the scale",
        primitive("attention"),
    ),
    Mutant(
        "ops/attention.py",
        "dk = scale * product(ds.swapaxes(-1, -2), grouped(q)).sum(axis=2)",
        "dk = scale * product(ds.swapaxes(-1, -2), grouped(q))[:, :, 0]",
        "attention: dk of the first query head of a group only",
        primitive("attention"),
    ),
    Mutant(
        "ops/attention.py",
        "dv = product(p.swapaxes(-1, -2), do_).sum(axis=2)",
        "dv = product(p.swapaxes(-1, -2), do_).mean(axis=2)",
        "attention: dv is averaged over the group",
        primitive("attention"),
    ),
    Mutant(
        "ops/attention.py",
        "seen = distance >= 0",
        "seen = distance >= -1",
        "attention: sees one token ahead",
        (*primitive("attention"), *network("a_later_token_has_exactly_no_influence_on_earlier_logits")),
    ),
    Mutant(
        "ops/attention.py",
        "seen &= distance < window",
        "seen &= distance <= window",
        "attention: the window is one too wide",
        primitive("attention"),
    ),
    Mutant(
        "ops/attention.py",
        "segments[:, keys - queries :, None] == segments[:, None, :]",
        "segments[:, keys - queries :, None] >= segments[:, None, :]",
        "attention: sees earlier segments",
        primitive("attention"),
    ),
    Mutant(
        "ops/attention.py",
        "position[keys - queries :, None]",
        "position[:queries, None]",
        "attention: queries stand at the start of a cache",
        primitive("attention"),
    ),
]

LORA = [
    Mutant(
        "ops/lora.py",
        "    y += product(u, scaled_B.T)\n    if bias",
        "    y += product(u, lora_B.T)\n    if bias",
        "lora_linear: the scale is missing in the value",
        primitive("lora_linear"),
    ),
    Mutant(
        "ops/lora.py",
        "        d_lora_B = product(g.T, u) * scale if needs[4] else None",
        "        d_lora_B = product(g.T, u) if needs[4] else None",
        "lora_linear: the scale is missing in dB",
        primitive("lora_linear"),
    ),
    Mutant(
        "ops/lora.py",
        "        v = product(g, scaled_B) if needs[0] or needs[3] else None",
        "        v = product(g, scaled_B * scale) if needs[0] or needs[3] else None",
        "lora_linear: the scale twice in dA and dx",
        primitive("lora_linear"),
    ),
    Mutant(
        "ops/lora.py",
        "dx = (times(g, weight) + product(v, lora_A)).reshape(shape_x)",
        "dx = times(g, weight).reshape(shape_x)",
        "lora_linear: dx lacks the adapter's part",
        primitive("lora_linear"),
    ),
    Mutant(
        "ops/lora.py",
        "dx = (times(g, weight) + product(v, lora_A)).reshape(shape_x)",
        "dx = product(v, lora_A).reshape(shape_x)",
        "lora_linear: dx lacks the base's part",
        primitive("lora_linear"),
    ),
    Mutant(
        "ops/lora.py",
        "        v = product(g, scaled_B) if needs[0] or needs[3] else None",
        "        v = product(g, scaled_B) if needs[3] else None",
        "lora_linear: v is not there when only x needs a gradient",
        primitive("lora_linear"),
    ),
    Mutant(
        "ops/lora.py",
        "    tokens = tokens if needs[3] else None\n    u = u if needs[4] else None",
        "    tokens = tokens if needs[4] else None\n    u = u if needs[3] else None",
        "lora_linear: keeps x for dB and u for dA",
        primitive("lora_linear"),
    ),
    Mutant(
        "ops/lora.py",
        "(g.sum(axis=0) if needs[2] else None), d_lora_A",
        "(g.mean(axis=0) if needs[2] else None), d_lora_A",
        "lora_linear: db is averaged",
        primitive("lora_linear"),
    ),
    Mutant(
        "ops/lora.py",
        "(product(g.T, u) * scale if needs[2] else None)",
        "(product(g.T, u) if needs[2] else None)",
        "low_rank: the scale is missing in dB",
        primitive("low_rank"),
    ),
    Mutant(
        "ops/lora.py",
        "        return dy * mask()",
        "        return dy * (mask() > 0)",
        "dropout: 1 / (1 − p) is forgotten in backward",
        primitive("dropout"),
    ),
    Mutant(
        "lora/layer.py",
        "lora_linear(x, linear.weight, linear.bias, lora_A, lora_B, scale=self.scale * weight)",
        "lora_linear(x, linear.weight, linear.bias, lora_A, lora_B, scale=self.scale)",
        "an adapter's weight in a selection is forgotten",
        law("a_weighted_selection_is_the_weighted_sum_of_the_updates"),
    ),
    Mutant(
        "lora/layer.py",
        "        for layer, weight in active:\n            y = y + layer.update",
        "        for layer, weight in active[-1:]:\n            y = y + layer.update",
        "of several adapters only the last one applies",
        law("a_weighted_selection_is_the_weighted_sum_of_the_updates"),
    ),
    Mutant(
        "lora/layer.py",
        "if len(active) == 1 and not linear.weight.requires_grad and not self._drops",
        "if len(active) == 1 and not self._drops",
        "an unfrozen weight under an adapter gets no gradient",
        network("a_frozen_base_and_a_trained_one_are_checked_together"),
    ),
    Mutant(
        "lora/layer.py",
        "if owner == name])",
        "if owner is not None])",
        "by row: every adapter applies to all adapted rows",
        law("each_row_has_the_logits_of_its_own_adapter"),
    ),
    Mutant(
        "lora/layer.py",
        "seed = (layer.seed, self.number, selection.dropout_pass, selection.part)",
        "seed = None",
        "dropout: a new mask when a block runs again",
        law("checkpointing_changes_no_bit_of_a_gradient"),
    ),
    Mutant(
        "lora/config.py",
        "return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank",
        "return alpha / rank",
        "rsLoRA is not applied",
        law("the_update_is_proportional_to_alpha_and_has_at_most_rank_r"),
    ),
    Mutant(
        "lora/merge.py",
        "            update *= base.dtype.type(weight)\n",
        "            update *= base.dtype.type(1)\n",
        "merge: the adapter's weight is forgotten",
        law("a_weighted_selection_is_the_weighted_sum_of_the_updates"),
    ),
    Mutant(
        "lora/merge.py",
        "            setattr(modules[path], attribute, tensor)\n",
        "            getattr(modules[path], attribute).data = getattr(modules[path], attribute).data + 0.0\n",
        "unmerge: the merged weight stays",
        law("merging_leaves_the_logits_and_unmerging_restores_every_bit"),
    ),
]

NETWORK = [
    Mutant(
        "models/parts.py",
        "k = ops.rotary(k, cos=context.cos, sin=context.sin)",
        "k = ops.rotary(k, cos=context.cos, sin=context.sin) if context.segments is None else k",
        "packed keys are not rotated",
        network("packed_sequences_have_the_gradients_of_separate_ones"),
    ),
    Mutant(
        "models/causal_lm.py",
        "positions = segment_positions(segments)[:, -tokens.shape[1] :]",
        "positions = np.arange(tokens.shape[1])[None]",
        "positions do not restart at a segment",
        ("tests/models/test_network.py::test_the_network_sees_the_positions_that_restart",),
    ),
    Mutant(
        "models/causal_lm.py",
        "        targets[:, :-1][segments[:, 1:] != segments[:, :-1]] = IGNORED\n",
        "",
        "the last token of a segment predicts the next segment's first",
        network("packed_sequences_have_the_gradients_of_separate_ones"),
    ),
    Mutant(
        "models/causal_lm.py",
        "        targets[segments == 0] = IGNORED\n",
        "",
        "padding has a loss",
        network("padding_changes_no_gradient_of_a_real_token"),
    ),
    Mutant(
        "models/causal_lm.py",
        "    targets[:, :-1] = labels[:, 1:]",
        "    targets[:, :-1] = labels[:, :-1]",
        "labels are not shifted",
        ("tests/models/test_network.py::test_a_segment_predicts_within_itself_and_padding_predicts_nothing",),
    ),
    Mutant(
        "models/causal_lm.py",
        "run = partial(self._run_block, block, self.adapter_state.selection, context)",
        "run = partial(block, context=context)",
        "a checkpointed block runs again under whatever is selected by then",
        law("gradients_belong_to_the_selection_of_the_forward_pass"),
    ),
    Mutant(
        "models/llama.py",
        "        return x + self.mlp(self.post_attention_layernorm(x))",
        "        return x + self.mlp(self.input_layernorm(x))",
        "the MLP reads the attention's norm",
        network("every_parameter_moves_the_loss"),
    ),
    Mutant(
        "model.py",
        "            weights[mine] = 1 / total",
        "            weights[mine] = 1 / mine.sum()",
        "accumulation: each micro-batch is divided by its own count",
        law("accumulation_over_micro_batches_is_one_batch"),
    ),
    Mutant(
        "step.py",
        "self.model.loss_batch(*batch[:3], normaliser=total, bucket=bucket)",
        "self.model.loss_batch(*batch[:3], bucket=bucket)",
        "accumulation: a mean of means",
        law("accumulation_over_micro_batches_is_one_batch"),
    ),
    Mutant(
        "step.py",
        "losses[name] = losses[name] + part.data if name in losses else part.data",
        "losses[name] = part.data",
        "accumulation: the loss of the last micro-batch only",
        law("accumulation_over_micro_batches_is_one_batch"),
    ),
]

TAPE = [
    Mutant(
        "tensor.py",
        "        with _recording_set_to(True):\n            again = function(*leaves)",
        "        with _recording_set_to(False):\n            again = function(*leaves)",
        "checkpoint: the second run is not recorded",
        law("checkpointing_changes_no_bit_of_a_gradient"),
    ),
    Mutant(
        "tensor.py",
        "node.pending[index] = grad if earlier is None else earlier + grad",
        "node.pending[index] = grad",
        "a value that is used twice gets the last gradient only",
        law("gradients_of_a_merged_weight_project_onto_those_of_A_and_B")
        + network("gradients_of_adapters_are_finite_differences"),
    ),
    Mutant(
        "tensor.py",
        "        leaf.grad = leaf.grad + grad.astype(leaf.data.dtype, copy=False)",
        "        leaf.grad = grad.astype(leaf.data.dtype, copy=False)",
        "a second backward pass overwrites the gradient",
        law("accumulation_over_micro_batches_is_one_batch"),
    ),
    Mutant(
        "tensor.py",
        "heapq.heappush(heap, (-node.order, node))",
        "heapq.heappush(heap, (node.order, node))",
        "nodes are visited before their gradients are complete",
        network("gradients_of_adapters_are_finite_differences"),
    ),
    Mutant(
        "tensor.py",
        "leaf.grad = grad.astype(leaf.data.dtype, copy=borrowed)",
        "leaf.grad = grad.astype(leaf.data.dtype, copy=False)",
        "a leaf's gradient shares memory with another",
        TENSOR,
    ),
    Mutant(
        "tensor.py",
        "leaves = [Tensor(array, requires_grad=need) for array, need in zip(arrays, needs, strict=True)]",
        "leaves = [Tensor(array, requires_grad=False) for array, need in zip(arrays, needs, strict=True)]",
        "checkpoint: no gradient goes through to what is below",
        law("checkpointing_changes_no_bit_of_a_gradient"),
    ),
    Mutant(
        "tensor.py",
        "        backward([again], [dy])",
        "        backward([again], [dy * 0 + 1])",
        "checkpoint: the incoming gradient is replaced by ones",
        law("checkpointing_changes_no_bit_of_a_gradient"),
    ),
]

OPTIMISER = [
    Mutant("optim.py", "v += (1 - beta2) * (g * g)", "v += (1 - beta2) * g", "Adam: g is not squared", OPTIM),
    Mutant("optim.py", "m *= beta1\n", "m *= beta2\n", "Adam: the wrong beta", OPTIM),
    Mutant("optim.py", "1 / math.sqrt(1 - beta2**t)", "1.0", "Adam: no bias correction of v", OPTIM),
    Mutant("optim.py", "(lr / (1 - beta1**t))", "lr", "Adam: no bias correction of m", OPTIM),
    Mutant("optim.py", "denominator += self.eps", "denominator += 1e-8", "Adam: a fixed ε", OPTIM),
]

CHECK = [
    Mutant(
        "gradcheck.py",
        "SAFETY = 8.0",
        "SAFETY = 1e12",
        "gradcheck: everything is within the uncertainty",
        checker("one_wrong_entry_is_named"),
    ),
    Mutant(
        "gradcheck.py",
        "unresolved = SAFETY * numeric.uncertainty > magnitude / 4",
        "unresolved = False",
        "gradcheck: what lies below the noise floor passes",
        checker("a_gradient_below_the_noise_floor_is_inconclusive_and_never_passed"),
    ),
    Mutant(
        "gradcheck.py",
        'verdict = "inconclusive" if unresolved else "checked"',
        'verdict = "inconclusive"',
        "gradcheck: nothing is ever decided",
        checker("inconclusive_entries_are_counted_beside_those_that_were_checked"),
    ),
    Mutant(
        "gradcheck.py",
        '        if not math.isfinite(analytic):\n            verdict = "wrong"\n        elif',
        "        if",
        "gradcheck: NaN passes",
        checker("an_infinite_gradient_is_wrong_even_where_no_difference_can_be_taken"),
    ),
    Mutant(
        "gradcheck.py",
        "        if len(below) > 1:",
        "        if False:",
        "gradcheck: what lies below the floor is not looked at together",
        checker("entries_below_the_floor_are_caught_together_along_a_direction"),
    ),
    Mutant(
        "gradcheck.py",
        "RTOL = 1e-7",
        "RTOL = 1e-2",
        "gradcheck: a loose tolerance",
        checker("a_wrong_factor_is_caught_at_every_magnitude"),
    ),
    Mutant(
        "gradcheck.py",
        "        return [tensor.data.copy() for tensor in _tensors(fn())]",
        "        return [tensor.data for tensor in _tensors(fn())]",
        "gradcheck: views of what moves are kept",
        checker("functions_that_return_views_of_their_inputs_are_checked"),
    ),
    Mutant(
        "differences.py",
        "            array[index] = own\n\n    def along(",
        "            pass\n\n    def along(",
        "differences: an entry is not put back",
        checker("inputs_and_their_gradients_are_as_before"),
    ),
    Mutant(
        "differences.py",
        "            leaves[label].data[...] = array\n",
        "            leaves[label].data[...] = array * (1 + 1e-15)\n",
        "differences: a direction is not put back to the bit",
        checker("inputs_and_their_gradients_are_as_before"),
    ),
    Mutant(
        "differences.py",
        "array_module(y).maximum(variance**0.5, EPS * abs(y))",
        "(EPS * abs(y))",
        "differences: the noise is assumed, not measured",
        checker("the_noise_of_a_single_number_is_measured_too"),
    ),
    Mutant(
        "differences.py",
        "(4.0 ** (column + 1) - 1.0)",
        "(2.0 ** (column + 1) - 1.0)",
        "differences: extrapolated as if D were of first order",
        checker("an_entry_of_a_smooth_function_takes_three_pairs_of_evaluations"),
    ),
]

CHAIN = ("tests/kernels/test_chains.py",)

KERNELS = [
    Mutant(
        "kernels/cpu/elementwise.py",
        "    np.multiply(dh, t, out=dup)",
        "    np.multiply(dh, s, out=dup)",
        "kernel silu_mul: σ instead of silu for dup",
        kernel("silu_mul"),
    ),
    Mutant(
        "kernels/cpu/elementwise.py",
        "silu_mul_into(gate[a:b], up[a:b], h[a:b])",
        "silu_mul_into(gate[a:b], up[a:b], h[: b - a])",
        "kernel silu_mul: every block writes to the first rows",
        kernel("silu_mul"),
    ),
    Mutant(
        "kernels/cpu/elementwise.py",
        "lambda a, b, out: silu_mul_rows(gate[a:b], up[a:b], out)",
        "lambda a, b, out: silu_mul_rows(gate[: b - a], up[a:b], out)",
        "kernel silu_mul: the first rows' gate when it is made again",
        CHAIN,
    ),
    Mutant(
        "kernels/cpu/elementwise.py",
        "coefficient *= inverse * inverse / x.shape[1]",
        "coefficient *= inverse / x.shape[1]",
        "kernel rms_norm: 1/ρ is not squared",
        kernel("rms_norm"),
    ),
    Mutant(
        "kernels/cpu/elementwise.py",
        "    inverse += eps\n",
        "",
        "kernel rms_norm: eps is forgotten",
        kernel("rms_norm"),
    ),
    Mutant(
        "kernels/cpu/elementwise.py",
        "    remember_scaled(result, x, inverse, weight)\n    return result, vjp",
        "    remember_scaled(result, x, inverse, None)\n    return result, vjp",
        "kernel rms_norm: the weight is missing where its output is made again",
        CHAIN,
    ),
    Mutant(
        "kernels/cpu/elementwise.py",
        "dx[a:b] += ds[a:b]",
        "pass",
        "kernel add_rms_norm: the residual stream's own gradient is dropped",
        kernel("add_rms_norm"),
    ),
    Mutant(
        "kernels/cpu/elementwise.py",
        "    np.subtract(gate, t, out=t)\n    t += 1",
        "    np.subtract(gate, t, out=t)",
        "kernel silu_mul: the derivative lacks its first term",
        kernel("silu_mul"),
    ),
    Mutant(
        "kernels/cpu/linear.py",
        "v_part *= kept.left[a:b]",
        "pass",
        "kernel lora_linear: dA lacks the norm's factor of each token",
        CHAIN,
    ),
    Mutant(
        "kernels/cpu/linear.py",
        "d_lora_A *= kept.right",
        "pass",
        "kernel lora_linear: dA lacks the norm's weight",
        CHAIN,
    ),
    Mutant(
        "kernels/cpu/linear.py",
        "dx[begin:end] += out[:, :inside]",
        "pass",
        "kernel lora_linears: dx of the first layer only",
        kernel("lora_linears"),
    ),
    Mutant(
        "kernels/cpu/linear.py",
        "v[:, layer.columns] = out[:, inside : inside + layer.rank]",
        "pass",
        "kernel lora_linear: v is not taken from the product with [W, s B]",
        (*kernel("lora_linear"), *CHAIN),
    ),
    Mutant(
        "kernels/cpu/linear.py",
        "np.matmul(layer.scaled_B[part], layer.lora_A, out=term)",
        "np.matmul(layer.lora_B[part], layer.lora_A, out=term)",
        "kernel lora_linear: W + B A without the scale",
        (*kernel("lora_linear"), *CHAIN),
    ),
    Mutant(
        "kernels/cpu/linear.py",
        "return parts[0] if len(parts) == 1 else parts.sum(axis=0)",
        "return parts[0]",
        "kernel lora_linear: dA and dB of the first block only",
        kernel("lora_linear"),
    ),
    Mutant(
        "kernels/cpu/linear.py",
        ".T * layer.scale if layer.needs_B else None",
        ".T if layer.needs_B else None",
        "kernel lora_linear: dB lacks the scale",
        kernel("lora_linear"),
    ),
    Mutant(
        "kernels/cpu/linear.py",
        "add_product(u[a:b, layer.columns], layer.scaled_B.T, result[a:b])",
        "pass",
        "kernel lora_linear: y lacks the adapter's part where W is not merged",
        kernel("lora_linear"),
    ),
    Mutant(
        "kernels/cpu/linear.py",
        "np.matmul(g[a:b], layer.scaled_B, out=v_part[:, layer.columns])",
        "np.matmul(g[a:b], layer.lora_B, out=v_part[:, layer.columns])",
        "kernel lora_linear: v lacks the scale",
        kernel("lora_linear"),
    ),
    Mutant(
        "kernels/cpu/linear.py",
        "np.matmul(g[:, a:b].T, kept, out=dweight[a:b])",
        "np.matmul(g[:, a:b].T, kept, out=dweight[: b - a])",
        "kernel linear: every block of dW goes to the first rows",
        kernel("linear"),
    ),
    Mutant(
        "kernels/cpu/attention.py",
        "ds -= delta.reshape(heads, -1, 1)",
        "pass",
        "kernel attention: the softmax's row term is dropped",
        kernel("attention"),
    ),
    Mutant(
        "kernels/cpu/attention.py",
        "low = 0 if self.window is None else max(0, first - self.window + 1)",
        "low = 0 if self.window is None else max(0, first - self.window + 2)",
        "kernel attention: a block of keys begins one late",
        kernel("attention"),
    ),
    Mutant(
        "kernels/cpu/attention.py",
        "sum_dk[:, keys] += np.matmul(ds.transpose(0, 2, 1), qb, out=term)",
        "sum_dk[:, keys] = np.matmul(ds.transpose(0, 2, 1), qb, out=term)",
        "kernel attention: dk of the last block of queries only",
        kernel("attention"),
    ),
    Mutant(
        "kernels/cpu/attention.py",
        "        total += top\n",
        "",
        "kernel attention: the log-sum-exp lacks the maximum",
        kernel("attention"),
    ),
    Mutant(
        "kernels/cpu/rotary.py",
        "table = row if len(cosines) > 1 else 0",
        "table = 0",
        "kernel rotary: every sequence has the first one's positions",
        kernel("rotary"),
    ),
    Mutant(
        "kernels/cpu/memory.py",
        "            if sys.getrefcount(held[index]) == FREE:\n                return held[index]",
        "            return held[index]",
        "buffers: one that is in use is given out again",
        CHAIN,
    ),
    Mutant(
        "models/cache.py",
        "held[:, self.length : self.length + time] = new.data",
        "held[:, :time] = new.data",
        "KV cache: new keys overwrite the first ones",
        ("tests/models/test_network.py::test_logits_through_the_cache_are_those_of_one_pass",),
    ),
    Mutant(
        "models/cache.py",
        "self.length = min(self.length, length)",
        "pass",
        "KV cache: what was cut off stays",
        ("tests/models/test_network.py::test_a_truncated_cache_goes_on_from_there",),
    ),
    Mutant(
        "models/rope.py",
        "        if needed > len(self.cos):",
        "        if not len(self.cos):",
        "rotary table: not grown for a longer sequence",
        ("tests/models",),
    ),
]


def variant(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/lora/test_variants.py::test_{name}" for name in names)


VARIANTS = [
    Mutant(
        "ops/dora.py",
        "cast(g * factor, dtype)",
        "cast(g, dtype)",
        "DoRA: dz without m / n",
        primitive("with_magnitude"),
    ),
    Mutant(
        "ops/dora.py",
        ".sum(axis=0) / norm if needs[1]",
        ".sum(axis=0) if needs[1]",
        "DoRA: dm is not divided by the norm",
        primitive("with_magnitude"),
    ),
    Mutant(
        "ops/dora.py",
        "rows(g * cast(z, g.dtype))",
        "rows(g * cast(y, g.dtype))",
        "DoRA: dm from y, which has the magnitude and the bias in it",
        primitive("with_magnitude"),
    ),
    Mutant(
        "kernels/cpu/dora.py",
        'np.sum(g[a:b], axis=0, out=sums["b"][number])',
        'np.sum(g, axis=0, out=sums["b"][number])',
        "DoRA's kernel: every block sums all of the bias's gradient",
        kernel("with_magnitude"),
    ),
    Mutant(
        "lora/variants/dora.py",
        "base + 2 * s * cross + update",
        "base + s * cross + update",
        "DoRA: the norm's cross term is halved",
        variant("the_norm_is_that_of_the_rows_of_W_plus_its_update"),
    ),
    Mutant(
        "lora/variants/dora.py",
        "update = s * s * (",
        "update = s * (",
        "DoRA: the scale is not squared in the norm",
        variant("the_norm_is_that_of_the_rows_of_W_plus_its_update"),
    ),
    Mutant(
        "lora/variants/dora.py",
        "if weight.requires_grad or self.base_squares is None",
        "if self.base_squares is None",
        "DoRA: the norms of a trained weight are kept",
        variant("the_norms_of_a_frozen_weight_are_made_once_and_of_a_trained_one_each_time"),
    ),
    Mutant(
        "lora/variants/dora.py",
        "now[1].copy(), now[2].copy(),",
        "now[1], now[2],",
        "DoRA: generating compares A and B with themselves",
        variant("generating_reads_W_once_and_notices_what_training_changed_in_place"),
    ),
    Mutant(
        "lora/variants/dora.py",
        "self.magnitude, None, norm=self.norm(linear)) - base",
        "self.magnitude, None, norm=self.norm(linear))",
        "DoRA by row: the base is added twice",
        variant("each_row_has_the_logits_and_gradients_of_its_own_adapter"),
    ),
    Mutant(
        "lora/variants/dora.py",
        "        if weight != 1:\n",
        "        if weight == 0:\n",
        "DoRA: a weight that is not 1 is forgotten",
        variant("a_weighted_selection_is_the_weighted_sum_of_the_updates"),
    ),
    Mutant(
        "lora/variants/dora.py",
        "/ norm)[:, None] * direction - base",
        "/ norm)[:, None] * direction",
        "DoRA: merging adds the base twice",
        variant("merging_leaves_the_logits_and_unmerging_restores_every_bit"),
    ),
    Mutant(
        "lora/variants/dora.py",
        "        self.held = self.norm(linear)\n",
        "        self.held = None\n",
        "DoRA: the norm is not held while differences are taken",
        variant("the_gradients_are_those_of_finite_differences"),
    ),
    Mutant(
        "lora/variants/pissa.py",
        "self.start_B = left * root * math.copysign(1.0, self.scale)",
        "self.start_B = left * root",
        "PiSSA: the sign of a negative scale is lost",
        variant("s_B_A_starts_as_the_best_approximation_of_that_rank"),
    ),
    Mutant(
        "lora/variants/pissa.py",
        "sqrt(values / abs(self.scale))",
        "sqrt(values)",
        "PiSSA: the scale is not taken out of the singular values",
        variant("s_B_A_starts_as_the_best_approximation_of_that_rank"),
    ),
    Mutant(
        "lora/variants/pissa.py",
        "return self.start_A, -self.start_B",
        "return self.start_A, self.start_B",
        "PiSSA: the principal part is added again instead of subtracted",
        variant("pissa_starts_as_the_base_to_rounding"),
    ),
    Mutant(
        "lora/variants/pissa.py",
        "ops.low_rank(x, *self.start(), scale=scale)",
        "ops.low_rank(dropped, *self.start(), scale=scale)",
        "PiSSA: dropout on the part that is the base's",
        variant("dropout_is_on_what_is_trained_and_not_on_what_is_subtracted"),
    ),
    Mutant(
        "lora/variants/pissa.py",
        "self.start_A.copy(), self.start_B.copy()",
        "self.start_A, self.start_B",
        "PiSSA: training changes what is to be subtracted",
        variant(
            "merging_leaves_the_logits_and_unmerging_restores_every_bit",
            "the_gradients_are_those_of_finite_differences",
        ),
    ),
    Mutant(
        "lora/variants/pissa.py",
        "factor = math.sqrt(2) if config.use_rslora else 2",
        "factor = 2",
        "PiSSA: saved with the wrong alpha for rsLoRA",
        variant("it_is_saved_as_plain_lora_of_twice_the_rank_at_the_same_scale"),
    ),
    Mutant(
        "lora/variants/pissa.py",
        "        directions = directions.T\n",
        "        directions = random\n",
        "power iterations start anew each time",
        variant("power_iterations_come_close_to_the_largest_singular_values"),
    ),
    Mutant(
        "lora/variants/lora_fa.py",
        "self.lora_A.requires_grad = False",
        "self.lora_A.requires_grad = True",
        "LoRA-FA: A is trained",
        variant("lora_fa_trains_B_only_with_the_gradient_that_lora_has"),
    ),
    Mutant(
        "ops/lora.py",
        "tokens = tokens if needs[3] else None",
        "tokens = tokens if any(needs) else None",
        "lora_linear: x is kept for an A that is frozen",
        variant("backward_of_lora_fa_keeps_no_input"),
    ),
    Mutant(
        "lora/variants/lora_plus.py",
        "if name in found or tensor.ndim == 1",
        "if tensor.ndim == 1",
        "LoRA+: B learns at A's rate",
        variant("the_ratio_goes_to_B_and_to_vectors"),
    ),
    Mutant(
        "optim.py",
        "lr = self.lr * self.lr_scale.get(name, 1.0)",
        "lr = self.lr",
        "AdamW: a parameter's own rate is forgotten",
        variant("a_step_with_a_ratio_is_one_with_that_rate_for_B_alone"),
    ),
    Mutant(
        "optim.py",
        "w *= 1 - lr * self.weight_decay",
        "w *= 1 - self.lr * self.weight_decay",
        "AdamW: decay at the common rate",
        variant("a_step_with_a_ratio_is_one_with_that_rate_for_B_alone"),
    ),
]

TOGETHER = ("tests/lora/test_many_adapters.py::test_trainings_side_by_side_are_the_trainings_of_each_alone",)
COMBINED = ("tests/lora/test_combine.py",)
MERGED = ("tests/lora/test_merge.py",)
BLOCKS = ("tests/formats/test_gguf_blocks.py",)

MANY = [
    Mutant(
        "step.py",
        "named - set(losses)",
        "set()",
        "many adapters: one without a label steps on zeros",
        (
            "tests/lora/test_many_adapters.py::test_an_adapter_without_a_label_in_a_step_takes_none_whatever_optimises_it",
        ),
    ),
    Mutant(
        "step.py",
        "self.max_grad_norm.get(name)",
        "next(iter(self.max_grad_norm.values()))",
        "many adapters: the first one's clipping for all",
        TOGETHER,
    ),
    Mutant(
        "model.py",
        "self._training_passes.update(list(labelled))",
        "self._training_passes.update(list(self.active_adapters))",
        "many adapters: a mask is drawn and lost in a batch without a label",
        TOGETHER,
    ),
    Mutant(
        "lora/layer.py",
        "number = self.dropout_pass if self.dropout_pass is None or self.row_passes is None else self.row_passes[name]",
        "number = self.dropout_pass",
        "many adapters: dropout masks follow the passes of all",
        TOGETHER,
    ),
    Mutant(
        "lora/combine.py",
        "scales = [weight * layer.scale for",
        "scales = [weight for",
        "combining: an adapter's own scale is forgotten",
        COMBINED,
    ),
    Mutant(
        "lora/combine.py",
        "scales = [weight * layer.scale for",
        "scales = [abs(weight) * layer.scale for",
        "combining: the sign of a weight is lost",
        COMBINED,
    ),
    Mutant(
        "lora/combine.py",
        "whole.left[:, :rank] * root",
        "whole.left[:, :rank] * root**2",
        "svd: σ is in both factors",
        COMBINED,
    ),
    Mutant(
        "lora/combine.py",
        "squares[len(lora_A) :]",
        "squares[len(lora_A) + 1 :]",
        "svd: the error leaves out the first value that was cut off",
        COMBINED,
    ),
    Mutant(
        "lora/combine.py",
        "alpha_pattern={name: float(rank) for name, rank in pattern.items()},",
        "alpha_pattern={},",
        "combining: layers of another rank get another scale",
        COMBINED,
    ),
    Mutant("lora/merge.py", "    total += base\n", "", "merge: W is lost", MERGED),
    Mutant(
        "lora/merge.py",
        "    if not bool(array_module(values).isfinite(values).all()):",
        "    if False:",
        "merge: no check for values that are not finite",
        MERGED,
    ),
    Mutant(
        "lora/merge.py",
        "_norm(values - value) / whole",
        "_norm(values - wide) / whole",
        "requantise: the error is that against W",
        BLOCKS,
    ),
    Mutant(
        "lora/merge.py",
        "if isinstance(base.data, CompressedWeight) and quantised is None:",
        "if False:",
        "merging into blocks without a choice",
        BLOCKS,
    ),
    Mutant("formats/gguf_blocks.py", "values -= self.zero", "values -= 0", "Q4_0: the zero point is forgotten", BLOCKS),
    Mutant(
        "formats/gguf_blocks.py",
        "values[:, : BLOCK // 2] = quants & 15",
        "values[:, : BLOCK // 2] = quants >> 4",
        "blocks of 4 bits: high halves for low ones",
        BLOCKS,
    ),
    Mutant(
        "formats/gguf_blocks.py",
        "values += wide[:, 1:]",
        "values -= wide[:, 1:]",
        "Q4_1: the minimum is taken off",
        BLOCKS,
    ),
    Mutant("formats/gguf_blocks.py", "np.float32(127)", "np.float32(128)", "Q8_0: a range of 128", BLOCKS),
    Mutant(
        "formats/gguf_blocks.py",
        "np.float32(self.zero + 0.5)",
        "np.float32(self.zero)",
        "blocks of 4 bits: rounded down",
        BLOCKS,
    ),
    Mutant(
        "formats/gguf_blocks.py",
        "                    columns += term\n",
        "                    columns[...] = term\n",
        "g W over blocks: the last tile only",
        BLOCKS,
    ),
    Mutant(
        "formats/gguf_blocks.py",
        "y[:, a:b] = matmul(x, cast(self.tile(slice(None), slice(a, b)), x.dtype))",
        "y[:, a:b] = matmul(x, cast(self.tile(slice(None), slice(0, b - a)), x.dtype))",
        "x Wᵀ over blocks: the first tile everywhere",
        BLOCKS,
    ),
    Mutant(
        "formats/gguf.py",
        "stored = restore_rows(stored, self.heads)",
        "pass",
        "blocks of q and k stay in llama.cpp's order",
        ("tests/formats/test_gguf.py", *BLOCKS),
    ),
]

MUTANTS = [
    *ARITHMETIC,
    *MATRICES,
    *MOVES,
    *FUSED,
    *ATTENTION,
    *LORA,
    *NETWORK,
    *TAPE,
    *OPTIMISER,
    *CHECK,
    *KERNELS,
    *VARIANTS,
    *MANY,
]
