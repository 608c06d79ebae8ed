"""LoRA at its smallest: a frozen 4×4 matrix learns a new task through 8 trained numbers instead of 16.

    python examples/four_by_four.py

The task is a target matrix that differs from W by a matrix of rank 1, which is what an adapter of rank 1 can reach:
B (4×1) times A (1×4). Everything below is one training loop, written out.
"""

import numpy as np

import minilora as ml

random = np.random.default_rng(0)
W = random.normal(size=(4, 4))  # pretrained and frozen: a plain array, so no gradient is ever computed for it
target = W + np.outer([1.0, -0.5, 0.0, 2.0], [0.5, 1.0, -1.0, 0.0])  # the matrix of the new task
x = random.normal(size=(32, 4))  # 32 examples, one a row
y = x @ target.T  # what the adapted layer should answer

A = ml.Tensor(random.normal(size=(1, 4)), requires_grad=True)  # random
B = ml.Tensor(np.zeros((4, 1)), requires_grad=True)  # zero, so that B A = 0 and training starts from exactly W
optimizer = ml.AdamW([A, B], lr=0.1, weight_decay=0.0)


def layer(x: np.ndarray) -> ml.Tensor:
    """x Wᵀ + (x Aᵀ) Bᵀ: the frozen matrix, and beside it the update that is being learned."""
    return ml.ops.lora_linear(x, W, None, A, B, scale=1.0)


print(f"W: {W.size} numbers, frozen.  A {A.shape} and B {B.shape}: {A.size + B.size} numbers, trained.\n")
print("step      loss     |dA|     |dB|")
for step in range(201):
    optimizer.zero_grad()
    loss = ((layer(x) - y) ** 2).mean()
    loss.backward()
    if step in (0, 1, 2, 5, 10, 20, 50, 100, 200):
        note = "  B is zero: dA = dy·B must be zero too, and only B can move" if step == 0 else ""
        print(f"{step:4d}  {float(loss):8.5f} {np.linalg.norm(A.grad):8.5f} {np.linalg.norm(B.grad):8.5f}{note}")
    optimizer.step()

merged = W + B.data @ A.data  # after this the adapter is not needed: one 4×4 matrix, no extra work at inference
print("\nlearned, B A:                    to be learned, target - W:")
for learned, wanted in zip(B.data @ A.data, target - W, strict=True):
    print("   ", " ".join(f"{value:6.3f}" for value in learned), "   ", " ".join(f"{value:6.3f}" for value in wanted))

new = random.normal(size=(8, 4))  # inputs that training has not seen
difference = np.abs(new @ merged.T - layer(new).numpy()).max()
print(f"\nMerged matrix W + B A against W with its adapter, on new inputs: largest difference {difference:.0e}")
print(f"Merged matrix against the target: largest difference {np.abs(merged - target).max():.0e}")
