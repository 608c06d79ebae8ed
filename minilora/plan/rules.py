"""What each primitive makes, keeps for its backward pass, and needs on the way: a rule a primitive, in shapes.

A rule has its primitive's signature and, like it, returns (value, vjp). Its closure keeps the arrays that the primitive
keeps, so that the tape decides how long they live; what it makes it takes from the ledger. When a kernel in kernels/cpu
comes to keep or need something else, its rule here is what has to follow; tests/plan measures.

The facts, for the CPU, in the order of the code below (N tokens, D width, F MLP width, V vocabulary, r rank):

    primitive               makes            keeps                               needs on the way
    embedding               (N, D)           –
    rms_norm                (N, D)           x, 1/ρ (N)                          its result can be made again from these
    layer_norm              (N, D)           x, μ, 1/σ                           two (N, D), four in backward
    linear, frozen          (N, out)         –                                   W in float32, if held in another dtype
    linear, trained         (N, out)         x                                   dW in backward
    lora_linear             (N, out), u      what x is made from, else x; u      dA and dB of each share of the work
    lora_linears            as lora_linear, for layers of one x together
    add                     (N, D)           –
    with_magnitude          (N, out)         z (N, out), if m is trained         –
    sub                     (N, D)           –
    add_rms_norm            s, y             s, 1/ρ                              y can be made again from these
    rotary                  (N, H d)         –
    attention               o, log Σ (N, H)  q, k, v, log Σ; on a GPU o          dk and dv, of each share of the work
    silu_mul                (N, F)           gate, up                            its result can be made again from these
    gelu_tanh               (N, F)           x                                   two (N, F), four in backward
    select_rows             (M, D)           –
    linear_cross_entropy    dx (M, D)        dx                                  a tile of the logits a thread

On the CPU each thread has scratch for blocks of rows besides, a few MB: `blocks_of`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..backend import compute_dtype
from ..kernels.cpu.attention import BLOCK_ENTRIES as SCORES
from ..kernels.cpu.attention import STEP
from ..kernels.cpu.elementwise import BLOCK_ENTRIES
from ..kernels.cpu.linear import LEAST_ROWS, MOST_ROWS, SKINNY_ENTRIES
from ..kernels.cpu.loss import TILE
from ..kernels.cpu.threads import thread_count
from ..ops.loss import CHUNK_ENTRIES
from ..tensor import PRIMITIVES, Kernel
from .shapes import Ledger, ShapeArray

FUSED = ("lora_linears", "add_rms_norm", "add_layer_norm")


class Rules:
    """The rules of one device over one ledger: each method that has a primitive's name is its rule.

    on_gpu: every array is from the pool, nothing is widened or cut up for threads, and logits come in chunks.
    keeps_copies: a GPU's copies of trained weights stay from step to step (those of a recomputed block do not).
    """

    def __init__(self, ledger: Ledger, on_gpu: bool = False, keeps_copies: bool = True) -> None:
        self.ledger, self.on_gpu = ledger, on_gpu
        self.copies: dict[int, ShapeArray] = {}  # of trained weights in the activations' dtype, by the weight's id()
        self.keeps_copies = keeps_copies
        self.threads = 1 if on_gpu else thread_count()

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, primitives that are called with a ShapeArray run their rules.

        Those in FUSED are called only where a kernel takes several primitives in one, so they have a rule only there.
        """
        device = "cuda" if self.on_gpu else "cpu"
        known = {
            name: rule
            for name, primitive in PRIMITIVES.items()
            if (rule := getattr(self, name, None)) is not None
            and (name not in FUSED or any(kernel.device == device for kernel in primitive.kernels))
        }
        for name, rule in known.items():
            PRIMITIVES[name].kernels.append(Kernel(rule, "cpu", has_shape_array))
        try:
            yield
        finally:
            for name in known:
                PRIMITIVES[name].kernels.pop()

    # --- what the rules are written in -------------------------------------------------------------------------------

    def reused(self, shape: tuple[int, ...], dtype: Any) -> ShapeArray:
        """A result from kernels/cpu/memory.py: its buffer is used again and never given back."""
        return ShapeArray.taken(self.ledger, shape, dtype, pooled=True)

    def fresh(self, shape: tuple[int, ...], dtype: Any, touched: int | None = None) -> ShapeArray:
        """A result from NumPy's own allocator."""
        return ShapeArray.taken(self.ledger, shape, dtype, pooled=self.on_gpu, touched=touched)

    def unread(self, shape: tuple[int, ...], dtype: Any) -> ShapeArray:
        """A result that nobody reads (ops.linalg.unread)."""
        return ShapeArray.taken(self.ledger, shape, dtype, touched=0)

    def on_the_way(self, nbytes: int) -> None:
        """Temporaries that are gone when the primitive returns."""
        self.ledger.passing(nbytes)

    def blocks_of(self, name: str, x: ShapeArray, most: int = BLOCK_ENTRIES) -> None:
        """Scratch for as many rows of x (..., width) as kernels take at a time, for each thread."""
        if not self.on_gpu:
            self.ledger.need_scratch(name, self.threads * min(x.size, most) * x.dtype.itemsize)

    def widened(self, weight: ShapeArray, dtype: np.dtype) -> None:
        """A weight that is held in another dtype is converted for the product, and not kept."""
        if weight.dtype != dtype and not self.on_gpu:
            self.on_the_way(weight.size * dtype.itemsize)

    # --- tables, norms -----------------------------------------------------------------------------------------------

    def embedding(self, weight: ShapeArray, *, tokens: Any, dtype: Any = None) -> Any:
        y = self.fresh((*tokens.shape, weight.shape[1]), weight.dtype if dtype is None else dtype)

        def vjp(dy: ShapeArray) -> Any:
            return self.fresh(weight.shape, weight.dtype, touched=tokens.size * weight.shape[1] * weight.dtype.itemsize)

        return y, vjp

    def rms_norm(self, x: ShapeArray, weight: ShapeArray, *, eps: float, needs: Any) -> Any:
        inverse = self.fresh((*x.shape[:-1], 1), compute_dtype(x.dtype))
        y = self.reused(x.shape, x.dtype)
        y.recipe = (x, inverse)

        def vjp(dy: ShapeArray) -> Any:
            dx = self.reused(x.shape, x.dtype) if needs[0] else None
            self.blocks_of("norm", x)
            if needs[1]:
                self.on_the_way(2 * x.nbytes + inverse.nbytes)
            return dx, (self.fresh(weight.shape, x.dtype) if needs[1] else None)

        return y, vjp

    def add_rms_norm(
        self, x: ShapeArray, delta: ShapeArray | None, weight: ShapeArray, *, eps: float, needs: Any
    ) -> Any:
        s = x if delta is None else self.reused(x.shape, x.dtype)
        y, norm_vjp = self.rms_norm(s, weight, eps=eps, needs=(needs[0] or needs[1], needs[2]))

        def vjp(ds: ShapeArray, dy: ShapeArray) -> Any:
            dx, dweight = norm_vjp(dy)
            return (dx if needs[0] else None), (dx if needs[1] else None), dweight

        return (s, y), vjp

    def layer_norm(self, x: ShapeArray, weight: ShapeArray, bias: ShapeArray, *, eps: float, needs: Any) -> Any:
        y, statistics = self.fresh(x.shape, x.dtype), self.fresh((*x.shape[:-1], 2), compute_dtype(x.dtype))
        self.on_the_way(2 * x.nbytes)

        def vjp(dy: ShapeArray) -> Any:
            dx = self.fresh(x.shape, x.dtype)
            self.on_the_way(4 * x.nbytes + statistics.nbytes)
            trained = (self.fresh(weight.shape, x.dtype) if need else None for need in needs[1:])
            return (dx if needs[0] else None), *trained

        return y, vjp

    def add_layer_norm(
        self, x: ShapeArray, delta: ShapeArray | None, weight: ShapeArray, bias: ShapeArray, *, eps: float, needs: Any
    ) -> Any:
        s = x if delta is None else self.reused(x.shape, x.dtype)
        y, norm_vjp = self.layer_norm(s, weight, bias, eps=eps, needs=(needs[0] or needs[1], *needs[2:]))

        def vjp(ds: ShapeArray, dy: ShapeArray) -> Any:
            dx, *trained = norm_vjp(dy)
            return (dx if needs[0] else None), (dx if needs[1] else None), *trained

        return (s, y), vjp

    # --- matrix products ---------------------------------------------------------------------------------------------

    def linear(
        self, x: ShapeArray, weight: ShapeArray, bias: ShapeArray | None = None, *, value: bool = True, needs: Any
    ) -> Any:
        shape_x = x.shape
        y = (self.reused if value else self.unread)((*shape_x[:-1], weight.shape[0]), x.dtype)
        if value:
            self.widened(weight, x.dtype)
        kept = x if needs[1] else None
        if self.on_gpu and needs[1] and weight.dtype != x.dtype and id(weight) not in self.copies:
            self.copies[id(weight)] = self.reused(weight.shape, x.dtype)  # kernels/cuda/lists.py keeps it

        def vjp(dy: ShapeArray) -> Any:
            dx = dweight = None
            if not self.keeps_copies:
                self.copies.pop(id(weight), None)
            if needs[0]:
                dx = self.reused(shape_x, dy.dtype)
                self.widened(weight, dy.dtype)
            if kept is not None:
                dweight = self.fresh(weight.shape, weight.dtype if self.on_gpu else dy.dtype)
            dbias = self.fresh(bias.shape, dy.dtype) if bias is not None and len(needs) > 2 and needs[2] else None
            return (dx, dweight, dbias)[: len(needs)]

        return y, vjp

    def lora_linear(
        self,
        x: ShapeArray,
        weight: ShapeArray,
        bias: ShapeArray | None,
        lora_A: ShapeArray,
        lora_B: ShapeArray,
        *,
        scale: float,
        value: bool = True,
        needs: Any,
    ) -> Any:
        (y,), vjp = self.lora_linears(x, weight, bias, lora_A, lora_B, scales=(scale,), value=value, needs=needs)
        return y, vjp

    def lora_linears(
        self, x: ShapeArray, *layers: Any, scales: tuple[float, ...], value: bool = True, needs: Any
    ) -> Any:
        group = [layers[4 * number : 4 * number + 4] for number in range(len(scales))]
        needed = [needs[4 * number + 1 : 4 * number + 5] for number in range(len(scales))]
        shape_x, inside, dtype = x.shape, x.shape[-1], x.dtype
        count, itemsize = x.size // inside, dtype.itemsize
        ranks = [0 if lora_A is None else len(lora_A) for _, _, lora_A, _ in group]
        outsides = [weight.shape[0] for weight, *_ in group]
        result = self.reused if value else self.unread
        ys = tuple(result((*shape_x[:-1], outside), dtype) for outside in outsides)
        u = self.fresh((count, sum(ranks)), dtype)
        for weight, *_ in group if value else ():
            self.widened(weight, dtype)
        kept_u = u if any(need[3] for need in needed) else None
        kept = (x.recipe or x) if any(need[2] for need in needed) else None

        def vjp(*dys: ShapeArray) -> Any:
            dx = self.reused(shape_x, dtype) if needs[0] else None
            if dx is not None:
                for weight, *_ in group:
                    self.widened(weight, dtype)
                if len(group) > 1:
                    self.blocks_of("a layer's share of dx", dx, MOST_ROWS * inside)
                self.blocks_of("a low-rank term", dx, min(SKINNY_ENTRIES, MOST_ROWS * inside))
            if isinstance(kept, tuple):
                self.blocks_of("an input made again", kept[0], min(SKINNY_ENTRIES, MOST_ROWS * inside))
            blocks = 1 if self.on_gpu else max(self.threads, -(-count // MOST_ROWS))
            parts = sum(rank * (inside + outside) for rank, outside in zip(ranks, outsides, strict=True))
            self.on_the_way(blocks * parts * itemsize)
            dA = self.fresh((sum(ranks), inside), dtype) if kept is not None else None
            gradients: list[Any] = [dx]
            column = 0
            for (_, bias, _, lora_B), need, rank in zip(group, needed, ranks, strict=True):
                gradients += [
                    None,
                    self.fresh(bias.shape, dtype) if need[1] else None,
                    dA[column : column + rank] if need[2] and dA is not None else None,
                    self.fresh(lora_B.shape, dtype) if need[3] and kept_u is not None else None,
                ]
                column += rank
            return tuple(gradients)

        return ys, vjp

    def low_rank(self, x: ShapeArray, lora_A: ShapeArray, lora_B: ShapeArray, *, scale: float, needs: Any) -> Any:
        rank, count = len(lora_A), x.size // x.shape[-1]
        u = self.fresh((count, rank), x.dtype)
        y = self.fresh((*x.shape[:-1], len(lora_B)), x.dtype)
        shape_x, kept, kept_u = x.shape, (x if needs[1] else None), (u if needs[2] else None)

        def vjp(dy: ShapeArray) -> Any:
            self.on_the_way(count * rank * dy.dtype.itemsize)
            return (
                self.fresh(shape_x, dy.dtype) if needs[0] else None,
                self.fresh(lora_A.shape, dy.dtype) if kept is not None else None,
                self.fresh(lora_B.shape, dy.dtype) if kept_u is not None else None,
            )

        return y, vjp

    def dropout(self, x: ShapeArray, *, probability: float, seed: Any) -> Any:
        """The mask is made Boolean and then of x's dtype; it is drawn again in backward."""
        y, shape, dtype = self.fresh(x.shape, x.dtype), x.shape, x.dtype
        on_the_way = x.size * (1 + dtype.itemsize)
        self.on_the_way(on_the_way)

        def vjp(dy: ShapeArray) -> Any:
            dx = self.fresh(shape, dtype)
            self.on_the_way(on_the_way)
            return dx

        return y, vjp

    # --- what a block does between its products ----------------------------------------------------------------------

    def add(self, a: Any, b: Any, *, needs: Any = (True, True)) -> Any:
        parts = [part for part in (a, b) if isinstance(part, ShapeArray)]
        shape = np.broadcast_shapes(*(part.shape for part in parts))
        take = self.reused if len(parts) == 2 and a.shape == b.shape else self.fresh
        y = take(shape, np.result_type(*(part.dtype for part in parts)))
        shapes = [getattr(part, "shape", ()) for part in (a, b)]

        def vjp(dy: ShapeArray) -> Any:
            return tuple(
                (dy if own == shape else self.fresh(own, dy.dtype)) if need else None
                for own, need in zip(shapes, needs, strict=True)
            )

        return y, vjp

    def mul(self, a: Any, b: Any, *, needs: Any = (True, True)) -> Any:
        whole = a if isinstance(a, ShapeArray) else b
        kept = (a if needs[1] else None, b if needs[0] else None)
        y = self.fresh(whole.shape, whole.dtype)

        def vjp(dy: ShapeArray) -> Any:
            shapes = (getattr(kept[1], "shape", dy.shape), getattr(kept[0], "shape", dy.shape))
            return tuple(self.fresh(shapes[side], dy.dtype) if need else None for side, need in enumerate(needs))

        return y, vjp

    def sub(self, a: ShapeArray, b: ShapeArray, *, needs: Any = (True, True)) -> Any:
        shape, y = a.shape, self.fresh(a.shape, np.result_type(a.dtype, b.dtype))

        def vjp(dy: ShapeArray) -> Any:
            return (dy if needs[0] else None), (self.fresh(shape, dy.dtype) if needs[1] else None)

        return y, vjp

    def with_magnitude(
        self, z: ShapeArray, magnitude: ShapeArray, bias: ShapeArray | None, *, norm: ShapeArray, needs: Any
    ) -> Any:
        """On a GPU without a kernel: products in the magnitude's dtype, narrowed afterwards."""
        shape, dtype, wide = z.shape, z.dtype, magnitude.dtype
        factor, y = self.fresh(magnitude.shape, wide), self.reused(shape, dtype)
        if self.on_gpu:
            self.on_the_way(z.size * wide.itemsize)
        kept = (norm, factor, z if needs[1] else None)

        def vjp(dy: ShapeArray) -> Any:
            if self.on_gpu:
                self.on_the_way(2 * dy.size * wide.itemsize)
            elif kept[2] is not None:
                self.blocks_of("magnitude", dy)
            return (
                self.reused(shape, dtype) if needs[0] else None,
                self.fresh(magnitude.shape, wide) if needs[1] else None,
                self.fresh(magnitude.shape, wide) if needs[2] else None,
            )

        return y, vjp

    def rotary(self, x: ShapeArray, *, cos: Any, sin: Any) -> Any:
        y = self.reused(x.shape, x.dtype)
        self.blocks_of("rotary", x)

        def vjp(dy: ShapeArray) -> Any:
            return self.reused(dy.shape, dy.dtype)

        return y, vjp

    def attention(
        self, q: ShapeArray, k: ShapeArray, v: ShapeArray, *, scale: float, segments: Any = None, window: Any = None
    ) -> Any:
        """The scores are made a block at a time and never kept."""
        (batch, queries, heads, _), keys = q.shape, k.shape[1]
        scores = min(queries, STEP) * keys  # of a head
        scores *= min(heads, max(heads // k.shape[2], SCORES // scores)) * q.dtype.itemsize
        o = self.reused(q.shape, q.dtype)
        logsumexp = self.fresh((batch, queries, heads), compute_dtype(q.dtype))
        kept = (q, k, v, logsumexp, o) if self.on_gpu else (q, k, v, logsumexp)

        def vjp(do: ShapeArray) -> Any:
            q, k, v, *_ = kept
            dq = self.reused(q.shape, q.dtype)
            if not self.on_gpu:
                self.ledger.need_scratch("scores and their gradients", 2 * self.threads * scores)
                self.ledger.need_scratch("keys, values and their gradients", 6 * self.threads * k.nbytes // batch)
            shares = max(1, min(queries // STEP, 2 * self.threads // batch))
            if shares > 1:
                self.on_the_way(2 * shares * k.nbytes)
            return dq, self.fresh(k.shape, k.dtype), self.fresh(v.shape, v.dtype)

        return o, vjp

    def silu_mul(self, gate: ShapeArray, up: ShapeArray) -> Any:
        h = self.reused(gate.shape, gate.dtype)
        h.recipe = (gate, up)

        def vjp(dh: ShapeArray) -> Any:
            for name in ("sigmoid", "silu"):
                self.blocks_of(name, gate)
            return self.reused(gate.shape, gate.dtype), self.reused(up.shape, up.dtype)

        return h, vjp

    def gelu_tanh(self, x: ShapeArray) -> Any:
        y = self.fresh(x.shape, x.dtype)
        self.on_the_way(2 * x.nbytes)

        def vjp(dy: ShapeArray) -> Any:
            dx = self.fresh(x.shape, x.dtype)
            self.on_the_way(3 * x.nbytes)
            return dx

        return y, vjp

    # --- views and moves ---------------------------------------------------------------------------------------------

    def reshape(self, x: ShapeArray, *, shape: Any) -> Any:
        before = x.shape
        return x.reshape(shape), lambda dy: dy.reshape(before)

    def transpose(self, x: ShapeArray, *, axes: Any = None) -> Any:
        return x.transpose(axes), lambda dy: dy.transpose(None if axes is None else np.argsort(axes))

    def getitem(self, x: ShapeArray, *, index: Any) -> Any:
        shape, dtype = x.shape, x.dtype
        return x[index], lambda dy: self.fresh(shape, dtype)

    def unstack(self, x: ShapeArray, *, axis: int) -> Any:
        before, shape, dtype = (slice(None),) * (axis % x.ndim), x.shape, x.dtype
        return tuple(x[(*before, index)] for index in range(shape[axis])), lambda *dys: self.fresh(shape, dtype)

    def select_rows(self, x: ShapeArray, *, index: Any) -> Any:
        shape, dtype = x.shape, x.dtype
        return self.fresh((len(index), *shape[1:]), dtype), lambda dy: self.fresh(shape, dtype, touched=dy.nbytes)

    # --- the loss ----------------------------------------------------------------------------------------------------

    def linear_cross_entropy(self, x: ShapeArray, weight: ShapeArray, *, labels: Any, weights: Any, needs: Any) -> Any:
        """A frozen head's logits come in tiles, a trained one's in chunks of CHUNK_ENTRIES, whose dW is a (V, D)."""
        (count, width), vocabulary, wide = x.shape, weight.shape[0], compute_dtype(x.dtype)
        dx = self.fresh(x.shape, x.dtype) if needs[0] else None
        dweight = self.fresh(weight.shape, wide) if needs[1] else None
        if needs[1] or self.on_gpu:
            chunk = min(count, max(1, CHUNK_ENTRIES // vocabulary))
            dweight_part = weight.size if needs[1] else 0
            self.on_the_way((chunk * (vocabulary + width) + dweight_part) * wide.itemsize)
        else:
            rows = min(MOST_ROWS, max(LEAST_ROWS, -(-count // self.threads)))
            tile = min(TILE, vocabulary)
            self.ledger.need_scratch("logits", self.threads * rows * tile * wide.itemsize)
            self.ledger.need_scratch("their term of dx", self.threads * rows * width * wide.itemsize)
            if weight.dtype != x.dtype:
                self.on_the_way(self.threads * tile * width * wide.itemsize)
        loss = self.fresh((), wide)

        def vjp(dloss: ShapeArray) -> Any:
            return (
                None if dx is None else self.fresh(dx.shape, dx.dtype),
                None if dweight is None else self.fresh(dweight.shape, wide),
            )

        return loss, vjp

    def cross_entropy(self, logits: ShapeArray, *, labels: Any, weights: Any) -> Any:
        """From logits, where the head has an adapter; they are made a chunk at a time and again in backward."""
        wide, dtype = compute_dtype(logits.dtype), logits.dtype
        probabilities, loss = self.fresh(logits.shape, wide), self.fresh((), wide)

        def vjp(dloss: ShapeArray) -> Any:
            return self.fresh(probabilities.shape, dtype)

        return loss, vjp


def has_shape_array(*arrays: Any, **options: Any) -> bool:
    return any(isinstance(array, ShapeArray) for array in arrays)
