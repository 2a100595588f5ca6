"""Which device to compute on, and how: nothing here changes what is computed, but for rounding."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.errors import UserError

_KERNELS = {
    "math": SDPBackend.MATH,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
_NO_KERNEL = (
    "No available kernel",
    "No viable backend for scaled_dot_product_attention",
)  # as torch says it, on CUDA and on a CPU


def pick_device(wanted: str, tf32: bool = False) -> torch.device:
    """`auto`: CUDA, else Apple's MPS, else the CPU.

    Args:
        tf32: let CUDA round float32 products to 10 bits of mantissa: several times faster, less exact.

    Raises:
        UserError: the named device is not there.
    """
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(wanted)
    there = {
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }[device.type]
    if not there:
        raise UserError(f"runtime.device: {wanted} is not available here (torch {torch.__version__}): use auto or cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)  # Accelerate takes the current one
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        # a debugging aid of that mode, which writes every new tensor twice
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.allow_tf32 = tf32  # off: float32 means float32
        torch.backends.cuda.matmul.allow_tf32 = tf32
    return device


def arrange(denoiser: nn.Module, gradient_checkpointing: bool, compile_: bool, channels_last: bool) -> None:
    """Set a denoiser up, in place, before it is trained.

    Args:
        gradient_checkpointing: keep the blocks' inputs alone and compute their insides again on the way back.
        compile_: let torch compile it; the first step takes minutes.
        channels_last: convolutions in NHWC, which tensor cores prefer.
    """
    network: Any = denoiser
    if gradient_checkpointing:
        network.enable_gradient_checkpointing()
    if channels_last:
        network.to(memory_format=torch.channels_last)
    if compile_:
        network.compile()


@contextmanager
def same_bytes_every_time(device: torch.device, wanted: bool) -> Iterator[None]:
    """Inside the block a GPU adds up in a fixed order, backward too; or may not, where that is not `wanted`.

    Where torch is only to warn of what is not deterministic, attention's backward pass is not: its fused kernels ask for the strict
    mode alone (ATen's transformers/cuda/attention_backward.cu). Elsewhere than in training nothing goes backward.

    Raises:
        UserError: an operation of this network has no deterministic kernel.
    """
    if device.type != "cuda":
        yield
        return
    torch.use_deterministic_algorithms(wanted)
    try:
        yield
    except RuntimeError as error:
        if not (wanted and "does not have a deterministic implementation" in str(error)):
            raise
        raise UserError(
            f"runtime.deterministic: {str(error).splitlines()[0]}\nSet it to false: the adapter may then differ in its last bits from run to run"
        ) from error
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)


@contextmanager
def attention_kernel(name: str) -> Iterator[None]:
    """Inside the block attention is computed by this kernel of torch's; `auto` leaves the choice to torch.

    Raises:
        UserError: the kernel is not made for this device, precision or width of an attention head.
    """
    if name == "auto":
        yield
        return
    try:
        with sdpa_kernel([_KERNELS[name]]):
            yield
    except RuntimeError as error:
        if not any(said in str(error) for said in _NO_KERNEL):
            raise
        raise UserError(
            f"runtime.attention: {name} cannot compute this network's attention on this device, in this precision: set it to auto"
        ) from error


def peak_mib() -> float:
    """Peak memory of this process, or of the GPU where there is one, in MiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB here
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


@contextmanager
def full_memory_is_the_users(denoiser: nn.Module, trainable: int, micro_batch: int) -> Iterator[None]:
    """A GPU whose memory does not do is no bug of ours: say what helps."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise out_of_memory(denoiser, trainable, micro_batch, error) from error


def out_of_memory(denoiser: nn.Module, trainable: int, micro_batch: int, error: Exception) -> UserError:
    """What to say when the GPU's memory does not do: the shares that are known, and the settings that help most."""
    base = sum(p.numel() * p.element_size() for p in denoiser.parameters()) / 2**30
    total = (
        torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / 2**30 if torch.cuda.is_available() else 0
    )
    return UserError(
        f"the GPU's memory is full ({total:.1f} GiB): {str(error).splitlines()[0][:200]}\n"
        f"The network takes {base:.1f} GiB, the adapter's gradients and optimiser state about {trainable * 12 / 2**30:.2f} GiB; "
        f"the rest is what {micro_batch} picture{'s' * (micro_batch > 1)} leave on the way to the gradient. What helps most:\n"
        f"  runtime.micro_batch: {max(1, micro_batch // 2)} (pictures per forward pass; the result stays the same)\n"
        "  runtime.gradient_checkpointing: true (slower by a third; the result stays the same)\n"
        "  train.mixed_precision: bf16 (half the network's memory)\n"
        "Then run again: the training goes on from its last checkpoint"
    )
